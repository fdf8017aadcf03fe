//! What a machine has: its devices, how much of each is free and how fast it is; and what a GPU
//! needs to have.

mod bandwidth;
mod cards;
mod host;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::bytes::{Bytes, GIB};
use crate::device::DeviceId;
use crate::error::{Error, Hint, Result, Setting};

pub use bandwidth::Bandwidth;
pub use cards::{Card, context};
pub use host::{host_memory, is_wsl};

/// The least compute capability that the kernels run on, major and minor.
pub const NEEDED_CAPABILITY: (i32, i32) = (7, 5);
/// The oldest branch of the NVIDIA driver that takes the kernels.
pub const NEEDED_DRIVER: u32 = 550;
/// The version of CUDA that this driver is for, as 1000 · major + 10 · minor.
pub const NEEDED_CUDA: i32 = 12_040;

/// What a GPU needs, as messages say it.
pub fn needs() -> String {
    let (major, minor) = NEEDED_CAPABILITY;
    format!("evenkeel needs compute capability {major}.{minor} and the NVIDIA driver {NEEDED_DRIVER}")
}

/// A device of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name in maps.
    pub id: DeviceId,
    /// What it is, where that is known.
    pub name: Option<String>,
    /// Bytes that can be taken now.
    pub free: Bytes,
    /// Bytes that it has.
    pub total: Bytes,
    /// How fast it reads them, where that is known.
    pub bandwidth: Option<Bandwidth>,
    /// What the driver's context takes of them, before anything is allocated; an estimate.
    pub context: Bytes,
    /// Whether they are the host's own.
    pub is_shared: bool,
}

impl Device {
    /// One of which nothing else is known.
    pub fn new(id: DeviceId, free: Bytes) -> Self {
        let context = if id.is_gpu() { context(None) } else { Bytes::ZERO };
        Self { id, name: None, free, total: free, bandwidth: None, context, is_shared: false }
    }
}

/// Why a GPU, or all of them, cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Whether it ought to work: neither it nor its driver is too old, and it is there.
    pub is_broken: bool,
    /// What is wrong.
    pub what: String,
    /// What helps, where that is known.
    pub hint: Option<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "; {hint}"))
    }
}

/// A GPU that is there and cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Idle {
    /// Its name in maps.
    pub id: DeviceId,
    /// What it is, where that is known.
    pub name: Option<String>,
    /// Why.
    pub fault: Fault,
}

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}) is not used: {}", self.id, self.name.as_deref().unwrap_or("a GPU"), self.fault)
    }
}

/// What keeps GPUs from being used, a line each.
pub fn faults(driver: Option<&Fault>, idle: &[Idle]) -> impl Iterator<Item = String> {
    let driver = driver.into_iter().map(|fault| format!("no GPU is used: {fault}"));
    driver.chain(idle.iter().map(Idle::to_string))
}

/// What stays open while an inventory is there, so that the next who needs it need not open it again.
#[derive(Clone, Default)]
pub struct Kept(Vec<Arc<dyn Any + Send + Sync>>);

impl Kept {
    /// Keeps all of `open`.
    pub fn new<T: Any + Send + Sync>(open: impl IntoIterator<Item = Arc<T>>) -> Self {
        Self(open.into_iter().map(|open| open as _).collect())
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} open", self.0.len())
    }
}

impl PartialEq for Kept {
    /// It is not part of what a machine has.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Kept {}

/// The devices that a plan may use, in the order in which they are filled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Inventory {
    /// Devices that compute, or hold weights for one that does.
    pub devices: Vec<Device>,
    /// GPUs that are there and cannot be used.
    pub idle: Vec<Idle>,
    /// Why the driver that is there shows no GPU.
    pub driver: Option<Fault>,
    /// What is to be known of the sizes.
    pub notes: Vec<String>,
    /// The GPUs' contexts.
    #[serde(skip)]
    pub kept: Kept,
}

impl Inventory {
    /// A machine that need not be there, from descriptions separated by
    /// commas: `cuda:0=24GiB`, or with the bandwidth behind it,
    /// `cuda:0=24GiB@936GB/s` or `cuda:0=24GiB@RTX 3090`.
    pub fn described(text: &str) -> Result<Self> {
        let mut devices = Vec::new();
        for description in text.split(',') {
            let usage = |why: String| {
                let examples = ["cuda:0=24GiB", "cpu=64GiB"].map(|device| Setting::Device(device.to_owned()));
                Error::usage(format!("`{description}` describes no device: {why}"))
                    .hint(Hint::naming("describe a device as {} or {}", examples))
            };
            let (id, bytes) = description.split_once('=').ok_or_else(|| usage("it has no `=`".to_owned()))?;
            let id: DeviceId = id.trim().parse().map_err(|e| usage(format!("{e}")))?;
            let (bytes, bandwidth) = bytes.split_once('@').map_or((bytes, None), |(bytes, speed)| (bytes, Some(speed)));
            let bytes: Bytes = bytes.parse().map_err(|e| usage(format!("{e}")))?;
            let card = bandwidth.filter(|_| id.is_gpu()).and_then(Card::of);
            let bandwidth = bandwidth.map(str::parse).transpose().map_err(|e| usage(format!("{e}")))?;
            if devices.iter().any(|device: &Device| device.id == id) {
                return Err(usage(format!("{id} is described already")));
            }
            let device = Device { bandwidth, ..Device::new(id, bytes) };
            devices.push(match card {
                Some(card) => Device { context: context(Some(card.multiprocessors)), ..device },
                None => device,
            });
        }
        devices.sort_by_key(|device| device.id);
        Ok(Self { devices, ..Self::default() })
    }

    /// The names of the devices that can be used.
    pub fn ids(&self) -> Vec<DeviceId> {
        self.devices.iter().map(|device| device.id).collect()
    }

    /// Why a GPU cannot be used, if it or the driver is there.
    pub fn why_idle(&self, id: DeviceId) -> Option<String> {
        let idle = self.idle.iter().find(|idle| idle.id == id).map(|idle| &idle.fault);
        let driver = self.driver.as_ref().filter(|_| id.is_gpu());
        idle.or(driver).map(|fault| format!("{id} is there but cannot be used: {fault}"))
    }

    /// Whether no GPU can be used, and one ought to.
    pub fn has_only_broken_gpus(&self) -> bool {
        let is_broken = self.driver.iter().chain(self.idle.iter().map(|idle| &idle.fault)).any(|fault| fault.is_broken);
        is_broken && !self.devices.iter().any(|device| device.id.is_gpu())
    }

    /// All that keeps GPUs from being used, a line each.
    pub fn faults(&self) -> impl Iterator<Item = String> {
        faults(self.driver.as_ref(), &self.idle)
    }

    /// Divides the memory that a GPU shares with the host, so that nothing is counted twice: a part is the host's, for
    /// what a load takes of it in any case, and the rest is the GPU's.
    pub(crate) fn share_memory(&mut self) {
        const HOST: Bytes = Bytes(2 * GIB);
        let Some(free) = self.device(DeviceId::Cpu).map(|cpu| cpu.free) else { return };
        let host = HOST.min(Bytes(free.0 / 2));
        let Some(gpu) = self.devices.iter_mut().find(|device| device.is_shared) else { return };
        // The page cache, which the driver counts as used, is free all the same.
        gpu.free = (free - host + gpu.context).min(gpu.total);
        self.notes.push(format!("{} shares the host's memory: {host} are counted as the host's", gpu.id));
        let cpu = self.devices.iter_mut().filter(|device| device.id == DeviceId::Cpu);
        cpu.for_each(|cpu| cpu.free = host);
    }

    /// Counts less on memory that Windows lends: what it says is free may not be there when it is used.
    pub(crate) fn count_less_on_windows(&mut self) {
        const LEFT: Bytes = Bytes(3 * GIB / 2);
        for gpu in self.devices.iter_mut().filter(|device| device.id.is_gpu()) {
            gpu.free = gpu.free - LEFT;
            self.notes
                .push(format!("{} is lent by Windows, which may not keep its word: {LEFT} are not counted", gpu.id));
        }
    }

    /// The device of that name.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.iter().find(|device| device.id == id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_parse_in_any_order() {
        let inventory = Inventory::described("cpu=64GiB,cuda:1=12GiB@504GB/s,cuda:0=24GiB").unwrap();
        let ids: Vec<_> = inventory.devices.iter().map(|device| device.id.to_string()).collect();
        assert_eq!(ids, ["cuda:0", "cuda:1", "cpu"]);
        assert_eq!(inventory.device(DeviceId::Cuda(1)).unwrap().free, Bytes(12 << 30));
        assert_eq!(Inventory::described("cuda:0=24").unwrap().devices[0].free, Bytes(24));
        let bandwidth = |id| inventory.device(id).unwrap().bandwidth.map(|bandwidth| bandwidth.bytes_per_second);
        assert_eq!((bandwidth(DeviceId::Cuda(1)), bandwidth(DeviceId::Cpu)), (Some(504_000_000_000), None));
    }

    #[test]
    fn memory_that_a_gpu_shares_with_the_host_is_counted_once() {
        let mut inventory = Inventory::described("cuda:0=119GiB,cpu=100GiB").unwrap();
        inventory.share_memory();
        assert_eq!(inventory.notes, [] as [&str; 0]);
        inventory.devices[0].is_shared = true;
        inventory.share_memory();
        let gib = |gib: u64| Bytes(gib * GIB);
        let [gpu, cpu] = &inventory.devices[..] else { unreachable!() };
        assert_eq!((gpu.free, cpu.free), (gib(98) + gpu.context, gib(2)));
        let mut small = Inventory::described("cuda:0=4GiB,cpu=3GiB").unwrap();
        small.devices[0].is_shared = true;
        small.share_memory();
        assert_eq!(small.devices[1].free, Bytes(3 * GIB / 2));
    }

    #[test]
    fn windows_is_not_counted_on() {
        let mut inventory = Inventory::described("cuda:0=8GiB,cuda:1=1GiB,cpu=9GiB").unwrap();
        inventory.count_less_on_windows();
        let free: Vec<_> = inventory.devices.iter().map(|device| device.free).collect();
        assert_eq!(free, [Bytes(13 * GIB / 2), Bytes::ZERO, Bytes(9 * GIB)]);
    }

    #[test]
    fn malformed_descriptions_are_refused() {
        for text in ["", "cuda:0", "cuda:0=", "gpu=1GiB", "cpu=1GiB,cpu=2GiB", "cuda:0=24GiB@", "cuda:0=24GiB@1"] {
            assert!(Inventory::described(text).is_err(), "{text}");
        }
    }
}
