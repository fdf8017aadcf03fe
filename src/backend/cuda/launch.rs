//! Launches of kernels, one by one, or kept to be repeated in one call.
#![expect(unsafe_code, reason = "the driver's interface is C, and cudarc's graph is bound to a thread")]

use std::borrow::Cow;
use std::ffi::c_void;

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::driver::{Gpu, Region};
use crate::error::{Error, Result};

/// The first compute capability that begins a kernel while the one before it ends.
const EARLY: (i32, i32) = (9, 0);
/// What makes comments of the instructions for that; common.cuh writes it.
const EARLY_MARK: &str = "//sm_90 ";

/// The PTX of a file for a GPU of `capability`: with the instructions that it has, and the file's own has not.
pub(super) fn ptx_for(ptx: &'static str, capability: (i32, i32)) -> Cow<'static, str> {
    if capability < EARLY {
        return ptx.into();
    }
    let target = |line: &str| {
        if line.starts_with(".target ") { ".target sm_90".to_owned() } else { line.replace(EARLY_MARK, "") }
    };
    ptx.lines().map(target).collect::<Vec<_>>().join("\n").into()
}

/// What a kernel is given.
#[derive(Clone, Copy)]
pub enum Argument<'a> {
    /// A pointer to the start of a region.
    Region(&'a Region),
    /// A null pointer.
    Null,
    /// A number.
    I32(i32),
    /// A number.
    F32(f32),
}

/// Launches on the compute stream of a GPU. Whoever keeps it keeps what they were given.
pub(super) struct Graph(CudaGraph);

// SAFETY: the driver asks only that a graph is not used by two threads at once, and this is its only handle.
unsafe impl Send for Graph {}

impl Gpu {
    /// Queues a kernel on the compute stream: `grid` blocks of `threads` threads.
    ///
    /// The caller, in kernels.rs, answers for the arguments: they are those of
    /// the kernel's declaration, and the regions as large as it says.
    pub(super) fn launch(
        &self,
        kernel: &'static str,
        grid: (usize, usize),
        threads: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        let what = || format!("cannot run the kernel `{kernel}`");
        let dimension =
            |n| u32::try_from(n).map_err(|_| Error::input(format!("{} {}: its grid is too large", self.id(), what())));
        let grid = (dimension(grid.0)?, dimension(grid.1)?);
        let mut values: Vec<u64> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Region(region) => region.pointer(),
                Argument::Null => 0,
                Argument::I32(number) => u64::from(number.cast_unsigned()),
                Argument::F32(number) => u64::from(number.to_bits()),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        self.bind()?;
        let function = self.functions[kernel].cu_function();
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
        // freed by the driver only when the GPU is idle. The configuration outlives the call.
        let launched =
            unsafe { sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        launched.result().map_err(|e| self.failure(&what(), e))
    }

    /// The most blocks of `threads` threads of a kernel that run at once.
    pub(super) fn blocks_at_once(&self, kernel: &'static str, threads: u32) -> Result<usize> {
        let each = self.functions[kernel].occupancy_max_active_blocks_per_multiprocessor(threads, 0, None);
        let each =
            each.map_err(|e| self.failure(&format!("does not tell how much of `{kernel}` it runs at once"), e))?;
        Ok(self.multiprocessors * each.max(1) as usize)
    }

    /// Keeps what `queue` would queue, and queues nothing; `None` where a launch or the driver fails. `queue`
    /// waits for nothing.
    pub(super) fn capture(&self, queue: impl FnOnce() -> Result<()>) -> Option<Graph> {
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).ok()?;
        let queued = queue();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        queued.ok()?;
        graph.ok()?.map(Graph)
    }

    /// Queues the launches of a graph.
    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        graph.0.launch().map_err(|e| self.failure("cannot repeat the launches of a step", e))
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::MODULES;
    use super::*;

    #[test]
    fn every_kernel_waits_for_the_one_before_it_where_it_begins_early() {
        for module in MODULES {
            assert_eq!(ptx_for(module.ptx, (8, 9)), module.ptx, "{}", module.name);
            let early = ptx_for(module.ptx, (10, 0));
            assert_eq!(early.matches("\n.target sm_90\n").count(), 1, "{}", module.name);
            assert_eq!(early.matches(".target").count(), 1, "{}", module.name);
            let kernels: Vec<_> = early.split(".visible .entry ").skip(1).collect();
            assert_eq!(kernels.len(), module.kernels.len(), "{}", module.name);
            for kernel in kernels {
                let lines: Vec<_> = kernel.lines().map(str::trim).collect();
                for instruction in ["griddepcontrol.wait;", "griddepcontrol.launch_dependents;"] {
                    let count = lines.iter().filter(|line| **line == instruction).count();
                    assert_eq!(count, 1, "{instruction} in {}", lines[0]);
                }
            }
        }
    }
}
