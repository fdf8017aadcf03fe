//! Against what Transformers computes for the same checkpoints.
#![allow(clippy::print_stdout, reason = "the figures are wanted")]

mod support;

use std::sync::atomic::AtomicBool;

use evenkeel::generate::GenerateOptions;
use evenkeel::loader::Model;
use evenkeel::quant::{KvDtype, Scheme};
use serde_json::Value;
use support::{expected, load, load_with, numbers};

const CHECKPOINTS: [&str; 3] = ["parity/llama", "parity/llama31", "parity/llama_bf16"];
/// The largest difference of a logit from Transformers' own.
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
    let cancel = AtomicBool::new(false);
    let generation = model.generate_from(prompt, options, &cancel).unwrap();
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

fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    u32::try_from(best.0).unwrap()
}

fn assert_is_transformers(model: &mut Model, name: &str) {
    for case in Case::all_of(name) {
        assert_eq!(greedy(model, &case.input_ids, case.greedy_ids.len()), case.greedy_ids, "{name}");
        let logits = logits(model, &case.sequence());
        let prompt = difference(&logits[case.input_ids.len() - 1], &case.prompt_logits);
        let last = difference(logits.last().unwrap(), &case.final_logits);
        println!("{name}: logits differ by {prompt:.1e} behind the prompt, by {last:.1e} at the end");
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
        for boundary in 0..=3 {
            let blocks =
                |from: usize, to: usize, device| (from..to).map(move |i| format!(r#""model.layers.{i}": "{device}","#));
            let entries: String = blocks(0, boundary, "cpu").chain(blocks(boundary, 3, "disk")).collect();
            let head = if name == "parity/llama31" { "cpu" } else { "disk" };
            let map =
                format!(r#"{{"model.embed_tokens": "cpu", {entries} "model.norm": "disk", "lm_head": "{head}"}}"#);
            assert_is_transformers(&mut load(name, Scheme::None, Some(&map)), name);
        }
    }
}

#[test]
fn chunks_of_the_prompt_do_not_change_a_bit() {
    for scheme in Scheme::ALL {
        let mut model = load("ferris-7m", scheme, None);
        let tokens = Case::all_of("ferris-7m")[0].sequence();
        let whole = logits(&mut model, &tokens);
        for chunk in [1, 3, 50] {
            model.limit_prefill_chunk(chunk);
            assert_eq!(logits(&mut model, &tokens), whole, "{scheme}, chunks of {chunk}");
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
