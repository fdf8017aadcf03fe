//! The memory that a plan takes, all of it before anything is read.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::Arc;

use super::LoadOptions;
use crate::backend::cpu;
use crate::backend::cuda::{self, DeviceMatrix, Gpu, Region, Upload, Workspace};
use crate::bytes::Bytes;
use crate::device::{DeviceError, DeviceId};
use crate::error::{Error, Hint, Result, Setting};
use crate::fs;
use crate::model_config::ModelConfig;
use crate::plan::memory::{HostStaging, KvLayout, Placed};
use crate::plan::{DevicePlan, Plan};

/// The arenas while they are filled.
pub struct Arenas {
    /// The weights in host memory.
    pub memory: memmap2::MmapMut,
    /// The weights on the disk.
    pub disk: Option<File>,
    /// The GPUs that the plan uses.
    pub gpus: BTreeMap<DeviceId, GpuArenas>,
}

/// What a plan takes of a GPU.
pub struct GpuArenas {
    /// The GPU.
    pub gpu: Arc<Gpu>,
    /// The ring, while the weights are filled.
    pub upload: Option<Upload>,
    /// Weights, by their position in the list that is read.
    pub matrices: HashMap<usize, DeviceMatrix>,
    /// The buffers of a step.
    pub workspace: Arc<Workspace>,
    /// Keys and values of each block, in turn.
    pub caches: Vec<Region>,
}

impl Arenas {
    /// Takes the memory and the disk space of all weights, and all that is taken of GPUs.
    pub fn take(
        plan: &Plan,
        config: &ModelConfig,
        placed: &[Placed],
        staging: HostStaging,
        options: &LoadOptions,
    ) -> Result<Self> {
        let size = |device| -> Bytes { placed.iter().filter(|p| p.device == device).map(|p| p.layout.size()).sum() };
        let disk = size(DeviceId::Disk);
        let used = plan.devices.iter().filter(|device| matches!(device.id, DeviceId::Cuda(_)) && device.modules > 0);
        let gpus = used.map(|device| {
            let arenas = GpuArenas::take(device, plan, config, placed, staging, options)?;
            Ok((device.id, arenas))
        });
        Ok(Self {
            gpus: gpus.collect::<Result<_>>()?,
            memory: cpu::zeroed("the weights", size(DeviceId::Cpu))?,
            disk: (disk > Bytes::ZERO).then(|| fs::scratch_file(&options.offload_directory, disk)).transpose()?,
        })
    }
}

impl GpuArenas {
    fn take(
        device: &DevicePlan,
        plan: &Plan,
        config: &ModelConfig,
        placed: &[Placed],
        staging: HostStaging,
        options: &LoadOptions,
    ) -> Result<Self> {
        let DeviceId::Cuda(index) = device.id else { unreachable!("{} is no GPU", device.id) };
        let gpu = Gpu::open(index)?;
        let (free, _) = gpu.memory()?;
        let needed = device.total() - device.driver_context;
        if free < needed {
            let what = "another process has taken memory; {} plans again with what is left";
            return Err(Error::shortfall(DeviceError::Shortfall { device: device.id, planned: needed, free })
                .hint(Hint::naming(what, [Setting::Replan])));
        }
        let separate = options.separate_buffers;
        let mut here: Vec<usize> = (0..placed.len()).filter(|at| placed[*at].device == device.id).collect();
        here.sort_by_key(|at| placed[*at].offset);
        let sizes: Vec<Bytes> = here.iter().map(|at| placed[*at].layout.size()).collect();
        let weights = cuda::arena(&gpu, "the weights", &sizes, separate)?;
        let matrix = |(at, region): (&usize, Region)| (*at, DeviceMatrix::new(placed[*at].layout.clone(), region));

        let blocks = plan.modules.iter().filter(|m| m.device == device.id && m.is_block()).count();
        let cache = KvLayout::new(config, plan.context, plan.batch, plan.kv_cache)
            .ok_or_else(|| Error::does_not_fit("the KV cache is too large for this machine"))?;
        let caches = cuda::arena(&gpu, "the KV cache", &vec![cache.bytes(); 2 * blocks], separate)?;
        Ok(Self {
            matrices: here.iter().zip(weights).map(matrix).collect(),
            caches,
            workspace: Arc::new(Workspace::take(&gpu, config, plan.context, separate)?),
            upload: Some(Upload::take(&gpu, staging.slab, separate)?),
            gpu,
        })
    }
}
