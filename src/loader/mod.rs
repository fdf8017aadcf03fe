//! Carries out a plan: reads each shard once, quantizes on the way, and puts
//! every matrix where the plan has it.
//!
//! A reader thread fills a small ring of slabs of whole rows; the pool
//! quantizes each slab and its packed rows go straight to their place in the
//! arena, in memory or in a scratch file. No tensor is ever held whole.

mod reader;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::architecture::{ModuleKind, ModuleTree, Parameter as Named, Weight};
use crate::backend::cpu::{self, Arena, CpuStage, Parameter, Parameters, Workspace};
use crate::backend::{Pipeline, Stage, StageRoles};
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::fs;
use crate::plan::Plan;
use crate::plan::memory::{self, HostStaging, KvLayout, Placed, WorkspaceLayout};
use crate::quant::{PackedRows, QuantizeError, Storage, quantize_rows};
use crate::tokenizer::Tokenizer;

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
    /// Reading begins.
    Started {
        /// Bytes that will be read.
        bytes: Bytes,
    },
}

/// Where scratch files go, and how to stop.
#[derive(Clone, Debug)]
pub struct LoadOptions<'a> {
    /// The directory for the weights that the plan puts on the disk.
    pub offload_directory: &'a Path,
    /// Set to stop the load at the next slab.
    pub cancel: &'a AtomicBool,
}

/// What a load did.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Bytes read from shards.
    pub read: Bytes,
    /// Wall time.
    pub seconds: f64,
    /// Bytes that were really taken of each device, beside the plan's.
    pub devices: Vec<MeasuredDevice>,
}

/// Planned and measured bytes of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MeasuredDevice {
    /// The device.
    pub id: DeviceId,
    /// What the plan says it takes.
    pub planned: Bytes,
    /// What its buffers came to.
    pub measured: Bytes,
}

/// A model that is ready to run.
pub struct Model {
    /// The plan that it was loaded by.
    pub plan: Plan,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// What loading it did.
    pub report: LoadReport,
    pub(crate) pipeline: Pipeline,
}

impl Plan {
    /// Loads `checkpoint` as the plan has it.
    ///
    /// # Errors
    /// The plan does not fit, a file is broken or has changed, a weight is not
    /// finite, memory or disk is not to be had, or the caller stopped it.
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        mut on_event: impl FnMut(LoadEvent),
    ) -> Result<Model> {
        if !self.fits() {
            return Err(self.does_not_fit());
        }
        let start = Instant::now();
        let directory = checkpoint
            .directory
            .as_deref()
            .ok_or_else(|| Error::input(format!("`{}` is not in a local directory", checkpoint.name)))?;
        let tokenizer = Tokenizer::open(directory, checkpoint.config.vocab_size)?;
        let tree = ModuleTree::new(&checkpoint.config);
        let weights = tree.resolve(checkpoint)?;
        let devices = self.placement();
        let mut placed = memory::lay_out(&weights, &devices, &self.quantize)?;
        let staging = HostStaging::new(&weights, &self.quantize);

        let mut arenas = Arenas::take(self, &placed, options.offload_directory)?;
        placed.sort_by_key(|p| (p.weight.tensor.shard, p.weight.tensor.range.start));
        let read: Bytes = placed.iter().map(|p| p.weight.tensor.size()).sum();
        on_event(LoadEvent::Started { bytes: read });
        let staged = fill(&mut arenas, checkpoint, directory, &placed, staging, options, &mut on_event)?;
        let arenas = arenas.finish(options.offload_directory)?;

        let (pipeline, mut measured) = build(self, checkpoint, &tree, &placed, &arenas)?;
        *measured.entry(DeviceId::Cpu).or_default() += staged;
        let report = LoadReport {
            read,
            seconds: start.elapsed().max(Duration::from_nanos(1)).as_secs_f64(),
            devices: self
                .devices
                .iter()
                .map(|device| MeasuredDevice {
                    id: device.id,
                    planned: device.total(),
                    measured: measured.get(&device.id).copied().unwrap_or_default(),
                })
                .collect(),
        };
        Ok(Model {
            plan: self.clone(),
            tokenizer,
            eos_token_ids: checkpoint.config.eos_token_ids.clone(),
            report,
            pipeline,
        })
    }
}

/// The arenas while they are filled.
struct Arenas {
    memory: memmap2::MmapMut,
    disk: Option<File>,
}

impl Arenas {
    /// Takes the memory and the disk space of all weights.
    fn take(plan: &Plan, placed: &[Placed], offload_directory: &Path) -> Result<Self> {
        if let Some(device) = plan.placement().into_iter().find(|device| matches!(device, DeviceId::Cuda(_))) {
            return Err(Error::does_not_fit(format!(
                "the plan needs {device}, and this version computes on the CPU and the disk only"
            ))
            .hint("`--device-map auto` uses what is there"));
        }
        let size = |device| -> Bytes { placed.iter().filter(|p| p.device == device).map(|p| p.layout.size()).sum() };
        let disk = size(DeviceId::Disk);
        Ok(Self {
            memory: cpu::zeroed("the weights", size(DeviceId::Cpu))?,
            disk: (disk > Bytes::ZERO).then(|| fs::scratch_file(offload_directory, disk)).transpose()?,
        })
    }

    /// Puts `bytes` at `offset` of the arena of `device`.
    fn write(&mut self, device: DeviceId, offset: u64, bytes: &[u8], offload_directory: &Path) -> Result<()> {
        if let (Some(file), DeviceId::Disk) = (&self.disk, device) {
            let failed = |e| Error::io("write a scratch file in", offload_directory, e);
            return file.write_all_at(bytes, offset).map_err(failed);
        }
        // The arena is as long as the layouts in it, so the offset is one into memory.
        #[expect(clippy::cast_possible_truncation, reason = "an offset into an arena")]
        self.memory[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn finish(self, offload_directory: &Path) -> Result<BTreeMap<DeviceId, Arc<Arena>>> {
        let mut arenas = BTreeMap::from([(DeviceId::Cpu, Arc::new(Arena::Memory(self.memory)))]);
        if let Some(file) = self.disk {
            arenas.insert(DeviceId::Disk, Arc::new(Arena::map(&file, offload_directory)?));
        }
        Ok(arenas)
    }
}

/// Reads every weight, packs it and puts it in place. Returns the bytes of the staging ring.
fn fill(
    arenas: &mut Arenas,
    checkpoint: &Checkpoint,
    directory: &Path,
    placed: &[Placed],
    staging: HostStaging,
    options: &LoadOptions,
    on_event: &mut impl FnMut(LoadEvent),
) -> Result<Bytes> {
    let mut packed = PackedRows::default();
    let mut most_packed = Bytes::ZERO;
    let ring = reader::read(checkpoint, directory, placed, staging, |slab| {
        if options.cancel.load(Ordering::Relaxed) {
            return Err(Error::interrupted());
        }
        let target = &placed[slab.weight];
        let (layout, weight) = (&target.layout, &target.weight);
        let mut write = |offset: u64, bytes: &[u8]| {
            arenas.write(target.device, target.offset + offset, bytes, options.offload_directory)
        };
        if let Storage::Plain(_) = layout.storage {
            write(layout.codes_at(slab.row), slab.bytes)?;
        } else {
            quantize_rows(layout, weight.dtype, slab.bytes, &mut packed)
                .map_err(|e| broken_weight(&weight.parameter.tensor(), slab.row, e))?;
            write(layout.codes_at(slab.row), &packed.codes)?;
            write(layout.sub_scales_at(slab.row), &packed.sub_scales)?;
            write(layout.scales_at(slab.row), &packed.scales)?;
            most_packed = most_packed.max(packed.bytes());
        }
        on_event(LoadEvent::Placed {
            module: &weight.parameter.module,
            device: target.device,
            bytes: Bytes(slab.bytes.len() as u64),
        });
        Ok(())
    })?;
    Ok(ring + most_packed)
}

fn broken_weight(tensor: &str, first_row: usize, error: QuantizeError) -> Error {
    let what = match error {
        QuantizeError::NotFinite { row, col, value } => {
            format!("tensor `{tensor}` has {value} at row {}, column {col}", first_row + row)
        }
        QuantizeError::ScaleOverflow { row, scale } => {
            format!("tensor `{tensor}` needs a scale of {scale} at row {}, which f16 cannot hold", first_row + row)
        }
    };
    Error::input(what).hint("`--quantize none` loads the weights as they are")
}

/// Builds the stages over filled arenas, and sums up what they hold.
fn build(
    plan: &Plan,
    checkpoint: &Checkpoint,
    tree: &ModuleTree,
    placed: &[Placed],
    arenas: &BTreeMap<DeviceId, Arc<Arena>>,
) -> Result<(Pipeline, BTreeMap<DeviceId, Bytes>)> {
    let config = &checkpoint.config;
    let mut modules: Vec<Parameters> = vec![Parameters::default(); tree.modules.len()];
    for target in placed {
        // Arenas exist for all devices that the loader accepts, and offsets lie inside them.
        #[expect(clippy::cast_possible_truncation, reason = "an offset into an arena")]
        let parameter =
            Parameter::new(target.layout.clone(), target.offset as usize, Arc::clone(&arenas[&target.device]));
        let Weight { module, parameter: Named { role, part, .. }, .. } = target.weight;
        modules[module].insert(*role, *part, parameter);
    }
    let workspace = Workspace::new(&WorkspaceLayout::new(config, memory::chunk(plan.context)));
    let workspace_bytes = workspace.bytes();
    let workspace = Arc::new(Mutex::new(workspace));
    let kv = KvLayout::new(config, plan.context, plan.batch, plan.kv_cache)
        .ok_or_else(|| Error::does_not_fit("the KV cache is too large for this machine"))?;

    let mut stages: Vec<CpuStage> = Vec::new();
    let mut roles = StageRoles { embedding: 0, norm: 0, head: 0 };
    let mut current = None;
    for ((module, parameters), device) in tree.modules.iter().zip(modules).zip(plan.placement()) {
        if module.kind == ModuleKind::Head && tree.tied {
            stages[roles.embedding].tie_head();
            roles.head = roles.embedding;
            continue;
        }
        if current != Some(device) {
            stages.push(CpuStage::new(config, plan.context, Arc::clone(&workspace)));
            current = Some(device);
        }
        let at = stages.len() - 1;
        let stage = &mut stages[at];
        match module.kind {
            ModuleKind::Block(index) => {
                stage.push_block(index, parameters, kv)?;
                continue;
            }
            ModuleKind::Embedding => roles.embedding = at,
            ModuleKind::Norm => roles.norm = at,
            ModuleKind::Head => roles.head = at,
            ModuleKind::Positions => {}
        }
        stage.add(parameters);
    }
    let kv_bytes: Bytes = stages.iter().map(CpuStage::kv_bytes).sum();
    let stages: Vec<Box<dyn Stage>> = stages.into_iter().map(|stage| Box::new(stage) as Box<dyn Stage>).collect();
    let pipeline = Pipeline::new(stages, roles, config, plan.context);

    let mut measured: BTreeMap<DeviceId, Bytes> = BTreeMap::new();
    for (device, arena) in arenas {
        let used = placed.iter().any(|target| target.device == *device);
        measured.insert(*device, if used { Bytes(arena.bytes().len() as u64) } else { Bytes::ZERO });
    }
    *measured.entry(DeviceId::Cpu).or_default() += kv_bytes + workspace_bytes + Bytes(pipeline.host_bytes() as u64);
    Ok((pipeline, measured))
}
