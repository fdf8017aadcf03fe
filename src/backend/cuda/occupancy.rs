//! Who has a GPU's memory, by NVIDIA's management library, where there is one.

use std::ffi::OsStr;

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use serde::Serialize;

use crate::bytes::Bytes;

/// A process that uses a GPU.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Occupant {
    /// Its number.
    pub pid: u32,
    /// Its name, where this user or container may know it.
    pub name: Option<String>,
    /// What it has of the GPU's memory, where the driver tells it.
    pub used: Option<Bytes>,
}

/// The management library, where it is there and answers.
pub struct Management(Option<Nvml>);

impl Management {
    /// Opens it.
    pub fn open() -> Self {
        // Its other name may be that of the toolkit's stub.
        Self(Nvml::builder().lib_path(OsStr::new("libnvidia-ml.so.1")).init().ok())
    }

    /// The driver's own version, such as 550.54.15.
    pub fn driver(&self) -> Option<String> {
        self.0.as_ref()?.sys_driver_version().ok()
    }

    /// What is free of a GPU's memory, which takes no context on it.
    pub fn free(&self, uuid: &str) -> Option<Bytes> {
        let memory = self.0.as_ref()?.device_by_uuid(uuid).ok()?.memory_info().ok()?;
        Some(Bytes(memory.free))
    }

    /// The processes on a GPU, those with the most memory first; `None` where it does not tell them.
    pub fn occupants(&self, uuid: &str) -> Option<Vec<Occupant>> {
        let device = self.0.as_ref()?.device_by_uuid(uuid).ok()?;
        let mut processes = device.running_compute_processes().ok()?;
        let graphics = device.running_graphics_processes().unwrap_or_default();
        processes.extend(
            graphics
                .into_iter()
                .filter(|other| processes.iter().all(|known| known.pid != other.pid))
                .collect::<Vec<_>>(),
        );
        let mut occupants: Vec<_> = processes.into_iter().map(occupant).collect();
        occupants.sort_by(|a, b| b.used.cmp(&a.used).then(a.pid.cmp(&b.pid)));
        Some(occupants)
    }
}

fn occupant(ProcessInfo { pid, used_gpu_memory, .. }: ProcessInfo) -> Occupant {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim_end().to_owned());
    let used = match used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
        UsedGpuMemory::Unavailable => None,
    };
    Occupant { pid, name, used }
}
