//! Rows from page-locked host memory into the canonical packing: copied to a
//! small ring on the GPU, and packed from there by a kernel into their place.

use std::iter;
use std::ops::Range;
use std::sync::Arc;

use super::driver::{Copying, Gpu, Pinned, Region};
use super::operands::{DeviceMatrix, WORD};
use crate::bytes::Bytes;
use crate::error::Result;
use crate::footprint::{STAGING_SLABS, aligned};
use crate::quant::Storage;

/// A GPU while it is filled.
pub struct Upload {
    free: Vec<Slot>,
}

/// A slab of the ring on the GPU.
struct Slot {
    staging: Region,
    /// A word that says whether packing failed, and where the host reads it.
    failed: Region,
    word: Pinned,
}

/// A slab on its way.
pub struct InFlight {
    buffer: Copying,
    /// Of rows that are packed, the slab and the word.
    packing: Option<([Region; 2], Copying)>,
}

impl Upload {
    /// What a ring for slabs of at most `slab` bytes takes.
    pub fn sizes(slab: usize) -> impl Iterator<Item = Bytes> {
        let slabs = iter::repeat_n(aligned(slab as u64), STAGING_SLABS);
        slabs.chain([aligned((STAGING_SLABS * WORD) as u64)])
    }

    /// A ring in the next of `regions`, which are of [`Upload::sizes`].
    pub fn new(gpu: &Arc<Gpu>, regions: &mut impl Iterator<Item = Region>) -> Result<Self> {
        let staging: Vec<_> = regions.take(STAGING_SLABS + 1).collect();
        let slot = |at: usize| {
            let failed = staging[STAGING_SLABS].part(at * WORD, WORD);
            Ok(Slot { staging: staging[at].clone(), failed, word: gpu.allocate_pinned(WORD)? })
        };
        Ok(Self { free: (0..STAGING_SLABS).map(slot).collect::<Result<_>>()? })
    }

    /// Queues the bytes `range` of `buffer`, whole rows as `data` stores them, for those of `matrix` from `row` on.
    pub fn start(
        &mut self,
        matrix: &DeviceMatrix,
        row: usize,
        data: Storage,
        buffer: Pinned,
        range: Range<usize>,
    ) -> Result<InFlight> {
        let layout = &matrix.layout;
        if data == layout.storage {
            let place = matrix.at((row * data.stored_row(layout.cols)) as u64);
            return Ok(InFlight { buffer: place.write_from(buffer, range)?, packing: None });
        }
        let Storage::Plain(dtype) = data else { unreachable!("a plan keeps what is packed as it is") };
        let Some(Slot { staging, failed, word }) = self.free.pop() else {
            unreachable!("no more slabs are on their way at once")
        };
        failed.clear()?;
        let rows = range.len() / (layout.cols * dtype.size());
        let buffer = staging.write_from(buffer, range)?;
        staging.gpu().quantize(matrix, row, rows, dtype, &staging, &failed)?;
        let word = failed.read_to(word)?;
        Ok(InFlight { buffer, packing: Some(([staging, failed], word)) })
    }

    /// Waits for a slab. Gives its buffer back, and whether its rows could be packed.
    pub fn finish(&mut self, slab: InFlight) -> Result<(Pinned, bool)> {
        let mut is_packed = true;
        if let Some(([staging, failed], word)) = slab.packing {
            let word = word.finish()?;
            is_packed = *word == [0; size_of::<u32>()];
            self.free.push(Slot { staging, failed, word });
        }
        Ok((slab.buffer.finish()?, is_packed))
    }
}
