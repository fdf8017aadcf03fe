//! Memory of a planned size: anonymous, or a mapped file.
#![expect(unsafe_code, reason = "mapping a file is the one thing here that the compiler cannot check")]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, MmapMut};

use crate::bytes::Bytes;
use crate::error::{Error, Result};

/// The packed weights of a device, in host memory or in a file on the disk.
pub type Arena = dyn Deref<Target = [u8]> + Send + Sync;

/// Maps a scratch file for reading.
pub fn map(file: &File, directory: &Path) -> Result<Mmap> {
    // SAFETY: the file has no name and this process holds its only handle,
    // so nobody truncates or writes it while it is mapped.
    let map = unsafe { Mmap::map(file) };
    map.map_err(|e| Error::io("map a scratch file in", directory, e))
}

/// Zeroed host memory, aligned to a page. The system gives pages when they are
/// first written, and refuses here where it knows that it cannot.
pub fn zeroed(what: &str, len: Bytes) -> Result<MmapMut> {
    let failed = || Error::does_not_fit(format!("cannot take {len} of host memory for {what}"));
    let len = len.as_usize().ok_or_else(failed)?;
    let memory = MmapMut::map_anon(len.max(1)).map_err(|e| failed().caused_by(e))?;
    // A kernel that has no large pages to give refuses, and small ones do.
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Ok(memory)
}
