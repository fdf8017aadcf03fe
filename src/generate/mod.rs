//! Prompt to text, and how well a text is predicted.

mod engine;
mod output;
mod perplexity;

use std::time::Instant;

use serde::Serialize;

use crate::cancel::Cancel;
use crate::engine::Sequence;
use crate::error::{Error, Hint, Result, Setting};
use crate::loader::Model;
use crate::plan::Plan;
use output::Output;

pub use crate::engine::{Constraint, EngineState, Logprobs, Sampling};
pub use engine::{Answer, Engine, EngineOptions, Event, Request};
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
        options.check(prompt, &self.plan)?;
        let begun = Instant::now();
        self.core.clear()?;
        let most = options.max_new_tokens.unwrap_or(self.plan.context);
        if most > 0 {
            self.core.add(Sequence::new(prompt, most, &options.sampling))?;
        }
        let mut generation = Generation {
            output: Output::new(prompt, options),
            first: None,
            is_over: most == 0,
            since: begun,
            model: self,
        };
        if most == 0 {
            generation.output.report.finish = Finish::MaxNewTokens;
        } else {
            generation.output.options.cancel.check()?;
            let first = generation.advance()?;
            generation.first = Some(first.ok_or_else(Error::interrupted)?);
        }
        generation.since = Instant::now();
        generation.output.report.prefill_seconds = (generation.since - begun).as_secs_f64();
        Ok(generation)
    }

    /// Calls `visit` with the position of each of `tokens` and the logits behind it.
    ///
    /// # Errors
    /// The tokens are none, too many, or not the model's, or the model fails.
    pub fn score(&mut self, tokens: &[u32], visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.core.score(tokens, visit)
    }

    /// Takes prompts in chunks of at most `tokens`; no more than the plan counts.
    pub fn limit_prefill_chunk(&mut self, tokens: usize) {
        self.core.limit_chunk(tokens);
    }

    /// Launches every kernel of a step by itself from now on, where GPUs would repeat them as one; to
    /// measure what that saves.
    pub fn launch_each_kernel(&mut self) {
        self.core.pipeline().launch_each_kernel();
    }
}

impl GenerateOptions {
    /// Sees to it that a prompt can be answered so.
    pub(crate) fn check(&self, prompt: &[u32], plan: &Plan) -> Result<()> {
        self.sampling.check()?;
        if prompt.is_empty() {
            return Err(Error::input("the prompt is empty"));
        }
        let (prompt, wanted) = (prompt.len(), self.max_new_tokens.unwrap_or(0));
        let (context, longest) = (plan.context, plan.longest_context);
        let needed = prompt.checked_add(wanted);
        if needed.is_some_and(|needed| needed <= context) {
            return Ok(());
        }
        let needed = needed.filter(|needed| *needed <= longest);
        Err(Error::input(TooLong { context, prompt, wanted }).hint(if let Some(needed) = needed {
            Hint::naming("{} makes room", [Setting::Context(needed)])
        } else if prompt < longest {
            Hint::naming("{} is the most that the model has room for", [Setting::MaxNewTokens(longest - prompt)])
        } else {
            format!("the model was made for {longest} tokens; shorten the prompt").into()
        }))
    }
}

/// A generation that runs as it is iterated.
pub struct Generation<'m> {
    model: &'m mut Model,
    output: Output,
    /// The first token, until it is given out.
    first: Option<u32>,
    is_over: bool,
    /// When the last token was known.
    since: Instant,
}

impl Generation<'_> {
    /// Counts and times so far.
    pub fn report(&self) -> GenerateReport {
        let launched_apart = self.model.core.why_apart().map(str::to_owned);
        GenerateReport { launched_apart, ..self.output.report.clone() }
    }

    /// The next token, unless the caller wants to stop.
    fn advance(&mut self) -> Result<Option<u32>> {
        while !self.output.options.cancel.is_cancelled() {
            if let Some(stepped) = self.model.core.step()?.pop() {
                return stepped.token.map(|(token, _)| Some(token));
            }
        }
        Ok(None)
    }

    /// Gives out the next token.
    fn step(&mut self) -> Result<Option<Piece>> {
        let token = if let Some(token) = self.first.take() {
            Some(token)
        } else {
            let start = if self.model.core.is_ahead() { self.since } else { Instant::now() };
            let token = self.advance()?;
            self.since = Instant::now();
            self.output.report.decode_seconds += (self.since - start).as_secs_f64();
            token
        };
        let Some(token) = token else { return Ok(None) };
        let Model { tokenizer, eos_token_ids, plan, .. } = &*self.model;
        let (piece, is_over) = self.output.take((token, None), tokenizer, eos_token_ids, plan.context)?;
        self.is_over = is_over;
        Ok(Some(piece))
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.is_over {
            match self.step() {
                Ok(None) => self.is_over = true,
                Ok(Some(piece)) => return Some(Ok(piece)),
                Err(error) => {
                    self.is_over = true;
                    return Some(Err(error));
                }
            }
        }
        self.output.rest(&self.model.tokenizer).transpose()
    }
}
