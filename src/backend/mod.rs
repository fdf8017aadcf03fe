//! Stages: runs of modules on one device, and the pipeline that a token goes through.

mod choice;
mod chooser;
pub mod cpu;
pub mod cuda;
mod hidden;
mod machine;
mod pipeline;

use crate::error::Result;

pub use choice::{Choice, Draws};
pub use chooser::Chooser;
pub use hidden::{Chunk, Hidden};
pub use pipeline::{Behind, Pipeline, StageRoles};

/// A contiguous run of modules on one device.
///
/// A stage takes hidden states and gives some; it does not know its
/// neighbours. It asks [`Hidden`] for them where it computes.
pub trait Stage: Send {
    /// Makes the embedding of each token the hidden states; only for the stage that holds it.
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()>;

    /// Runs the stage's blocks on the hidden states, whose first token stands
    /// at `position`, and appends to the KV cache there.
    fn run_blocks(&mut self, hidden: &mut Hidden, position: usize) -> Result<()>;

    /// Normalizes the hidden states; only for the stage that holds the last norm.
    fn norm(&mut self, hidden: &mut Hidden) -> Result<()>;

    /// The logits of one token's normalized hidden state; only for the stage that holds the head.
    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()>;

    /// Makes ready to choose tokens behind those that occurred; false where the device does not
    /// choose by itself, or the head is elsewhere.
    fn prepare(&mut self, _choice: &Choice, _seen: &[u32]) -> Result<bool> {
        Ok(false)
    }

    /// Chooses the token behind the one hidden state, which is normalized, by a random number; only
    /// where [`Stage::prepare`] has said so.
    fn choose(&mut self, _hidden: &mut Hidden, _draw: u32) -> Result<()> {
        unreachable!("a stage that is not prepared is not asked")
    }

    /// Runs `token`, or without one the token that was chosen last, from its embedding on and chooses the one
    /// behind it, as [`Stage::choose`] does; false where the stage does not do all of that at once. It may do
    /// so while the host goes on.
    fn step(&mut self, _token: Option<u32>, _position: usize, _draw: u32) -> Result<bool> {
        Ok(false)
    }

    /// The first token that was chosen and not asked for yet.
    fn chosen(&mut self) -> Result<Chosen> {
        unreachable!("a stage that has chosen nothing is not asked")
    }

    /// Launches every kernel of a step by itself from now on, where the stage would repeat them as one.
    fn launch_each_kernel(&mut self) {}
}

/// A token that a device has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The token.
    pub token: u32,
    /// Whether all logits are numbers.
    pub is_finite: bool,
}
