//! Many requests at once, from several threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use super::output::Output;
use super::{GenerateOptions, GenerateReport, Piece};
use crate::cancel::Cancel;
use crate::engine::{Constraint, EngineState, Sequence, Stepped};
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

type OnEvent = Box<dyn FnMut(Event) + Send>;
type Received = (Request, OnEvent, Ticket);

/// A request that counts until this is dropped.
struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A model that answers requests in a thread of its own. Clones are one and the same; once all of them are dropped,
/// it finishes what was begun.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    requests: Arc<Mutex<Option<Sender<Received>>>>,
}

struct Shared {
    plan: Plan,
    report: LoadReport,
    tokenizer: Arc<Tokenizer>,
    max_waiting: usize,
    state: Mutex<EngineState>,
    /// Requests that were submitted and are not over.
    open: Arc<AtomicUsize>,
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
            state: Mutex::new(self.core.state()),
            open: Arc::default(),
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

/// A request that is not over.
struct Open {
    id: u64,
    output: Output,
    on_event: OnEvent,
    /// When it came, then when its last token did.
    since: Instant,
    _ticket: Ticket,
}

impl Open {
    fn end(mut self, tokenizer: &Tokenizer) {
        let event = match self.output.rest(tokenizer) {
            Ok(rest) => {
                rest.into_iter().for_each(|piece| (self.on_event)(Event::Piece(piece)));
                Event::Done(self.output.report)
            }
            Err(error) => Event::Failed(error),
        };
        (self.on_event)(event);
    }

    fn fail(mut self, error: Error) {
        (self.on_event)(Event::Failed(error));
    }
}

/// Answers requests until there are no more to come, or a device fails.
fn run(mut model: Model, received: &Receiver<Received>, shared: &Shared) -> Result<()> {
    let mut open: Vec<Open> = Vec::new();
    let failed = loop {
        if !take(&mut model, received, &mut open) && open.is_empty() {
            return Ok(());
        }
        let (cancelled, others) = open.into_iter().partition(|open| open.output.options.cancel.is_cancelled());
        open = others;
        for one in cancelled {
            model.core.remove(one.id);
            one.end(&model.tokenizer);
        }
        match model.core.step() {
            Ok(stepped) => stepped.into_iter().for_each(|stepped| tell(&mut model, &mut open, stepped)),
            Err(error) => break error,
        }
        *lock(&shared.state) = model.core.state();
    };
    let again = || Error::new(failed.kind(), failed.to_string());
    open.into_iter().for_each(|open| open.fail(again()));
    while let Ok((_, mut on_event, _ticket)) = received.try_recv() {
        on_event(Event::Failed(again()));
    }
    Err(failed)
}

/// Takes requests that have come, or waits for one where there is nothing else to do. Whether more can come.
fn take(model: &mut Model, received: &Receiver<Received>, open: &mut Vec<Open>) -> bool {
    loop {
        let next =
            if open.is_empty() { received.recv().map_err(|_| TryRecvError::Disconnected) } else { received.try_recv() };
        let (Request { prompt, options, logprobs, constraint }, mut on_event, ticket) = match next {
            Ok(request) => request,
            Err(error) => return error == TryRecvError::Empty,
        };
        let most = options.max_new_tokens.unwrap_or(model.plan.context);
        let sequence = Sequence::new(&prompt, most, &options.sampling).with_logprobs(logprobs).within(constraint);
        match model.core.add(sequence) {
            Ok(id) => open.push(Open {
                id,
                output: Output::new(&prompt, options),
                on_event,
                since: Instant::now(),
                _ticket: ticket,
            }),
            Err(error) => on_event(Event::Failed(error)),
        }
    }
}

/// Tells a request of its token, and ends it where that is the last one.
fn tell(model: &mut Model, open: &mut Vec<Open>, Stepped { id, token }: Stepped) {
    let Some(at) = open.iter().position(|open| open.id == id) else { return };
    let Open { output, on_event, since, .. } = &mut open[at];
    let now = Instant::now();
    let report = &mut output.report;
    let seconds = if report.generated_tokens == 0 { &mut report.prefill_seconds } else { &mut report.decode_seconds };
    *seconds += (now - *since).as_secs_f64();
    *since = now;
    let taken = token.and_then(|token| output.take(token, &model.tokenizer, &model.eos_token_ids, model.plan.context));
    match taken {
        Ok((piece, is_over)) => {
            on_event(Event::Piece(piece));
            if is_over {
                model.core.remove(id);
                open.remove(at).end(&model.tokenizer);
            }
        }
        Err(error) => {
            model.core.remove(id);
            open.remove(at).fail(error);
        }
    }
}

impl Engine {
    /// Takes a request. `on_event` is called in the engine's thread, is to be quick, and hears of its end in any case.
    ///
    /// # Errors
    /// The request is not as it must be or too long, too many wait ([`ErrorKind::Busy`]), or the engine is over.
    pub fn submit(&self, request: Request, on_event: impl FnMut(Event) + Send + 'static) -> Result<()> {
        let Shared { plan, open, max_waiting, .. } = &*self.shared;
        request.options.check(&request.prompt, plan)?;
        let waiting = open.fetch_add(1, Ordering::Relaxed).saturating_sub(plan.batch);
        let ticket = Ticket(Arc::clone(open));
        if waiting >= *max_waiting {
            return Err(Error::new(ErrorKind::Busy, format!("{waiting} requests wait already")));
        }
        let over = || Error::device("the engine takes no more requests");
        let requests = lock(&self.requests);
        requests.as_ref().ok_or_else(over)?.send((request, Box::new(on_event), ticket)).map_err(|_| over())
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
