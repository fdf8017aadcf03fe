//! What the driver takes of a GPU and of time: contexts, code, launches, the units of its memory.

use std::path::Path;
use std::time::Instant;

use evenkeel::backend::cuda::{Compiling, Gpu, Installation};
use evenkeel::bytes::{Bytes, MIB};
use evenkeel::device::DeviceId;
use evenkeel::loader::LoadOptions;
use evenkeel::verify::verify_once;

/// Prints what is gone since `before`, and how long `what` took; gives what is free now.
fn gone(what: &str, before: Bytes, start: Instant, gpu: &Gpu) -> Bytes {
    let seconds = start.elapsed().as_secs_f64();
    let (free, _) = gpu.memory().expect("a GPU that works");
    let sign = if free > before { "-" } else { "" };
    println!("| {what} | {:.1} ms | {sign}{} | {free} |", 1e3 * seconds, Bytes(before.0.abs_diff(free.0)));
    free
}

/// Nothing of this process has opened the GPU before.
pub fn driver() {
    println!("\n## The driver\n\n| what | time | taken | free |\n| --- | --- | --- | --- |");
    for round in ["a context", "another, where there is none"] {
        let start = Instant::now();
        let found = Installation::find().expect("a driver that works").expect("a driver");
        let gpu = &found.gpus[0].device;
        let taken = Bytes(gpu.total.0 - (gpu.free.0 - gpu.context.0));
        let now = Bytes(gpu.total.0 - taken.0);
        println!(
            "| {round}, {} planned | {:.1} ms | {taken} with others' | {now} |",
            gpu.context,
            1e3 * start.elapsed().as_secs_f64()
        );
    }
    let kept = tempfile::tempdir().expect("a directory");
    let compiling = Compiling { cache: Some(kept.path().to_owned()), ..Compiling::default() };
    let open = || Gpu::open_with(0, &compiling).expect("a GPU that works");
    let start = Instant::now();
    let first = open();
    let free = gone(
        "context and kernels, compiled on as many processors as there are files",
        first.memory().expect("a GPU that works").1,
        start,
        &first,
    );
    let size = |path: &Path| {
        std::fs::read_dir(path)
            .map_or(0, |files| files.flatten().filter_map(|file| file.metadata().ok()).map(|data| data.len()).sum())
    };
    println!("| of these kernels are kept | | {} | |", Bytes(size(kept.path())));
    let start = Instant::now();
    let again = open();
    let free = gone("the same kernels once more, as they are kept", free, start, &again);
    let start = Instant::now();
    drop(again);
    let free = gone("given back", free, start, &first);
    let start = Instant::now();
    let options = LoadOptions { kernel_cache: Some(kept.path().to_owned()), ..LoadOptions::default() };
    let verified = verify_once([DeviceId::Cuda(0)], &options, None, &mut |_| ()).expect("kernels that are right");
    let free = gone(&format!("{} kernels launched, and given back", verified[0].kernels.len()), free, start, &first);
    let mut kept = Vec::new();
    let mut left = free;
    for size in [1, MIB, 2 * MIB, 2 * MIB + 1, 64 * MIB] {
        let start = Instant::now();
        kept.push(first.allocate("a benchmark", Bytes(size)).expect("memory"));
        left = gone(&format!("{size} bytes"), left, start, &first);
    }
    let start = Instant::now();
    kept.clear();
    gone("these given back", left, start, &first);
}
