//! Launches of attention.cu and attention_mma.cu.

use super::FEW;
use super::launch::Argument;
use super::norm;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::{Kernel, TENSOR_CORES};
use crate::backend::cuda::operands::{Attention, Cache, HALF, Norm, Rotation, Rows, Scratch, WORD, holds};
use crate::error::Result;
use crate::quant::KvDtype;

/// Rows of a block of `attend_many_…`, each a head of a token.
const ROWS: usize = 64;

/// The kernel of tensor cores for `shape`, if there is one.
fn attend_many(shape: &Attention, cache: &Cache) -> Option<Kernel> {
    let fits =
        shape.is_run && shape.tokens > FEW && shape.head_dim.is_multiple_of(8) && cache.layout.dtype != KvDtype::F32;
    let kernels = [(64, Kernel::attend_many_64), (128, Kernel::attend_many_128), (256, Kernel::attend_many_256)];
    kernels.into_iter().find(|(width, _)| fits && shape.head_dim <= *width).map(|(_, kernel)| kernel)
}

/// Codes and scales of keys and of values, and their dtype.
fn given(cache: &Cache) -> [Argument<'_>; 5] {
    let [keys, key_scales, values, value_scales] = cache.regions.each_ref().map(Argument::Region);
    let dtype = match cache.layout.dtype {
        KvDtype::Bf16 => 0,
        KvDtype::F16 => 1,
        KvDtype::F32 => 2,
        KvDtype::Int8 => 3,
    };
    [keys, key_scales, values, value_scales, Argument::I32(dtype)]
}

/// Where tokens and the keys before them stand.
fn standing<'a>(cache: &Cache, rows: &'a Rows) -> [Argument<'a>; 4] {
    let tables = Argument::optional((!cache.layout.is_ring).then_some(&rows.tables));
    let [positions, sequences] = [&rows.positions, &rows.sequences].map(Argument::Region);
    [tables, Argument::int(cache.layout.slots), positions, sequences]
}

/// Every launch is queued on the compute stream, and panics where a region is shorter than its shapes say.
impl Gpu {
    /// Normalizes the heads of queries and keys where there are norms for that, rotates them by their
    /// positions, and puts keys and values into the cache.
    ///
    /// # Panics
    /// More pairs are rotated than a head has.
    pub fn rotate_and_store(
        &self,
        shape: &Attention,
        [query, key, value]: [&Region; 3],
        norms: [Option<&Norm>; 2],
        cache: &Cache,
        rows: &Rows,
        rotation: Option<&Rotation>,
    ) -> Result<()> {
        shape.check(query, cache, rows);
        for region in [key, value] {
            holds(region, [shape.tokens, shape.kv_heads, shape.head_dim], HALF);
        }
        let (pairs, stride) = rotation.map_or((0, 0), |rotation| (rotation.pairs, rotation.stride));
        assert!(2 * pairs <= shape.head_dim, "more pairs than a head has");
        if let Some(Rotation { frequencies, .. }) = rotation {
            holds(frequencies, [pairs], WORD);
        }
        let numbers = [
            Argument::optional(rotation.map(|rotation| &rotation.frequencies)),
            Argument::int(stride),
            Argument::int(shape.heads),
            Argument::int(shape.kv_heads),
            Argument::int(shape.head_dim),
            Argument::int(2 * pairs),
        ];
        let factor = [Argument::F32(rotation.map_or(1.0, |rotation| rotation.factor))];
        let grid = (shape.tokens, shape.heads + 2 * shape.kv_heads);
        let regions = [query, key, value].map(Argument::Region);
        let [of_query, of_key] = norms.map(|norm| norm::arguments(norm, shape.head_dim));
        let arguments = [&regions[..], &of_query, &of_key, &given(cache), &numbers, &standing(cache, rows), &factor];
        self.launch(Kernel::rotate_and_store, grid, 128, &arguments.concat())
    }

    /// Attention of `query` over the cache, into `out`. The scratch is as long as
    /// [`scratch`](crate::footprint::CudaAttention::scratch) says; its second region holds zeros.
    pub fn attend(
        &self,
        shape: &Attention,
        query: &Region,
        cache: &Cache,
        out: &Region,
        rows: &Rows,
        scratch: &Scratch,
    ) -> Result<()> {
        shape.check(query, cache, rows);
        holds(out, [shape.tokens, shape.heads, shape.head_dim], HALF);
        let shares = shape.shares(cache);
        let is_split = shares.parts > 1;
        if is_split {
            let parts = shape.tokens * shape.heads * shares.parts * (shape.head_dim + 2);
            scratch.holds(parts, shape.tokens * shares.blocks);
        }
        let split = [
            Argument::Region(out),
            Argument::optional(is_split.then_some(&scratch.parts)),
            Argument::optional(is_split.then_some(&scratch.arrivals)),
            Argument::int(shares.parts),
            Argument::int(shape.heads),
            Argument::int(shape.kv_heads),
            Argument::int(shape.head_dim),
        ];
        let numbers = [
            Argument::int(shape.seen(cache)),
            Argument::F32(shape.scale),
            Argument::F32(shape.softcap),
            Argument::int(shape.tokens),
        ];
        let many = attend_many(shape, cache).filter(|_| self.capability >= TENSOR_CORES);
        let (kernel, grid, numbers) = if let Some(kernel) = many {
            let heads = shape.tokens * (shape.heads / shape.kv_heads);
            (kernel, (heads.div_ceil(ROWS) * shares.parts, shape.kv_heads), &numbers[..])
        } else {
            let kernel = if shares.heads == 1 { Kernel::attend_1 } else { Kernel::attend_4 };
            (kernel, (shape.tokens * shares.parts, shares.blocks), &numbers[..numbers.len() - 1])
        };
        let arguments = [&[Argument::Region(query)][..], &given(cache), &split, &standing(cache, rows), numbers];
        self.launch(kernel, grid, 128, &arguments.concat())
    }
}
