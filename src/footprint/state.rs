//! What a block keeps of the tokens that it has seen.

use super::{Extent, MAX_BYTES, PAGE, aligned};
use crate::bytes::Bytes;
use crate::model_config::{Layer, ModelConfig};
use crate::quant::KvDtype;

/// What a block keeps of all sequences, by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Keys and values: of the whole context in pages that sequences share out among themselves, or where the
    /// block sees a window, of that and a step, in a ring of each sequence's own.
    KeysValues(KvLayout),
}

impl State {
    /// What a block that is `layer` of a model keeps; `None` where it is beyond what a plan can hold.
    pub fn new(config: &ModelConfig, layer: Layer, extent: Extent, dtype: KvDtype) -> Option<Self> {
        let ring = |window: usize| window.checked_add(extent.chunk)?.checked_next_multiple_of(PAGE);
        let whole = extent.context.checked_next_multiple_of(PAGE)?;
        let (slots, pages, is_ring) = match layer.window.and_then(ring).filter(|slots| *slots < whole) {
            Some(slots) => (slots, extent.sequences.checked_mul(slots / PAGE)?, true),
            None => (whole, extent.pages, false),
        };
        let of_page = (config.num_key_value_heads, config.head_dim);
        KvLayout::new(dtype, of_page, pages).map(|layout| Self::KeysValues(KvLayout { slots, is_ring, ..layout }))
    }

    /// What it takes, each region of it aligned.
    pub fn bytes(&self) -> Bytes {
        let Self::KeysValues(kv) = self;
        kv.bytes() + kv.bytes()
    }
}

/// The keys, or the values, that a block keeps: codes as `[pages][kv_heads][PAGE][head_dim]`, then scales as
/// `[pages][kv_heads][PAGE]`. The token at a position has the slot that is left of it over `slots`; those of a
/// page follow on each other. On the CPU, the elements of some keys in turn stand side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// The type of the elements.
    pub dtype: KvDtype,
    /// Tokens that a sequence has room for, a multiple of [`PAGE`].
    pub slots: usize,
    /// Whether a sequence has pages of its own, those of sequence `n` behind those of `n - 1`; else which pages it has
    /// is in a table that all such blocks share.
    pub is_ring: bool,
    /// Pages of all sequences.
    pub pages: usize,
    /// Bytes of all codes.
    pub codes: usize,
    /// Bytes of all scales.
    pub scales: usize,
}

impl KvLayout {
    /// The layout of `pages` for so many heads of so many elements, all of them one sequence's; `None` where it is
    /// beyond what a plan can hold.
    pub fn new(dtype: KvDtype, (kv_heads, head_dim): (usize, usize), pages: usize) -> Option<Self> {
        let slots = pages.checked_mul(PAGE)?;
        let vectors = kv_heads.checked_mul(slots).filter(|vectors| u32::try_from(*vectors).is_ok())?;
        let codes = vectors.checked_mul(dtype.code_bytes(head_dim))?;
        let scales = vectors.checked_mul(dtype.scale_bytes())?;
        let is_sane = codes.checked_add(scales)? as u64 <= MAX_BYTES / 2;
        is_sane.then_some(Self { dtype, slots, is_ring: false, pages, codes, scales })
    }

    /// What codes and scales take of an arena.
    pub fn bytes(&self) -> Bytes {
        aligned((self.codes + self.scales) as u64)
    }
}
