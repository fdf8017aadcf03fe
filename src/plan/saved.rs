//! A plan that is read again: held against the checkpoint that it was made of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};

use super::{Plan, PlanOptions};
use crate::bytes::Bytes;
use crate::checkpoint::{Checkpoint, Origin};
use crate::device::DeviceId;
use crate::device_map::DeviceMap;
use crate::error::{Error, Result};
use crate::footprint::Purpose;
use crate::machine::{Bandwidth, Device, Inventory};

/// What of a plan's JSON the rest follows from, and what must follow.
#[derive(Deserialize)]
struct Saved {
    schema_version: u64,
    checkpoint: Origin,
    quantize: Value,
    context: Value,
    batch: Value,
    chunk: usize,
    kv_cache: Value,
    max_memory: Value,
    modules: Vec<SavedModule>,
    devices: Vec<SavedDevice>,
    weights: Value,
    allocations: Value,
}

#[derive(Deserialize)]
struct SavedModule {
    path: String,
    device: String,
}

#[derive(Deserialize)]
struct SavedDevice {
    id: String,
    name: Option<String>,
    bandwidth: Option<Bandwidth>,
    free: Bytes,
    reserve: Bytes,
    context: Bytes,
}

impl Plan {
    /// Reads what [`Plan::to_json`] wrote; `name` is its name in messages. `open` opens the checkpoint that the plan
    /// was made of, which is asked for everything again: the plan must list the same weights and allocations.
    ///
    /// # Errors
    /// The text is no plan, the checkpoint cannot be opened, or it is not the one that the plan was made of.
    pub fn from_json(name: &str, json: &str, open: impl FnOnce(&Origin) -> Result<Checkpoint>) -> Result<Self> {
        let saved: Saved =
            serde_json::from_str(json).map_err(|e| Error::input(format!("`{name}` is no plan")).caused_by(e))?;
        let Saved { schema_version, quantize, context, batch, kv_cache, max_memory, .. } = saved;
        let modules: BTreeMap<_, _> = saved.modules.into_iter().map(|module| (module.path, module.device)).collect();
        let map = json!({
            "schema_version": schema_version,
            "quantize": quantize,
            "context": context,
            "batch": batch,
            "kv_cache": kv_cache,
            "max_memory": max_memory,
            "device_map": modules,
        });
        let mut inventory = Inventory::default();
        let mut reserve = Bytes::ZERO;
        for SavedDevice { id, name: product, bandwidth, free, reserve: left, context } in saved.devices {
            let id: DeviceId =
                id.parse().map_err(|e| Error::input(format!("`{name}` names no device")).caused_by(e))?;
            inventory.devices.push(Device { name: product, bandwidth, context, ..Device::new(id, free) });
            reserve = reserve.max(left);
        }
        let is_state = |allocation: &&Value| allocation["purpose"] == Purpose::State.name();
        let states = saved.allocations.as_array().into_iter().flatten().filter(is_state);
        let kept = Bytes(states.filter_map(|allocation| allocation["bytes"].as_u64()).fold(0, u64::saturating_add));
        let options = PlanOptions {
            device_map: Some(DeviceMap::parse(name, map.to_string().into_bytes())?),
            chunk: Some(saved.chunk),
            kv_memory: Some(kept),
            reserve: Some(reserve),
            ..PlanOptions::default()
        };
        let plan = Self::new(&open(&saved.checkpoint)?, &inventory, options)?;
        for (what, saved, now) in [
            ("weights", &saved.weights, serde_json::to_value(&plan.weights)),
            ("allocations", &saved.allocations, serde_json::to_value(&plan.allocations)),
        ] {
            if !now.is_ok_and(|now| now == *saved) {
                return Err(Error::input(format!("`{name}` does not list the {what} of `{}`", plan.model))
                    .hint("the checkpoint has changed, or another version of evenkeel made the plan; plan again"));
            }
        }
        Ok(plan)
    }
}

/// Writes of a checkpoint where it can be found.
pub fn origin<S: Serializer>(checkpoint: &Checkpoint, serializer: S) -> Result<S::Ok, S::Error> {
    checkpoint.origin.serialize(serializer)
}
