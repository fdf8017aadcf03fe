//! What an engine tells, as the objects and the chunks of an answer.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Form, fresh, now};
use crate::error::Result;
use crate::generate::{Event, Finish, Piece};
use crate::text::TokenBytes;

/// What OpenAI has in place of an infinite one.
const LEAST_LOGPROB: f32 = -9999.0;

/// Writes an answer, at once or in chunks.
pub struct Writer {
    form: Form,
    id: String,
    created: u64,
    model: String,
    prompt_tokens: usize,
    include_usage: bool,
    /// Of all tokens, where log probabilities are wanted.
    bytes: Option<Arc<TokenBytes>>,
    /// Tokens that are no part of the text.
    ends: Vec<u32>,
    choices: Vec<Choice>,
}

#[derive(Default)]
struct Choice {
    text: String,
    logprobs: Vec<Entry>,
    /// Characters of the tokens so far, as far as log probabilities are wanted.
    offset: usize,
    has_begun: bool,
    generated: usize,
    finish: Option<Finish>,
}

/// The log probability of a token and those of the likeliest.
struct Entry {
    token: (u32, f32),
    top: Vec<(u32, f32)>,
    offset: usize,
}

impl Writer {
    pub(super) fn new(
        form: Form,
        model: &str,
        choices: usize,
        prompt_tokens: usize,
        bytes: Option<Arc<TokenBytes>>,
        ends: &[u32],
    ) -> Self {
        let prefix = if form == Form::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            form,
            id: format!("{prefix}-{:016x}", fresh()),
            created: now(),
            model: model.to_owned(),
            prompt_tokens,
            include_usage: false,
            bytes,
            ends: ends.to_vec(),
            choices: (0..choices).map(|_| Choice::default()).collect(),
        }
    }

    pub(super) fn with_usage(self, include_usage: bool) -> Self {
        Self { include_usage, ..self }
    }

    /// Takes in what a choice is told, for [`Writer::answer`].
    ///
    /// # Errors
    /// The choice failed.
    pub fn collect(&mut self, choice: usize, event: Event) -> Result<()> {
        match event {
            Event::Piece(piece) => {
                let entry = self.entry(choice, &piece);
                let choice = &mut self.choices[choice];
                choice.text += &piece.text;
                choice.logprobs.extend(entry);
                Ok(())
            }
            over => self.end(choice, over),
        }
    }

    /// The chunks of a stream for what a choice is told.
    ///
    /// # Errors
    /// The choice failed.
    pub fn chunks(&mut self, choice: usize, event: Event) -> Result<Vec<Value>> {
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.choices[choice].has_begun, true) && self.form == Form::Chat {
            chunks.push(self.chunk(choice, json!({"role": "assistant", "content": ""}), None));
        }
        match event {
            Event::Piece(piece) => {
                let entry = self.entry(choice, &piece);
                if !piece.text.is_empty() || entry.is_some() {
                    let logprobs = self.logprobs(entry.as_slice());
                    let part = if self.form == Form::Chat { json!({"content": piece.text}) } else { piece.text.into() };
                    chunks.push(self.chunk(choice, part, logprobs));
                }
            }
            over => {
                self.end(choice, over)?;
                let nothing = if self.form == Form::Chat { json!({}) } else { json!("") };
                chunks.push(self.chunk(choice, nothing, None));
            }
        }
        if self.include_usage && self.is_over() {
            let mut last = self.object(true, &[]);
            last["usage"] = self.usage();
            chunks.push(last);
        }
        Ok(chunks)
    }

    /// Whether all choices have ended.
    pub fn is_over(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// Why each choice ended that has.
    pub fn finishes(&self) -> impl Iterator<Item = Finish> {
        self.choices.iter().filter_map(|choice| choice.finish)
    }

    /// The whole answer.
    pub fn answer(&self) -> Value {
        let choice = |(index, choice): (usize, &Choice)| {
            let (name, text) = match self.form {
                Form::Chat => ("message", json!({"role": "assistant", "content": choice.text, "refusal": null})),
                Form::Text => ("text", Value::from(choice.text.as_str())),
            };
            self.choice(index, name, text, self.logprobs(&choice.logprobs))
        };
        let choices: Vec<_> = self.choices.iter().enumerate().map(choice).collect();
        let mut answer = self.object(false, &choices);
        answer["usage"] = self.usage();
        answer
    }

    fn end(&mut self, choice: usize, event: Event) -> Result<()> {
        match event {
            Event::Failed(error) => return Err(error),
            Event::Done(report) => {
                self.choices[choice].generated = report.generated_tokens;
                self.choices[choice].finish = Some(report.finish);
            }
            Event::Piece(_) => {}
        }
        Ok(())
    }

    fn object(&self, is_chunk: bool, choices: &[Value]) -> Value {
        let object = match (self.form, is_chunk) {
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Text, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    fn chunk(&self, index: usize, part: Value, logprobs: Option<Value>) -> Value {
        let name = if self.form == Form::Chat { "delta" } else { "text" };
        let mut chunk = self.object(true, &[self.choice(index, name, part, logprobs)]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&self, index: usize, name: &str, part: Value, logprobs: Option<Value>) -> Value {
        let finish = self.choices[index].finish.map(finish_reason);
        let mut choice = json!({"index": index, name: null, "logprobs": null, "finish_reason": finish});
        choice[name] = part;
        choice["logprobs"] = logprobs.unwrap_or_default();
        choice
    }

    fn usage(&self) -> Value {
        let completion: usize = self.choices.iter().map(|choice| choice.generated).sum();
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        })
    }

    /// The log probabilities of a piece, if they are wanted and its token is part of the text.
    fn entry(&mut self, choice: usize, piece: &Piece) -> Option<Entry> {
        let bytes = self.bytes.as_ref()?;
        let token = piece.token.filter(|token| !self.ends.contains(token))?;
        let logprobs = piece.logprobs.as_ref()?;
        let offset = self.choices[choice].offset;
        self.choices[choice].offset += String::from_utf8_lossy(bytes.of(token)).chars().count();
        Some(Entry { token: (token, logprobs.logprob), top: logprobs.top.clone(), offset })
    }

    fn logprobs(&self, entries: &[Entry]) -> Option<Value> {
        let bytes = self.bytes.as_ref()?;
        let text = |token: u32| String::from_utf8_lossy(bytes.of(token)).into_owned();
        let finite = |logprob: f32| logprob.max(LEAST_LOGPROB);
        if self.form == Form::Chat {
            let one = |(token, logprob): (u32, f32)| json!({"token": text(token), "logprob": finite(logprob), "bytes": bytes.of(token)});
            let content = entries.iter().map(|entry| {
                let mut value = one(entry.token);
                value["top_logprobs"] = entry.top.iter().copied().map(one).collect();
                value
            });
            return Some(json!({"content": content.collect::<Vec<_>>(), "refusal": null}));
        }
        let top = |entry: &Entry| -> Map<String, Value> {
            // The token itself is among them in any case.
            let all = entry.top.iter().chain([&entry.token]);
            all.map(|(token, logprob)| (text(*token), finite(*logprob).into())).collect()
        };
        Some(json!({
            "tokens": entries.iter().map(|entry| text(entry.token.0)).collect::<Vec<_>>(),
            "token_logprobs": entries.iter().map(|entry| finite(entry.token.1)).collect::<Vec<_>>(),
            "top_logprobs": entries.iter().map(top).collect::<Vec<_>>(),
            "text_offset": entries.iter().map(|entry| entry.offset).collect::<Vec<_>>(),
        }))
    }
}

/// Why a choice ended, in OpenAI's words and that of vLLM for what was broken off.
pub fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfText | Finish::Stop => "stop",
        Finish::Context | Finish::MaxNewTokens => "length",
        Finish::Interrupted => "abort",
    }
}
