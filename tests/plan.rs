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
            let fixed = bytes(device, "workspace")
                + bytes(device, "staging")
                + bytes(device, "program")
                + bytes(device, "driver");
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

const SMALL: &str = "--device cuda:0=6GiB@936GB/s --device cuda:1=4GiB@360GB/s";

/// `plan` of Llama-3.1-8B with words that are separated by spaces.
fn plan_8b(words: &str) -> (Option<i32>, Value) {
    plan(&shapes::llama_8b(), 4, &words.split(' ').collect::<Vec<_>>())
}

#[test]
fn every_remedy_is_a_command_that_fits() {
    let directory = tempfile::tempdir().unwrap();
    shapes::write(directory.path(), &shapes::llama_8b(), 4);
    let model = directory.path().to_str().unwrap();
    let map = directory.path().join("map.json");
    std::fs::write(&map, r#"{"": 1}"#).unwrap();
    let map = format!("--quantize int4 --device-map {} {SMALL}", map.to_str().unwrap());
    let ours = directory.path().join("ours.json");
    std::fs::write(&ours, r#"{"quantize": {"": "int4", "model.embed_tokens": "int8", "lm_head": "int8"}, "context": 8192, "device_map": {"": 1}}"#).unwrap();
    let ours = format!("--check {} {SMALL}", ours.to_str().unwrap());
    for (words, expected) in [
        (format!("--context 8192 {SMALL}"), &["int4 weights", "10.0 GiB of host memory", "8.7 GiB more on cuda:1"][..]),
        (
            format!("--quantize int4 --context 49152 {SMALL}"),
            &["an int8 KV cache", "a context of", "GiB of host memory"],
        ),
        (
            format!("--quantize int4 --batch 6 --context 7936 {SMALL}"),
            &["an int8 KV cache", "a context of", "a batch of"],
        ),
        (map, &["automatic placement", "more on cuda:1"]),
        (ours, &["automatic placement and int4 weights", "more on cuda:1"]),
        (
            "--max-context --device cuda:0=5826MiB".to_owned(),
            &["int4 weights and an int8 KV cache and a context of", "host memory", "more on cuda:0"],
        ),
        (format!("--quantize int4 --placement hf-sequential --context 8192 {SMALL}"), &["balanced placement"]),
        (
            "--context 32768 --device cuda:0=7494MiB".to_owned(),
            &["int4 weights and an int8 KV cache", "host memory", "more on cuda:0"],
        ),
        ("--quantize int8 --device cpu=64GiB --max-memory cpu=4GiB".to_owned(), &["a budget of"]),
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        let output = run(&[&["plan", model][..], &words].concat());
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(3), "{words:?}: {text}");
        for remedy in expected {
            assert!(text.contains(remedy), "{words:?}: no `{remedy}` in {text}");
        }
        let commands: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("  evenkeel ")).collect();
        assert!(commands.len() >= expected.len(), "{text}");
        for command in commands {
            let words = shlex::split(command).unwrap();
            let output = run(&words.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(output.status.code(), Some(0), "{command}: {}", stdout(&output));
        }
    }
}

#[test]
fn the_scheme_of_the_most_bits_that_stays_on_the_gpus_is_chosen() {
    for (words, scheme, fitting) in [
        ("--device cuda:0=24GiB", "none", [true, true, true]),
        ("--device cuda:0=12GiB --device cpu=64GiB", "int8", [true, true, true]),
        ("--device cuda:0=12GiB", "int8", [false, true, true]),
        ("--device cuda:0=7GiB --device cpu=64GiB", "int4", [true, true, true]),
        ("--device cuda:0=2GiB", "int4", [false, false, false]),
        ("--device cpu=64GiB", "none", [true, true, true]),
    ] {
        let (code, plan) = plan_8b(&format!("--quantize auto {words}"));
        assert_eq!(plan["quantize"][""], scheme, "{words}");
        let schemes = plan["schemes"].as_array().unwrap();
        let outlined: Vec<_> = schemes.iter().map(|outline| outline["fits"].as_bool().unwrap()).collect();
        assert_eq!((outlined, code == Some(0)), (fitting.to_vec(), fitting[2]), "{words}");
    }
}

#[test]
fn the_largest_that_fits_is_planned() {
    let fits = |words: &str| plan_8b(&format!("--quantize int4 {words} {SMALL}")).0 == Some(0);
    let (code, longest) = plan_8b(&format!("--quantize int4 --max-context {SMALL}"));
    let tokens = longest["context"].as_u64().unwrap();
    assert_eq!((code, tokens > 8192 && tokens < 65_536), (Some(0), true), "{tokens}");
    assert!(fits(&format!("--context {tokens}")) && !fits(&format!("--context {}", tokens + 1)));
    let (code, most) = plan_8b(&format!("--quantize int4 --max-batch {SMALL}"));
    let batch = most["batch"].as_u64().unwrap();
    assert_eq!(code, Some(0));
    assert!(fits(&format!("--batch {batch}")) && !fits(&format!("--batch {}", batch + 1)));
    // No more leaves the GPUs for it, though the host has room.
    let (_, spilled) = plan_8b(&format!("--quantize int4 --max-context {SMALL} --device cpu=512GiB"));
    assert_eq!(spilled["context"], tokens);
    // The model's own limit is the end of it.
    assert_eq!(plan_8b("--max-context --device cuda:0=80GiB").1["context"], 131_072);
    // Where nothing fits, the plan is the usual one.
    let (code, none) = plan_8b("--max-context --device cuda:0=2GiB");
    assert_eq!((code, &none["context"]), (Some(3), &Value::from(4096)));
}

#[test]
fn a_kv_cache_is_counted_by_its_type() {
    for (dtype, bytes) in [("f32", 512), ("f16", 256), ("bf16", 256), ("int8", 128 + 4)] {
        let (_, plan) = plan_8b(&format!("--kv-cache {dtype} --device cpu=64GiB"));
        // 2 × 8 heads × 32 blocks × 4096 tokens.
        assert_eq!(self::bytes(&plan["devices"][0], "kv_cache"), bytes * 2 * 8 * 32 * 4096, "{dtype}");
    }
}

#[test]
fn predictions_follow_the_bandwidths() {
    let speed = |words: &str| plan_8b(words).1["speed"].clone();
    assert_eq!(speed("--quantize int8 --device cuda:0=24GiB"), Value::Null);
    let slow = speed("--quantize int8 --device cuda:0=24GiB@500GB/s");
    let fast = speed("--quantize int8 --device cuda:0=24GiB@1000GB/s");
    let figure = |speed: &Value, when: &str| speed[when].as_f64().unwrap();
    // 7.5 GB of weights at 850 GB/s take 8.8 ms, 32 blocks 0.6 ms.
    assert!((figure(&fast, "at_first") - 105.0).abs() < 2.0, "{fast}");
    assert!((figure(&slow, "at_first") - 54.6).abs() < 1.0, "{slow}");
    assert!(figure(&fast, "at_last") < figure(&fast, "at_first"));
    let refused = run(&["plan", "tests/fixtures/ferris-7m", "--placement", "fastest", "--device", "cuda:0=1GiB"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("needs the bandwidth of cuda:0"), "{}", stderr(&refused));
}

#[test]
fn the_fastest_placement_is_predicted_to_be() {
    let devices = "--device cuda:0=8GiB@360GB/s --device cuda:1=6GiB@936GB/s --device cpu=32GiB@51GB/s";
    let (_, plan) = plan_8b(&format!("--quantize int8 --context 8192 --placement fastest {devices}"));
    let outlines = plan["placements"].as_array().unwrap();
    let speed = |outline: &Value| outline["speed"]["at_last"].as_f64().unwrap();
    assert_eq!((&outlines[0]["placement"], outlines.len()), (&Value::from("fastest"), 7));
    let fitting: Vec<_> = outlines.iter().filter(|outline| outline["fits"] == true).collect();
    assert!(fitting.len() > 2, "{outlines:?}");
    for outline in fitting {
        assert!(speed(outline) <= speed(&outlines[0]) * 1.000_001, "{outline}");
    }
}

#[test]
fn a_token_that_goes_back_and_forth_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let map = directory.path().join("map.json");
    std::fs::write(&map, r#"{"": 0, "model.layers.1": 1, "model.layers.3": 1}"#).unwrap();
    let arguments = ["plan", "tests/fixtures/ferris-7m", "--device", "cuda:0=4GiB", "--device", "cuda:1=4GiB"];
    let text = stdout(&run(&[&arguments[..], &["--device-map", map.to_str().unwrap()]].concat()));
    assert!(text.contains("a token changes its device 4 times on its way"), "{text}");
    let straight = run(&arguments);
    assert!(straight.status.success() && !stdout(&straight).contains("a token changes"), "{}", stderr(&straight));
}

#[test]
fn bars_are_drawn_on_request_and_names_are_escaped() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("<b>&\"x");
    std::fs::create_dir(&model).unwrap();
    shapes::write(&model, &shapes::llama_8b(), 1);
    let arguments = ["plan", model.to_str().unwrap(), "--quantize", "int4", "--device", "cuda:0=8GiB"];
    let plain = stdout(&run(&arguments));
    let colored = stdout(&run(&[&arguments[..], &["--color", "always"]].concat()));
    assert!(plain.contains("cuda:0") && !plain.contains('█') && colored.contains("\x1b[34m███"), "{colored}");
    for format in ["svg", "html"] {
        let picture = stdout(&run(&[&arguments[..], &["--format", format]].concat()));
        assert!(picture.contains("&lt;b&gt;&amp;&quot;x") && !picture.contains("<b>"), "{picture}");
    }
}

#[test]
fn ten_thousand_blocks_are_planned_in_time() {
    let mut config = shapes::llama_8b();
    for (key, value) in [
        ("hidden_size", 64),
        ("intermediate_size", 128),
        ("num_attention_heads", 8),
        ("num_hidden_layers", 10_000),
        ("vocab_size", 1000),
    ] {
        config[key] = value.into();
    }
    let words = "--quantize auto --context 16 --device cuda:0=1392MiB@900GB/s --device cuda:1=1372MiB@900GB/s";
    let begun = std::time::Instant::now();
    let (code, plan) = plan(&config, 8, &words.split(' ').collect::<Vec<_>>());
    let elapsed = begun.elapsed();
    assert_eq!(code, Some(0), "{}", plan["devices"]);
    assert_eq!(plan["schemes"].as_array().unwrap().last().unwrap()["scheme"], "int4");
    assert_eq!(plan["modules"].as_array().unwrap().len(), 10_003);
    // A fifth of it, where the machine does nothing else; it was minutes where every rule was held against every module.
    assert!(elapsed.as_secs() < 60, "{elapsed:?}");
}
