//! Launches of kernels, one by one, or kept to be repeated in one call.
#![expect(unsafe_code, reason = "the driver's interface is C, and cudarc's graph is bound to a thread")]

use std::ffi::c_void;
use std::ops::Range;

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};

use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::{EARLY, Kernel};
use crate::backend::cuda::operands::DeviceMatrix;
use crate::error::{Error, Result};
use crate::model_config::Activation;
use crate::pool::lock;
use crate::quant::{Storage, WeightDtype};

/// What a kernel is given: a region by the pointer to its start.
#[derive(Clone, Copy)]
pub enum Argument<'a> {
    Region(&'a Region),
    /// From a byte of a region on.
    From(&'a Region, u64),
    Null,
    I32(i32),
    F32(f32),
}

impl<'a> Argument<'a> {
    /// A dimension. Configurations allow none above 2^28.
    pub fn int(n: usize) -> Self {
        Self::I32(i32::try_from(n).unwrap_or_else(|_| unreachable!("a dimension of {n}")))
    }

    pub fn optional(region: Option<&'a Region>) -> Self {
        region.map_or(Self::Null, Self::Region)
    }

    /// Codes, sub-scales and scales of a matrix from `row` on; null for those that its storage has not.
    pub fn sections(matrix: &'a DeviceMatrix, row: usize) -> [Self; 3] {
        let DeviceMatrix { layout, region } = matrix;
        let mut bytes = layout.row_bytes.into_iter();
        layout.sections(row).map(|at| {
            assert!(at <= region.len() as u64, "a row beyond its matrix");
            if bytes.next() == Some(0) { Self::Null } else { Self::From(region, at) }
        })
    }

    /// The elements at `range` of a plain vector, and their dtype; null where there is none.
    pub fn vector(matrix: Option<&'a DeviceMatrix>, range: Range<usize>) -> [Self; 2] {
        let Some(DeviceMatrix { layout, region }) = matrix else { return [Self::Null, Self::I32(0)] };
        let Storage::Plain(dtype) = layout.storage else { unreachable!("norms and biases are plain") };
        assert!(range.end <= layout.rows * layout.cols, "a vector that is too short");
        [Self::From(region, (range.start * dtype.size()) as u64), Self::dtype(dtype)]
    }

    pub fn dtype(dtype: WeightDtype) -> Self {
        Self::storage(Storage::Plain(dtype))
    }

    pub fn storage(storage: Storage) -> Self {
        Self::I32(match storage {
            Storage::Plain(WeightDtype::Bf16) => 0,
            Storage::Plain(WeightDtype::F16) => 1,
            Storage::Plain(WeightDtype::F32) => 2,
            Storage::Int8 => 3,
            Storage::Int4 => 4,
            Storage::Nl4 => 5,
        })
    }

    pub fn activation(activation: Option<Activation>) -> Self {
        Self::I32(match activation {
            None => -1,
            Some(Activation::Silu) => 0,
            Some(Activation::GeluTanh) => 1,
            Some(Activation::Gelu) => 2,
            Some(Activation::QuickGelu) => 3,
            Some(Activation::Relu) => 4,
        })
    }
}

/// Launches on the compute stream of a GPU.
pub struct Graph {
    graph: CudaGraph,
    /// What the launches were given.
    _regions: Vec<Region>,
}

// SAFETY: the driver asks only that a graph is not used by two threads at once, and this is its only handle.
unsafe impl Send for Graph {}

impl Gpu {
    /// Queues a kernel on the compute stream: `grid` blocks of `threads` threads.
    ///
    /// Who calls it stands beside the kernel and answers for the arguments: they are those of
    /// its declaration, and the regions as large as it says.
    pub(super) fn launch(
        &self,
        kernel: Kernel,
        grid: (usize, usize),
        threads: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        let what = || format!("cannot run the kernel `{kernel:?}`");
        let dimension =
            |n| u32::try_from(n).map_err(|_| Error::input(format!("{} {}: its grid is too large", self.id(), what())));
        let grid = (dimension(grid.0)?, dimension(grid.1)?);
        let mut values: Vec<u64> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Region(region) => region.pointer(),
                Argument::From(region, at) => region.pointer() + at,
                Argument::Null => 0,
                Argument::I32(number) => u64::from(number.cast_unsigned()),
                Argument::F32(number) => u64::from(number.to_bits()),
            })
            .collect();
        if let Some(captured) = &mut *lock(&self.captured) {
            let region = |argument: &Argument| match argument {
                Argument::Region(region) | Argument::From(region, _) => Some((*region).clone()),
                Argument::Null | Argument::I32(_) | Argument::F32(_) => None,
            };
            captured.extend(arguments.iter().filter_map(region));
        }
        if let Some(launched) = &mut *lock(&self.launched) {
            launched.insert(kernel as usize);
        }
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        self.bind()?;
        let function = self.function(kernel).cu_function();
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0,
            gridDimY: grid.1,
            gridDimZ: 1,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(self.capability >= EARLY),
        };
        // SAFETY: the function is loaded in the bound context, and each argument points to at least
        // as many little-endian bytes as the kernel reads. Regions outlive the launch: a buffer is
        // freed only when the GPU is idle, and a graph keeps its own. The configuration outlives the call.
        let launched =
            unsafe { sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        launched.result().map_err(|e| self.failure(&what(), e))
    }

    /// The most blocks of `threads` threads of a kernel that run at once.
    pub(super) fn blocks_at_once(&self, kernel: Kernel, threads: u32) -> Result<usize> {
        let key = (kernel as usize, threads);
        if let Some(known) = lock(&self.at_once).get(&key) {
            return Ok(*known);
        }
        self.bind()?;
        let each = self.function(kernel).occupancy_max_active_blocks_per_multiprocessor(threads, 0, None);
        let failed = |e| self.failure(&format!("does not tell how much of `{kernel:?}` it runs at once"), e);
        let each = each.map_err(failed)?;
        let blocks = self.multiprocessors * each.max(1) as usize;
        lock(&self.at_once).insert(key, blocks);
        Ok(blocks)
    }

    /// Keeps the launches that `queue` would queue, and queues nothing. `queue` does nothing else, and waits for nothing.
    /// The graph has taken all of the GPU that it will.
    pub(in crate::backend::cuda) fn capture(&self, queue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let captured = || lock(&self.captured);
        let failed = |e| self.failure("cannot keep the launches of a step", e);
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
        *captured() = Some(Vec::new());
        let queued = queue();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        let regions = captured().take().unwrap_or_default();
        queued?;
        let graph = graph.map_err(failed)?.ok_or_else(|| Error::device(format!("{} kept no launches", self.id())))?;
        graph.upload().and_then(|()| self.stream.synchronize()).map_err(failed)?;
        Ok(Graph { graph, _regions: regions })
    }

    /// Queues the launches of a graph.
    pub(in crate::backend::cuda) fn replay(&self, graph: &Graph) -> Result<()> {
        graph.graph.launch().map_err(|e| self.failure("cannot repeat the launches of a step", e))
    }
}
