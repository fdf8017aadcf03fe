//! How near the CPU stage comes to the memory's bandwidth: this machine's, measured in the same
//! run; products of one token and of many; and a whole model of a billion weights.
//!
//! `cargo bench --bench cpu [-- FILTER]`. The model, 2.4 GB of random weights, is made once in
//! `target/synthetic-1b`; `evenkeel generate target/synthetic-1b` runs it too. `cargo test --bench cpu`
//! runs everything once, on a tiny model.

#[path = "support/synthetic.rs"]
mod synthetic;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use evenkeel::backend::cpu::{Affine, GROUP_WORDS, matmul};
use evenkeel::backend::{Choice, Chooser, Draws};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::generate::GenerateOptions;
use evenkeel::loader::{LoadOptions, Model};
use evenkeel::machine::Inventory;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::pool::Pool;
use evenkeel::quant::{GROUP_SIZE, Matrix, MatrixLayout, Scheme, Storage, WeightDtype};
use synthetic::{SHAPES, Shape};

/// Bytes that are read to measure the bandwidth: far more than caches hold.
const MEMORY: usize = 1 << 30;
const STORAGES: [(&str, Storage); 4] = [
    ("int8", Storage::Int8),
    ("int4", Storage::Int4),
    ("nl4", Storage::Nl4),
    ("bf16", Storage::Plain(WeightDtype::Bf16)),
];

/// Whether nothing is measured; criterion asks the same.
fn is_test() -> bool {
    let has = |name: &str| std::env::args().any(|argument| argument == name);
    has("--test") || !has("--bench")
}

/// The fastest of several reads of memory by all threads, in bytes a second.
fn bandwidth(pool: &Pool) -> f64 {
    const PIECE: usize = 1 << 17;
    let memory = vec![1u64; if is_test() { PIECE } else { MEMORY / 8 }];
    let mut sums = vec![0u64; memory.len() / PIECE];
    let mut fastest = Duration::MAX;
    for _ in 0..8 {
        let start = Instant::now();
        pool.chunks(&mut sums, 1, |at, sum| {
            sum[0] = memory[at * PIECE..][..PIECE].iter().fold(0, |sum, word| sum.wrapping_add(*word));
        });
        fastest = fastest.min(start.elapsed());
        black_box(&sums);
    }
    MEMORY as f64 / fastest.as_secs_f64()
}

/// Times one product with each of several matrices in turn, so many that caches do not hold them.
fn product(
    group: &mut BenchmarkGroup<WallTime>,
    pool: &Pool,
    name: &str,
    storage: Storage,
    (rows, cols): (usize, usize),
    tokens: usize,
) -> f64 {
    let layout = MatrixLayout::new(storage, rows, cols).expect("a layout");
    let size = layout.size().as_usize().expect("a size");
    let count = if is_test() { 1 } else { ((256 << 20) / size).max(1) };
    // Bytes of 0x38 are small numbers as codes, as scales in f16 and f32, and as bf16.
    let bytes = vec![0x38u8; count * size];
    let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut words = vec![0.0; tokens * cols.div_ceil(GROUP_SIZE) * GROUP_WORDS];
    let mut y = vec![0.0; tokens * rows];
    let (mut at, mut seconds, mut runs) = (0, 0.0, 0u32);
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let start = Instant::now();
            for _ in 0..iterations {
                at = (at + 1) % count;
                let affine = Affine::new(Matrix::new(&layout, &bytes[at * size..]), None);
                matmul(pool, black_box(&x), &mut words, [(&affine, &mut y[..])]);
            }
            let elapsed = start.elapsed();
            seconds += elapsed.as_secs_f64();
            runs += u32::try_from(iterations).unwrap_or(u32::MAX);
            elapsed
        });
    });
    size as f64 * f64::from(runs) / seconds
}

#[allow(clippy::print_stdout, reason = "shares are what this is for")]
fn products(criterion: &mut Criterion) {
    let pool = Pool::default();
    let bandwidth = bandwidth(&pool);
    println!("{} threads read memory at {:.1} GB/s", pool.threads(), bandwidth / 1e9);
    let mut group = criterion.benchmark_group("one token");
    for (rows, cols) in [(2048, 8192), (8192, 2048)] {
        for (name, storage) in STORAGES {
            let layout = MatrixLayout::new(storage, rows, cols).expect("a layout");
            group.throughput(Throughput::Bytes(layout.size().0));
            let rate = product(&mut group, &pool, &format!("{name} {rows}×{cols}"), storage, (rows, cols), 1);
            println!(
                "{name} {rows}×{cols}: {:.1} GB/s, {:.0} % of the bandwidth",
                rate / 1e9,
                100.0 * rate / bandwidth
            );
        }
    }
    group.finish();
    let mut group = criterion.benchmark_group("512 tokens");
    group.sample_size(10);
    for (rows, cols) in [(2048, 8192), (8192, 2048)] {
        for (name, storage) in STORAGES {
            // Operations: a product and a sum for each weight and token.
            group.throughput(Throughput::Elements(2 * (rows * cols * 512) as u64));
            product(&mut group, &pool, &format!("{name} {rows}×{cols}"), storage, (rows, cols), 512);
        }
    }
    group.finish();
}

fn load(checkpoint: &Checkpoint, shape: &Shape, scheme: Scheme) -> Model {
    let directory = std::path::Path::new("target");
    let inventory = Inventory::of_machine(directory).expect("this machine");
    let map = evenkeel::device_map::DeviceMap::parse("map.json", br#"{"": "cpu"}"#.to_vec()).expect("a map");
    let options = PlanOptions {
        quantize: Some(scheme.into()),
        context: Some(shape.prompt + shape.new),
        device_map: Some(map),
        ..PlanOptions::default()
    };
    let plan = Plan::new(checkpoint, &inventory, &options).expect("a plan");
    plan.load(LoadOptions::default(), |_| ()).expect("a model")
}

#[allow(clippy::print_stdout, reason = "shares are what this is for")]
fn model(criterion: &mut Criterion) {
    let shape = if is_test() { SHAPES[2] } else { SHAPES[1] };
    let checkpoint = Checkpoint::open(shape.checkpoint()).expect("a checkpoint");
    let bandwidth = bandwidth(&Pool::default());
    let prompt = shape.tokens(shape.prompt);
    for scheme in [Scheme::Int8, Scheme::Int4, Scheme::Nl4, Scheme::None] {
        // Loaded by the first of those that are not filtered out.
        let mut loaded = None;
        let mut run = |new: usize| {
            let model = loaded.get_or_insert_with(|| load(&checkpoint, &shape, scheme));
            let options = GenerateOptions { max_new_tokens: Some(new), ignore_eos: true, ..GenerateOptions::default() };
            let mut generation = model.generate_from(&prompt, options).expect("a generation");
            generation.by_ref().for_each(|piece| drop(piece.expect("a piece")));
            generation.report()
        };
        let mut group = criterion.benchmark_group(scheme.name());
        group.sample_size(10);
        group.throughput(Throughput::Elements(shape.prompt as u64));
        group.bench_function("prefill", |bencher| {
            bencher.iter_custom(|times| (0..times).map(|_| Duration::from_secs_f64(run(1).prefill_seconds)).sum());
        });
        group.throughput(Throughput::Elements(shape.new as u64 - 1));
        let mut fastest = f64::INFINITY;
        group.bench_function("decode", |bencher| {
            bencher.iter_custom(|times| {
                let once = |_| {
                    let seconds = run(shape.new).decode_seconds;
                    fastest = fastest.min(seconds);
                    Duration::from_secs_f64(seconds)
                };
                (0..times).map(once).sum()
            });
        });
        group.finish();
        let Some(model) = loaded else { continue };
        let weights: u64 = model.plan.devices.iter().map(|device| device.weights.0).sum();
        // A token reads one row of the embedding.
        let element = if scheme == Scheme::None { 2 } else { 1 };
        let read = weights - (shape.vocabulary * shape.hidden * element) as u64;
        let rate = read as f64 * (shape.new as f64 - 1.0) / fastest;
        println!("{scheme}: loaded {} in {:.2} s", model.report.read, model.report.seconds);
        println!("{scheme}: decode reads {:.1} GB/s, {:.0} % of the bandwidth", rate / 1e9, 100.0 * rate / bandwidth);
    }
}

/// The choice of a token of a large vocabulary, among logits that are spread as a model's.
fn choosing(criterion: &mut Criterion) {
    let count = if is_test() { 1000 } else { 262_144 };
    let mut random = Draws::new(7);
    // As a model's: a bulk, and a few that are far above it.
    let mut logit = |at: u32| random.draw() as f32 / 4e8 + if at.is_multiple_of(4001) { 12.0 } else { 0.0 };
    let logits: Vec<f32> = (0..count).map(&mut logit).collect();
    let mut scratch = logits.clone();
    let warm = Choice { temperature: 0.8, ..Choice::GREEDY };
    let mut group = criterion.benchmark_group("choose");
    group.throughput(Throughput::Elements(logits.len() as u64));
    for (name, choice) in [
        ("greedy", Choice::GREEDY),
        ("temperature", warm),
        ("top-p", Choice { top_p: 0.95, ..warm }),
        ("top-k", Choice { top_k: 64, ..warm }),
    ] {
        let mut chooser = Chooser::new(choice, &[]);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                scratch.copy_from_slice(&logits);
                chooser.choose(black_box(&mut scratch), random.draw())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, products, choosing, model);
criterion_main!(benches);
