//! The kernels on the stand-in for the driver, against scalar Rust.

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/kernels.rs"]
mod kernels;

use evenkeel::backend::cuda::Gpu;

const GPUS: &str = "1GiB,1GiB";

macro_rules! on_the_stand_in {
    ($($case:ident)*) => {$(
        #[test]
        fn $case() {
            let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
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
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for multiprocessors in ["1", "3", "300"] {
        fake.set("SMS", multiprocessors);
        let gpu = Gpu::open(0).unwrap();
        kernels::products_equal_the_reference(&gpu);
        kernels::gates_are_applied_to_what_up_gives(&gpu);
        kernels::hidden_states_are_normalized_on_the_way(&gpu);
    }
}

#[test]
fn page_locked_memory_is_the_copys_own_until_that_is_done() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    fake.set("STREAMS", "lazy");
    // It is taken of one GPU, and the other copies.
    let [first, second] = [0, 1].map(|index| Gpu::open(index).unwrap());
    let pinned = || {
        let mut pinned = first.allocate_pinned(4096).unwrap();
        pinned.fill(7);
        pinned
    };
    let region = kernels::buffer(&second, 4096);
    let read = || {
        let mut bytes = vec![0; region.len()];
        region.read(&mut bytes).unwrap();
        bytes
    };
    let copy = region.write_from(pinned(), 0..4096).unwrap();
    assert_eq!(copy.finish().unwrap()[..], read());
    region.clear().unwrap();
    drop(region.write_from(pinned(), 0..4096).unwrap());
    assert_eq!(fake.stat("host_bytes", 0), 0);
    assert_eq!(read(), [7; 4096]);
    region.fill(0x0505_0505).unwrap();
    drop(region.read_to(pinned()).unwrap());
    assert_eq!(fake.stat("host_bytes", 0), 0);
    assert_eq!(region.read_to(pinned()).unwrap().finish().unwrap()[..], [5; 4096]);
    // A buffer that is dropped is waited for, too.
    let copy = region.write_from(pinned(), 0..4096).unwrap();
    drop(region);
    assert_eq!(copy.finish().unwrap()[..], [7; 4096]);
}
