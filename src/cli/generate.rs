//! `evenkeel generate`.

use std::io::{IsTerminal, Read, stdin};
use std::thread;
use std::time::Duration;

use evenkeel::{
    Bytes, ChatTemplate, Error, ErrorKind, Finish, GenerateOptions, GenerateReport, LoadReport, LoadTimes, MIB,
    MeasuredGpu, Message, Result, Sampling, read_capped,
};
use serde::Serialize;

use super::args::{Format, GenerateArguments, OnShortfall, PromptArguments, SamplingArguments};
use super::model::{self, Need};
use super::printer::Printer;
use super::{Exit, Process, sandbox, signal};

/// New tokens where neither the user nor the context sets a limit.
const DEFAULT_NEW_TOKENS: usize = 256;
/// How long is waited before planning again, up to four times as long.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
const PROMPT_CAP: Bytes = Bytes(64 * MIB);

pub fn run(arguments: &GenerateArguments, process: &Process) -> Result<Exit> {
    let printer = &process.printer;
    let cancel = signal::cancel_by_interrupt()?;
    arguments.sampling.over(&Sampling::greedy()).check()?;
    let prompt = read_prompt(&arguments.prompt)?;
    let options = arguments.placement.options(None, process)?;
    let load_options = arguments.placement.load_options(cancel.clone(), process)?;
    let checkpoint = model::open(&arguments.model, Need::Weights, &cancel, process)?;
    let defaults = &checkpoint.config.generation;
    model::note_undone(&checkpoint, process);
    // Before anything is loaded.
    let prompt = if arguments.prompt.chat {
        let template = ChatTemplate::open(checkpoint.local_directory()?)?;
        let sandbox = sandbox::of_this_program(cancel.clone())?;
        sandbox.render(&template, &messages(&arguments.prompt, prompt), &[])?
    } else {
        prompt
    };
    let load = || model::load(&checkpoint, &options, None, &load_options, process);
    let mut model = match load() {
        Err(error) if error.kind() == ErrorKind::Shortfall && arguments.on_shortfall == OnShortfall::Replan => {
            printer.note(&format!("{error}; planning again with what is left"));
            // Whoever has taken it may have failed as well, and be about to try again.
            thread::sleep(SHORTEST_PAUSE * (1 + std::process::id() % 4));
            load()?
        }
        loaded => loaded?,
    };

    // A template has put the special tokens there itself.
    let tokens = model.tokenizer.encode(&prompt, !arguments.prompt.chat)?;
    let usual =
        model.plan.context.saturating_sub(tokens.len()).min(defaults.max_new_tokens.unwrap_or(DEFAULT_NEW_TOKENS));
    let options = GenerateOptions {
        sampling: arguments.sampling.over(&Sampling::of_model(&checkpoint.config)),
        max_new_tokens: Some(arguments.sampling.max_new_tokens.unwrap_or(usual)),
        stop: arguments.sampling.stop.clone(),
        ignore_eos: arguments.sampling.ignore_eos,
        cancel: cancel.clone(),
    };
    let mut generation = model.generate_from(&tokens, options)?;
    // Pieces are printed as they come; what was printed stays when the user stops it.
    for piece in &mut generation {
        let piece = piece?;
        match arguments.format {
            Format::Text => printer.generated(&piece.text)?,
            Format::Json => printer.json(&json_line(&Event::Token { token: piece.token, text: &piece.text }))?,
        }
        if cancel.is_cancelled() {
            break;
        }
    }
    let generated = generation.report();
    match arguments.format {
        Format::Text => printer.end_of_text()?,
        Format::Json => printer.json(&json_line(&Event::Done { generated: &generated, loaded: &model.report }))?,
    }
    if arguments.stats {
        printer.stats(&model.report, &generated);
    }
    Ok(if generated.finish == Finish::Interrupted { Exit::Interrupted } else { Exit::Done })
}

/// A line of `--format json`.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Token {
        token: Option<u32>,
        text: &'a str,
    },
    Done {
        #[serde(flatten)]
        generated: &'a GenerateReport,
        loaded: &'a LoadReport,
    },
}

fn json_line(event: &Event) -> String {
    // Numbers, texts and lists of such cannot fail to serialize.
    serde_json::to_string(event).unwrap_or_default() + "\n"
}

/// The prompt from the flag, the file or standard input.
fn read_prompt(arguments: &PromptArguments) -> Result<String> {
    let not_text =
        |what: String| move |e: std::string::FromUtf8Error| Error::input(format!("{what} is not UTF-8")).caused_by(e);
    match (&arguments.prompt, &arguments.prompt_file) {
        (Some(prompt), _) if prompt != "-" => Ok(prompt.clone()),
        (None, Some(file)) => {
            String::from_utf8(read_capped(file, PROMPT_CAP)?).map_err(not_text(format!("`{}`", file.display())))
        }
        (None, None) if stdin().is_terminal() => Err(Error::usage("there is no prompt")
            .hint("give one with `--prompt TEXT` or `--prompt-file FILE`, or pipe it in")),
        _ => {
            let mut bytes = Vec::new();
            let read = stdin().lock().take(PROMPT_CAP.0 + 1).read_to_end(&mut bytes);
            read.map_err(|e| Error::io("read", "standard input".as_ref(), e))?;
            if bytes.len() as u64 > PROMPT_CAP.0 {
                return Err(Error::input(format!("the prompt is longer than {PROMPT_CAP}")));
            }
            let mut text = String::from_utf8(bytes).map_err(not_text("standard input".to_owned()))?;
            // A shell's `echo` ends its line; that end is not meant as prompt.
            if text.ends_with('\n') {
                text.pop();
            }
            Ok(text)
        }
    }
}

fn messages(arguments: &PromptArguments, prompt: String) -> Vec<Message> {
    let system = arguments.system.clone().map(|text| Message::new("system", text));
    system.into_iter().chain([Message::new("user", prompt)]).collect()
}

impl SamplingArguments {
    /// What the user says, and of the rest what `other` has.
    pub fn over(&self, other: &Sampling) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(other.temperature),
            top_k: self.top_k.or(other.top_k),
            top_p: self.top_p.or(other.top_p),
            min_p: self.min_p.or(other.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(other.repetition_penalty),
            seed: self.seed,
        }
    }
}

impl Printer {
    fn stats(&self, loaded: &LoadReport, generated: &GenerateReport) {
        let rate = |count: usize, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let gigabytes = loaded.read.0 as f64 / 1e9 / loaded.seconds;
        let LoadReport { read, seconds, past_cache, .. } = loaded;
        self.note(&format!(
            "load      {read} in {seconds:.2} s, {gigabytes:.2} GB/s; {past_cache} past the page cache"
        ));
        let LoadTimes { read, pack, gpus, tokenizer } = loaded.times;
        self.note(&format!(
            "          waited {read:.2} s for reading, {gpus:.2} s for GPUs; packed or copied for {pack:.2} s on the CPU"
        ));
        self.note(&format!("          tokenizer read beside it in {tokenizer:.2} s"));
        let (prompt, new) = (generated.prompt_tokens, generated.generated_tokens);
        self.note(&format!("prefill   {prompt} tokens, {:.1} tok/s", rate(prompt, generated.prefill_seconds)));
        // The first token comes with the prefill.
        let decoded = new.saturating_sub(1);
        self.note(&format!("decode    {new} tokens, {:.1} tok/s", rate(decoded, generated.decode_seconds)));
        if let Some(why) = &generated.launched_apart {
            self.note(&format!("          each kernel is launched by itself: {why}"));
        }
        for device in &loaded.devices {
            if device.planned > Bytes::ZERO || device.measured > Bytes::ZERO {
                self.note(&format!("{:<9} planned {}, measured {}", device.id, device.planned, device.measured));
            }
            if let Some(MeasuredGpu { free_before, free_after, driver_planned, driver_measured }) = &device.gpu {
                self.note(&format!(
                    "          driver planned {driver_planned}, measured {driver_measured}; free {free_before}, now {free_after}"
                ));
            }
        }
    }
}
