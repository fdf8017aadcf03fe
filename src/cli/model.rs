//! The model and the plan that the arguments name.

use std::path::Path;
use std::sync::Arc;

use evenkeel::{
    Cancel, Checkpoint, DeviceMap, Error, GenerationDefaults, Hint, Inventory, LoadEvent, LoadOptions, Model, Note,
    Plan, PlanOptions, Result, Sandbox, Strategy, verify_once,
};
use indicatif::ProgressBar;

use super::args::{ModelArguments, PlacementArguments, Places, RoomArguments};
use super::printer::Printer;
use super::progress::{self, BYTES};
use super::{Process, sandbox, turn};

/// How much of a model a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Configuration and headers; nothing is downloaded but those.
    Headers,
    /// All files, in a local directory.
    Weights,
}

/// The checkpoint that the arguments name; `cancel` stops a download.
pub fn open(arguments: &ModelArguments, need: Need, cancel: &Cancel, process: &Process) -> Result<Checkpoint> {
    let model = arguments.model();
    let path = Path::new(model);
    let mut checkpoint = if path.exists() {
        Checkpoint::open_on(path, &process.pool)?
    } else if model.starts_with(['.', '/', '~']) || model.matches('/').count() > 1 || model.ends_with('/') {
        // No repository has such a name.
        return Err(Error::input(format!("there is no directory `{model}`"))
            .hint("name a directory that holds a checkpoint, or a repository on the Hub as `ORG/NAME`"));
    } else {
        from_hub(arguments, need, cancel, process)?
    };
    if need == Need::Weights {
        checkpoint.compare_head()?;
    }
    let unused = checkpoint.unused_tensors();
    let unused = (!unused.is_empty()).then_some(Note::Unused(unused));
    for note in checkpoint.notes.iter().chain(&unused) {
        process.printer.note(&format!("warning: `{}`: {note}", checkpoint.name));
    }
    Ok(checkpoint)
}

/// Says what generation_config.json asks for and is not done.
pub fn note_undone(checkpoint: &Checkpoint, process: &Process) {
    let undone = &checkpoint.config.generation.undone;
    if !undone.is_empty() {
        let keys: Vec<_> = undone.iter().map(|key| format!("`{key}`")).collect();
        let (file, keys) = (GenerationDefaults::FILE, keys.join(", "));
        process.printer.note(&format!("warning: {file} has what is not done: {keys}"));
    }
}

#[cfg(feature = "hub")]
fn from_hub(arguments: &ModelArguments, need: Need, cancel: &Cancel, process: &Process) -> Result<Checkpoint> {
    use evenkeel::Source;
    use evenkeel::hub::{Hub, HubEvent, HubOptions, RepoId};

    let (model, printer) = (arguments.model(), &process.printer);
    let id: RepoId = model.parse().map_err(|e| {
        Error::input(format!("`{model}` is neither a directory nor a repository on the Hub")).caused_by(e)
    })?;
    let options = HubOptions { cancel: cancel.clone(), ..process.environment.hub()? };
    let repository = Hub::new(options)?.repository(&id, &arguments.revision)?;
    if need == Need::Headers {
        return Checkpoint::read(model, &repository, &process.pool);
    }
    let mut bar = None;
    let directory = repository.download(&mut |event| match (event, &bar) {
        (HubEvent::Total { bytes, files }, _) if files > 0 => {
            printer.note(&format!("downloading {files} files of `{model}`, {bytes}"));
            bar = Some(progress::bar(printer, "downloading", bytes.0, BYTES));
        }
        (HubEvent::Downloaded(bytes), Some(bar)) => bar.set_position(bytes.0),
        (HubEvent::LockHeld(path), _) => {
            printer.note(&format!("waiting for another process that downloads `{model}` (`{}`)", path.display()));
        }
        (HubEvent::RateLimited(left), Some(bar)) => progress::say(bar, &format!("rate limit, {} s", left.as_secs())),
        _ => {}
    })?;
    let mut checkpoint = Checkpoint::open_on(directory, &process.pool)?;
    model.clone_into(&mut checkpoint.name);
    checkpoint.origin = repository.origin();
    Ok(checkpoint)
}

#[cfg(not(feature = "hub"))]
fn from_hub(arguments: &ModelArguments, _: Need, _: &Cancel, _: &Process) -> Result<Checkpoint> {
    Err(Error::input(format!("there is no directory `{}`", arguments.model()))
        .hint("this build cannot reach the Hub: it was made without the feature `hub`"))
}

/// The most sequences at once, where as many are wanted as fit.
const MOST_SEQUENCES: usize = 64;

/// How a model is loaded that answers many at once.
pub struct ForMany {
    options: PlanOptions,
    load_options: LoadOptions,
    /// Reads texts, and ends in its own time whatever is to stop.
    pub sandbox: Sandbox,
}

impl ForMany {
    pub fn new(
        placement: &PlacementArguments,
        room: &RoomArguments,
        cancel: &Cancel,
        process: &Process,
    ) -> Result<Self> {
        let sandbox = sandbox::of_this_program(Cancel::new())?;
        Ok(Self {
            options: PlanOptions { batch: room.batch, kv_memory: room.kv_memory, ..placement.options(None, process)? },
            load_options: LoadOptions {
                sandbox: Some(sandbox.clone()),
                ..placement.load_options(cancel.clone(), process)?
            },
            sandbox,
        })
    }

    pub fn load(&self, checkpoint: &Checkpoint, process: &Process) -> Result<Model> {
        load(checkpoint, &self.options, Some(MOST_SEQUENCES), &self.load_options, process)
    }
}

/// Plans for this machine as it is now, and loads by the plan: for as many sequences as fit up to `largest`, where
/// that is given and neither options nor map say it.
pub fn load(
    checkpoint: &Checkpoint,
    options: &PlanOptions,
    largest: Option<usize>,
    load: &LoadOptions,
    process: &Process,
) -> Result<Model> {
    let budgets = || options.max_memory.iter().flatten().map(|(device, _)| device);
    let is_for_host = options.device_map.as_ref().is_some_and(|map| !map.names_gpus());
    let uses_gpus = !is_for_host || budgets().any(|device| device.is_gpu());
    // Until all memory is taken, nobody else plans with it.
    let mut turn = if uses_gpus { Some(turn::wait(&load.cancel, process)?) } else { None };
    let mut inventory = if uses_gpus {
        Inventory::of_machine(&load.offload_directory)?
    } else {
        Inventory::of_host(&load.offload_directory)?
    };
    let wants_host = options.device_map.is_some() || budgets().any(|device| !device.is_gpu());
    if !wants_host && inventory.has_only_broken_gpus() {
        let error =
            inventory.faults().map(Hint::from).fold(Error::device("no GPU of this machine can be used"), Error::hint);
        return Err(error.hint("`--device-map cpu` computes on the CPU"));
    }
    inventory.faults().for_each(|fault| process.printer.note(&format!("warning: {fault}")));
    if options.strategy == Strategy::Fastest {
        inventory.measure_bandwidth(&options.pool);
    }
    let mut options = options.clone();
    let is_open = options.batch.is_none() && options.device_map.as_ref().is_none_or(|map| map.batch.is_none());
    if let Some(largest) = largest.filter(|_| is_open) {
        options.batch = Plan::largest_batch(checkpoint, &inventory, &options, largest)?;
    }
    let plan = Plan::new(checkpoint, &inventory, options)?;
    if !plan.fits() {
        return Err(process.command_line.does_not_fit(&plan));
    }
    let mut bar = None;
    let used = plan.devices.iter().filter(|device| device.modules > 0).map(|device| device.id);
    let kept = process.environment.verified();
    for gpu in verify_once(used, load, kept.as_deref(), &mut |event| show(&event, "", &mut bar, &process.printer))? {
        let (id, count, seconds) = (gpu.id, gpu.kernels.len(), gpu.seconds);
        process.printer.note(&format!("{id} is used for the first time: {count} kernels are right, in {seconds:.1} s"));
    }
    plan.load(load, |event| {
        if matches!(event, LoadEvent::Started { .. }) {
            turn = None;
        }
        show(&event, "loading", &mut bar, &process.printer);
    })
}

/// Draws the bar of `what` reads all weights.
pub fn show(event: &LoadEvent, what: &'static str, bar: &mut Option<ProgressBar>, printer: &Printer) {
    match (event, &bar) {
        (LoadEvent::Compiling { capability: (major, minor) }, _) => {
            printer.note(&format!("compiling kernels for compute capability {major}.{minor}; they are kept"));
        }
        (LoadEvent::ThroughHost { from, to }, _) => printer.note(&format!(
            "warning: copies from {from} to {to} do not arrive whole, and go through host memory (an IOMMU or ACS may be on)"
        )),
        (LoadEvent::Started { bytes }, _) => *bar = Some(progress::bar(printer, what, bytes.0, BYTES)),
        (LoadEvent::Placed { module, device, bytes }, Some(bar)) => {
            progress::say(bar, &format!("{module} to {device}"));
            bar.inc(bytes.0);
        }
        _ => {}
    }
}

fn open_map(file: &Path) -> Result<DeviceMap> {
    let opened = DeviceMap::open(file);
    if file.exists() || file.components().count() > 1 || file.extension().is_some() {
        return opened;
    }
    let placements = Strategy::ALL.map(Strategy::name).join("`, `");
    opened.map_err(|error| {
        error.hint(format!(
            "a device map is a file, or one of `auto`, `cpu`, `cuda:0`, …, `disk`, `balanced_low_0`, `{placements}`"
        ))
    })
}

impl PlacementArguments {
    /// The options of a load that `cancel` stops.
    pub fn load_options(&self, cancel: Cancel, process: &Process) -> Result<LoadOptions> {
        let offload_directory = process.environment.offload_directory(self.offload_dir.as_deref());
        let sandbox = Some(sandbox::of_this_program(cancel.clone())?);
        Ok(LoadOptions {
            offload_directory,
            cancel,
            pool: Arc::clone(&process.pool),
            kernel_cache: process.environment.kernel_cache(),
            sandbox,
            ..LoadOptions::default()
        })
    }

    /// The options of a plan that `process` makes, with the map in `map` or that of `--device-map`.
    pub fn options(&self, map: Option<&Path>, process: &Process) -> Result<PlanOptions> {
        let (device_map, strategy) = match (map, &self.device_map) {
            (Some(file), _) => (Some(open_map(file)?), None),
            (None, Places::File(file)) => (Some(open_map(file)?), None),
            (None, Places::Auto) => (None, None),
            (None, Places::Device(device)) => (Some(DeviceMap::whole(*device)), None),
            (None, Places::Strategy(strategy)) => (None, Some(*strategy)),
        };
        Ok(PlanOptions {
            quantize: self.quantize.clone(),
            context: self.context,
            // A text at a time, whatever the map was made for.
            batch: Some(1),
            kv_cache: self.kv_cache,
            reserve: Some(self.reserve),
            max_memory: (!self.max_memory.is_empty()).then(|| self.max_memory.iter().copied().collect()),
            device_map,
            any_model: self.any_model,
            strategy: self.placement.or(strategy).unwrap_or_default(),
            cache: process.environment.cache_directory(),
            pool: Arc::clone(&process.pool),
            ..PlanOptions::default()
        })
    }
}
