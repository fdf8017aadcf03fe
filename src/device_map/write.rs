//! The canonical form of a device map.

use serde_json::{Map, Value, json};

use super::{MaxMemory, SCHEMA_VERSION};
use crate::architecture::{Module, ModuleKind, ModuleTree};
use crate::device::DeviceId;
use crate::quant::{KvDtype, QuantizeRules};

/// What a map carries beside the devices.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The model's name.
    pub model: &'a str,
    /// The schemes.
    pub quantize: &'a QuantizeRules,
    /// Longest context, in tokens.
    pub context: usize,
    /// Sequences at once.
    pub batch: usize,
    /// The type of the KV cache's elements; written where it is not the default.
    pub kv_cache: KvDtype,
    /// Budgets.
    pub max_memory: &'a MaxMemory,
}

/// A map in canonical form: neighbouring blocks on one device as a range,
/// modules in the order they run, sizes in the largest unit that divides them.
/// `devices` has a device for every module of `tree`.
pub fn to_json(contents: &Contents, tree: &ModuleTree, devices: &[DeviceId]) -> String {
    let quantize: Map<String, Value> =
        contents.quantize.iter().map(|(path, scheme)| (path.to_owned(), scheme.name().into())).collect();
    let max_memory: Map<String, Value> =
        contents.max_memory.iter().map(|(device, bytes)| (device.to_string(), bytes.exact().into())).collect();
    let Contents { model, context, batch, kv_cache, .. } = contents;
    let mut map = json!({
        "schema_version": SCHEMA_VERSION, "model": model, "quantize": quantize, "context": context, "batch": batch,
    });
    if *kv_cache != KvDtype::default() {
        map["kv_cache"] = kv_cache.name().into();
    }
    map["max_memory"] = max_memory.into();
    map["device_map"] = device_map(tree, devices).into();
    format!("{map:#}\n")
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

fn device_map(tree: &ModuleTree, devices: &[DeviceId]) -> Map<String, Value> {
    let placed: Vec<_> = tree.modules.iter().zip(devices).collect();
    let runs = placed.chunk_by(|(a, on), (b, other)| a.is_block() && b.is_block() && on == other);
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
