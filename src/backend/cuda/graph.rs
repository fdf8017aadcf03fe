//! Launches that are kept, to be repeated in one call.
#![expect(unsafe_code, reason = "cudarc's graph is bound to a thread")]

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::driver::Gpu;
use crate::error::Result;

/// Launches on the compute stream of a GPU. Whoever keeps it keeps what they were given.
pub(super) struct Graph(CudaGraph);

// SAFETY: the driver asks only that a graph is not used by two threads at once, and this is its only handle.
unsafe impl Send for Graph {}

impl Gpu {
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
    ///
    /// # Errors
    /// The driver fails.
    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        graph.0.launch().map_err(|e| self.failure("cannot repeat the launches of a step", e))
    }
}
