//! NVIDIA GPUs, through the driver alone: the library is opened at run time,
//! and a machine without it has no GPUs.
//!
//! | file | what |
//! | --- | --- |
//! | `driver.rs` | contexts, memory, copies, launches: all that is unsafe |
//! | `kernels.rs` | a typed launch for each kernel of `kernels/*.cu` |
//! | `stage.rs` | a run of modules on one GPU |
//! | `upload.rs` | rows from the host into the canonical packing |

mod driver;
mod kernels;
mod stage;
mod upload;

pub use driver::{Buffer, Gpu, Pinned, Region};
pub use kernels::{Affine, Attention, Cache, DeviceMatrix, MAX_HEAD_DIM, Norm, Output};
pub use stage::{CudaStage, Parameters, Workspace};
pub use upload::{InFlight, Upload};

use crate::bytes::Bytes;
use crate::error::Result;
use crate::plan::Device;

/// The version of CUDA that the kernels' PTX needs of the driver, as 1000 · major + 10 · minor.
const NEEDED_VERSION: i32 = 12_040;

/// The GPUs that can be used, in the driver's order, and those that cannot; none where there is no driver.
pub fn devices() -> (Vec<Device>, Vec<Device>) {
    let Some((count, version)) = driver::driver() else {
        return (Vec::new(), Vec::new());
    };
    let (mut usable, mut idle) = (Vec::new(), Vec::new());
    for index in 0..count {
        let Ok((device, capability)) = driver::describe(index) else { continue };
        if version >= NEEDED_VERSION && capability >= (7, 5) { usable.push(device) } else { idle.push(device) }
    }
    (usable, idle)
}

/// Regions of `sizes` bytes on a GPU, for `what`: parts of one buffer, or a
/// buffer each, so that reading beyond one is noticed.
///
/// # Errors
/// The memory is not to be had.
pub fn arena(gpu: &std::sync::Arc<Gpu>, what: &str, sizes: &[Bytes], separate: bool) -> Result<Vec<Region>> {
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
