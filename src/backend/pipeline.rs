//! A model's stages in the order they run, and the sequence that is in their KV caches.

use super::{Choice, Draws, Hidden, Stage};
use crate::error::{Error, Result};
use crate::model_config::ModelConfig;
use crate::plan::memory;

/// Which stage holds the embedding, the last norm and the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageRoles {
    /// Position of the stage with the embedding.
    pub embedding: usize,
    /// Position of the stage with the last norm.
    pub norm: usize,
    /// Position of the stage with the head.
    pub head: usize,
}

/// What comes behind a token.
#[derive(Debug, PartialEq)]
pub enum Behind<'a> {
    /// The token that a device has chosen.
    Token(u32),
    /// All logits, to be used up.
    Logits(&'a mut [f32]),
}

/// The stages of a model and the tokens that they have seen.
pub struct Pipeline {
    stages: Vec<Box<dyn Stage>>,
    roles: StageRoles,
    vocab_size: usize,
    context: usize,
    chunk: usize,
    length: usize,
    hidden: Hidden,
    /// The most tokens that the hidden states have room for.
    largest_chunk: usize,
    logits: Vec<f32>,
    /// The random numbers for tokens, where the head's device chooses them.
    draws: Option<Draws>,
    /// Whether the step behind the token that was given out last is under way.
    is_ahead: bool,
}

impl Pipeline {
    /// A pipeline over `stages` with an empty sequence of at most `context` tokens.
    pub fn new(stages: Vec<Box<dyn Stage>>, roles: StageRoles, config: &ModelConfig, context: usize) -> Self {
        let chunk = memory::chunk(context);
        Self {
            stages,
            roles,
            vocab_size: config.vocab_size,
            context,
            chunk,
            length: 0,
            hidden: Hidden::new(chunk, config.hidden_size),
            largest_chunk: chunk,
            logits: vec![0.0; config.vocab_size],
            draws: None,
            is_ahead: false,
        }
    }

    /// Tokens that the sequence has.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens that the sequence may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes of the buffers that the pipeline itself holds.
    pub fn host_bytes(&self) -> usize {
        self.hidden.host_bytes() + self.logits.len() * size_of::<f32>()
    }

    /// Begins an empty sequence, behind whose `prompt` tokens are chosen. Where the head's device
    /// chooses by itself, it draws by the numbers of the seed.
    pub fn begin(&mut self, choice: &Choice, seed: u64, prompt: &[u32]) -> Result<()> {
        (self.length, self.is_ahead) = (0, false);
        self.check(prompt)?;
        let chooses = self.stages[self.roles.head].prepare(choice, prompt)?;
        self.draws = chooses.then(|| Draws::new(seed));
        Ok(())
    }

    /// Takes tokens in chunks of at most `tokens` at once; no more than the plan counts.
    pub fn limit_chunk(&mut self, tokens: usize) {
        self.chunk = tokens.clamp(1, self.largest_chunk);
    }

    /// Launches every kernel of a step by itself from now on.
    pub fn launch_each_kernel(&mut self) {
        self.stages.iter_mut().for_each(|stage| stage.launch_each_kernel());
    }

    /// Appends `tokens` and gives the token that is chosen behind the last of them, or the logits
    /// where no device chooses.
    pub fn extend(&mut self, tokens: &[u32], mut each_chunk: impl FnMut() -> Result<()>) -> Result<Behind<'_>> {
        self.check(tokens)?;
        let mut last = 0;
        for chunk in tokens.chunks(self.chunk) {
            each_chunk()?;
            self.run(chunk)?;
            last = chunk.len() - 1;
        }
        let draw = self.draws.as_mut().map(Draws::draw);
        Ok(match self.head(last, draw)? {
            Some(token) => Behind::Token(token),
            None => Behind::Logits(&mut self.logits),
        })
    }

    /// Whether the device has begun on the token that was given out last.
    pub fn is_ahead(&self) -> bool {
        self.is_ahead
    }

    /// As [`Pipeline::extend`] by the one token that comes next: that which was chosen, where a device chooses.
    /// With `more`, the step behind the token that is given out is begun at once, where it can be.
    pub fn follow(&mut self, token: u32, more: bool) -> Result<Behind<'_>> {
        if !self.is_ahead {
            self.check(&[token])?;
            if !self.step(Some(token))? {
                return self.extend(&[token], || Ok(()));
            }
        }
        self.length += 1;
        self.is_ahead = more && self.length < self.context && self.step(None)?;
        let chosen = self.stages[self.roles.head].chosen()?;
        self.finite(chosen.is_finite).map(|()| Behind::Token(chosen.token))
    }

    /// Begins a whole step; false where no device does that.
    fn step(&mut self, token: Option<u32>) -> Result<bool> {
        let Some(draws) = &mut self.draws else { return Ok(false) };
        let mut next = draws.clone();
        let begun = self.stages[self.roles.head].step(token, self.length, next.draw())?;
        if begun {
            *draws = next;
        }
        Ok(begun)
    }

    /// Runs a sequence of `tokens` and calls `visit` with each one's position and the logits behind it.
    pub fn score(&mut self, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.length = 0;
        self.check(tokens)?;
        for (at, chunk) in tokens.chunks(self.chunk).enumerate() {
            self.run(chunk)?;
            for token in 0..chunk.len() {
                self.head(token, None)?;
                visit(at * self.chunk + token, &self.logits);
            }
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::input("there are no tokens to run"));
        }
        if tokens.len() > self.context - self.length {
            return Err(Error::input(format!(
                "{} tokens are more than the context of {} holds",
                self.length + tokens.len(),
                self.context
            )));
        }
        match tokens.iter().find(|token| **token as usize >= self.vocab_size) {
            Some(token) => {
                Err(Error::input(format!("token {token} is not among the {} of the model", self.vocab_size)))
            }
            None => Ok(()),
        }
    }

    /// Runs a chunk through all blocks; its hidden states stay in `self.hidden`.
    fn run(&mut self, tokens: &[u32]) -> Result<()> {
        self.hidden.begin(tokens.len());
        self.stages[self.roles.embedding].embed(tokens, &mut self.hidden)?;
        for stage in &mut self.stages {
            stage.run_blocks(&mut self.hidden, self.length)?;
        }
        self.length += tokens.len();
        Ok(())
    }

    /// Computes the logits behind the token at `at` of the chunk that was run last; with a random
    /// number, gives the token that is chosen among them instead.
    fn head(&mut self, at: usize, draw: Option<u32>) -> Result<Option<u32>> {
        let chunk = self.hidden.select(at);
        self.stages[self.roles.norm].norm(&mut self.hidden)?;
        let head = &mut self.stages[self.roles.head];
        let chosen = match draw {
            Some(draw) => {
                head.choose(&mut self.hidden, draw)?;
                Some(head.chosen()?)
            }
            None => None,
        };
        if chosen.is_none() {
            head.logits(&mut self.hidden, &mut self.logits)?;
        }
        self.hidden.restore(chunk);
        let all_finite = || self.logits.iter().all(|logit| logit.is_finite());
        self.finite(chosen.map_or_else(all_finite, |chosen| chosen.is_finite))?;
        Ok(chosen.map(|chosen| chosen.token))
    }

    /// Fails where not all logits behind the last token are finite.
    fn finite(&self, is_finite: bool) -> Result<()> {
        if is_finite {
            return Ok(());
        }
        Err(Error::input(format!("a logit behind token {} is not a number", self.length))
            .hint("the checkpoint's weights are broken, or overflow in this scheme; try `--quantize none`"))
    }
}
