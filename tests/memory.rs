//! What a plan says and what its load takes.

mod support;

use evenkeel::checkpoint::Checkpoint;
use evenkeel::device::DeviceId;
use evenkeel::device_map::DeviceMap;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::{KvDtype, Scheme};
use support::{fixture, load_plan, roomy};

#[test]
fn measured_bytes_are_the_planned_ones() {
    for name in ["ferris-7m", "parity/llama", "parity/llama31"] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        for scheme in Scheme::ALL {
            for (map, context, kv_cache) in [
                (r#"{"": "cpu"}"#, 64, KvDtype::F16),
                (r#"{"": "disk"}"#, 256, KvDtype::Bf16),
                (r#"{"": "cpu", "model.layers.1": "disk", "model.norm": "disk"}"#, 201, KvDtype::Int8),
            ] {
                let options = PlanOptions {
                    quantize: Some(scheme.into()),
                    context: Some(context),
                    kv_cache: Some(kv_cache),
                    device_map: Some(DeviceMap::parse("map.json", map.into()).unwrap()),
                    ..PlanOptions::default()
                };
                let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
                let model = load_plan(&plan).unwrap();
                for device in &model.report.devices {
                    assert_eq!(device.planned, device.measured, "{name} {scheme} {map}: {}", device.id);
                }
            }
        }
    }
}

#[test]
fn a_plan_that_does_not_fit_is_not_loaded() {
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let options = PlanOptions {
        max_memory: Some(
            [(DeviceId::Cpu, evenkeel::bytes::Bytes(1000)), (DeviceId::Disk, evenkeel::bytes::Bytes(1000))].into(),
        ),
        ..PlanOptions::default()
    };
    let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
    assert!(!plan.fits());
    let error = load_plan(&plan).err().unwrap();
    assert_eq!(error.kind(), evenkeel::ErrorKind::DoesNotFit);
}
