//! A module and a device as the plan has them.

use std::collections::BTreeSet;

use serde::Serialize;

use super::options::Conditions;
use crate::architecture::ModuleKind;
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::footprint::{self, Allocation, CpuBuffers, CudaBuffers, CudaRows, HostStaging, Purpose, State};
use crate::machine::{self, Bandwidth, Device, Inventory};
use crate::model_config::ModelConfig;

/// A module and what it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedModule {
    /// Its path.
    pub path: String,
    /// Where it goes.
    pub device: DeviceId,
    /// Its packed weights.
    pub weights: Bytes,
    /// Its KV cache.
    pub kv_cache: Bytes,
    /// What it keeps of a sequence, where it keeps something.
    #[serde(skip)]
    pub state: Option<State>,
    /// What a token reads of its weights.
    #[serde(skip)]
    pub(super) read: Bytes,
    #[serde(skip)]
    pub(crate) kind: ModuleKind,
}

impl PlannedModule {
    /// Whether it is a block, which has a KV cache.
    pub fn is_block(&self) -> bool {
        matches!(self.kind, ModuleKind::Block(_))
    }

    /// A block of so many bytes, with a KV cache of one.
    #[cfg(test)]
    pub(super) fn block(bytes: u64) -> Self {
        let (weights, kind) = (Bytes(bytes), ModuleKind::Block(0));
        let (device, state) = (DeviceId::Cpu, None);
        Self { path: String::new(), device, weights, kv_cache: Bytes(1), state, read: weights, kind }
    }
}

/// What a device has and what the plan takes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DevicePlan {
    /// The device.
    pub id: DeviceId,
    /// What it is, where that is known.
    pub name: Option<String>,
    /// How fast it reads its memory, where that is known.
    pub bandwidth: Option<Bandwidth>,
    /// Bytes that are free.
    pub free: Bytes,
    /// Bytes left free on purpose.
    pub reserve: Bytes,
    /// Bytes that the plan may take: free less reserve, or the caller's smaller limit.
    pub budget: Bytes,
    /// The arena of packed weights.
    pub weights: Bytes,
    /// The KV cache; that of blocks on the disk is in host memory.
    pub kv_cache: Bytes,
    /// Buffers of a step.
    pub workspace: Bytes,
    /// The ring that weights pass through while they are loaded.
    pub staging: Bytes,
    /// What the program takes of host memory by itself; an estimate.
    pub program: Bytes,
    /// What the driver takes by itself; an estimate.
    pub driver: Bytes,
    /// What of that its context is.
    pub context: Bytes,
    /// Number of modules that are placed here.
    pub modules: usize,
}

impl DevicePlan {
    /// What `allocations` take of a device, and how many `modules` are on it.
    pub(super) fn new(device: &Device, conditions: &Conditions, allocations: &[Allocation], modules: usize) -> Self {
        let reserve = if device.id == DeviceId::Disk { Bytes::ZERO } else { conditions.reserve };
        let sum = |purpose| sum(allocations, device.id, purpose);
        let limit = match conditions.max_memory.get(&device.id) {
            // No weights go there, as Accelerate means it; the rest is needed wherever they are.
            Some(&Bytes::ZERO) if device.id == DeviceId::Cpu => {
                [Purpose::State, Purpose::Workspace, Purpose::Staging, Purpose::Program, Purpose::Driver]
                    .into_iter()
                    .map(sum)
                    .sum()
            }
            limit => limit.copied().unwrap_or(device.free),
        };
        Self {
            id: device.id,
            name: device.name.clone(),
            bandwidth: device.bandwidth,
            free: device.free,
            reserve,
            budget: limit.min(device.free - reserve),
            weights: sum(Purpose::Weights),
            kv_cache: sum(Purpose::State),
            workspace: sum(Purpose::Workspace),
            staging: sum(Purpose::Staging),
            program: sum(Purpose::Program),
            driver: sum(Purpose::Driver),
            context: device.context,
            modules,
        }
    }

    /// What a load allocates on the device.
    pub fn allocated(&self) -> Bytes {
        self.weights + self.kv_cache + self.workspace + self.staging
    }

    /// All that is taken of the device, with what the program and the driver take by themselves.
    pub fn total(&self) -> Bytes {
        self.allocated() + self.program + self.driver
    }

    /// Whether the total is within the budget.
    pub fn fits(&self) -> bool {
        self.total() <= self.budget
    }

    /// Bytes that the budget lacks.
    pub fn missing(&self) -> Bytes {
        self.total() - self.budget
    }
}

/// The device in whose memory the KV cache of a module on `device` is.
pub fn memory_device(device: DeviceId) -> DeviceId {
    if device == DeviceId::Disk { DeviceId::Cpu } else { device }
}

/// What the sizes of all buffers follow from.
pub struct Fixed<'a> {
    pub config: &'a ModelConfig,
    pub conditions: &'a Conditions,
    pub staging: HostStaging,
    /// The tokenizer's file.
    pub tokenizer: Bytes,
    pub inventory: &'a Inventory,
}

impl Fixed<'_> {
    /// What a device takes beside weights and state, if it computes modules or if it does not, with so many GPUs in
    /// use: hidden states, logits and what is read pass through host memory even then.
    pub fn buffers(&self, device: DeviceId, computes: bool, gpus: usize) -> Vec<Allocation> {
        let Self { config, staging, conditions, tokenizer, inventory } = *self;
        let extent = conditions.extent;
        let of =
            |purpose| move |(name, bytes): (&str, Bytes)| Allocation { device, purpose, name: name.to_owned(), bytes };
        match device {
            DeviceId::Cuda(_) if computes => {
                let buffers = CudaBuffers::sizes(config, extent);
                let workspace = buffers.each().map(|(name, bytes)| (name, *bytes)).map(of(Purpose::Workspace));
                let staging = footprint::cuda_staging(staging.slab).map(of(Purpose::Staging));
                let context = inventory.device(device).map_or_else(|| machine::context(None), |device| device.context);
                let driver = footprint::cuda_driver(context, extent).map(of(Purpose::Driver));
                workspace.chain(staging).chain(driver).collect()
            }
            DeviceId::Cpu => {
                let buffers = computes.then(|| CpuBuffers::sizes(config, extent));
                let buffers = buffers.iter().flat_map(CpuBuffers::each).map(|(name, bytes)| (name, *bytes));
                let workspace = buffers.chain(footprint::host_state(config, extent)).map(of(Purpose::Workspace));
                let staging = staging.regions(computes).map(of(Purpose::Staging));
                let program = footprint::program(tokenizer).map(of(Purpose::Program));
                let driver = [("driver", footprint::cuda_host(gpus))].map(of(Purpose::Driver));
                workspace.chain(staging).chain(program).chain(driver).collect()
            }
            DeviceId::Cuda(_) | DeviceId::Disk => Vec::new(),
        }
    }

    /// Every allocation of a load with `modules` where they are.
    pub fn allocations(&self, modules: &[PlannedModule]) -> Vec<Allocation> {
        // What is read passes through host memory wherever it goes.
        let devices: BTreeSet<_> = modules.iter().map(|module| module.device).chain([DeviceId::Cpu]).collect();
        let gpus = devices.iter().filter(|device| device.is_gpu());
        let mut all = Vec::new();
        for device in devices.iter().copied() {
            let allocation = |purpose, name: String, bytes| Allocation { device, purpose, name, bytes };
            let here = modules.iter().filter(|module| module.device == device);
            all.push(allocation(Purpose::Weights, "weights".to_owned(), here.map(|module| module.weights).sum()));
            let in_memory_here = || modules.iter().filter(|module| memory_device(module.device) == device);
            let keeping = in_memory_here().filter(|module| module.state.is_some());
            all.extend(keeping.map(|module| allocation(Purpose::State, module.path.clone(), module.kv_cache)));
            all.extend(self.buffers(device, in_memory_here().next().is_some(), gpus.clone().count()));
            if device == DeviceId::Cpu {
                let rows = CudaRows::host(self.conditions.extent);
                all.extend(gpus.clone().map(|gpu| allocation(Purpose::Workspace, format!("rows of {gpu}"), rows)));
            }
        }
        all
    }
}

/// Bytes of a device that are for a purpose.
pub fn sum(allocations: &[Allocation], device: DeviceId, purpose: Purpose) -> Bytes {
    let is_meant = |allocation: &&Allocation| (allocation.device, allocation.purpose) == (device, purpose);
    allocations.iter().filter(is_meant).map(|allocation| allocation.bytes).sum()
}
