//! A thread that reads shards in slabs of whole rows, ahead of the work on them.

use std::fs::{File, Metadata};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::architecture::Weight;
use crate::backend::cuda::Pinned;
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::fs;
use crate::plan::memory::Placed;

/// Host memory that a slab is read into.
pub enum SlabBuffer {
    /// Ordinary memory.
    Heap(Vec<u8>),
    /// Memory that GPUs copy from beside the host's work.
    Pinned(Pinned),
}

impl Deref for SlabBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Pinned(bytes) => bytes,
        }
    }
}

impl DerefMut for SlabBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Pinned(bytes) => bytes,
        }
    }
}

/// Whole rows of a weight, as the shard has them.
pub struct Slab {
    /// Position of the weight in the list that is read.
    pub weight: usize,
    /// First row.
    pub row: usize,
    /// Bytes of the rows, at the start of the buffer.
    pub len: usize,
    /// Where they are; goes back to the reader when they are no longer needed.
    pub buffer: SlabBuffer,
}

/// Reads `placed`, which is sorted by shard and offset, and calls `visit` with
/// each slab in turn, and with the way that buffers go back. `visit` may keep
/// some of the buffers, but not all. `transposed` bytes are taken for rows of
/// tensors that are stored the other way round.
///
/// # Errors
/// A shard cannot be read or has changed since its header was, or `visit` fails.
pub fn read(
    checkpoint: &Checkpoint,
    directory: &Path,
    placed: &[Placed],
    buffers: Vec<SlabBuffer>,
    transposed: usize,
    mut visit: impl FnMut(Slab, &SyncSender<SlabBuffer>) -> Result<()>,
) -> Result<()> {
    let (filled_out, filled_in) = sync_channel::<Result<Slab>>(buffers.len());
    let (empty_out, empty_in) = sync_channel::<SlabBuffer>(buffers.len());
    for buffer in buffers {
        // The channel has room for all slabs, and its other end is alive.
        let _ = empty_out.send(buffer);
    }
    // Both ends that the visitor holds are dropped with its closure, so that
    // a reader that waits ends where the visitor fails.
    std::thread::scope(move |scope| {
        scope.spawn(move || {
            let mut gathered = vec![0; transposed];
            if let Err(error) = read_ahead(checkpoint, directory, placed, &empty_in, &filled_out, &mut gathered) {
                // Nobody listens where the visitor has failed already.
                let _ = filled_out.send(Err(error));
            }
        });
        for slab in filled_in {
            visit(slab?, &empty_out)?;
        }
        Ok(())
    })
}

fn read_ahead(
    checkpoint: &Checkpoint,
    directory: &Path,
    placed: &[Placed],
    empty: &Receiver<SlabBuffer>,
    filled: &SyncSender<Result<Slab>>,
    gathered: &mut [u8],
) -> Result<()> {
    let mut open: Option<Shard> = None;
    for (at, target) in placed.iter().enumerate() {
        let tensor = &target.weight.tensor;
        let shard = match open.take() {
            Some(shard) if shard.index == tensor.shard => shard,
            finished => {
                finished.map_or(Ok(()), |shard| shard.check_unchanged())?;
                Shard::open(checkpoint, directory, tensor.shard)?
            }
        };
        let (row_bytes, all_rows) = (target.weight.row_bytes(), target.weight.data_rows());
        let mut row = 0;
        while row < all_rows {
            let Ok(mut buffer) = empty.recv() else {
                return Ok(());
            };
            let rows = (buffer.len() / row_bytes).min(all_rows - row);
            let len = rows * row_bytes;
            if target.weight.is_transposed() {
                shard.read_transposed(&mut buffer[..len], &target.weight, row, &mut gathered[..len])?;
            } else {
                shard.read(&mut buffer[..len], tensor.range.start + (row * row_bytes) as u64)?;
            }
            if filled.send(Ok(Slab { weight: at, row, len, buffer })).is_err() {
                return Ok(());
            }
            row += rows;
        }
        open = Some(shard);
    }
    open.map_or(Ok(()), |shard| shard.check_unchanged())
}

/// A shard that is open, as it was when it was opened.
struct Shard {
    index: usize,
    path: PathBuf,
    file: File,
    opened: Metadata,
}

impl Shard {
    fn open(checkpoint: &Checkpoint, directory: &Path, index: usize) -> Result<Self> {
        let name = &checkpoint.shards[index];
        let path = fs::confined(directory, name)?;
        let file = fs::open_regular(&path)?;
        let opened = file.metadata().map_err(|e| Error::io("read", &path, e))?;
        let shard = Self { index, path, file, opened };
        if Bytes(shard.opened.len()) == checkpoint.shard_sizes[index] { Ok(shard) } else { Err(shard.changed()) }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => self.changed(),
            _ => Error::io("read", &self.path, e),
        })
    }

    /// Fills `buffer` with rows of a tensor that is stored as `[cols, rows]`:
    /// their part of each stored row is read into `gathered`, which is as long.
    fn read_transposed(&self, buffer: &mut [u8], weight: &Weight, row: usize, gathered: &mut [u8]) -> Result<()> {
        let cols = weight.parameter.cols;
        let element = weight.row_bytes() / cols;
        let stored = weight.parameter.rows * element;
        let rows = buffer.len() / (cols * element);
        for (col, part) in gathered.chunks_mut(rows * element).enumerate() {
            self.read(part, weight.tensor.range.start + (col * stored + row * element) as u64)?;
        }
        match element {
            2 => transpose::<2>(gathered, rows, buffer),
            _ => transpose::<4>(gathered, rows, buffer),
        }
        Ok(())
    }

    fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|e| Error::io("read", &self.path, e))?;
        let same = |part: fn(&Metadata) -> i128| part(&now) == part(&self.opened);
        let unchanged = same(|m| i128::from(m.len()))
            && same(|m| i128::from(m.mtime()) * 1_000_000_000 + i128::from(m.mtime_nsec()));
        if unchanged { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Error {
        Error::input(format!("`{}` has changed while it was being loaded", self.path.display()))
            .hint("load again once the file is complete")
    }
}

/// Turns elements of N bytes from `[cols][rows]` into `[rows][cols]`.
fn transpose<const N: usize>(from: &[u8], rows: usize, to: &mut [u8]) {
    let from = from.as_chunks::<N>().0;
    let cols = from.len() / rows;
    for (row, to) in to.as_chunks_mut::<N>().0.chunks_mut(cols).enumerate() {
        for (to, from) in to.iter_mut().zip(from[row..].iter().step_by(rows)) {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::ModuleTree;
    use crate::device::DeviceId;
    use crate::plan::memory::lay_out;
    use crate::quant::{QuantizeRules, Scheme};

    #[test]
    fn transposed_tensors_come_in_rows_whatever_the_slab() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/gpt2");
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let tree = ModuleTree::new(&checkpoint.config);
        let weights = tree.resolve(&checkpoint).unwrap();
        let rules = QuantizeRules::whole_model(Scheme::None);
        let mut placed = lay_out(&weights, &vec![DeviceId::Cpu; tree.modules.len()], &rules).unwrap();
        placed.retain(|placed| placed.weight.parameter.is_transposed);
        placed.sort_by_key(|placed| (placed.weight.tensor.shard, placed.weight.tensor.range.start));
        assert_eq!(placed.len(), 4 * 3);
        // One row of the widest matrix, some rows, all of them.
        for slab in [512, 4099, 1 << 20] {
            let buffers = (0..4).map(|_| SlabBuffer::Heap(vec![0; slab])).collect();
            let mut read_back = vec![Vec::new(); placed.len()];
            let read = read(&checkpoint, &directory, &placed, buffers, slab, |slab, back| {
                read_back[slab.weight].extend_from_slice(&slab.buffer[..slab.len]);
                let _ = back.send(slab.buffer);
                Ok(())
            });
            read.unwrap();
            for (placed, rows) in placed.iter().zip(read_back) {
                let (tensor, parameter) = (placed.weight.tensor, placed.weight.parameter);
                let shard = std::fs::read(directory.join(&checkpoint.shards[tensor.shard])).unwrap();
                let stored = &shard[tensor.range.start as usize..tensor.range.end as usize];
                let element = |row: usize, col: usize| &stored[2 * (col * parameter.rows + row)..][..2];
                let wanted: Vec<u8> = (0..parameter.rows)
                    .flat_map(|row| (0..parameter.cols).flat_map(move |col| element(row, col)))
                    .copied()
                    .collect();
                assert!(rows == wanted, "{} in slabs of {slab}", parameter.tensor());
            }
        }
    }
}
