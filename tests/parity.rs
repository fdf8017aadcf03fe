//! Against what Transformers computes for the same checkpoints.
#![allow(clippy::print_stdout, reason = "the figures are wanted")]

mod support;

use evenkeel::architecture::{ModuleKind, ModuleTree};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::generate::GenerateOptions;
use evenkeel::loader::Model;
use evenkeel::plan::{Plan, PlanOptions, Quantize};
use evenkeel::quant::{KvDtype, QuantizeRules, Scheme};
use serde_json::Value;
use support::{CHECKPOINTS, expected, fixture, load, load_plan, load_with, numbers, roomy};

/// The largest difference of a logit from Transformers' own, as a share of the largest one.
const LOGITS: f32 = 2e-3;

/// One of the texts that Transformers continued.
struct Case {
    input_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    prompt_logits: Vec<f32>,
    final_logits: Vec<f32>,
}

impl Case {
    fn of(value: &Value) -> Self {
        Self {
            input_ids: numbers(&value["input_ids"]),
            greedy_ids: numbers(&value["greedy_ids"]),
            prompt_logits: numbers(&value["prompt_logits_last"]),
            final_logits: numbers(&value["final_logits_last"]),
        }
    }

    fn all_of(name: &str) -> Vec<Self> {
        let expected = expected(name);
        match expected["cases"].as_array() {
            Some(cases) => cases.iter().map(Self::of).collect(),
            None => vec![Self::of(&expected)],
        }
    }

    fn sequence(&self) -> Vec<u32> {
        [&self.input_ids[..], &self.greedy_ids].concat()
    }
}

fn greedy(model: &mut Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens: Some(count), ignore_eos: true, ..GenerateOptions::default() };
    let generation = model.generate_from(prompt, options).unwrap();
    generation.filter_map(|piece| piece.unwrap().token).collect()
}

/// The logits behind each token.
fn logits(model: &mut Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    model.score(tokens, |_, logits| all.push(logits.to_vec())).unwrap();
    all
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().map(|logit| logit.abs()).fold(0.0, f32::max)
}

fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    u32::try_from(best.0).unwrap()
}

fn assert_is_transformers(model: &mut Model, name: &str) {
    for case in Case::all_of(name) {
        assert_eq!(greedy(model, &case.input_ids, case.greedy_ids.len()), case.greedy_ids, "{name}");
        let logits = logits(model, &case.sequence());
        let share = |ours: &[f32], theirs: &[f32]| difference(ours, theirs) / largest(theirs);
        let prompt = share(&logits[case.input_ids.len() - 1], &case.prompt_logits);
        let last = share(logits.last().unwrap(), &case.final_logits);
        println!("{name}: logits differ by {prompt:.1e} of the largest behind the prompt, by {last:.1e} at the end");
        assert!(prompt < LOGITS && last < LOGITS, "{name}: {prompt} {last}");
    }
}

#[test]
fn unquantized_ferris_is_transformers() {
    assert_is_transformers(&mut load("ferris-7m", Scheme::None, None), "ferris-7m");
}

#[test]
fn unquantized_parity_checkpoints_are_transformers() {
    for name in CHECKPOINTS {
        assert_is_transformers(&mut load(name, Scheme::None, None), name);
    }
}

#[test]
fn split_at_every_block_boundary_is_transformers() {
    for name in CHECKPOINTS {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let tree = ModuleTree::new(&checkpoint.config);
        let first = tree.modules.iter().position(|module| matches!(module.kind, ModuleKind::Block(_))).unwrap();
        for boundary in first..=first + checkpoint.config.num_hidden_layers {
            let device = |at: usize| if at < boundary { "cpu" } else { "disk" };
            // A tied head is where the embedding is.
            let last = tree.modules.len() - usize::from(tree.tied);
            let entries: Vec<String> = tree.modules[..last]
                .iter()
                .enumerate()
                .map(|(at, module)| format!(r#""{}": "{}""#, module.path, device(at)))
                .collect();
            let map = format!("{{{}}}", entries.join(", "));
            assert_is_transformers(&mut load(name, Scheme::None, Some(&map)), name);
        }
    }
}

/// The distance of two vectors as a share of the first one's length.
fn distance(exact: &[f32], other: &[f32]) -> f32 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>();
    (squares(&mut exact.iter().zip(other).map(|(a, b)| a - b)) / squares(&mut exact.iter().copied())).sqrt()
}

/// The median over all tokens: in models as small as these, single tokens are further off.
#[test]
fn int8_logits_are_near_the_unquantized_ones() {
    for name in CHECKPOINTS {
        let tokens = Case::all_of(name)[0].sequence();
        let all = |scheme| logits(&mut load(name, scheme, None), &tokens);
        let (exact, int8) = (all(Scheme::None), all(Scheme::Int8));
        let mut distances: Vec<f32> = exact.iter().zip(&int8).map(|(exact, int8)| distance(exact, int8)).collect();
        distances.sort_by(f32::total_cmp);
        let (median, largest) = (distances[distances.len() / 2], distances[distances.len() - 1]);
        println!("{name}: int8 logits are {median:.4} of their length away, at most {largest:.4}");
        // Rounding sends some tokens to other experts, and all later ones see those.
        let bound = if *name == "parity/mixtral" { 0.1 } else { 0.05 };
        assert!(median <= bound, "{name}: {median}");
    }
}

/// Nothing is rounded before the experts of the last block are chosen.
#[test]
fn experts_in_int8_are_near_the_unquantized_ones() {
    for (name, experts) in [
        ("parity/mixtral", "model.layers.2.block_sparse_moe.experts"),
        ("parity/qwen3_moe", "model.layers.2.mlp.experts"),
    ] {
        let tokens = Case::all_of(name)[0].sequence();
        let exact = logits(&mut load(name, Scheme::None, None), &tokens);
        let rules = QuantizeRules::new(vec![(experts.to_owned(), Scheme::Int8)]);
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let options = PlanOptions {
            quantize: Some(Quantize::Rules(rules)),
            kv_cache: Some(KvDtype::F32),
            ..PlanOptions::default()
        };
        let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
        let int8 = logits(&mut load_plan(&plan).unwrap(), &tokens);
        let largest = exact.iter().zip(&int8).map(|(exact, int8)| distance(exact, int8)).fold(0.0, f32::max);
        println!("{name}: logits with int8 experts are at most {largest:.4} of their length away");
        assert!(largest > 0.0 && largest <= 0.02, "{name}: {largest}");
    }
}

#[test]
fn chunks_of_the_prompt_do_not_change_a_bit() {
    for name in ["ferris-7m", "parity/gemma3", "parity/gpt2", "parity/mixtral", "parity/phi3", "parity/qwen3_moe"] {
        for scheme in Scheme::ALL {
            let mut model = load(name, scheme, None);
            let tokens = Case::all_of(name)[0].sequence();
            let whole = logits(&mut model, &tokens);
            for chunk in [1, 3, 50] {
                model.limit_prefill_chunk(chunk);
                assert_eq!(logits(&mut model, &tokens), whole, "{name}, {scheme}, chunks of {chunk}");
            }
        }
    }
}

/// The share of Transformers' greedy tokens that are predicted from Transformers' own prefix.
fn agreement(scheme: Scheme, kv_cache: KvDtype) -> f64 {
    let mut model = load_with("ferris-7m", scheme, None, kv_cache);
    let (mut agreed, mut total) = (0, 0);
    for case in Case::all_of("ferris-7m") {
        let logits = logits(&mut model, &case.sequence());
        let predicted = logits[case.input_ids.len() - 1..].iter().map(|logits| best(logits));
        agreed += predicted.zip(&case.greedy_ids).filter(|(ours, theirs)| ours == *theirs).count();
        total += case.greedy_ids.len();
    }
    let share = agreed as f64 / total as f64;
    println!("{scheme}, KV cache {kv_cache}: {agreed} of {total} greedy tokens agree ({:.1} %)", share * 100.0);
    share
}

#[test]
fn int8_agrees_with_97_in_100_tokens() {
    assert!(agreement(Scheme::Int8, KvDtype::default()) >= 0.97);
}

#[test]
fn int4_agrees_with_88_in_100_tokens() {
    assert!(agreement(Scheme::Int4, KvDtype::default()) >= 0.88);
}

#[test]
fn smaller_kv_caches_agree_with_98_in_100_tokens() {
    for kv_cache in [KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
        assert!(agreement(Scheme::None, kv_cache) >= 0.98, "{kv_cache}");
    }
}

#[test]
fn moving_blocks_between_memory_and_disk_changes_no_token() {
    for scheme in Scheme::ALL {
        let prompt = &Case::all_of("ferris-7m")[1].input_ids;
        let here = greedy(&mut load("ferris-7m", scheme, None), prompt, 30);
        for map in [
            r#"{"": "disk"}"#,
            r#"{"": "cpu", "model.layers.3": "disk", "model.layers.7": "disk"}"#,
            r#"{"": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}"#,
        ] {
            assert_eq!(greedy(&mut load("ferris-7m", scheme, Some(map)), prompt, 30), here, "{scheme} {map}");
        }
    }
}
