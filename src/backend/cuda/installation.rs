//! The driver that is installed, and its GPUs.

use std::ops::RangeInclusive;
use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute;

use super::driver::{Handle, context, count, driver_version};
use super::fault;
use super::occupancy::{Management, Occupant};
use crate::bytes::{Bytes, GIB, MIB};
use crate::device::DeviceId;
use crate::machine::{
    self, Bandwidth, Card, Device, Fault, Idle, Inventory, Kept, NEEDED_CAPABILITY, NEEDED_CUDA, needs,
};
use crate::name::named;

/// Who may compute on a GPU at once: its compute mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All.
    Shared,
    /// One process.
    Exclusive,
    /// Nobody.
    Prohibited,
}

named!(Mode, "a compute mode", { Shared => "shared", Exclusive => "exclusive", Prohibited => "prohibited" });

/// A GPU that the driver shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its name in maps, and its memory; nothing is free of one that cannot be used.
    pub device: Device,
    /// Its name among all GPUs, as `nvidia-smi -L` shows it.
    pub uuid: String,
    /// Where it is on the PCI bus, as `nvidia-smi` shows it, which numbers GPUs by that.
    pub bus: String,
    /// Its compute capability, major and minor.
    pub capability: (i32, i32),
    /// Its multiprocessors.
    pub multiprocessors: u64,
    /// Who may compute on it at once.
    pub mode: Mode,
    /// The processes that use it; `None` where nobody tells.
    pub occupants: Option<Vec<Occupant>>,
    /// Why it cannot be used.
    pub fault: Option<Fault>,
}

impl GpuInfo {
    fn unknown(index: u32) -> Self {
        Self {
            device: Device::new(DeviceId::Cuda(index), Bytes::ZERO),
            uuid: String::new(),
            bus: String::new(),
            capability: (0, 0),
            multiprocessors: 0,
            mode: Mode::Shared,
            occupants: None,
            fault: None,
        }
    }
}

/// The driver and its GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// The version of CUDA that the driver is for, major and minor.
    pub version: (i32, i32),
    /// The driver's own version, such as 550.54.15, where it tells.
    pub driver: Option<String>,
    /// The GPUs, in the driver's order.
    pub gpus: Vec<GpuInfo>,
    /// The contexts of those that can be used.
    pub kept: Kept,
}

impl Installation {
    /// What is there; `None` where there is no driver.
    ///
    /// # Errors
    /// There is one, and it fails.
    pub fn find() -> Result<Option<Self>, Fault> {
        let failed = |e| fault::fault("the NVIDIA driver cannot be used", e);
        let Some(version) = driver_version().map_err(failed)? else { return Ok(None) };
        let management = Management::open();
        let count = count().map_err(failed)?;
        let described: Vec<_> = (0..count).map(|index| describe(index, version, &management)).collect();
        let (gpus, contexts): (Vec<_>, Vec<_>) = described.into_iter().unzip();
        let kept = Kept::new(contexts.into_iter().flatten());
        let version = (version / 1000, version % 1000 / 10);
        Ok(Some(Self { version, driver: management.driver(), gpus, kept }))
    }

    /// Puts the GPUs into an inventory.
    pub fn list(self, inventory: &mut Inventory) {
        for GpuInfo { device, fault, .. } in self.gpus {
            match fault {
                None => inventory.devices.push(device),
                Some(fault) => inventory.idle.push(Idle { id: device.id, name: device.name, fault }),
            }
        }
        inventory.kept = self.kept;
    }
}

/// The UUIDs of all GPUs that the driver shows and tells them of, for which no context is made.
pub fn uuids() -> Vec<String> {
    let count = driver_version().ok().flatten().and_then(|_| count().ok()).unwrap_or(0);
    (0..count).filter_map(uuid).collect()
}

/// The UUID of the GPU at `index`, for which no context is made.
pub fn uuid(index: u32) -> Option<String> {
    let mut gpu = GpuInfo::unknown(index);
    identify(&mut gpu, index).ok().map(|()| gpu.uuid)
}

/// What the GPU at `index` is, under a driver for this version of CUDA, and its context if it can be used.
fn describe(index: u32, version: i32, management: &Management) -> (GpuInfo, Option<Arc<CudaContext>>) {
    let mut gpu = GpuInfo::unknown(index);
    let opened = identify(&mut gpu, index).and_then(|()| match age(gpu.capability, version) {
        Some(fault) => Err(fault),
        None => open(&mut gpu.device, index, management.free(&gpu.uuid)),
    });
    gpu.occupants = management.occupants(&gpu.uuid);
    match opened {
        Ok(context) => (gpu, Some(context)),
        Err(fault) => (GpuInfo { fault: Some(fault), ..gpu }, None),
    }
}

/// Why the kernels do not run there: a GPU or a driver that is too old.
fn age(capability: (i32, i32), version: i32) -> Option<Fault> {
    let what = if capability < NEEDED_CAPABILITY {
        format!("its compute capability is {}.{}", capability.0, capability.1)
    } else if version < NEEDED_CUDA {
        format!("its driver is for CUDA {}.{}", version / 1000, version % 1000 / 10)
    } else {
        return None;
    };
    Some(Fault { is_broken: false, what, hint: Some(needs()) })
}

/// What the driver tells without a context.
fn identify(gpu: &mut GpuInfo, index: u32) -> Result<(), Fault> {
    use CUdevice_attribute as Attribute;
    let failed = |e| fault::fault("it does not tell what it is", e);
    let handle = Handle::new(index).map_err(failed)?;
    let name = handle.name().map_err(failed)?;
    let attribute = |attribute| handle.attribute(attribute);
    let version = |attribute| i32::try_from(handle.attribute(attribute)).unwrap_or(0);
    gpu.capability = (
        version(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        version(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    );
    let uuid = handle.uuid().map_err(failed)?.map(|byte| format!("{byte:02x}")).concat();
    let kind = if name.split(' ').any(|word| word == "MIG") { "MIG" } else { "GPU" };
    let [a, b, c, d] = [&uuid[..8], &uuid[8..12], &uuid[12..16], &uuid[16..20]];
    gpu.uuid = format!("{kind}-{a}-{b}-{c}-{d}-{}", &uuid[20..]);
    gpu.bus = format!(
        "{:08X}:{:02X}:{:02X}.0",
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID),
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID),
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)
    );
    gpu.device.total = handle.total().map_err(failed)?;
    // Both edges of the clock carry data. A slice of a GPU is told the whole one's.
    let clock = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).saturating_mul(2 * 1000);
    let told = clock.saturating_mul(attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) / 8);
    let known = Card::of(&name).map(|card| card.bytes_per_second);
    let told = Some(told).filter(|told| *told > 0 && kind == "GPU");
    gpu.device.bandwidth = told.or(known).map(Bandwidth::stated);
    gpu.multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    gpu.device.context = machine::context(Some(gpu.multiprocessors));
    // As cuda.h numbers them.
    gpu.mode = match attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE) {
        0 => Mode::Shared,
        2 => Mode::Prohibited,
        _ => Mode::Exclusive,
    };
    gpu.device.is_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED) > 0;
    gpu.device.name = Some(name);
    Ok(())
}

/// What is free. What this process's context takes of it counts as free: the plan counts that itself. It is known where
/// what was free without it is.
fn open(device: &mut Device, index: u32, before: Option<Bytes>) -> Result<Arc<CudaContext>, Fault> {
    // What a context has taken; anything else is somebody else's doing, or it was there already.
    const LIKELY: RangeInclusive<Bytes> = Bytes(32 * MIB)..=Bytes(2 * GIB);
    let context = context(index).map_err(|e| fault::fault("it cannot be opened", e))?;
    let (free, total) = context.mem_get_info().map_err(|e| fault::fault("it does not tell its memory", e))?;
    device.total = Bytes(total as u64);
    if let Some(taken) = before.map(|before| before - Bytes(free as u64)).filter(|taken| LIKELY.contains(taken)) {
        device.context = taken;
    }
    device.free = (Bytes(free as u64) + device.context).min(device.total);
    Ok(context)
}
