//! Contexts, memory and copies: with launches, all here that the compiler cannot check.
//!
//! A [`Gpu`] owns its context and two streams; a `Buffer` is device memory that
//! is given back when it is dropped; a [`Region`] is a part of one, and no copy or
//! launch reaches beyond it. Page-locked memory belongs to the copy that is on its way.
#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, result, sys};

use super::fault;
use crate::bytes::Bytes;
use crate::device::{DeviceError, DeviceId};
use crate::error::{Error, ErrorKind, Hint, Result, Setting};
use crate::footprint::{WORD, aligned};
use crate::pool::lock;
use crate::random::Draws;

/// What a GPU that fails later than it is told has done.
const FAILED: &str = "has failed at work that was queued";

/// Memory of every context can be copied from page-locked memory that is allocated with this flag.
const PORTABLE: u32 = 1;

/// The version of CUDA that the driver is for, as 1000 · major + 10 · minor; `None` where there is no driver.
pub fn driver_version() -> Result<Option<i32>, DriverError> {
    static IS_THERE: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens and closes the driver's library, whose initialization has no preconditions.
    if !IS_THERE.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Ok(None);
    }
    let mut version = 0;
    // SAFETY: writes one int, to a variable that outlives the call.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(Some(version))
}

/// The number of GPUs that the driver, which is there, shows.
pub fn count() -> Result<u32, DriverError> {
    let count = result::init().and_then(|()| CudaContext::device_count())?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// What the driver tells of a GPU without a context.
#[derive(Clone, Copy)]
pub struct Handle(sys::CUdevice);

impl Handle {
    pub fn new(index: u32) -> Result<Self, DriverError> {
        result::device::get(index.cast_signed()).map(Self)
    }

    pub fn name(self) -> Result<String, DriverError> {
        result::device::get_name(self.0)
    }

    /// Of an instance of a divided GPU, that of the instance.
    pub fn uuid(self) -> Result<[u8; 16], DriverError> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes 16 bytes, to a variable that outlives the call.
        unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, self.0) }.result()?;
        Ok(uuid.bytes.map(i8::cast_unsigned))
    }

    pub fn total(self) -> Result<Bytes, DriverError> {
        let mut bytes = 0;
        // SAFETY: writes one size, to a variable that outlives the call.
        unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, self.0) }.result()?;
        Ok(Bytes(bytes as u64))
    }

    /// Zero where the driver does not know it.
    pub fn attribute(self, attribute: CUdevice_attribute) -> u64 {
        // SAFETY: `attribute` is one of the driver's, and the device one that it gave.
        let value = unsafe { result::device::get_attribute(self.0, attribute) };
        u64::try_from(value.unwrap_or(0)).unwrap_or(0)
    }
}

/// The context of a GPU, of which this process has one while anyone keeps it.
pub fn context(index: u32) -> Result<Arc<CudaContext>, DriverError> {
    type Slot = Arc<Mutex<Weak<CudaContext>>>;
    static CONTEXTS: Mutex<BTreeMap<u32, Slot>> = Mutex::new(BTreeMap::new());
    // Those of several GPUs are opened at once.
    let slot = Arc::clone(lock(&CONTEXTS).entry(index).or_default());
    let mut open = lock(&slot);
    if let Some(context) = open.upgrade() {
        return Ok(context);
    }
    let context = CudaContext::new(index as usize)?;
    *open = Arc::downgrade(&context);
    Ok(context)
}

/// Why PTX could not be compiled or loaded, and what the compiler says.
pub struct LinkError {
    pub error: DriverError,
    pub log: String,
}

impl From<DriverError> for LinkError {
    fn from(error: DriverError) -> Self {
        Self { error, log: String::new() }
    }
}

/// Compiles PTX for the GPU of a context.
pub fn link(context: &CudaContext, name: &str, ptx: &str) -> Result<Vec<u8>, LinkError> {
    const LOG: usize = 8 << 10;
    use sys::CUjit_option::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    context.bind_to_thread()?;
    let mut log = vec![0u8; LOG];
    let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(LOG)];
    let name = CString::new(name).unwrap_or_default();
    let text = CString::new(ptx).unwrap_or_default();
    let len = text.as_bytes_with_nul().len();
    let mut state = std::ptr::null_mut();
    // SAFETY: the context is bound. The log, its options and the state outlive the linking, which ends below.
    unsafe { sys::cuLinkCreate_v2(2, options.as_mut_ptr(), values.as_mut_ptr(), &raw mut state).result() }?;
    let (mut code, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: the text is as long as is said, ends with a zero and is only read; both outputs outlive the call.
    let linked = unsafe {
        let (kind, data) = (sys::CUjitInputType::CU_JIT_INPUT_PTX, text.as_ptr().cast_mut().cast());
        let added =
            sys::cuLinkAddData_v2(state, kind, data, len, name.as_ptr(), 0, std::ptr::null_mut(), std::ptr::null_mut());
        added.result().and_then(|()| sys::cuLinkComplete(state, &raw mut code, &raw mut size).result())
    };
    let linked = linked.map(|()| {
        // SAFETY: the driver owns that many bytes until the linking ends.
        unsafe { std::slice::from_raw_parts(code.cast::<u8>(), size) }.to_vec()
    });
    // SAFETY: made above, and ended here only.
    let _ = unsafe { sys::cuLinkDestroy(state).result() };
    linked.map_err(|error| {
        let text = log.split(|byte| *byte == 0).next().unwrap_or_default();
        LinkError { error, log: String::from_utf8_lossy(text).trim().to_owned() }
    })
}

/// A GPU with its context, its streams and its kernels.
pub struct Gpu {
    index: u32,
    pub(super) context: Arc<CudaContext>,
    /// That whose kernels it runs.
    pub(super) capability: (i32, i32),
    pub(super) stream: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    /// Those that are loaded, by the number of each.
    pub(super) functions: BTreeMap<usize, CudaFunction>,
    /// The GPUs from which copies go through the host.
    through_host: Mutex<BTreeSet<u32>>,
    /// How many blocks of a kernel run at once, by its number and that of a block's threads.
    pub(super) at_once: Mutex<BTreeMap<(usize, u32), usize>>,
    /// What launches are given while they are captured.
    pub(super) captured: Mutex<Option<Vec<Region>>>,
    /// The numbers of those that are launched, while someone asks.
    pub(super) launched: Mutex<Option<BTreeSet<usize>>>,
    pub(super) multiprocessors: usize,
}

impl Gpu {
    /// Opens a GPU for memory and copies alone, which takes the driver less time.
    pub(super) fn without_kernels(index: u32) -> Result<Self> {
        let id = DeviceId::Cuda(index);
        let failed = |what: &str, e| failure(id, what, e);
        let driver = driver_version().map_err(|e| failed("cannot be opened", e))?;
        let count = driver.map_or(Ok(0), |_| count()).map_err(|e| failed("cannot be opened", e))?;
        if index >= count {
            return Err(Error::does_not_fit(DeviceError::Absent(id)));
        }
        let context = context(index).map_err(|e| failed("cannot be opened", e))?;
        let streams = || context.new_stream().map_err(|e| failed("cannot make a stream", e));
        let (stream, copies) = (streams()?, streams()?);
        let capability = context.compute_capability().map_err(|e| failed("does not tell its compute capability", e))?;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors =
            context.attribute(attribute).map_err(|e| failed("does not tell its number of multiprocessors", e))?;
        let multiprocessors = usize::try_from(multiprocessors).unwrap_or(0).max(1);
        Ok(Self {
            index,
            context,
            capability,
            stream,
            copies,
            functions: BTreeMap::new(),
            through_host: Mutex::default(),
            at_once: Mutex::default(),
            captured: Mutex::default(),
            launched: Mutex::default(),
            multiprocessors,
        })
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
    pub fn allocate(self: &Arc<Self>, what: &str, len: Bytes) -> Result<Region> {
        let refused = |why: String| {
            let free = self.memory().ok().map(|(free, _)| free);
            let (device, what) = (self.id(), what.to_owned());
            let refused = DeviceError::Refused { device, needed: len, free, what, why };
            Error::new(ErrorKind::Shortfall, refused).hint(replan())
        };
        let bytes = len.as_usize().ok_or_else(|| refused("more than can be addressed".to_owned()))?;
        self.bind()?;
        // SAFETY: the context is bound; the pointer is freed once, in `Buffer::drop`.
        let pointer = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| refused(fault::name(e)))?;
        let buffer = Arc::new(Buffer { gpu: Arc::clone(self), pointer });
        Ok(Region { buffer, offset: 0, len: bytes })
    }

    /// Allocates `len` bytes of page-locked host memory, zeroed.
    pub fn allocate_pinned(self: &Arc<Self>, len: usize) -> Result<Pinned> {
        self.bind()?;
        // SAFETY: the context is bound; the pointer is freed once, in `Pinned::drop`.
        let pointer = unsafe { result::malloc_host(len.max(1), PORTABLE) }.map_err(|e| {
            let what = format!("cannot take {} of page-locked host memory: {}", Bytes(len as u64), fault::name(e));
            Error::new(ErrorKind::Shortfall, what).hint(replan())
        })?;
        // SAFETY: that many bytes were just allocated.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, len) };
        Ok(Pinned { gpu: Arc::clone(self), pointer: pointer.cast(), len })
    }

    /// Takes what a kernel's code takes of the GPU, which the driver would leave for its first launch.
    pub(super) fn load_now(&self, function: &CudaFunction) -> Result<(), DriverError> {
        self.context.bind_to_thread()?;
        // SAFETY: the function is of a module that was loaded in the bound context.
        unsafe { sys::cuFuncLoad(function.cu_function()).result() }
    }

    /// Waits until everything that was queued is done.
    pub fn synchronize(&self) -> Result<()> {
        self.context.synchronize().map_err(|e| self.failure(FAILED, e))
    }

    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.failure("cannot be used", e))
    }

    pub(super) fn failure(&self, what: &str, error: DriverError) -> Error {
        failure(self.id(), what, error)
    }
}

/// Whatever was refused for want of memory is a shortfall.
fn failure(device: DeviceId, what: &str, error: DriverError) -> Error {
    let failed = DeviceError::Failed(device, format!("{what}: {}", fault::name(error)));
    if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return Error::new(ErrorKind::Shortfall, failed).hint(replan());
    }
    fault::hint(error).into_iter().fold(Error::device(failed), Error::hint)
}

fn replan() -> Hint {
    Hint::naming("{} plans again with what is left", [Setting::Replan])
}

/// Memory of a GPU.
struct Buffer {
    gpu: Arc<Gpu>,
    pointer: sys::CUdeviceptr,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // A context that has failed does no more work, and takes the memory with it.
        let _ = self.gpu.synchronize();
        // An error of something else may stand in the way of the first.
        if self.gpu.bind().or_else(|_| self.gpu.bind()).is_ok() {
            // SAFETY: allocated by `Gpu::allocate` and freed here only; the work that was queued on it is done.
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
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.len
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
    ///
    /// # Panics
    /// The region is none of whole words.
    pub fn fill(&self, word: u32) -> Result<()> {
        assert!(self.offset.is_multiple_of(WORD) && self.len.is_multiple_of(WORD), "words in a region of bytes");
        let gpu = self.gpu();
        gpu.bind()?;
        // SAFETY: the region is that long, and starts on a multiple of a word.
        let queued =
            unsafe { sys::cuMemsetD32Async(self.pointer(), word, self.len / WORD, gpu.stream.cu_stream()).result() };
        queued.map_err(|e| gpu.failure("cannot fill memory", e))
    }

    /// Queues a copy of the bytes `range` of `pinned` on the copy stream;
    /// the compute stream goes on behind it.
    ///
    /// # Panics
    /// The region or `pinned` is shorter.
    pub fn write_from(&self, pinned: Pinned, range: Range<usize>) -> Result<Copying> {
        let len = range.len();
        assert!(len <= self.len, "a write beyond its region");
        let (gpu, bytes) = (self.gpu(), &pinned[range]);
        gpu.bind()?;
        // SAFETY: both are that long; `Copying` keeps `pinned` until the copy is done.
        let queued = unsafe { result::memcpy_htod_async(self.pointer(), bytes, gpu.copies.cu_stream()) };
        let queued = queued.and_then(|()| gpu.stream.join(&gpu.copies));
        Copying::on(gpu, &gpu.copies, pinned, queued, Wait::Sleep)
            .map_err(|e| gpu.failure(&format!("cannot take {} from the host", Bytes(len as u64)), e))
    }

    /// Queues a copy of the start of `pinned` to the whole region on the compute stream.
    ///
    /// # Panics
    /// `pinned` is shorter.
    pub fn write_behind(&self, pinned: Pinned) -> Result<Copying> {
        let gpu = self.gpu();
        gpu.bind()?;
        let bytes = &pinned[..self.len];
        // SAFETY: both are that long; `Copying` keeps `pinned` until the copy is done.
        let queued = unsafe { result::memcpy_htod_async(self.pointer(), bytes, gpu.stream.cu_stream()) };
        Copying::on(gpu, &gpu.stream, pinned, queued, Wait::Spin)
            .map_err(|e| gpu.failure("cannot take bytes from the host", e))
    }

    /// Queues a copy of the region to the start of `pinned` on the compute stream.
    ///
    /// # Panics
    /// `pinned` is shorter.
    pub fn read_to(&self, mut pinned: Pinned) -> Result<Copying> {
        let gpu = self.gpu();
        gpu.bind()?;
        let bytes = &mut pinned[..self.len];
        // SAFETY: both are that long; `Copying` keeps `pinned` until the copy is done.
        let queued = unsafe { result::memcpy_dtoh_async(bytes, self.pointer(), gpu.stream.cu_stream()) };
        Copying::on(gpu, &gpu.stream, pinned, queued, Wait::Spin)
            .map_err(|e| gpu.failure("cannot give bytes to the host", e))
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
        if lock(&gpu.through_host).contains(&other.index) {
            let mut bytes = vec![0; source.len];
            return source.read(&mut bytes).and_then(|()| self.write(&bytes));
        }
        let joined = gpu.stream.join(&other.stream);
        // What joins binds the other context on the way.
        gpu.bind()?;
        let copied = joined.and_then(|()| {
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

impl Region {
    /// Whether a pattern arrives whole from the start of `source`, which it overwrites as the start of this region.
    /// Some machines lose what goes from one GPU to another; where it is lost, copies go through the host from now on.
    pub fn check_copies_from(&self, source: &Self) -> Result<bool> {
        const PATTERN: usize = 64 << 10;
        let len = PATTERN.min(self.len).min(source.len);
        let mut draws = Draws::new(u64::from(self.gpu().index) << 32 | u64::from(source.gpu().index));
        let sent: Vec<u8> = (0..len).map(|_| draws.draw().to_le_bytes()[0]).collect();
        let mut arrived = vec![0; len];
        source.write(&sent)?;
        self.part(0, len).clear()?;
        self.part(0, len).copy_from(&source.part(0, len))?;
        self.read(&mut arrived)?;
        if arrived != sent {
            lock(&self.gpu().through_host).insert(source.gpu().index);
        }
        Ok(arrived == sent)
    }
}

/// Regions of `sizes` bytes on a GPU, for `what`: parts of one buffer, each [`aligned`] in it, or a
/// buffer each, so that reading beyond one is noticed.
pub fn arena(gpu: &Arc<Gpu>, what: &str, sizes: &[Bytes], separate: bool) -> Result<Vec<Region>> {
    let len = |size: Bytes| size.as_usize().unwrap_or(usize::MAX);
    if separate {
        return sizes.iter().map(|size| gpu.allocate(what, *size)).collect();
    }
    if sizes.is_empty() {
        return Ok(Vec::new());
    }
    let whole = gpu.allocate(what, sizes.iter().map(|size| aligned(size.0)).sum())?;
    let mut start = Bytes::ZERO;
    let part = |size: &Bytes| {
        let region = whole.part(len(start), len(*size));
        start += aligned(size.0);
        region
    };
    Ok(sizes.iter().map(part).collect())
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
        // SAFETY: `len` bytes were allocated there and written; a copy that is under way owns its `Pinned`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }
}

impl std::ops::DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes were allocated there and written; a copy that is under way owns its `Pinned`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: allocated by `Gpu::allocate_pinned` and freed here only; `Copying` waits before it drops one.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}

/// Page-locked memory on whose way to or from a GPU a copy is: nobody has it before that is done.
pub struct Copying {
    /// That which copies.
    gpu: Arc<Gpu>,
    /// There until it is given back.
    pinned: Option<Pinned>,
    done: CudaEvent,
}

/// How the host waits for a copy.
#[derive(Clone, Copy)]
enum Wait {
    /// It leaves the processor to others.
    Sleep,
    /// It is told at once.
    Spin,
}

impl Copying {
    /// The copy that `stream` was given last, where it could be queued.
    fn on(
        gpu: &Arc<Gpu>,
        stream: &CudaStream,
        pinned: Pinned,
        queued: Result<(), DriverError>,
        wait: Wait,
    ) -> Result<Self, DriverError> {
        let flags = match wait {
            Wait::Sleep => CUevent_flags::CU_EVENT_BLOCKING_SYNC,
            Wait::Spin => CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        match queued.and_then(|()| stream.record_event(Some(flags))) {
            Ok(done) => Ok(Self { gpu: Arc::clone(gpu), pinned: Some(pinned), done }),
            Err(error) => {
                // Something may be under way all the same, and the memory is freed next.
                let _ = gpu.synchronize();
                Err(error)
            }
        }
    }

    /// Waits for the copy, and gives the memory back.
    pub fn finish(mut self) -> Result<Pinned> {
        self.done.synchronize().map_err(|e| self.gpu.failure(FAILED, e))?;
        let Some(pinned) = self.pinned.take() else { unreachable!("a copy is finished once") };
        Ok(pinned)
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        if self.pinned.is_some() {
            // The memory is freed next.
            let _ = self.gpu.synchronize();
        }
    }
}
