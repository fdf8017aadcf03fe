//! What goes where, and what it takes: a [`Plan`] made from headers alone.
//!
//! `plan` prints it and `generate` carries it out; both make it here.

mod alternatives;
pub mod hf;
mod inventory;
pub mod memory;
pub mod placement;
mod remedies;
mod report;
mod strategy;

use serde::Serialize;

use crate::architecture::{Module, ModuleKind, ModuleTree, Weight};
use crate::bytes::{Bytes, MIB};
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::device_map::{self, DeviceMap, MaxMemory};
use crate::error::{Error, Result, first_five};
use crate::model_config::ModelConfig;
use crate::quant::{QuantizeRules, Scheme, WeightDtype};

pub use alternatives::Outline;
pub use inventory::{Device, Inventory};
pub use remedies::Remedy;
pub use strategy::{ParseStrategyError, Strategy};

/// Bytes of every device that a plan leaves free, unless told otherwise.
pub const DEFAULT_RESERVE: Bytes = Bytes(512 * MIB);
/// The longest context that is planned unless a longer one is asked for.
pub const DEFAULT_CONTEXT: usize = 4096;

/// What a caller may choose. A choice that is left open is the device map's, else the default.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// The schemes; `none` for the whole model by default.
    pub quantize: Option<QuantizeRules>,
    /// Longest context in tokens; the model's own by default, at most [`DEFAULT_CONTEXT`].
    pub context: Option<usize>,
    /// Sequences at once; 1 by default.
    pub batch: Option<usize>,
    /// Bytes left free on GPUs and host; [`DEFAULT_RESERVE`] by default.
    pub reserve: Option<Bytes>,
    /// Budgets that override what is free, never above it.
    pub max_memory: Option<MaxMemory>,
    /// Where the modules go; placed automatically by default.
    pub device_map: Option<DeviceMap>,
    /// How modules are placed automatically.
    pub strategy: Strategy,
}

/// A complete plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The model's name.
    pub model: String,
    /// Its architecture.
    pub architecture: String,
    /// Number of weights.
    pub parameters: u64,
    /// The dtype that the checkpoint declares.
    pub dtype: Option<String>,
    /// The schemes.
    pub quantize: QuantizeRules,
    /// Longest context, in tokens.
    pub context: usize,
    /// The longest context that the model was made for, in tokens.
    pub longest_context: usize,
    /// Sequences at once.
    pub batch: usize,
    /// Budgets that were asked for.
    pub max_memory: MaxMemory,
    /// Every module with its device, in the order they run.
    pub modules: Vec<PlannedModule>,
    /// Every device with what it takes.
    pub devices: Vec<DevicePlan>,
    /// What each way to place the model gives, the chosen one first; none where a map decides.
    pub placements: Vec<Outline>,
    /// GPUs of this machine that are too old, or whose driver is.
    pub idle: Vec<Device>,
    /// What would fit, where this does not; cheapest in quality first.
    pub remedies: Vec<Remedy>,
}

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
    #[serde(skip)]
    kind: ModuleKind,
}

impl PlannedModule {
    /// Whether it is a block, which has a KV cache.
    pub fn is_block(&self) -> bool {
        matches!(self.kind, ModuleKind::Block(_))
    }
}

/// What a device has and what the plan takes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DevicePlan {
    /// The device.
    pub id: DeviceId,
    /// What it is, where that is known.
    pub name: Option<String>,
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
    fn empty(device: &Device, conditions: &Conditions, config: &ModelConfig, staging: memory::HostStaging) -> Self {
        let reserve = if device.id == DeviceId::Disk { Bytes::ZERO } else { conditions.reserve };
        let limit = conditions.max_memory.get(&device.id).copied().unwrap_or(device.free);
        Self {
            id: device.id,
            name: device.name.clone(),
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
    fn take(&mut self, modules: &[PlannedModule], state: Bytes, ring: Bytes) {
        let here = || modules.iter().filter(|module| module.device == self.id);
        let in_memory_here = || modules.iter().filter(|module| memory_device(module.device) == self.id);
        self.kv_cache = in_memory_here().map(|module| module.kv_cache).sum();
        let (weights, count, is_used) =
            (here().map(|module| module.weights).sum(), here().count(), in_memory_here().next().is_some());
        (self.weights, self.modules) = (weights, count);
        if !is_used {
            let passes = self.id == DeviceId::Cpu;
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
        self.total().saturating_sub(self.budget)
    }
}

impl Plan {
    /// Plans `checkpoint` for the devices of `inventory`. The plan may not fit:
    /// [`Plan::fits`] says so, and [`Plan::remedies`] what would.
    ///
    /// # Errors
    /// The checkpoint's tensors contradict its configuration, the device map
    /// does not match the model or names a device that is not there, or an
    /// option is out of its range.
    pub fn new(checkpoint: &Checkpoint, inventory: &Inventory, options: &PlanOptions) -> Result<Self> {
        let mut plan = Self::without_remedies(checkpoint, inventory, options)?;
        plan.placements = alternatives::outlines(checkpoint, inventory, options, &plan);
        if !plan.fits() {
            plan.remedies = remedies::find(checkpoint, inventory, options, &plan)?;
        }
        Ok(plan)
    }

    fn without_remedies(checkpoint: &Checkpoint, inventory: &Inventory, options: &PlanOptions) -> Result<Self> {
        let config = &checkpoint.config;
        check_model(options.device_map.as_ref(), checkpoint)?;
        let conditions = Conditions::of(checkpoint, options)?;
        let Conditions { context, batch, .. } = conditions;
        let tree = ModuleTree::new(config);
        if let Some((path, _)) = conditions.quantize.iter().find(|(path, _)| !tree.names(path)) {
            return Err(Error::input(format!("`quantize` names unknown module `{path}`")));
        }
        let weights = tree.resolve(checkpoint)?;
        let sizes = module_sizes(&tree, &weights, &conditions.quantize)?;
        let kv = |device| memory::kv_bytes(config, context, batch, device).ok_or_else(|| too_large("the KV cache"));
        let kv = KvCache { cuda: kv(DeviceId::Cuda(0))?, host: kv(DeviceId::Cpu)? };
        let staging = memory::HostStaging::new(&weights, &conditions.quantize);
        let empty = |device| DevicePlan::empty(device, &conditions, config, staging);
        let mut devices: Vec<DevicePlan> = inventory.devices.iter().map(empty).collect();
        let placement = match &options.device_map {
            Some(map) => map.resolve(&tree)?,
            None => match options.strategy.transformers() {
                Some(mode) => as_transformers(checkpoint, &tree, &weights, &conditions, inventory, mode)?,
                None => automatic(&tree, &sizes, kv, &devices, options.strategy)?,
            },
        };
        check_devices(&placement, inventory)?;

        let modules: Vec<PlannedModule> = tree
            .modules
            .iter()
            .zip(&placement)
            .zip(&sizes)
            .map(|((module, device), weights)| PlannedModule {
                path: module.path.clone(),
                device: *device,
                weights: *weights,
                kv_cache: kv.of(module.kind, *device),
                kind: module.kind,
            })
            .collect();
        for device in &mut devices {
            device.take(&modules, memory::host_state(config, context), staging.ring());
        }
        Ok(Self {
            model: checkpoint.name.clone(),
            architecture: config.architecture.to_owned(),
            parameters: weights.iter().map(|weight| (weight.parameter.rows * weight.parameter.cols) as u64).sum(),
            dtype: config.dtype.clone(),
            quantize: conditions.quantize,
            context,
            longest_context: config.max_position_embeddings,
            batch,
            max_memory: conditions.max_memory,
            modules,
            devices,
            placements: Vec::new(),
            idle: inventory.idle.clone(),
            remedies: Vec::new(),
        })
    }

    /// Whether every device has room for what the plan puts there.
    pub fn fits(&self) -> bool {
        self.devices.iter().all(DevicePlan::fits)
    }

    /// The plan as a device map in canonical form.
    pub fn device_map(&self, checkpoint: &Checkpoint) -> String {
        device_map::to_json(
            &self.model,
            &self.quantize,
            self.context,
            self.batch,
            &self.max_memory,
            &ModuleTree::new(&checkpoint.config),
            &self.placement(),
        )
    }

    /// The device of every module, in the order they run.
    pub fn placement(&self) -> Vec<DeviceId> {
        self.modules.iter().map(|module| module.device).collect()
    }

    /// An error that says what is missing and what would fit.
    pub fn does_not_fit(&self) -> Error {
        let short = self.devices.iter().filter(|device| !device.fits()).map(|device| {
            format!("{} lacks {} ({} of {})", device.id, device.missing(), device.total(), device.budget)
        });
        let error =
            Error::does_not_fit(format!("`{}` does not fit: {}", self.model, short.collect::<Vec<_>>().join(", ")));
        self.remedies.iter().fold(error, |error, remedy| error.hint(remedy.to_string()))
    }
}

/// What a plan is made under: the caller's choices, else the map's, else the defaults.
struct Conditions {
    quantize: QuantizeRules,
    context: usize,
    batch: usize,
    max_memory: MaxMemory,
    reserve: Bytes,
}

impl Conditions {
    fn of(checkpoint: &Checkpoint, options: &PlanOptions) -> Result<Self> {
        let map = options.device_map.as_ref();
        let longest = checkpoint.config.max_position_embeddings;
        let quantize = options.quantize.clone().or_else(|| map?.quantize.clone());
        let conditions = Self {
            quantize: quantize.unwrap_or_else(|| QuantizeRules::whole_model(Scheme::None)),
            context: options.context.or_else(|| map?.context).unwrap_or(longest.min(DEFAULT_CONTEXT)),
            batch: options.batch.or_else(|| map?.batch).unwrap_or(1),
            max_memory: options.max_memory.clone().or_else(|| map?.max_memory.clone()).unwrap_or_default(),
            reserve: options.reserve.unwrap_or(DEFAULT_RESERVE),
        };
        if conditions.context > longest {
            return Err(Error::usage(format!(
                "a context of {} tokens is longer than the {longest} that `{}` was made for",
                conditions.context, checkpoint.name
            ))
            .hint(format!("`--context {longest}` is the longest")));
        }
        if conditions.context == 0 || conditions.batch == 0 {
            return Err(Error::usage("context and batch must be at least 1"));
        }
        Ok(conditions)
    }
}

/// Bytes of a block's KV cache, by where the block is computed.
#[derive(Clone, Copy)]
struct KvCache {
    cuda: Bytes,
    host: Bytes,
}

impl KvCache {
    fn of(self, module: ModuleKind, device: DeviceId) -> Bytes {
        match (module, device) {
            (ModuleKind::Block(_), DeviceId::Cuda(_)) => self.cuda,
            (ModuleKind::Block(_), DeviceId::Cpu | DeviceId::Disk) => self.host,
            _ => Bytes::ZERO,
        }
    }
}

/// The device in whose memory the KV cache of a module on `device` is.
fn memory_device(device: DeviceId) -> DeviceId {
    if device == DeviceId::Disk { DeviceId::Cpu } else { device }
}

fn too_large(what: &str) -> Error {
    Error::input(format!("{what} is too large to plan for"))
}

/// The packed size of every module.
fn module_sizes(tree: &ModuleTree, weights: &[Weight], rules: &QuantizeRules) -> Result<Vec<Bytes>> {
    let mut sizes = vec![Bytes::ZERO; tree.modules.len()];
    let one_device = vec![DeviceId::Cpu; tree.modules.len()];
    for placed in memory::lay_out(weights, &one_device, rules)? {
        sizes[placed.weight.module] += placed.layout.size();
    }
    Ok(sizes)
}

fn automatic(
    tree: &ModuleTree,
    sizes: &[Bytes],
    kv: KvCache,
    devices: &[DevicePlan],
    strategy: Strategy,
) -> Result<Vec<DeviceId>> {
    let mut costs: Vec<placement::Cost> = tree
        .modules
        .iter()
        .zip(sizes)
        .map(|(module, weights)| placement::Cost {
            weights: *weights,
            kv_cuda: kv.of(module.kind, DeviceId::Cuda(0)),
            kv_host: kv.of(module.kind, DeviceId::Cpu),
        })
        .collect();
    // A tied head costs nothing and runs where the embedding is.
    if tree.tied {
        costs.pop();
    }
    let capacities: Vec<placement::Capacity> = devices
        .iter()
        .map(|device| placement::Capacity { id: device.id, room: device.budget - device.total() })
        .collect();
    if capacities.is_empty() {
        return Err(Error::usage("there is no device to place the model on"));
    }
    let mut placement = match strategy {
        Strategy::Packed => placement::packed(&costs, &capacities),
        Strategy::Sequential => placement::sequential(&costs, &capacities),
        _ => placement::balanced(&costs, &capacities),
    };
    if tree.tied {
        placement.push(placement[0]);
    }
    Ok(placement)
}

/// What Transformers would choose, which sees free memory, our limits and the bytes of weights alone.
fn as_transformers(
    checkpoint: &Checkpoint,
    tree: &ModuleTree,
    weights: &[Weight],
    conditions: &Conditions,
    inventory: &Inventory,
    mode: hf::Mode,
) -> Result<Vec<DeviceId>> {
    let dtype = weights.first().map_or(WeightDtype::Bf16, |weight| weight.dtype);
    let quantization = match conditions.quantize.scheme("") {
        Scheme::None => hf::Quantization::None,
        Scheme::Int8 => hf::Quantization::EightBit,
        Scheme::Int4 => hf::Quantization::FourBit,
    };
    let model = hf::tree_of(&checkpoint.config, tree, dtype, quantization);
    let memory = inventory.devices.iter().filter(|device| device.id != DeviceId::Disk);
    let free: MaxMemory = memory.map(|device| (device.id, device.free)).collect();
    let limits = (!conditions.max_memory.is_empty()).then_some(&conditions.max_memory);
    let placement = hf::place(&model, &free, limits, mode)?;
    let device_of = |module: &Module| {
        let nowhere = || Error::input(format!("Transformers leaves `{}` without a device", module.path));
        placement.device_of(&module.path).ok_or_else(nowhere)
    };
    tree.modules.iter().map(device_of).collect()
}

fn check_model(map: Option<&DeviceMap>, checkpoint: &Checkpoint) -> Result<()> {
    let base = |name: &str| name.rsplit('/').next().map(str::to_owned);
    match map.and_then(|map| map.model.as_deref()) {
        Some(model) if base(model) != base(&checkpoint.name) => {
            Err(Error::input(format!("the device map was made for `{model}`, not for `{}`", checkpoint.name))
                .hint("remove its `model` if it is meant for this one too"))
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
        error.hint(format!(
            "{first} is there but cannot be used: evenkeel needs compute capability 7.5 and the NVIDIA driver 550"
        ))
    } else if matches!(first, DeviceId::Cuda(_)) {
        error
            .hint(format!("no NVIDIA driver was found, or it shows no {first}; `--device-map auto` uses what is there"))
    } else {
        error.hint(format!("`--device {first}=SIZE` describes it"))
    })
}
