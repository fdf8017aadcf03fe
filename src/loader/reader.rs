//! Threads that read shards in slabs of whole rows, ahead of the work on them.
//!
//! Each takes the next slab and an empty buffer for it; what they have read is visited in the order in
//! which slabs were taken. Devices take turns, by the share of their bytes that was read: all of
//! them are fed until the end.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::{Deref, DerefMut, Range};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::shard::{PastCache, Shard};
use crate::backend::cpu;
use crate::backend::cuda::Pinned;
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::footprint::{HostStaging, Placed, SLAB_MARGIN};
use crate::pool::lock;
use crate::quant::narrow;

/// The most threads that read: a copy from the page cache takes the time of several.
const READERS: usize = 4;

/// Host memory that a slab is read into.
pub enum SlabBuffer {
    /// Ordinary memory, in large pages where there are such: a disk fills them with fewer requests.
    Heap(memmap2::MmapMut),
    /// Memory that GPUs copy from beside the host's work.
    Pinned(Pinned),
}

impl SlabBuffer {
    pub fn heap(staging: HostStaging) -> Result<Self> {
        let mut memory = cpu::zeroed("a staging slab", Bytes(staging.slab as u64))?;
        // Taken from the system now, so that the time of the first reads is the disk's own.
        memory.fill(0);
        Ok(Self::Heap(memory))
    }
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

/// Whole rows of a weight.
pub struct Slab<B = SlabBuffer> {
    /// Position of the weight in the list that is read.
    pub weight: usize,
    pub row: usize,
    /// Where in the buffer they are, in their weight's dtype.
    pub range: Range<usize>,
    /// Goes back to the reader when the rows are no longer needed.
    pub buffer: B,
}

impl Slab {
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

/// Reads `placed`, which is sorted by shard and offset, and calls `visit` with
/// each slab in turn, and with the way that buffers go back. `visit` may keep
/// some of the buffers, but not all. `transposed` bytes are taken for rows of
/// tensors that are stored the other way round. Gives how long slabs were waited for, and what was
/// read past the page cache.
pub fn read(
    checkpoint: &Checkpoint,
    placed: &[Placed],
    buffers: Vec<SlabBuffer>,
    transposed: usize,
    mut visit: impl FnMut(Slab, &SyncSender<SlabBuffer>) -> Result<()>,
) -> Result<(Duration, Bytes)> {
    let jobs = jobs(placed, buffers.first().map_or(0, |buffer| buffer.len() - SLAB_MARGIN));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(READERS).min(buffers.len());
    let (filled_out, filled_in) = sync_channel::<Filled>(buffers.len());
    let (empty_out, empty) = sync_channel(buffers.len());
    for buffer in buffers {
        // The channel has room for all slabs, and its other end is alive.
        let _ = empty_out.send(buffer);
    }
    let queue = Queue { next: 0, empty, shards: HashMap::new() };
    let (queue, gathered) = (Mutex::new(queue), Mutex::new(vec![0; transposed]));
    let past_cache = PastCache::by(threads);
    let reader = &Reader { checkpoint, placed, jobs: &jobs, queue, gathered, past_cache };
    // Both ends that the visitor holds are dropped with its closure, so that
    // readers that wait end where the visitor fails.
    let waited = thread::scope(move |scope| {
        for at in 0..threads {
            let filled = filled_out.clone();
            let name = thread::Builder::new().name(format!("evenkeel-reader-{at}"));
            match name.spawn_scoped(scope, move || reader.run(&filled)) {
                Ok(_) => {}
                Err(e) if at == 0 => return Err(Error::no_thread(e)),
                // Fewer read all the same.
                Err(_) => break,
            }
        }
        drop(filled_out);
        let mut early: BTreeMap<_, _> = BTreeMap::new();
        let mut waited = Duration::ZERO;
        for (at, job) in reader.jobs.iter().enumerate() {
            let start = Instant::now();
            let slab = loop {
                if let Some(slab) = early.remove(&at) {
                    break slab;
                }
                // No reader is left before all is read, unless one has panicked, as the scope will.
                let Ok((at, slab)) = filled_in.recv() else { return Ok(waited) };
                early.insert(at, slab);
            };
            waited += start.elapsed();
            let (slab, shard) = slab?;
            visit(slab, &empty_out)?;
            if job.ends_shard {
                shard.check_unchanged()?;
            }
        }
        Ok(waited)
    });
    Ok((waited?, reader.past_cache.bytes()))
}

/// The place of a slab in the order, and the slab with the shard that it is of.
type Filled = (usize, Result<(Slab, Arc<Shard>)>);

/// Rows of a weight that are read at once.
struct Job {
    weight: usize,
    row: usize,
    rows: usize,
    /// Whether it is the last of its shard.
    ends_shard: bool,
}

/// All rows in slabs of at most `slab` bytes, in the order in which they are read.
fn jobs(placed: &[Placed], slab: usize) -> Vec<Job> {
    let size = |target: &Placed| target.weight.tensor.size().0;
    let mut sizes: BTreeMap<DeviceId, u64> = BTreeMap::new();
    for target in placed {
        *sizes.entry(target.device).or_default() += size(target);
    }
    let mut ends = BTreeMap::<DeviceId, u64>::new();
    let mut jobs = Vec::new();
    for (weight, target) in placed.iter().enumerate() {
        let (row_bytes, all_rows) = (target.weight.shard_row_bytes(), target.weight.data_rows());
        let end = ends.entry(target.device).or_default();
        for row in (0..all_rows).step_by((slab / row_bytes).max(1)) {
            let rows = (slab / row_bytes).min(all_rows - row);
            let share = (*end + (row * row_bytes) as u64) as f64 / sizes[&target.device] as f64;
            jobs.push((share, Job { weight, row, rows, ends_shard: false }));
        }
        *end += size(target);
    }
    // Equal shares stay in the order of the shards.
    jobs.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let mut jobs: Vec<_> = jobs.into_iter().map(|(_, job)| job).collect();
    let mut ended = HashSet::new();
    for job in jobs.iter_mut().rev() {
        job.ends_shard = ended.insert(placed[job.weight].weight.tensor.shard);
    }
    jobs
}

struct Queue {
    next: usize,
    empty: Receiver<SlabBuffer>,
    /// Those that are open, for as long as slabs of them are left.
    shards: HashMap<usize, Arc<Shard>>,
}

struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    placed: &'a [Placed],
    jobs: &'a [Job],
    queue: Mutex<Queue>,
    gathered: Mutex<Vec<u8>>,
    past_cache: PastCache,
}

impl Reader<'_> {
    /// Reads slab after slab, until none is left or nobody listens.
    fn run(&self, filled: &SyncSender<Filled>) {
        loop {
            // Whoever waits for a buffer keeps the queue: buffers go to slabs in order, so that the one
            // that is visited next never waits for a buffer that a later one has.
            let mut queue = lock(&self.queue);
            let at = queue.next;
            let Some(job) = self.jobs.get(at) else { return };
            let Ok(buffer) = queue.empty.recv() else { return };
            queue.next += 1;
            let shard = self.shard(&mut queue, job);
            drop(queue);
            let slab = shard.and_then(|shard| Ok((self.fill(job, buffer, &shard)?, shard)));
            let failed = slab.is_err();
            if filled.send((at, slab)).is_err() || failed {
                return;
            }
        }
    }

    /// The shard of a slab, which stays open until its last one.
    fn shard(&self, queue: &mut Queue, job: &Job) -> Result<Arc<Shard>> {
        let index = self.placed[job.weight].weight.tensor.shard;
        let shard = match queue.shards.remove(&index) {
            Some(shard) => shard,
            None => Arc::new(Shard::open(self.checkpoint, index)?),
        };
        if !job.ends_shard {
            queue.shards.insert(index, Arc::clone(&shard));
        }
        Ok(shard)
    }

    fn fill(&self, job: &Job, mut buffer: SlabBuffer, shard: &Shard) -> Result<Slab> {
        let (weight, row) = (&self.placed[job.weight].weight, job.row);
        let len = job.rows * weight.shard_row_bytes();
        let mut range = if weight.is_transposed() {
            shard.read_transposed(&mut buffer[..len], weight, row, &mut lock(&self.gathered)[..len])?;
            0..len
        } else {
            let offset = weight.tensor.range.start + (row * weight.shard_row_bytes()) as u64;
            shard.read_slab(&mut buffer, offset, len, &self.past_cache)?
        };
        if weight.is_narrowed() {
            range.end = range.start + narrow(&mut buffer[range.clone()]);
        }
        Ok(Slab { weight: job.weight, row, range, buffer })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::architecture::ModuleTree;
    use crate::footprint::lay_out;
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
            let staging = HostStaging { slab: slab + SLAB_MARGIN, packed: 0, transposed: slab };
            let buffers = (0..4).map(|_| SlabBuffer::heap(staging).unwrap()).collect();
            let mut read_back = vec![Vec::new(); placed.len()];
            let read = read(&checkpoint, &placed, buffers, slab, |slab, back| {
                read_back[slab.weight].extend_from_slice(slab.bytes());
                let _ = back.send(slab.buffer);
                Ok(())
            });
            read.unwrap();
            for (placed, rows) in placed.iter().zip(read_back) {
                let (tensor, parameter) = (&placed.weight.tensor, &placed.weight.parameter);
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
    #[test]
    fn devices_take_turns_and_each_reads_in_the_order_of_its_shards() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama");
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let tree = ModuleTree::new(&checkpoint.config);
        let weights = tree.resolve(&checkpoint).unwrap();
        let half = tree.modules.len() / 2;
        let devices: Vec<_> =
            (0..tree.modules.len()).map(|at| if at < half { DeviceId::Cuda(0) } else { DeviceId::Cuda(1) }).collect();
        let mut placed = lay_out(&weights, &devices, &QuantizeRules::whole_model(Scheme::None)).unwrap();
        placed.sort_by_key(|placed| (placed.weight.tensor.shard, placed.weight.tensor.range.start));
        let slab = 2000;
        let jobs = jobs(&placed, slab);
        let bytes = |job: &Job| (job.rows * placed[job.weight].weight.row_bytes()) as f64;
        let total = |device| -> f64 { jobs.iter().filter(|job| placed[job.weight].device == device).map(bytes).sum() };
        let totals = [DeviceId::Cuda(0), DeviceId::Cuda(1)].map(total);
        assert_eq!(totals[0] + totals[1], placed.iter().map(|p| p.weight.tensor.size().0 as f64).sum::<f64>());
        let mut seen = [0.0; 2];
        let mut last = [(0, 0); 2];
        for job in &jobs {
            let at = usize::from(placed[job.weight].device == DeviceId::Cuda(1));
            assert!((job.weight, job.row) >= last[at]);
            last[at] = (job.weight, job.row);
            seen[at] += bytes(job);
            let ahead = (seen[0] / totals[0] - seen[1] / totals[1]).abs();
            assert!(ahead <= 2.0 * slab as f64 / totals[0].min(totals[1]), "{ahead}");
        }
    }
}
