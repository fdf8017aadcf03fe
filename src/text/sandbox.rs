//! A process of its own for what strangers wrote to be run.
//!
//! It is asked over its standard input and answers on its standard output, a line of JSON each. The
//! limits hold whatever a template or a tokenizer does: the system keeps to memory and processor
//! time, who asks to the clock and to the length of an answer.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::chat::{ChatTemplate, Message};
use super::parsed::{Parsed, TokenBytes};
use crate::bytes::{Bytes, GIB, MIB};
use crate::cancel::Cancel;
use crate::error::{Error, Result};

/// The memory of a process that reads a tokenizer.
const TOKENIZER_MEMORY: Bytes = Bytes(GIB - 64 * MIB);
/// The memory of a process that renders a template.
const TEMPLATE_MEMORY: Bytes = Bytes(256 * MIB);
/// The longest answer.
const MAX_ANSWER: Bytes = Bytes(64 * MIB);
/// The longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(8);
/// What is added to it for each MiB that is asked about.
const PATIENCE_PER_MIB: Duration = Duration::from_secs(2);
/// How often a wait looks whether it is to stop.
const TICK: Duration = Duration::from_millis(50);

/// How a process is started that runs tokenizers and templates: a program that calls [`serve`].
#[derive(Clone, Debug)]
pub struct Sandbox {
    program: PathBuf,
    arguments: Vec<OsString>,
    cancel: Cancel,
}

/// What a process is asked for.
#[derive(Deserialize, Serialize)]
pub(super) enum Request<'a> {
    Open { directory: Cow<'a, Path> },
    Encode { text: Cow<'a, str>, special: bool },
    Decode { sequences: Vec<Cow<'a, [u32]>> },
    Render { template: Cow<'a, ChatTemplate>, messages: Cow<'a, [Message]>, tools: Cow<'a, [Json]> },
    Tokens { count: usize },
}

#[derive(Deserialize, Serialize)]
pub(super) enum Answer {
    Opened { byte_ids: Vec<u32>, seconds: f64 },
    Ids(Vec<u32>),
    Texts(Vec<String>),
    Tokens(TokenBytes),
}

/// An [`Error`] on its way.
#[derive(Deserialize, Serialize)]
struct Failure {
    what: String,
    causes: Vec<String>,
    hints: Vec<String>,
}

type Reply = std::result::Result<Answer, Failure>;

impl Sandbox {
    /// A sandbox whose process is `program` with `arguments`; waits for it end where `cancel` says so.
    pub fn new(program: impl Into<PathBuf>, arguments: impl IntoIterator<Item = OsString>, cancel: Cancel) -> Self {
        Self { program: program.into(), arguments: arguments.into_iter().collect(), cancel }
    }

    /// [`ChatTemplate::render`] in a process of its own: within 256 MiB of memory, 8 seconds and 64 MiB of text.
    ///
    /// # Errors
    /// As there, and the limits.
    pub fn render(&self, template: &ChatTemplate, messages: &[Message], tools: &[Json]) -> Result<String> {
        let what = template.failed();
        let mut cell =
            Cell::start(self, format!("{what}: it may take {TEMPLATE_MEMORY} and {} s", PATIENCE.as_secs()))?;
        let template = Cow::Borrowed(template);
        cell.send(&Request::Render { template, messages: messages.into(), tools: tools.into() })?;
        cell.receive()?.text()
    }
}

impl Answer {
    pub(super) fn text(self) -> Result<String> {
        match self {
            Self::Texts(mut texts) if texts.len() == 1 => Ok(texts.remove(0)),
            _ => Err(unexpected()),
        }
    }
}

pub(super) fn unexpected() -> Error {
    Error::input("the sandbox's process gave another answer than was asked for")
        .hint("the program that it runs is of another version")
}

/// A process that runs; it is ended when this is dropped.
pub(super) struct Cell {
    child: Child,
    requests: Sender<Vec<u8>>,
    replies: Receiver<io::Result<Vec<u8>>>,
    /// The answer, where it came before it was waited for.
    ready: Option<io::Result<Vec<u8>>>,
    cancel: Cancel,
    /// What is said where it breaks a limit.
    beyond: String,
    /// How long the answer to the last request may take.
    patience: Duration,
    has_ended: bool,
}

impl Cell {
    pub(super) fn start(sandbox: &Sandbox, beyond: String) -> Result<Self> {
        let mut command = Command::new(&sandbox.program);
        command.args(&sandbox.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // So that a terminal's interrupt is not its end.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let failed = |e| Error::io("start", &sandbox.program, e);
        let mut child = command.spawn().map_err(failed)?;
        let (mut stdin, stdout) =
            child.stdin.take().zip(child.stdout.take()).unwrap_or_else(|| unreachable!("both are piped"));
        let (requests, to_send) = mpsc::channel::<Vec<u8>>();
        let (sender, replies) = mpsc::channel();
        // Ends with the process, or with the cell.
        let carry = move || {
            let mut stdout = BufReader::new(stdout);
            for request in to_send {
                let mut exchange = || {
                    stdin.write_all(&request)?;
                    stdin.flush()?;
                    let mut line = Vec::new();
                    stdout.by_ref().take(MAX_ANSWER.0).read_until(b'\n', &mut line)?;
                    if line.ends_with(b"\n") { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
                };
                if sender.send(exchange()).is_err() {
                    break;
                }
            }
        };
        let carrier = thread::Builder::new().name("evenkeel-sandbox".to_owned()).spawn(carry);
        let (cancel, patience) = (sandbox.cancel.clone(), PATIENCE);
        let cell = Self { child, requests, replies, ready: None, cancel, beyond, patience, has_ended: false };
        carrier.map(|_| cell).map_err(|e| Error::device("no thread can be started").caused_by(e))
    }

    /// Asks for something; [`Cell::receive`] waits for the answer.
    pub(super) fn send(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request).map_err(|e| Error::input("no text for a sandbox").caused_by(e))?;
        line.push(b'\n');
        self.patience = patience(line.len());
        // A thread that has ended is found out by `receive`.
        let _ = self.requests.send(line);
        Ok(())
    }

    /// Whether the answer is there.
    pub(super) fn is_ready(&mut self) -> bool {
        self.ready = self.ready.take().or_else(|| self.replies.try_recv().ok());
        self.ready.is_some()
    }

    /// The answer to what was asked for last.
    pub(super) fn receive(&mut self) -> Result<Answer> {
        let begun = Instant::now();
        let line = loop {
            match self.ready.take().map_or_else(|| self.replies.recv_timeout(TICK), Ok) {
                Ok(Ok(line)) => break line,
                // What nobody waited for is no answer to what is asked next.
                Err(RecvTimeoutError::Timeout) if begun.elapsed() < self.patience => {
                    self.cancel.check().inspect_err(|_| self.end())?;
                }
                _ => {
                    let took_long = begun.elapsed() >= self.patience;
                    self.end();
                    return Err(Error::input(self.beyond.clone()).caused_by(if took_long {
                        "it did not end in time"
                    } else {
                        "it ran out of memory, or nests too deeply"
                    }));
                }
            }
        };
        let reply = serde_json::from_slice::<Reply>(&line).map_err(|e| unexpected().caused_by(e))?;
        reply.map_err(|Failure { what, causes, hints }| {
            let error = hints.into_iter().fold(Error::input(what), Error::hint);
            if causes.is_empty() { error } else { error.caused_by(causes.join(": ")) }
        })
    }

    /// The answer to `request`.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Answer> {
        self.send(request)?;
        self.receive()
    }

    /// Whether it broke a limit, and answers nothing more.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    fn end(&mut self) {
        self.has_ended = true;
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.end();
    }
}

/// Answers, as the process of a [`Sandbox`], what is asked on `input` until it ends, under the sandbox's limits.
///
/// # Errors
/// Input and output fail, or what is asked is not what a sandbox asks.
pub fn serve(mut input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    // An abort is expected here, and its core would be large.
    limit(Resource::Core, 0)?;
    let mut tokenizer = None;
    let mut line = Vec::new();
    while input.read_until(b'\n', &mut line)? > 0 {
        limit(Resource::Cpu, processor_seconds() + patience(line.len()).as_secs())?;
        let request = serde_json::from_slice(&line)?;
        let reply: Reply = answer(request, &mut tokenizer).map_err(|error| Failure {
            what: error.to_string(),
            causes: causes(&error),
            hints: error.hints().iter().map(ToString::to_string).collect(),
        });
        serde_json::to_writer(&mut output, &reply)?;
        output.write_all(b"\n")?;
        output.flush()?;
        line.clear();
    }
    Ok(())
}

fn answer(request: Request, tokenizer: &mut Option<Parsed>) -> Result<Answer> {
    match request {
        Request::Open { directory } => {
            limit(Resource::As, TOKENIZER_MEMORY.0).map_err(not_limited)?;
            let begun = Instant::now();
            let parsed = tokenizer.insert(Parsed::open(&directory)?);
            Ok(Answer::Opened { byte_ids: parsed.byte_ids(), seconds: begun.elapsed().as_secs_f64() })
        }
        Request::Encode { text, special } => {
            tokenizer.as_ref().ok_or_else(unexpected)?.encode(&text, special).map(Answer::Ids)
        }
        Request::Decode { sequences } => {
            let tokenizer = tokenizer.as_ref().ok_or_else(unexpected)?;
            sequences.iter().map(|ids| tokenizer.decode(ids)).collect::<Result<_>>().map(Answer::Texts)
        }
        Request::Render { template, messages, tools } => {
            limit(Resource::As, TEMPLATE_MEMORY.0).map_err(not_limited)?;
            template.render(&messages, &tools).map(|text| Answer::Texts(vec![text]))
        }
        Request::Tokens { count } => Ok(Answer::Tokens(tokenizer.as_ref().ok_or_else(unexpected)?.bytes(count))),
    }
}

/// Lowers the soft limit of `resource`, where the hard one allows it.
fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let hard = rustix::process::getrlimit(resource).maximum;
    let current = Some(hard.map_or(most, |hard| hard.min(most)));
    Ok(setrlimit(resource, Rlimit { current, maximum: hard })?)
}

fn not_limited(error: io::Error) -> Error {
    Error::device("the memory of the sandbox's process cannot be limited").caused_by(error)
}

/// Seconds of processor time that this process has taken, rounded up.
fn processor_seconds() -> u64 {
    let taken = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime).tv_sec;
    u64::try_from(taken).unwrap_or(0) + 1
}

/// The longest answer to a request of `bytes` may take so long.
fn patience(bytes: usize) -> Duration {
    let mib = u32::try_from(bytes as u64 / MIB).unwrap_or(u32::MAX);
    PATIENCE.saturating_add(PATIENCE_PER_MIB.saturating_mul(mib))
}

fn causes(error: &Error) -> Vec<String> {
    let first = std::error::Error::source(error);
    std::iter::successors(first, |error| error.source()).map(ToString::to_string).collect()
}
