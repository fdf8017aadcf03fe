//! What goes where, and what it takes: a [`Plan`] made from headers alone.
//!
//! `plan` prints it and `generate` carries it out; both make it here.

mod alternatives;
mod fastest;
pub mod hf;
mod inventory;
pub mod memory;
mod options;
mod picture;
pub mod placement;
mod remedies;
mod report;
mod speed;
mod strategy;

use std::borrow::Cow;

use serde::Serialize;

use crate::architecture::{Module, ModuleKind, ModuleTree, Role, Weight};
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::device_map::{self, Contents, DeviceMap, MaxMemory};
use crate::error::{Error, Result, first_five};
use crate::model_config::ModelConfig;
use crate::quant::{KvDtype, QuantizeRules, Scheme, Storage, WeightDtype};
use memory::KvLayout;
use options::Conditions;

pub use alternatives::Outline;
pub use fastest::fastest;
pub use inventory::{Device, Inventory};
pub use options::{DEFAULT_CONTEXT, DEFAULT_RESERVE, PlanOptions, Quantize};
pub use remedies::{Change, Remedy};
pub use speed::{Bandwidth, Pace, ParseBandwidthError, Speed};
pub use strategy::{ParseStrategyError, Strategy};

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
    /// The type of the KV cache's elements.
    pub kv_cache: KvDtype,
    /// Budgets that were asked for.
    pub max_memory: MaxMemory,
    /// Every module with its device, in the order they run.
    pub modules: Vec<PlannedModule>,
    /// Every device with what it takes.
    pub devices: Vec<DevicePlan>,
    /// How fast one sequence would be, where the bandwidths are known.
    pub speed: Option<Speed>,
    /// What each way to place the model gives, the chosen one first; none where a map decides.
    pub placements: Vec<Outline>,
    /// What each scheme gives, where the scheme was to be chosen; the most bits first.
    pub schemes: Vec<Outline>,
    /// GPUs of this machine that no plan uses yet.
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
    /// What a token reads of its weights.
    #[serde(skip)]
    read: Bytes,
    #[serde(skip)]
    kind: ModuleKind,
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
    fn empty(device: &Device, conditions: &Conditions, config: &ModelConfig, staging: memory::HostStaging) -> Self {
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

    /// Adds what `modules` take of this device.
    fn take(&mut self, modules: &[PlannedModule]) {
        let here = || modules.iter().filter(|module| module.device == self.id);
        let in_memory_here = || modules.iter().filter(|module| memory_device(module.device) == self.id);
        self.kv_cache = in_memory_here().map(|module| module.kv_cache).sum();
        let (weights, count, is_used) =
            (here().map(|module| module.weights).sum(), here().count(), in_memory_here().next().is_some());
        (self.weights, self.modules) = (weights, count);
        if !is_used {
            (self.workspace, self.staging, self.driver_context) = (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO);
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
        let tree = ModuleTree::new(&checkpoint.config);
        let subject = Subject::new(checkpoint, inventory, &tree)?;
        let (options, schemes) = alternatives::decide_scheme(&subject, options)?;
        let mut plan = subject.plan(&options)?;
        plan.schemes = schemes;
        plan.placements = alternatives::placements(&subject, &options, &plan);
        if !plan.fits() {
            plan.remedies = remedies::find(&subject, &options, &plan)?;
        }
        Ok(plan)
    }

    /// The longest context that fits, in tokens, with no more modules off the
    /// GPUs than the shortest one needs; `None` where not even one token fits.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn longest_context(
        checkpoint: &Checkpoint,
        inventory: &Inventory,
        options: &PlanOptions,
    ) -> Result<Option<usize>> {
        let longest = checkpoint.config.max_position_embeddings;
        largest(checkpoint, inventory, options, longest, |options, tokens| options.context = Some(tokens))
    }

    /// The most sequences at once that fit, with no more modules off the GPUs
    /// than one needs; `None` where not even one fits.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn largest_batch(
        checkpoint: &Checkpoint,
        inventory: &Inventory,
        options: &PlanOptions,
    ) -> Result<Option<usize>> {
        largest(checkpoint, inventory, options, MAX_BATCH, |options, batch| options.batch = Some(batch))
    }

    /// Whether every device has room for what the plan puts there.
    pub fn fits(&self) -> bool {
        self.devices.iter().all(DevicePlan::fits)
    }

    /// The plan as a device map in canonical form.
    pub fn device_map(&self, checkpoint: &Checkpoint) -> String {
        let contents = Contents {
            model: &self.model,
            quantize: &self.quantize,
            context: self.context,
            batch: self.batch,
            kv_cache: self.kv_cache,
            max_memory: &self.max_memory,
        };
        device_map::to_json(&contents, &ModuleTree::new(&checkpoint.config), &self.placement())
    }

    /// The plan as the plain dictionary of Hugging Face: GPUs by index, every module by itself.
    pub fn hugging_face_map(&self, checkpoint: &Checkpoint) -> String {
        device_map::to_hugging_face(&ModuleTree::new(&checkpoint.config), &self.placement())
    }

    /// How often the hidden state changes its device for a token.
    pub fn hops(&self) -> usize {
        self.modules.windows(2).filter(|pair| pair[0].device != pair[1].device).count()
    }

    /// Modules that are in host memory or on the disk.
    pub fn off_gpus(&self) -> usize {
        self.modules.iter().filter(|module| !matches!(module.device, DeviceId::Cuda(_))).count()
    }

    /// All that the plan takes, over all devices.
    pub fn total(&self) -> Bytes {
        self.devices.iter().map(DevicePlan::total).sum()
    }

    /// The device of every module, in the order they run.
    pub fn placement(&self) -> Vec<DeviceId> {
        self.modules.iter().map(|module| module.device).collect()
    }

    /// An error that says what is missing; [`Plan::remedies`] says what would fit.
    pub fn does_not_fit(&self) -> Error {
        let short = self.devices.iter().filter(|device| !device.fits()).map(|device| {
            format!("{} lacks {} ({} of {})", device.id, device.missing(), device.total(), device.budget)
        });
        Error::does_not_fit(format!("`{}` does not fit: {}", self.model, short.collect::<Vec<_>>().join(", ")))
    }
}

/// The most sequences at once that are tried.
const MAX_BATCH: usize = 1 << 16;

/// The largest size up to `limit` under which a plan fits with no more off the GPUs than under 1.
fn largest(
    checkpoint: &Checkpoint,
    inventory: &Inventory,
    options: &PlanOptions,
    limit: usize,
    set: impl Fn(&mut PlanOptions, usize),
) -> Result<Option<usize>> {
    let tree = ModuleTree::new(&checkpoint.config);
    let subject = Subject::new(checkpoint, inventory, &tree)?;
    let plan = |size| {
        let mut options = options.clone();
        set(&mut options, size);
        let (options, _) = alternatives::decide_scheme(&subject, &options)?;
        subject.plan(&options)
    };
    let smallest = plan(1)?;
    // The bytes grow with the size, so the largest that fits is found by halving.
    let fits = |size| plan(size).map(|plan| plan.fits() && plan.off_gpus() <= smallest.off_gpus());
    if !smallest.fits() {
        return Ok(None);
    }
    Ok(Some(halve(1, limit, fits)?))
}

/// The largest size of `fitting..=limit` that fits, where `fitting` does and larger ones are harder.
fn halve(mut fitting: usize, limit: usize, fits: impl Fn(usize) -> Result<bool>) -> Result<usize> {
    let mut too_large = limit + 1;
    while too_large - fitting > 1 {
        let middle = usize::midpoint(fitting, too_large);
        if fits(middle)? {
            fitting = middle;
        } else {
            too_large = middle;
        }
    }
    Ok(fitting)
}

/// What is planned, and for what: a checkpoint whose tensors have been found, and a machine.
struct Subject<'a> {
    checkpoint: &'a Checkpoint,
    inventory: Cow<'a, Inventory>,
    tree: &'a ModuleTree,
    weights: Vec<Weight<'a>>,
}

impl<'a> Subject<'a> {
    fn new(checkpoint: &'a Checkpoint, inventory: &'a Inventory, tree: &'a ModuleTree) -> Result<Self> {
        Ok(Self { checkpoint, inventory: Cow::Borrowed(inventory), tree, weights: tree.resolve(checkpoint)? })
    }

    /// The plan under `options`, in which `auto` has been decided; without alternatives and remedies.
    fn plan(&self, options: &PlanOptions) -> Result<Plan> {
        let Self { checkpoint, inventory, tree, weights } = self;
        let config = &checkpoint.config;
        check_model(options, checkpoint)?;
        let conditions = Conditions::of(checkpoint, options)?;
        let Conditions { context, batch, kv_cache, .. } = conditions;
        let conditions = Conditions { quantize: conditions.quantize.for_embedding(tree.embedding()), ..conditions };
        if let Some((path, _)) = conditions.quantize.iter().find(|(path, _)| !tree.names(path)) {
            return Err(Error::input(format!("`quantize` names unknown module `{path}`")));
        }
        let sizes = module_sizes(config, tree, weights, &conditions.quantize)?;
        let kv = KvLayout::new(config, context, batch, kv_cache).ok_or_else(|| too_large("the KV cache"))?;
        let staging = memory::HostStaging::new(weights, &conditions.quantize);
        let empty = |device| DevicePlan::empty(device, &conditions, config, staging);
        let mut devices: Vec<DevicePlan> = inventory.devices.iter().map(empty).collect();
        let mut modules: Vec<PlannedModule> = tree
            .modules
            .iter()
            .zip(&sizes)
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
            None => match options.strategy.transformers() {
                Some(mode) => as_transformers(self, &conditions, mode)?,
                None => automatic(tree, &modules, &devices, options.strategy)?,
            },
        };
        check_devices(&placement, inventory)?;
        check_schemes(&placement, weights, &conditions.quantize)?;
        for (module, device) in modules.iter_mut().zip(placement) {
            module.device = device;
        }
        for device in &mut devices {
            device.take(&modules);
        }
        Ok(Plan {
            model: checkpoint.name.clone(),
            architecture: config.family.architecture.to_owned(),
            parameters: weights.iter().map(|weight| (weight.parameter.rows * weight.parameter.cols) as u64).sum(),
            dtype: config.dtype.clone(),
            quantize: conditions.quantize,
            context,
            longest_context: config.max_position_embeddings,
            batch,
            kv_cache,
            max_memory: conditions.max_memory,
            speed: Speed::predict(&devices, &modules, batch),
            modules,
            devices,
            placements: Vec::new(),
            schemes: Vec::new(),
            idle: inventory.idle.clone(),
            remedies: Vec::new(),
        })
    }
}

/// The device in whose memory the KV cache of a module on `device` is.
fn memory_device(device: DeviceId) -> DeviceId {
    if device == DeviceId::Disk { DeviceId::Cpu } else { device }
}

fn too_large(what: &str) -> Error {
    Error::input(format!("{what} is too large to plan for"))
}

/// What a module's weights take, and what a token reads of them.
#[derive(Clone, Copy, Default)]
struct Size {
    packed: Bytes,
    read: Bytes,
}

/// The size of every module: a token reads a row of the embedding, the experts
/// that it is sent to, and all of anything else; where the head is the
/// embedding, all of that.
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
        let packed = placed.layout.size();
        size.packed += packed;
        size.read += match (placed.weight.parameter.role, config.experts) {
            (Role::Embedding | Role::Positions, _) => Bytes::ZERO,
            (Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_), Some(experts)) => {
                Bytes(packed.0 / experts.count as u64 * experts.per_token as u64)
            }
            _ => packed,
        };
    }
    if tree.tied
        && let Some(embedding) = sizes.first().map(|size| size.packed)
        && let Some(head) = sizes.last_mut()
    {
        head.read = embedding;
    }
    Ok(sizes)
}

fn automatic(
    tree: &ModuleTree,
    modules: &[PlannedModule],
    devices: &[DevicePlan],
    strategy: Strategy,
) -> Result<Vec<DeviceId>> {
    let mut costs: Vec<placement::Cost> = modules
        .iter()
        .map(|module| placement::Cost {
            weights: module.weights,
            kv: module.kv_cache,
            read: module.read,
            is_block: matches!(module.kind, ModuleKind::Block(_)),
        })
        .collect();
    // A tied head costs nothing and runs where the embedding is.
    if let Some(head) = costs.pop_if(|_| tree.tied) {
        costs[0].read = head.read;
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
        Strategy::Fastest => fastest(&costs, &capacities, &paces(devices)?),
        _ => placement::balanced(&costs, &capacities),
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
fn as_transformers(subject: &Subject, conditions: &Conditions, mode: hf::Mode) -> Result<Vec<DeviceId>> {
    let Subject { checkpoint, inventory, tree, weights } = subject;
    let dtype = weights.first().map_or(WeightDtype::Bf16, |weight| weight.dtype);
    let quantization = match conditions.quantize.scheme("") {
        Scheme::None => hf::Quantization::None,
        Scheme::Int8 => hf::Quantization::EightBit,
        Scheme::Int4 | Scheme::Nl4 => hf::Quantization::FourBit,
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

/// Refuses weights on a GPU in a scheme that has no kernel there.
fn check_schemes(placement: &[DeviceId], weights: &[Weight], rules: &QuantizeRules) -> Result<()> {
    let is_refused = |weight: &&Weight| {
        matches!(placement[weight.module], DeviceId::Cuda(_))
            && memory::layout(weight, rules).is_some_and(|layout| layout.storage == Storage::Nl4)
    };
    weights.iter().find(is_refused).map_or(Ok(()), |weight| {
        let (module, device) = (&weight.parameter.module, placement[weight.module]);
        Err(Error::input(format!("`{module}` cannot be `nl4` on {device}: only the CPU computes this scheme"))
            .hint("`--quantize int4` takes as many bytes")
            .hint("a `--device-map` that places all of it on the CPU or the disk keeps `nl4`"))
    })
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
            "this version computes on the CPU and the disk only; {first} is there but cannot be used yet"
        ))
    } else if matches!(first, DeviceId::Cuda(_)) {
        error
            .hint(format!("no NVIDIA driver was found, or it shows no {first}; `--device-map auto` uses what is there"))
    } else {
        error.hint(format!("`--device {first}=SIZE` describes it"))
    })
}
