//! Stages over filled arenas.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::arenas::Arenas;
use super::{LoadEvent, LoadOptions};
use crate::architecture::{ModuleKind, Part, Role};
use crate::backend::block::{Finder, Modules};
use crate::backend::cpu::{self, Arena, CpuStage, KvCache, Parameter, Workspace};
use crate::backend::cuda::{CudaStage, DeviceMatrix};
use crate::backend::{Pipeline, Stage};
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::error::Result;
use crate::footprint::{CpuBuffers, CudaRows, Purpose, State};
use crate::plan::{Plan, PlannedModule};
use crate::quant::MatrixLayout;

/// Bytes that were taken of each device.
type Measured = BTreeMap<DeviceId, Bytes>;
/// Parameters by their module and by what they are in it.
type Parameters<P> = HashMap<(usize, Role, Part), P>;

/// Builds the stages, and sums up what the arenas hold; of GPUs, what they say that was taken.
pub fn build(
    plan: &Plan,
    arenas: Arenas,
    options: &LoadOptions,
    on_event: &mut dyn FnMut(LoadEvent),
) -> Result<(Pipeline, Measured)> {
    let config = &plan.checkpoint().config;
    let Arenas { memory, disk, mut gpus } = arenas;
    let mut host = BTreeMap::<_, Arc<Arena>>::from([(DeviceId::Cpu, Arc::new(memory) as _)]);
    if let Some(file) = disk {
        host.insert(DeviceId::Disk, Arc::new(cpu::map(&file, &options.offload_directory)?));
    }
    let (mut on_host, mut on_gpus) = (Parameters::<Parameter>::new(), Parameters::<DeviceMatrix>::new());
    for (at, placed) in plan.weights.iter().enumerate() {
        let key = (placed.weight.module, placed.weight.parameter.role, placed.weight.parameter.part);
        if let Some(matrix) = gpus.get_mut(&placed.device).and_then(|gpu| gpu.matrices.remove(&at)) {
            on_gpus.insert(key, matrix);
        } else if let Some(arena) = host.get(&placed.device) {
            #[expect(clippy::cast_possible_truncation, reason = "an offset into an arena")]
            let offset = placed.offset as usize;
            on_host.insert(key, Parameter::new(placed.layout.clone(), offset, Arc::clone(arena)));
        }
    }
    let mut measured: Measured =
        gpus.iter().map(|(device, arenas)| (*device, arenas.free[0] - arenas.free[1])).collect();

    let workspace = CpuBuffers::try_new(|name| {
        let bytes = plan.allocation(DeviceId::Cpu, Purpose::Workspace, name).unwrap_or_default();
        Ok(vec![0.0f32; bytes.as_usize().unwrap_or(usize::MAX) / size_of::<f32>()])
    })?;
    let buffers: usize = workspace.each().map(|(_, buffer)| size_of_val(&**buffer)).sum();
    let mut taken = Bytes(buffers as u64) + gpus.values().map(|_| CudaRows::host(plan.extent())).sum();
    let workspace: Arc<Mutex<Workspace>> = Arc::new(Mutex::new(workspace));

    let runs = runs(plan);
    for pair in runs.windows(2) {
        let [(from, _), (to, _)] = pair else { continue };
        let Some((source, target)) = gpus.get(from).zip(gpus.get(to)) else { continue };
        if !target.workspace.hidden.check_copies_from(&source.workspace.hidden)? {
            on_event(LoadEvent::ThroughHost { from: *from, to: *to });
        }
    }
    let mut stages: Vec<Box<dyn Stage>> = Vec::new();
    for (device, range) in runs {
        if let Some(gpu) = gpus.get_mut(&device) {
            let modules = modules(plan, range, |key| on_gpus.remove(&key))?;
            let caches = gpu.caches.drain(..modules.blocks.len()).collect();
            stages.push(Box::new(CudaStage::new(config, (modules, caches), Arc::clone(&gpu.workspace))));
        } else {
            let kept = plan.modules[range.clone()].iter().filter_map(|module| Some((module.state?, module.kv_cache)));
            let cache = |(State::KeysValues(kv), bytes)| KvCache::new(kv, bytes);
            let caches: Vec<_> = kept.map(cache).collect::<Result<_>>()?;
            taken += caches.iter().map(KvCache::bytes).sum();
            let parts = (modules(plan, range, |key| on_host.remove(&key))?, caches);
            let (workspace, pool) = (Arc::clone(&workspace), Arc::clone(&options.pool));
            stages.push(Box::new(CpuStage::new(config, parts, workspace, pool)));
        }
    }
    let pipeline = Pipeline::new(stages, config, plan.extent());
    for (device, arena) in &host {
        let used = plan.weights.iter().any(|placed| placed.device == *device);
        measured.insert(*device, if used { Bytes(arena.len() as u64) } else { Bytes::ZERO });
    }
    *measured.entry(DeviceId::Cpu).or_default() += taken + Bytes(pipeline.host_bytes() as u64);
    Ok((pipeline, measured))
}

/// Modules that follow on each other on a device. A head that is the embedding is in none.
fn runs(plan: &Plan) -> Vec<(DeviceId, Range<usize>)> {
    let modules = &plan.modules[..plan.modules.len() - usize::from(plan.is_tied())];
    let mut end = 0;
    let run = |modules: &[PlannedModule]| {
        end += modules.len();
        (modules[0].device, end - modules.len()..end)
    };
    modules.chunk_by(|a, b| a.device == b.device).map(run).collect()
}

fn modules<P: AsRef<MatrixLayout> + Clone>(
    plan: &Plan,
    range: Range<usize>,
    mut parameter: impl FnMut((usize, Role, Part)) -> Option<P>,
) -> Result<Modules<P>> {
    let mut modules = Modules { embedding: None, positions: None, blocks: Vec::new(), norm: None, head: None };
    for index in range {
        let mut finder = Finder(|role, part| parameter((index, role, part)));
        match plan.modules[index].kind {
            ModuleKind::Block(block) => modules.blocks.push(finder.block(&plan.checkpoint().config, block)?),
            ModuleKind::Embedding => modules.embedding = finder.find(Role::Embedding),
            ModuleKind::Positions => modules.positions = finder.find(Role::Positions),
            ModuleKind::Norm => modules.norm = finder.find(Role::OutputNorm),
            ModuleKind::Head => modules.head = finder.find(Role::Head),
        }
    }
    if plan.is_tied() {
        modules.head.clone_from(&modules.embedding);
    }
    Ok(modules)
}
