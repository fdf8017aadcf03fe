//! Prompt to text, and how well a text is predicted.

mod engine;
mod perplexity;

use std::time::Instant;

use serde::Serialize;

use crate::cancel::Cancel;
use crate::engine::Sequence;
use crate::error::{Error, ErrorKind, Hint, Result, Setting};
use crate::loader::Model;
use crate::text::TextStream;

pub use crate::engine::Sampling;
pub use engine::{Answer, Constraint, Engine, EngineOptions, EngineState, Event, Request};
pub use perplexity::{Comparison, DEFAULT_WINDOW, Divergence, Perplexity, Predictions, Windows, start_tokens};

/// How to generate.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// How a token is chosen.
    pub sampling: Sampling,
    /// The most tokens to generate; `None` goes on until the context is full.
    pub max_new_tokens: Option<usize>,
    /// Texts that end the generation; they are not given out.
    pub stop: Vec<String>,
    /// Whether to go on behind an end-of-text token.
    pub ignore_eos: bool,
    /// Stops the generation at the next token, or chunk of the prompt.
    pub cancel: Cancel,
}

impl From<Sampling> for GenerateOptions {
    fn from(sampling: Sampling) -> Self {
        Self { sampling, ..Self::default() }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Finish {
    /// The context is full.
    Context,
    /// An end-of-text token.
    EndOfText,
    /// The caller asked for it.
    Interrupted,
    /// As many tokens as were wanted.
    MaxNewTokens,
    /// A stop text.
    Stop,
}

/// A token and the text that it made complete, which may be none.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The token; `None` for text that was held back until the end.
    pub token: Option<u32>,
    /// Whole characters.
    pub text: String,
    /// How likely it was, where that was asked for.
    pub logprobs: Option<Logprobs>,
}

/// How likely a token was, before temperature and cuts.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens and theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Counts and times of a generation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GenerateReport {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that were generated.
    pub generated_tokens: usize,
    /// Time until the first logits.
    pub prefill_seconds: f64,
    /// Time from then on.
    pub decode_seconds: f64,
    /// Why it ended.
    pub finish: Finish,
    /// Why a GPU launches the kernels of a step one by one, where it ought to repeat them as one.
    pub launched_apart: Option<String>,
}

/// A prompt and its answer are longer than the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the context holds {context} tokens, the prompt has {prompt}{}", match wanted {
    0 => String::new(),
    wanted => format!(" and {wanted} new ones are asked for"),
})]
pub struct TooLong {
    /// What the context holds, in tokens.
    pub context: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// New tokens that were asked for; 0 where no number was.
    pub wanted: usize,
}

impl Model {
    /// Generates behind `prompt`, whose tokens the model's tokenizer gives.
    ///
    /// # Errors
    /// The prompt is empty or longer than the context, or the model fails.
    pub fn generate(&mut self, prompt: &str, options: impl Into<GenerateOptions>) -> Result<Generation<'_>> {
        let tokens = self.tokenizer.encode(prompt, true)?;
        self.generate_from(&tokens, options.into())
    }

    /// Generates behind tokens.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn generate_from(&mut self, prompt: &[u32], options: GenerateOptions) -> Result<Generation<'_>> {
        options.sampling.check()?;
        let context = self.plan.context;
        if prompt.is_empty() {
            return Err(Error::input("the prompt is empty"));
        }
        let wanted = options.max_new_tokens.unwrap_or(0);
        if prompt.len().checked_add(wanted).is_none_or(|needed| needed > context) {
            return Err(self.too_long(prompt.len(), wanted));
        }
        let start = Instant::now();
        let mut sequence = self.engine.begin(prompt, &options.sampling)?;
        let next = match options.max_new_tokens {
            Some(0) => None,
            _ => Some(self.engine.next(&mut sequence, false, || options.cancel.check())?),
        };
        Ok(Generation {
            report: GenerateReport {
                prompt_tokens: prompt.len(),
                generated_tokens: 0,
                prefill_seconds: start.elapsed().as_secs_f64(),
                decode_seconds: 0.0,
                finish: if next.is_none() { Finish::MaxNewTokens } else { Finish::Interrupted },
                launched_apart: None,
            },
            next,
            since: Instant::now(),
            stream: TextStream::new(prompt, options.stop.clone()),
            model: self,
            sequence,
            options,
        })
    }

    fn too_long(&self, prompt: usize, wanted: usize) -> Error {
        let (context, longest) = (self.plan.context, self.plan.longest_context);
        let needed = prompt.checked_add(wanted).filter(|needed| *needed <= longest);
        Error::input(TooLong { context, prompt, wanted }).hint(if let Some(needed) = needed {
            Hint::naming("{} makes room", [Setting::Context(needed)])
        } else if prompt < longest {
            Hint::naming("{} is the most that the model has room for", [Setting::MaxNewTokens(longest - prompt)])
        } else {
            format!("the model was made for {longest} tokens; shorten the prompt").into()
        })
    }

    /// Calls `visit` with the position of each of `tokens` and the logits behind it.
    ///
    /// # Errors
    /// The tokens are none, too many, or not the model's, or the model fails.
    pub fn score(&mut self, tokens: &[u32], visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.engine.score(tokens, visit)
    }

    /// Takes prompts in chunks of at most `tokens`; no more than the plan counts.
    pub fn limit_prefill_chunk(&mut self, tokens: usize) {
        self.engine.limit_chunk(tokens);
    }

    /// Launches every kernel of a step by itself from now on, where GPUs would repeat them as one; to
    /// measure what that saves.
    pub fn launch_each_kernel(&mut self) {
        self.engine.pipeline().launch_each_kernel();
    }
}

/// A generation that runs as it is iterated.
pub struct Generation<'m> {
    model: &'m mut Model,
    sequence: Sequence,
    stream: TextStream,
    options: GenerateOptions,
    next: Option<u32>,
    /// Interrupted, unless it has ended otherwise.
    report: GenerateReport,
    /// When the last token was known.
    since: Instant,
}

impl Generation<'_> {
    /// Counts and times so far.
    pub fn report(&self) -> GenerateReport {
        let launched_apart = self.model.engine.why_apart().map(str::to_owned);
        GenerateReport { launched_apart, ..self.report.clone() }
    }

    /// Gives out `token` and chooses the one behind it.
    fn step(&mut self, token: u32) -> Result<Piece> {
        self.report.generated_tokens += 1;
        if !self.options.ignore_eos && self.model.eos_token_ids.contains(&token) {
            self.report.finish = Finish::EndOfText;
            return Ok(Piece { token: Some(token), text: String::new(), logprobs: None });
        }
        let (text, stopped) = self.stream.push(token, &self.model.tokenizer)?;
        let piece = Piece { token: Some(token), text, logprobs: None };
        if stopped {
            self.report.finish = Finish::Stop;
        } else if self.options.max_new_tokens == Some(self.report.generated_tokens) {
            self.report.finish = Finish::MaxNewTokens;
        } else if self.options.cancel.is_cancelled() {
            self.report.finish = Finish::Interrupted;
        } else if self.sequence.tokens().len() > self.model.plan.context {
            self.report.finish = Finish::Context;
        } else {
            let start = if self.sequence.is_ahead() { self.since } else { Instant::now() };
            let more = self.options.max_new_tokens.is_none_or(|most| self.report.generated_tokens + 1 < most);
            match self.model.engine.next(&mut self.sequence, more, || self.options.cancel.check()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => self.report.finish = Finish::Interrupted,
                next => self.next = Some(next?),
            }
            self.since = Instant::now();
            self.report.decode_seconds += (self.since - start).as_secs_f64();
        }
        Ok(piece)
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(token) = self.next.take() {
            return Some(self.step(token));
        }
        let text = self.stream.finish(&self.model.tokenizer);
        match text {
            Ok(text) if text.is_empty() => None,
            text => Some(text.map(|text| Piece { token: None, text, logprobs: None })),
        }
    }
}
