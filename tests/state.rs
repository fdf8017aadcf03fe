//! What blocks keep of the tokens that they have seen: rings for windows, a place for each sequence.

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
mod support;

use evenkeel::backend::Run;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device_map::DeviceMap;
use evenkeel::footprint::{Extent, State};
use evenkeel::loader::Model;
use evenkeel::machine::Inventory;
use evenkeel::model_config::ModelConfig;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::KvDtype;
use serde_json::{Value, json};
use support::models::{LOGITS, difference, logits, machine, map};
use support::{fixture, load_plan, numbers, roomy};

const WINDOWED: [&str; 3] = ["parity/gemma2", "parity/gemma3", "parity/mistral"];

fn largest(logits: &[f32]) -> f32 {
    logits.iter().map(|logit| logit.abs()).fold(0.0, f32::max)
}

/// What Transformers predicts behind each of 200 tokens, 25 windows long.
fn long(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name).join("expected_long.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn on(device: &str) -> DeviceMap {
    DeviceMap::parse("map.json", format!(r#"{{"": "{device}"}}"#).into_bytes()).unwrap()
}

/// The model of a plan for 256 tokens, and the slots of each of its blocks.
fn windowed(name: &str, chunk: usize, options: PlanOptions, inventory: &Inventory) -> (Model, Vec<usize>) {
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let options = PlanOptions { context: Some(256), chunk: Some(chunk), ..options };
    let plan = Plan::new(&checkpoint, inventory, options).unwrap();
    let slots = plan.modules.iter().filter_map(|module| module.state).map(|State::KeysValues(kv)| kv.slots).collect();
    let model = load_plan(&plan).unwrap();
    for device in &model.report.devices {
        assert_eq!(device.planned, device.measured, "{name}, chunks of {chunk}: {}", device.id);
    }
    (model, slots)
}

#[test]
fn a_ring_gives_what_the_whole_context_gives() {
    for name in WINDOWED {
        let long = long(name);
        let (tokens, likeliest): (Vec<u32>, Vec<u32>) = (numbers(&long["input_ids"]), numbers(&long["likeliest"]));
        let wanted: Vec<f32> = numbers(&long["logits_last"]);
        let mut whole = Vec::new();
        for (chunk, slots) in [(256, 256), (56, 64), (16, 64), (1, 64)] {
            let options = || PlanOptions { kv_cache: Some(KvDtype::F32), ..PlanOptions::default() };
            let (mut model, found) = windowed(name, chunk, options(), &roomy());
            let config = &model.plan.checkpoint().config;
            let expected: Vec<usize> =
                config.layers.iter().map(|layer| if layer.window.is_some() { slots } else { 256 }).collect();
            assert_eq!(found, expected, "{name}, chunks of {chunk}");
            let ours = logits(&mut model, &tokens);
            for (at, (logits, token)) in ours.iter().zip(&likeliest).enumerate() {
                assert!(logits.iter().all(|logit| *logit <= logits[*token as usize]), "{name} {chunk}: token {at}");
            }
            assert!(difference(&ours[199], &wanted) < 2e-3 * largest(&wanted), "{name}, chunks of {chunk}");
            if whole.is_empty() {
                whole = ours;
            } else {
                assert!(ours == whole, "{name}, chunks of {chunk}: other bits");
            }
        }
    }
}

#[test]
fn a_ring_on_a_gpu_gives_what_transformers_gives() {
    let Some((fake, _turn)) = fake_cuda::load("24GiB,8GiB") else { return };
    for (capability, kv_cache, allowed, chunks) in [
        ("8.6", KvDtype::F16, LOGITS, &[16, 1][..]),
        ("7.5", KvDtype::F16, LOGITS, &[16]),
        ("8.6", KvDtype::Int8, 0.1, &[16]),
    ] {
        fake.set("CC", capability);
        for name in WINDOWED {
            let long = long(name);
            let (tokens, wanted): (Vec<u32>, Vec<f32>) = (numbers(&long["input_ids"]), numbers(&long["logits_last"]));
            for chunk in chunks {
                let options =
                    PlanOptions { device_map: Some(on("cuda:0")), kv_cache: Some(kv_cache), ..PlanOptions::default() };
                let (mut model, _) = windowed(name, *chunk, options, &machine());
                let pipeline = model.core().pipeline();
                for (at, piece) in tokens.chunks(*chunk).enumerate() {
                    let pages: Vec<u32> = (0..4).collect();
                    let run =
                        Run { slot: 0, pages: &pages, position: at * chunk, tokens: piece.len(), length: tokens.len() };
                    pipeline.run(piece, &[run]).unwrap();
                }
                let ours = pipeline.logits(&[(tokens.len() - 1) % chunk]).unwrap();
                let difference = difference(ours, &wanted) / largest(&wanted);
                assert!(difference < allowed, "{name}, {kv_cache}, {capability}, chunks of {chunk}: {difference}");
            }
        }
    }
    fake.set("CC", "8.6");
}

/// The logits behind the last tokens of two sequences that begin at different times and go on in the same steps;
/// and the same of each alone.
fn together_and_alone(model: &mut Model, [a, b]: [&[u32]; 2]) -> [Vec<Vec<f32>>; 2] {
    let pipeline = model.core().pipeline();
    let run =
        |slot, position, tokens| Run { slot, pages: &[[0], [1]][slot], position, tokens, length: position + tokens };
    let mut together = Vec::new();
    pipeline.run(&a[..5], &[run(0, 0, 5)]).unwrap();
    let (rest, first) = (a.len() - 5, b.len() - 4);
    pipeline.run(&[&a[5..], &b[..first]].concat(), &[run(0, 5, rest), run(1, 0, first)]).unwrap();
    together.push(pipeline.logits(&[rest - 1]).unwrap().to_vec());
    for at in first..b.len() {
        pipeline.run(&[b[at], a[at]], &[run(1, at, 1), run(0, a.len() + at - first, 1)]).unwrap();
    }
    together.push(pipeline.logits(&[0]).unwrap().to_vec());
    let mut alone = Vec::new();
    for (slot, tokens) in [a, b].into_iter().enumerate() {
        for (at, token) in tokens.iter().enumerate() {
            pipeline.run(&[*token], &[run(1 - slot, at, 1)]).unwrap();
        }
        alone.push(pipeline.logits(&[0]).unwrap().to_vec());
    }
    [together, alone]
}

fn two_sequences(device: &str, inventory: &Inventory, mut check: impl FnMut(&str, &[f32], &[f32])) {
    for name in ["parity/llama", "parity/gemma2", "parity/gpt2", "parity/mixtral"] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let vocabulary = u32::try_from(checkpoint.config.vocab_size).unwrap();
        let text = |factor: u32, count| (1..=count).map(|at| at * factor % vocabulary).collect::<Vec<u32>>();
        let options =
            PlanOptions { device_map: Some(on(device)), context: Some(64), batch: Some(2), ..PlanOptions::default() };
        let mut model = load_plan(&Plan::new(&checkpoint, inventory, options).unwrap()).unwrap();
        let [together, alone] = together_and_alone(&mut model, [&text(7, 30), &text(11, 17)]);
        for (together, alone) in together.iter().zip(&alone) {
            check(name, together, alone);
        }
    }
}

#[test]
fn sequences_of_a_step_do_not_touch_each_other() {
    two_sequences("cpu", &roomy(), |name, together, alone| assert!(together == alone, "{name}"));
}

#[test]
fn sequences_of_a_step_do_not_touch_each_other_on_a_gpu() {
    let Some(_loaded) = fake_cuda::load("24GiB,8GiB") else { return };
    two_sequences("cuda:0", &machine(), |name, together, alone| {
        let difference = difference(together, alone) / largest(alone);
        assert!(difference < LOGITS, "{name}: {difference}");
    });
}

/// The logits behind the last tokens of three sequences in a room for four: their pages are far from each other, their
/// prompts run in one step, chunks of one beside tokens of the others, and then a token of each.
fn three_in_a_room_for_four(name: &str, devices: &[&str], inventory: &Inventory) -> Vec<f32> {
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let device_map = Some(DeviceMap::parse("map.json", map(&checkpoint, devices).into_bytes()).unwrap());
    let options = PlanOptions { device_map, context: Some(120), batch: Some(4), chunk: Some(48), ..Default::default() };
    let mut model = load_plan(&Plan::new(&checkpoint, inventory, options).unwrap()).unwrap();
    let vocabulary = u32::try_from(checkpoint.config.vocab_size).unwrap();
    let pages: Vec<Vec<u32>> = (0..3).map(|slot| (0..2).map(|at| 7 - (at * 4 + slot)).collect()).collect();
    let pipeline = model.core().pipeline();
    let (mut positions, mut logits) = ([0; 3], Vec::new());
    let counts =
        [[20, 8, 20], [30, 0, 9], [1, 1, 40], [40, 1, 1], [1, 30, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]];
    for counts in counts {
        let (mut tokens, mut runs) = (Vec::new(), Vec::new());
        // The last slot comes first.
        for slot in (0..3).rev().filter(|slot| counts[*slot] > 0) {
            let position = positions[slot];
            positions[slot] += counts[slot];
            tokens
                .extend((position..positions[slot]).map(|at| u32::try_from(at * (slot + 3) + 7).unwrap() % vocabulary));
            let (pages, length) = (pages[slot].as_slice(), positions[slot]);
            runs.push(Run { slot: slot + 1, pages, position, tokens: counts[slot], length });
        }
        pipeline.run(&tokens, &runs).unwrap();
        logits.extend_from_slice(pipeline.logits(&[0, tokens.len() - 1]).unwrap());
    }
    logits
}

#[test]
fn pages_may_be_anywhere() {
    let Some(_loaded) = fake_cuda::load("24GiB,8GiB") else { return };
    for name in ["parity/llama", "parity/gemma2", "parity/gpt2", "parity/mixtral"] {
        let exact = three_in_a_room_for_four(name, &["cpu"], &roomy());
        for devices in [&["cuda:0"][..], &["cuda:0", "cuda:1", "cuda:0"]] {
            let ours = three_in_a_room_for_four(name, devices, &machine());
            let difference = difference(&ours, &exact);
            assert!(difference < LOGITS, "{name}, {devices:?}: {difference}");
        }
    }
}

#[test]
fn windows_of_a_large_model_take_a_sixth_of_its_contexts() {
    let config = json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262_208, "max_position_embeddings": 131_072,
        "sliding_window": 1024, "sliding_window_pattern": 6, "query_pre_attn_scalar": 168,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    });
    let config = ModelConfig::parse("config.json", config.to_string().into()).unwrap();
    let extent = Extent::new(131_072, 512, 1);
    let bytes = |layer| State::new(&config, layer, extent, KvDtype::F16).unwrap().bytes().0;
    let windows: u64 = config.layers.iter().map(|layer| bytes(*layer)).sum();
    let whole = 62u64 * 2 * 131_072 * 16 * 128 * 2;
    assert_eq!(windows, 2 * 16 * 128 * 2 * (10 * 131_072 + 52 * (1024 + 512)));
    let share = windows as f64 / whole as f64;
    assert!((0.165..0.175).contains(&share), "{share}");
}

#[test]
fn a_plan_is_read_as_it_was_written() {
    let checkpoint = Checkpoint::open(fixture("parity/gemma3")).unwrap();
    for (inventory, options) in [
        (roomy(), PlanOptions { batch: Some(3), chunk: Some(16), ..PlanOptions::default() }),
        (
            Inventory::described("cuda:0=400MiB@936GB/s,cuda:1=401MiB,cpu=1GiB").unwrap(),
            PlanOptions {
                quantize: evenkeel::Scheme::Int4.into(),
                reserve: Some(evenkeel::Bytes(0)),
                ..Default::default()
            },
        ),
    ] {
        let plan = Plan::new(&checkpoint, &inventory, options).unwrap();
        let json = plan.to_json();
        let read = Plan::from_json("plan.json", &json, |origin| {
            assert_eq!(*origin, checkpoint.origin);
            Checkpoint::open(fixture("parity/gemma3"))
        })
        .unwrap();
        assert_eq!(read.to_json(), json);
        assert_eq!((&read.weights, &read.allocations), (&plan.weights, &plan.allocations));

        let other = |_: &_| Checkpoint::open(fixture("parity/gemma2"));
        assert!(Plan::from_json("plan.json", &json, other).is_err());
        let changed = json.replacen("\"offset\": 0", "\"offset\": 256", 1);
        let error = Plan::from_json("plan.json", &changed, |_| Ok(checkpoint.clone())).unwrap_err();
        assert!(error.to_string().contains("does not list the weights"), "{error}");
        for broken in ["", "{}", "[]", &json[..json.len() / 2]] {
            let error = Plan::from_json("plan.json", broken, |_| Ok(checkpoint.clone())).unwrap_err();
            assert!(error.to_string().contains("`plan.json` is no plan"), "{error}");
        }
    }
}

#[test]
fn a_plan_lists_what_its_devices_take() {
    for (inventory, scheme) in [
        (roomy(), evenkeel::Scheme::None),
        (Inventory::described("cuda:0=2GiB,cuda:1=1GiB,cpu=1GiB,disk=1GiB").unwrap(), evenkeel::Scheme::Int8),
        (Inventory::described("cuda:0=900MiB,cuda:1=800MiB,cpu=620MiB,disk=1GiB").unwrap(), evenkeel::Scheme::Int4),
    ] {
        for name in support::CHECKPOINTS {
            let checkpoint = Checkpoint::open(fixture(name)).unwrap();
            let options = PlanOptions { quantize: scheme.into(), batch: Some(2), ..PlanOptions::default() };
            let plan = Plan::new(&checkpoint, &inventory, options).unwrap();
            for device in plan.devices.iter().filter(|device| device.total().0 > 0) {
                let listed = plan.allocations.iter().filter(|allocation| allocation.device == device.id);
                let listed: evenkeel::Bytes = listed.map(|allocation| allocation.bytes).sum();
                assert_eq!(listed, device.total(), "{name}: {}", device.id);
            }
            for placed in &plan.weights {
                assert!(placed.offset.is_multiple_of(256), "{name}: {}", placed.weight.parameter.tensor());
            }
        }
    }
}
