//! Launches of attention.cu and attention_mma.cu.

use super::FEW;
use super::launch::Argument;
use super::norm;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::{Kernel, TENSOR_CORES};
use crate::backend::cuda::operands::{Attention, Cache, HALF, Norm, Scratch, WORD, holds};
use crate::error::Result;
use crate::quant::KvDtype;

/// Rows of a block of `attend_many_…`, each a head of a token.
const ROWS: usize = 64;

/// The kernel of tensor cores for `shape`, if there is one.
fn attend_many(shape: &Attention, cache: &Cache) -> Option<Kernel> {
    let fits = shape.tokens > FEW && shape.head_dim.is_multiple_of(8) && cache.dtype != KvDtype::F32;
    let kernels = [(64, Kernel::attend_many_64), (128, Kernel::attend_many_128), (256, Kernel::attend_many_256)];
    kernels.into_iter().find(|(width, _)| fits && shape.head_dim <= *width).map(|(_, kernel)| kernel)
}

/// Codes and scales of keys and of values, and their dtype.
fn given(cache: &Cache) -> [Argument<'_>; 5] {
    let [keys, key_scales, values, value_scales] = cache.regions.each_ref().map(Argument::Region);
    let dtype = match cache.dtype {
        KvDtype::Bf16 => 0,
        KvDtype::F16 => 1,
        KvDtype::F32 => 2,
        KvDtype::Int8 => 3,
    };
    [keys, key_scales, values, value_scales, Argument::I32(dtype)]
}

/// Every launch is queued on the compute stream, and panics where a region is shorter than its shapes say.
impl Gpu {
    /// Normalizes the heads of queries and keys where there are norms for that, rotates them by their
    /// positions, and puts keys and values into the cache.
    /// `position` holds that of `shape`, an i32; a rope is an f32 for each pair that is rotated, and the factor
    /// of cosines and sines.
    ///
    /// # Panics
    /// A rope has more pairs than a head.
    pub fn rotate_and_store(
        &self,
        shape: &Attention,
        [query, key, value]: [&Region; 3],
        norms: [Option<&Norm>; 2],
        cache: &Cache,
        position: &Region,
        rope: Option<(&Region, f32)>,
    ) -> Result<()> {
        shape.check(query, cache);
        holds(position, [1], size_of::<i32>());
        for region in [key, value] {
            holds(region, [shape.tokens, shape.kv_heads, shape.head_dim], HALF);
        }
        let pairs = rope.map_or(0, |(frequencies, _)| frequencies.len() / WORD);
        assert!(2 * pairs <= shape.head_dim, "more pairs than a head has");
        let numbers = [
            Argument::optional(rope.map(|(frequencies, _)| frequencies)),
            Argument::int(shape.heads),
            Argument::int(shape.kv_heads),
            Argument::int(shape.head_dim),
            Argument::int(2 * pairs),
            Argument::int(cache.slots),
            Argument::Region(position),
            Argument::F32(rope.map_or(1.0, |(_, factor)| factor)),
        ];
        let grid = (shape.tokens, shape.heads + 2 * shape.kv_heads);
        let regions = [query, key, value].map(Argument::Region);
        let [of_query, of_key] = norms.map(|norm| norm::arguments(norm, shape.head_dim));
        let arguments = [&regions[..], &of_query, &of_key, &given(cache), &numbers];
        self.launch(Kernel::rotate_and_store, grid, 128, &arguments.concat())
    }

    /// Attention of `query` over the cache, into `out`. `position` holds that of `shape`, an i32. The scratch is
    /// as long as [`scratch`](crate::footprint::CudaAttention::scratch) says; its second region holds zeros.
    pub fn attend(
        &self,
        shape: &Attention,
        query: &Region,
        cache: &Cache,
        out: &Region,
        position: &Region,
        scratch: &Scratch,
    ) -> Result<()> {
        shape.check(query, cache);
        holds(position, [1], size_of::<i32>());
        holds(out, [shape.tokens, shape.heads, shape.head_dim], HALF);
        let shares = shape.shares(cache);
        let is_split = shares.parts > 1;
        if is_split {
            let parts = shape.tokens * shape.heads * shares.parts * (shape.head_dim + 2);
            scratch.holds(parts, shape.tokens * shares.blocks);
        }
        let numbers = [
            Argument::Region(out),
            Argument::optional(is_split.then_some(&scratch.parts)),
            Argument::optional(is_split.then_some(&scratch.arrivals)),
            Argument::int(shares.parts),
            Argument::int(shape.heads),
            Argument::int(shape.kv_heads),
            Argument::int(shape.head_dim),
            Argument::int(cache.slots),
            Argument::Region(position),
            Argument::int(shape.seen(cache)),
            Argument::F32(shape.scale),
            Argument::F32(shape.softcap),
            Argument::int(shape.tokens),
        ];
        let many = attend_many(shape, cache).filter(|_| self.capability >= TENSOR_CORES);
        let (kernel, grid, numbers) = if let Some(kernel) = many {
            let rows = shape.tokens * (shape.heads / shape.kv_heads);
            (kernel, (rows.div_ceil(ROWS) * shares.parts, shape.kv_heads), &numbers[..])
        } else {
            let kernel = if shares.heads == 1 { Kernel::attend_1 } else { Kernel::attend_4 };
            (kernel, (shape.tokens * shares.parts, shares.blocks), &numbers[..numbers.len() - 1])
        };
        self.launch(kernel, grid, 128, &[&[Argument::Region(query)][..], &given(cache), numbers].concat())
    }
}
