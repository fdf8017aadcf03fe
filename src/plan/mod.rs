//! What goes where, and what it takes: a [`Plan`] made from headers alone, but where schemes are
//! chosen by the error that is measured on a few rows of weights.
//!
//! `plan` prints it and `generate` carries it out; both make it here.

mod device_plan;
mod options;
mod outline;
mod place;
mod remedies;
mod saved;
mod scheme;
mod show;
mod speed;
mod subject;

use std::borrow::Borrow;

use serde::Serialize;

use crate::architecture::ModuleTree;
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::device_map::{self, DeviceMap, MAX_BATCH, MaxMemory};
use crate::error::{Error, Result};
use crate::footprint::{self, Allocation, Extent, HostStaging, Placed, Purpose, STAGING_SLABS};
use crate::machine::{Fault, Idle, Inventory};
use crate::quant::{KvDtype, QuantizeRules};
use scheme::{choose, kinds};
use subject::Subject;

pub use device_plan::{DevicePlan, PlannedModule};
pub use options::{DEFAULT_CHUNK, DEFAULT_CONTEXT, DEFAULT_RESERVE, PlanOptions, Quantize, Strategy};
pub use outline::Outline;
pub use place::hf;
pub use remedies::{Change, Remedy};
pub use scheme::KindReport;
pub use speed::Speed;

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
    /// Pages that they share, of 64 tokens each.
    pub pages: usize,
    /// Tokens of a prompt that are taken at once.
    pub chunk: usize,
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
    /// What each way to place the model gives, the chosen one first, where that was asked for and no map decides.
    pub placements: Vec<Outline>,
    /// What each scheme gives, where the scheme was to be chosen; the most bits first, a mixture last.
    pub schemes: Vec<Outline>,
    /// Whether projections have no schemes of their own because the weights are not in a local directory.
    pub is_unmeasured: bool,
    /// Bits and measured error of each kind of module, where that was asked for.
    pub kinds: Vec<KindReport>,
    /// GPUs of this machine that cannot be used.
    pub idle: Vec<Idle>,
    /// Why the driver of this machine shows no GPU.
    pub driver: Option<Fault>,
    /// What is to be known of the sizes of devices.
    pub notes: Vec<String>,
    /// What would fit, where this does not; cheapest in quality first.
    pub remedies: Vec<Remedy>,
    /// Every weight and where it goes, in the order in which they are read.
    pub weights: Vec<Placed>,
    /// Every allocation of a load: the weights of each device together, what each block keeps, every buffer.
    pub allocations: Vec<Allocation>,
    #[serde(serialize_with = "saved::origin")]
    checkpoint: Checkpoint,
}

impl Plan {
    /// Plans `checkpoint` for the devices of `inventory`. The plan may not fit:
    /// [`Plan::fits`] says so, and [`Plan::remedies`] what would.
    ///
    /// # Errors
    /// The checkpoint's tensors contradict its configuration, the device map
    /// does not match the model or names a device that is not there, or an
    /// option is out of its range.
    pub fn new(checkpoint: &Checkpoint, inventory: &Inventory, options: impl Borrow<PlanOptions>) -> Result<Self> {
        let subject = Subject::new(checkpoint, inventory)?;
        let (options, mut plan) = choose::with_scheme(&subject, options.borrow())?;
        if options.alternatives {
            plan.placements = outline::placements(&subject, &options, &plan);
        }
        if options.kinds {
            plan.kinds = kinds::report(&subject, &plan.quantize, &options)?;
        }
        if !plan.fits() {
            plan.remedies = remedies::find(&subject, &options, &plan);
        }
        plan.weights = footprint::lay_out(&subject.weights, &plan.placement(), &plan.quantize)?;
        // Shard after shard, each from its beginning to its end.
        plan.weights.sort_by_key(|placed| (placed.weight.tensor.shard, placed.weight.tensor.range.start));
        Ok(plan)
    }

    /// The checkpoint that it is a plan of.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What there is room for.
    pub(crate) fn extent(&self) -> Extent {
        Extent { context: self.context, chunk: self.chunk, sequences: self.batch, pages: self.pages }
    }

    /// What sequences share to keep keys and values in, where that is less than the whole context of each.
    fn shared_state(&self) -> Option<Bytes> {
        let state = self.allocations.iter().filter(|allocation| allocation.purpose == Purpose::State);
        let whole = Extent::new(self.context, self.chunk, self.batch);
        (whole.pages > self.pages).then(|| state.map(|allocation| allocation.bytes).sum())
    }

    /// Bytes of a device that are for a purpose.
    pub fn sum(&self, device: DeviceId, purpose: Purpose) -> Bytes {
        device_plan::sum(&self.allocations, device, purpose)
    }

    /// Bytes of an allocation by its name.
    ///
    /// # Errors
    /// The plan has none of that name.
    pub fn allocation(&self, device: DeviceId, purpose: Purpose, name: &str) -> Result<Bytes> {
        let is_meant = |allocation: &&Allocation| {
            (allocation.device, allocation.purpose) == (device, purpose) && allocation.name == name
        };
        let found = self.allocations.iter().find(is_meant).map(|allocation| allocation.bytes);
        found.ok_or_else(|| Error::input(format!("the plan allocates no `{name}` on {device}")))
    }

    /// The host's staging ring.
    pub(crate) fn staging(&self) -> Result<HostStaging> {
        let bytes = |name| Ok(self.allocation(DeviceId::Cpu, Purpose::Staging, name)?.as_usize().unwrap_or(usize::MAX));
        Ok(HostStaging {
            slab: bytes("slabs")? / STAGING_SLABS,
            packed: bytes("packed")?,
            transposed: bytes("transposed")?,
        })
    }

    /// Whether the head is the embedding.
    pub(crate) fn is_tied(&self) -> bool {
        self.checkpoint.config.tie_word_embeddings
    }

    /// The longest context that fits, in tokens, with no more modules off the
    /// GPUs than the shortest one needs; `None` where not even one token fits.
    pub fn longest_context(
        checkpoint: &Checkpoint,
        inventory: &Inventory,
        options: &PlanOptions,
    ) -> Result<Option<usize>> {
        let longest = checkpoint.config.max_position_embeddings;
        largest(checkpoint, inventory, options, longest, |options, tokens| options.context = Some(tokens))
    }

    /// The most sequences at once that fit, up to `most`, with no more modules off the GPUs
    /// than one needs; `None` where not even one fits.
    pub fn largest_batch(
        checkpoint: &Checkpoint,
        inventory: &Inventory,
        options: &PlanOptions,
        most: usize,
    ) -> Result<Option<usize>> {
        largest(checkpoint, inventory, options, most.clamp(1, MAX_BATCH), |options, batch| options.batch = Some(batch))
    }

    /// Whether every device has room for what the plan puts there.
    pub fn fits(&self) -> bool {
        self.devices.iter().all(DevicePlan::fits)
    }

    /// The plan as a device map in canonical form.
    pub fn device_map(&self) -> String {
        let mut conditions = DeviceMap::default();
        conditions.model = Some(self.model.clone());
        conditions.quantize = Some(self.quantize.clone());
        (conditions.context, conditions.batch) = (Some(self.context), Some(self.batch));
        conditions.kv_cache = Some(self.kv_cache);
        conditions.kv_memory = self.shared_state();
        conditions.max_memory = Some(self.max_memory.clone());
        conditions.to_json(&ModuleTree::new(&self.checkpoint.config), &self.placement())
    }

    /// The plan as the plain dictionary of Hugging Face: GPUs by index, every module by itself.
    pub fn hugging_face_map(&self) -> String {
        device_map::to_hugging_face(&ModuleTree::new(&self.checkpoint.config), &self.placement())
    }

    /// How often the hidden state changes its device for a token.
    pub fn hops(&self) -> usize {
        self.modules.windows(2).filter(|pair| pair[0].device != pair[1].device).count()
    }

    /// Modules that are in host memory or on the disk.
    pub fn off_gpus(&self) -> usize {
        self.modules.iter().filter(|module| !module.device.is_gpu()).count()
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
        let short = self.devices.iter().filter(|device| !device.fits()).cloned().collect();
        Error::does_not_fit(DoesNotFit { model: self.model.clone(), devices: short })
    }
}

/// A plan that does not fit, as the cause of an error.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("`{model}` does not fit: {}", .devices.iter().map(|device| {
    format!("{} lacks {} ({} of {})", device.id, device.missing(), device.total(), device.budget)
}).collect::<Vec<_>>().join(", "))]
pub struct DoesNotFit {
    /// The model's name.
    pub model: String,
    /// The devices that have too little, with what is to be taken of each.
    pub devices: Vec<DevicePlan>,
}

/// The largest size up to `limit` under which a plan fits with no more off the GPUs than under 1.
fn largest(
    checkpoint: &Checkpoint,
    inventory: &Inventory,
    options: &PlanOptions,
    limit: usize,
    set: impl Fn(&mut PlanOptions, usize),
) -> Result<Option<usize>> {
    let subject = Subject::new(checkpoint, inventory)?;
    let plan = |size| {
        let mut options = options.clone();
        set(&mut options, size);
        let (options, _) = choose::decide_scheme(&subject, &options)?;
        subject.plan(&options)
    };
    let smallest = plan(1)?;
    // The bytes grow with the size, so the largest that fits is found by bisection.
    let fits = |size| plan(size).map(|plan| plan.fits() && plan.off_gpus() <= smallest.off_gpus());
    if !smallest.fits() {
        return Ok(None);
    }
    Ok(Some(bisect(1, limit, fits)?))
}

/// The largest size of `fitting..=limit` that fits, where `fitting` does and larger ones are harder.
fn bisect(mut fitting: usize, limit: usize, mut fits: impl FnMut(usize) -> Result<bool>) -> Result<usize> {
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
