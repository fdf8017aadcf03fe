//! The kernels on the stand-in for the driver, against scalar Rust.

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/kernels.rs"]
mod kernels;

use std::process::Command;

use evenkeel::backend::cuda::Gpu;

const GPUS: &str = "1GiB,1GiB";

/// The variable that names the compute capabilities that kernels are tried with, as `7.5,8.6,9.0`.
const CAPABILITIES: &str = "EVENKEEL_CAPABILITIES";

/// Where [`CAPABILITIES`] is not set: with tensor cores, where kernels begin early, and without.
fn capabilities() -> Vec<String> {
    #[allow(clippy::disallowed_methods, reason = "a variable of the tests")]
    let wanted = std::env::var(CAPABILITIES).unwrap_or_else(|_| "9.0,7.5".to_owned());
    wanted.split(',').map(str::to_owned).collect()
}

macro_rules! on_the_stand_in {
    ($($case:ident)*) => {$(
        #[test]
        fn $case() {
            let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
            for capability in capabilities() {
                fake.set("STREAMS", if capability == "7.5" { "lazy" } else { "eager" });
                fake.set("CC", &capability);
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
        kernels::products_in_one_launch_are_those_of_each(&gpu);
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

/// Runs a test of this file again, with barriers left out of the kernel under it.
#[test]
fn a_barrier_that_is_left_out_is_found() {
    if fake_cuda::directory().is_none() {
        return;
    }
    let ptx = include_str!("../src/backend/cuda/kernels/norm.ptx");
    let barriers = ptx.lines().zip(1..).filter(|(line, _)| line.contains("bar.sync"));
    let lines: Vec<_> = barriers.map(|(_, at)| format!("normalize:{at}")).collect();
    let run = |left_out: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "norms_equal_the_reference"]).env("FAKE_CUDA_RACE", "1").env(CAPABILITIES, "9.0");
        let output = command.env("FAKE_CUDA_DROP", left_out).output().unwrap();
        (
            output.status.success(),
            [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat(),
        )
    };
    let (is_success, said) = run("");
    assert!(is_success, "{said}");
    let found = lines.iter().filter(|line| {
        let (is_success, said) = run(line);
        !is_success && said.contains("normalize: shared race")
    });
    // The first one orders nothing: what is behind it is new to the block.
    assert_eq!(found.count(), lines.len() - 1);
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
