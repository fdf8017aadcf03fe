//! Stages over filled arenas.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use super::LoadOptions;
use super::arenas::{Arenas, GpuArenas};
use crate::architecture::{ModuleKind, ModuleTree, Parameter as Named, Weight};
use crate::backend::cpu::{self, Arena, CpuStage, Parameter, Pool, Workspace};
use crate::backend::cuda::{self, Cache, CudaStage};
use crate::backend::{Pipeline, Stage, StageRoles};
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::plan::memory::{self, KvLayout, Placed, WorkspaceLayout};

/// A stage while it is given its modules.
enum Run {
    Cpu(CpuStage),
    Cuda(DeviceId, CudaStage),
}

/// Bytes that were taken of each device.
type Measured = BTreeMap<DeviceId, Bytes>;

/// Builds the stages, and sums up what the arenas hold.
pub fn build(
    plan: &Plan,
    checkpoint: &Checkpoint,
    tree: &ModuleTree,
    placed: &[Placed],
    arenas: Arenas,
    options: &LoadOptions,
) -> Result<(Pipeline, Measured)> {
    let config = &checkpoint.config;
    let Arenas { memory, disk, mut gpus } = arenas;
    let mut host = BTreeMap::from([(DeviceId::Cpu, Arc::new(Arena::Memory(memory)))]);
    if let Some(file) = disk {
        host.insert(DeviceId::Disk, Arc::new(Arena::map(&file, &options.offload_directory)?));
    }
    let mut modules = vec![cpu::Parameters::default(); tree.modules.len()];
    let mut on_gpu = vec![cuda::Parameters::default(); tree.modules.len()];
    for (at, target) in placed.iter().enumerate() {
        let Weight { module, parameter: Named { role, part, .. }, .. } = target.weight;
        if let Some(matrix) = gpus.get_mut(&target.device).and_then(|gpu| gpu.matrices.remove(&at)) {
            on_gpu[module].insert(*role, *part, matrix);
        } else {
            // Arenas exist for all devices of the plan, and offsets lie inside them.
            #[expect(clippy::cast_possible_truncation, reason = "an offset into an arena")]
            let offset = target.offset as usize;
            let parameter = Parameter::new(target.layout.clone(), offset, Arc::clone(&host[&target.device]));
            modules[module].insert(*role, *part, parameter);
        }
    }
    let mut measured: Measured = gpus.iter().map(|(device, arenas)| (*device, arenas.gpu.peak())).collect();

    let computes_here = plan.modules.iter().any(|module| host.contains_key(&module.device));
    let tokens = if computes_here { memory::chunk(plan.context) } else { 0 };
    let workspace = Workspace::new(&WorkspaceLayout::new(config, tokens));
    let workspace_bytes = workspace.bytes();
    let workspace = Arc::new(Mutex::new(workspace));
    let pool = Arc::new(match options.threads {
        _ if !computes_here => Pool::new(NonZeroUsize::MIN),
        Some(threads) => Pool::new(threads),
        None => Pool::of_all_cores(),
    });
    let kv = KvLayout::new(config, plan.context, plan.batch, plan.kv_cache)
        .ok_or_else(|| Error::does_not_fit("the KV cache is too large for this machine"))?;
    let mut caches: BTreeMap<DeviceId, _> =
        gpus.iter_mut().map(|(device, arenas)| (*device, std::mem::take(&mut arenas.caches).into_iter())).collect();
    let begin = |device| match gpus.get(&device) {
        Some(GpuArenas { workspace, .. }) => {
            Run::Cuda(device, CudaStage::new(config, plan.context, Arc::clone(workspace)))
        }
        None => Run::Cpu(CpuStage::new(config, plan.context, Arc::clone(&workspace), Arc::clone(&pool))),
    };

    let mut stages: Vec<Run> = Vec::new();
    let mut roles = StageRoles { embedding: 0, norm: 0, head: 0 };
    let mut current = None;
    let parameters = modules.into_iter().zip(on_gpu);
    for ((module, (parameters, on_gpu)), device) in tree.modules.iter().zip(parameters).zip(plan.placement()) {
        if module.kind == ModuleKind::Head && tree.tied {
            match &mut stages[roles.embedding] {
                Run::Cpu(stage) => stage.tie_head(),
                Run::Cuda(_, stage) => stage.tie_head(),
            }
            roles.head = roles.embedding;
            continue;
        }
        if current != Some(device) {
            stages.push(begin(device));
            current = Some(device);
        }
        let at = stages.len() - 1;
        match module.kind {
            ModuleKind::Block(_) | ModuleKind::Positions => {}
            ModuleKind::Embedding => roles.embedding = at,
            ModuleKind::Norm => roles.norm = at,
            ModuleKind::Head => roles.head = at,
        }
        match (&mut stages[at], module.kind) {
            (Run::Cpu(stage), ModuleKind::Block(index)) => stage.push_block(index, parameters, kv)?,
            (Run::Cpu(stage), _) => stage.add(parameters),
            (Run::Cuda(device, stage), ModuleKind::Block(index)) => {
                let mut next = || caches.get_mut(device).and_then(Iterator::next);
                let (Some(keys), Some(values)) = (next(), next()) else {
                    unreachable!("there is a cache for every block")
                };
                stage.push_block(index, on_gpu, Cache::new(kv, &[keys, values]));
            }
            (Run::Cuda(_, stage), _) => stage.add(on_gpu),
        }
    }
    let kv_bytes: Bytes =
        stages.iter().map(|stage| if let Run::Cpu(stage) = stage { stage.kv_bytes() } else { Bytes::ZERO }).sum();
    let answers: Bytes = gpus.values().map(|_| memory::CUDA_ANSWERS).sum();
    let stage = |run| -> Box<dyn Stage> {
        match run {
            Run::Cpu(stage) => Box::new(stage),
            Run::Cuda(_, stage) => Box::new(stage),
        }
    };
    let pipeline = Pipeline::new(stages.into_iter().map(stage).collect(), roles, config, plan.context);
    for (device, arena) in &host {
        let used = placed.iter().any(|target| target.device == *device);
        measured.insert(*device, if used { Bytes(arena.bytes().len() as u64) } else { Bytes::ZERO });
    }
    *measured.entry(DeviceId::Cpu).or_default() +=
        kv_bytes + workspace_bytes + answers + Bytes(pipeline.host_bytes() as u64);
    Ok((pipeline, measured))
}
