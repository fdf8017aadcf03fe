//! What needs a real GPU: `cargo test --release --test gpu -- --ignored --nocapture`.

#[path = "support/kernels.rs"]
mod kernels;
mod support;

use evenkeel::backend::cuda::{Gpu, Installation};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::quant::Scheme;
use support::models::{assert_all_near, assert_is_transformers, load, logits, map, plan};
use support::{CHECKPOINTS, fixture};

macro_rules! on_the_gpu {
    ($($case:ident)*) => {$(
        #[test]
        #[ignore = "needs a GPU"]
        fn $case() {
            kernels::$case(&Gpu::open(0).unwrap());
        }
    )*};
}

kernels::every_case!(on_the_gpu);

#[test]
#[ignore = "needs a GPU"]
fn models_over_gpus_are_transformers() {
    let count = Installation::find().ok().flatten().map_or(0, |found| found.gpus.len());
    let second = if count > 1 { "cuda:1" } else { "cuda:0" };
    for name in CHECKPOINTS {
        assert_is_transformers(name, &[&["cuda:0"], &["cuda:0", "cpu", second, "disk", "cuda:0"]], false);
    }
}

/// Steps of one token are launched, then captured and repeated, and captured again behind 256 tokens.
#[test]
#[ignore = "needs a GPU"]
fn steps_of_one_token_give_what_a_chunk_does() {
    let checkpoint = Checkpoint::open(fixture("parity/llama31")).unwrap();
    let tokens: Vec<u32> = (0..270).map(|at| at * 7 % 50).collect();
    for scheme in Scheme::ALL {
        let plan = plan(&checkpoint, scheme, &map(&checkpoint, &["cuda:0"]), Some(tokens.len()));
        let mut model = load(&plan, false).unwrap();
        let chunk = logits(&mut model, &tokens);
        model.limit_prefill_chunk(1);
        assert_all_near(scheme.name(), &logits(&mut model, &tokens), &chunk, false);
    }
}

/// One card, opened twice, stands for two.
#[test]
#[ignore = "needs a GPU"]
fn bytes_hop_from_gpu_to_gpu() {
    let (here, there) = (Gpu::open(0).unwrap(), Gpu::open(0).unwrap());
    let (from, to) = (kernels::buffer(&here, 1 << 20), kernels::buffer(&there, 1 << 20));
    let bytes: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    for round in 0..10 {
        from.write(&bytes[round..]).unwrap();
        to.copy_from(&from).unwrap();
        // What is queued behind the copy waits for it.
        from.clear().unwrap();
        let mut back = vec![0; bytes.len() - round];
        to.read(&mut back).unwrap();
        assert_eq!(back, bytes[round..]);
    }
}
