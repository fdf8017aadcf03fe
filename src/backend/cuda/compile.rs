//! Kernels in a GPU's own code: compiled once for a kind of GPU, and kept.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaModule};
use cudarc::nvrtc::Ptx;

use super::driver::{LinkError, link};
use crate::bytes::{Bytes, MIB};
use crate::cancel::Cancel;
use crate::fs;
use crate::pool::lock;

/// The largest file of compiled kernels that is read.
const CAP: Bytes = Bytes(64 * MIB);

/// Where compiled kernels are kept, who is told, and how to stop.
#[derive(Clone, Default)]
pub struct Compiling {
    /// The directory that keeps them from one run to the next; without one the driver's own cache may.
    pub cache: Option<PathBuf>,
    /// Stops before the next file of kernels.
    pub cancel: Cancel,
    /// Told of the compute capability that kernels are compiled for, before each file.
    pub on_file: Option<Arc<OnFile>>,
}

/// Takes a compute capability, major and minor.
pub type OnFile = dyn Fn((i32, i32)) + Send + Sync;

/// What the code of a file of kernels follows from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The version of CUDA that the driver is for.
    pub driver: i32,
    /// That of the GPU.
    pub capability: (i32, i32),
    pub name: &'static str,
    pub ptx: &'a str,
}

type Image = Arc<Vec<u8>>;

impl Source<'_> {
    /// A name for the code: the version of the driver, the capability, and a hash of what it is made from.
    fn file_name(&self) -> String {
        let Self { driver, capability: (major, minor), name, ptx } = self;
        format!("{driver}-{major}.{minor}-{name}-{:016x}.cubin", hash(ptx.as_bytes()))
    }

    /// Loads the kernels. They are compiled if this process or the directory has not kept them.
    ///
    /// # Errors
    /// The driver refuses them. `None` where the caller has stopped it.
    pub fn load(&self, context: &Arc<CudaContext>, options: &Compiling) -> Result<Option<Arc<CudaModule>>, LinkError> {
        type Slot = Arc<Mutex<Option<Image>>>;
        static IMAGES: Mutex<BTreeMap<String, Slot>> = Mutex::new(BTreeMap::new());
        let file_name = self.file_name();
        // Whoever needs what another is compiling waits for that.
        let slot = Arc::clone(lock(&IMAGES).entry(file_name.clone()).or_default());
        let mut image = lock(&slot);
        let file = options.cache.as_ref().map(|directory| directory.join(file_name));
        let load = |image: &Image| context.load_module(Ptx::from_binary(image.to_vec()));
        if image.is_none() {
            *image = file.as_deref().and_then(read);
        }
        match image.as_ref().map(load) {
            Some(Ok(module)) => return Ok(Some(module)),
            Some(Err(error)) if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(error.into()),
            // What was kept may be of no use to this driver.
            Some(Err(_)) | None => {}
        }
        if options.cancel.is_cancelled() {
            return Ok(None);
        }
        if let Some(on_file) = &options.on_file {
            on_file(self.capability);
        }
        // Side by side some drivers have failed where one after the other they did not.
        let linked = link(context, self.name, self.ptx).or_else(|_| link(context, self.name, self.ptx))?;
        let made = Arc::new(linked);
        let module = load(&made)?;
        if let Some(file) = &file {
            write(file, &made);
        }
        *image = Some(made);
        Ok(Some(module))
    }
}

/// The same for the same bytes in every run of this program.
fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Code behind its hash. What is missing or broken is as good as none.
fn read(file: &Path) -> Option<Image> {
    let bytes = fs::read_capped(file, CAP).ok()?;
    let (sum, code) = bytes.split_first_chunk()?;
    (u64::from_le_bytes(*sum) == hash(code)).then(|| Arc::new(code.to_vec()))
}

/// Keeps code for the next run, where that is possible.
fn write(file: &Path, code: &[u8]) {
    let Some(directory) = file.parent() else { return };
    let bytes = [&hash(code).to_le_bytes()[..], code].concat();
    let _ = std::fs::create_dir_all(directory).map(|()| fs::write_atomic(file, &bytes, true));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_and_what_is_broken_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kernels/x.cubin");
        assert!(read(&file).is_none());
        write(&file, b"code");
        assert_eq!(*read(&file).unwrap(), b"code");
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, &bytes).unwrap();
        assert!(read(&file).is_none());
        std::fs::write(&file, b"short").unwrap();
        assert!(read(&file).is_none());
        write(Path::new("/proc/nowhere/x.cubin"), b"code");
    }
}
