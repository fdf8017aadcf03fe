//! The canonical form of a device map.

use serde_json::{Map, Value, json};

use super::{MaxMemory, SCHEMA_VERSION};
use crate::architecture::{ModuleKind, ModuleTree};
use crate::device::DeviceId;
use crate::quant::QuantizeRules;

/// A map in canonical form: neighbouring blocks on one device as a range,
/// modules in the order they run, sizes in the largest unit that divides them.
/// `devices` has a device for every module of `tree`.
pub fn to_json(
    model: &str,
    quantize: &QuantizeRules,
    context: usize,
    batch: usize,
    max_memory: &MaxMemory,
    tree: &ModuleTree,
    devices: &[DeviceId],
) -> String {
    let quantize: Map<String, Value> =
        quantize.iter().map(|(path, scheme)| (path.to_owned(), scheme.name().into())).collect();
    let max_memory: Map<String, Value> =
        max_memory.iter().map(|(device, bytes)| (device.to_string(), bytes.exact().into())).collect();
    let map = json!({
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "quantize": quantize,
        "context": context,
        "batch": batch,
        "max_memory": max_memory,
        "device_map": device_map(tree, devices),
    });
    format!("{map:#}\n")
}

fn device_map(tree: &ModuleTree, devices: &[DeviceId]) -> Map<String, Value> {
    let mut map = Map::new();
    let mut run: Option<(usize, usize, DeviceId)> = None;
    let flush = |map: &mut Map<String, Value>, run: &mut Option<(usize, usize, DeviceId)>| {
        if let Some((first, last, device)) = run.take() {
            let blocks = &tree.blocks;
            let path = if first == last { format!("{blocks}.{first}") } else { format!("{blocks}.{first}-{last}") };
            map.insert(path, device.to_string().into());
        }
    };
    for (module, device) in tree.modules.iter().zip(devices) {
        match (module.kind, &mut run) {
            (ModuleKind::Block(index), Some((_, last, on))) if *on == *device => *last = index,
            (ModuleKind::Block(index), _) => {
                flush(&mut map, &mut run);
                run = Some((index, index, *device));
            }
            _ => {
                flush(&mut map, &mut run);
                map.insert(module.path.clone(), device.to_string().into());
            }
        }
    }
    map
}
