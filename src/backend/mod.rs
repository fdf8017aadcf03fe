//! Stages: runs of modules on one device, and the pipeline that a token goes through.

pub mod cpu;
pub mod cuda;
mod hidden;
mod machine;
mod pipeline;

use crate::error::Result;

pub use hidden::{Chunk, Hidden};
pub use pipeline::{Behind, Pipeline, StageRoles};

/// A contiguous run of modules on one device.
///
/// A stage takes hidden states and gives some; it does not know its
/// neighbours. It asks [`Hidden`] for them where it computes.
pub trait Stage: Send {
    /// Makes the embedding of each token the hidden states; only for the stage that holds it.
    ///
    /// # Errors
    /// The device failed.
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()>;

    /// Runs the stage's blocks on the hidden states, whose first token stands
    /// at `position`, and appends to the KV cache there.
    ///
    /// # Errors
    /// The device failed.
    fn run_blocks(&mut self, hidden: &mut Hidden, position: usize) -> Result<()>;

    /// Normalizes the hidden states; only for the stage that holds the last norm.
    ///
    /// # Errors
    /// The device failed.
    fn norm(&mut self, hidden: &mut Hidden) -> Result<()>;

    /// The logits of one token's normalized hidden state; only for the stage that holds the head.
    ///
    /// # Errors
    /// The device failed.
    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()>;

    /// The token with the largest of the logits that [`Stage::logits`] would
    /// give, where the device finds it by itself; `None` where it does not.
    ///
    /// # Errors
    /// The device failed.
    fn best(&mut self, _hidden: &mut Hidden) -> Result<Option<Best>> {
        Ok(None)
    }

    /// Launches every kernel of a step by itself from now on, where the stage would repeat them as one.
    fn launch_each_kernel(&mut self) {}
}

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// The token.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
}
