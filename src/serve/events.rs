//! What an engine tells of a call, while a client listens.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::body::{Body, Bytes, Frame};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Interval, interval_at};

use super::Shared;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::generate::Event;
use crate::openai::{Api, Call, Failure, Writer, finish_reason};

/// How long a stream is silent before a comment says that somebody is there.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A call that the engine answers. Whoever does not listen any more drops it, which cancels its requests.
pub struct Listening {
    events: UnboundedReceiver<(usize, Event)>,
    writer: Writer,
    cancel: Cancel,
    shared: Arc<Shared>,
    start: Instant,
    has_begun: bool,
}

impl Listening {
    /// Has the engine answer.
    pub fn new(call: Call, api: &Api, shared: &Arc<Shared>, start: Instant) -> Result<Self> {
        let Call { requests, writer, cancel, .. } = call;
        let (sender, events) = unbounded_channel();
        let listening = Self { events, writer, cancel, shared: Arc::clone(shared), start, has_begun: false };
        api.submit(requests, move |choice, event| drop(sender.send((choice, event))))?;
        Ok(listening)
    }

    /// The whole answer, once all of it is there.
    pub async fn whole(mut self) -> Result<Value> {
        while !self.writer.is_over() {
            let (choice, event) = self.events.recv().await.ok_or_else(broken_off)?;
            self.count(&event);
            self.writer.collect(choice, event)?;
        }
        self.end();
        Ok(self.writer.answer())
    }

    /// What a stream sends next; none once all is sent.
    fn poll_chunks(&mut self, cx: &mut Context) -> Poll<Option<Result<Vec<Value>>>> {
        if self.writer.is_over() {
            return Poll::Ready(None);
        }
        let next = std::task::ready!(self.events.poll_recv(cx));
        Poll::Ready(Some(next.ok_or_else(broken_off).and_then(|(choice, event)| {
            self.count(&event);
            let chunks = self.writer.chunks(choice, event)?;
            if self.writer.is_over() {
                self.end();
            }
            Ok(chunks)
        })))
    }

    fn count(&mut self, event: &Event) {
        if matches!(event, Event::Piece(_)) && !std::mem::replace(&mut self.has_begun, true) {
            self.shared.metrics.first_token(self.start.elapsed());
        }
    }

    fn end(&self) {
        self.shared.metrics.finished(self.start.elapsed(), self.writer.finishes().map(finish_reason));
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.cancel.cancel();
        if !self.writer.is_over() {
            self.shared.metrics.broken_off();
        }
    }
}

fn broken_off() -> Error {
    Error::device("the engine has ended")
}

/// Server-sent events: chunks as they come, a comment where none comes for long, and at the end that it is one.
pub struct Stream {
    listening: Listening,
    is_over: bool,
    keep_alive: Interval,
}

impl Stream {
    pub fn new(listening: Listening) -> Self {
        let first = tokio::time::Instant::now() + KEEP_ALIVE;
        Self { listening, is_over: false, keep_alive: interval_at(first, KEEP_ALIVE) }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut text = String::new();
        while !self.is_over {
            match self.listening.poll_chunks(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(chunks))) => text.extend(chunks.iter().map(data)),
                Poll::Ready(Some(Err(error))) => {
                    text += &data(&Failure::from(&error).to_json());
                    text += &data(&"[DONE]");
                    self.is_over = true;
                }
                Poll::Ready(None) => {
                    text += &data(&"[DONE]");
                    self.is_over = true;
                }
            }
        }
        if text.is_empty() && !self.is_over {
            std::task::ready!(self.keep_alive.poll_tick(cx));
            text += ":\n\n";
        }
        self.keep_alive.reset();
        Poll::Ready((!text.is_empty()).then(|| Ok(Frame::data(text.into()))))
    }
}

fn data(value: &impl ToString) -> String {
    format!("data: {}\n\n", value.to_string())
}
