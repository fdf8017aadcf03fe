//! Where other planners go wrong, case by case, and what ours does instead.

#[path = "support/command.rs"]
mod command;
#[path = "support/published.rs"]
mod published;
#[path = "support/shapes.rs"]
mod shapes;

use std::fs;

use command::{run, stderr, stdout};
use serde_json::{Value, json};

/// `plan --format json` of a model's headers.
fn plan(config: &Value, arguments: &str) -> Value {
    let output = run_plan(config, &format!("--format json {arguments}"));
    serde_json::from_str(&stdout(&output)).unwrap_or_else(|e| panic!("{e}: {}", stderr(&output)))
}

fn run_plan(config: &Value, arguments: &str) -> std::process::Output {
    let directory = tempfile::tempdir().unwrap();
    shapes::write(directory.path(), config, 3);
    let model = directory.path().to_str().unwrap();
    run(&[&["plan", model], &arguments.split(' ').collect::<Vec<_>>()[..]].concat())
}

/// The device of a module.
fn place<'a>(plan: &'a Value, path: &str) -> &'a str {
    let modules = plan["modules"].as_array().unwrap();
    modules.iter().find(|module| module["path"] == path).unwrap()["device"].as_str().unwrap()
}

/// How many modules are on a device.
fn count(plan: &Value, device: &str) -> usize {
    plan["modules"].as_array().unwrap().iter().filter(|module| module["device"] == device).count()
}

/// A plan that fits, and what Transformers would have chosen for the same devices.
fn ours_and_theirs(config: &Value, arguments: &str) -> (Value, Value) {
    let ours = plan(config, arguments);
    assert_eq!(ours["fits"], true, "{arguments}");
    (ours, plan(config, &format!("{arguments} --placement hf-auto")))
}

fn gemma_2_2b() -> Value {
    json!({
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 256_000, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    })
}

#[test]
fn a_share_that_ignores_unequal_memory_spills_while_a_gpu_is_half_empty() {
    for arguments in [
        "--quantize int8 --device cuda:0=24GiB --device cuda:1=6GiB --device cpu=64GiB",
        "--device cuda:0=22GiB --device cuda:1=10GiB --device cpu=64GiB",
    ] {
        let (ours, theirs) = ours_and_theirs(&shapes::llama2_13b(), arguments);
        assert_eq!(count(&ours, "cpu"), 0, "{arguments}");
        assert!(count(&theirs, "cpu") > 0, "{arguments}");
    }
}

#[test]
fn a_reserve_for_the_largest_layer_pushes_the_head_off_the_gpus() {
    let tight = "--context 512 --reserve 0 --device cuda:0=8GiB@T4 --device cuda:1=8GiB@T4 --device cpu=64GiB";
    let (ours, theirs) = ours_and_theirs(&shapes::llama_8b(), tight);
    assert_eq!((place(&ours, "lm_head"), place(&theirs, "lm_head")), ("cuda:1", "cpu"));
    assert_eq!(count(&ours, "cpu"), 0);
    // What has to leave smaller ones is the embedding, of which a token reads a row.
    let smaller = tight.replace("cuda:1=8GiB", "cuda:1=7364MiB");
    let (ours, _) = ours_and_theirs(&shapes::llama_8b(), &smaller);
    assert_eq!(
        (place(&ours, "lm_head"), place(&ours, "model.embed_tokens"), count(&ours, "cpu")),
        ("cuda:1", "cpu", 1)
    );

    let roomy = "--device cuda:0=80GiB --device cuda:1=80GiB --device cuda:2=80GiB --device cuda:3=80GiB";
    let (ours, theirs) = ours_and_theirs(&shapes::llama_8b(), &format!("{roomy} --device cpu=64GiB"));
    let blocks = |plan: &Value| (0..4).map(|gpu| count(plan, &format!("cuda:{gpu}"))).collect::<Vec<_>>();
    assert!(blocks(&ours).iter().all(|count| (7..=10).contains(count)), "{:?}", blocks(&ours));
    assert!(blocks(&theirs)[3] <= 3, "{:?}", blocks(&theirs));
}

#[test]
fn shares_taken_off_a_single_gpu_twice_keep_a_model_off_it_that_fits() {
    let arguments = "--quantize int8 --context 256 --reserve 0 --device cuda:0=7680MiB --device cpu=64GiB";
    let mut llama2_7b = shapes::llama2_13b();
    for (key, value) in [
        ("hidden_size", 4096),
        ("intermediate_size", 11_008),
        ("num_hidden_layers", 32),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 32),
    ] {
        llama2_7b[key] = value.into();
    }
    let (ours, theirs) = ours_and_theirs(&llama2_7b, arguments);
    assert_eq!(count(&ours, "cpu"), 0);
    assert!(count(&theirs, "cpu") > 0);
}

#[test]
fn a_first_module_that_is_larger_than_the_gpu_leaves_it_empty() {
    let arguments = "--context 256 --reserve 0 --device cuda:0=1331MiB --device cpu=64GiB";
    let (ours, theirs) = ours_and_theirs(&gemma_2_2b(), arguments);
    assert!(count(&ours, "cuda:0") > 2, "{}", count(&ours, "cuda:0"));
    assert_eq!(count(&theirs, "cuda:0"), 0);
}

/// A plan by a map for one GPU of 80 GiB and a host.
fn by_map(map: &Value) -> (Option<i32>, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("map.json");
    fs::write(&file, map.to_string()).unwrap();
    let arguments = format!("--format json --device cuda:0=80GiB --device cpu=64GiB --device-map {}", file.display());
    let output = run_plan(&shapes::llama_8b(), &arguments);
    (output.status.code(), stdout(&output), stderr(&output))
}

#[test]
fn a_prefix_without_a_boundary_takes_blocks_10_to_19_too() {
    let (code, plan, _) = by_map(&json!({"model.layers.1": "cpu", "": 0}));
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert_eq!((code, count(&plan, "cpu"), place(&plan, "model.layers.10")), (Some(0), 1, "cuda:0"));
}

#[test]
fn a_block_that_is_split_loses_what_no_entry_names() {
    let (code, _, error) = by_map(&json!({"": 0, "model.layers.3.self_attn": "cpu"}));
    assert_eq!(code, Some(1));
    assert!(error.contains("splits `model.layers.3`"), "{error}");
}

#[test]
fn what_a_map_leaves_out_silently_goes_to_the_cpu() {
    let (code, _, error) = by_map(&json!({"model": 0}));
    assert_eq!(code, Some(1));
    assert!(error.contains("lm_head"), "{error}");
}

#[test]
fn a_budget_above_what_is_free_is_taken_at_its_word() {
    let plan = plan(&shapes::llama_8b(), "--device cuda:0=8GiB --max-memory cuda:0=100GiB");
    assert_eq!(
        (&plan["fits"], &plan["devices"][0]["budget"]),
        (&Value::Bool(false), &((8u64 << 30) - (512 << 20)).into())
    );
}

#[test]
fn fused_experts_stay_unquantized() {
    let mixtral = published::all().into_iter().find(|model| model.name == "Mixtral-8x7B-v0.1").unwrap().config;
    let arguments = "--quantize int4 --device cuda:0=48GiB --device cpu=128GiB";
    let (ours, theirs) = ours_and_theirs(&mixtral, arguments);
    assert_eq!(count(&ours, "cpu"), 0);
    let weights: u64 = ours["modules"].as_array().unwrap().iter().map(|m| m["weights"].as_u64().unwrap()).sum();
    assert!(weights < 24 << 30, "{weights}");
    assert!(count(&theirs, "cpu") > 10);
}
