//! What kernels are given: matrices and their rows, norms, caches, shapes.

use super::driver::Region;
use crate::backend::block::Linear;
use crate::footprint::{CudaAttention, KvLayout, PAGE};
pub(super) use crate::footprint::{HALF, WORD};
use crate::model_config::NormKind;
use crate::quant::MatrixLayout;

/// The widest head that a kernel takes.
pub const MAX_HEAD_DIM: usize = 512;

/// A matrix or vector on a GPU, in the canonical packing.
#[derive(Clone)]
pub struct DeviceMatrix {
    pub(super) layout: MatrixLayout,
    pub(super) region: Region,
}

impl DeviceMatrix {
    /// The matrix of `layout` at the start of `region`.
    ///
    /// # Panics
    /// The region is shorter than the layout.
    pub fn new(layout: MatrixLayout, region: Region) -> Self {
        assert!(region.len() as u64 >= layout.size().0, "a region is shorter than the matrix in it");
        Self { layout, region }
    }

    /// The bytes from `offset` of the matrix on, where a section or a row of one starts.
    pub fn at(&self, offset: u64) -> Region {
        // The matrix lies in its region, whose length is a usize.
        #[expect(clippy::cast_possible_truncation, reason = "an offset into the region")]
        let offset = offset as usize;
        self.region.part(offset, self.region.len() - offset)
    }
}

impl AsRef<MatrixLayout> for DeviceMatrix {
    fn as_ref(&self) -> &MatrixLayout {
        &self.layout
    }
}

/// Where a result goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Into a buffer of f16.
    F16 = 0,
    /// Into a buffer of f32.
    F32 = 1,
    /// Onto what a buffer of f32 holds.
    Add = 2,
}

impl Output {
    pub(super) fn size(self) -> usize {
        if self == Self::F16 { HALF } else { WORD }
    }
}

/// What a product takes, or a norm.
pub type Affine = Linear<DeviceMatrix>;

/// A norm: its weight is a plain vector as long as a row, its bias another.
#[derive(Clone)]
pub struct Norm<'a> {
    /// How rows are normalized.
    pub kind: NormKind,
    /// Under the root.
    pub epsilon: f32,
    /// Weight and bias.
    pub affine: &'a Affine,
}

/// What stands before a feed-forward layer's last matrix is kept in f16 times this. `activation(gate) · up` comes to
/// 10^5 and 10^6 in some models (Gemma 3, Qwen 2.5), and f16 ends at 65,504: so it holds 8.3 million.
///
/// The steps of f16 are no finer than 2^-24, so that an element may be off by 2^-25 / `GATED` = 2^-18, however small
/// it is, and by 2^-11 of itself in any case. In a row whose root mean square is above 2^-7, the first is less in all
/// than the second may be; above 2^-9, less than what rounding to bf16 may change.
pub const GATED: f32 = 1.0 / 128.0;

/// What a product takes for each token, one row after the other.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// Rows of f16.
    Half(&'a Region),
    /// Rows of f16 that are [`GATED`] times the input.
    Gated(&'a Region),
    /// Hidden states in f32, to be normalized and made f16.
    Hidden {
        /// The states.
        states: &'a Region,
        /// The norm; `None` takes them as they are.
        norm: Option<&'a Norm<'a>>,
        /// Room for what becomes of them, where kernels do not do that on the way.
        normed: &'a Region,
    },
}

/// Where blocks of threads leave sums for the last of them to add up.
#[derive(Clone)]
pub struct Scratch {
    /// The sums, f32.
    pub parts: Region,
    /// How many of those who share a result are done, u32; zeros between launches.
    pub arrivals: Region,
}

impl Scratch {
    pub(super) fn holds(&self, parts: usize, arrivals: usize) {
        holds(&self.parts, [parts], WORD);
        holds(&self.arrivals, [arrivals], size_of::<u32>());
    }
}

/// The KV cache of a block.
#[derive(Clone)]
pub struct Cache {
    pub(super) layout: KvLayout,
    /// Codes and scales of keys, then of values.
    pub(super) regions: [Region; 4],
}

impl Cache {
    /// The cache that `layout` lays out in `keys` and in `values`.
    ///
    /// # Panics
    /// A region is shorter than the layout.
    pub fn new(layout: KvLayout, [keys, values]: &[Region; 2]) -> Self {
        let split = |region: &Region| (region.part(0, layout.codes), region.part(layout.codes, layout.scales));
        let ((key_codes, key_scales), (value_codes, value_scales)) = (split(keys), split(values));
        Self { layout, regions: [key_codes, key_scales, value_codes, value_scales] }
    }
}

/// Where the tokens of a step stand, in a GPU's memory.
#[derive(Clone)]
pub struct Rows {
    /// The position of each token, an i32; −1 where there is none.
    pub positions: Region,
    /// The sequence of each, an i32.
    pub sequences: Region,
    /// The numbers of the pages that each sequence has, u32, as many of them as a cache has in its slots.
    pub tables: Region,
}

impl Rows {
    /// Those of so many tokens behind the first `start`.
    #[must_use]
    pub fn part(&self, start: usize, tokens: usize) -> Self {
        let part = |region: &Region| region.part(start * WORD, tokens * WORD);
        Self { positions: part(&self.positions), sequences: part(&self.sequences), tables: self.tables.clone() }
    }

    fn hold(&self, tokens: usize, cache: &Cache) {
        holds(&self.positions, [tokens], WORD);
        holds(&self.sequences, [tokens], WORD);
        holds(&self.tables, [if cache.layout.is_ring { 0 } else { cache.layout.slots / PAGE }], WORD);
    }
}

/// How pairs of elements are rotated: an f32 for each pair, those of each sequence `stride` behind those of the one
/// before, and the factor of cosines and sines.
#[derive(Clone)]
pub struct Rotation {
    /// Those of the first sequence and of the others.
    pub frequencies: Region,
    /// f32 from one sequence to the next.
    pub stride: usize,
    /// Pairs that are rotated.
    pub pairs: usize,
    /// The factor.
    pub factor: f32,
}

/// The shape of attention.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key-value heads, which divides that of query heads.
    pub kv_heads: usize,
    /// Width of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Whether they follow on each other in one sequence.
    pub is_run: bool,
    /// The most keys up to a token, by which they are shared out.
    pub keys: usize,
    /// The last keys that a query sees; 0 for all.
    pub window: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Bound of the scores; 0 for none.
    pub softcap: f32,
}

impl Attention {
    /// The last keys that a query sees of those in a cache.
    pub(super) fn seen(&self, cache: &Cache) -> usize {
        let slots = cache.layout.slots;
        if self.window == 0 { slots } else { self.window.min(slots) }
    }

    /// How the keys of a cache are shared out.
    pub(super) fn shares(&self, cache: &Cache) -> CudaAttention {
        CudaAttention::new(self.heads, self.kv_heads, self.tokens, self.keys.min(cache.layout.slots))
    }

    pub(super) fn check(&self, query: &Region, cache: &Cache, rows: &Rows) {
        let KvLayout { dtype, slots, is_ring, pages, .. } = cache.layout;
        // What the first token sees is there yet when the last one has been stored.
        let behind = if self.is_run { self.tokens - 1 } else { 0 };
        let is_held = if is_ring { self.window > 0 && self.window + behind <= slots } else { self.keys <= slots };
        assert!(is_held, "more tokens than the cache holds");
        assert!(self.head_dim <= MAX_HEAD_DIM, "a head that is too wide");
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "heads that share no key-value head");
        holds(query, [self.tokens, self.heads, self.head_dim], HALF);
        rows.hold(self.tokens, cache);
        let vectors = [pages, self.kv_heads, PAGE];
        for [codes, scales] in cache.regions.as_chunks().0 {
            holds(codes, vectors, dtype.code_bytes(self.head_dim));
            holds(scales, vectors, dtype.scale_bytes());
        }
    }
}

/// Sees to it that a region holds an element of `size` bytes for all that `shape` counts.
#[track_caller]
pub(super) fn holds<const N: usize>(region: &Region, shape: [usize; N], size: usize) {
    let bytes = shape.into_iter().try_fold(size, usize::checked_mul);
    assert!(bytes.is_some_and(|bytes| bytes <= region.len()), "a kernel is given a region that is too short");
}
