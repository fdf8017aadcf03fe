//! The kernels on the stand-in for the driver, against scalar Rust.

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/kernels.rs"]
mod kernels;

use evenkeel::backend::cuda::Gpu;

macro_rules! on_the_stand_in {
    ($($case:ident)*) => {$(
        #[test]
        fn $case() {
            let Some((fake, _turn)) = fake_cuda::load("1GiB") else { return };
            // With tensor cores, where kernels begin early, and without.
            for (streams, capability) in [("eager", "9.0"), ("lazy", "7.5")] {
                fake.set("STREAMS", streams);
                fake.set("CC", capability);
                let gpu = Gpu::open(0).unwrap();
                kernels::$case(&gpu);
                drop(gpu);
                assert_eq!(fake.stat("live_bytes", 0) + fake.stat("leaked_bytes", 0), 0);
                assert_eq!(fake.stat("contexts", 0), 0);
            }
        }
    )*};
}

kernels::every_case!(on_the_stand_in);

#[test]
fn products_are_the_same_however_many_blocks_share_them() {
    let Some((fake, _turn)) = fake_cuda::load("1GiB") else { return };
    for multiprocessors in ["1", "3", "300"] {
        fake.set("SMS", multiprocessors);
        let gpu = Gpu::open(0).unwrap();
        kernels::products_equal_the_reference(&gpu);
        kernels::gates_are_applied_to_what_up_gives(&gpu);
        kernels::hidden_states_are_normalized_on_the_way(&gpu);
    }
}
