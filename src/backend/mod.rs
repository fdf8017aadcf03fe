//! Stages: runs of modules on one device, and the pipeline that tokens go through.

pub mod block;
mod choice;
mod chooser;
pub mod cpu;
pub mod cuda;
mod hidden;
mod pipeline;
mod probe;

use crate::error::Result;

pub use crate::random::Draws;
pub use choice::Choice;
pub use chooser::Chooser;
pub use hidden::{Chunk, Hidden};
pub use pipeline::Pipeline;

/// Rows of a step: tokens of one sequence that follow on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Which of the sequences it is that there is room for.
    pub slot: usize,
    /// The pages that it has, one for each [`PAGE`](crate::footprint::PAGE) tokens, those of this step too.
    pub pages: &'a [u32],
    /// Position of the first token in its sequence.
    pub position: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Tokens of the sequence once all are run that are known by now, those of later steps too.
    pub length: usize,
}

/// A contiguous run of modules on one device.
///
/// A stage takes hidden states and gives some; it does not know its
/// neighbours. It asks [`Hidden`] for them where it computes.
pub trait Stage: Send {
    /// Makes the embedding of each token the hidden states, if the stage holds it.
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()>;

    /// Runs the stage's blocks on the hidden states, the rows of one run after those of the other, each of
    /// another sequence, and keeps what blocks keep of them.
    fn run_blocks(&mut self, hidden: &mut Hidden, runs: &[Run]) -> Result<()>;

    /// Normalizes the hidden states, if the stage holds the last norm.
    fn norm(&mut self, hidden: &mut Hidden) -> Result<()>;

    /// The logits of normalized hidden states, `[rows][vocab_size]`, if the stage holds the head.
    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()>;

    /// What chooses tokens where the logits are; `None` where the host does, or the head is elsewhere.
    fn chooser(&mut self) -> Option<&mut dyn DeviceChooser> {
        None
    }

    /// Takes of its device whatever a step takes when it first runs, so that nothing is left to be taken.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// Launches every kernel of a step by itself from now on, where the stage would repeat them as one.
    fn launch_each_kernel(&mut self) {}

    /// Why the stage cannot repeat the launches of a step as one, where it would.
    fn why_apart(&self) -> Option<&str> {
        None
    }

    /// Whether it keeps what it computes in f16 on the way, whose largest value is 65,504; a larger one becomes NaN.
    fn keeps_halves(&self) -> bool {
        false
    }
}

/// A device that chooses tokens by itself, and goes on while the host does something else.
pub trait DeviceChooser {
    /// Makes ready to choose tokens for the sequence in a slot, behind those that occurred.
    fn begin(&mut self, slot: usize, choice: &Choice, seen: &[u32]) -> Result<()>;

    /// Begins to choose the token behind each of the hidden states, which are normalized: for the sequence in which
    /// slot, and by which random number.
    fn choose(&mut self, hidden: &mut Hidden, rows: &[(usize, u32)]) -> Result<()>;

    /// Whether it does whole steps, from tokens to the choice of the next.
    fn does_whole_steps(&self) -> bool;

    /// Begins a whole step of one token of each run: of `tokens`, or without them of those that were chosen last, in
    /// the same rows.
    fn step(&mut self, tokens: Option<&[u32]>, runs: &[Run], draws: &[u32]) -> Result<()>;

    /// The tokens of the first step or choice that were not asked for yet, in the order of its rows.
    fn chosen(&mut self) -> Result<Vec<Chosen>>;
}

/// A token that a device has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The token.
    pub token: u32,
    /// Whether all logits are numbers.
    pub is_finite: bool,
}
