//! Rows from page-locked host memory into the canonical packing: copied to a
//! small ring on the GPU, and packed from there by a kernel into their place.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaEvent;

use super::{DeviceMatrix, Gpu, Pinned, Region, arena};
use crate::error::Result;
use crate::footprint::{self, STAGING_SLABS};
use crate::quant::Storage;

/// A GPU while it is filled.
pub struct Upload {
    gpu: Arc<Gpu>,
    /// The slabs, and behind them the words that say whether packing one failed.
    staging: Vec<Region>,
    /// The same words, where the host reads them.
    failed: Pinned,
    next: usize,
}

/// A slab on its way. Its buffer is not touched until [`Upload::finish`].
pub struct InFlight {
    gpu: Arc<Gpu>,
    buffer: Option<Pinned>,
    slot: usize,
    done: CudaEvent,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.buffer.is_some() {
            // The buffer is freed next, and a copy from it may be under way.
            let _ = self.gpu.synchronize();
        }
    }
}

impl Upload {
    /// Takes a ring for slabs of at most `slab` bytes.
    pub fn take(gpu: &Arc<Gpu>, slab: usize, separate: bool) -> Result<Self> {
        Ok(Self {
            gpu: Arc::clone(gpu),
            staging: arena(gpu, "the staging ring", &memory::cuda_staging(slab), separate)?,
            failed: gpu.allocate_pinned(STAGING_SLABS * size_of::<u32>())?,
            next: 0,
        })
    }

    /// Queues the bytes `range` of `buffer`, whole rows as `data` stores them, for those of `matrix` from `row` on. At most [`STAGING_SLABS`] slabs may be on their way at once.
    pub fn start(
        &mut self,
        matrix: &DeviceMatrix,
        row: usize,
        data: Storage,
        buffer: Pinned,
        range: Range<usize>,
    ) -> Result<InFlight> {
        let slot = self.next;
        self.next = (slot + 1) % STAGING_SLABS;
        match self.queue(slot, matrix, row, data, &buffer, range) {
            Ok(done) => Ok(InFlight { gpu: Arc::clone(&self.gpu), buffer: Some(buffer), slot, done }),
            Err(error) => {
                // The buffer is freed next, and a copy from it may be under way.
                let _ = self.gpu.synchronize();
                Err(error)
            }
        }
    }

    fn queue(
        &mut self,
        slot: usize,
        matrix: &DeviceMatrix,
        row: usize,
        data: Storage,
        buffer: &Pinned,
        range: Range<usize>,
    ) -> Result<CudaEvent> {
        let layout = matrix.layout();
        if data == layout.storage {
            matrix.at((row * data.stored_row(layout.cols)) as u64).write_from(buffer, range)?;
        } else if let Storage::Plain(dtype) = data {
            const WORD: usize = size_of::<u32>();
            let failed = self.staging[STAGING_SLABS].part(slot * WORD, WORD);
            failed.clear()?;
            let rows = range.len() / (layout.cols * dtype.size());
            self.staging[slot].write_from(buffer, range)?;
            self.gpu.quantize(matrix, row, rows, dtype, &self.staging[slot], &failed)?;
            failed.read_to(&mut self.failed, slot * WORD)?;
        } else {
            unreachable!("a plan keeps what is packed as it is")
        }
        self.gpu.event()
    }

    /// Waits for a slab. Gives its buffer back, and whether its rows could be packed.
    pub fn finish(&mut self, mut slab: InFlight) -> Result<(Pinned, bool)> {
        self.gpu.wait(&slab.done)?;
        let Some(buffer) = slab.buffer.take() else { unreachable!("a slab is finished once") };
        Ok((buffer, self.failed.as_chunks().0[slab.slot] == [0; size_of::<u32>()]))
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // What is on its way writes to the words that are freed next.
        let _ = self.gpu.synchronize();
    }
}
