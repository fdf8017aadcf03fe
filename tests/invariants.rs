//! What holds of every plan, whatever the model, the machine and the options.

#[path = "support/shapes.rs"]
mod shapes;

use std::cell::Cell;

use evenkeel::architecture::ModuleTree;
use evenkeel::bytes::{Bytes, MIB};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device::DeviceId;
use evenkeel::device_map::DeviceMap;
use evenkeel::machine::{Device, Inventory};
use evenkeel::plan::{Change, Plan, PlanOptions, Strategy as Placement};
use evenkeel::quant::{KvDtype, Scheme};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;
use serde_json::Value;

fn shape(hidden: u64, blocks: u64, vocabulary: u64, tied: bool) -> Value {
    let mut config = shapes::llama_8b();
    for (key, value) in [
        ("hidden_size", hidden * 128),
        ("intermediate_size", hidden * 320),
        ("num_hidden_layers", blocks),
        ("num_attention_heads", hidden),
        ("num_key_value_heads", 1),
        ("vocab_size", vocabulary * 1000),
    ] {
        config[key] = value.into();
    }
    config["tie_word_embeddings"] = tied.into();
    config
}

fn machine(gpus: &[u64], cpu: Option<u64>, disk: Option<u64>) -> Inventory {
    let gpu = |(index, mib): (usize, &u64)| format!("cuda:{index}={mib}MiB@{}GB/s", 300 + 100 * index);
    let host = [cpu.map(|mib| format!("cpu={mib}MiB@40GB/s")), cpu.and(disk).map(|mib| format!("disk={mib}MiB"))];
    let text: Vec<_> = gpus.iter().enumerate().map(gpu).chain(host.into_iter().flatten()).collect();
    Inventory::described(&text.join(",")).unwrap()
}

/// The machine and the options with a remedy's changes, each of which asks less of it or gives it more.
fn changed(
    plan: &Plan,
    changes: &[Change],
    mut machine: Inventory,
    mut options: PlanOptions,
) -> Result<(Inventory, PlanOptions), TestCaseError> {
    for change in changes {
        let is_smaller = match *change {
            Change::Batch { sequences } => options.batch.replace(sequences) > Some(sequences),
            Change::Context { tokens } => options.context.replace(tokens) > Some(tokens),
            Change::KvCache { dtype } => options.kv_cache.replace(dtype) != Some(dtype) && dtype == KvDtype::Int8,
            Change::Quantize { scheme } => {
                options.quantize = Some(scheme.into());
                scheme > plan.quantize.scheme("")
            }
            Change::Placement { placement } => {
                std::mem::replace(&mut options.strategy, placement) != placement && !placement.is_transformers()
            }
            Change::Budget { device, max_memory } => {
                let limit = options.max_memory.get_or_insert_default().insert(device, max_memory);
                limit.is_some_and(|limit| limit < max_memory) && max_memory <= machine.device(device).unwrap().free
            }
            Change::Memory { device: id, free, missing, bandwidth } => {
                if let Some(known) = machine.devices.iter_mut().find(|known| known.id == id) {
                    std::mem::replace(&mut known.free, free) + missing == free
                } else {
                    machine.devices.push(Device { bandwidth, ..Device::new(id, free) });
                    machine.devices.sort_by_key(|device| device.id);
                    id == DeviceId::Cpu && missing == free
                }
            }
            Change::Automatic => false,
        };
        prop_assert!(is_smaller, "{change:?}");
    }
    Ok((machine, options))
}

#[test]
fn every_parameter_is_placed_once_and_fits_or_is_answered() {
    let shapes = (1u64..16, 1u64..30, 1u64..120, any::<bool>());
    let gpus = prop::collection::vec(300u64..2000, 0..4);
    let hosts = (prop::option::of(500u64..3000), prop::option::of(1u64..2000));
    let schemes = (select(Scheme::ALL.to_vec()), select(KvDtype::ALL.to_vec()), select(Placement::ALL.to_vec()));
    let sizes = (1usize..5000, 1usize..4, 0u64..300, prop::option::of(0u64..3000));
    let (fitting, answered) = (Cell::new(0), Cell::new(0));
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() });
    let cases = (shapes, gpus, hosts, schemes, sizes);
    let holds = runner.run(&cases, |(shape_of, gpus, (cpu, disk), (scheme, kv_cache, strategy), sizes)| {
        let (hidden, blocks, vocabulary, tied) = shape_of;
        let (context, batch, reserve, limit) = sizes;
        prop_assume!(cpu.is_some() || !gpus.is_empty());
        let directory = tempfile::tempdir().unwrap();
        shapes::write(directory.path(), &shape(hidden, blocks, vocabulary, tied), 2);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let inventory = machine(&gpus, cpu, disk);
        let limited = inventory.devices[0].id;
        let limit = limit.map(|mib| Bytes(mib * MIB));
        let options = PlanOptions {
            quantize: Some(scheme.into()),
            context: Some(context),
            batch: Some(batch),
            kv_cache: Some(kv_cache),
            reserve: Some(Bytes(reserve * MIB)),
            max_memory: limit.map(|limit| [(limited, limit)].into()),
            strategy,
            ..PlanOptions::default()
        };
        // Transformers does not place every model on every machine.
        let Ok(plan) = Plan::new(&checkpoint, &inventory, &options) else {
            prop_assert!(strategy.is_transformers());
            return Ok(());
        };

        let tree = ModuleTree::new(&checkpoint.config);
        let paths = |plan: &Plan| plan.modules.iter().map(|module| module.path.clone()).collect::<Vec<_>>();
        prop_assert_eq!(paths(&plan), tree.modules.iter().map(|module| module.path.clone()).collect::<Vec<_>>());
        let mut overflows = false;
        for device in &plan.devices {
            let here: Vec<_> = plan.modules.iter().filter(|module| module.device == device.id).collect();
            prop_assert_eq!(device.modules, here.len());
            prop_assert_eq!(device.weights, here.iter().map(|module| module.weights).sum());
            // The KV cache of blocks on the disk is in host memory.
            let cached = |id| if id == DeviceId::Disk { DeviceId::Cpu } else { id };
            let cached = plan.modules.iter().filter(|module| cached(module.device) == device.id);
            prop_assert_eq!(device.kv_cache, cached.map(|module| module.kv_cache).sum());
            let free = inventory.device(device.id).unwrap().free;
            let reserve = if device.id == DeviceId::Disk { Bytes::ZERO } else { Bytes(reserve * MIB) };
            let limit = limit.filter(|_| device.id == limited).unwrap_or(Bytes(u64::MAX));
            let taken = device.allocated() + device.program + device.driver;
            overflows |= taken > (free - reserve).min(limit);
        }
        prop_assert_eq!(plan.fits(), !overflows);
        for remedy in &plan.remedies {
            prop_assert!(!plan.fits());
            answered.set(answered.get() + 1);
            let (machine, options) = changed(&plan, &remedy.changes, inventory.clone(), options.clone())?;
            let again = Plan::new(&checkpoint, &machine, &options).unwrap();
            prop_assert!(again.fits(), "{:?}", remedy);
            prop_assert_eq!(
                (again.total(), again.off_gpus(), again.speed),
                (remedy.total, remedy.off_gpus, remedy.speed)
            );
        }
        // The plan survives being written as a map.
        if plan.fits() {
            fitting.set(fitting.get() + 1);
            let map = DeviceMap::parse("map", plan.device_map().into_bytes()).unwrap();
            let again = PlanOptions { device_map: Some(map), reserve: options.reserve, ..PlanOptions::default() };
            let again = Plan::new(&checkpoint, &inventory, &again).unwrap();
            prop_assert_eq!((again.placement(), &again.devices), (plan.placement(), &plan.devices));
            prop_assert!(again.fits());
        }
        Ok(())
    });
    holds.unwrap_or_else(|e| panic!("{e}"));
    assert!(fitting.get() > 8 && answered.get() > 8, "{fitting:?} fit, {answered:?} answers");
}
