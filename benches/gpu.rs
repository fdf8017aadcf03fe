//! How fast the GPU's kernels are: products of one token and of many, with tensor cores and without,
//! a block's products in one launch, quantizing, and one token's attention.
//! The throughput of few tokens is in bytes of weights or of the cache, that of many in multiplications and
//! additions. Without a GPU nothing is measured.
#![allow(clippy::print_stdout, reason = "says why nothing is measured")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use evenkeel::backend::cuda::{Affine, Attention, Cache, DeviceMatrix, Gpu, Input, Output, Region, Scratch};
use evenkeel::bytes::Bytes;
use evenkeel::model_config::Activation;
use evenkeel::plan::memory::{CUDA_FEW_BLOCKS, CUDA_FEW_PARTS, CudaAttention, KvLayout};
use evenkeel::quant::{KvDtype, MatrixLayout, Storage, WeightDtype};

/// Zeros: what the kernels do does not depend on the numbers, but a GPU's clock may.
fn zeros(gpu: &Arc<Gpu>, len: usize) -> Region {
    let region = Region::new(&gpu.allocate("a benchmark", Bytes(len as u64)).expect("memory"), 0, len);
    region.clear().expect("a GPU that works");
    region
}

/// What blocks that share a product need.
fn scratch(gpu: &Arc<Gpu>) -> Scratch {
    let parts = zeros(gpu, CUDA_FEW_BLOCKS * CUDA_FEW_PARTS * 4);
    Scratch { parts, arrivals: zeros(gpu, CUDA_FEW_BLOCKS * 4) }
}

/// The time of `count` launches, queued one behind the other.
fn time(gpu: &Gpu, count: u64, mut launch: impl FnMut()) -> Duration {
    gpu.synchronize().expect("a GPU that works");
    let start = Instant::now();
    (0..count).for_each(|_| launch());
    gpu.synchronize().expect("a GPU that works");
    start.elapsed()
}

/// The last compute capability whose kernels do without tensor cores.
const PLAIN: (i32, i32) = (7, 5);

fn kernels(criterion: &mut Criterion) {
    let (gpu, plain) = match (Gpu::open(0), Gpu::open_as(0, PLAIN)) {
        (Ok(gpu), Ok(plain)) => (gpu, plain),
        (Err(error), _) | (_, Err(error)) => return println!("nothing to measure: {error}"),
    };
    let mut group = criterion.benchmark_group("gpu");
    for (name, storage) in [
        ("bf16", Storage::Plain(WeightDtype::Bf16)),
        ("int8", Storage::Int8),
        ("int4", Storage::Int4),
        ("nl4", Storage::Nl4),
    ] {
        for (rows, cols) in [(4096, 4096), (14_336, 4096), (4096, 14_336)] {
            let layout = MatrixLayout::new(storage, rows, cols).expect("a size");
            let size = layout.size().as_usize().expect("a size");
            let quantized = !matches!(storage, Storage::Plain(_));
            for (gpu, which) in [(&gpu, ""), (&plain, ", plain kernels")] {
                let matrix = DeviceMatrix::new(layout.clone(), zeros(gpu, size));
                let scratch = scratch(gpu);
                for tokens in [1, 8, 512, 4096] {
                    let (x, y) = (zeros(gpu, tokens * cols * 2), zeros(gpu, tokens * rows * 2));
                    group.throughput(match tokens {
                        1 | 8 => Throughput::Bytes(size as u64),
                        _ => Throughput::Elements((2 * rows * cols * tokens) as u64),
                    });
                    group.bench_function(format!("{name} {rows}×{cols}, {tokens} tokens{which}"), |bencher| {
                        bencher.iter_custom(|count| {
                            time(gpu, count, || {
                                let affine = Affine::new(&matrix, None);
                                let y = (&y, Output::F16, 1.0);
                                gpu.matmul(&affine, Input::Half(&x), tokens, y, &scratch).expect("a launch");
                            })
                        });
                    });
                }
            }
            if quantized {
                let matrix = DeviceMatrix::new(layout, zeros(&gpu, size));
                let (weights, failed) = (zeros(&gpu, rows * cols * 2), zeros(&gpu, 4));
                group.throughput(Throughput::Bytes((rows * cols * 2) as u64));
                group.bench_function(format!("quantize bf16 to {name}, {rows}×{cols}"), |bencher| {
                    bencher.iter_custom(|count| {
                        time(&gpu, count, || {
                            gpu.quantize(&matrix, 0, rows, WeightDtype::Bf16, &weights, &failed).expect("a launch");
                        })
                    });
                });
            }
        }
    }
}

/// Products of a block of Llama-3-8B that share a launch, for one token.
fn launches(criterion: &mut Criterion) {
    let Ok(gpu) = Gpu::open(0) else { return };
    let mut group = criterion.benchmark_group("gpu");
    let (cols, wide) = (4096, 14_336);
    let (x, y, scratch) = (zeros(&gpu, 2 * cols), zeros(&gpu, 2 * wide), scratch(&gpu));
    let x = Input::Half(&x);
    for (name, storage) in [("int8", Storage::Int8), ("int4", Storage::Int4)] {
        let matrices = [4096, 1024, 1024, wide, wide].map(|rows| {
            let layout = MatrixLayout::new(storage, rows, cols).expect("a size");
            let size = layout.size().as_usize().expect("a size");
            DeviceMatrix::new(layout, zeros(&gpu, size))
        });
        let [query, key, value, gate, up] = matrices.each_ref().map(|matrix| Affine::new(matrix, None));
        let bytes = |matrices: &[DeviceMatrix]| matrices.iter().map(|matrix| matrix.layout().size().0).sum();
        group.throughput(Throughput::Bytes(bytes(&matrices[..3])));
        group.bench_function(format!("{name} queries, keys and values, 1 token"), |bencher| {
            let parts = [(&query, &y), (&key, &y), (&value, &y)];
            bencher.iter_custom(|count| time(&gpu, count, || gpu.matmuls(&parts, x, 1, &scratch).expect("a launch")));
        });
        group.throughput(Throughput::Bytes(bytes(&matrices[3..])));
        group.bench_function(format!("{name} gate and up, 1 token"), |bencher| {
            bencher.iter_custom(|count| {
                time(&gpu, count, || {
                    let (pair, rooms) = ((Some(&gate), &up), [&y, &y]);
                    gpu.gated(Activation::Silu, pair, x, 1, rooms, &scratch).expect("a launch");
                })
            });
        });
    }
}

/// One token of Llama-3-8B behind many, and a chunk of a prompt.
fn attention(criterion: &mut Criterion) {
    let Ok(gpu) = Gpu::open(0) else { return };
    let mut group = criterion.benchmark_group("gpu");
    let (heads, kv_heads, head_dim) = (32, 8, 128);
    for (tokens, context) in [(1, 8192), (1, 131_072), (512, 4096), (512, 32_768)] {
        let shape = Attention {
            heads,
            kv_heads,
            head_dim,
            context,
            position: context - tokens,
            tokens,
            window: 0,
            scale: 0.1,
            softcap: 0.0,
        };
        let scratch = CudaAttention::scratch(heads, kv_heads, head_dim, tokens, context);
        let [parts, arrivals] = scratch.map(|len| zeros(&gpu, len));
        let scratch = Scratch { parts, arrivals };
        let position = zeros(&gpu, 4);
        position.fill(u32::try_from(shape.position).expect("a position")).expect("a GPU that works");
        let [query, out] = [(); 2].map(|()| zeros(&gpu, tokens * heads * head_dim * 2));
        for dtype in [KvDtype::F16, KvDtype::Int8] {
            let vectors = kv_heads * context;
            let layout =
                KvLayout { dtype, codes: vectors * dtype.code_bytes(head_dim), scales: vectors * dtype.scale_bytes() };
            let bytes = layout.bytes().as_usize().expect("a size");
            let cache = Cache::new(layout, &[zeros(&gpu, bytes), zeros(&gpu, bytes)]);
            let seen = tokens * context - tokens * (tokens - 1) / 2;
            group.throughput(match tokens {
                1 => Throughput::Bytes(2 * bytes as u64),
                _ => Throughput::Elements((4 * seen * heads * head_dim) as u64),
            });
            group.bench_function(format!("attention of {tokens} over {context} keys in {dtype}"), |bencher| {
                bencher.iter_custom(|count| {
                    time(&gpu, count, || {
                        gpu.attend(&shape, &query, &cache, &out, &position, &scratch).expect("a launch");
                    })
                });
            });
        }
    }
}

criterion_group!(benches, kernels, launches, attention);
criterion_main!(benches);
