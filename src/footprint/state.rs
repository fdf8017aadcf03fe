//! What a block keeps of the tokens that it has seen.

use super::{Extent, MAX_BYTES, aligned};
use crate::bytes::Bytes;
use crate::model_config::{Layer, ModelConfig};
use crate::quant::KvDtype;

/// A ring's slots are a multiple of this: keys that a backend reads together never stand on both of its ends.
const RING_TILE: usize = 64;

/// What a block keeps of one sequence, by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Keys and values: of the whole context, or where the block sees a window, of that and a
    /// chunk of prefill, in a ring.
    KeysValues(KvLayout),
}

impl State {
    /// What a block that is `layer` of a model keeps of a sequence; `None` where it is beyond what a plan can hold.
    pub fn new(config: &ModelConfig, layer: Layer, extent: Extent, dtype: KvDtype) -> Option<Self> {
        let ring = |window: usize| window.checked_add(extent.chunk)?.checked_next_multiple_of(RING_TILE);
        let slots = layer.window.and_then(ring).map_or(extent.context, |slots| slots.min(extent.context));
        KvLayout::new(dtype, config.num_key_value_heads, config.head_dim, slots).map(Self::KeysValues)
    }

    /// What it takes, each region of it aligned.
    pub fn bytes(&self) -> Bytes {
        let Self::KeysValues(kv) = self;
        kv.bytes() + kv.bytes()
    }
}

/// The keys, or the values, that a block keeps of a sequence: codes as `[kv_heads][slots][head_dim]`, then
/// scales as `[kv_heads][slots]`. The token at a position has the slot that is left of it over `slots`.
/// On the CPU, the elements of some keys in turn stand side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// The type of the elements.
    pub dtype: KvDtype,
    /// Tokens that there is room for.
    pub slots: usize,
    /// Bytes of all codes, a multiple of 4.
    pub codes: usize,
    /// Bytes of all scales.
    pub scales: usize,
}

impl KvLayout {
    /// The layout for heads of `head_dim` elements; `None` where it is beyond what a plan can hold.
    pub fn new(dtype: KvDtype, kv_heads: usize, head_dim: usize, slots: usize) -> Option<Self> {
        let vectors = kv_heads.checked_mul(slots)?;
        let codes = vectors.checked_mul(dtype.code_bytes(head_dim))?.checked_next_multiple_of(size_of::<f32>())?;
        let scales = vectors.checked_mul(dtype.scale_bytes())?;
        (codes.checked_add(scales)? as u64 <= MAX_BYTES / 2).then_some(Self { dtype, slots, codes, scales })
    }

    /// What codes and scales take of an arena.
    pub fn bytes(&self) -> Bytes {
        aligned((self.codes + self.scales) as u64)
    }
}
