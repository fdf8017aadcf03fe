//! A text on its way.

use super::logprobs::Distribution;
use super::pages::Held;
use super::{Constraint, Logprobs, Sampling};
use crate::backend::{Choice, Chooser, Chosen, Draws};
use crate::error::Result;

/// What there is to be computed of a sequence.
pub struct Sequence {
    /// Its number, in the order in which sequences came.
    pub(super) id: u64,
    /// All tokens: those of the prompt and those that were chosen.
    pub(super) tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub(super) prompt: usize,
    /// The most of them.
    pub(super) most: usize,
    /// How many of them the model has seen; one more where it has begun with the one that is being chosen.
    pub(super) position: usize,
    /// How many the model need not have seen when it began, as they were kept.
    pub(super) kept: usize,
    /// Whether its prompt is among those that were counted.
    pub(super) is_counted: bool,
    /// Its place among those that are computed at once.
    pub(super) slot: usize,
    /// Whether the head's device knows how to choose for it, and which tokens occurred.
    pub(super) is_begun: bool,
    pub(super) held: Held,
    pub(super) choice: Choice,
    /// What chooses tokens where the head's device does not.
    pub(super) chooser: Chooser,
    /// A random number for each token.
    pub(super) draws: Draws,
    pub(super) logprobs: Option<usize>,
    pub(super) constraint: Option<Box<dyn Constraint>>,
}

impl Sequence {
    /// Tokens behind `prompt`, at most `most_new` of them, as `sampling` says.
    pub fn new(prompt: &[u32], most_new: usize, sampling: &Sampling) -> Self {
        Self {
            id: 0,
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            most: prompt.len().saturating_add(most_new),
            position: 0,
            kept: 0,
            is_counted: false,
            slot: 0,
            is_begun: false,
            held: Held::default(),
            choice: sampling.choice(),
            chooser: Chooser::new(sampling.choice(), prompt),
            draws: Draws::new(sampling.seed),
            logprobs: None,
            constraint: None,
        }
    }

    /// Has each token told with its log probability, and those of so many of the likeliest.
    #[must_use]
    pub fn with_logprobs(self, logprobs: Option<usize>) -> Self {
        Self { logprobs, ..self }
    }

    /// Lets only such tokens come as `constraint` says.
    #[must_use]
    pub fn within(self, constraint: Option<Box<dyn Constraint>>) -> Self {
        Self { constraint, ..self }
    }

    /// Whether the host is to see its logits.
    pub(super) fn is_for_host(&self) -> bool {
        self.logprobs.is_some() || self.constraint.is_some()
    }

    /// Chooses the next token by the logits behind those that there are, which are used up.
    pub(super) fn choose(&mut self, logits: &mut [f32]) -> Result<(Chosen, Option<Logprobs>)> {
        let wanted = self.logprobs.map(|count| (Distribution::new(logits), count));
        self.chooser.penalize(logits);
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(logits)?;
        }
        let chosen = self.chooser.pick(logits, self.draws.draw());
        if let (Some(constraint), true) = (&mut self.constraint, chosen.is_finite) {
            constraint.accept(chosen.token)?;
        }
        Ok((chosen, wanted.map(|(distribution, count)| distribution.of(chosen.token, count))))
    }

    /// Takes note of a token that was chosen.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.chooser.see(token);
    }

    /// The length of the sequence when the token at a position is computed: a prompt is computed as one.
    pub(super) fn length_at(&self, position: usize) -> usize {
        self.prompt.max(position + 1)
    }
}
