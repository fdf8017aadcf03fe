//! The buffers that stages of a GPU work in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::answers::Answers;
use super::{Gpu, MAX_HEAD_DIM, Region, Scratch, arena};
use crate::error::{Error, Result};
use crate::model_config::ModelConfig;
use crate::plan::memory::{self, CUDA_BUFFERS, CudaChoice};

/// Bytes of a u32 or an f32.
pub(super) const WORD: usize = 4;

/// The buffers of a step on one GPU, shared by all its stages: they run in turn.
/// What each holds stands at [`memory::cuda_workspace`].
pub struct Workspace {
    pub(super) gpu: Arc<Gpu>,
    pub(super) hidden: Region,
    pub(super) normed: Region,
    pub(super) query: Region,
    pub(super) key: Region,
    pub(super) value: Region,
    pub(super) attended: Region,
    pub(super) gate: Region,
    pub(super) up: Region,
    pub(super) branch: Region,
    pub(super) routes: Region,
    pub(super) gathered: Region,
    pub(super) expert: Region,
    pub(super) shares: Region,
    pub(super) logits: Region,
    pub(super) tokens: Region,
    /// The frequencies of each rope.
    pub(super) frequencies: Vec<Region>,
    pub(super) scratch: Scratch,
    pub(super) position: Region,
    pub(super) choice: Region,
    pub(super) seen: Region,
    pub(super) answers: Mutex<Answers>,
}

impl Workspace {
    /// Takes the buffers that the plan counts.
    pub fn take(gpu: &Arc<Gpu>, config: &ModelConfig, context: usize, separate: bool) -> Result<Self> {
        if config.head_dim > MAX_HEAD_DIM {
            return Err(Error::input(format!(
                "heads of width {} cannot be computed on a GPU; the widest are {MAX_HEAD_DIM}",
                config.head_dim
            ))
            .hint("a device map of `{\"\": \"cpu\"}` computes on the CPU"));
        }
        let regions = arena(gpu, "the workspace", &memory::cuda_workspace(config, context), separate)?;
        let Ok(regions) = <[Region; CUDA_BUFFERS]>::try_from(regions) else {
            unreachable!("an arena has a region for every size")
        };
        let [hidden, normed, query, key, value, attended, gate, up, rest @ ..] = regions;
        let [branch, routes, gathered, expert, shares, logits, tokens, table, parts, arrivals, position, choice, seen] =
            rest;
        arrivals.clear()?;
        choice.clear()?;
        let mut end = 0;
        let frequencies = config.ropes.iter().map(|rope| {
            let frequencies = rope.frequencies(context);
            let region = table.part(end, frequencies.len() * WORD);
            end += region.len();
            region.write(bytemuck::must_cast_slice(&frequencies)).map(|()| region)
        });
        Ok(Self {
            frequencies: frequencies.collect::<Result<_>>()?,
            answers: Mutex::new(Answers::take(gpu)?),
            gpu: Arc::clone(gpu),
            hidden,
            normed,
            query,
            key,
            value,
            attended,
            gate,
            up,
            branch,
            routes,
            gathered,
            expert,
            shares,
            logits,
            tokens,
            scratch: Scratch { parts, arrivals },
            position,
            choice,
            seen,
        })
    }

    pub(super) fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chosen token, a flag, and the random number behind it; the token stands where the next step looks for its own.
    pub(super) fn chosen(&self) -> Region {
        self.tokens.part(0, CudaChoice::CHOSEN)
    }
}
