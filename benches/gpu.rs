//! How fast the GPU's kernels are: products of one token and of many, with tensor cores and without,
//! and quantizing.
//! Without a GPU nothing is measured.
#![allow(clippy::print_stdout, reason = "says why nothing is measured")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use evenkeel::backend::cuda::{Affine, DeviceMatrix, Gpu, Output, Region};
use evenkeel::bytes::Bytes;
use evenkeel::quant::{MatrixLayout, Storage, WeightDtype};

/// Zeros: what the kernels do does not depend on the numbers, but a GPU's clock may.
fn zeros(gpu: &Arc<Gpu>, len: usize) -> Region {
    let region = Region::new(&gpu.allocate("a benchmark", Bytes(len as u64)).expect("memory"), 0, len);
    region.clear().expect("a GPU that works");
    region
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
            let kernels = [(&gpu, ""), (&plain, ", plain kernels")];
            for (gpu, which) in &kernels[..if quantized { 2 } else { 1 }] {
                let matrix = DeviceMatrix::new(layout.clone(), zeros(gpu, size));
                for tokens in [1, 8, 512] {
                    let (x, y) = (zeros(gpu, tokens * cols * 2), zeros(gpu, tokens * rows * 2));
                    group.throughput(Throughput::Bytes(size as u64));
                    group.bench_function(format!("{name} {rows}×{cols}, {tokens} tokens{which}"), |bencher| {
                        bencher.iter_custom(|count| {
                            time(gpu, count, || {
                                let affine = Affine::new(&matrix, None);
                                gpu.matmul(&affine, &x, tokens, &y, Output::F16, 1.0).expect("a launch");
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

criterion_group!(benches, kernels);
criterion_main!(benches);
