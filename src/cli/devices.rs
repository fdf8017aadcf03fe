//! `evenkeel devices`.

use evenkeel::{Bytes, Device, DeviceId, Installation, Inventory, Result};
use serde::Serialize;

use super::args::{DevicesArguments, Format};
use super::{Exit, Process};

/// What `--format json` writes.
#[derive(Serialize)]
struct Machine<'a> {
    /// The version of CUDA that the driver is for.
    driver: Option<String>,
    gpus: Vec<Gpu<'a>>,
    cpu: Option<&'a Device>,
    threads: usize,
    disk: Option<&'a Device>,
    offload_directory: String,
    cuda_visible_devices: Option<&'a str>,
}

#[derive(Serialize)]
struct Gpu<'a> {
    #[serde(flatten)]
    device: &'a Device,
    uuid: &'a str,
    compute_capability: String,
    is_usable: bool,
}

pub fn run(arguments: &DevicesArguments, process: &Process) -> Result<Exit> {
    let printer = &process.printer;
    let directory = process.environment.offload_directory(arguments.offload_dir.as_deref());
    let inventory = Inventory::of_machine(&directory)?;
    let installation = Installation::find();
    let gpus = installation.iter().flat_map(|installation| {
        installation.gpus.iter().map(|gpu| Gpu {
            device: &gpu.device,
            uuid: &gpu.uuid,
            compute_capability: format!("{}.{}", gpu.capability.0, gpu.capability.1),
            is_usable: installation.can_use(gpu),
        })
    });
    let machine = Machine {
        driver: installation.as_ref().map(|found| format!("{}.{}", found.version.0, found.version.1)),
        gpus: gpus.collect(),
        cpu: inventory.device(DeviceId::Cpu),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        disk: inventory.device(DeviceId::Disk),
        offload_directory: directory.display().to_string(),
        cuda_visible_devices: process.environment.visible_gpus(),
    };
    match arguments.format {
        Format::Text => printer.result(&machine.text())?,
        // Numbers, texts and lists of such cannot fail to serialize.
        Format::Json => printer.json(&(serde_json::to_string_pretty(&machine).unwrap_or_default() + "\n"))?,
    }
    Ok(Exit::Done)
}

impl Machine<'_> {
    fn text(&self) -> String {
        let mut lines = Vec::new();
        for gpu in &self.gpus {
            let Device { id, name, free, total, .. } = gpu.device;
            let name = name.as_deref().unwrap_or("a GPU");
            let (uuid, capability) = (gpu.uuid, &gpu.compute_capability);
            let remark = if gpu.is_usable { "" } else { "; too old, or its driver is" };
            lines.push(format!(
                "{id:<8}{free} free of {total}; {name}, compute capability {capability}, {uuid}{remark}"
            ));
        }
        let (free, total) = self.cpu.map_or((Bytes::ZERO, Bytes::ZERO), |cpu| (cpu.free, cpu.total));
        lines.push(format!("cpu     {free} free of {total}; {} threads", self.threads));
        let free = self.disk.map_or(Bytes::ZERO, |disk| disk.free);
        lines.push(format!("disk    {free} free; `{}`", self.offload_directory));
        lines.push(match &self.driver {
            Some(version) => format!("driver  for CUDA {version}"),
            None => "driver  none: no GPUs".to_owned(),
        });
        lines.extend(self.cuda_visible_devices.map(|devices| format!("CUDA_VISIBLE_DEVICES={devices}")));
        lines.join("\n") + "\n"
    }
}
