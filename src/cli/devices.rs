//! `evenkeel devices`.

use std::path::PathBuf;
use std::sync::Arc;

use evenkeel::{
    Bytes, Device, DeviceId, Fault, GpuInfo, Installation, Inventory, LoadOptions, Result, Verification, verify,
};
use serde::Serialize;

use super::args::{DevicesArguments, Format};
use super::model::show;
use super::{Exit, Process, signal, turn};

/// What `--format json` writes.
#[derive(Serialize)]
struct Machine<'a> {
    /// The version of CUDA that the driver is for.
    driver: Option<String>,
    /// Why the driver that is there cannot be used.
    driver_fault: Option<&'a Fault>,
    gpus: Vec<Gpu<'a>>,
    cpu: Option<&'a Device>,
    threads: usize,
    disk: Option<&'a Device>,
    offload_directory: String,
    cuda_visible_devices: Option<&'a str>,
    /// What is right and what is wrong, if that was wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    verification: Option<&'a Verification>,
}

#[derive(Serialize)]
struct Gpu<'a> {
    #[serde(flatten)]
    device: &'a Device,
    uuid: &'a str,
    bus: &'a str,
    compute_capability: String,
    is_usable: bool,
    /// Why it is not.
    fault: Option<&'a Fault>,
}

impl<'a> From<&'a GpuInfo> for Gpu<'a> {
    fn from(gpu: &'a GpuInfo) -> Self {
        Self {
            device: &gpu.device,
            uuid: &gpu.uuid,
            bus: &gpu.bus,
            compute_capability: format!("{}.{}", gpu.capability.0, gpu.capability.1),
            is_usable: gpu.fault.is_none(),
            fault: gpu.fault.as_ref(),
        }
    }
}

pub fn run(arguments: &DevicesArguments, process: &Process) -> Result<Exit> {
    let printer = &process.printer;
    let directory = process.environment.offload_directory(arguments.offload_dir.as_deref());
    let found = Installation::find();
    let installation = found.as_ref().ok().and_then(Option::as_ref);
    let inventory = Inventory::of_host(&directory)?;
    let verification = arguments.verify.then(|| verification(directory.clone(), process)).transpose()?;
    let machine = Machine {
        driver: installation.map(|found| format!("{}.{}", found.version.0, found.version.1)),
        driver_fault: found.as_ref().err(),
        gpus: installation.into_iter().flat_map(|found| &found.gpus).map(Gpu::from).collect(),
        cpu: inventory.device(DeviceId::Cpu),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        disk: inventory.device(DeviceId::Disk),
        offload_directory: directory.display().to_string(),
        cuda_visible_devices: process.environment.visible_gpus(),
        verification: verification.as_ref(),
    };
    match arguments.format {
        Format::Text => printer.result(&machine.text())?,
        // Numbers, texts and lists of such cannot fail to serialize.
        Format::Json => printer.json(&(serde_json::to_string_pretty(&machine).unwrap_or_default() + "\n"))?,
    }
    verification.map_or(Ok(()), Verification::into_result)?;
    Ok(Exit::Done)
}

/// Verifies all GPUs while no other load takes memory of them.
fn verification(offload_directory: PathBuf, process: &Process) -> Result<Verification> {
    let cancel = signal::cancel_by_interrupt()?;
    let _turn = turn::wait(&cancel, process)?;
    let environment = &process.environment;
    let options = LoadOptions {
        offload_directory,
        cancel,
        pool: Arc::clone(&process.pool),
        kernel_cache: environment.kernel_cache(),
        ..LoadOptions::default()
    };
    verify(&options, environment.verified().as_deref(), &mut |event| show(&event, "", &mut None, &process.printer))
}

/// A line for each GPU's kernels, for its models, for copies, and for all that is wrong.
fn lines(verification: &Verification) -> Vec<String> {
    let mut lines = Vec::new();
    for gpu in &verification.gpus {
        let (id, tried, all) = (gpu.id, gpu.kernels.len(), gpu.kernels.len() + gpu.untried.len());
        lines.push(format!("{id:<8}{tried} of {all} kernels tried, in {:.1} s", gpu.seconds));
        if gpu.wrong.is_empty() {
            let (planned, measured): (Bytes, Bytes) =
                (gpu.models.iter().map(|of| of.planned).sum(), gpu.models.iter().map(|of| of.measured).sum());
            let models = gpu.models.len();
            lines.push(format!("        {models} small models as on the CPU; planned {planned}, measured {measured}"));
        }
    }
    if !verification.hops.is_empty() {
        let right = verification.hops.iter().filter(|hop| hop.wrong.is_empty()).count();
        lines.push(format!("hops    {right} of {} between GPUs give what was sent", verification.hops.len()));
    }
    lines.extend(verification.wrong().map(|error| format!("wrong   {error}")));
    let is_right = verification.wrong().next().is_none();
    lines.push(format!(
        "verify  {} in {:.1} s",
        if is_right { "all is right," } else { "not right," },
        verification.seconds
    ));
    lines
}

impl Machine<'_> {
    fn text(&self) -> String {
        let mut lines = Vec::new();
        for gpu in &self.gpus {
            let Device { id, name, free, total, .. } = gpu.device;
            let name = name.as_deref().unwrap_or("a GPU");
            if let Some(fault) = gpu.fault {
                lines.push(format!("{id:<8}is not used: {fault}"));
                lines.push(format!("        {total}; {name}, {}, bus {}", gpu.uuid, gpu.bus));
                continue;
            }
            let Gpu { uuid, bus, compute_capability, .. } = gpu;
            lines.push(format!("{id:<8}{free} free of {total}; {name}, compute capability {compute_capability}"));
            lines.push(format!("        {uuid}, bus {bus}"));
        }
        let (free, total) = self.cpu.map_or((Bytes::ZERO, Bytes::ZERO), |cpu| (cpu.free, cpu.total));
        lines.push(format!("cpu     {free} free of {total}; {} threads", self.threads));
        let free = self.disk.map_or(Bytes::ZERO, |disk| disk.free);
        lines.push(format!("disk    {free} free; `{}`", self.offload_directory));
        lines.push(match (&self.driver, self.driver_fault) {
            (Some(version), _) => format!("driver  for CUDA {version}"),
            (None, Some(fault)) => format!("driver  no GPU is used: {fault}"),
            (None, None) => "driver  none: no GPUs".to_owned(),
        });
        lines.extend(self.verification.into_iter().flat_map(self::lines));
        lines.extend(self.cuda_visible_devices.map(|devices| format!("CUDA_VISIBLE_DEVICES={devices}")));
        lines.join("\n") + "\n"
    }
}
