//! A whole model on the GPU: how fast it loads, beside the page cache and the link; how fast it runs.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use evenkeel::backend::cuda::{Copying, Gpu};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device_map::DeviceMap;
use evenkeel::generate::{GenerateOptions, GenerateReport};
use evenkeel::loader::{LoadOptions, Model};
use evenkeel::machine::Inventory;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::Scheme;

use super::synthetic::Shape;
use super::table::{Amount, head, median, row, seconds};
use super::{allocate, copy};

/// How often each figure is taken.
const ROUNDS: usize = 3;
/// A slab, and how many threads read, as in the loader.
const SLAB: usize = 2 << 20;
const READERS: usize = 4;

/// Reads a whole file by several threads in slabs. Gives the seconds that it took.
fn read(path: &Path) -> f64 {
    let file = std::fs::File::open(path).expect("the shard");
    let (len, next) = (file.metadata().expect("its size").len(), AtomicU64::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                let mut slab = vec![0; SLAB];
                loop {
                    let at = next.fetch_add(SLAB as u64, Ordering::Relaxed);
                    if file.read_at(&mut slab, at).expect("bytes") == 0 {
                        return;
                    }
                }
            });
        }
    });
    assert!(next.into_inner() >= len);
    start.elapsed().as_secs_f64()
}

/// How fast page-locked memory is copied to the GPU, in bytes a second.
fn link(gpu: &Arc<Gpu>) -> f64 {
    let region = allocate(gpu, SLAB);
    let mut free: Vec<_> = (0..READERS).map(|_| gpu.allocate_pinned(SLAB).expect("host memory")).collect();
    let mut waiting = VecDeque::new();
    let copy = || {
        let first = || waiting.pop_front().map(|copy: Copying| copy.finish().expect("a GPU that works"));
        let slab = free.pop().or_else(first).expect("a slab");
        waiting.push_back(region.write_from(slab, 0..SLAB).expect("a copy"));
    };
    SLAB as f64 / seconds(copy, || gpu.synchronize().expect("a GPU that works"))
}

fn plan(checkpoint: &Checkpoint, shape: &Shape, scheme: Scheme) -> Plan {
    let inventory = Inventory::of_machine(Path::new(".")).expect("this machine");
    let options = PlanOptions {
        quantize: Some(scheme.into()),
        context: Some(shape.prompt + shape.new),
        device_map: Some(DeviceMap::parse("map.json", br#"{"": "cuda:0"}"#.to_vec()).expect("a map")),
        ..PlanOptions::default()
    };
    Plan::new(checkpoint, &inventory, &options).expect("a plan")
}

fn load(plan: &Plan) -> Model {
    plan.load(LoadOptions::default(), |_| ()).expect("a model")
}

fn generate(model: &mut Model, prompt: &[u32], new: usize) -> GenerateReport {
    let options = GenerateOptions { max_new_tokens: Some(new), ignore_eos: true, ..GenerateOptions::default() };
    let mut generation = model.generate_from(prompt, options).expect("a generation");
    generation.by_ref().for_each(|piece| drop(piece.expect("a piece")));
    generation.report()
}

pub fn model(gpu: &Arc<Gpu>, shape: &Shape) {
    let directory = shape.checkpoint();
    let checkpoint = Checkpoint::open(&directory).expect("a checkpoint");
    let shard = directory.join(&checkpoint.shards[0]);
    let size = checkpoint.shard_sizes[0].0 as f64;
    head(&format!("A whole model: {:.2} GB of bf16", size / 1e9));
    let copy = copy(gpu);
    read(&shard);
    let cached = median((0..ROUNDS).map(|_| read(&shard)));
    row(&format!("reading the page cache by {READERS} threads"), cached, Amount::Bytes(size), None);
    let link = link(gpu);
    row("copy from the host", size / link, Amount::Bytes(size), None);
    let slower = link.min(size / cached);
    for scheme in [Scheme::Int4, Scheme::Int8, Scheme::Nl4] {
        let plan = plan(&checkpoint, shape, scheme);
        // The driver compiles the kernels once, and keeps them for later runs.
        drop(load(&plan));
        let warm = median((0..ROUNDS).map(|_| load(&plan).report.seconds));
        row(&format!("{scheme}: load, in the page cache"), warm, Amount::Bytes(size), Some(slower));
        let file = std::fs::File::open(&shard).expect("the shard");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("a file");
        let report = load(&plan).report;
        let what = format!("{scheme}: load, from the disk, {} past the page cache", report.past_cache);
        row(&what, report.seconds, Amount::Bytes(size), None);
        read(&shard);

        let mut model = load(&plan);
        let prompt = shape.tokens(shape.prompt);
        generate(&mut model, &prompt, 1);
        let prefill = median((0..ROUNDS).map(|_| generate(&mut model, &prompt, 1).prefill_seconds));
        row(
            &format!("{scheme}: prefill of {} tokens", prompt.len()),
            prefill,
            Amount::Tokens(prompt.len() as f64),
            None,
        );
        // A token reads one row of the embedding, the first module.
        let weights: u64 = plan.modules.iter().skip(1).map(|module| module.weights.0).sum();
        for prompt in [&prompt[..16], &prompt] {
            let decode = median((0..ROUNDS).map(|_| generate(&mut model, prompt, shape.new).decode_seconds));
            let keys = plan.modules.iter().map(|module| module.kv_cache.0).sum::<u64>() as f64;
            let read = weights as f64 + keys * (prompt.len() + shape.new / 2) as f64 / plan.context as f64;
            let what = format!("{scheme}: decode behind {} tokens", prompt.len());
            row(&what, decode, Amount::Tokens(shape.new as f64 - 1.0), Some(copy / read));
        }
        model.launch_each_kernel();
        let decode = median((0..ROUNDS).map(|_| generate(&mut model, &prompt[..16], shape.new).decode_seconds));
        row(&format!("{scheme}: the first without a graph"), decode, Amount::Tokens(shape.new as f64 - 1.0), None);
    }
}
