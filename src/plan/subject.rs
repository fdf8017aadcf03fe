//! One plan of a checkpoint for a machine, under options that leave nothing open.

use std::borrow::Cow;

use super::device_plan::Fixed;
use super::options::Conditions;
use super::{DevicePlan, Pace, Plan, PlanOptions, PlannedModule, Speed, Strategy, hf, place};
use crate::architecture::{Module, ModuleKind, ModuleTree, Role, Weight};
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::{DeviceError, DeviceId};
use crate::device_map::{DeviceMap, MaxMemory};
use crate::error::{Error, Hint, Result, Setting};
use crate::footprint::{self, HostStaging, MAX_BYTES, State};
use crate::machine::{self, Inventory};
use crate::model_config::ModelConfig;
use crate::quant::{QuantizeRules, WeightDtype};

/// What is planned, and for what: a checkpoint whose tensors have been found, and a machine.
pub struct Subject<'a> {
    pub checkpoint: &'a Checkpoint,
    pub inventory: Cow<'a, Inventory>,
    pub tree: &'a ModuleTree,
    pub weights: Cow<'a, [Weight]>,
}

impl<'a> Subject<'a> {
    pub fn new(checkpoint: &'a Checkpoint, inventory: &'a Inventory, tree: &'a ModuleTree) -> Result<Self> {
        Ok(Self {
            checkpoint,
            inventory: Cow::Borrowed(inventory),
            tree,
            weights: Cow::Owned(tree.resolve(checkpoint)?),
        })
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
        let fixed = Fixed { config, conditions, staging: HostStaging::new(weights, &conditions.quantize) };
        let empty = |device| DevicePlan::empty(device, &fixed);
        let mut states = Vec::with_capacity(config.layers.len());
        let mut all = 0u64;
        for layer in &config.layers {
            let state = State::new(config, *layer, conditions.extent(), kv_cache);
            let bytes = state.and_then(|state| state.bytes().0.checked_mul(batch as u64));
            let too_large = || Error::input("the KV cache is too large to plan for");
            let (Some(state), Some(bytes)) = (state, bytes) else { return Err(too_large()) };
            all = all.checked_add(bytes).filter(|all| *all <= MAX_BYTES).ok_or_else(too_large)?;
            states.push((state, Bytes(bytes)));
        }
        let state_of = |module: &Module| match module.kind {
            ModuleKind::Block(index) => Some(states[index]),
            _ => None,
        };
        let mut devices: Vec<DevicePlan> = inventory.devices.iter().map(empty).collect();
        let mut modules: Vec<PlannedModule> = tree
            .modules
            .iter()
            .zip(sizes)
            .map(|(module, size)| PlannedModule {
                path: module.path.clone(),
                device: DeviceId::Cpu,
                weights: size.packed,
                kv_cache: state_of(module).map_or(Bytes::ZERO, |(_, bytes)| bytes),
                state: state_of(module).map(|(state, _)| state),
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
            device.take(&modules, &fixed);
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
            chunk: conditions.chunk,
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
            weights: Vec::new(),
            allocations: Vec::new(),
            checkpoint: (*checkpoint).clone(),
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
    for weight in weights {
        let size = &mut sizes[weight.module];
        let Size { packed, read } = weight_size(config, weight, footprint::weight_bytes(weight, rules)?);
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
            let id = device.id;
            let examples = ["936GB/s", "RTX 3090"].map(|speed| Setting::Device(format!("{id}=SIZE@{speed}")));
            Error::usage(format!("`fastest` placement needs the bandwidth of {id}"))
                .hint(Hint::naming("state it, or name the GPU: {}, {}", examples))
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
                .hint(Hint::naming("{} uses it for this one too", [Setting::AnyModel])))
        }
        _ => Ok(()),
    }
}

fn check_devices(placement: &[DeviceId], inventory: &Inventory) -> Result<()> {
    let mut absent: Vec<_> = placement.iter().copied().filter(|id| inventory.device(*id).is_none()).collect();
    // Blocks on the disk are computed in host memory.
    if placement.contains(&DeviceId::Disk) && inventory.device(DeviceId::Cpu).is_none() {
        absent.push(DeviceId::Cpu);
    }
    absent.sort();
    absent.dedup();
    let Some(first) = absent.first() else {
        return Ok(());
    };
    let usable = inventory.devices.iter().map(|device| device.id).collect();
    let error = Error::does_not_fit(DeviceError::Unusable { devices: absent.clone(), usable });
    Err(if inventory.idle.iter().any(|device| device.id == *first) {
        error.hint(format!("{first} is there but cannot be used: {}", machine::needs()))
    } else if first.is_gpu() {
        let what = format!("no NVIDIA driver was found, or it shows no {first}; {{}} uses what is there");
        error.hint(Hint::naming(what, [Setting::AutomaticPlacement]))
    } else {
        error.hint(Hint::naming("{} describes it", [Setting::Device(format!("{first}=SIZE"))]))
    })
}
