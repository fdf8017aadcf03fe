//! What weights pass through on the host while they are loaded.

use super::layout;
use crate::architecture::Weight;
use crate::bytes::{Bytes, MIB};
use crate::quant::QuantizeRules;

/// Bytes of a slab of the host's staging ring, unless a single row is longer.
const SLAB: u64 = 2 * MIB;
/// What reads past the page cache are multiples of: their place in the file, their length, and where they go.
pub const DIRECT_BLOCK: usize = 4096;
/// Of a slab, what the whole units of the disk around rows may take beside them.
pub const SLAB_MARGIN: usize = 2 * DIRECT_BLOCK;
/// Slabs in the host's staging ring.
pub const STAGING_SLABS: usize = 8;

/// The sizes of the host's staging ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostStaging {
    /// Bytes of one slab; [`STAGING_SLABS`] of them are read into in turn.
    pub slab: usize,
    /// Bytes of the packed rows of one slab.
    pub packed: usize,
    /// Bytes in which the rows of transposed tensors are put together: a slab, if there are any.
    pub transposed: usize,
}

impl HostStaging {
    /// A ring for `weights`: slabs of 2 MiB, or of the units of the disk around the longest row, or of half the
    /// largest tensor where that is less.
    pub fn new(weights: &[Weight], rules: &QuantizeRules) -> Self {
        let longest_row = weights.iter().map(Weight::shard_row_bytes).max().unwrap_or(0);
        let largest = weights.iter().map(|weight| weight.tensor.size().0).max().unwrap_or(0);
        let slab = usize::try_from(SLAB.min(largest.div_ceil(2))).unwrap_or(usize::MAX).max(longest_row + SLAB_MARGIN);
        let packed = weights
            .iter()
            .filter_map(|weight| {
                let layout = layout(weight, rules)?;
                let rows = ((slab - SLAB_MARGIN) / weight.shard_row_bytes().max(1)).min(layout.rows);
                (layout.storage != weight.data).then_some(rows * layout.row_bytes.iter().sum::<usize>())
            })
            .max()
            .unwrap_or(0);
        let transposed = if weights.iter().any(Weight::is_transposed) { slab } else { 0 };
        Self { slab, packed, transposed }
    }

    /// What the ring takes that shards are read into, the rows of transposed tensors, and where the host packs,
    /// the packed rows.
    pub fn regions(&self, packs: bool) -> [(&'static str, Bytes); 3] {
        let packed = if packs { self.packed } else { 0 };
        let bytes = |len: usize| Bytes(len as u64);
        [("slabs", bytes(self.slab * STAGING_SLABS)), ("transposed", bytes(self.transposed)), ("packed", bytes(packed))]
    }
}
