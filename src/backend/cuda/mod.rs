//! NVIDIA GPUs, through the driver alone: the library is opened at run time,
//! and a machine without it has no GPUs.
//!
//! | file | what |
//! | --- | --- |
//! | `driver.rs` | contexts, memory, copies |
//! | `kernels.rs` | a typed launch for each kernel of `kernels/*.cu` |
//! | `choice.rs` | the launches that choose a token |
//! | `launch.rs` | launches, and those that are repeated in one call; with `driver.rs` all that is unsafe |
//! | `product.rs` | launches of products |
//! | `operands.rs` | what they are given: matrices, norms, caches |
//! | `repeat.rs` | launches that come again and again |
//! | `stage.rs` | a run of modules on one GPU |
//! | `workspace.rs` | the buffers of a step |
//! | `upload.rs` | rows from the host into the canonical packing |

mod choice;
mod driver;
mod kernels;
mod launch;
mod operands;
mod product;
mod repeat;
mod stage;
mod upload;
mod workspace;

pub use choice::Choosing;
pub use driver::{Buffer, Gpu, Pinned, Region};
pub use operands::{Affine, Attention, Cache, DeviceMatrix, Input, MAX_HEAD_DIM, Norm, Output, Scratch};
pub use stage::{CudaStage, Parameters};
pub use upload::{InFlight, Upload};
pub use workspace::Workspace;

use std::sync::Arc;
use std::time::Instant;

use crate::bytes::Bytes;
use crate::error::Result;
use crate::machine::{Bandwidth, Device, NEEDED_CAPABILITY, NEEDED_CUDA};

/// A GPU that the driver shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its name in maps, and its memory.
    pub device: Device,
    /// Its name among all GPUs, as `nvidia-smi -L` shows it.
    pub uuid: String,
    /// Its compute capability, major and minor.
    pub capability: (i32, i32),
}

/// The driver and its GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// The version of CUDA that the driver is for, major and minor.
    pub version: (i32, i32),
    /// The GPUs, in the driver's order.
    pub gpus: Vec<GpuInfo>,
}

impl Installation {
    /// What is there; `None` where there is no driver.
    pub fn find() -> Option<Self> {
        let (count, version) = driver::driver()?;
        let gpus = (0..count).filter_map(|index| driver::describe(index).ok()).collect();
        Some(Self { version: (version / 1000, version % 1000 / 10), gpus })
    }

    /// Whether the kernels run on a GPU: neither it nor the driver is too old.
    pub fn can_use(&self, gpu: &GpuInfo) -> bool {
        self.version.0 * 1000 + self.version.1 * 10 >= NEEDED_CUDA && gpu.capability >= NEEDED_CAPABILITY
    }
}

/// The GPUs that can be used, in the driver's order, and those that cannot; none where there is no driver.
pub fn devices() -> (Vec<Device>, Vec<Device>) {
    let Some(installation) = Installation::find() else { return (Vec::new(), Vec::new()) };
    let (usable, idle): (Vec<_>, Vec<_>) = installation.gpus.iter().partition(|gpu| installation.can_use(gpu));
    let devices = |gpus: Vec<&GpuInfo>| gpus.into_iter().map(|gpu| gpu.device.clone()).collect();
    (devices(usable), devices(idle))
}

/// How fast the GPU at `index` copies within its memory, which it reads and writes for that.
pub fn measure_bandwidth(index: u32) -> Result<Bandwidth> {
    const PROBE: usize = 256 << 20;
    let gpu = Arc::new(Gpu::without_kernels(index)?);
    let size = Bytes(PROBE as u64);
    let regions = arena(&gpu, "a probe of its bandwidth", &[size, size], true)?;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        regions[0].clear()?;
        gpu.synchronize()?;
        let start = Instant::now();
        regions[1].copy_from(&regions[0])?;
        gpu.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(Bandwidth::measured(2 * PROBE, best))
}

/// Regions of `sizes` bytes on a GPU, for `what`: parts of one buffer, or a
/// buffer each, so that reading beyond one is noticed.
pub fn arena(gpu: &Arc<Gpu>, what: &str, sizes: &[Bytes], separate: bool) -> Result<Vec<Region>> {
    let len = |size: &Bytes| size.as_usize().unwrap_or(usize::MAX);
    if separate {
        return sizes.iter().map(|size| Ok(Region::new(&gpu.allocate(what, *size)?, 0, len(size)))).collect();
    }
    if sizes.is_empty() {
        return Ok(Vec::new());
    }
    let total: Bytes = sizes.iter().copied().sum();
    let buffer = gpu.allocate(what, total)?;
    let mut offset = 0;
    let mut next = |size: &Bytes| {
        offset += len(size);
        Region::new(&buffer, offset - len(size), len(size))
    };
    Ok(sizes.iter().map(&mut next).collect())
}
