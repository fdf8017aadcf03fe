//! The driver that is installed, and its GPUs.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{CudaContext, DriverError};

use super::driver::{Gpu, arena, driver};
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::error::Result;
use crate::footprint::CUDA_CONTEXT;
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
        let (count, version) = driver()?;
        let gpus = (0..count).filter_map(|index| describe(index).ok()).collect();
        Some(Self { version: (version / 1000, version % 1000 / 10), gpus })
    }

    /// Whether the kernels run on a GPU: neither it nor the driver is too old.
    pub fn can_use(&self, gpu: &GpuInfo) -> bool {
        self.version.0 * 1000 + self.version.1 * 10 >= NEEDED_CUDA && gpu.capability >= NEEDED_CAPABILITY
    }
}

/// What the GPU at `index` is. What this process's context takes of it counts
/// as free: the plan counts that itself.
fn describe(index: u32) -> Result<GpuInfo, DriverError> {
    let context = CudaContext::new(index as usize)?;
    let (free, total) = context.mem_get_info()?;
    let (id, total) = (DeviceId::Cuda(index), Bytes(total as u64));
    let free = (Bytes(free as u64) + CUDA_CONTEXT).min(total);
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
