//! Carries out a plan: reads each shard once, quantizes on the way, and puts
//! every matrix where the plan has it.
//!
//! Threads fill a small ring of slabs of whole rows, from the page cache or past
//! it; the pool quantizes each slab and its packed rows go straight to their place in the
//! arena, in memory or in a scratch file. What goes to a GPU is copied there as
//! it is, and packed there. No tensor is ever held whole.

mod arenas;
mod build;
mod fill;
pub(crate) mod reader;
mod shard;

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::backend::cuda::Gpu;
use crate::bytes::Bytes;
use crate::cancel::Cancel;
use crate::device::DeviceId;
use crate::engine::EngineCore;
use crate::error::Result;
use crate::footprint::CUDA_GRANULE;
use crate::fs;
use crate::plan::{DevicePlan, Plan};
use crate::pool::Pool;
use crate::text::{Sandbox, Tokenizer};
use arenas::Arenas;
pub(crate) use arenas::open as open_gpus;

pub use fill::WeightError;
pub(crate) use fill::broken_weight;

/// What a load tells while it runs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LoadEvent<'a> {
    /// Bytes of a module's tensor were read, quantized and put in place.
    Placed {
        /// The module.
        module: &'a str,
        /// Where it went.
        device: DeviceId,
        /// Bytes read from the shard.
        bytes: Bytes,
    },
    /// Kernels are compiled for GPUs of a compute capability, which takes some seconds and is kept.
    Compiling {
        /// Major and minor.
        capability: (i32, i32),
    },
    /// What one GPU copies to another does not arrive whole: hidden states go through host memory.
    ThroughHost {
        /// Whence.
        from: DeviceId,
        /// Where to.
        to: DeviceId,
    },
    /// Reading begins.
    Started {
        /// Bytes that will be read.
        bytes: Bytes,
    },
}

/// Where scratch files go, who computes, and how to stop.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The directory for the weights that the plan puts on the disk; [`fs::SCRATCH_DIRECTORY`] by default.
    pub offload_directory: PathBuf,
    /// Stops the load at the next slab.
    pub cancel: Cancel,
    /// The threads that pack weights, and then compute the stages of the CPU.
    pub pool: Arc<Pool>,
    /// The directory that keeps compiled kernels from one run to the next; none is needed.
    pub kernel_cache: Option<PathBuf>,
    /// Where the tokenizer runs; in this process, unlimited, where there is none.
    pub sandbox: Option<Sandbox>,
    /// Whether every buffer on a GPU is an allocation of its own, so that reading or writing
    /// beyond one is noticed; for tests.
    pub separate_buffers: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            offload_directory: fs::SCRATCH_DIRECTORY.into(),
            cancel: Cancel::new(),
            pool: Arc::default(),
            kernel_cache: None,
            sandbox: None,
            separate_buffers: false,
        }
    }
}

/// What a load did.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Bytes read from shards.
    pub read: Bytes,
    /// Those of them that were read past the page cache, as they were not in it.
    pub past_cache: Bytes,
    /// Wall time.
    pub seconds: f64,
    /// Where it went.
    pub times: LoadTimes,
    /// Bytes that were really taken of each device, beside the plan's.
    pub devices: Vec<MeasuredDevice>,
}

/// Seconds of a load, of its wall time; what is left went into opening devices, taking memory, and
/// building the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LoadTimes {
    /// Waiting for bytes of shards.
    pub read: f64,
    /// Packing rows on the CPU, and putting them into memory or onto the disk.
    pub pack: f64,
    /// Waiting for GPUs to copy and to pack.
    pub gpus: f64,
    /// Reading the tokenizer, which is done beside all else.
    pub tokenizer: f64,
}

/// Planned and measured bytes of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MeasuredDevice {
    /// The device.
    pub id: DeviceId,
    /// What the plan says that will be allocated there; of a GPU in the units that its driver gives.
    pub planned: Bytes,
    /// What its buffers came to; of a GPU, what it says that was taken.
    pub measured: Bytes,
    /// What else a GPU says.
    pub gpu: Option<MeasuredGpu>,
}

/// What a GPU says of its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MeasuredGpu {
    /// What was free when the plan was made, with what the driver's context takes.
    pub free_before: Bytes,
    /// What is free now.
    pub free_after: Bytes,
    /// What the plan says that the driver takes by itself: context, code and steps that are repeated.
    pub driver_planned: Bytes,
    /// What is gone beside what was allocated; others may have taken and given back some.
    pub driver_measured: Bytes,
}

impl MeasuredDevice {
    fn new(device: &DevicePlan, measured: Bytes, gpu: Option<&Arc<Gpu>>) -> Result<Self> {
        let (id, planned) = (device.id, device.allocated());
        let Some(gpu) = gpu else { return Ok(Self { id, planned, measured, gpu: None }) };
        let (free, _) = gpu.memory()?;
        let gpu = MeasuredGpu {
            free_before: device.free,
            free_after: free,
            driver_planned: device.driver,
            driver_measured: device.free - free - measured,
        };
        let planned = Bytes(planned.0.next_multiple_of(CUDA_GRANULE.0));
        Ok(Self { id, planned, measured, gpu: Some(gpu) })
    }
}

/// A model that is ready to run.
pub struct Model {
    /// The plan that it was loaded by.
    pub plan: Plan,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// What loading it did.
    pub report: LoadReport,
    pub(crate) core: EngineCore,
}

impl Plan {
    /// Loads the checkpoint as the plan has it.
    ///
    /// # Errors
    /// The plan does not fit, a file is broken or has changed, a weight is not
    /// finite, memory or disk is not to be had, or the caller stopped it.
    pub fn load(&self, options: impl Borrow<LoadOptions>, mut on_event: impl FnMut(LoadEvent)) -> Result<Model> {
        let options = options.borrow();
        if !self.fits() {
            return Err(self.does_not_fit());
        }
        options.cancel.check()?;
        let start = Instant::now();
        let checkpoint = self.checkpoint();
        checkpoint.confirm_head()?;
        let vocab_size = checkpoint.config.vocab_size;
        let mut tokenizer = Tokenizer::begin(checkpoint.local_directory()?, vocab_size, options.sandbox.as_ref())?;
        let read: Bytes = self.weights.iter().map(|placed| placed.weight.tensor.size()).sum();
        let mut arenas = Arenas::take(self, options, &mut on_event)?;
        on_event(LoadEvent::Started { bytes: read });
        // What cannot be talked to is not worth a long load.
        let stop = Cancel::new();
        let filling = LoadOptions { cancel: stop.clone(), ..options.clone() };
        let filled = fill::fill(self, &mut arenas, &filling, &mut |event| {
            on_event(event);
            if options.cancel.is_cancelled() || tokenizer.has_failed() {
                stop.cancel();
            }
        });
        let (staged, past_cache, mut times) = match filled {
            Ok(filled) => filled,
            Err(error) if options.cancel.is_cancelled() => return Err(error),
            Err(error) => return tokenizer.wait().and(Err(error)),
        };
        let gpus: BTreeMap<_, _> = arenas.gpus.iter().map(|(id, arenas)| (*id, Arc::clone(&arenas.gpu))).collect();
        let (mut pipeline, mut measured) = build::build(self, arenas, options, &mut on_event)?;
        pipeline.prepare()?;
        *measured.entry(DeviceId::Cpu).or_default() += staged;
        let tokenizer = tokenizer.wait()?;
        times.tokenizer = tokenizer.seconds();
        let report = LoadReport {
            read,
            past_cache,
            seconds: start.elapsed().max(Duration::from_nanos(1)).as_secs_f64(),
            times,
            devices: self
                .devices
                .iter()
                .map(|device| {
                    let measured = measured.get(&device.id).copied().unwrap_or_default();
                    MeasuredDevice::new(device, measured, gpus.get(&device.id))
                })
                .collect::<Result<_>>()?,
        };
        Ok(Model {
            plan: self.clone(),
            tokenizer: Arc::new(tokenizer),
            eos_token_ids: checkpoint.config.eos_token_ids.clone(),
            report,
            core: EngineCore::new(pipeline, Arc::clone(&checkpoint.config), self.extent()),
        })
    }
}

#[cfg(feature = "testing")]
impl Model {
    /// What runs it, for tests of that.
    pub fn core(&mut self) -> &mut EngineCore {
        &mut self.core
    }
}
