//! Many requests at once, from several threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use super::output::Output;
use super::{Finish, GenerateOptions, GenerateReport, Piece};
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

type Requests = Sender<(Request, Listener)>;

/// Who is told of a request: of its end in any case.
struct Listener {
    on_event: Box<dyn FnMut(Event) + Send>,
    /// Requests that are open, of which this is one.
    open: Arc<AtomicUsize>,
    is_over: bool,
}

impl Listener {
    fn tell(&mut self, event: Event) {
        self.is_over |= !matches!(event, Event::Piece(_));
        (self.on_event)(event);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if !self.is_over {
            self.tell(Event::Failed(over()));
        }
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

fn over() -> Error {
    Error::device("the engine takes no more requests")
}

/// A model that answers requests in a thread of its own. Clones are one and the same; once all of them are dropped,
/// it finishes what was begun.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    requests: Arc<Mutex<Option<Requests>>>,
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
            let end = End(of_thread);
            let result = run(self, &received, &end.0);
            lock(&end.0.end).get_or_insert(result);
        };
        thread::Builder::new().name("evenkeel-engine".to_owned()).spawn(run).map_err(Error::no_thread)?;
        Ok(Engine { shared, requests: Arc::new(Mutex::new(Some(requests))) })
    }
}

/// Says that an engine has ended, even if it panicked.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        lock(&self.0.end).get_or_insert_with(|| Err(Error::device("the engine has panicked, which is a bug")));
        self.0.ended.notify_all();
    }
}

/// A request that is not over.
struct Open {
    id: u64,
    output: Output,
    listener: Listener,
    /// When it came, then when its last token did.
    since: Instant,
}

impl Open {
    fn end(mut self, tokenizer: &Tokenizer) {
        let event = match self.output.rest(tokenizer) {
            Ok(rest) => {
                if let Some(piece) = rest {
                    self.listener.tell(Event::Piece(piece));
                }
                Event::Done(self.output.report)
            }
            Err(error) => Event::Failed(error),
        };
        self.listener.tell(event);
    }
}

/// Answers requests until there are no more to come, or a device fails.
fn run(mut model: Model, received: &Receiver<(Request, Listener)>, shared: &Shared) -> Result<()> {
    let mut open: Vec<Open> = Vec::new();
    let failed = loop {
        if !take(&mut model, received, &mut open) && open.is_empty() {
            return Ok(());
        }
        let (cancelled, others) = open.into_iter().partition(|open| open.output.options.cancel.is_cancelled());
        open = others;
        for one in cancelled {
            model.core.remove(one.id);
            *lock(&shared.state) = model.core.state();
            one.end(&model.tokenizer);
        }
        match model.core.step() {
            Ok(stepped) => stepped.into_iter().for_each(|stepped| tell(&mut model, &mut open, shared, stepped)),
            Err(error) => break error,
        }
        *lock(&shared.state) = model.core.state();
    };
    let waiting = received.try_iter().map(|(_, listener)| listener);
    for mut listener in open.into_iter().map(|open| open.listener).chain(waiting) {
        listener.tell(Event::Failed(Error::new(failed.kind(), failed.to_string())));
    }
    Err(failed)
}

/// Takes requests that have come, or waits for one where there is nothing else to do. Whether more can come.
fn take(model: &mut Model, received: &Receiver<(Request, Listener)>, open: &mut Vec<Open>) -> bool {
    loop {
        let next =
            if open.is_empty() { received.recv().map_err(|_| TryRecvError::Disconnected) } else { received.try_recv() };
        let (Request { prompt, options, logprobs, constraint }, mut listener) = match next {
            Ok(request) => request,
            Err(error) => return error == TryRecvError::Empty,
        };
        let most = options.max_new_tokens.unwrap_or(model.plan.context);
        let sequence = Sequence::new(&prompt, most, &options.sampling).with_logprobs(logprobs).within(constraint);
        let mut output = Output::new(&prompt, options);
        if most == 0 {
            output.report.finish = Finish::MaxNewTokens;
            listener.tell(Event::Done(output.report));
            continue;
        }
        match model.core.add(sequence) {
            Ok(id) => open.push(Open { id, output, listener, since: Instant::now() }),
            Err(error) => listener.tell(Event::Failed(error)),
        }
    }
}

/// Tells a request of its token, and ends it where that is the last one.
fn tell(model: &mut Model, open: &mut Vec<Open>, shared: &Shared, Stepped { id, token }: Stepped) {
    let Some(at) = open.iter().position(|open| open.id == id) else { return };
    let Open { output, listener, since, .. } = &mut open[at];
    let now = Instant::now();
    let report = &mut output.report;
    let seconds = if report.generated_tokens == 0 { &mut report.prefill_seconds } else { &mut report.decode_seconds };
    *seconds += (now - *since).as_secs_f64();
    *since = now;
    let taken = token.and_then(|token| output.take(token, &model.tokenizer, &model.eos_token_ids, model.plan.context));
    if let Ok((piece, false)) = taken {
        return listener.tell(Event::Piece(piece));
    }
    // Whoever hears of the end finds that the room is free.
    model.core.remove(id);
    *lock(&shared.state) = model.core.state();
    let mut one = open.remove(at);
    match taken {
        Ok((piece, _)) => {
            one.listener.tell(Event::Piece(piece));
            one.end(&model.tokenizer);
        }
        Err(error) => one.listener.tell(Event::Failed(error)),
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
        let requests = lock(&self.requests);
        let to = requests.as_ref().ok_or_else(over)?;
        let waiting = open.fetch_add(1, Ordering::Relaxed).saturating_sub(plan.batch);
        // One that is refused is told here alone.
        let mut listener = Listener { on_event: Box::new(on_event), open: Arc::clone(open), is_over: true };
        if waiting >= *max_waiting {
            return Err(Error::new(ErrorKind::Busy, format!("{waiting} requests wait already")));
        }
        listener.is_over = false;
        to.send((request, listener)).map_err(|mpsc::SendError((_, mut listener))| {
            listener.is_over = true;
            over()
        })
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
