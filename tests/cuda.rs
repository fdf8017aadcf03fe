//! Models over GPUs, on the stand-in for the driver, in this process.
#![allow(clippy::print_stdout, reason = "the figures are wanted")]

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/kernels.rs"]
mod kernels;
mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use evenkeel::architecture::ModuleTree;
use evenkeel::backend::cuda::{Gpu, Output};
use evenkeel::bytes::Bytes;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device::DeviceId;
use evenkeel::device_map::DeviceMap;
use evenkeel::generate::GenerateOptions;
use evenkeel::loader::{LoadEvent, LoadOptions, Model};
use evenkeel::plan::{Inventory, Plan, PlanOptions, Quantize};
use evenkeel::quant::{KvDtype, QuantizeRules, Scheme, WeightDtype};
use evenkeel::{ErrorKind, Result};
use fake_cuda::FakeCuda;
use support::broken::Broken;
use support::{expected, fixture, numbers};

const GPUS: &str = "24GiB,8GiB";
const CHECKPOINTS: &[&str] = &[
    "parity/gemma2",
    "parity/gemma3",
    "parity/gpt2",
    "parity/granite",
    "parity/llama",
    "parity/llama31",
    "parity/llama_bf16",
    "parity/mistral",
    "parity/mixtral",
    "parity/olmo2",
    "parity/phi3",
    "parity/qwen2",
    "parity/qwen2_yarn",
    "parity/qwen3",
    "parity/qwen3_moe",
    "parity/smollm3",
];
/// The largest difference of a logit, as a share of the largest logit.
const LOGITS: f32 = 2e-2;
static NEVER: AtomicBool = AtomicBool::new(false);

/// A map that puts the modules on these devices in turn, the last one for all that are left.
fn map(checkpoint: &Checkpoint, devices: &[&str]) -> String {
    let tree = ModuleTree::new(&checkpoint.config);
    let mut entries: Vec<(&str, &str)> = tree
        .modules
        .iter()
        .enumerate()
        .map(|(at, module)| (module.path.as_str(), *devices.get(at).or(devices.last()).unwrap()))
        .collect();
    if tree.tied {
        let embedding = entries[0].1;
        entries.last_mut().unwrap().1 = embedding;
    }
    let entries: Vec<String> = entries.iter().map(|(path, device)| format!(r#""{path}": "{device}""#)).collect();
    format!("{{{}}}", entries.join(", "))
}

fn options(scheme: Scheme, map: &str, context: Option<usize>) -> PlanOptions {
    PlanOptions {
        quantize: Some(Quantize::Rules(QuantizeRules::whole_model(scheme))),
        device_map: Some(DeviceMap::parse("map.json", map.into()).unwrap()),
        context,
        ..PlanOptions::default()
    }
}

fn machine() -> Inventory {
    Inventory::this_machine(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

fn plan(checkpoint: &Checkpoint, scheme: Scheme, map: &str, context: Option<usize>) -> Plan {
    Plan::new(checkpoint, &machine(), &options(scheme, map, context)).unwrap()
}

fn load(plan: &Plan, checkpoint: &Checkpoint, separate_buffers: bool) -> Result<Model> {
    let offload_directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    plan.load(checkpoint, &LoadOptions { offload_directory, cancel: &NEVER, separate_buffers }, |_| ())
}

fn logits(model: &mut Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    model.score(tokens, |_, logits| all.push(logits.to_vec())).unwrap();
    all
}

fn difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Holds the logits of all tokens against others. Where two experts score a token nearly the same,
/// rounding decides between them: with experts, one token may be far off.
#[track_caller]
fn assert_all_near(what: &str, ours: &[Vec<f32>], theirs: &[Vec<f32>], experts: bool) -> f32 {
    let pairs = || ours.iter().zip(theirs).filter(|(a, b)| !experts || difference(a, b) < LOGITS);
    assert!(pairs().count() + 1 >= theirs.len(), "{what}");
    pairs().map(|(ours, theirs)| assert_near(what, ours, theirs)).fold(0.0, f32::max)
}

/// Holds logits against others: near, and with the same best wherever that is clear.
#[track_caller]
fn assert_near(what: &str, ours: &[f32], theirs: &[f32]) -> f32 {
    let largest = theirs.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
    let difference = difference(ours, theirs);
    assert!(difference < LOGITS, "{what}: {difference}");
    let order = |logits: &[f32]| {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        order
    };
    let best = order(theirs);
    if theirs[best[0]] - theirs[best[1]] > LOGITS * largest {
        assert_eq!(order(ours)[0], best[0], "{what}");
    }
    difference
}

/// Nothing is left of what a model took.
#[track_caller]
fn assert_nothing_left(fake: &FakeCuda, what: &str) {
    for device in 0..2 {
        assert_eq!(fake.stat("live_bytes", device), 0, "{what}");
    }
    for counter in ["contexts", "streams", "events", "host_bytes"] {
        assert_eq!(fake.stat(counter, 0), 0, "{what}: {counter}");
    }
}

#[test]
fn models_over_gpus_are_transformers() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for name in CHECKPOINTS {
        let expected = expected(name);
        let input: Vec<u32> = numbers(&expected["input_ids"]);
        let sequence = [&input[..], &numbers(&expected["greedy_ids"])].concat();
        let exact = logits(&mut support::load(name, Scheme::None, None), &sequence);
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let experts = checkpoint.config.experts.is_some();
        for devices in
            [&["cuda:0"][..], &["cuda:0", "cuda:0", "cuda:1"], &["cpu", "cuda:0", "disk", "cuda:1", "cpu", "cuda:0"]]
        {
            let plan = plan(&checkpoint, Scheme::None, &map(&checkpoint, devices), None);
            let mut model = load(&plan, &checkpoint, true).unwrap();
            let ours = logits(&mut model, &sequence);
            let what = format!("{name} on {}", devices.join(" "));
            let mut worst =
                assert_near(&what, &ours[input.len() - 1], &numbers::<f32>(&expected["prompt_logits_last"]));
            worst =
                worst.max(assert_near(&what, ours.last().unwrap(), &numbers::<f32>(&expected["final_logits_last"])));
            worst = worst.max(assert_all_near(&what, &ours, &exact, experts));
            println!("{what}: logits differ by {worst:.1e} of the largest");
            model.limit_prefill_chunk(3);
            assert_all_near(&format!("{what}, in chunks"), &logits(&mut model, &sequence), &exact, experts);
            drop(model);
            assert_nothing_left(fake, &what);
        }
    }
}

#[test]
fn where_blocks_are_and_how_buffers_and_streams_run_changes_no_bit() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for (name, kv_cache) in [("parity/llama_bf16", KvDtype::F16), ("parity/qwen3_moe", KvDtype::Int8)] {
        let sequence: Vec<u32> = numbers(&expected(name)["input_ids"]);
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        for scheme in Scheme::ALL {
            let run = |devices: &[&str], separate| {
                let mut options = options(scheme, &map(&checkpoint, devices), None);
                options.kv_cache = Some(kv_cache);
                let plan = Plan::new(&checkpoint, &machine(), &options).unwrap();
                logits(&mut load(&plan, &checkpoint, separate).unwrap(), &sequence)
            };
            let one = run(&["cuda:0"], false);
            for (streams, separate) in [("eager", false), ("lazy", false), ("lazy", true)] {
                fake.set("STREAMS", streams);
                let two = run(&["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:1", "cuda:0"], separate);
                assert_eq!(two, one, "{name}, {scheme}, {streams}");
            }
            fake.set("STREAMS", "eager");
            // The CPU rounds activations to int8 where weights are quantized.
            let allowed = if scheme == Scheme::None { LOGITS } else { 0.1 };
            for (ours, theirs) in one.iter().zip(&run(&["cpu"], false)) {
                let difference = difference(ours, theirs);
                assert!(difference < allowed, "{name}, {scheme}: {difference}");
            }
        }
    }
}

#[test]
fn the_peak_of_every_gpu_is_the_planned_one() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for name in ["ferris-7m", "parity/gemma2", "parity/gpt2", "parity/qwen3_moe"] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        // Packing to int4 is slow on the stand-in.
        for scheme in if name == "ferris-7m" { &Scheme::ALL[..2] } else { &Scheme::ALL } {
            for (devices, context) in [
                (&["cuda:0"][..], 64),
                (&["cuda:1", "cuda:1", "cuda:0", "cuda:1"], 100),
                (&["cpu", "cuda:1", "cpu", "cuda:0", "cpu"], 128),
            ] {
                let map = &map(&checkpoint, devices);
                let plan = plan(&checkpoint, *scheme, map, Some(context));
                for device in [0, 1] {
                    fake.stat("reset_peak", device);
                }
                let model = load(&plan, &checkpoint, false).unwrap();
                for device in &model.report.devices {
                    if let DeviceId::Cuda(index) = device.id {
                        let peak = Bytes(fake.stat("peak_bytes", i32::try_from(index).unwrap()));
                        assert_eq!(peak, device.planned, "{name} {scheme} {map}: {}", device.id);
                    }
                    let near = device.planned.0.abs_diff(device.measured.0) * 100 <= device.planned.0;
                    assert!(near, "{name} {scheme} {map}: {} {} {}", device.id, device.planned, device.measured);
                }
                drop(model);
                assert_nothing_left(fake, map);
            }
        }
    }
}

#[test]
fn the_failure_of_any_allocation_is_an_error_and_leaves_nothing() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let devices = map(&checkpoint, &["cuda:0", "cuda:0", "cuda:1", "cpu", "cuda:1", "cuda:0"]);
    let plan = plan(&checkpoint, Scheme::Int4, &devices, None);
    let leaked = || fake.stat("leaked_bytes", 0) + fake.stat("leaked_bytes", 1);
    let before = leaked();
    for call in 1.. {
        fake.set("FAIL_ALLOC", &call.to_string());
        let Err(error) = load(&plan, &checkpoint, false) else {
            assert!(call > 10, "the load made {call} allocations only");
            break;
        };
        assert!([ErrorKind::DoesNotFit, ErrorKind::Shortfall].contains(&error.kind()), "{error}");
        assert!(error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY (out of memory)"), "{error}");
        assert_nothing_left(fake, &error.to_string());
        assert_eq!(leaked(), before, "{error}");
    }
    fake.set("FAIL_ALLOC", "1");
    let error = load(&plan, &checkpoint, false).err().unwrap().to_string();
    assert!(
        error.starts_with("cuda:0 cannot give ") && error.contains(" for the weights, 24.0 GiB are free"),
        "{error}"
    );
}

#[test]
fn memory_that_is_taken_after_the_plan_is_noticed_before_anything_is() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("ferris-7m")).unwrap();
    let plan = plan(&checkpoint, Scheme::None, r#"{"": "cuda:1"}"#, None);
    fake.set("USED", "0,8190MiB");
    let error = load(&plan, &checkpoint, false).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Shortfall);
    let needed = plan.devices[1].total() - plan.devices[1].driver_context;
    let (free, missing) = (Bytes(2 << 20), needed - Bytes(2 << 20));
    assert_eq!(
        error.to_string(),
        format!("cuda:1 has {free} free, {missing} less than the {needed} that were planned")
    );
    assert!(error.hints()[0].ends_with("`--on-shortfall replan` plans again with what is left"), "{:?}", error.hints());
    assert_nothing_left(fake, "nothing was taken");
    fake.set("USED", "0");
    assert!(load(&plan, &checkpoint, false).is_ok());
}

#[test]
fn a_kernel_that_fails_is_named_and_the_next_load_works() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let plan = plan(&checkpoint, Scheme::Int8, r#"{"": "cuda:0"}"#, None);
    // 701 is refused by the launch itself; 719 comes to light later and spoils the context.
    for (failure, shown) in [
        ("3:701", "cuda:0 cannot run the kernel `quantize_int8`: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
        ("3", "CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)"),
    ] {
        fake.set("FAIL_LAUNCH", failure);
        let error = load(&plan, &checkpoint, false).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains(shown), "{error}");
        assert_nothing_left(fake, "the kernel failed");

        let mut model = load(&plan, &checkpoint, false).unwrap();
        fake.set("FAIL_LAUNCH", failure);
        let error = model.generate_from(&[1, 2, 3], GenerateOptions::default(), &NEVER).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        assert!(error.to_string().starts_with("cuda:0 "), "{error}");
        drop(model);
        assert_nothing_left(fake, "the kernel failed");
    }
    assert!(load(&plan, &checkpoint, false).is_ok());
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    const TENSOR: &str = "model.layers.1.mlp.down_proj.weight";
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let broken = Broken::sharded();
    let checkpoint = Checkpoint::open(broken.directory()).unwrap();
    let tensor = &checkpoint.catalog[TENSOR];
    let shard = &checkpoint.shards[tensor.shard];
    let mut bytes = broken.read(shard);
    let at = usize::try_from(tensor.range.start + 4 * (3 * tensor.shape[1] + 5)).unwrap();
    for (value, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        broken.write(shard, &bytes);
        for scheme in [Scheme::Int8, Scheme::Int4] {
            let error = load(&plan(&checkpoint, scheme, r#"{"": "cuda:1"}"#, None), &checkpoint, false).err().unwrap();
            assert_eq!(error.to_string(), format!("tensor `{TENSOR}` has {shown} at row 3, column 5"));
            assert_eq!(error.kind(), ErrorKind::Input);
            assert_nothing_left(fake, "the load failed");
        }
    }
}

#[test]
fn a_load_can_be_stopped() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let plan = plan(&checkpoint, Scheme::Int4, r#"{"": "cuda:0"}"#, None);
    let cancel = AtomicBool::new(false);
    let offload_directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let options = LoadOptions { offload_directory, cancel: &cancel, separate_buffers: false };
    let result = plan.load(&checkpoint, &options, |event| {
        if let LoadEvent::Placed { .. } = event {
            cancel.store(true, Ordering::Relaxed);
        }
    });
    assert_eq!(result.err().unwrap().kind(), ErrorKind::Interrupted);
    assert_nothing_left(fake, "the load was stopped");
}

#[test]
fn a_pointer_of_another_gpu_is_caught() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let (here, there) = (Gpu::open(0).unwrap(), Gpu::open(1).unwrap());
    let (x, y) = (kernels::buffer(&here, 64), kernels::buffer(&there, 64));
    here.normalize(None, (&x, WeightDtype::F32), (2, 8), &y, Output::F32, 1.0).unwrap();
    let error = here.synchronize().unwrap_err();
    assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    assert_eq!(
        fake.last_error(),
        "normalize: parameter 7 points to memory of device 1, but the kernel runs on device 0"
    );
}
