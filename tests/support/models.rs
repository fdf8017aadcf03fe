//! Models over GPUs: maps, loads, and whether their logits are those of Transformers.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::print_stdout, reason = "the figures are wanted")]

use std::path::Path;

use evenkeel::Result;
use evenkeel::architecture::ModuleTree;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device_map::DeviceMap;
use evenkeel::footprint::Extent;
use evenkeel::generate::Sampling;
use evenkeel::loader::{LoadOptions, Model};
use evenkeel::machine::Inventory;
use evenkeel::plan::{Plan, PlanOptions, Quantize};
use evenkeel::quant::{QuantizeRules, Scheme};

use super::{expected, fixture, numbers};

/// The largest difference of a logit, as a share of the largest logit.
pub const LOGITS: f32 = 2e-2;

/// A map that puts the modules on these devices in turn, the last one for all that are left.
pub fn map(checkpoint: &Checkpoint, devices: &[&str]) -> String {
    let tree = ModuleTree::new(&checkpoint.config);
    let mut entries: Vec<(&str, &str)> = tree
        .modules
        .iter()
        .enumerate()
        .map(|(at, module)| (module.path.as_str(), *devices.get(at).or(devices.last()).unwrap()))
        .collect();
    if tree.tied {
        let embedding = entries[0].1;
        entries.last_mut().unwrap().1 = embedding;
    }
    let entries: Vec<String> = entries.iter().map(|(path, device)| format!(r#""{path}": "{device}""#)).collect();
    format!("{{{}}}", entries.join(", "))
}

pub fn options(scheme: Scheme, map: &str, context: Option<usize>) -> PlanOptions {
    PlanOptions {
        quantize: Some(Quantize::Rules(QuantizeRules::whole_model(scheme))),
        device_map: Some(DeviceMap::parse("map.json", map.into()).unwrap()),
        context,
        ..PlanOptions::default()
    }
}

pub fn machine() -> Inventory {
    Inventory::of_machine(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

pub fn plan(checkpoint: &Checkpoint, scheme: Scheme, map: &str, context: Option<usize>) -> Plan {
    Plan::new(checkpoint, &machine(), options(scheme, map, context)).unwrap()
}

pub fn load(plan: &Plan, separate_buffers: bool) -> Result<Model> {
    let offload_directory = env!("CARGO_TARGET_TMPDIR").into();
    plan.load(&LoadOptions { offload_directory, separate_buffers, ..LoadOptions::default() }, |_| ())
}

pub fn logits(model: &mut Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    model.score(tokens, |_, logits| all.push(logits.to_vec())).unwrap();
    all
}

pub fn difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Holds the logits of all tokens against others. Where two experts score a token nearly the same,
/// rounding decides between them: with experts, one token may be far off.
#[track_caller]
pub fn assert_all_near(what: &str, ours: &[Vec<f32>], theirs: &[Vec<f32>], experts: bool) -> f32 {
    let pairs = || ours.iter().zip(theirs).filter(|(a, b)| !experts || difference(a, b) < LOGITS);
    assert!(pairs().count() + 1 >= theirs.len(), "{what}");
    pairs().map(|(ours, theirs)| assert_near(what, ours, theirs)).fold(0.0, f32::max)
}

/// Holds logits against others: near, and with the same best wherever that is clear.
#[track_caller]
pub fn assert_near(what: &str, ours: &[f32], theirs: &[f32]) -> f32 {
    let largest = theirs.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
    let difference = difference(ours, theirs);
    assert!(difference < LOGITS, "{what}: {difference}");
    let order = |logits: &[f32]| {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        order
    };
    let best = order(theirs);
    if theirs[best[0]] - theirs[best[1]] > LOGITS * largest {
        assert_eq!(order(ours)[0], best[0], "{what}");
    }
    difference
}

/// Holds a parity checkpoint, with its modules on each of these lists of devices in turn, against
/// what Transformers and the CPU give.
pub fn assert_is_transformers(name: &str, maps: &[&[&str]], separate_buffers: bool) {
    let expected = expected(name);
    let input: Vec<u32> = numbers(&expected["input_ids"]);
    let sequence = [&input[..], &numbers(&expected["greedy_ids"])].concat();
    let exact = logits(&mut super::load(name, Scheme::None, None), &sequence);
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let experts = checkpoint.config.experts.is_some();
    for devices in maps {
        let plan = plan(&checkpoint, Scheme::None, &map(&checkpoint, devices), None);
        let mut model = load(&plan, separate_buffers).unwrap();
        let ours = logits(&mut model, &sequence);
        let what = format!("{name} on {}", devices.join(" "));
        let prompt = assert_near(&what, &ours[input.len() - 1], &numbers::<f32>(&expected["prompt_logits_last"]));
        let last = assert_near(&what, ours.last().unwrap(), &numbers::<f32>(&expected["final_logits_last"]));
        let all = assert_all_near(&what, &ours, &exact, experts);
        println!("{what}: logits differ by {:.1e} of the largest", prompt.max(last).max(all));
        model.limit_prefill_chunk(3);
        assert_all_near(&format!("{what}, in chunks"), &logits(&mut model, &sequence), &exact, experts);
    }
}

/// What there is room for.
pub fn extent_of(plan: &Plan) -> Extent {
    Extent { context: plan.context, chunk: plan.chunk, sequences: plan.batch, pages: plan.pages }
}

/// Settings that a device chooses by: the largest, a draw of all, and one with all bounds.
pub fn samplings() -> [Sampling; 3] {
    let drawn = Sampling { temperature: 0.9, seed: 3, ..Sampling::greedy() };
    let bounds =
        Sampling { top_k: Some(30), top_p: Some(0.95), min_p: Some(0.01), repetition_penalty: 1.2, ..drawn.clone() };
    [Sampling::greedy(), drawn, bounds]
}
