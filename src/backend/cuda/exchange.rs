//! What the host tells a GPU of the rows of a step, and what it is answered, in the order of the steps.

use std::collections::VecDeque;
use std::sync::Arc;

use super::driver::{Copying, Gpu, Pinned, Region};
use crate::backend::Chosen;
use crate::error::Result;
use crate::footprint::{CudaRows, Extent, WORD};

/// Page-locked memory, and copies from and to it that are on their way, the first queued first.
pub struct Exchange {
    unused: Vec<Pinned>,
    told: VecDeque<Copying>,
    free: Vec<Pinned>,
    answers: VecDeque<Answer>,
}

/// An answer of so many rows, the second words of which stand `apart` behind their first.
struct Answer {
    rows: usize,
    apart: usize,
    copy: Copying,
}

impl Exchange {
    /// Takes the page-locked memory of [`CudaRows::host`].
    pub fn take(gpu: &Arc<Gpu>, extent: Extent) -> Result<Self> {
        let [told, answers] = CudaRows::of_step(extent);
        let of_steps = |bytes| (0..CudaRows::STEPS).map(|_| gpu.allocate_pinned(bytes)).collect::<Result<_>>();
        Ok(Self { unused: of_steps(told)?, told: VecDeque::new(), free: of_steps(answers)?, answers: VecDeque::new() })
    }

    /// Queues that `region` begins with `words`.
    pub fn tell(&mut self, region: &Region, words: &[u32]) -> Result<()> {
        let mut slot = match (self.unused.pop(), self.told.pop_front()) {
            (Some(slot), first) => {
                self.told.extend(first);
                slot
            }
            (None, Some(first)) => first.finish()?,
            (None, None) => unreachable!("one of them holds it"),
        };
        let bytes = bytemuck::must_cast_slice(words);
        slot[..bytes.len()].copy_from_slice(bytes);
        self.told.push_back(region.part(0, bytes.len()).write_behind(slot)?);
        Ok(())
    }

    /// Queues that the host is told what `region` holds then of the first rows: their tokens, and `apart` behind
    /// those, whether none could be chosen.
    pub fn send(&mut self, region: &Region, rows: usize, apart: usize) -> Result<()> {
        let Some(slot) = self.free.pop() else { unreachable!("no more steps are on their way at once") };
        let copy = region.part(0, (apart + rows) * WORD).read_to(slot)?;
        self.answers.push_back(Answer { rows, apart, copy });
        Ok(())
    }

    /// Waits for the first answer.
    pub fn receive(&mut self) -> Result<Vec<Chosen>> {
        let Some(Answer { rows, apart, copy }) = self.answers.pop_front() else { unreachable!("a step was begun") };
        let slot = copy.finish()?;
        let word = |at: usize| bytemuck::pod_read_unaligned::<u32>(&slot[at * WORD..][..WORD]);
        let chosen = (0..rows).map(|row| Chosen { token: word(row), is_finite: word(apart + row) == 0 }).collect();
        self.free.push(slot);
        Ok(chosen)
    }
}
