//! Sequences, and the steps that bring them forward.

mod sampling;

use crate::backend::{Chooser, Chosen, DeviceChooser, Draws, Pipeline, Run};
use crate::error::{Error, Hint, Result, Setting};
use crate::footprint::Extent;

pub use sampling::Sampling;

/// A text on its way: its tokens, how many of them the model has seen, where their state is kept, and how
/// the next one is chosen.
pub struct Sequence {
    tokens: Vec<u32>,
    position: usize,
    slot: usize,
    pages: Vec<u32>,
    /// What chooses tokens, unless the head's device does.
    chooser: Chooser,
    /// A random number for each token.
    draws: Draws,
    /// The token that the host has chosen, until it is added.
    chosen: Option<Chosen>,
}

impl Sequence {
    /// All tokens: those of the prompt and those that were chosen.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether a device has begun on the token that was chosen last.
    pub fn is_ahead(&self) -> bool {
        self.position == self.tokens.len()
    }
}

/// Runs sequences through a model's stages.
pub struct Engine {
    pipeline: Pipeline,
    context: usize,
    chunk: usize,
    restart_beyond: Option<usize>,
    pages: Vec<u32>,
}

impl Engine {
    /// An engine for sequences of at most `context` tokens, which are run again from their beginning once they are
    /// longer than `restart_beyond`.
    pub fn new(pipeline: Pipeline, context: usize, restart_beyond: Option<usize>) -> Self {
        let chunk = pipeline.largest_chunk();
        #[expect(clippy::cast_possible_truncation, reason = "below 2^28")]
        let pages = (0..Extent::pages_of(context) as u32).collect();
        Self { pipeline, context, chunk, restart_beyond, pages }
    }

    /// Whether a sequence of which so many tokens have been run begins again at so many.
    fn restarts(&self, position: usize, length: usize) -> bool {
        self.restart_beyond.is_some_and(|border| (1..=border).contains(&position) && length > border)
    }

    /// The stages.
    pub fn pipeline(&mut self) -> &mut Pipeline {
        &mut self.pipeline
    }

    /// Why a stage cannot repeat the launches of a step as one, where it would.
    pub fn why_apart(&self) -> Option<&str> {
        self.pipeline.why_apart()
    }

    /// Takes prompts in chunks of at most `tokens`; no more than the plan counts.
    pub fn limit_chunk(&mut self, tokens: usize) {
        self.chunk = tokens.clamp(1, self.pipeline.largest_chunk());
    }

    /// Begins a sequence with `prompt`, in place of the one before.
    ///
    /// # Errors
    /// The prompt is empty or longer than the context, or a device fails.
    pub fn begin(&mut self, prompt: &[u32], sampling: &Sampling) -> Result<Sequence> {
        self.check(prompt)?;
        if let Some(chooser) = self.pipeline.chooser() {
            chooser.begin(&sampling.choice(), prompt)?;
        }
        Ok(Sequence {
            tokens: prompt.to_vec(),
            position: 0,
            slot: 0,
            pages: self.pages.clone(),
            chooser: Chooser::new(sampling.choice(), prompt),
            draws: Draws::new(sampling.seed),
            chosen: None,
        })
    }

    /// Chooses the token behind those of `sequence`, and adds it. With `more`, the step behind it is begun at
    /// once, where a device does whole steps.
    ///
    /// # Errors
    /// The context is full, a device fails, a logit is not a number, or `each_chunk` fails, which is called before
    /// each chunk of a prompt.
    pub fn next(&mut self, sequence: &mut Sequence, more: bool, each_chunk: impl FnMut() -> Result<()>) -> Result<u32> {
        if !sequence.is_ahead() {
            self.advance(sequence, each_chunk)?;
        }
        let seen = sequence.position;
        let mut chosen = sequence.chosen.take();
        if chosen.is_none() {
            if more && seen < self.context && !self.restarts(seen, seen + 1) && self.does_whole_steps() {
                self.step(sequence, None)?;
            }
            chosen = self.pipeline.chooser().map(DeviceChooser::chosen).transpose()?;
        }
        match chosen {
            Some(Chosen { token, is_finite: true }) => {
                sequence.tokens.push(token);
                Ok(token)
            }
            _ => Err(self.not_a_number(seen)),
        }
    }

    /// Runs the tokens that have not been run yet, and has the one behind them chosen.
    fn advance(&mut self, sequence: &mut Sequence, mut each_chunk: impl FnMut() -> Result<()>) -> Result<()> {
        if self.restarts(sequence.position, sequence.tokens.len()) {
            sequence.position = 0;
        }
        let new = sequence.position..sequence.tokens.len();
        if new.end > self.context {
            return Err(self.too_long(new.end));
        }
        if new.len() == 1 && self.does_whole_steps() {
            return self.step(sequence, Some(sequence.tokens[new.start]));
        }
        let mut last = 0;
        for start in new.clone().step_by(self.chunk) {
            each_chunk()?;
            let chunk = start..new.end.min(start + self.chunk);
            let Sequence { slot, ref pages, .. } = *sequence;
            let run = Run { slot, pages, position: start, tokens: chunk.len(), length: new.end };
            self.pipeline.run(&sequence.tokens[chunk.clone()], &[run])?;
            sequence.position = chunk.end;
            last = chunk.len() - 1;
        }
        if self.pipeline.chooser().is_some() {
            return self.pipeline.choose(last, sequence.draws.draw());
        }
        let draw = sequence.draws.draw();
        sequence.chosen = Some(sequence.chooser.choose(self.pipeline.logits(last)?, draw));
        Ok(())
    }

    fn does_whole_steps(&mut self) -> bool {
        self.pipeline.chooser().is_some_and(|chooser| chooser.does_whole_steps())
    }

    /// Has a device run one token, `token` or that which was chosen last, and choose the one behind it.
    fn step(&mut self, sequence: &mut Sequence, token: Option<u32>) -> Result<()> {
        let Sequence { slot, ref pages, position, .. } = *sequence;
        let run = Run { slot, pages, position, tokens: 1, length: position + 1 };
        if let Some(chooser) = self.pipeline.chooser() {
            chooser.step(token, run, sequence.draws.draw())?;
        }
        sequence.position += 1;
        Ok(())
    }

    /// Runs a sequence of `tokens` and calls `visit` with each one's position and the logits behind it.
    ///
    /// # Errors
    /// The tokens are none, too many, or not the model's, a device fails, or a logit is not a number.
    pub fn score(&mut self, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        for (at, chunk) in tokens.chunks(self.chunk).enumerate() {
            let position = at * self.chunk;
            self.pipeline.run(
                chunk,
                &[Run { slot: 0, pages: &self.pages, position, tokens: chunk.len(), length: tokens.len() }],
            )?;
            for row in 0..chunk.len() {
                let logits = self.pipeline.logits(row)?;
                if !logits.iter().all(|logit| logit.is_finite()) {
                    return Err(self.not_a_number(position + row + 1));
                }
                visit(position + row, logits);
            }
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        match tokens.len() {
            0 => Err(Error::input("there are no tokens to run")),
            len if len > self.context => Err(self.too_long(len)),
            _ => Ok(()),
        }
    }

    fn too_long(&self, len: usize) -> Error {
        Error::input(format!("{len} tokens are more than the context of {} holds", self.context))
    }

    fn not_a_number(&self, tokens: usize) -> Error {
        let error = Error::input(format!("a logit behind token {tokens} is not a number"));
        let broken = "the checkpoint's weights are broken, or overflow in this scheme; try {}";
        let broken = Hint::naming(broken, [Setting::Quantize(Some("none"))]);
        if !self.pipeline.keeps_halves() {
            return error.hint(broken);
        }
        let range = "on a GPU activations are kept in f16, whose largest value is 65,504, and the model may have larger \
            ones; the CPU has no such limit: try {} with {}";
        error.hint(Hint::naming(range, [Setting::Cpu, Setting::KvCache("bf16")])).hint(broken)
    }
}
