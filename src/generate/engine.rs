//! Many requests at once, from several threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use super::{GenerateOptions, GenerateReport, Piece};
use crate::cancel::Cancel;
use crate::error::{Error, ErrorKind, Result};
use crate::loader::{LoadReport, Model};
use crate::plan::Plan;
use crate::pool::lock;
use crate::text::Tokenizer;

/// How many requests an engine takes.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Requests that wait for room at most; more are refused.
    pub max_waiting: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_waiting: 1024 }
    }
}

/// What is to be generated.
#[derive(Default)]
pub struct Request {
    /// The tokens of the prompt.
    pub prompt: Vec<u32>,
    /// How to generate. Cancelling it ends the request, wherever it is.
    pub options: GenerateOptions,
    /// Whether each piece has the log probability of its token, and those of how many of the likeliest.
    pub logprobs: Option<usize>,
    /// What says which tokens may come.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// Says which tokens may come, as a grammar does.
pub trait Constraint: Send {
    /// Makes the logits of tokens that may not come next [`f32::MIN`].
    ///
    /// # Errors
    /// No token may come.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Takes note of the token that came.
    ///
    /// # Errors
    /// It may not come.
    fn accept(&mut self, token: u32) -> Result<()>;
}

/// What a request is told.
#[derive(Debug)]
pub enum Event {
    /// A token came, or text that was held back.
    Piece(Piece),
    /// It is over; nothing follows.
    Done(GenerateReport),
    /// It failed; nothing follows.
    Failed(Error),
}

/// What an engine has and does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineState {
    /// Requests that are computed.
    pub running: usize,
    /// Requests that wait for room.
    pub waiting: usize,
    /// Pages of the room for state.
    pub pages: usize,
    /// Those of them that requests have.
    pub pages_used: usize,
    /// Pages of beginnings that are kept for requests to come, and given up where room is needed.
    pub pages_kept: usize,
    /// Tokens of prompts so far.
    pub prompt_tokens: u64,
    /// Those of them that were kept from an earlier request.
    pub kept_tokens: u64,
    /// Tokens that were generated so far.
    pub generated_tokens: u64,
    /// Times that a request had to give its pages back and was computed again.
    pub preemptions: u64,
}

type OnEvent = Box<dyn FnMut(Event) + Send>;

/// A model that answers requests in a thread of its own. Clones are one and the same; once all of them are dropped,
/// it finishes what was begun.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    requests: Arc<Mutex<Option<Sender<(Request, OnEvent)>>>>,
}

struct Shared {
    plan: Plan,
    report: LoadReport,
    tokenizer: Arc<Tokenizer>,
    max_waiting: usize,
    state: Mutex<EngineState>,
    /// Requests that were submitted and are not over.
    open: AtomicUsize,
    /// Once the thread has ended: what it failed with, until somebody asks.
    end: Mutex<Option<Result<()>>>,
    ended: Condvar,
}

impl Model {
    /// Makes an engine of the model, which takes requests from several threads.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn engine(self, options: &EngineOptions) -> Result<Engine> {
        let (requests, received) = mpsc::channel();
        let shared = Arc::new(Shared {
            plan: self.plan.clone(),
            report: self.report.clone(),
            tokenizer: Arc::clone(&self.tokenizer),
            max_waiting: options.max_waiting,
            state: Mutex::default(),
            open: AtomicUsize::new(0),
            end: Mutex::new(None),
            ended: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let run = move || {
            let end = run(self, &received, &of_thread);
            *lock(&of_thread.end) = Some(end);
            of_thread.ended.notify_all();
        };
        thread::Builder::new().name("evenkeel-engine".to_owned()).spawn(run).map_err(Error::no_thread)?;
        Ok(Engine { shared, requests: Arc::new(Mutex::new(Some(requests))) })
    }
}

fn run(mut model: Model, received: &Receiver<(Request, OnEvent)>, shared: &Shared) -> Result<()> {
    while let Ok((request, mut on_event)) = received.recv() {
        let mut generate = || -> Result<GenerateReport> {
            let mut generation = model.generate_from(&request.prompt, request.options.clone())?;
            for piece in &mut generation {
                on_event(Event::Piece(piece?));
            }
            Ok(generation.report())
        };
        let event = generate().map_or_else(Event::Failed, Event::Done);
        on_event(event);
        shared.open.fetch_sub(1, Ordering::Relaxed);
    }
    Ok(())
}

impl Engine {
    /// Takes a request. `on_event` is called in the engine's thread, is to be quick, and hears of its end in any case.
    ///
    /// # Errors
    /// The request is not as it must be or too long, too many wait ([`ErrorKind::Busy`]), or the engine is over.
    pub fn submit(&self, request: Request, on_event: impl FnMut(Event) + Send + 'static) -> Result<()> {
        let open = self.shared.open.fetch_add(1, Ordering::Relaxed);
        let refused = |error| {
            self.shared.open.fetch_sub(1, Ordering::Relaxed);
            Err(error)
        };
        if open >= self.shared.max_waiting {
            return refused(Error::new(ErrorKind::Busy, format!("{open} requests wait already")));
        }
        let requests = lock(&self.requests);
        let over = || Error::device("the engine takes no more requests");
        match requests
            .as_ref()
            .ok_or_else(over)
            .and_then(|to| to.send((request, Box::new(on_event))).map_err(|_| over()))
        {
            Ok(()) => Ok(()),
            Err(error) => refused(error),
        }
    }

    /// Generates behind a prompt; the answer ends where it is dropped.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn generate(&self, prompt: &str, options: impl Into<GenerateOptions>) -> Result<Answer> {
        let (options, cancel) = (options.into(), Cancel::new());
        let prompt = self.shared.tokenizer.encode(prompt, true)?;
        let (sender, events) = mpsc::channel();
        let options = GenerateOptions { cancel: cancel.clone(), ..options };
        // Whoever does not listen any more has cancelled it.
        self.submit(Request { prompt, options, ..Request::default() }, move |event| drop(sender.send(event)))?;
        Ok(Answer { events, cancel, report: None })
    }

    /// The plan that the model was loaded by.
    pub fn plan(&self) -> &Plan {
        &self.shared.plan
    }

    /// What loading it did.
    pub fn report(&self) -> &LoadReport {
        &self.shared.report
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared.tokenizer
    }

    /// What it has and does now.
    pub fn state(&self) -> EngineState {
        *lock(&self.shared.state)
    }

    /// Takes no more requests; those that it has are finished.
    pub fn close(&self) {
        lock(&self.requests).take();
    }

    /// Waits until the engine is over: closed and done with all, or failed.
    ///
    /// # Errors
    /// A device failed, which is told once.
    pub fn wait(&self) -> Result<()> {
        let mut end = lock(&self.shared.end);
        loop {
            match end.as_mut() {
                Some(result) => return std::mem::replace(result, Ok(())),
                None => end = self.shared.ended.wait(end).unwrap_or_else(std::sync::PoisonError::into_inner),
            }
        }
    }
}

/// What comes behind a prompt, as an engine generates it.
pub struct Answer {
    events: Receiver<Event>,
    cancel: Cancel,
    report: Option<GenerateReport>,
}

impl Answer {
    /// Counts and times, once it is over.
    pub fn report(&self) -> Option<&GenerateReport> {
        self.report.as_ref()
    }
}

impl Iterator for Answer {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.events.recv() {
            Ok(Event::Piece(piece)) => Some(Ok(piece)),
            Ok(Event::Failed(error)) => Some(Err(error)),
            Ok(Event::Done(report)) => {
                self.report = Some(report);
                None
            }
            Err(_) => None,
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}
