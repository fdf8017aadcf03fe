//! One plan of a checkpoint for a machine, under options that leave nothing open.

use std::borrow::Cow;

use super::memory::KvLayout;
use super::options::Conditions;
use super::{DevicePlan, Pace, Plan, PlanOptions, PlannedModule, Speed, Strategy, hf, memory, place};
use crate::architecture::{Module, ModuleTree, Role, Weight};
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::device_map::{DeviceMap, MaxMemory};
use crate::error::{Error, Result, first_five};
use crate::machine::{self, Inventory};
use crate::model_config::ModelConfig;
use crate::quant::{QuantizeRules, WeightDtype};

/// What is planned, and for what: a checkpoint whose tensors have been found, and a machine.
pub struct Subject<'a> {
    pub checkpoint: &'a Checkpoint,
    pub inventory: Cow<'a, Inventory>,
    pub tree: &'a ModuleTree,
    pub weights: Vec<Weight<'a>>,
}

impl<'a> Subject<'a> {
    pub fn new(checkpoint: &'a Checkpoint, inventory: &'a Inventory, tree: &'a ModuleTree) -> Result<Self> {
        Ok(Self { checkpoint, inventory: Cow::Borrowed(inventory), tree, weights: tree.resolve(checkpoint)? })
    }

    /// The plan under `options`, in which `auto` has been decided; without alternatives and remedies.
    pub fn plan(&self, options: &PlanOptions) -> Result<Plan> {
        let Self { checkpoint, tree, weights, .. } = self;
        let config = &checkpoint.config;
        check_model(options, checkpoint)?;
        let conditions = Conditions::of(checkpoint, tree.embedding(), options)?;
        if let Some((path, _)) = conditions.quantize.iter().find(|(path, _)| !tree.names(path)) {
            return Err(Error::input(format!("`quantize` names unknown module `{path}`")));
        }
        let sizes = module_sizes(config, tree, weights, &conditions.quantize)?;
        self.place(options, &conditions, &sizes)
    }

    /// The plan whose modules take `sizes`.
    pub fn place(&self, options: &PlanOptions, conditions: &Conditions, sizes: &[Size]) -> Result<Plan> {
        let Self { checkpoint, inventory, tree, weights } = self;
        let config = &checkpoint.config;
        let Conditions { context, batch, kv_cache, .. } = *conditions;
        let kv = KvLayout::new(config, context, batch, kv_cache)
            .ok_or_else(|| Error::input("the KV cache is too large to plan for"))?;
        let staging = memory::HostStaging::new(weights, &conditions.quantize);
        let empty = |device| DevicePlan::empty(device, conditions, config, staging);
        let mut devices: Vec<DevicePlan> = inventory.devices.iter().map(empty).collect();
        let mut modules: Vec<PlannedModule> = tree
            .modules
            .iter()
            .zip(sizes)
            .map(|(module, size)| PlannedModule {
                path: module.path.clone(),
                device: DeviceId::Cpu,
                weights: size.packed,
                kv_cache: if module.is_block() { kv.bytes() + kv.bytes() } else { Bytes::ZERO },
                read: size.read,
                kind: module.kind,
            })
            .collect();
        let placement = match &options.device_map {
            Some(map) => map.resolve(tree)?,
            None if options.strategy.is_transformers() => as_transformers(self, conditions, options.strategy)?,
            None => automatic(tree, &modules, &devices, options.strategy)?,
        };
        check_devices(&placement, inventory)?;
        for (module, device) in modules.iter_mut().zip(placement) {
            module.device = device;
        }
        for device in &mut devices {
            device.take(&modules, memory::host_state(config, context), staging.ring());
        }
        let answers =
            devices.iter().filter(|device| device.driver_context > Bytes::ZERO).map(|_| memory::CUDA_ANSWERS).sum();
        if let Some(host) = devices.iter_mut().find(|device| device.id == DeviceId::Cpu) {
            host.workspace += answers;
        }
        Ok(Plan {
            model: checkpoint.name.clone(),
            architecture: config.family.architecture.to_owned(),
            parameters: weights.iter().map(|weight| (weight.parameter.rows * weight.parameter.cols) as u64).sum(),
            dtype: config.dtype.clone(),
            quantize: conditions.quantize.clone(),
            context,
            longest_context: config.max_position_embeddings,
            batch,
            kv_cache,
            max_memory: conditions.max_memory.clone(),
            speed: Speed::predict(&devices, &modules, batch),
            modules,
            devices,
            placements: Vec::new(),
            schemes: Vec::new(),
            is_unmeasured: false,
            kinds: Vec::new(),
            idle: inventory.idle.clone(),
            remedies: Vec::new(),
        })
    }
}

/// What weights take, and what a token reads of them.
#[derive(Clone, Copy, Default)]
pub struct Size {
    pub packed: Bytes,
    pub read: Bytes,
}

/// The size of every module; where the head is the embedding, a token reads all of that.
fn module_sizes(
    config: &ModelConfig,
    tree: &ModuleTree,
    weights: &[Weight],
    rules: &QuantizeRules,
) -> Result<Vec<Size>> {
    let mut sizes = vec![Size::default(); tree.modules.len()];
    let one_device = vec![DeviceId::Cpu; tree.modules.len()];
    for placed in memory::lay_out(weights, &one_device, rules)? {
        let size = &mut sizes[placed.weight.module];
        let Size { packed, read } = weight_size(config, &placed.weight, placed.layout.size());
        *size = Size { packed: size.packed + packed, read: size.read + read };
    }
    if tree.tied
        && let Some(embedding) = sizes.first().map(|size| size.packed)
        && let Some(head) = sizes.last_mut()
    {
        head.read = embedding;
    }
    Ok(sizes)
}

/// The size of a weight that takes `packed`: a token reads a row of the embedding, the experts
/// that it is sent to, and all of anything else.
pub fn weight_size(config: &ModelConfig, weight: &Weight, packed: Bytes) -> Size {
    let read = match (weight.parameter.role, config.experts) {
        (Role::Embedding | Role::Positions, _) => Bytes::ZERO,
        (Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_), Some(experts)) => {
            Bytes(packed.0 / experts.count as u64 * experts.per_token as u64)
        }
        _ => packed,
    };
    Size { packed, read }
}

fn automatic(
    tree: &ModuleTree,
    modules: &[PlannedModule],
    devices: &[DevicePlan],
    strategy: Strategy,
) -> Result<Vec<DeviceId>> {
    let mut modules = modules.to_vec();
    // A tied head costs nothing and runs where the embedding is.
    if let Some(head) = modules.pop_if(|_| tree.tied) {
        modules[0].read = head.read;
    }
    let capacities: Vec<place::Capacity> =
        devices.iter().map(|device| place::Capacity { id: device.id, room: device.budget - device.total() }).collect();
    if capacities.is_empty() {
        return Err(Error::usage("there is no device to place the model on"));
    }
    let mut placement = match strategy {
        Strategy::Packed => place::packed(&modules, &capacities),
        Strategy::Sequential => place::sequential(&modules, &capacities),
        Strategy::Fastest => place::fastest(&modules, &capacities, &paces(devices)?),
        _ => place::balanced(&modules, &capacities),
    };
    if tree.tied {
        placement.push(placement[0]);
    }
    Ok(placement)
}

fn paces(devices: &[DevicePlan]) -> Result<Vec<Pace>> {
    let pace = |device: &DevicePlan| {
        Pace::new(device.id, device.bandwidth).ok_or_else(|| {
            Error::usage(format!("`--placement fastest` needs the bandwidth of {}", device.id)).hint(format!(
                "state it, or name the GPU: `--device {id}=SIZE@936GB/s`, `--device \"{id}=SIZE@RTX 3090\"`",
                id = device.id
            ))
        })
    };
    devices.iter().map(pace).collect()
}

/// What Transformers would choose, which sees free memory, our limits and the bytes of weights alone.
fn as_transformers(subject: &Subject, conditions: &Conditions, strategy: Strategy) -> Result<Vec<DeviceId>> {
    let Subject { checkpoint, inventory, tree, weights } = subject;
    let dtype = weights.iter().find_map(Weight::dtype).unwrap_or(WeightDtype::Bf16);
    let model = hf::tree_of(&checkpoint.config, tree, dtype, conditions.quantize.scheme(""));
    let memory = inventory.devices.iter().filter(|device| device.id != DeviceId::Disk);
    let free: MaxMemory = memory.map(|device| (device.id, device.free)).collect();
    let limits = (!conditions.max_memory.is_empty()).then_some(&conditions.max_memory);
    let placement = hf::place(&model, &free, limits, strategy)?;
    let device_of = |module: &Module| {
        let nowhere = || Error::input(format!("Transformers leaves `{}` without a device", module.path));
        placement.device_of(&module.path).ok_or_else(nowhere)
    };
    tree.modules.iter().map(device_of).collect()
}

fn check_model(options: &PlanOptions, checkpoint: &Checkpoint) -> Result<()> {
    let base = |name: &str| name.rsplit('/').next().map(str::to_owned);
    match options.device_map.as_ref().and_then(|map: &DeviceMap| map.model.as_deref()) {
        Some(model) if !options.any_model && base(model) != base(&checkpoint.name) => {
            Err(Error::input(format!("the device map was made for `{model}`, not for `{}`", checkpoint.name))
                .hint("`--any-model` uses it for this one too"))
        }
        _ => Ok(()),
    }
}

fn check_devices(placement: &[DeviceId], inventory: &Inventory) -> Result<()> {
    let mut absent: Vec<_> = placement.iter().filter(|id| inventory.device(**id).is_none()).collect();
    // Blocks on the disk are computed in host memory.
    if placement.contains(&DeviceId::Disk) && inventory.device(DeviceId::Cpu).is_none() {
        absent.push(&DeviceId::Cpu);
    }
    absent.sort();
    absent.dedup();
    let Some(first) = absent.first() else {
        return Ok(());
    };
    let present: Vec<_> = inventory.devices.iter().map(|device| device.id.to_string()).collect();
    let error = Error::does_not_fit(format!(
        "the placement needs {}; what can be used is {}",
        first_five(&absent),
        present.join(", ")
    ));
    Err(if inventory.idle.iter().any(|device| device.id == **first) {
        error.hint(format!("{first} is there but cannot be used: {}", machine::needs()))
    } else if first.is_gpu() {
        error
            .hint(format!("no NVIDIA driver was found, or it shows no {first}; `--device-map auto` uses what is there"))
    } else {
        error.hint(format!("`--device {first}=SIZE` describes it"))
    })
}
