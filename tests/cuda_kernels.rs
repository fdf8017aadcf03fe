//! The kernels on the stand-in for the driver, against scalar Rust.

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/kernels.rs"]
mod kernels;

use std::process::Command;

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
    const SIZE: usize = 4096;
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    fake.set("STREAMS", "lazy");
    // It is taken of one GPU, and the other copies.
    let [first, second] = [0, 1].map(|index| Gpu::open(index).unwrap());
    let sevens = || {
        let mut pinned = first.allocate_pinned(SIZE).unwrap();
        pinned.fill(7);
        pinned
    };
    let all = |bytes: &[u8], byte| bytes.len() == SIZE && bytes.iter().all(|b| *b == byte);
    let region = kernels::buffer(&second, SIZE);
    let read = || {
        let mut bytes = vec![0; SIZE];
        region.read(&mut bytes).unwrap();
        bytes
    };
    let copy = region.write_from(sevens(), 0..SIZE).unwrap();
    assert!(all(&copy.finish().unwrap(), 7) && all(&read(), 7));
    region.clear().unwrap();
    assert!(all(&read(), 0));
    drop(region.write_from(sevens(), 0..SIZE).unwrap());
    assert_eq!(fake.stat("host_bytes", 0), 0);
    assert!(all(&read(), 7));
    region.fill(0x0505_0505).unwrap();
    drop(region.read_to(sevens()).unwrap());
    assert_eq!(fake.stat("host_bytes", 0), 0);
    assert!(all(&region.read_to(sevens()).unwrap().finish().unwrap(), 5));
    // A buffer that is dropped is waited for, too.
    let copy = region.write_from(sevens(), 0..SIZE).unwrap();
    drop(region);
    assert!(all(&copy.finish().unwrap(), 7));
}

/// Runs a test of this file again where no g++ is found.
#[test]
fn without_a_compiler_tests_are_skipped_or_fail() {
    let run = |is_required: bool| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "embeddings_are_the_rows"]).env("PATH", "").env_remove(fake_cuda::REQUIRED);
        let output = if is_required { command.env(fake_cuda::REQUIRED, "1") } else { &mut command }.output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        assert!(said.contains("running 1 test"), "{said}");
        (output.status.success(), said)
    };
    let (is_success, said) = run(false);
    assert!(is_success && said.contains("skipped: g++ is not there"), "{said}");
    let (is_success, said) = run(true);
    assert!(!is_success && said.contains("EVENKEEL_REQUIRE_FAKE_CUDA is set"), "{said}");
}
