//! What needs a real GPU: `cargo test --release --test gpu -- --ignored --nocapture`.

#[path = "support/kernels.rs"]
mod kernels;
mod support;

use evenkeel::backend::cuda::{Gpu, Installation};
use support::CHECKPOINTS;
use support::models::assert_is_transformers;

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
    let count = Installation::find().map_or(0, |found| found.gpus.len());
    let second = if count > 1 { "cuda:1" } else { "cuda:0" };
    for name in CHECKPOINTS {
        assert_is_transformers(name, &[&["cuda:0"], &["cuda:0", "cpu", second, "disk", "cuda:0"]], false);
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
