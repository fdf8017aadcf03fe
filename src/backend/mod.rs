//! Stages: runs of modules on one device, and the pipeline that a token goes through.

pub mod cpu;
mod cuda;
mod machine;
mod pipeline;

use crate::error::Result;

pub use pipeline::{Pipeline, StageRoles};

/// A contiguous run of modules on one device.
///
/// A stage takes a hidden state and gives one; it does not know its
/// neighbours. Hidden states are f32, `[tokens][hidden_size]`, in host memory.
pub trait Stage: Send {
    /// Writes the embedding of each token to `hidden`; only for the stage that holds it.
    ///
    /// # Errors
    /// The device failed.
    fn embed(&mut self, tokens: &[u32], hidden: &mut [f32]) -> Result<()>;

    /// Runs the stage's blocks on `hidden`, whose first token stands at
    /// `position`, and appends to the KV cache there.
    ///
    /// # Errors
    /// The device failed.
    fn run_blocks(&mut self, hidden: &mut [f32], position: usize) -> Result<()>;

    /// Normalizes one token's hidden state; only for the stage that holds the last norm.
    ///
    /// # Errors
    /// The device failed.
    fn norm(&mut self, hidden: &mut [f32]) -> Result<()>;

    /// The logits of one token's normalized hidden state; only for the stage that holds the head.
    ///
    /// # Errors
    /// The device failed.
    fn logits(&mut self, hidden: &[f32], logits: &mut [f32]) -> Result<()>;
}
