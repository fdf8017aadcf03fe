//! A model's stages in the order they run.

use super::{DeviceChooser, Hidden, Run, Stage};
use crate::error::{Error, Result};
use crate::footprint::Extent;
use crate::model_config::ModelConfig;

/// The stages of a model.
pub struct Pipeline {
    stages: Vec<Box<dyn Stage>>,
    hidden: Hidden,
    /// The most tokens that the hidden states have room for.
    largest_chunk: usize,
    logits: Vec<f32>,
    vocab_size: usize,
}

impl Pipeline {
    /// A pipeline over `stages`.
    pub fn new(stages: Vec<Box<dyn Stage>>, config: &ModelConfig, extent: Extent) -> Self {
        Self {
            stages,
            hidden: Hidden::new(extent.chunk, config.hidden_size),
            largest_chunk: extent.chunk,
            logits: vec![0.0; extent.logit_rows() * config.vocab_size],
            vocab_size: config.vocab_size,
        }
    }

    /// Bytes of the buffers that the pipeline itself holds.
    pub fn host_bytes(&self) -> usize {
        self.hidden.host_bytes() + self.logits.len() * size_of::<f32>()
    }

    /// The most tokens of a step.
    pub fn largest_chunk(&self) -> usize {
        self.largest_chunk
    }

    /// Has every device take now what steps take of it when they first run.
    pub fn prepare(&mut self) -> Result<()> {
        self.stages.iter_mut().try_for_each(|stage| stage.prepare())
    }

    /// Why a stage cannot repeat the launches of a step as one, where it would.
    pub fn why_apart(&self) -> Option<&str> {
        self.stages.iter().find_map(|stage| stage.why_apart())
    }

    /// Launches every kernel of a step by itself from now on.
    pub fn launch_each_kernel(&mut self) {
        self.stages.iter_mut().for_each(|stage| stage.launch_each_kernel());
    }

    /// Whether a stage keeps what it computes in f16 on the way.
    pub fn keeps_halves(&self) -> bool {
        self.stages.iter().any(|stage| stage.keeps_halves())
    }

    /// Sees to it that all tokens are the model's.
    pub fn check(&self, tokens: &[u32]) -> Result<()> {
        let Some(token) = tokens.iter().find(|token| **token as usize >= self.vocab_size) else { return Ok(()) };
        Err(Error::input(format!("token {token} is not among the {} of the model", self.vocab_size)))
    }

    /// Runs the tokens of `runs`, at most [`Pipeline::largest_chunk`] of them, through all blocks. Their hidden states
    /// stay until the next step.
    pub fn run(&mut self, tokens: &[u32], runs: &[Run]) -> Result<()> {
        debug_assert_eq!(tokens.len(), runs.iter().map(|run| run.tokens).sum::<usize>());
        self.check(tokens)?;
        self.hidden.begin(tokens.len());
        self.stages.iter_mut().try_for_each(|stage| stage.embed(tokens, &mut self.hidden))?;
        self.stages.iter_mut().try_for_each(|stage| stage.run_blocks(&mut self.hidden, runs))
    }

    /// The logits behind rows of the last step, at most [`LOGIT_ROWS`](crate::footprint::LOGIT_ROWS) and in ascending
    /// order, to be used up. Rows behind these stay as they are.
    pub fn logits(&mut self, rows: &[usize]) -> Result<&mut [f32]> {
        let chunk = self.hidden.select(rows)?;
        self.stages.iter_mut().try_for_each(|stage| stage.norm(&mut self.hidden))?;
        let logits = &mut self.logits[..rows.len() * self.vocab_size];
        self.stages.iter_mut().try_for_each(|stage| stage.logits(&mut self.hidden, logits))?;
        self.hidden.restore(chunk);
        Ok(logits)
    }

    /// Whether the head's device chooses tokens, and not the host.
    pub fn can_choose(&mut self) -> bool {
        self.chooser().is_ok()
    }

    /// What chooses tokens where the head is.
    ///
    /// # Errors
    /// That is a matter of the host.
    pub fn chooser(&mut self) -> Result<&mut dyn DeviceChooser> {
        let chooser = self.stages.iter_mut().find_map(|stage| stage.chooser());
        chooser.ok_or_else(|| Error::device("the head's device chooses no tokens"))
    }

    /// Has the head's device begin to choose the tokens behind rows of the last step, in ascending order: each for the
    /// sequence in a slot, by a random number.
    ///
    /// # Errors
    /// A device fails, or none chooses by itself.
    pub fn choose(&mut self, rows: &[usize], of: &[(usize, u32)]) -> Result<()> {
        let chunk = self.hidden.select(rows)?;
        self.stages.iter_mut().try_for_each(|stage| stage.norm(&mut self.hidden))?;
        for chooser in self.stages.iter_mut().filter_map(|stage| stage.chooser()) {
            chooser.choose(&mut self.hidden, of)?;
        }
        self.hidden.restore(chunk);
        Ok(())
    }
}
