//! A model's stages in the order they run.

use super::{DeviceChooser, Hidden, Run, Stage};
use crate::error::{Error, Result};
use crate::model_config::ModelConfig;

/// The stages of a model.
pub struct Pipeline {
    stages: Vec<Box<dyn Stage>>,
    hidden: Hidden,
    /// The most tokens that the hidden states have room for.
    largest_chunk: usize,
    logits: Vec<f32>,
}

impl Pipeline {
    /// A pipeline over `stages`, with room for `largest_chunk` tokens at once.
    pub fn new(stages: Vec<Box<dyn Stage>>, config: &ModelConfig, largest_chunk: usize) -> Self {
        let (hidden, logits) = (Hidden::new(largest_chunk, config.hidden_size), vec![0.0; config.vocab_size]);
        Self { stages, hidden, largest_chunk, logits }
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

    /// Runs the tokens of `runs`, at most [`Pipeline::largest_chunk`] of them, through all blocks. Their hidden states
    /// stay until the next step.
    pub fn run(&mut self, tokens: &[u32], runs: &[Run]) -> Result<()> {
        debug_assert_eq!(tokens.len(), runs.iter().map(|run| run.tokens).sum::<usize>());
        if let Some(token) = tokens.iter().find(|token| **token as usize >= self.logits.len()) {
            return Err(Error::input(format!("token {token} is not among the {} of the model", self.logits.len())));
        }
        self.hidden.begin(tokens.len());
        self.stages.iter_mut().try_for_each(|stage| stage.embed(tokens, &mut self.hidden))?;
        self.stages.iter_mut().try_for_each(|stage| stage.run_blocks(&mut self.hidden, runs))
    }

    /// The logits behind a row of the last step, to be used up.
    pub fn logits(&mut self, row: usize) -> Result<&mut [f32]> {
        let chunk = self.hidden.select(row);
        self.stages.iter_mut().try_for_each(|stage| stage.norm(&mut self.hidden))?;
        self.stages.iter_mut().try_for_each(|stage| stage.logits(&mut self.hidden, &mut self.logits))?;
        self.hidden.restore(chunk);
        Ok(&mut self.logits)
    }

    /// What chooses tokens where the head is, if that is no matter of the host.
    pub fn chooser(&mut self) -> Option<&mut dyn DeviceChooser> {
        self.stages.iter_mut().find_map(|stage| stage.chooser())
    }

    /// Has the head's device begin to choose the token behind a row of the last step, by a random number.
    ///
    /// # Errors
    /// A device fails, or none chooses by itself.
    pub fn choose(&mut self, row: usize, draw: u32) -> Result<()> {
        let chunk = self.hidden.select(row);
        self.stages.iter_mut().try_for_each(|stage| stage.norm(&mut self.hidden))?;
        let chooser = self.stages.iter_mut().find_map(|stage| stage.chooser());
        let chooser = chooser.ok_or_else(|| Error::device("the head's device chooses no tokens"))?;
        chooser.choose(&mut self.hidden, draw)?;
        self.hidden.restore(chunk);
        Ok(())
    }
}
