//! What a plan lists: every weight's place, and every allocation.

use super::Plan;
use super::device_plan::{Fixed, answers, memory_device};
use super::options::Conditions;
use super::subject::Subject;
use crate::device::DeviceId;
use crate::error::Result;
use crate::footprint::{self, Allocation, HostStaging, Purpose};

impl Plan {
    /// Lists what a load by this plan reads and allocates.
    pub(super) fn list(&mut self, subject: &Subject) -> Result<()> {
        self.weights = footprint::lay_out(&subject.weights, &self.placement(), &self.quantize)?;
        // Shard after shard, each from its beginning to its end.
        self.weights.sort_by_key(|placed| (placed.weight.tensor.shard, placed.weight.tensor.range.start));

        let conditions = Conditions {
            quantize: self.quantize.clone(),
            context: self.context,
            batch: self.batch,
            chunk: self.chunk,
            kv_cache: self.kv_cache,
            max_memory: self.max_memory.clone(),
            reserve: self.devices.first().map(|device| device.reserve).unwrap_or_default(),
        };
        let staging = HostStaging::new(&subject.weights, &self.quantize);
        let fixed = Fixed { config: &self.checkpoint.config, conditions: &conditions, staging };
        let mut devices = self.placement();
        // What is read passes through host memory wherever it goes.
        devices.push(DeviceId::Cpu);
        devices.sort();
        devices.dedup();
        let mut allocations = Vec::new();
        for device in devices {
            let mut add = |purpose, name: &str, bytes| {
                allocations.push(Allocation { device, purpose, name: name.to_owned(), bytes });
            };
            let here = self.weights.iter().filter(|placed| placed.device == device);
            add(Purpose::Weights, "weights", here.map(footprint::Placed::bytes).sum());
            let in_memory_here = || self.modules.iter().filter(|module| memory_device(module.device) == device);
            for module in in_memory_here().filter(|module| module.state.is_some()) {
                add(Purpose::State, &module.path, module.kv_cache);
            }
            for (purpose, name, bytes) in fixed.regions(device, in_memory_here().next().is_some()) {
                add(purpose, name, bytes);
            }
            if device == DeviceId::Cpu {
                answers(&self.modules)
                    .for_each(|(gpu, bytes)| add(Purpose::Workspace, &format!("answers of {gpu}"), bytes));
            }
        }
        self.allocations = allocations;
        Ok(())
    }
}
