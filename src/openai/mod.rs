//! Requests and answers in the form of OpenAI's: bodies to [`Call`]s of an [`Engine`], and its events to objects and
//! chunks. Whoever carries them, over HTTP or in a file, is not known here.

mod answer;
mod body;
mod failure;
mod grammar;
mod lines;
mod prompt;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::cancel::Cancel;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::generate::{Engine, Event, GenerateOptions, Request, Sampling};
use crate::text::{ChatTemplate, Sandbox};
use body::{Body, Subject};
use grammar::{Grammar, Grammars};
use prompt::Prompt;

pub use answer::{Writer, finish_reason};
pub use failure::{BadField, Failure};
pub use lines::{Line, answered, failed};

/// Bytes of text that a token stands for at most, so that a text which cannot fit is not made tokens of.
const LONGEST_TOKEN: usize = 256;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// A model that is asked as OpenAI's are.
pub struct Api {
    engine: Engine,
    name: String,
    created: u64,
    /// Or why there is none.
    template: Result<ChatTemplate, String>,
    sandbox: Sandbox,
    /// What a body leaves open.
    usual: GenerateOptions,
    /// Whether the seed is as usual too, and not each its own.
    is_seeded: bool,
    eos_token_ids: Vec<u32>,
    vocab_size: usize,
    grammars: OnceLock<Grammars>,
}

/// A body, made ready for the engine.
pub struct Call {
    /// One for each choice.
    pub requests: Vec<Request>,
    /// Makes the answer of what the engine tells.
    pub writer: Writer,
    /// Whether the answer is wanted in chunks.
    pub stream: bool,
    /// Ends all of the requests.
    pub cancel: Cancel,
}

impl Api {
    /// The model that `engine` runs, under a name of its own or that of its checkpoint. Chat templates run in
    /// `sandbox`.
    ///
    /// # Errors
    /// The checkpoint is not in a local directory.
    pub fn new(engine: Engine, checkpoint: &Checkpoint, name: Option<String>, sandbox: Sandbox) -> Result<Self> {
        let config = &checkpoint.config;
        let template = ChatTemplate::open(checkpoint.local_directory()?);
        Ok(Self {
            engine,
            name: name.unwrap_or_else(|| checkpoint.name.clone()),
            created: now(),
            template: template.map_err(|error| failure::told(&error)),
            sandbox,
            usual: GenerateOptions {
                sampling: Sampling::of_model(config),
                max_new_tokens: config.generation.max_new_tokens,
                ..GenerateOptions::default()
            },
            is_seeded: false,
            eos_token_ids: config.eos_token_ids.clone(),
            vocab_size: config.vocab_size,
            grammars: OnceLock::new(),
        })
    }

    /// The name that the model goes by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What answers.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Answers as `usual` says what a body leaves open.
    #[must_use]
    pub fn with_usual(self, usual: GenerateOptions) -> Self {
        Self { usual, is_seeded: true, ..self }
    }

    /// The model as an element of `/v1/models`.
    pub fn model(&self) -> Value {
        json!({
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "evenkeel",
            "max_model_len": self.engine.plan().context,
        })
    }

    /// What `body` asks for. It may take a while: a template and a tokenizer run.
    ///
    /// # Errors
    /// The body is not as it must be, asks for what is not done, or has a prompt that is too long.
    pub fn call(&self, form: Form, body: &[u8]) -> Result<Call> {
        let body = Body::parse(form, body)?;
        let plan = self.engine.plan();
        let prompts = self.prompts(&body.subject)?;
        let bytes = body.logprobs.map(|_| self.engine.tokenizer().token_bytes()).transpose()?;
        let grammar = self.grammar(body.schema.as_ref())?;
        let Self { usual, is_seeded, .. } = self;
        let ignore_eos = body.ignore_eos || usual.ignore_eos;
        let seed = body.seed.unwrap_or_else(|| if *is_seeded { usual.sampling.seed } else { fresh() });
        let cancel = Cancel::new();
        let mut requests = Vec::new();
        for prompt in &prompts {
            let room = plan.context.saturating_sub(prompt.len()).max(1);
            let wanted = usual.max_new_tokens.or(body.usual_tokens).map_or(room, |usual| usual.min(room));
            let options = GenerateOptions {
                sampling: body.sampling(&usual.sampling),
                max_new_tokens: Some(body.max_tokens.unwrap_or(wanted)),
                stop: if body.stop.is_empty() { usual.stop.clone() } else { body.stop.clone() },
                ignore_eos,
                cancel: cancel.clone(),
            };
            // Before there is one for each choice.
            options.check(prompt, plan)?;
            for _ in 0..body.n {
                let seed = seed.wrapping_add(requests.len() as u64);
                let sampling = Sampling { seed, ..options.sampling.clone() };
                requests.push(Request {
                    prompt: prompt.clone(),
                    options: GenerateOptions { sampling, ..options.clone() },
                    logprobs: body.logprobs,
                    constraint: grammar.as_ref().map(Grammar::start),
                });
            }
        }
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let ends = if ignore_eos { &[][..] } else { &self.eos_token_ids };
        let writer =
            Writer::new(form, &self.name, requests.len(), prompt_tokens, bytes, ends).with_usage(body.include_usage);
        Ok(Call { requests, writer, stream: body.stream, cancel })
    }

    /// Has the engine answer requests. `on_event` is told of which of them an event is.
    ///
    /// # Errors
    /// As [`Engine::submit`]; those that were taken before are to be cancelled.
    pub fn submit(
        &self,
        requests: Vec<Request>,
        on_event: impl FnMut(usize, Event) + Clone + Send + 'static,
    ) -> Result<()> {
        for (choice, request) in requests.into_iter().enumerate() {
            let mut on_event = on_event.clone();
            self.engine.submit(request, move |event| on_event(choice, event))?;
        }
        Ok(())
    }

    /// The tokens of each prompt.
    fn prompts(&self, subject: &Subject) -> Result<Vec<Vec<u32>>> {
        match subject {
            Subject::Chat { messages, tools } => {
                let template = self.template.as_ref().map_err(|why| Error::input(why.clone()))?;
                // A template has put the special tokens there itself.
                Ok(vec![self.encode(&self.sandbox.render(template, messages, tools)?, false)?])
            }
            Subject::Prompts(prompts) => {
                let tokens = |(at, prompt): (usize, &Prompt)| match prompt {
                    Prompt::Text(text) if text.is_empty() => Err(BadField::error("prompt", "is empty")),
                    Prompt::Text(text) => self.encode(text, true),
                    Prompt::Tokens(ids) if ids.is_empty() => Err(BadField::error("prompt", "is empty")),
                    Prompt::Tokens(ids) => match ids.iter().find(|id| **id as usize >= self.vocab_size) {
                        Some(id) => Err(BadField::error(
                            format!("prompt[{at}]"),
                            format!("has token {id}, and the model has only {} tokens", self.vocab_size),
                        )),
                        None => Ok(ids.clone()),
                    },
                };
                prompts.iter().enumerate().map(tokens).collect()
            }
        }
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let context = self.engine.plan().context;
        if text.len() > context.saturating_mul(LONGEST_TOKEN) {
            return Err(Error::input(Lengthy { bytes: text.len(), most: context }));
        }
        self.engine.tokenizer().encode(text, special)
    }

    fn grammar(&self, schema: Option<&Value>) -> Result<Option<Grammar>> {
        let Some(schema) = schema else { return Ok(None) };
        if self.grammars.get().is_none() {
            let made = Grammars::new(&*self.engine.tokenizer().token_bytes()?, &self.eos_token_ids)?;
            // Another may have been quicker.
            let _ = self.grammars.set(made);
        }
        self.grammars.get().map(|grammars| grammars.compile(schema)).transpose()
    }
}

/// A text that has more than the context's tokens, however long these are.
#[derive(Debug, thiserror::Error)]
#[error("the prompt has {bytes} bytes, which are more than the context's {most} tokens")]
struct Lengthy {
    bytes: usize,
    most: usize,
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A number that nobody has had.
fn fresh() -> u64 {
    RandomState::new().hash_one(SystemTime::now())
}
