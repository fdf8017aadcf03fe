//! The buffers that stages of a GPU work in.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

use super::answers::Answers;
use super::operands::WORD;
use super::{Gpu, MAX_HEAD_DIM, Region, Scratch};
use crate::backend::Run;
use crate::error::{Error, Result};
use crate::footprint::{CudaBuffers, CudaChoice};
use crate::model_config::{ModelConfig, Rope};
use crate::pool::lock;

/// The buffers of a step on one GPU, shared by all its stages: they run in turn.
pub struct Workspace {
    pub(super) gpu: Arc<Gpu>,
    buffers: CudaBuffers<Region>,
    /// The frequencies of each rope for each run of a step, and the least length that they are right for.
    frequencies: Mutex<Vec<Vec<(Region, usize)>>>,
    pub(super) scratch: Scratch,
    answers: Mutex<Answers>,
}

impl Deref for Workspace {
    type Target = CudaBuffers<Region>;

    fn deref(&self) -> &CudaBuffers<Region> {
        &self.buffers
    }
}

impl Workspace {
    /// Whether a GPU can compute such a model.
    pub fn check(config: &ModelConfig) -> Result<()> {
        if config.head_dim > MAX_HEAD_DIM {
            return Err(Error::input(format!(
                "heads of width {} cannot be computed on a GPU; the widest are {MAX_HEAD_DIM}",
                config.head_dim
            ))
            .hint("a device map of `{\"\": \"cpu\"}` computes on the CPU"));
        }
        Ok(())
    }

    /// Buffers in the next of `regions`, which are of [`CudaBuffers::sizes`], for so many sequences.
    pub fn new(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        sequences: usize,
        regions: &mut impl Iterator<Item = Region>,
    ) -> Result<Self> {
        let missing = |name| Error::device(format!("the workspace has no `{name}`"));
        let buffers = CudaBuffers::try_new(|name| regions.next().ok_or_else(|| missing(name)))?;
        buffers.arrivals.clear()?;
        buffers.choice.clear()?;
        let mut end = 0;
        let mut place = |rope: &Rope| {
            let frequencies = rope.frequencies(0);
            let region = buffers.frequencies.part(end, frequencies.len() * WORD);
            end += region.len();
            region.write(bytemuck::must_cast_slice(&frequencies)).map(|()| (region, 0))
        };
        let of_run = |_| config.ropes.iter().map(&mut place).collect();
        Ok(Self {
            frequencies: Mutex::new((0..sequences).map(of_run).collect::<Result<_>>()?),
            answers: Mutex::new(Answers::take(gpu)?),
            gpu: Arc::clone(gpu),
            scratch: Scratch { parts: buffers.parts.clone(), arrivals: buffers.arrivals.clone() },
            buffers,
        })
    }

    /// Makes the frequencies of each run those of its length.
    pub(super) fn place_frequencies(&self, ropes: &[Rope], runs: &[Run]) -> Result<()> {
        for (placed, run) in lock(&self.frequencies).iter_mut().zip(runs) {
            for (rope, (region, length)) in ropes.iter().zip(placed) {
                let wanted = rope.shortest_alike(run.length);
                if wanted != *length {
                    region.write(bytemuck::must_cast_slice(&rope.frequencies(run.length)))?;
                    *length = wanted;
                }
            }
        }
        Ok(())
    }

    /// The frequencies of a rope for a run, by its place among those of a step.
    pub(super) fn frequencies(&self, run: usize, rope: usize) -> Region {
        lock(&self.frequencies)[run][rope].0.clone()
    }

    pub(super) fn answers(&self) -> MutexGuard<'_, Answers> {
        lock(&self.answers)
    }

    /// A chosen token, a flag, and the random number behind it; the token stands where the next step looks for its own.
    pub(super) fn chosen(&self) -> Region {
        self.tokens.part(0, CudaChoice::CHOSEN)
    }

    /// Where the position of a run stands, by its place among those of a step.
    pub(super) fn position(&self, run: usize) -> Region {
        self.positions.part(run * WORD, WORD)
    }
}
