//! NVIDIA GPUs, through the driver alone: the library is opened at run time,
//! and a machine without it has no GPUs.
#![expect(unsafe_code, reason = "asking whether the driver's library is there opens it")]

use cudarc::driver::{CudaContext, DriverError};

use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::plan::{Bandwidth, Device};

/// The GPUs that the driver shows, in its order; none where there is no driver
/// or it fails.
pub fn devices() -> Vec<Device> {
    // SAFETY: opens and closes the driver's library, whose initialization has no preconditions.
    if unsafe { cudarc::driver::sys::is_culib_present() } { list().unwrap_or_default() } else { Vec::new() }
}

fn list() -> Result<Vec<Device>, DriverError> {
    let count = CudaContext::device_count()?;
    (0..u32::try_from(count).unwrap_or(0))
        .map(|index| {
            let context = CudaContext::new(index as usize)?;
            let (free, total) = context.mem_get_info()?;
            let name = context.name()?;
            Ok(Device {
                id: DeviceId::Cuda(index),
                bandwidth: Bandwidth::of_gpu(&name),
                name: Some(name),
                free: Bytes(free as u64),
                total: Bytes(total as u64),
            })
        })
        .collect()
}
