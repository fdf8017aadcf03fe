//! Tokens a second of several sequences at once, beside one alone.
//!
//! `cargo bench --bench batch` measures a synthetic 1B in int4, which it leaves in `target/synthetic-1b`;
//! `cargo bench --bench batch -- 4` with so many threads. `cargo test --bench batch` runs everything once on small
//! shapes.
#![expect(clippy::print_stdout, reason = "a report")]

#[path = "support/synthetic.rs"]
mod synthetic;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use evenkeel::checkpoint::Checkpoint;
use evenkeel::engine::{EngineState, Sequence};
use evenkeel::loader::{LoadOptions, Model};
use evenkeel::machine::Inventory;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::pool::Pool;
use evenkeel::{Bytes, Sampling, Scheme};
use synthetic::Shape;

/// Sequences at once.
const BATCHES: [usize; 5] = [1, 2, 4, 8, 16];
/// Prompts of mixed lengths, in half the room that all of them together could want.
const MIXED: usize = 64;

fn main() {
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let threads = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(2);
    let (shape, rounds, new) = if is_bench { ("1b", 3, 24) } else { ("tiny", 1, 4) };
    let shape = Shape::named(shape).expect("a known shape");
    let context = 256;
    let load = |batch: usize, share: f64| {
        let checkpoint = Checkpoint::open(shape.checkpoint()).expect("a checkpoint");
        let inventory = Inventory::described("cpu=1TiB").expect("devices");
        let options = |kv_memory| PlanOptions {
            quantize: Scheme::Int4.into(),
            context: Some(context),
            batch: Some(batch),
            kv_memory,
            ..PlanOptions::default()
        };
        let whole = Plan::new(&checkpoint, &inventory, options(None)).expect("a plan");
        let kept: u64 = whole.modules.iter().map(|module| module.kv_cache.0).sum();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of it")]
        let room = Bytes((kept as f64 * share) as u64);
        let plan = Plan::new(&checkpoint, &inventory, options(Some(room))).expect("a plan");
        let pool = Pool::new(NonZeroUsize::new(threads).expect("a thread"));
        plan.load(LoadOptions { pool: Arc::new(pool), ..LoadOptions::default() }, |_| ()).expect("a model")
    };

    let most = BATCHES.into_iter().max().unwrap_or(1);
    let mut model = load(most, 1.0);
    println!("{} int4, {threads} threads, {new} tokens behind prompts of 16; medians of {rounds} rounds", shape.name);
    let mut rates: Vec<Vec<f64>> = BATCHES.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (batch, rates) in BATCHES.into_iter().zip(&mut rates) {
            rates.push(decode(&mut model, &shape, batch, new));
        }
    }
    let one = rates[0].clone();
    for (batch, rates) in BATCHES.into_iter().zip(&rates) {
        let ratios = rates.iter().zip(&one).map(|(rate, one)| rate / one).collect();
        println!("{batch:>3} sequences  {:8.1} tok/s  {:5.2} × one", median(rates.clone()), median(ratios));
    }

    drop(model);
    let mut model = load(MIXED, 0.5);
    let begun = Instant::now();
    let (tokens, state) = mixed(&mut model, &shape, context, if is_bench { 32 } else { 3 });
    println!(
        "{MIXED} prompts of 1 to {} tokens in half the room: {tokens} new tokens, {:.1} tok/s with prompts, {} preemptions",
        context / 2,
        tokens as f64 / begun.elapsed().as_secs_f64(),
        state.preemptions,
    );
    assert_eq!((state.pages_used, state.running, state.waiting), (0, 0, 0), "all pages are back");
}

/// Tokens a second of so many sequences, once each has its first.
fn decode(model: &mut Model, shape: &Shape, batch: usize, new: usize) -> f64 {
    let core = model.core();
    core.clear().expect("a device that works");
    for at in 0..batch {
        let prompt: Vec<u32> = shape.tokens(16 + at).split_off(at);
        core.add(Sequence::new(&prompt, new + 1, &Sampling::greedy())).expect("a prompt");
    }
    let mut begun = 0;
    while begun < batch {
        begun += core.step().expect("a step").len();
    }
    let (mut tokens, start) = (0, Instant::now());
    while core.state().running == batch {
        tokens += core.step().expect("a step").len();
    }
    tokens as f64 / start.elapsed().as_secs_f64()
}

/// Runs many prompts of mixed lengths to their ends. How many tokens came.
fn mixed(model: &mut Model, shape: &Shape, context: usize, new: usize) -> (usize, EngineState) {
    let core = model.core();
    let lengths = (0..MIXED).map(|at| 1 + at * 37 % (context / 2));
    for (at, length) in lengths.enumerate() {
        let prompt: Vec<u32> = shape.tokens(length + at).split_off(at);
        core.add(Sequence::new(&prompt, new, &Sampling::greedy())).expect("a prompt");
    }
    let mut tokens = 0;
    while core.state().running + core.state().waiting > 0 {
        tokens += core.step().expect("a step").into_iter().filter(|stepped| stepped.token.is_ok()).count();
    }
    assert_eq!(tokens, MIXED * new, "every sequence comes to its end");
    (tokens, core.state())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
