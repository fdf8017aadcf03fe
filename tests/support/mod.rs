//! What several tests need: the fixtures, and models loaded from them.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod bent;
pub mod broken;
pub mod models;
pub mod published;
pub mod shapes;

use std::path::{Path, PathBuf};

use evenkeel::checkpoint::Checkpoint;
use evenkeel::device_map::DeviceMap;
use evenkeel::loader::{LoadOptions, Model};
use evenkeel::machine::Inventory;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::{KvDtype, Scheme};

/// What Transformers computed for these is in their expected.json.
pub const CHECKPOINTS: &[&str] = &[
    "parity/gemma2",
    "parity/gemma3",
    "parity/gpt2",
    "parity/granite",
    "parity/llama",
    "parity/llama31",
    "parity/llama_bf16",
    "parity/ministral",
    "parity/mistral",
    "parity/mixtral",
    "parity/olmo2",
    "parity/phi3",
    "parity/qwen2",
    "parity/qwen2_yarn",
    "parity/qwen3",
    "parity/qwen3_moe",
    "parity/smollm3",
];

/// A fixture's directory.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A machine with more than enough memory and disk.
pub fn roomy() -> Inventory {
    Inventory::described("cpu=64GiB,disk=64GiB").unwrap()
}

/// Loads a fixture onto the CPU, or where `map` says. Its KV cache is f32, as
/// that of Transformers was for the expected values.
pub fn load(name: &str, scheme: Scheme, map: Option<&str>) -> Model {
    load_with(name, scheme, map, KvDtype::F32)
}

/// As [`load`], with a KV cache of another type.
pub fn load_with(name: &str, scheme: Scheme, map: Option<&str>, kv_cache: KvDtype) -> Model {
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let options = PlanOptions {
        quantize: Some(scheme.into()),
        kv_cache: Some(kv_cache),
        device_map: map.map(|json| DeviceMap::parse("map.json", json.as_bytes().to_vec()).unwrap()),
        ..PlanOptions::default()
    };
    let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
    load_plan(&plan).unwrap()
}

/// Carries out a plan, with scratch files in the test's own directory.
pub fn load_plan(plan: &Plan) -> evenkeel::Result<Model> {
    let offload_directory = env!("CARGO_TARGET_TMPDIR").into();
    plan.load(&LoadOptions { offload_directory, ..LoadOptions::default() }, |_| ())
}

/// A list of numbers in a JSON value.
pub fn numbers<T: serde::de::DeserializeOwned>(value: &serde_json::Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// expected.json of a fixture.
pub fn expected(name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(fixture(name).join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}
