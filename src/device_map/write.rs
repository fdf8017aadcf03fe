//! The canonical form of a device map.

use serde_json::{Map, Value, json};

use super::{DeviceMap, SCHEMA_VERSION};
use crate::architecture::{Module, ModuleKind, ModuleTree};
use crate::device::DeviceId;
use crate::quant::KvDtype;

impl DeviceMap {
    /// The map in canonical form, with the devices that `devices` has for every module of `tree`:
    /// neighbouring blocks on one device as a range, modules in the order they run, sizes in the
    /// largest unit that divides them.
    pub(crate) fn to_json(&self, tree: &ModuleTree, devices: &[DeviceId]) -> String {
        let Self { model, quantize, context, batch, kv_cache, kv_memory, max_memory, .. } = self;
        let mut map = json!({
            "schema_version": SCHEMA_VERSION, "model": model, "quantize": quantize, "context": context, "batch": batch,
        });
        if let Some(kv_cache) = kv_cache.filter(|dtype| *dtype != KvDtype::default()) {
            map["kv_cache"] = kv_cache.name().into();
        }
        if let Some(kv_memory) = kv_memory {
            map["kv_memory"] = kv_memory.exact().into();
        }
        let budgets = max_memory.iter().flatten().map(|(device, bytes)| (device.to_string(), bytes.exact().into()));
        map["max_memory"] = Value::Object(budgets.collect());
        map["device_map"] = placed(tree, devices).into();
        format!("{map:#}\n")
    }
}

/// The plain dictionary of Hugging Face: every module by itself, GPUs by their
/// index. Modules without weights, which Transformers wants placed too, go
/// where the first module is.
pub fn to_hugging_face(tree: &ModuleTree, devices: &[DeviceId]) -> String {
    let value = |device: &DeviceId| match device {
        DeviceId::Cuda(index) => Value::from(*index),
        DeviceId::Cpu | DeviceId::Disk => device.to_string().into(),
    };
    let modules = tree.modules.iter().zip(devices).map(|(module, device)| (module.path.clone(), value(device)));
    let weightless = tree.weightless.iter().zip(devices.first()).map(|(path, device)| (path.clone(), value(device)));
    format!("{:#}\n", Value::Object(modules.chain(weightless).collect()))
}

fn placed(tree: &ModuleTree, devices: &[DeviceId]) -> Map<String, Value> {
    let modules: Vec<_> = tree.modules.iter().zip(devices).collect();
    let runs = modules.chunk_by(|(a, on), (b, other)| a.is_block() && b.is_block() && on == other);
    let entry = |run: &[(&Module, &DeviceId)]| {
        let ((first, device), (last, _)) = (run[0], run[run.len() - 1]);
        let path = match (first.kind, last.kind) {
            (ModuleKind::Block(first), ModuleKind::Block(last)) if first < last => {
                format!("{}.{first}-{last}", tree.blocks)
            }
            _ => first.path.clone(),
        };
        (path, device.to_string().into())
    };
    runs.map(entry).collect()
}
