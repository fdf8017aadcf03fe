//! One plan of a checkpoint for a machine, under options that leave nothing open.

use super::device_plan::Fixed;
use super::options::Conditions;
use super::{DevicePlan, Plan, PlanOptions, PlannedModule, Speed, Strategy, hf, place, speed};
use crate::architecture::{Module, ModuleKind, ModuleTree, Role, Weight};
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::{DeviceError, DeviceId};
use crate::device_map::{DeviceMap, MaxMemory};
use crate::error::{Error, Hint, Result, Setting};
use crate::footprint::{self, HostStaging, MAX_BYTES, State};
use crate::machine::{Device, Inventory};
use crate::quant::WeightDtype;

/// What is planned, and for what: a checkpoint whose tensors have been found, and a machine.
pub struct Subject<'a> {
    pub checkpoint: &'a Checkpoint,
    pub inventory: &'a Inventory,
    pub tree: ModuleTree,
    pub weights: Vec<Weight>,
}

impl<'a> Subject<'a> {
    pub fn new(checkpoint: &'a Checkpoint, inventory: &'a Inventory) -> Result<Self> {
        let tree = ModuleTree::new(&checkpoint.config);
        Ok(Self { checkpoint, inventory, weights: tree.resolve(checkpoint)?, tree })
    }

    /// The plan under `options`, in which `auto` has been decided; without alternatives and remedies.
    pub fn plan(&self, options: &PlanOptions) -> Result<Plan> {
        self.plan_on(self.inventory, options)
    }

    /// The plan for another machine.
    pub fn plan_on(&self, inventory: &Inventory, options: &PlanOptions) -> Result<Plan> {
        let Self { checkpoint, tree, weights, .. } = self;
        let config = &checkpoint.config;
        check_model(options, checkpoint)?;
        check_budgets(options, inventory)?;
        let conditions = Conditions::of(checkpoint, tree.embedding(), options)?;
        let paths = tree.paths();
        if let Some((path, _)) = conditions.quantize.iter().find(|(path, _)| !paths.have(path)) {
            return Err(Error::input(format!("`quantize` names unknown module `{path}`")));
        }
        let mut modules = self.modules(&conditions)?;
        let staging = HostStaging::new(weights, &conditions.quantize);
        let fixed = Fixed { config, conditions: &conditions, staging, tokenizer: checkpoint.tokenizer_size, inventory };
        let placement = match &options.device_map {
            Some(map) => map.resolve(tree)?,
            None if options.strategy.is_transformers() => {
                as_transformers(self, inventory, &conditions, options.strategy)?
            }
            None => {
                // What each takes when it is used at all, before any module is on it.
                let gpus = inventory.devices.iter().filter(|device| device.id.is_gpu()).count();
                let buffers = |device: &Device| fixed.buffers(device.id, true, gpus);
                let empty = |device: &Device| DevicePlan::new(device, &conditions, &buffers(device), 0);
                let devices: Vec<_> = inventory.devices.iter().map(empty).collect();
                automatic(tree, &modules, &devices, options.strategy)?
            }
        };
        check_devices(&placement, inventory)?;
        for (module, device) in modules.iter_mut().zip(placement) {
            module.device = device;
        }
        let allocations = fixed.allocations(&modules);
        let device = |device: &Device| {
            let here = modules.iter().filter(|module| module.device == device.id).count();
            DevicePlan::new(device, &conditions, &allocations, here)
        };
        let devices: Vec<_> = inventory.devices.iter().map(device).collect();
        let extent = conditions.extent;
        Ok(Plan {
            model: checkpoint.name.clone(),
            architecture: config.family.architecture.to_owned(),
            parameters: weights.iter().map(|weight| (weight.parameter.rows * weight.parameter.cols) as u64).sum(),
            dtype: config.dtype.clone(),
            context: extent.context,
            longest_context: config.max_position_embeddings,
            batch: extent.sequences,
            pages: extent.pages,
            chunk: extent.chunk,
            kv_cache: conditions.kv_cache,
            quantize: conditions.quantize,
            max_memory: conditions.max_memory,
            speed: Speed::predict(&devices, &modules, extent.sequences),
            modules,
            devices,
            placements: Vec::new(),
            schemes: Vec::new(),
            is_unmeasured: false,
            kinds: Vec::new(),
            idle: inventory.idle.clone(),
            driver: inventory.driver.clone(),
            notes: inventory.notes.clone(),
            remedies: Vec::new(),
            weights: Vec::new(),
            allocations,
            checkpoint: (*checkpoint).clone(),
        })
    }

    /// Every module and what it takes, not yet placed. A token reads a row of the embedding, or all of it as the
    /// head, the experts that it is sent to, and all of anything else.
    fn modules(&self, conditions: &Conditions) -> Result<Vec<PlannedModule>> {
        let config = &self.checkpoint.config;
        let planned = |module: &Module| PlannedModule {
            path: module.path.clone(),
            device: DeviceId::Cpu,
            weights: Bytes::ZERO,
            kv_cache: Bytes::ZERO,
            state: None,
            read: Bytes::ZERO,
            kind: module.kind,
        };
        let mut modules: Vec<_> = self.tree.modules.iter().map(planned).collect();
        for weight in &self.weights {
            let packed = footprint::weight_bytes(weight, &conditions.quantize)?;
            let module = &mut modules[weight.module];
            module.weights += packed;
            module.read += match (weight.parameter.role, config.experts) {
                (Role::Embedding | Role::Positions, _) => Bytes::ZERO,
                (Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_), Some(experts)) => {
                    Bytes(packed.0 / experts.count as u64 * experts.per_token as u64)
                }
                _ => packed,
            };
        }
        if let (true, [embedding, .., head]) = (self.tree.tied, &mut modules[..]) {
            head.read = embedding.weights;
        }
        let mut all = 0u64;
        for module in &mut modules {
            let ModuleKind::Block(index) = module.kind else { continue };
            let too_large = || Error::input("the KV cache is too large to plan for");
            module.state = State::new(config, config.layers[index], conditions.extent, conditions.kv_cache);
            module.kv_cache = module.state.ok_or_else(too_large)?.bytes();
            all = all.checked_add(module.kv_cache.0).filter(|all| *all <= MAX_BYTES).ok_or_else(too_large)?;
        }
        Ok(modules)
    }
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

fn paces(devices: &[DevicePlan]) -> Result<Vec<f64>> {
    let pace = |device: &DevicePlan| {
        speed::pace(device).ok_or_else(|| {
            let id = device.id;
            let examples = ["936GB/s", "RTX 3090"].map(|speed| Setting::Device(format!("{id}=SIZE@{speed}")));
            Error::usage(format!("`fastest` placement needs the bandwidth of {id}"))
                .hint(Hint::naming("state it, or name the GPU: {}, {}", examples))
        })
    };
    devices.iter().map(pace).collect()
}

/// What Transformers would choose, which sees free memory, our limits and the bytes of weights alone.
fn as_transformers(
    subject: &Subject,
    inventory: &Inventory,
    conditions: &Conditions,
    strategy: Strategy,
) -> Result<Vec<DeviceId>> {
    let Subject { checkpoint, tree, weights, .. } = subject;
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

fn check_budgets(options: &PlanOptions, inventory: &Inventory) -> Result<()> {
    let mut budgets = options.max_memory.iter().flatten();
    let Some((device, _)) = budgets.find(|(device, _)| inventory.device(**device).is_none()) else {
        return Ok(());
    };
    let error = Error::usage(DeviceError::Budget { device: *device, usable: inventory.ids() });
    Err(inventory.why_idle(*device).into_iter().fold(error, Error::hint))
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
    let error = Error::does_not_fit(DeviceError::Unusable { devices: absent.clone(), usable: inventory.ids() });
    Err(if let Some(why) = inventory.why_idle(*first) {
        error.hint(why)
    } else if first.is_gpu() {
        let has_gpus = !inventory.idle.is_empty() || inventory.devices.iter().any(|device| device.id.is_gpu());
        let why = if has_gpus {
            format!("there is no {first}")
        } else {
            format!("no NVIDIA driver was found, or it shows no {first}")
        };
        error.hint(Hint::naming(why + "; {} uses what is there", [Setting::AutomaticPlacement]))
    } else {
        error.hint(Hint::naming("{} describes it", [Setting::Device(format!("{first}=SIZE"))]))
    })
}
