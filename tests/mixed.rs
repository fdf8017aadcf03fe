//! Schemes that are chosen for each projection, by the error that is measured on rows of it.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use evenkeel::architecture::ModuleTree;
use evenkeel::bytes::Bytes;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device::DeviceId;
use evenkeel::device_map::DeviceMap;
use evenkeel::machine::Inventory;
use evenkeel::module_path::contains;
use evenkeel::plan::{Plan, PlanOptions, Quantize};
use evenkeel::quant::Scheme;
use serde_json::Value;
use support::{fixture, load_plan, roomy};

fn options(quantize: Quantize, cache: &Path) -> PlanOptions {
    PlanOptions {
        quantize: Some(quantize),
        context: Some(64),
        reserve: Some(Bytes::ZERO),
        cache: Some(cache.to_owned()),
        ..PlanOptions::default()
    }
}

/// The files of a directory, none where there is no such.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The one file of a cache.
fn kept(cache: &Path) -> PathBuf {
    let [file] = &files(cache)[..] else { panic!("{:?}", files(cache)) };
    file.clone()
}

/// The loss of every path as it is kept, by the name of the scheme.
fn losses(cache: &Path) -> BTreeMap<String, Value> {
    let kept: Value = serde_json::from_slice(&fs::read(kept(cache)).unwrap()).unwrap();
    serde_json::from_value(kept["losses"].clone()).unwrap()
}

/// What a plan loses over all weights that a token meets; those of the embedding and the head count
/// twice, and twice again where they are one.
fn loss(plan: &Plan, losses: &BTreeMap<String, Value>, checkpoint: &Checkpoint) -> f64 {
    let tree = ModuleTree::new(&checkpoint.config);
    let of = |(path, loss): (&String, &Value)| {
        let parameters = tree.parameters().filter(|(_, p)| contains(path, &p.module) && p.is_quantizable());
        let weights: f64 = parameters.map(|(_, p)| (p.rows * p.cols) as f64).sum();
        let share = match (path.rsplit('.').next().unwrap(), checkpoint.config.experts) {
            ("embed_tokens" | "wte" | "lm_head", _) if tree.tied => 4.0,
            ("embed_tokens" | "wte" | "lm_head", _) => 2.0,
            ("experts", Some(experts)) => experts.per_token as f64 / experts.count as f64,
            _ => 1.0,
        };
        loss[plan.quantize.scheme(path).name()].as_f64().unwrap_or(0.0) * weights * share
    };
    losses.iter().map(of).sum()
}

#[test]
fn more_room_never_loses_more_and_never_overflows() {
    for (name, devices) in [
        ("ferris-7m", &[DeviceId::Cuda(0)][..]),
        ("ferris-7m", &[DeviceId::Cuda(0), DeviceId::Cuda(1)]),
        ("parity/mixtral", &[DeviceId::Cuda(0)]),
        ("parity/gpt2", &[DeviceId::Cuda(0)]),
        ("parity/phi3", &[DeviceId::Cpu]),
    ] {
        let (checkpoint, cache) = (Checkpoint::open(fixture(name)).unwrap(), tempfile::tempdir().unwrap());
        let options = |quantize| options(quantize, cache.path());
        let whole = |scheme: Scheme, devices: &str| {
            Plan::new(&checkpoint, &Inventory::described(devices).unwrap(), options(scheme.into())).unwrap()
        };
        let described = |bytes: u64| devices.iter().map(|id| format!("{id}={bytes}")).collect::<Vec<_>>().join(",");
        let [low, high] = [Scheme::Int4, Scheme::Int8].map(|scheme| {
            let plan = whole(scheme, &described(1 << 40));
            plan.devices.iter().map(|device| device.total().0).max().unwrap()
        });
        let (mut last, mut mixed) = (f64::INFINITY, 0);
        for step in 0..=8 {
            let devices = described(low + (high - low) * step / 8);
            let inventory = Inventory::described(&devices).unwrap();
            let plan = Plan::new(&checkpoint, &inventory, options(Quantize::Auto)).unwrap();
            assert!(plan.fits(), "{name} {devices}");
            if plan.schemes.len() == Scheme::AUTOMATIC.len() {
                // All in int8 fits, or there is nothing left to give.
                continue;
            }
            mixed += 1;
            let losses = losses(cache.path());
            let found = loss(&plan, &losses, &checkpoint);
            let int4 = loss(&whole(Scheme::Int4, &devices), &losses, &checkpoint);
            assert!(found < int4 && found <= last * 1.001, "{name} {devices}: {found}, {last} before, {int4} in int4");
            last = found;
            // The map that is written gives the same plan.
            let map = DeviceMap::parse("map.json", plan.device_map().into_bytes()).unwrap();
            let read = PlanOptions { device_map: Some(map), reserve: Some(Bytes::ZERO), ..PlanOptions::default() };
            let again = Plan::new(&checkpoint, &inventory, &read).unwrap();
            assert_eq!((&again.quantize, &again.devices), (&plan.quantize, &plan.devices), "{name} {devices}");
        }
        assert!(mixed >= 5, "{name}: {mixed}");
    }
}

#[test]
fn a_higher_scheme_that_fits_whole_is_chosen_whole() {
    let (checkpoint, cache) = (Checkpoint::open(fixture("ferris-7m")).unwrap(), tempfile::tempdir().unwrap());
    for (scheme, budget) in [(Scheme::None, "cuda:0=1GiB"), (Scheme::Int8, "cuda:0=673MiB")] {
        let options = options(Quantize::Auto, cache.path());
        let plan = Plan::new(&checkpoint, &Inventory::described(budget).unwrap(), &options).unwrap();
        assert_eq!(Quantize::Rules(plan.quantize), scheme.into());
    }
    assert_eq!(files(cache.path()), [] as [PathBuf; 0], "nothing had to be measured");
}

#[test]
fn what_was_measured_is_kept_until_the_checkpoint_changes() {
    let root = tempfile::tempdir().unwrap();
    let (model, cache) = (root.path().join("model"), root.path().join("caches/evenkeel"));
    fs::create_dir(&model).unwrap();
    for file in files(&fixture("ferris-7m")) {
        fs::copy(&file, model.join(file.file_name().unwrap())).unwrap();
    }
    let in_model = files(&model).len();
    let kinds_with = |cache| {
        let options = PlanOptions { kinds: true, cache, ..options(Scheme::Nl4.into(), root.path()) };
        Plan::new(&Checkpoint::open(&model).unwrap(), &roomy(), &options).unwrap().kinds
    };
    let measured = kinds_with(None);
    assert!(measured.iter().all(|kind| kind.error.is_some_and(|error| error > 0.001 && error < 0.1)), "{measured:?}");
    assert!(!cache.exists());
    let kinds = || kinds_with(Some(cache.clone()));
    assert_eq!(kinds(), measured);
    let file = kept(&cache);
    let text = fs::read_to_string(&file).unwrap();
    // What is kept is used, whatever it says.
    fs::write(&file, text.replace("\"nl4\": 0.0", "\"nl4\": 0.1")).unwrap();
    assert_ne!(kinds(), measured);
    // A file that is none, or of another checkpoint, is measured again.
    let others = [
        ("\"changed\": 1", "\"changed\": 2"),
        ("\"int8\": ", "\"int8\": -1"),
        ("\"version\"", "\"x\": 1, \"version\""),
    ];
    for other in others.map(|(from, to)| text.replace(from, to)).into_iter().chain(["{".to_owned()]) {
        assert_ne!(other, text);
        fs::write(&file, other).unwrap();
        assert_eq!(kinds(), measured);
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }
    // Other weights of the same size, from the same time.
    let shard =
        files(&model).into_iter().find(|file| file.to_str().unwrap().ends_with("2-of-00003.safetensors")).unwrap();
    let (mut bytes, time) = (fs::read(&shard).unwrap(), fs::metadata(&shard).unwrap().modified().unwrap());
    let end = bytes.len();
    bytes[end / 2..].iter_mut().for_each(|byte| *byte ^= 1);
    fs::write(&shard, bytes).unwrap();
    fs::File::options().write(true).open(&shard).unwrap().set_modified(time).unwrap();
    assert_ne!(kinds(), measured);
    assert_ne!(fs::read_to_string(kept(&cache)).unwrap(), text);
    assert_eq!(files(&model).len(), in_model);
}

#[test]
fn a_mixture_loads_into_the_bytes_that_are_planned() {
    let (checkpoint, cache) = (Checkpoint::open(fixture("parity/mixtral")).unwrap(), tempfile::tempdir().unwrap());
    let options = |quantize| options(quantize, cache.path());
    let whole = |scheme: Scheme| {
        Plan::new(&checkpoint, &Inventory::described("cpu=1GiB").unwrap(), options(scheme.into())).unwrap().total()
    };
    let budget = Bytes(u64::midpoint(whole(Scheme::Int4).0, whole(Scheme::Int8).0));
    let inventory = Inventory::described(&format!("cpu={}", budget.0)).unwrap();
    let plan = Plan::new(&checkpoint, &inventory, options(Quantize::Auto)).unwrap();
    assert!(plan.schemes.last().unwrap().is_mixed && plan.fits());
    let model = load_plan(&plan).unwrap();
    for device in &model.report.devices {
        assert_eq!(device.planned, device.measured, "{}", device.id);
    }
}
