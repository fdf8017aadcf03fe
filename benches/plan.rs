//! How long a plan takes: opening the checkpoint, placing it, writing JSON.

#[path = "../tests/support/shapes.rs"]
mod shapes;

use criterion::{Criterion, criterion_group, criterion_main};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::machine::Inventory;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::Scheme;

fn plan(criterion: &mut Criterion) {
    let eight =
        "cuda:0=80GiB,cuda:1=80GiB,cuda:2=80GiB,cuda:3=80GiB,cuda:4=80GiB,cuda:5=80GiB,cuda:6=80GiB,cuda:7=80GiB";
    for (name, config, shards, devices) in [
        ("8B on 8 + 6 GiB", shapes::llama_8b(), 4, "cuda:0=8GiB,cuda:1=6GiB"),
        ("405B on 8 × 80 GiB", shapes::llama_405b(), 191, eight),
        ("128 experts × 94 blocks on 8 × 80 GiB", shapes::qwen3_235b(), 118, eight),
    ] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        shapes::write(directory.path(), &config, shards);
        let inventory = Inventory::described(devices).expect("devices");
        let options = PlanOptions { quantize: Some(Scheme::Int4.into()), ..PlanOptions::default() };
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| {
                let checkpoint = Checkpoint::open(directory.path()).expect("a checkpoint");
                Plan::new(&checkpoint, &inventory, &options).expect("a plan").to_json()
            });
        });
    }
}

criterion_group!(benches, plan);
criterion_main!(benches);
