//! `evenkeel devices`.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use evenkeel::{
    Bytes, Device, DeviceId, Fault, GpuInfo, Installation, Inventory, LoadOptions, Mode, Occupant, Result,
    Verification, verify,
};
use serde::Serialize;

use super::args::{DevicesArguments, Format};
use super::{Exit, Process, model, signal, turn};

/// How often an interruption is looked for while the devices are watched.
const PAUSE: Duration = Duration::from_millis(50);

/// What `--format json` writes.
#[derive(Serialize)]
struct Machine<'a> {
    /// The version of CUDA that the driver is for.
    driver: Option<String>,
    /// The driver's own version.
    driver_version: Option<&'a str>,
    /// Why the driver that is there cannot be used.
    driver_fault: Option<&'a Fault>,
    gpus: Vec<Gpu<'a>>,
    cpu: Option<&'a Device>,
    threads: usize,
    disk: Option<&'a Device>,
    offload_directory: String,
    cuda_visible_devices: Option<&'a str>,
    notes: &'a [String],
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
    multiprocessors: u64,
    compute_mode: &'static str,
    is_usable: bool,
    /// Why it is not.
    fault: Option<&'a Fault>,
    /// The processes that use it; null where nobody tells.
    processes: Option<&'a [Occupant]>,
}

impl<'a> Gpu<'a> {
    /// With the sizes that a plan counts on.
    fn new(gpu: &'a GpuInfo, inventory: &'a Inventory) -> Self {
        Self {
            device: inventory.device(gpu.device.id).unwrap_or(&gpu.device),
            uuid: &gpu.uuid,
            bus: &gpu.bus,
            compute_capability: format!("{}.{}", gpu.capability.0, gpu.capability.1),
            multiprocessors: gpu.multiprocessors,
            compute_mode: gpu.mode.name(),
            is_usable: gpu.fault.is_none(),
            fault: gpu.fault.as_ref(),
            processes: gpu.occupants.as_deref(),
        }
    }

    fn text(&self) -> String {
        let Device { id, name, free, total, bandwidth, .. } = self.device;
        let name = name.as_deref().unwrap_or("a GPU");
        let mut lines = match self.fault {
            Some(fault) => vec![format!("{id:<8}is not used: {fault}"), format!("{total}; {name}")],
            None => vec![format!("{id:<8}{free} free of {total}; {name}")],
        };
        let Self { uuid, bus, compute_capability, multiprocessors, .. } = self;
        let speed = bandwidth.map(|bandwidth| format!(", {bandwidth}")).unwrap_or_default();
        let is_plain = self.compute_mode == Mode::Shared.name();
        let mode = if is_plain { String::new() } else { format!(", compute mode {}", self.compute_mode) };
        lines.push(format!("compute capability {compute_capability}, {multiprocessors} multiprocessors{speed}{mode}"));
        lines.push(format!("{uuid}, bus {bus}"));
        lines.extend(self.processes.unwrap_or_default().iter().map(|Occupant { pid, name, used }| {
            let used = used.map_or("unknown".to_owned(), |used| used.to_string());
            format!("{used:>10}  process {pid}, {}", name.as_deref().unwrap_or("whose name is not to be seen"))
        }));
        lines.join("\n        ")
    }
}

pub fn run(arguments: &DevicesArguments, process: &Process) -> Result<Exit> {
    let Some(seconds) = arguments.watch else {
        show(arguments, process)?;
        return Ok(Exit::Done);
    };
    let cancel = signal::cancel_by_interrupt()?;
    while !cancel.is_cancelled() {
        let begun = Instant::now();
        process.printer.clear_screen()?;
        show(arguments, process)?;
        while begun.elapsed() < Duration::from_secs(seconds) && !cancel.is_cancelled() {
            thread::sleep(PAUSE);
        }
    }
    Ok(Exit::Interrupted)
}

fn show(arguments: &DevicesArguments, process: &Process) -> Result<()> {
    let directory = process.environment.offload_directory(arguments.offload_dir.as_deref());
    let found = Installation::find();
    let inventory = Inventory::of(found.clone(), &directory)?;
    let installation = found.as_ref().ok().and_then(Option::as_ref);
    let gpus = installation.into_iter().flat_map(|found| &found.gpus);
    let verification = arguments.verify.then(|| verification(directory.clone(), process)).transpose()?;
    let machine = Machine {
        driver: installation.map(|found| format!("{}.{}", found.version.0, found.version.1)),
        driver_version: installation.and_then(|found| found.driver.as_deref()),
        driver_fault: found.as_ref().err(),
        gpus: gpus.map(|gpu| Gpu::new(gpu, &inventory)).collect(),
        cpu: inventory.device(DeviceId::Cpu),
        threads: thread::available_parallelism().map_or(1, usize::from),
        disk: inventory.device(DeviceId::Disk),
        offload_directory: directory.display().to_string(),
        cuda_visible_devices: process.environment.visible_gpus(),
        notes: &inventory.notes,
        verification: verification.as_ref(),
    };
    match arguments.format {
        Format::Text => process.printer.result(&machine.text())?,
        // Numbers, texts and lists of such cannot fail to serialize.
        Format::Json => process.printer.json(&(serde_json::to_string_pretty(&machine).unwrap_or_default() + "\n"))?,
    }
    verification.map_or(Ok(()), Verification::into_result)
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
    verify(&options, environment.verified().as_deref(), &mut |event| {
        model::show(&event, "", &mut None, &process.printer);
    })
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
        let mut lines: Vec<_> = self.gpus.iter().map(Gpu::text).collect();
        let (free, total) = self.cpu.map_or((Bytes::ZERO, Bytes::ZERO), |cpu| (cpu.free, cpu.total));
        lines.push(format!("cpu     {free} free of {total}; {} threads", self.threads));
        let free = self.disk.map_or(Bytes::ZERO, |disk| disk.free);
        lines.push(format!("disk    {free} free; `{}`", self.offload_directory));
        lines.push(match (&self.driver, self.driver_version, self.driver_fault) {
            (Some(cuda), Some(version), _) => format!("driver  {version}, for CUDA {cuda}"),
            (Some(cuda), None, _) => format!("driver  for CUDA {cuda}"),
            (None, _, Some(fault)) => format!("driver  no GPU is used: {fault}"),
            (None, _, None) => "driver  none: no GPUs".to_owned(),
        });
        lines.extend(self.verification.into_iter().flat_map(self::lines));
        lines.extend(self.cuda_visible_devices.map(|devices| format!("CUDA_VISIBLE_DEVICES={devices}")));
        lines.extend(self.notes.iter().cloned());
        lines.join("\n") + "\n"
    }
}
