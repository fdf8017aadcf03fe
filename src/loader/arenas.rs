//! The memory that a plan takes, all of it before anything is read.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::Arc;

use super::LoadOptions;
use crate::backend::cpu;
use crate::backend::cuda::{self, Cache, DeviceMatrix, Gpu, Region, Upload, Workspace};
use crate::bytes::Bytes;
use crate::device::{DeviceError, DeviceId};
use crate::error::{Error, ErrorKind, Hint, Result, Setting};
use crate::footprint::{CudaBuffers, Purpose, State};
use crate::fs;
use crate::plan::{DevicePlan, Plan};

pub struct Arenas {
    pub memory: memmap2::MmapMut,
    pub disk: Option<File>,
    pub gpus: BTreeMap<DeviceId, GpuArenas>,
}

pub struct GpuArenas {
    pub gpu: Arc<Gpu>,
    /// The ring, while the weights are filled.
    pub upload: Option<Upload>,
    /// By the position of the weight in the list that is read.
    pub matrices: HashMap<usize, DeviceMatrix>,
    pub workspace: Arc<Workspace>,
    /// What each block keeps of each sequence, in the order they run.
    pub caches: Vec<Vec<Cache>>,
}

impl Arenas {
    /// Takes the memory and the disk space of all weights, and all that is taken of GPUs.
    pub fn take(plan: &Plan, options: &LoadOptions) -> Result<Self> {
        let disk = plan.sum(DeviceId::Disk, Purpose::Weights);
        let used = plan.devices.iter().filter(|device| device.id.is_gpu() && device.modules > 0);
        let gpus = used.map(|device| Ok((device.id, GpuArenas::take(device, plan, options)?)));
        Ok(Self {
            gpus: gpus.collect::<Result<_>>()?,
            memory: cpu::zeroed("the weights", plan.sum(DeviceId::Cpu, Purpose::Weights))?,
            disk: (disk > Bytes::ZERO).then(|| fs::scratch_file(&options.offload_directory, disk)).transpose()?,
        })
    }
}

impl GpuArenas {
    fn take(device: &DevicePlan, plan: &Plan, options: &LoadOptions) -> Result<Self> {
        let DeviceId::Cuda(index) = device.id else { unreachable!("{} is no GPU", device.id) };
        let gpu = Gpu::open(index)?;
        let (free, _) = gpu.memory()?;
        let needed = device.allocated();
        if free < needed {
            let what = "another process has taken memory; {} plans again with what is left";
            let shortfall = DeviceError::Shortfall { device: device.id, planned: needed, free };
            return Err(Error::new(ErrorKind::Shortfall, shortfall).hint(Hint::naming(what, [Setting::Replan])));
        }
        let separate = options.separate_buffers;
        let mut here: Vec<usize> = (0..plan.weights.len()).filter(|at| plan.weights[*at].device == device.id).collect();
        here.sort_by_key(|at| plan.weights[*at].offset);
        let sizes: Vec<Bytes> = here.iter().map(|at| plan.weights[*at].bytes()).collect();
        let weights = cuda::arena(&gpu, "the weights", &sizes, separate)?;
        let matrix =
            |(at, region): (&usize, Region)| (*at, DeviceMatrix::new(plan.weights[*at].layout.clone(), region));

        let states = || plan.modules.iter().filter(|m| m.device == device.id).filter_map(|module| module.state);
        let regions = states().flat_map(|State::KeysValues(kv)| vec![kv.bytes(); 2 * plan.batch]).collect::<Vec<_>>();
        let regions = cuda::arena(&gpu, "the KV cache", &regions, separate)?;
        let of_blocks = states().zip(regions.as_chunks().0.chunks(plan.batch));
        let caches =
            of_blocks.map(|(State::KeysValues(kv), pairs)| pairs.iter().map(|pair| Cache::new(kv, pair)).collect());
        let caches = caches.collect();

        let workspace = CudaBuffers::try_new(|name| plan.allocation(device.id, Purpose::Workspace, name))?;
        let config = &plan.checkpoint().config;
        Ok(Self {
            matrices: here.iter().zip(weights).map(matrix).collect(),
            caches,
            workspace: Arc::new(Workspace::take(&gpu, config, plan.batch, &workspace, separate)?),
            upload: Some(Upload::take(&gpu, plan.staging()?.slab, separate)?),
            gpu,
        })
    }
}
