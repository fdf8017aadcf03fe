//! The one door to the driver: everything here that the compiler cannot check.
//!
//! A [`Gpu`] owns its context, two streams and the kernels; a [`Buffer`] is
//! device memory that is given back when it is dropped; a [`Region`] is a part
//! of one, and no copy or launch reaches beyond it.
#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::collections::HashMap;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use super::kernels::{MODULES, Module};
use super::launch::ptx_for;
use super::{GpuInfo, NEEDED_CAPABILITY};
use crate::bytes::Bytes;
use crate::device::{DeviceError, DeviceId};
use crate::error::{Error, Hint, Result, Setting};
use crate::plan::{Bandwidth, Device, memory};

/// Memory of every context can be copied from page-locked memory that is allocated with this flag.
const PORTABLE: u32 = 1;

/// The number of GPUs, and the version of CUDA that the driver is for, as
/// 1000 · major + 10 · minor; `None` where there is no driver or it fails.
pub fn driver() -> Option<(u32, i32)> {
    // SAFETY: opens and closes the driver's library, whose initialization has no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let mut version = 0;
    // SAFETY: writes one int, to a variable that outlives the call.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().ok()?;
    let count = result::init().and_then(|()| CudaContext::device_count()).unwrap_or(0);
    Some((u32::try_from(count).unwrap_or(0), version))
}

/// What the GPU at `index` is. What this process's context takes of it counts
/// as free: the plan counts that itself.
pub fn describe(index: u32) -> Result<GpuInfo, DriverError> {
    let context = CudaContext::new(index as usize)?;
    let (free, total) = context.mem_get_info()?;
    let (id, total) = (DeviceId::Cuda(index), Bytes(total as u64));
    let free = (Bytes(free as u64) + memory::driver_context(id)).min(total);
    let name = context.name()?;
    let bandwidth = Bandwidth::of_gpu(&name);
    let uuid = context.uuid()?.bytes.map(|byte| format!("{:02x}", byte.cast_unsigned())).concat();
    let [a, b, c, d] = [&uuid[..8], &uuid[8..12], &uuid[12..16], &uuid[16..20]];
    Ok(GpuInfo {
        device: Device { id, name: Some(name), free, total, bandwidth },
        uuid: format!("GPU-{a}-{b}-{c}-{d}-{}", &uuid[20..]),
        capability: context.compute_capability()?,
    })
}

/// A GPU with its context, its streams and its kernels.
pub struct Gpu {
    index: u32,
    context: Arc<CudaContext>,
    /// That whose kernels it runs.
    pub(super) capability: (i32, i32),
    pub(super) stream: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    pub(super) functions: HashMap<&'static str, CudaFunction>,
    pub(super) multiprocessors: usize,
    /// Bytes of all buffers, now and at most.
    allocated: Mutex<(Bytes, Bytes)>,
}

impl Gpu {
    /// Opens the GPU at `index` among those that the driver shows, and loads the kernels.
    pub fn open(index: u32) -> Result<Arc<Self>> {
        Self::open_as(index, (i32::MAX, 0))
    }

    /// As [`Gpu::open`], with the kernels that a GPU of `capability` runs where this one has more.
    pub fn open_as(index: u32, capability: (i32, i32)) -> Result<Arc<Self>> {
        let mut gpu = Self::without_kernels(index)?;
        gpu.capability = gpu.capability.min(capability);
        let (context, capability) = (&gpu.context, gpu.capability);
        // Without the least that any file needs, the driver says what is wrong.
        let has = capability.max(NEEDED_CAPABILITY);
        let wanted: Vec<_> = MODULES.iter().filter(|module| module.capability <= has).collect();
        // The driver compiles what it has not compiled before, each file on one processor.
        let load = |module: &Module| context.load_module(Ptx::from_src(ptx_for(module.ptx, capability)));
        let loaded: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = wanted.iter().map(|module| scope.spawn(move || load(module))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|e| resume_unwind(e))).collect()
        });
        for (Module { name, kernels, .. }, module) in wanted.into_iter().zip(loaded) {
            let module = module.map_err(|e| {
                gpu.failure(&format!("cannot load the kernels `{name}`"), e).hint(
                    "evenkeel needs the NVIDIA driver 550 or newer, and a GPU of compute capability 7.5 or higher",
                )
            })?;
            for kernel in *kernels {
                let function = module.load_function(kernel);
                let function = function.map_err(|e| gpu.failure(&format!("has no kernel `{kernel}`"), e))?;
                gpu.functions.insert(*kernel, function);
            }
        }
        Ok(Arc::new(gpu))
    }

    /// Opens a GPU for memory and copies alone, which takes the driver less time.
    pub fn without_kernels(index: u32) -> Result<Self> {
        let id = DeviceId::Cuda(index);
        if driver().is_none_or(|(count, _)| index >= count) {
            return Err(Error::does_not_fit(DeviceError::Absent { device: id }));
        }
        let failed = |what: &str, e| failure(id, what, e);
        let context = CudaContext::new(index as usize).map_err(|e| failed("cannot be opened", e))?;
        let streams = || context.new_stream().map_err(|e| failed("cannot make a stream", e));
        let (stream, copies) = (streams()?, streams()?);
        let capability = context.compute_capability().map_err(|e| failed("does not tell its compute capability", e))?;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors =
            context.attribute(attribute).map_err(|e| failed("does not tell its number of multiprocessors", e))?;
        let multiprocessors = usize::try_from(multiprocessors).unwrap_or(0).max(1);
        let (functions, allocated) = (HashMap::new(), Mutex::default());
        Ok(Self { index, context, capability, stream, copies, functions, multiprocessors, allocated })
    }

    /// Its name in maps.
    pub fn id(&self) -> DeviceId {
        DeviceId::Cuda(self.index)
    }

    /// Bytes that can be allocated now, and all that the GPU has.
    pub fn memory(&self) -> Result<(Bytes, Bytes)> {
        let (free, total) = self.context.mem_get_info().map_err(|e| self.failure("does not tell its memory", e))?;
        Ok((Bytes(free as u64), Bytes(total as u64)))
    }

    /// Allocates `len` bytes, of unknown content, for `what`.
    pub fn allocate(self: &Arc<Self>, what: &str, len: Bytes) -> Result<Arc<Buffer>> {
        let refused = |why: String| {
            let free = self.memory().ok().map(|(free, _)| free);
            let (device, what) = (self.id(), what.to_owned());
            Error::shortfall(DeviceError::Refused { device, needed: len, free, what, why })
                .hint(Hint::naming("{} plans again with what is left", [Setting::Replan]))
        };
        let bytes = len.as_usize().ok_or_else(|| refused("more than can be addressed".to_owned()))?;
        self.bind()?;
        // SAFETY: the context is bound; the pointer is freed once, in `Buffer::drop`.
        let pointer = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| refused(name(e)))?;
        let mut allocated = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        allocated.0 += len;
        allocated.1 = allocated.1.max(allocated.0);
        Ok(Arc::new(Buffer { gpu: Arc::clone(self), pointer, len: bytes }))
    }

    /// The most bytes that were allocated at once.
    pub fn peak(&self) -> Bytes {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// Allocates `len` bytes of page-locked host memory, zeroed.
    pub fn allocate_pinned(self: &Arc<Self>, len: usize) -> Result<Pinned> {
        self.bind()?;
        // SAFETY: the context is bound; the pointer is freed once, in `Pinned::drop`.
        let pointer = unsafe { result::malloc_host(len.max(1), PORTABLE) }.map_err(|e| {
            Error::does_not_fit(format!("cannot take {} of page-locked host memory: {}", Bytes(len as u64), name(e)))
        })?;
        // SAFETY: that many bytes were just allocated.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, len) };
        Ok(Pinned { gpu: Arc::clone(self), pointer: pointer.cast(), len })
    }

    /// Waits until everything that was queued is done.
    pub fn synchronize(&self) -> Result<()> {
        let done = self.copies.synchronize().and_then(|()| self.stream.synchronize());
        done.map_err(|e| self.failure("has failed at work that was queued", e))
    }

    /// An event behind what the compute stream has been given so far.
    pub fn event(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(|e| self.failure("cannot record an event", e))
    }

    /// Waits for an event.
    pub fn wait(&self, event: &CudaEvent) -> Result<()> {
        event.synchronize().map_err(|e| self.failure("has failed at work that was queued", e))
    }

    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.failure("cannot be used", e))
    }

    pub(super) fn failure(&self, what: &str, error: DriverError) -> Error {
        failure(self.id(), what, error)
    }
}

fn failure(device: DeviceId, what: &str, error: DriverError) -> Error {
    Error::device(DeviceError::Failed { device, what: format!("{what}: {}", name(error)) })
}

/// The error's name and text, such as `CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)`.
fn name(error: DriverError) -> String {
    let text = |text: Result<&std::ffi::CStr, DriverError>| text.ok().map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(text)) => format!("{name} ({text})"),
        _ => format!("error {}", error.0 as i32),
    }
}

/// Memory of a GPU.
pub struct Buffer {
    gpu: Arc<Gpu>,
    pointer: sys::CUdeviceptr,
    len: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut allocated = self.gpu.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        allocated.0 = allocated.0 - Bytes(self.len as u64);
        if self.gpu.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `Gpu::allocate` and freed here only; the driver waits for work on
            // it. A failure (a context that has failed before) frees the memory with the context.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// A part of a buffer.
#[derive(Clone)]
pub struct Region {
    buffer: Arc<Buffer>,
    offset: usize,
    len: usize,
}

impl Region {
    /// The `len` bytes of `buffer` from `offset` on.
    ///
    /// # Panics
    /// The buffer ends before.
    pub fn new(buffer: &Arc<Buffer>, offset: usize, len: usize) -> Self {
        assert!(offset.checked_add(len).is_some_and(|end| end <= buffer.len), "a region beyond its buffer");
        Self { buffer: Arc::clone(buffer), offset, len }
    }

    /// The `len` bytes from `offset` on.
    ///
    /// # Panics
    /// The region ends before.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Self {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "a part beyond its region");
        Self { buffer: Arc::clone(&self.buffer), offset: self.offset + offset, len }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.buffer.gpu
    }

    /// Whether both are the same bytes.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer) && (self.offset, self.len) == (other.offset, other.len)
    }

    pub(super) fn pointer(&self) -> u64 {
        self.buffer.pointer + self.offset as u64
    }

    /// Copies `bytes` to the start of the region, in the order of the compute stream.
    ///
    /// # Panics
    /// The region is shorter.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.len, "a write beyond its region");
        let gpu = self.gpu();
        gpu.bind()?;
        // SAFETY: the region is that long, and `bytes` stay until the stream is synchronized below.
        let queued = unsafe { result::memcpy_htod_async(self.pointer(), bytes, gpu.stream.cu_stream()) };
        let done = queued.and_then(|()| gpu.stream.synchronize());
        done.map_err(|e| gpu.failure(&format!("cannot take {} from the host", Bytes(bytes.len() as u64)), e))
    }

    /// Copies the start of the region to `bytes`, in the order of the compute stream.
    ///
    /// # Panics
    /// The region is shorter.
    pub fn read(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.len, "a read beyond its region");
        let gpu = self.gpu();
        gpu.bind()?;
        let len = bytes.len();
        // SAFETY: the region is that long, and `bytes` stay until the stream is synchronized below.
        let queued = unsafe { result::memcpy_dtoh_async(bytes, self.pointer(), gpu.stream.cu_stream()) };
        let done = queued.and_then(|()| gpu.stream.synchronize());
        done.map_err(|e| gpu.failure(&format!("cannot give {} to the host", Bytes(len as u64)), e))
    }

    /// Queues zeros for the whole region.
    pub fn clear(&self) -> Result<()> {
        let gpu = self.gpu();
        gpu.bind()?;
        // SAFETY: the region is that long.
        let queued = unsafe { result::memset_d8_async(self.pointer(), 0, self.len, gpu.stream.cu_stream()) };
        queued.map_err(|e| gpu.failure("cannot clear memory", e))
    }

    /// Queues `word` for each u32 of the region.
    pub fn fill(&self, word: u32) -> Result<()> {
        let gpu = self.gpu();
        gpu.bind()?;
        // SAFETY: the region is that long, and regions of words start on a multiple of their size.
        let queued = unsafe {
            sys::cuMemsetD32Async(self.pointer(), word, self.len / size_of::<u32>(), gpu.stream.cu_stream()).result()
        };
        queued.map_err(|e| gpu.failure("cannot fill memory", e))
    }

    /// Queues a copy of the bytes `range` of `pinned` on the copy stream;
    /// the compute stream goes on behind it. Until an event that is recorded
    /// later is reached, the caller keeps `pinned` and leaves it unchanged.
    ///
    /// # Panics
    /// The region or `pinned` is shorter.
    pub fn write_from(&self, pinned: &Pinned, range: Range<usize>) -> Result<()> {
        let len = range.len();
        assert!(len <= self.len, "a write beyond its region");
        let gpu = self.gpu();
        gpu.bind()?;
        // SAFETY: both are that long; the memory of `pinned` stays until the GPU is idle (`Pinned::drop`).
        let queued = unsafe { result::memcpy_htod_async(self.pointer(), &pinned[range], gpu.copies.cu_stream()) };
        let done = queued.and_then(|()| gpu.stream.join(&gpu.copies));
        done.map_err(|e| gpu.failure(&format!("cannot take {} from the host", Bytes(len as u64)), e))
    }

    /// Queues a copy of the region's first bytes to `pinned` from `offset` on,
    /// on the compute stream; the same care is needed as for [`Region::write_from`].
    ///
    /// # Panics
    /// `pinned` ends before.
    pub fn read_to(&self, pinned: &mut Pinned, offset: usize) -> Result<()> {
        let gpu = self.gpu();
        gpu.bind()?;
        let bytes = &mut pinned[offset..offset + self.len];
        // SAFETY: both are that long; the memory of `pinned` stays until the GPU is idle (`Pinned::drop`).
        let queued = unsafe { result::memcpy_dtoh_async(bytes, self.pointer(), gpu.stream.cu_stream()) };
        queued.map_err(|e| gpu.failure("cannot give bytes to the host", e))
    }

    /// Queues a copy of all of `source`, which may be on another GPU: it waits
    /// for what was queued there, and what is queued there later waits for it.
    ///
    /// # Panics
    /// The region is shorter.
    pub fn copy_from(&self, source: &Self) -> Result<()> {
        assert!(source.len <= self.len, "a copy beyond its region");
        let (gpu, other) = (self.gpu(), source.gpu());
        gpu.bind()?;
        let copied = gpu.stream.join(&other.stream).and_then(|()| {
            let (to, from) = (gpu.context.cu_ctx(), other.context.cu_ctx());
            // SAFETY: both regions are that long, and each belongs to the context that is named with it.
            unsafe {
                result::memcpy_peer_async(
                    to,
                    self.pointer(),
                    from,
                    source.pointer(),
                    source.len,
                    gpu.stream.cu_stream(),
                )
            }
        });
        let done = copied.and_then(|()| other.stream.join(&gpu.stream));
        done.map_err(|e| gpu.failure(&format!("cannot copy from {}", other.id()), e))
    }
}

/// Page-locked host memory: copies from and to it run beside the host's work.
pub struct Pinned {
    gpu: Arc<Gpu>,
    pointer: *mut u8,
    len: usize,
}

// SAFETY: the memory is the host's own, and this is its only handle.
unsafe impl Send for Pinned {}

impl std::ops::Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes were allocated there and written, and nothing else refers to them.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }
}

impl std::ops::DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes were allocated there and written, and nothing else refers to them.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.context.bind_to_thread().is_ok() {
            let _ = self.gpu.synchronize();
            // SAFETY: allocated by `Gpu::allocate_pinned` and freed here only, with no copy under way.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}
