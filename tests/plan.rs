//! Plans of large models, from headers alone.

#[path = "support/command.rs"]
mod command;
#[path = "support/shapes.rs"]
mod shapes;

use command::{run, stderr, stdout};
use serde_json::Value;

/// `plan --format json` of a shape for `devices`.
fn plan(config: &Value, shards: usize, arguments: &[&str]) -> (Option<i32>, Value) {
    let directory = tempfile::tempdir().unwrap();
    shapes::write(directory.path(), config, shards);
    let model = directory.path().to_str().unwrap();
    let output = run(&[&["plan", model, "--format", "json"], arguments].concat());
    let json = serde_json::from_str(&stdout(&output)).unwrap_or_else(|e| panic!("{e}: {}", stderr(&output)));
    (output.status.code(), json)
}

fn bytes(device: &Value, part: &str) -> u64 {
    device[part].as_u64().unwrap()
}

#[test]
fn llama_8b_unquantized_takes_its_tensors_bytes() {
    let (code, plan) = plan(&shapes::llama_8b(), 4, &["--device", "cuda:0=24GiB"]);
    assert_eq!(code, Some(0));
    assert_eq!(plan["fits"], true);
    assert_eq!(plan["parameters"], 8_030_261_248u64);
    // All shapes are multiples of 64 bytes, so there is no padding.
    assert_eq!(bytes(&plan["devices"][0], "weights"), 2 * 8_030_261_248);
    // 2 × 8 heads × 128 wide × 2 bytes × 32 blocks a token.
    assert_eq!(bytes(&plan["devices"][0], "kv_cache"), 131_072 * 4096);
}

#[test]
fn llama_8b_int4_is_split_over_unequal_gpus_by_their_shares() {
    let (code, plan) =
        plan(&shapes::llama_8b(), 4, &["--quantize", "int4", "--device", "cuda:0=8GiB", "--device", "cuda:1=4GiB"]);
    assert_eq!(code, Some(0));
    let shares: Vec<f64> = plan["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| {
            let fixed = bytes(device, "workspace") + bytes(device, "staging") + bytes(device, "driver_context");
            (bytes(device, "weights") + bytes(device, "kv_cache")) as f64 / (bytes(device, "budget") - fixed) as f64
        })
        .collect();
    assert!((shares[0] - shares[1]).abs() < 0.06, "{shares:?}");
    let blocks = 6_979_321_856u64 * 17 / 32;
    let rows_of_blocks = 32 * (4096 + 1024 + 1024 + 4096 + 14_336 + 14_336 + 4096) * 2;
    let norms = (32 * 2 + 1) * 4096 * 2;
    let embedding_and_head = 2 * (128_256 * 4096 + 128_256 * 4);
    let weights: u64 = plan["modules"].as_array().unwrap().iter().map(|module| bytes(module, "weights")).sum();
    assert_eq!(weights, blocks + rows_of_blocks + norms + embedding_and_head);
}

#[test]
fn llama_405b_on_eight_gpus() {
    let devices: Vec<String> = (0..8).flat_map(|i| ["--device".to_owned(), format!("cuda:{i}=80GiB")]).collect();
    let mut arguments: Vec<&str> = devices.iter().map(String::as_str).collect();
    let (code, unquantized) = plan(&shapes::llama_405b(), 191, &arguments);
    assert_eq!(code, Some(3));
    assert_eq!(unquantized["parameters"], 405_853_388_800u64);
    assert_eq!(unquantized["fits"], false);
    let fitting: Vec<_> = unquantized["remedies"].as_array().unwrap().iter().map(|r| &r["changes"][0]).collect();
    let schemes: Vec<_> = fitting.iter().filter_map(|change| change["scheme"].as_str()).collect();
    assert_eq!(schemes, ["int8", "int4"]);

    arguments.extend(["--quantize", "int4"]);
    let (code, int4) = plan(&shapes::llama_405b(), 191, &arguments);
    assert_eq!((code, &int4["fits"]), (Some(0), &Value::Bool(true)));
    let modules = int4["modules"].as_array().unwrap();
    assert_eq!(modules.len(), 129);
    let on = |device: &str| modules.iter().filter(|module| module["device"] == device).count();
    let counts: Vec<usize> = (0..8).map(|i| on(&format!("cuda:{i}"))).collect();
    assert_eq!(counts.iter().sum::<usize>(), 129);
    assert!(counts.iter().all(|count| (13..=18).contains(count)), "{counts:?}");
}

/// The devices on which a plan has modules.
fn used(plan: &Value) -> Vec<String> {
    let mut devices: Vec<_> = plan["modules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|module| module["device"].as_str().unwrap().to_owned())
        .collect();
    devices.sort();
    devices.dedup();
    devices
}

#[test]
fn a_placement_is_chosen_by_name() {
    let devices =
        ["--quantize", "int4", "--device", "cuda:0=24GiB", "--device", "cuda:1=12GiB", "--device", "cpu=64GiB"];
    for (placement, on) in [
        ("balanced", &["cuda:0", "cuda:1"][..]),
        ("packed", &["cuda:0"]),
        ("sequential", &["cuda:0"]),
        ("hf-auto", &["cuda:0", "cuda:1"]),
        ("hf-sequential", &["cuda:0"]),
        ("hf-balanced_low_0", &["cuda:1"]),
    ] {
        let (code, plan) = plan(&shapes::llama_8b(), 4, &[&devices[..], &["--placement", placement]].concat());
        assert_eq!((code, used(&plan)), (Some(0), on.iter().map(|d| (*d).to_owned()).collect()), "{placement}");
        let outlines = plan["placements"].as_array().unwrap();
        assert_eq!(outlines[0]["placement"], placement);
        assert_eq!(outlines.len(), 6, "{placement}");
    }
}

#[test]
fn unequal_gpus_hold_what_transformers_puts_on_the_cpu() {
    let devices =
        ["--quantize", "int8", "--device", "cuda:0=24GiB", "--device", "cuda:1=6GiB", "--device", "cpu=64GiB"];
    let (code, ours) = plan(&shapes::llama2_13b(), 3, &devices);
    assert_eq!((code, used(&ours)), (Some(0), vec!["cuda:0".to_owned(), "cuda:1".to_owned()]));
    let (_, theirs) = plan(&shapes::llama2_13b(), 3, &[&devices[..], &["--placement", "hf-auto"]].concat());
    assert!(used(&theirs).contains(&"cpu".to_owned()), "{:?}", used(&theirs));
}

#[test]
fn our_placement_is_a_remedy_for_that_of_transformers() {
    let arguments = [
        "--quantize",
        "int4",
        "--context",
        "8192",
        "--device",
        "cuda:0=6GiB",
        "--device",
        "cuda:1=4GiB",
        "--device",
        "cpu=32GiB",
    ];
    let (code, _) = plan(&shapes::llama_8b(), 4, &arguments);
    assert_eq!(code, Some(0));
    let (code, theirs) = plan(&shapes::llama_8b(), 4, &[&arguments[..], &["--placement", "hf-sequential"]].concat());
    let ours = serde_json::json!([{"kind": "placement", "placement": "balanced"}]);
    assert_eq!((code, &theirs["remedies"][0]["changes"]), (Some(3), &ours));
}
