//! Launches of choose.cu, which choose a token among the logits.

use super::launch::Argument;
use crate::backend::Choice;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::Kernel;
use crate::backend::cuda::operands::{WORD, holds};
use crate::error::Result;
use crate::footprint::CudaChoice;

const THREADS: u32 = 256;
/// Launches that find the least weight that is left, each some bits of it.
const DIGITS: i32 = 3;

/// What a choice is made in.
pub struct Choosing<'a> {
    /// What launches and their blocks leave each other; it begins as zeros.
    pub scratch: &'a Region,
    /// A bit for each token that occurred; only looked at where they are penalized.
    pub seen: &'a Region,
    /// Three u32, every `stride`: the token, whether a logit is not finite, and the uniform number by which it is drawn.
    pub chosen: &'a Region,
    /// See `chosen`.
    pub stride: usize,
}

impl Gpu {
    /// Chooses one of the `count` f32 in `logits`, after a soft cap if that is not 0, and leaves it in
    /// `chosen`; the logits may change. One that is not finite is found, and then no token is chosen.
    ///
    /// # Panics
    /// A region is shorter than [`CudaChoice`] says.
    pub fn choose(&self, choice: &Choice, softcap: f32, logits: &Region, count: usize, at: &Choosing) -> Result<()> {
        let needed = CudaChoice::new(count);
        holds(logits, [count], WORD);
        holds(at.scratch, [needed.scratch], 1);
        holds(at.seen, [needed.seen], 1);
        holds(at.chosen, [2 * at.stride + 1], WORD);
        let is_greedy = choice.is_greedy();
        let seen = if choice.is_penalized() { Argument::Region(at.seen) } else { Argument::Null };
        let [logits, scratch, chosen] = [logits, at.scratch, at.chosen].map(Argument::Region);
        // A soft cap keeps the order.
        let softcap = if is_greedy && !choice.is_penalized() { 0.0 } else { softcap };
        let launch = |kernel, arguments: &[Argument]| {
            let arguments =
                [&[logits, Argument::int(count)], arguments, &[scratch, chosen, Argument::int(at.stride)]].concat();
            self.launch(kernel, (needed.blocks, 1), THREADS, &arguments)
        };
        let [softcap, penalty, top_p, min_p] = [softcap, choice.penalty, choice.top_p, choice.min_p].map(Argument::F32);
        launch(Kernel::largest, &[softcap, seen, penalty, Argument::I32(i32::from(is_greedy))])?;
        if is_greedy {
            return Ok(());
        }
        let per_temperature = Argument::F32(choice.temperature.recip().min(f32::MAX));
        if choice.is_cut() {
            let top_k = Argument::I32(choice.top_k.cast_signed());
            (0..DIGITS)
                .try_for_each(|digit| launch(Kernel::cut, &[per_temperature, Argument::I32(digit), top_k, top_p]))?;
        }
        launch(Kernel::draw, &[per_temperature, Argument::I32(i32::from(choice.is_cut())), min_p, seen])
    }
}
