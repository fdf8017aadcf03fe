//! A module and a device as the plan has them.

use std::collections::BTreeSet;

use serde::Serialize;

use super::options::Conditions;
use crate::architecture::ModuleKind;
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::footprint::{self, CUDA_ANSWERS, CUDA_CONTEXT, CpuBuffers, CudaBuffers, HostStaging, Purpose, State};
use crate::machine::{Bandwidth, Device};
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
    /// What the driver takes before anything is allocated.
    pub driver_context: Bytes,
    /// Number of modules that are placed here.
    pub modules: usize,
}

impl DevicePlan {
    /// What a device takes when it is used at all, before any module is on it.
    pub(super) fn empty(device: &Device, fixed: &Fixed) -> Self {
        let conditions = fixed.conditions;
        let reserve = if device.id == DeviceId::Disk { Bytes::ZERO } else { conditions.reserve };
        let limit = conditions.max_memory.get(&device.id).copied().unwrap_or(device.free);
        Self {
            id: device.id,
            name: device.name.clone(),
            bandwidth: device.bandwidth,
            free: device.free,
            reserve,
            budget: limit.min(device.free - reserve),
            weights: Bytes::ZERO,
            kv_cache: Bytes::ZERO,
            workspace: Bytes::ZERO,
            staging: Bytes::ZERO,
            driver_context: Bytes::ZERO,
            modules: 0,
        }
        .with(fixed.regions(device.id, true))
    }

    /// With what it takes beside weights and state.
    fn with(mut self, regions: Vec<(Purpose, &'static str, Bytes)>) -> Self {
        let sum = |wanted| regions.iter().filter(|(purpose, ..)| *purpose == wanted).map(|(.., bytes)| *bytes).sum();
        self.workspace = sum(Purpose::Workspace);
        self.staging = sum(Purpose::Staging);
        self.driver_context = sum(Purpose::Driver);
        self
    }

    /// Adds what `modules` take of this device, and of the others what passes through it.
    pub(super) fn take(&mut self, modules: &[PlannedModule], fixed: &Fixed) {
        let id = self.id;
        let here = || modules.iter().filter(|module| module.device == id);
        let in_memory_here = || modules.iter().filter(|module| memory_device(module.device) == id);
        let computes = in_memory_here().next().is_some();
        self.weights = here().map(|module| module.weights).sum();
        self.modules = here().count();
        self.kv_cache = in_memory_here().map(|module| module.kv_cache).sum();
        *self = self.clone().with(fixed.regions(id, computes));
        if id == DeviceId::Cpu {
            self.workspace += answers(modules).map(|(_, bytes)| bytes).sum();
        }
    }

    /// All that the plan takes of the device.
    pub fn total(&self) -> Bytes {
        self.weights + self.kv_cache + self.workspace + self.staging + self.driver_context
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
}

impl Fixed<'_> {
    /// What a device takes beside weights and state, if it computes modules or if it does not: hidden states, logits
    /// and what is read pass through host memory even then.
    pub fn regions(&self, id: DeviceId, computes: bool) -> Vec<(Purpose, &'static str, Bytes)> {
        let Self { config, staging, conditions } = *self;
        let extent = conditions.extent();
        let (workspace, staging, driver): (Vec<_>, Vec<_>, _) = match id {
            DeviceId::Cuda(_) if computes => {
                let buffers = CudaBuffers::sizes(config, extent);
                let workspace = buffers.each().map(|(name, bytes)| (name, *bytes)).collect();
                (workspace, footprint::cuda_staging(staging.slab).into(), Some(("context", CUDA_CONTEXT)))
            }
            DeviceId::Cpu => {
                let buffers = computes.then(|| CpuBuffers::sizes(config, extent));
                let buffers = buffers.iter().flat_map(CpuBuffers::each).map(|(name, bytes)| (name, *bytes));
                let workspace = buffers.chain(footprint::host_state(config, extent)).collect();
                (workspace, staging.regions(computes).into(), None)
            }
            DeviceId::Cuda(_) | DeviceId::Disk => return Vec::new(),
        };
        let all =
            [(Purpose::Workspace, workspace), (Purpose::Staging, staging), (Purpose::Driver, Vec::from_iter(driver))];
        all.into_iter()
            .flat_map(|(purpose, regions)| regions.into_iter().map(move |(name, bytes)| (purpose, name, bytes)))
            .collect()
    }
}

/// The host's memory for what each GPU that computes answers.
pub fn answers(modules: &[PlannedModule]) -> impl Iterator<Item = (DeviceId, Bytes)> {
    let gpus: BTreeSet<_> = modules.iter().map(|module| module.device).filter(|device| device.is_gpu()).collect();
    gpus.into_iter().map(|gpu| (gpu, CUDA_ANSWERS))
}
