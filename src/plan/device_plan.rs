//! A module and a device as the plan has them.

use serde::Serialize;

use super::memory;
use super::options::Conditions;
use crate::architecture::ModuleKind;
use crate::bytes::Bytes;
use crate::device::DeviceId;
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
    /// What a token reads of its weights.
    #[serde(skip)]
    pub(super) read: Bytes,
    #[serde(skip)]
    pub(super) kind: ModuleKind,
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
        Self { path: String::new(), device: DeviceId::Cpu, weights, kv_cache: Bytes(1), read: weights, kind }
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
    pub(super) fn empty(
        device: &Device,
        conditions: &Conditions,
        config: &ModelConfig,
        staging: memory::HostStaging,
    ) -> Self {
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
            workspace: memory::workspace(config, conditions.context, device.id),
            staging: memory::staging(device.id, staging),
            driver_context: memory::driver_context(device.id),
            modules: 0,
        }
    }

    /// Adds what `modules` take of this device. Where GPUs compute all of them, hidden states
    /// and logits (`state`) and what is read (`ring`) still pass through host memory.
    pub(super) fn take(&mut self, modules: &[PlannedModule], state: Bytes, ring: Bytes) {
        let id = self.id;
        let here = || modules.iter().filter(|module| module.device == id);
        let in_memory_here = || modules.iter().filter(|module| memory_device(module.device) == id);
        self.weights = here().map(|module| module.weights).sum();
        self.modules = here().count();
        self.kv_cache = in_memory_here().map(|module| module.kv_cache).sum();
        if in_memory_here().next().is_none() {
            let passes = id == DeviceId::Cpu;
            (self.workspace, self.staging) = if passes { (state, ring) } else { (Bytes::ZERO, Bytes::ZERO) };
            self.driver_context = Bytes::ZERO;
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
