//! `evenkeel chat`.

use std::io::{IsTerminal, stdin, stdout};
use std::path::Path;
use std::sync::atomic::Ordering;

use evenkeel::{
    Bytes, Cancel, ChatTemplate, Error, ErrorKind, Finish, GenerateOptions, LoadOptions, MIB, Message, Model, Result,
    Sampling, Sandbox, write_atomic,
};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::args::ChatArguments;
use super::model::{self, Need};
use super::{Exit, Process, sandbox, signal};

/// The longest message.
const MAX_MESSAGE: Bytes = Bytes(16 * MIB);
const HELP: &str = "\
/system TEXT   what the model is told before all else; without a text, nothing
/clear         forget what was said
/save FILE     write what was said as JSON
/memory        what each device holds, and how much of the context is left
/quit          end, as Ctrl-D does
Ctrl-C ends an answer.";

pub fn run(arguments: &ChatArguments, process: &Process) -> Result<Exit> {
    let interrupted = signal::interrupts()?;
    let cancel = Cancel::from(interrupted.clone());
    arguments.sampling.over(&Sampling::greedy()).check()?;
    let options = arguments.placement.options(None, process)?;
    // An interrupt ends an answer, and not what it is read with.
    let sandbox = sandbox::of_this_program(Cancel::new())?;
    let load_options =
        LoadOptions { sandbox: Some(sandbox.clone()), ..arguments.placement.load_options(cancel.clone(), process)? };
    let checkpoint = model::open(&arguments.model, Need::Weights, &cancel, process)?;
    model::note_undone(&checkpoint, process);
    // Before anything is loaded.
    let template = ChatTemplate::open(checkpoint.local_directory()?)?;
    let model = model::load(&checkpoint, &options, None, &load_options, process)?;
    let usual = GenerateOptions {
        sampling: arguments.sampling.over(&Sampling::of_model(&checkpoint.config)),
        max_new_tokens: arguments.sampling.max_new_tokens,
        stop: arguments.sampling.stop.clone(),
        ignore_eos: arguments.sampling.ignore_eos,
        cancel,
    };
    let system = arguments.system.clone();
    let mut chat = Chat { model, template, sandbox, usual, system, said: Vec::new(), held: 0, process };
    let mut lines = Lines::new()?;
    if lines.is_interactive() {
        process.printer.note("/help says what else there is");
    }
    while let Some(line) = lines.next(chat.left())? {
        interrupted.store(false, Ordering::Relaxed);
        let turn = match line.trim() {
            "" => Ok(()),
            "/quit" | "/exit" | "/bye" => break,
            command if command.starts_with('/') => chat.command(command),
            text => chat.answer(text),
        };
        match turn {
            Err(error) if matches!(error.kind(), ErrorKind::Input | ErrorKind::Usage) && !is_over(&error) => {
                process.printer.error(&error);
            }
            turn => turn?,
        }
    }
    Ok(Exit::Done)
}

fn is_over(error: &Error) -> bool {
    error.cause::<super::PipeClosed>().is_some()
}

struct Chat<'a> {
    model: Model,
    template: ChatTemplate,
    sandbox: Sandbox,
    usual: GenerateOptions,
    system: Option<String>,
    said: Vec<Message>,
    /// Tokens of it.
    held: usize,
    process: &'a Process,
}

impl Chat<'_> {
    /// Tokens that the context has left.
    fn left(&self) -> usize {
        self.model.plan.context.saturating_sub(self.held)
    }

    /// Prints what the model says to `text`. Where that fails, it was not said.
    fn answer(&mut self, text: &str) -> Result<()> {
        self.said.push(Message::new("user", text));
        match self.generate() {
            Ok(answer) => {
                self.said.push(Message::new("assistant", answer));
                Ok(())
            }
            Err(error) => {
                self.said.pop();
                Err(error)
            }
        }
    }

    fn generate(&mut self) -> Result<String> {
        let printer = &self.process.printer;
        let system = self.system.iter().map(|text| Message::new("system", text));
        let messages: Vec<_> = system.chain(self.said.iter().cloned()).collect();
        let prompt = self.sandbox.render(&self.template, &messages, &[])?;
        // A template has put the special tokens there itself.
        let tokens = self.model.tokenizer.encode(&prompt, false)?;
        let mut answer = String::new();
        let mut generation = self.model.generate_from(&tokens, self.usual.clone())?;
        for piece in &mut generation {
            let text = piece?.text;
            printer.generated(&text)?;
            answer += &text;
        }
        printer.generated("\n")?;
        let report = generation.report();
        self.held = report.prompt_tokens + report.generated_tokens;
        if report.finish == Finish::Context {
            printer.note("the context is full; `/clear` begins anew, and a longer `--context` holds more");
        }
        Ok(answer)
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let (printer, rest) = (&self.process.printer, rest.trim());
        match name {
            "/help" => printer.note(HELP),
            "/system" => self.system = (!rest.is_empty()).then(|| rest.to_owned()),
            "/clear" => {
                self.said.clear();
                self.held = 0;
            }
            "/save" if rest.is_empty() => return Err(Error::usage("`/save` needs a file")),
            "/save" if Path::new(rest).exists() => return Err(Error::usage(format!("`{rest}` is there already"))),
            "/save" => {
                let system = self.system.iter().map(|text| Message::new("system", text));
                let all: Vec<_> = system.chain(self.said.iter().cloned()).collect();
                let json = serde_json::to_string_pretty(&all).unwrap_or_default() + "\n";
                write_atomic(Path::new(rest), json.as_bytes(), false)?;
                printer.note(&format!("{} messages are in `{rest}`", all.len()));
            }
            "/memory" => {
                for device in &self.model.report.devices {
                    if device.planned > Bytes::ZERO {
                        printer.note(&format!(
                            "{:<9} planned {}, measured {}",
                            device.id, device.planned, device.measured
                        ));
                    }
                }
                printer.note(&format!("{} of {} tokens are left", self.left(), self.model.plan.context));
            }
            _ => return Err(Error::usage(format!("there is no `{name}`")).hint("`/help` says what there is")),
        }
        Ok(())
    }
}

/// What the user types, or the lines of standard input.
enum Lines {
    Typed(Box<DefaultEditor>),
    Read,
}

impl Lines {
    fn new() -> Result<Self> {
        if !stdin().is_terminal() || !stdout().is_terminal() {
            return Ok(Self::Read);
        }
        let editor = DefaultEditor::new().map_err(|e| Error::input("the terminal cannot be read").caused_by(e))?;
        Ok(Self::Typed(Box::new(editor)))
    }

    fn is_interactive(&self) -> bool {
        matches!(self, Self::Typed(_))
    }

    /// The next line; `None` at the end.
    fn next(&mut self, left: usize) -> Result<Option<String>> {
        let failed = |e: std::io::Error| Error::io("read", "standard input".as_ref(), e);
        match self {
            Self::Typed(editor) => loop {
                match editor.readline(&format!("{left} left> ")) {
                    Ok(line) => {
                        // A history that is full forgets its oldest line.
                        let _ = editor.add_history_entry(&line);
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => {}
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(e) => return Err(Error::input("the terminal cannot be read").caused_by(e)),
                }
            },
            Self::Read => {
                use std::io::{BufRead, Read};
                let mut line = Vec::new();
                stdin().lock().take(MAX_MESSAGE.0).read_until(b'\n', &mut line).map_err(failed)?;
                if line.is_empty() {
                    return Ok(None);
                }
                let text = String::from_utf8(line).map_err(|e| Error::input("a line is not UTF-8").caused_by(e))?;
                Ok(Some(text))
            }
        }
    }
}
