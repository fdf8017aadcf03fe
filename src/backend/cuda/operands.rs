//! What kernels are given: matrices and their rows, norms, caches, shapes.

use super::driver::Region;
use crate::backend::block::Linear;
use crate::footprint::{CudaAttention, KvLayout, PAGE};
pub(super) use crate::footprint::{HALF, WORD};
use crate::model_config::NormKind;
use crate::quant::{KvDtype, MatrixLayout};

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
    pub(super) dtype: KvDtype,
    /// Tokens that there is room for; the one at a position has the slot that is left of it over these.
    pub(super) slots: usize,
    /// Codes and scales of keys, then of values.
    pub(super) regions: [Region; 4],
}

impl Cache {
    /// The cache that `layout` lays out in `keys` and in `values`.
    ///
    /// # Panics
    /// A region is shorter than the layout.
    pub fn of_sequences(layout: KvLayout, regions: &[Region; 2], sequences: usize) -> Vec<Self> {
        let pages = layout.slots / PAGE;
        let [codes, scales] = [layout.codes, layout.scales].map(|bytes| bytes / layout.pages * pages);
        let of = |at: usize, region: &Region| {
            [region.part(at * codes, codes), region.part(layout.codes + at * scales, scales)]
        };
        let cache = |at| {
            let [[a, b], [c, d]] = regions.each_ref().map(|region| of(at, region));
            Self { dtype: layout.dtype, slots: layout.slots, regions: [a, b, c, d] }
        };
        (0..sequences).map(cache).collect()
    }

    /// X
    pub fn new(layout: KvLayout, [keys, values]: &[Region; 2]) -> Self {
        let split = |region: &Region| (region.part(0, layout.codes), region.part(layout.codes, layout.scales));
        let ((key_codes, key_scales), (value_codes, value_scales)) = (split(keys), split(values));
        Self { dtype: layout.dtype, slots: layout.slots, regions: [key_codes, key_scales, value_codes, value_scales] }
    }
}

/// The shape of attention, and where it stands in the sequence.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key-value heads, which divides that of query heads.
    pub kv_heads: usize,
    /// Width of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Position of the first token.
    pub position: usize,
    /// Number of tokens.
    pub tokens: usize,
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
        if self.window == 0 { cache.slots } else { self.window.min(cache.slots) }
    }

    /// How the keys of a cache are shared out: those of one token the same wherever it stands, so that its launch
    /// can be repeated for the next one.
    pub(super) fn shares(&self, cache: &Cache) -> CudaAttention {
        let keys = if self.tokens == 1 { cache.slots } else { cache.slots.min(self.position + self.tokens) };
        CudaAttention::new(self.heads, self.kv_heads, self.tokens, keys)
    }

    pub(super) fn check(&self, query: &Region, cache: &Cache) {
        // What the first token sees is there yet when the last one has been stored.
        let is_ring = self.window > 0 && self.tokens + self.window - 1 <= cache.slots;
        assert!(is_ring || self.position + self.tokens <= cache.slots, "more tokens than the cache holds");
        assert!(self.head_dim <= MAX_HEAD_DIM, "a head that is too wide");
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "heads that share no key-value head");
        holds(query, [self.tokens, self.heads, self.head_dim], HALF);
        let vectors = [self.kv_heads, cache.slots];
        for [codes, scales] in cache.regions.as_chunks().0 {
            holds(codes, vectors, cache.dtype.code_bytes(self.head_dim));
            holds(scales, vectors, cache.dtype.scale_bytes());
        }
    }
}

/// Sees to it that a region holds an element of `size` bytes for all that `shape` counts.
#[track_caller]
pub(super) fn holds<const N: usize>(region: &Region, shape: [usize; N], size: usize) {
    let bytes = shape.into_iter().try_fold(size, usize::checked_mul);
    assert!(bytes.is_some_and(|bytes| bytes <= region.len()), "a kernel is given a region that is too short");
}
