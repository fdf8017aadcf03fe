//! How fast the first GPU is, beside what its memory gives in the same run: products, quantizing,
//! attention, the choice of a token, a step, and a whole model: load, prefill, decode by a graph and by launches;
//! and what its driver takes of memory and time.
//!
//! `cargo bench --bench gpu [-- PART... SHAPE]` prints a page for benches/results. The parts are `driver`, `products`,
//! `quantize`, `attention`, `choice`, `step`, `late` and `model`, and all without any; the shapes are those of
//! support/synthetic.rs, `8b` unless another is named. `model` writes the checkpoint to `target/` once.
//! Without a GPU nothing is measured, and `cargo test --bench gpu` fails.
#![allow(clippy::print_stdout, reason = "a page is what this is for")]

#[path = "support/gpu_driver.rs"]
mod gpu_driver;
#[path = "support/gpu_model.rs"]
mod gpu_model;
#[path = "support/synthetic.rs"]
mod synthetic;
#[path = "support/table.rs"]
mod table;

use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use evenkeel::backend::Choice;
use evenkeel::backend::cuda::{
    Affine, Attention, Cache, Choosing, DeviceMatrix, Gpu, Input, Installation, Output, Region, Rows, Scratch, uuids,
};
use evenkeel::bytes::Bytes;
use evenkeel::footprint::{CUDA_FEW_BLOCKS, CUDA_FEW_PARTS, CudaAttention, CudaChoice, Extent, KvLayout};
use evenkeel::model_config::Activation;
use evenkeel::quant::{KvDtype, MatrixLayout, Storage, WeightDtype};
use evenkeel::verify::{Room, run};
use synthetic::Shape;
use table::{Amount, head, row, seconds};

type Part = (&'static str, fn(&Bench));

/// Comes first, before this process has opened the GPU.
const DRIVER: &str = "driver";
const PARTS: [Part; 7] = [
    ("products", products),
    ("quantize", quantize),
    ("attention", attention),
    ("choice", choice),
    ("step", |bench| step(bench, "")),
    ("late", late),
    ("model", |bench| gpu_model::model(&bench.gpu, &bench.shape)),
];
const STORAGES: [(&str, Storage); 4] = [
    ("bf16", Storage::Plain(WeightDtype::Bf16)),
    ("int8", Storage::Int8),
    ("int4", Storage::Int4),
    ("nl4", Storage::Nl4),
];
/// The last compute capability whose kernels do without tensor cores.
const PLAIN: (i32, i32) = (7, 5);
/// The last compute capability whose kernels begin when those before them have ended.
const LATE: (i32, i32) = (8, 9);
/// Bytes of 0x38 are small numbers as codes, as scales, in f16 and in bf16.
const SMALL: u32 = 0x3838_3838;

/// The GPU, and the shapes of the model that its kernels work for.
struct Bench {
    gpu: Arc<Gpu>,
    shape: Shape,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let (shapes, parts): (Vec<_>, Vec<_>) = arguments.iter().partition(|name| Shape::named(name).is_some());
    for part in &parts {
        assert!(*part == DRIVER || PARTS.iter().any(|(name, _)| name == part), "`{part}` is no part and no shape");
    }
    let is_wanted = |name: &str| parts.is_empty() || parts.iter().any(|part| *part == name);
    if uuids().is_empty() {
        assert!(std::env::args().any(|argument| argument == "--bench"), "no GPU");
        return println!("nothing to measure: no GPU");
    }
    let shape = shapes.last().map_or("8b", |name| name.as_str());
    describe(shape, &arguments);
    if is_wanted(DRIVER) {
        gpu_driver::driver();
    }
    let gpu = Gpu::open(0).expect("a GPU that works");
    let bench = Bench { gpu, shape: Shape::named(shape).expect("a known shape") };
    for (_, run) in PARTS.iter().filter(|(name, _)| is_wanted(name)) {
        run(&bench);
    }
}

/// What is measured, on what, and by which command.
fn describe(shape: &str, arguments: &[String]) {
    let installed = Installation::find().expect("a driver that works").expect("a driver");
    let gpu = &installed.gpus[0];
    let output = |command: &str, arguments: &[&str]| {
        let output = Command::new(command).args(arguments).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let driver = output("nvidia-smi", &["--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]);
    let commit = output("git", &["describe", "--always", "--dirty"]);
    let unknown = || "unknown".to_owned();
    println!("# {}", gpu.device.name.clone().unwrap_or_else(unknown));
    println!();
    println!(
        "Compute capability {}.{}, {}; driver {}, CUDA {}.{}; evenkeel {} at {}; {} threads.",
        gpu.capability.0,
        gpu.capability.1,
        gpu.device.total,
        driver.unwrap_or_else(unknown),
        installed.version.0,
        installed.version.1,
        env!("CARGO_PKG_VERSION"),
        commit.unwrap_or_else(unknown),
        std::thread::available_parallelism().map_or(1, usize::from)
    );
    println!();
    println!(
        "`cargo bench --bench gpu -- {}`: shapes of a Llama `{shape}`; medians; limits are measured in the same run.",
        arguments.join(" ")
    );
}

/// How fast the GPU copies within its memory, in bytes that are read or written a second.
fn copy(gpu: &Arc<Gpu>) -> f64 {
    const SIZE: usize = 256 << 20;
    let [from, to] = [(); 2].map(|()| allocate(gpu, SIZE));
    let once = |_| {
        from.clear().and_then(|()| gpu.synchronize()).expect("a GPU that works");
        let start = Instant::now();
        to.copy_from(&from).and_then(|()| gpu.synchronize()).expect("a GPU that works");
        start.elapsed().as_secs_f64()
    };
    let measured = 2.0 * SIZE as f64 / (0..4).map(once).fold(f64::INFINITY, f64::min);
    println!("| copy within the GPU | | {:.1} GB/s | | |", measured / 1e9);
    measured
}

fn allocate(gpu: &Arc<Gpu>, len: usize) -> Region {
    let len = len.next_multiple_of(size_of::<u32>());
    gpu.allocate("a benchmark", Bytes(len as u64)).expect("memory")
}

fn small(gpu: &Arc<Gpu>, len: usize) -> Region {
    let region = allocate(gpu, len);
    region.fill(SMALL).expect("a GPU that works");
    region
}

fn tokens_of(count: usize) -> String {
    if count == 1 { "1 token".to_owned() } else { format!("{count} tokens") }
}

/// For products, and for the attention of `tokens`.
fn scratch(gpu: &Arc<Gpu>, shape: &Shape, tokens: usize, context: usize) -> Scratch {
    let head_dim = shape.hidden / shape.heads;
    let [parts, arrivals] = CudaAttention::scratch(shape.heads, shape.kv_heads, head_dim, tokens, context);
    let parts = allocate(gpu, parts.max(CUDA_FEW_BLOCKS * CUDA_FEW_PARTS * 4));
    let arrivals = allocate(gpu, arrivals.max(CUDA_FEW_BLOCKS * 4));
    arrivals.clear().expect("a GPU that works");
    Scratch { parts, arrivals }
}

fn matrix(gpu: &Arc<Gpu>, storage: Storage, rows: usize, cols: usize) -> Affine {
    let layout = MatrixLayout::new(storage, rows, cols).expect("a size");
    let size = layout.size().as_usize().expect("a size");
    Affine::new(DeviceMatrix::new(layout, small(gpu, size)), None)
}

fn bytes<'a>(matrices: impl IntoIterator<Item = &'a Affine>) -> f64 {
    matrices.into_iter().map(|matrix| matrix.weight.as_ref().size().0 as f64).sum()
}

/// So many matrices in turn that no cache holds them.
fn rotated(gpu: &Arc<Gpu>, shape: &Shape, storage: Storage, rows: usize, cols: usize) -> Vec<Affine> {
    let size = MatrixLayout::new(storage, rows, cols).expect("a size").size().as_usize().expect("a size");
    let count = (8 * shape.hidden * shape.feed_forward / size).max(1);
    (0..count).map(|_| matrix(gpu, storage, rows, cols)).collect()
}

/// Each product with one token, with eight, with a chunk of a prompt and with all of it, by tensor cores and
/// without.
fn products(Bench { gpu, shape }: &Bench) {
    head("Products");
    let copy = copy(gpu);
    let plain = Gpu::open_as(0, PLAIN).expect("the same GPU");
    for (name, storage) in STORAGES {
        for (rows, cols) in
            [(shape.hidden, shape.hidden), (shape.feed_forward, shape.hidden), (shape.hidden, shape.feed_forward)]
        {
            for (gpu, which) in [(gpu, ""), (&plain, ", without tensor cores")] {
                let matrices = rotated(gpu, shape, storage, rows, cols);
                let scratch = scratch(gpu, shape, 1, 1);
                let mut counts = vec![1, 8, shape.prompt.min(512), shape.prompt];
                counts.dedup();
                for tokens in counts {
                    let (x, y) = (small(gpu, tokens * cols * 2), allocate(gpu, tokens * rows * 2));
                    let mut at = 0;
                    let seconds = seconds(
                        || {
                            at = (at + 1) % matrices.len();
                            let y = (&y, Output::F16, 1.0);
                            gpu.matmul(&matrices[at], Input::Half(&x), tokens, y, &scratch).expect("a launch");
                        },
                        || gpu.synchronize().expect("a GPU that works"),
                    );
                    let what = format!("{name} {rows}×{cols}, {}{which}", tokens_of(tokens));
                    if tokens > 8 {
                        row(&what, seconds, Amount::Operations((2 * tokens * rows * cols) as f64), None);
                    } else {
                        row(&what, seconds, Amount::Bytes(bytes(&matrices[..1])), Some(copy));
                    }
                }
            }
        }
    }
}

/// From bf16, whose bytes and those of the result are counted.
fn quantize(Bench { gpu, shape }: &Bench) {
    head("Quantizing");
    let copy = copy(gpu);
    let (rows, cols) = (shape.feed_forward, shape.hidden);
    let (weights, failed) = (small(gpu, rows * cols * 2), small(gpu, 4));
    for (name, storage) in &STORAGES[1..] {
        let matrix = matrix(gpu, *storage, rows, cols);
        let seconds = seconds(
            || gpu.quantize(&matrix.weight, 0, rows, WeightDtype::Bf16, &weights, &failed).expect("a launch"),
            || gpu.synchronize().expect("a GPU that works"),
        );
        let moved = (rows * cols * 2) as f64 + bytes([&matrix]);
        row(&format!("bf16 to {name}, {rows}×{cols}"), seconds, Amount::Bytes(moved), Some(copy));
    }
}

/// A block's attention for the last `tokens` of a context, and what it needs.
struct Attending {
    shape: Attention,
    cache: Cache,
    rows: Rows,
    query: Region,
    out: Region,
    bytes: f64,
}

impl Attending {
    fn new(gpu: &Arc<Gpu>, shape: &Shape, (tokens, context): (usize, usize), dtype: KvDtype) -> Self {
        let head_dim = shape.hidden / shape.heads;
        let attention = Attention {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim,
            tokens,
            is_run: true,
            keys: context,
            window: 0,
            scale: 0.1,
            softcap: 0.0,
        };
        let pages = Extent::pages_of(context);
        let layout = KvLayout::new(dtype, (shape.kv_heads, head_dim), pages).expect("a cache");
        let bytes = layout.bytes().as_usize().expect("a size");
        let room = Room { slots: layout.slots, is_ring: false, sequences: 1 };
        Self {
            shape: attention,
            cache: Cache::new(layout, &[small(gpu, bytes), small(gpu, bytes)]),
            rows: room.rows(gpu, &run(context - tokens, tokens, 0)).expect("a GPU that works"),
            query: small(gpu, tokens * shape.hidden * 2),
            out: allocate(gpu, tokens * shape.hidden * 2),
            bytes: 2.0 * bytes as f64,
        }
    }

    fn launch(&self, gpu: &Gpu, scratch: &Scratch) -> evenkeel::Result<()> {
        gpu.attend(&self.shape, &self.query, &self.cache, &self.out, &self.rows, scratch)
    }
}

/// Among logits that differ; their bytes are counted once.
fn choice(Bench { gpu, shape }: &Bench) {
    head("Choosing a token");
    let copy = copy(gpu);
    let count = shape.vocabulary;
    let numbers: Vec<u8> =
        (0..count).flat_map(|at| ((at * 7919 % count) as f32 / count as f32).to_le_bytes()).collect();
    let logits = allocate(gpu, numbers.len());
    logits.write(&numbers).expect("a GPU that works");
    let needed = CudaChoice::new(count);
    let [scratch, seen, chosen] = [needed.scratch, needed.seen, 12].map(|len| allocate(gpu, len));
    for region in [&scratch, &seen, &chosen] {
        region.clear().expect("a GPU that works");
    }
    let at = Choosing { scratch: &scratch, seen: &seen, chosen: &chosen, stride: 1 };
    let drawn = Choice { temperature: 0.8, ..Choice::GREEDY };
    let cut = Choice { top_k: 50, top_p: 0.9, ..drawn };
    for (name, choice) in [("the likeliest", Choice::GREEDY), ("drawn", drawn), ("drawn of the likeliest", cut)] {
        let seconds = seconds(
            || gpu.choose(&choice, 0.0, &logits, count, &at).expect("a launch"),
            || gpu.synchronize().expect("a GPU that works"),
        );
        row(&format!("{name} of {count}"), seconds, Amount::Bytes(numbers.len() as f64), Some(copy));
    }
}

/// Of one token, what counts is the cache; of a chunk of a prompt, multiplications and additions: two for each
/// element of keys and of values that a head sees.
fn attention(Bench { gpu, shape }: &Bench) {
    head("Attention");
    let copy = copy(gpu);
    let chunk = shape.prompt.min(512);
    for (tokens, context) in
        [(1, 2 * shape.prompt), (1, 32 * shape.prompt), (chunk, shape.prompt), (chunk, 8 * shape.prompt)]
    {
        let scratch = scratch(gpu, shape, tokens, context);
        for dtype in [KvDtype::F16, KvDtype::Int8] {
            let attending = Attending::new(gpu, shape, (tokens, context), dtype);
            let seconds = seconds(
                || attending.launch(gpu, &scratch).expect("a launch"),
                || gpu.synchronize().expect("a GPU that works"),
            );
            let what = format!("{} over {context} keys in {dtype}", tokens_of(tokens));
            if tokens == 1 {
                row(&what, seconds, Amount::Bytes(attending.bytes), Some(copy));
            } else {
                let seen = tokens * context - tokens * (tokens - 1) / 2;
                row(&what, seconds, Amount::Operations((4 * seen * shape.hidden) as f64), None);
            }
        }
    }
}

/// A step in which each kernel waits until the one before it has ended, on a GPU that can begin it earlier.
fn late(Bench { shape, .. }: &Bench) {
    let gpu = Gpu::open_as(0, LATE).expect("the same GPU");
    step(&Bench { gpu, shape: *shape }, ", no kernel begun early");
}

/// The products of a block that share a launch; then the products and the attention of all blocks. The
/// weights of some blocks are used in turn, so that no cache holds them.
fn step(Bench { gpu, shape }: &Bench, how: &str) {
    head(&format!("A step of one token{how}"));
    let copy = copy(gpu);
    let (hidden, wide) = (shape.hidden, shape.feed_forward);
    let keys = hidden / shape.heads * shape.kv_heads;
    let context = shape.prompt.min(1024);
    let attending = Attending::new(gpu, shape, (1, context), KvDtype::F16);
    let scratch = scratch(gpu, shape, 1, context);
    let [input, result, gated, apart] = [hidden, hidden, wide, wide].map(|width| small(gpu, 2 * width));
    let wait = || gpu.synchronize().expect("a GPU that works");
    let sizes = [
        (hidden, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, hidden),
        (wide, hidden),
        (wide, hidden),
        (hidden, wide),
    ];
    for (name, storage) in &STORAGES[1..] {
        let blocks: [[Affine; 7]; 4] =
            std::array::from_fn(|_| sizes.map(|(rows, cols)| matrix(gpu, *storage, rows, cols)));
        let in_turn = |at: usize| blocks[at % blocks.len()].as_slice();
        let inputs = |block: &[Affine]| {
            let parts = [(&block[0], &result), (&block[1], &result), (&block[2], &result)];
            gpu.matmuls(&parts, Input::Half(&input), 1, &scratch)
        };
        let gate_up = |block: &[Affine]| {
            let pair = (Some(&block[4]), &block[5]);
            gpu.gated(Activation::Silu, pair, Input::Half(&input), 1, [&gated, &apart], &scratch).map(|_| ())
        };
        let launch = || {
            (0..shape.blocks).map(in_turn).try_for_each(|block| {
                inputs(block)?;
                attending.launch(gpu, &scratch)?;
                gpu.matmul(&block[3], Input::Half(&attending.out), 1, (&result, Output::F16, 1.0), &scratch)?;
                gate_up(block)?;
                gpu.matmul(&block[6], Input::Gated(&gated), 1, (&result, Output::F16, 1.0), &scratch)
            })
        };
        for (what, launch, matrices) in [
            ("queries, keys and values", &inputs as &dyn Fn(&[Affine]) -> evenkeel::Result<()>, 0..3),
            ("gate and up", &gate_up, 4..6),
        ] {
            let mut at = 0;
            let mut next = || {
                at += 1;
                launch(in_turn(at)).expect("a launch");
            };
            let amount = Amount::Bytes(bytes(&blocks[0][matrices]));
            row(&format!("{name} {what}"), seconds(&mut next, wait), amount, Some(copy));
        }
        let amount = Amount::Bytes(shape.blocks as f64 * (bytes(&blocks[0]) + attending.bytes));
        let what = format!("{name} products and attention of {} blocks", shape.blocks);
        row(&what, seconds(|| launch().expect("launches"), wait), amount, Some(copy));
    }
}
