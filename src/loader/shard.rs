//! One shard while it is read.
//!
//! What is in the page cache is copied from there. What is not is read past it: the disk writes into
//! the slab itself, at its own speed and without the processor. The next load finds such rows on
//! the disk again. That is why a slow disk is read through the cache, which such a disk does not wait for.

use std::fs::{File, Metadata};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::architecture::Weight;
use crate::bytes::{Bytes, MIB};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::footprint::{DIRECT_BLOCK, SLAB_MARGIN};
use crate::fs;

/// Bytes a nanosecond of a disk that may be read again at each load: more than SATA and most networks give.
const FAST_DISK: f64 = 0.6;
/// Bytes after which a disk's speed is known.
const TRIAL: u64 = 64 * MIB;

/// What was read past the page cache, and how fast.
pub struct PastCache {
    threads: usize,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl PastCache {
    pub fn by(threads: usize) -> Self {
        Self { threads, bytes: AtomicU64::new(0), nanoseconds: AtomicU64::new(0) }
    }

    pub fn bytes(&self) -> Bytes {
        Bytes(self.bytes.load(Ordering::Relaxed))
    }

    fn is_fast(&self) -> bool {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let nanoseconds = self.nanoseconds.load(Ordering::Relaxed) as f64 / self.threads as f64;
        bytes < TRIAL || bytes as f64 > FAST_DISK * nanoseconds
    }

    fn count(&self, bytes: usize, time: Duration) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// A shard that is open, as it was when it was opened.
pub struct Shard {
    path: PathBuf,
    file: File,
    /// The same file, past the page cache.
    direct: Option<File>,
    opened: Metadata,
}

impl Shard {
    /// Fails where there is no such file, or one that is not as long as it was when its header was read.
    pub fn open(checkpoint: &Checkpoint, index: usize) -> Result<Self> {
        let name = &checkpoint.shards[index];
        let path = fs::confined(checkpoint.local_directory()?, name)?;
        let file = fs::open_regular(&path)?;
        let opened = file.metadata().map_err(|e| Error::io("read", &path, e))?;
        let shard = Self { path, direct: fs::past_cache(&file), file, opened };
        if Bytes(shard.opened.len()) == checkpoint.shard_sizes[index] { Ok(shard) } else { Err(shard.changed()) }
    }

    /// Reads `len` bytes at `offset`, and gives their place in `buffer`, which is [`SLAB_MARGIN`] longer: past the
    /// page cache where they are not in it and that works and is fast, else through it.
    pub fn read_slab(
        &self,
        buffer: &mut [u8],
        offset: u64,
        len: usize,
        past_cache: &PastCache,
    ) -> Result<Range<usize>> {
        debug_assert!(buffer.len() >= len + SLAB_MARGIN);
        if let Some(direct) = &self.direct
            && past_cache.is_fast()
            && !fs::is_cached(&self.file, offset + RandomState::new().hash_one(offset) % len.max(1) as u64)
        {
            #[expect(clippy::cast_possible_truncation, reason = "below a block")]
            let before = (offset % DIRECT_BLOCK as u64) as usize;
            let blocks = (before + len).next_multiple_of(DIRECT_BLOCK);
            let start = Instant::now();
            let read = direct.read_at(&mut buffer[..blocks], offset - before as u64);
            if read.is_ok_and(|read| read >= before + len) {
                past_cache.count(len, start.elapsed());
                return Ok(before..before + len);
            }
        }
        self.read(&mut buffer[..len], offset)?;
        Ok(0..len)
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => self.changed(),
            _ => Error::io("read", &self.path, e),
        })
    }

    /// Fills `buffer` with rows of a tensor that is stored as `[cols, rows]`:
    /// their part of each stored row is read into `gathered`, which is as long.
    pub fn read_transposed(&self, buffer: &mut [u8], weight: &Weight, row: usize, gathered: &mut [u8]) -> Result<()> {
        let cols = weight.parameter.cols;
        let element = weight.shard_row_bytes() / cols;
        let stored = weight.parameter.rows * element;
        let rows = buffer.len() / (cols * element);
        for (col, part) in gathered.chunks_mut(rows * element).enumerate() {
            self.read(part, weight.tensor.range.start + (col * stored + row * element) as u64)?;
        }
        match element {
            2 => transpose::<2>(gathered, rows, buffer),
            8 => transpose::<8>(gathered, rows, buffer),
            _ => transpose::<4>(gathered, rows, buffer),
        }
        Ok(())
    }

    /// Fails where the file has changed since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|e| Error::io("read", &self.path, e))?;
        let [now, opened] = [&now, &self.opened].map(|m| (m.len(), m.mtime(), m.mtime_nsec()));
        if now == opened { Ok(()) } else { Err(self.changed()) }
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

    /// A file of numbers that is on the disk, and its shard.
    fn file(len: usize) -> (tempfile::NamedTempFile, Vec<u8>, Shard) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..len).map(|at| (at * 31 / 8) as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        file.as_file().sync_all().unwrap();
        let (path, opened) = (file.path().to_owned(), file.as_file().metadata().unwrap());
        let reader = File::open(&path).unwrap();
        let shard = Shard { path, direct: fs::past_cache(&reader), file: reader, opened };
        (file, bytes, shard)
    }

    fn buffer(len: usize) -> memmap2::MmapMut {
        memmap2::MmapMut::map_anon(len + SLAB_MARGIN).unwrap()
    }

    #[test]
    #[allow(clippy::print_stdout, reason = "a test that shows less says so")]
    fn slabs_are_the_same_past_the_page_cache_and_through_it() {
        let (_file, bytes, mut shard) = file(3 * DIRECT_BLOCK + 1234);
        for past in [true, false] {
            let past_cache = PastCache::by(1);
            for start in [0, 1, 8, DIRECT_BLOCK - 1, DIRECT_BLOCK, DIRECT_BLOCK + 7, 3 * DIRECT_BLOCK] {
                for len in [1, 100, DIRECT_BLOCK, DIRECT_BLOCK + 1, 2 * DIRECT_BLOCK - 1, bytes.len() - start] {
                    let Some(wanted) = bytes.get(start..start + len) else { continue };
                    let mut buffer = buffer(len);
                    rustix::fs::fadvise(&shard.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    let range = shard.read_slab(&mut buffer, start as u64, len, &past_cache).unwrap();
                    assert!(&buffer[range] == wanted, "{len} bytes at {start}");
                }
            }
            if past && past_cache.bytes() == Bytes::ZERO {
                println!("nothing was read past the page cache, as this file system does not do it");
            }
            assert!(past || past_cache.bytes() == Bytes::ZERO);
            shard.direct = None;
        }
    }

    #[test]
    fn what_is_in_the_page_cache_is_read_from_there() {
        let (_file, bytes, shard) = file(1 << 20);
        assert!(std::fs::read(&shard.path).unwrap() == bytes);
        let past_cache = PastCache::by(1);
        shard.read_slab(&mut buffer(1 << 20), 0, 1 << 20, &past_cache).unwrap();
        assert_eq!(past_cache.bytes(), Bytes::ZERO);
    }

    #[test]
    fn a_file_that_became_shorter_has_changed() {
        let (file, bytes, shard) = file(5 * DIRECT_BLOCK);
        file.as_file().set_len(4 * DIRECT_BLOCK as u64 + 1).unwrap();
        let error = shard
            .read_slab(&mut buffer(DIRECT_BLOCK), 4 * DIRECT_BLOCK as u64, DIRECT_BLOCK, &PastCache::by(1))
            .unwrap_err();
        assert!(error.to_string().ends_with("has changed while it was being loaded"), "{error}");
        assert!(shard.check_unchanged().is_err());
        assert_eq!(bytes.len(), 5 * DIRECT_BLOCK);
    }

    #[test]
    fn a_slow_disk_is_read_through_the_page_cache() {
        let disk = |bytes: u64, seconds: u64, threads| {
            let past_cache = PastCache::by(threads);
            past_cache.count(bytes as usize, Duration::from_secs(seconds));
            past_cache.is_fast()
        };
        assert!(disk(2_000_000_000, 1, 1) && disk(2_000_000_000, 4, 4));
        assert!(!disk(500_000_000, 1, 1) && !disk(2_000_000_000, 16, 4));
        assert!(disk(1, 1, 1), "too little to know");
    }
}
