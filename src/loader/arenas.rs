//! The memory that a plan takes, all of it before anything is read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::panic::resume_unwind;
use std::sync::{Arc, mpsc};

use super::{LoadEvent, LoadOptions};
use crate::backend::cpu;
use crate::backend::cuda::{self, Cache, Compiling, DeviceMatrix, Gpu, Region, Upload, Workspace};
use crate::bytes::Bytes;
use crate::device::{DeviceError, DeviceId};
use crate::error::{Error, ErrorKind, Hint, Result, Setting};
use crate::footprint::{CUDA_GRANULE, CudaBuffers, Purpose, State, cuda_graphs};
use crate::fs;
use crate::plan::{DevicePlan, Plan};

pub struct Arenas {
    pub memory: memmap2::MmapMut,
    pub disk: Option<File>,
    pub gpus: BTreeMap<DeviceId, GpuArenas>,
}

pub struct GpuArenas {
    pub gpu: Arc<Gpu>,
    /// What was free before the arena was taken, and behind that.
    pub free: [Bytes; 2],
    /// The ring, while the weights are filled.
    pub upload: Option<Upload>,
    /// By the position of the weight in the list that is read.
    pub matrices: HashMap<usize, DeviceMatrix>,
    pub workspace: Arc<Workspace>,
    /// What each block keeps, in the order they run.
    pub caches: Vec<Cache>,
}

impl Arenas {
    /// Takes the memory and the disk space of all weights, and all that is taken of GPUs.
    pub fn take(plan: &Plan, options: &LoadOptions, on_event: &mut dyn FnMut(LoadEvent)) -> Result<Self> {
        let disk = plan.sum(DeviceId::Disk, Purpose::Weights);
        let used: Vec<_> = plan.devices.iter().filter(|device| device.id.is_gpu() && device.modules > 0).collect();
        let ids: Vec<_> = used.iter().map(|device| device.id).collect();
        let opened = open(&ids, options, on_event)?;
        let take = |(device, gpu): (&&DevicePlan, _)| Ok((device.id, GpuArenas::take(device, gpu, plan, options)?));
        Ok(Self {
            gpus: used.iter().zip(opened).map(take).collect::<Result<_>>()?,
            memory: cpu::zeroed("the weights", plan.sum(DeviceId::Cpu, Purpose::Weights))?,
            disk: (disk > Bytes::ZERO).then(|| fs::scratch_file(&options.offload_directory, disk)).transpose()?,
        })
    }
}

/// Opens GPUs side by side.
pub fn open(ids: &[DeviceId], options: &LoadOptions, on_event: &mut dyn FnMut(LoadEvent)) -> Result<Vec<Arc<Gpu>>> {
    let (told, events) = mpsc::channel();
    std::thread::scope(|scope| {
        let begin = |id: &DeviceId| {
            let DeviceId::Cuda(index) = *id else { unreachable!("{id} is no GPU") };
            let told = told.clone();
            let on_file = move |capability| {
                // Whoever listens does so until all are opened.
                let _ = told.send(capability);
            };
            let compiling = Compiling {
                cache: options.kernel_cache.clone(),
                cancel: options.cancel.clone(),
                on_file: Some(Arc::new(on_file)),
            };
            let open = move || Gpu::open_with(index, &compiling);
            std::thread::Builder::new().spawn_scoped(scope, open).map_err(Error::no_thread)
        };
        let threads: Vec<_> = ids.iter().map(begin).collect();
        drop(told);
        let mut capabilities = BTreeSet::new();
        for capability in events {
            if capabilities.insert(capability) {
                on_event(LoadEvent::Compiling { capability });
            }
        }
        threads.into_iter().map(|thread| thread?.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

impl GpuArenas {
    fn take(device: &DevicePlan, gpu: Arc<Gpu>, plan: &Plan, options: &LoadOptions) -> Result<Self> {
        let (free, _) = gpu.memory()?;
        // The driver has its context and its code by now.
        let extent = plan.extent();
        let needed = device.allocated() + CUDA_GRANULE + cuda_graphs(extent);
        if free < needed {
            let shortfall = DeviceError::Shortfall { device: device.id, planned: needed, free };
            let what = if free + device.driver < device.free {
                "another process has taken memory; {} plans again with what is left"
            } else {
                "the driver takes more than was planned; {} plans again with what is left"
            };
            return Err(Error::new(ErrorKind::Shortfall, shortfall).hint(Hint::naming(what, [Setting::Replan])));
        }
        let config = &plan.checkpoint().config;
        Workspace::check(config)?;
        let mut here: Vec<usize> = (0..plan.weights.len()).filter(|at| plan.weights[*at].device == device.id).collect();
        here.sort_by_key(|at| plan.weights[*at].offset);
        let states = || plan.modules.iter().filter(|m| m.device == device.id).filter_map(|module| module.state);
        let workspace = CudaBuffers::try_new(|name| plan.allocation(device.id, Purpose::Workspace, name))?;

        // Whoever gets all of it first has it: there is no part to fail behind another.
        let weights = here.iter().map(|at| plan.weights[*at].bytes());
        let kept = states().flat_map(|State::KeysValues(kv)| [kv.bytes(); 2]);
        let buffers = workspace.each().map(|(_, bytes)| *bytes);
        let slab = plan.staging()?.slab;
        let sizes: Vec<Bytes> = weights.chain(kept).chain(buffers).chain(Upload::sizes(slab)).collect();
        let mut regions = cuda::arena(&gpu, "the model", &sizes, options.separate_buffers)?.into_iter();
        let (left, _) = gpu.memory()?;

        let matrix =
            |(at, region): (&usize, Region)| (*at, DeviceMatrix::new(plan.weights[*at].layout.clone(), region));
        let matrices = here.iter().zip(regions.by_ref()).map(matrix).collect();
        let mut pair = || regions.next().zip(regions.next()).map(<[Region; 2]>::from);
        let cache = |State::KeysValues(kv)| pair().map(|pair| Cache::new(kv, &pair));
        let caches = states().filter_map(cache).collect();
        let workspace = Arc::new(Workspace::new(&gpu, config, extent, &mut regions)?);
        Ok(Self {
            matrices,
            caches,
            workspace,
            upload: Some(Upload::new(&gpu, &mut regions)?),
            free: [free, left],
            gpu,
        })
    }
}
