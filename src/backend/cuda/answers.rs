//! Chosen tokens on their way to the host.

use std::collections::VecDeque;
use std::sync::Arc;

use super::driver::{Copying, Gpu, Pinned, Region};
use crate::backend::Chosen;
use crate::error::Result;
use crate::footprint::CudaChoice;

/// Tokens on their way to the host, in the order in which they are chosen.
pub struct Answers {
    free: Vec<Pinned>,
    waiting: VecDeque<Copying>,
}

impl Answers {
    /// Takes page-locked memory for [`CudaChoice::ANSWERS`] of them.
    pub fn take(gpu: &Arc<Gpu>) -> Result<Self> {
        let slots = (0..CudaChoice::ANSWERS).map(|_| gpu.allocate_pinned(CudaChoice::ANSWER));
        Ok(Self { free: slots.collect::<Result<_>>()?, waiting: VecDeque::new() })
    }

    /// Queues that the host is told what `chosen` holds then.
    pub fn send(&mut self, chosen: &Region) -> Result<()> {
        let Some(slot) = self.free.pop() else { unreachable!("no more tokens are on their way at once") };
        self.waiting.push_back(chosen.part(0, CudaChoice::ANSWER).read_to(slot)?);
        Ok(())
    }

    /// Waits for the first.
    pub fn receive(&mut self) -> Result<Chosen> {
        let Some(first) = self.waiting.pop_front() else { unreachable!("a token was asked for") };
        let slot = first.finish()?;
        let [token, is_broken]: [u32; 2] = bytemuck::pod_read_unaligned(&slot);
        self.free.push(slot);
        Ok(Chosen { token, is_finite: is_broken == 0 })
    }

    /// Forgets those that are on their way, once they are there.
    pub fn forget(&mut self) -> Result<()> {
        for copy in self.waiting.drain(..) {
            self.free.push(copy.finish()?);
        }
        Ok(())
    }
}
