//! The launches that choose a token among the logits.

use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::CudaEvent;

use super::driver::{Gpu, Pinned, Region};
use super::kernels::int;
use super::launch::Argument;
use super::operands::{FLOAT, holds};
use crate::backend::{Choice, Chosen};
use crate::error::Result;
use crate::footprint::CudaChoice;

/// Threads of a block.
const THREADS: u32 = 256;
/// Launches that find the least weight that is left, each some bits of it.
const DIGITS: i32 = 3;

/// What a choice is made in.
pub struct Choosing<'a> {
    /// What launches and their blocks leave each other; it begins as zeros.
    pub scratch: &'a Region,
    /// A bit for each token that occurred; only looked at where they are penalized.
    pub seen: &'a Region,
    /// Three u32: the token, whether a logit is not finite, and the uniform number by which it is drawn.
    pub chosen: &'a Region,
}

/// Tokens on their way to the host, in the order in which they are chosen.
pub struct Answers {
    free: Vec<Pinned>,
    waiting: VecDeque<(Pinned, CudaEvent)>,
}

impl Answers {
    /// Takes page-locked memory for [`CudaChoice::ANSWERS`] of them.
    pub fn take(gpu: &Arc<Gpu>) -> Result<Self> {
        let slots = (0..CudaChoice::ANSWERS).map(|_| gpu.allocate_pinned(CudaChoice::ANSWER));
        Ok(Self { free: slots.collect::<Result<_>>()?, waiting: VecDeque::new() })
    }

    /// Queues that the host is told what `chosen` holds then.
    ///
    /// # Panics
    /// As many as there is memory for are on their way.
    pub fn send(&mut self, chosen: &Region) -> Result<()> {
        let Some(mut slot) = self.free.pop() else { unreachable!("no more tokens are on their way at once") };
        let sent = chosen.part(0, CudaChoice::ANSWER).read_to(&mut slot, 0).and_then(|()| chosen.gpu().event());
        match sent {
            Ok(event) => self.waiting.push_back((slot, event)),
            Err(e) => {
                self.free.push(slot);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Waits for the first.
    ///
    /// # Panics
    /// None is on its way.
    pub fn receive(&mut self, gpu: &Gpu) -> Result<Chosen> {
        let Some((slot, event)) = self.waiting.pop_front() else { unreachable!("a token was asked for") };
        let arrived = gpu.wait(&event);
        let [token, is_broken]: [u32; 2] = bytemuck::pod_read_unaligned(&slot);
        self.free.push(slot);
        arrived.map(|()| Chosen { token, is_finite: is_broken == 0 })
    }

    /// Forgets those that are on their way. What uses their memory next is queued behind them.
    pub fn forget(&mut self) {
        self.free.extend(self.waiting.drain(..).map(|(slot, _)| slot));
    }
}

impl Gpu {
    /// Chooses one of the `count` f32 in `logits`, after a soft cap if that is not 0, and leaves it in
    /// `chosen`; the logits may change. One that is not finite is found, and then no token is chosen.
    ///
    /// # Panics
    /// A region is shorter than [`CudaChoice`] says.
    pub fn choose(&self, choice: &Choice, softcap: f32, logits: &Region, count: usize, at: &Choosing) -> Result<()> {
        let needed = CudaChoice::new(count);
        holds(logits, count, FLOAT);
        holds(at.scratch, needed.scratch, 1);
        holds(at.seen, needed.seen, 1);
        holds(at.chosen, CudaChoice::CHOSEN, 1);
        let is_greedy = choice.is_greedy();
        let seen = if choice.is_penalized() { Argument::Region(at.seen) } else { Argument::Null };
        let [logits, scratch, chosen] = [logits, at.scratch, at.chosen].map(Argument::Region);
        // A soft cap keeps the order.
        let softcap = if is_greedy && !choice.is_penalized() { 0.0 } else { softcap };
        let launch = |kernel, arguments: &[Argument]| {
            let arguments = [&[logits, int(count)], arguments, &[scratch, chosen]].concat();
            self.launch(kernel, (needed.blocks, 1), THREADS, &arguments)
        };
        let [softcap, penalty, top_p, min_p] = [softcap, choice.penalty, choice.top_p, choice.min_p].map(Argument::F32);
        launch("largest", &[softcap, seen, penalty, Argument::I32(i32::from(is_greedy))])?;
        if is_greedy {
            return Ok(());
        }
        let per_temperature = Argument::F32(choice.temperature.recip().min(f32::MAX));
        if choice.is_cut() {
            let top_k = Argument::I32(choice.top_k.cast_signed());
            (0..DIGITS).try_for_each(|digit| launch("cut", &[per_temperature, Argument::I32(digit), top_k, top_p]))?;
        }
        launch("draw", &[per_temperature, Argument::I32(i32::from(choice.is_cut())), min_p, seen])
    }
}
