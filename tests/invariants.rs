//! What holds of every plan, whatever the model, the machine and the options.

#[path = "support/shapes.rs"]
mod shapes;

use evenkeel::architecture::ModuleTree;
use evenkeel::bytes::{Bytes, MIB};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device::DeviceId;
use evenkeel::machine::Inventory;
use evenkeel::plan::{Plan, PlanOptions, Strategy as Placement};
use evenkeel::quant::{KvDtype, Scheme};
use proptest::prelude::*;
use serde_json::Value;

fn shape(hidden: u64, blocks: u64, vocabulary: u64, tied: bool) -> Value {
    let mut config = shapes::llama_8b();
    for (key, value) in [
        ("hidden_size", hidden * 64),
        ("intermediate_size", hidden * 160),
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_parameter_is_placed_once_and_what_fits_is_within_its_budget(
        (hidden, blocks, vocabulary, tied) in (1u64..16, 1u64..10, 1u64..60, any::<bool>()),
        gpus in prop::collection::vec(300u64..2500, 0..4),
        (cpu, disk) in (prop::option::of(500u64..3000), prop::option::of(1u64..2000)),
        (scheme, kv_cache, placement) in (0usize..3, 0usize..4, 0usize..7),
        (context, batch, reserve, limit) in (1usize..5000, 1usize..4, 0u64..300, prop::option::of(0u64..3000)),
    ) {
        prop_assume!(cpu.is_some() || !gpus.is_empty());
        let directory = tempfile::tempdir().unwrap();
        shapes::write(directory.path(), &shape(hidden, blocks, vocabulary, tied), 2);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let inventory = machine(&gpus, cpu, disk);
        let limited = inventory.devices[0].id;
        let options = PlanOptions {
            quantize: Some(Scheme::ALL[scheme].into()),
            context: Some(context),
            batch: Some(batch),
            kv_cache: Some(KvDtype::ALL[kv_cache]),
            reserve: Some(Bytes(reserve * MIB)),
            max_memory: limit.map(|mib| [(limited, Bytes(mib * MIB))].into()),
            strategy: Placement::ALL[placement],
            ..PlanOptions::default()
        };
        // Transformers does not place every model on every machine.
        let Ok(plan) = Plan::new(&checkpoint, &inventory, &options) else {
            prop_assert!(options.strategy.is_transformers());
            return Ok(());
        };

        let tree = ModuleTree::new(&checkpoint.config);
        let paths = |plan: &Plan| plan.modules.iter().map(|module| module.path.clone()).collect::<Vec<_>>();
        prop_assert_eq!(paths(&plan), tree.modules.iter().map(|module| module.path.clone()).collect::<Vec<_>>());
        let weights: Bytes = plan.devices.iter().map(|device| device.weights).sum();
        prop_assert_eq!(weights, plan.modules.iter().map(|module| module.weights).sum());
        let kv_cache: Bytes = plan.devices.iter().map(|device| device.kv_cache).sum();
        prop_assert_eq!(kv_cache, plan.modules.iter().map(|module| module.kv_cache).sum());
        for device in &plan.devices {
            let free = inventory.device(device.id).unwrap().free;
            let reserve = if device.id == DeviceId::Disk { Bytes::ZERO } else { Bytes(reserve * MIB) };
            prop_assert!(device.budget <= free - reserve);
            prop_assert!(device.id != limited || limit.is_none_or(|mib| device.budget <= Bytes(mib * MIB)));
            prop_assert!(!plan.fits() || device.total() <= device.budget);
            prop_assert!(device.modules > 0 || device.weights == Bytes::ZERO);
        }
        // What does not fit is answered, and each answer is smaller or has more room.
        for remedy in &plan.remedies {
            prop_assert!(!remedy.changes.is_empty() && !plan.fits());
        }
        // The plan survives being written as a map.
        if plan.fits() {
            let map = evenkeel::device_map::DeviceMap::parse("map", plan.device_map().into_bytes()).unwrap();
            let again = PlanOptions {
                device_map: Some(map),
                reserve: options.reserve,
                ..PlanOptions::default()
            };
            let again = Plan::new(&checkpoint, &inventory, &again).unwrap();
            prop_assert_eq!((again.placement(), &again.devices), (plan.placement(), &plan.devices));
            prop_assert!(again.fits());
        }
    }
}
