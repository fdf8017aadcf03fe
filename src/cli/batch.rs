//! `evenkeel batch`.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use evenkeel::openai::{Api, Failure, Form, Line, Writer, answered, failed};
use evenkeel::{Bytes, Cancel, EngineOptions, Error, ErrorKind, Event, GenerateOptions, MIB, Result, Sampling};
use indicatif::ProgressBar;
use serde_json::Value;

use super::args::{BatchArguments, InputFormat};
use super::model::{self, ForMany, Need};
use super::progress::{self, LINES};
use super::{Exit, Process, signal};

/// The longest line.
const MAX_LINE: Bytes = Bytes(16 * MIB);
/// Bad lines that are named one by one.
const MOST_NAMED: usize = 5;
/// How often a wait looks whether it is to stop.
const TICK: Duration = Duration::from_millis(50);

pub fn run(arguments: &BatchArguments, process: &Process) -> Result<Exit> {
    let cancel = signal::cancel_by_interrupt()?;
    arguments.sampling.over(&Sampling::greedy()).check()?;
    let input = Input::open(&arguments.input, arguments.input_format, arguments.chat)?;
    let output = Output::open(arguments)?;
    let many = ForMany::new(&arguments.placement, &arguments.room, &cancel, process)?;
    let checkpoint = model::open(&arguments.model, Need::Weights, &cancel, process)?;
    model::note_undone(&checkpoint, process);
    let model = many.load(&checkpoint, process)?;
    let sequences = model.plan.batch;
    process.printer.note(&format!("{sequences} sequences at once, of {} tokens each at most", model.plan.context));
    let engine = model.engine(&EngineOptions { max_waiting: usize::MAX })?;
    let usual = GenerateOptions {
        sampling: arguments.sampling.over(&Sampling::of_model(&checkpoint.config)),
        max_new_tokens: arguments.sampling.max_new_tokens.or(checkpoint.config.generation.max_new_tokens),
        stop: arguments.sampling.stop.clone(),
        ignore_eos: arguments.sampling.ignore_eos,
        cancel: Cancel::new(),
    };
    let api = Api::new(engine, &checkpoint, None, many.sandbox)?.with_usual(usual);
    let bar = progress::bar(&process.printer, "answering", input.lines, LINES);
    let (sender, events) = mpsc::channel();
    let batch = Batch { api: &api, output, open: BTreeMap::new(), sender, bar, counts: Counts::default(), process };
    let counts = batch.run(input, &events, 2 * sequences, &cancel)?;
    counts.tell(process, cancel.is_cancelled());
    api.engine().close();
    Ok(match counts.bad {
        _ if cancel.is_cancelled() => Exit::Interrupted,
        0 => Exit::Done,
        _ => Exit::BadInput,
    })
}

/// The lines of a file or of standard input.
struct Input {
    reader: BufReader<Box<dyn Read>>,
    name: String,
    format: InputFormat,
    form: Form,
    number: u64,
    /// How many there are, where that can be known.
    lines: u64,
}

impl Input {
    fn open(path: &Path, format: InputFormat, is_chat: bool) -> Result<Self> {
        let name = path.display().to_string();
        let (reader, lines): (Box<dyn Read>, _) = if path == Path::new("-") {
            (Box::new(io::stdin()), 0)
        } else {
            let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
            (Box::new(file), count_lines(path)?)
        };
        let form = if is_chat { Form::Chat } else { Form::Text };
        Ok(Self { reader: BufReader::new(reader), name, format, form, number: 0, lines })
    }

    /// The next line that is not empty, or what is wrong with it beside what it is called.
    fn next(&mut self) -> Result<Option<Result<Line, (String, Error)>>> {
        loop {
            let mut line = Vec::new();
            let most = MAX_LINE.0 + 1;
            let failed = |e| Error::io("read", self.name.as_ref(), e);
            if self.reader.by_ref().take(most).read_until(b'\n', &mut line).map_err(failed)? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if line.len() as u64 == most && line.last() != Some(&b'\n') {
                self.reader.skip_until(b'\n').map_err(failed)?;
                let error = Error::input(format!("the line is longer than {MAX_LINE}"));
                return Ok(Some(Err((self.number.to_string(), error))));
            }
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            let text = text.strip_suffix(b"\r").unwrap_or(text);
            if !text.trim_ascii().is_empty() {
                return Ok(Some(self.line(text)));
            }
        }
    }

    fn line(&self, text: &[u8]) -> Result<Line, (String, Error)> {
        match (self.format, std::str::from_utf8(text)) {
            (InputFormat::Jsonl, _) => Line::parse(self.number, text),
            (InputFormat::Text, Ok(prompt)) => Ok(Line::of_prompt(self.number, prompt, self.form)),
            (InputFormat::Text, Err(_)) => Err((self.number.to_string(), Error::input("the line is not UTF-8"))),
        }
    }
}

/// Lines of a file that are not empty.
fn count_lines(path: &Path) -> Result<u64> {
    let failed = |e| Error::io("read", path, e);
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let (mut lines, mut has_text) = (0, false);
    loop {
        let bytes = reader.fill_buf().map_err(failed)?;
        if bytes.is_empty() {
            return Ok(lines + u64::from(has_text));
        }
        for byte in bytes {
            match byte {
                b'\n' => lines += u64::from(std::mem::take(&mut has_text)),
                byte => has_text |= !byte.is_ascii_whitespace(),
            }
        }
        let len = bytes.len();
        reader.consume(len);
    }
}

/// Where answers go, and which lines have theirs already.
struct Output {
    file: Option<File>,
    name: String,
    done: HashSet<String>,
}

impl Output {
    fn open(arguments: &BatchArguments) -> Result<Self> {
        let path = &arguments.output;
        let name = path.display().to_string();
        if path == Path::new("-") {
            return Ok(Self { file: None, name, done: HashSet::new() });
        }
        let failed = |e| Error::io("write", path, e);
        let same = |a: &Path, b: &Path| Some(a.canonicalize().ok()? == b.canonicalize().ok()?);
        if same(path, &arguments.input) == Some(true) {
            return Err(Error::usage(format!("`{name}` is read and written at once")));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if arguments.resume || arguments.force {
            options.create(true).truncate(arguments.force);
        } else {
            options.create_new(true);
        }
        let mut file = options.open(path).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => Error::usage(format!("`{name}` exists"))
                .hint("`--resume` answers the lines that have no answer there")
                .hint("`--force` replaces it"),
            _ => failed(e),
        })?;
        let (done, end) = read_answers(&file).map_err(failed)?;
        // What was being written when it was stopped.
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(failed)?;
        Ok(Self { file: Some(file), name, done })
    }

    fn write(&mut self, record: &Value, process: &Process) -> Result<()> {
        let line = format!("{record}\n");
        match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()).map_err(|e| Error::io("write", self.name.as_ref(), e)),
            None => process.printer.json(&line),
        }
    }
}

/// The names of the lines that are answered, and where the last whole one ends.
fn read_answers(file: &File) -> io::Result<(HashSet<String>, u64)> {
    #[derive(serde::Deserialize)]
    struct Answered {
        custom_id: String,
    }
    let mut reader = BufReader::new(file);
    let (mut done, mut end, mut line) = (HashSet::new(), 0, Vec::new());
    while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
        let Ok(Answered { custom_id }) = serde_json::from_slice(&line) else { break };
        done.insert(custom_id);
        end += line.len() as u64;
        line.clear();
    }
    Ok((done, end))
}

#[derive(Clone, Copy, Default)]
struct Counts {
    answered: u64,
    /// Lines that were answered by an earlier run.
    skipped: u64,
    bad: usize,
    tokens: u64,
    seconds: f64,
}

impl Counts {
    fn tell(&self, process: &Process, is_interrupted: bool) {
        let Self { answered, skipped, bad, tokens, seconds } = self;
        let rate = if *seconds > 0.0 { *tokens as f64 / seconds } else { 0.0 };
        let before = if *skipped > 0 { format!(", {skipped} were before") } else { String::new() };
        process
            .printer
            .note(&format!("{answered} lines answered{before}, {bad} bad; {tokens} tokens, {rate:.1} tok/s"));
        if is_interrupted {
            process.printer.note("interrupted; `--resume` answers the rest");
        }
    }
}

/// A line that is being answered.
struct Open {
    custom_id: String,
    writer: Writer,
    cancel: Cancel,
}

struct Batch<'a> {
    api: &'a Api,
    output: Output,
    /// By their number.
    open: BTreeMap<u64, Open>,
    sender: Sender<(u64, usize, Event)>,
    bar: ProgressBar,
    counts: Counts,
    process: &'a Process,
}

impl Batch<'_> {
    /// Answers all lines, `most` of which are on their way at once.
    fn run(
        mut self,
        mut input: Input,
        events: &Receiver<(u64, usize, Event)>,
        most: usize,
        cancel: &Cancel,
    ) -> Result<Counts> {
        let begun = Instant::now();
        let mut names = HashSet::new();
        let mut is_read = false;
        while !cancel.is_cancelled() {
            while !is_read && self.open.len() < most && !cancel.is_cancelled() {
                match input.next()? {
                    Some(line) => self.take(input.number, line, &mut names)?,
                    None => is_read = true,
                }
            }
            if self.open.is_empty() {
                break;
            }
            match events.recv_timeout(TICK) {
                Ok((number, choice, event)) => self.told(number, choice, event)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.counts.seconds = begun.elapsed().as_secs_f64();
            let (rate, running) = (self.counts.tokens as f64 / self.counts.seconds, self.api.engine().state().running);
            progress::say(&self.bar, &format!("{rate:.0} tok/s, {running} sequences"));
        }
        self.open.values().for_each(|open| open.cancel.cancel());
        Ok(self.counts)
    }

    /// Has a line answered, unless it was before.
    fn take(&mut self, number: u64, line: Result<Line, (String, Error)>, names: &mut HashSet<String>) -> Result<()> {
        let Line { custom_id, form, body } = match line {
            Ok(line) => line,
            Err((custom_id, _)) if self.is_done(&custom_id) => return Ok(()),
            Err((custom_id, error)) => return self.fail(number, &custom_id, &error),
        };
        if !names.insert(custom_id.clone()) {
            let error = Error::input(format!("another line before is called `{custom_id}` too"));
            return if self.output.done.contains(&custom_id) { Ok(()) } else { self.fail(number, &custom_id, &error) };
        }
        if self.is_done(&custom_id) {
            return Ok(());
        }
        let call = match self.api.call(form, &body) {
            Ok(call) => call,
            Err(error) => return self.fail(number, &custom_id, &error),
        };
        let sender = self.sender.clone();
        // Whoever does not listen any more has stopped.
        self.api.submit(call.requests, move |choice, event| drop(sender.send((number, choice, event))))?;
        self.open.insert(number, Open { custom_id, writer: call.writer, cancel: call.cancel });
        Ok(())
    }

    fn is_done(&mut self, custom_id: &str) -> bool {
        let is_done = self.output.done.contains(custom_id);
        self.counts.skipped += u64::from(is_done);
        self.bar.inc(u64::from(is_done));
        is_done
    }

    fn told(&mut self, number: u64, choice: usize, event: Event) -> Result<()> {
        let Some(open) = self.open.get_mut(&number) else { return Ok(()) };
        match event {
            // It is no matter of this line, which is answered another time.
            Event::Failed(error) if error.kind() == ErrorKind::Device => return Err(error),
            Event::Piece(piece) if piece.token.is_some() => {
                self.counts.tokens += 1;
                open.writer.collect(choice, Event::Piece(piece))?;
            }
            event => {
                if let Err(error) = open.writer.collect(choice, event) {
                    open.cancel.cancel();
                    let custom_id = std::mem::take(&mut open.custom_id);
                    self.open.remove(&number);
                    return self.fail(number, &custom_id, &error);
                }
            }
        }
        if open.writer.is_over() {
            let record = answered(&open.custom_id, &open.writer.answer());
            self.open.remove(&number);
            self.counts.answered += 1;
            self.bar.inc(1);
            self.output.write(&record, self.process)?;
        }
        Ok(())
    }

    fn fail(&mut self, number: u64, custom_id: &str, error: &Error) -> Result<()> {
        let failure = Failure::from(error);
        self.counts.bad += 1;
        if self.counts.bad <= MOST_NAMED {
            self.bar.suspend(|| self.process.printer.note(&format!("line {number} is bad: {}", failure.message)));
        } else if self.counts.bad == MOST_NAMED + 1 {
            self.bar.suspend(|| self.process.printer.note("others are bad too, as the output says"));
        }
        self.bar.inc(1);
        self.output.write(&failed(custom_id, &failure), self.process)
    }
}
