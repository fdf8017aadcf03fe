//! Models over GPUs, on the stand-in for the driver, in this process.
#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/kernels.rs"]
mod kernels;
mod support;

use std::sync::Arc;

use evenkeel::backend::cuda::{Gpu, Output};
use evenkeel::backend::{Chooser, Draws, Run};
use evenkeel::bytes::Bytes;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device::{DeviceError, DeviceId};
use evenkeel::error::Setting;
use evenkeel::export::{DEFAULT_SHARD_SIZE, SaveFormat, SaveOptions, save_quantized};
use evenkeel::footprint;
use evenkeel::generate::{GenerateOptions, Sampling};
use evenkeel::loader::{LoadEvent, LoadOptions, Model};
use evenkeel::plan::{Plan, PlanOptions, Quantize};
use evenkeel::quant::{KvDtype, QuantizeRules, Scheme, WeightDtype};
use evenkeel::{Cancel, ErrorKind};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use support::bent::{Bent, Tensor, greedy};
use support::broken::Broken;
use support::models::{
    LOGITS, assert_all_near, assert_is_transformers, assert_near, difference, extent_of, load, logits, machine, map,
    options, plan, samplings,
};
use support::{CHECKPOINTS, expected, fixture, numbers};

const GPUS: &str = "24GiB,8GiB";

#[test]
fn models_over_gpus_are_transformers() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let maps: [&[&str]; 3] =
        [&["cuda:0"], &["cuda:0", "cuda:0", "cuda:1"], &["cpu", "cuda:0", "disk", "cuda:1", "cpu", "cuda:0"]];
    for name in CHECKPOINTS {
        assert_is_transformers(name, &maps, true);
        fake.assert_nothing_left(name);
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
                logits(&mut load(&plan, separate).unwrap(), &sequence)
            };
            let one = run(&["cuda:0"], false);
            for (streams, separate) in [("eager", false), ("lazy", false), ("lazy", true)] {
                fake.set("STREAMS", streams);
                let two = run(&["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:1", "cuda:0"], separate);
                assert_eq!(two, one, "{name}, {scheme}, {streams}");
            }
            fake.set("STREAMS", "eager");
            // Tensor cores multiply as plain kernels do.
            fake.set("CC", "7.5");
            let plain = run(&["cuda:0"], false);
            fake.set("CC", "8.6");
            for (tensor, plain) in one.iter().zip(&plain) {
                let difference = difference(tensor, plain);
                assert!(difference < LOGITS, "{name}, {scheme}, without tensor cores: {difference}");
            }
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
fn projections_of_a_block_may_each_have_a_scheme() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let mixtures = [
        ["int8", "nl4", "none", "int4", "int8", "int4", "none"],
        ["int4", "int8", "int8", "none", "none", "none", "int4"],
        ["none", "int4", "nl4", "int8", "nl4", "int8", "int8"],
    ];
    let projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    for name in ["parity/llama_bf16", "parity/qwen2", "parity/gemma2"] {
        let sequence: Vec<u32> = numbers(&expected(name)["input_ids"]);
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        for mixture in mixtures {
            let schemes = projections.iter().enumerate().flat_map(|(at, projection)| {
                let room = if at < 4 { "self_attn" } else { "mlp" };
                let scheme = move |layer: usize| mixture[(at + layer) % mixture.len()].parse().unwrap();
                (0..3).map(move |layer| (format!("model.layers.{layer}.{room}.{projection}"), scheme(layer)))
            });
            let rules = QuantizeRules::new([(String::new(), Scheme::Int8)].into_iter().chain(schemes).collect());
            let run = |devices: &[&str]| {
                let mut options = options(Scheme::None, &map(&checkpoint, devices), None);
                options.quantize = Some(Quantize::Rules(rules.clone()));
                let plan = Plan::new(&checkpoint, &machine(), &options).unwrap();
                let mut model = load(&plan, false).unwrap();
                for device in &model.report.devices {
                    assert_eq!(device.measured, device.planned, "{name}, {mixture:?}: {}", device.id);
                }
                logits(&mut model, &sequence)
            };
            let one = run(&["cuda:0"]);
            assert_eq!(run(&["cuda:0", "cuda:1", "cuda:0", "cuda:1"]), one, "{name}, {mixture:?}");
            // The CPU rounds activations to int8 where weights are quantized.
            for (ours, theirs) in one.iter().zip(&run(&["cpu"])) {
                let difference = difference(ours, theirs);
                assert!(difference < 0.1, "{name}, {mixture:?}: {difference}");
            }
        }
    }
    fake.assert_nothing_left("mixtures");
}

#[test]
fn what_is_packed_already_is_what_a_gpu_packs() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let original = Checkpoint::open(fixture("parity/llama_bf16")).unwrap();
    let sequence: Vec<u32> = numbers(&expected("parity/llama_bf16")["input_ids"]);
    let map = map(&original, &["cuda:0", "cuda:0", "cuda:1", "cpu", "cuda:1"]);
    for scheme in [Scheme::Int8, Scheme::Int4, Scheme::Nl4] {
        let directory = tempfile::tempdir().unwrap();
        let output = &directory.path().join("model");
        let save = SaveOptions {
            scheme,
            format: SaveFormat::Evenkeel,
            output: output.clone(),
            shard_size: DEFAULT_SHARD_SIZE,
            pool: Arc::default(),
            cancel: Cancel::new(),
        };
        save_quantized(&original, &save, |_| ()).unwrap();
        let packed = Checkpoint::open(output).unwrap();
        let run = |checkpoint: &Checkpoint| {
            let options = options(scheme, &map, None);
            let plan = Plan::new(checkpoint, &machine(), &options).unwrap();
            logits(&mut load(&plan, true).unwrap(), &sequence)
        };
        assert_eq!(run(&packed), run(&original), "{scheme}");
        fake.assert_nothing_left(scheme.name());
    }
}

#[test]
fn a_token_takes_these_launches() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    // For each block, and beside them: the embedding and its positions, the last norm, and the head. What is
    // not quantized is normalized, and made f16, by launches of their own.
    for (name, each_block, beside) in [
        ("parity/llama", 6, 3),
        ("parity/phi3", 6, 3),
        ("parity/gpt2", 6, 4),
        ("parity/gemma2", 8, 3),
        ("parity/qwen3", 6, 3),
    ] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        for (scheme, more) in [(Scheme::None, [2, 1]), (Scheme::Int4, [0, 0])] {
            let plan = plan(&checkpoint, scheme, &map(&checkpoint, &["cuda:0"]), Some(64));
            let mut model = load(&plan, false).unwrap();
            let before = fake.stat("launches", 0);
            logits(&mut model, &[1]);
            let launches = fake.stat("launches", 0) - before;
            let blocks = checkpoint.config.layers.len() as u64;
            let wanted = (each_block + more[0]) * blocks + beside + more[1];
            assert_eq!(launches, wanted, "{name} {scheme}: {blocks} blocks");
        }
    }
}

#[test]
fn a_step_that_is_repeated_gives_what_its_launches_do() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let tokens: Vec<u32> = (0..270).map(|at| at * 7 % 50).collect();
    // With room for more than 128 tokens attention is split.
    for (name, graphs, context) in
        [("parity/gpt2", true, 40), ("parity/llama31", true, 270), ("parity/qwen3_moe", false, 40)]
    {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let run = |devices: &[&str], keep: &str, each: bool| {
            fake.set("GRAPHS", keep);
            let plan = plan(&checkpoint, Scheme::Int8, &map(&checkpoint, devices), Some(context));
            let mut model = load(&plan, true).unwrap();
            let before = fake.stat("graph_launches", 0);
            model.limit_prefill_chunk(1);
            if each {
                model.launch_each_kernel();
            }
            let all = logits(&mut model, &tokens[..context]);
            (all, fake.stat("graph_launches", 0) - before)
        };
        let (launched, none) = run(&["cuda:0"], "0", false);
        assert_eq!(none, 0);
        assert_eq!(run(&["cuda:0"], "1", true), (launched.clone(), 0));
        for (devices, streams) in [(&["cuda:0"][..], "eager"), (&["cuda:0", "cuda:1", "cuda:0"][..], "lazy")] {
            fake.set("STREAMS", streams);
            let (repeated, count) = run(devices, "1", false);
            assert_eq!(repeated, launched, "{name} {streams}");
            assert_eq!(count > 0, graphs, "{name} {streams}: {count}");
        }
        fake.set("STREAMS", "eager");
        fake.assert_nothing_left(name);
    }
}

/// `parity/llama` with the first of its key-value heads alone.
fn with_one_kv_head() -> tempfile::TempDir {
    let (from, to) = (fixture("parity/llama"), tempfile::tempdir().unwrap());
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    config["num_key_value_heads"] = 1.into();
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(from.join("tokenizer.json"), to.path().join("tokenizer.json")).unwrap();
    let files = std::fs::read_dir(&from).unwrap().map(|file| file.unwrap().path());
    let shards: Vec<_> = files
        .filter(|file| file.extension().is_some_and(|e| e == "safetensors"))
        .map(|file| std::fs::read(file).unwrap())
        .collect();
    let tensors = shards.iter().flat_map(|shard| SafeTensors::deserialize(shard).unwrap().tensors());
    let tensors = tensors.map(|(name, tensor)| {
        let heads = if name.contains("k_proj") || name.contains("v_proj") { 2 } else { 1 };
        let (mut shape, len) = (tensor.shape().to_vec(), tensor.data().len() / heads);
        shape[0] /= heads;
        (name, TensorView::new(tensor.dtype(), shape, &tensor.data()[..len]).unwrap())
    });
    safetensors::serialize_to_file(tensors, None, &to.path().join("model.safetensors")).unwrap();
    to
}

#[test]
fn an_int8_cache_of_one_head_may_have_any_length() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let directory = with_one_kv_head();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens: Vec<u32> = (0..101).map(|at| at * 7 % 50).collect();
    for context in [31, 101] {
        let load = |device: &str| {
            let mut options = options(Scheme::None, &map(&checkpoint, &[device]), Some(context));
            options.kv_cache = Some(KvDtype::Int8);
            let plan = Plan::new(&checkpoint, &machine(), &options).unwrap();
            load(&plan, false).unwrap()
        };
        let exact = logits(&mut load("cpu"), &tokens[..context]);
        for capability in ["7.5", "8.6"] {
            fake.set("CC", capability);
            let mut model = load("cuda:0");
            for chunk in [context, 5] {
                model.limit_prefill_chunk(chunk);
                let what = format!("context {context}, chunks of {chunk}, {capability}");
                assert_all_near(&what, &logits(&mut model, &tokens[..context]), &exact, false);
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
        for scheme in if name == "ferris-7m" { &Scheme::AUTOMATIC[..2] } else { &Scheme::AUTOMATIC } {
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
                let model = load(&plan, false).unwrap();
                let gpus = plan.devices.iter().filter(|device| device.id.is_gpu() && device.modules > 0).count();
                assert_eq!(
                    fake.stat("host_bytes", 0),
                    gpus as u64 * footprint::CudaRows::host(extent_of(&plan)).0,
                    "{name} {scheme} {map}"
                );
                for device in &model.report.devices {
                    if let DeviceId::Cuda(index) = device.id {
                        let peak = Bytes(fake.stat("peak_bytes", i32::try_from(index).unwrap()));
                        let planned = plan.devices.iter().find(|planned| planned.id == device.id).unwrap();
                        assert_eq!(peak, planned.allocated(), "{name} {scheme} {map}: {}", device.id);
                    }
                    let near = device.planned.0.abs_diff(device.measured.0) * 100 <= device.planned.0;
                    assert!(near, "{name} {scheme} {map}: {} {} {}", device.id, device.planned, device.measured);
                }
                drop(model);
                fake.assert_nothing_left(map);
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
        let Err(error) = load(&plan, false) else {
            assert!(call > 10, "the load made {call} allocations only");
            break;
        };
        assert!([ErrorKind::DoesNotFit, ErrorKind::Shortfall].contains(&error.kind()), "{error}");
        assert!(error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY (out of memory)"), "{error}");
        fake.assert_nothing_left(&error.to_string());
        assert_eq!(leaked(), before, "{error}");
    }
    fake.set("FAIL_ALLOC", "1");
    let error = load(&plan, false).err().unwrap();
    let text = error.to_string();
    assert!(text.starts_with("cuda:0 cannot give ") && text.contains(" for the model, 24.0 GiB are free"), "{text}");
    assert!(matches!(error.cause(), Some(DeviceError::Refused { free: Some(Bytes(free)), .. }) if *free == 24 << 30));
    assert!(!error.hints().iter().any(|hint| hint.to_string().contains("another process")), "{:?}", error.hints());
}

#[test]
fn memory_that_is_taken_after_the_plan_is_noticed_before_anything_is() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("ferris-7m")).unwrap();
    let plan = plan(&checkpoint, Scheme::None, r#"{"": "cuda:1"}"#, None);
    fake.set("USED", "0,8190MiB");
    let error = load(&plan, false).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Shortfall);
    let needed = plan.devices[1].allocated() + footprint::CUDA_GRANULE + footprint::cuda_graphs(extent_of(&plan));
    let (free, missing) = (Bytes(2 << 20), needed - Bytes(2 << 20));
    assert_eq!(
        error.to_string(),
        format!("cuda:1 has {free} free, {missing} less than the {needed} that were planned")
    );
    let cause = error.cause::<DeviceError>().unwrap();
    assert_eq!(*cause, DeviceError::Shortfall { device: DeviceId::Cuda(1), planned: needed, free });
    assert_eq!(error.hints()[0].settings(), [Setting::Replan]);
    assert!(error.hints()[0].to_string().starts_with("another process has taken memory; "), "{:?}", error.hints());
    fake.assert_nothing_left("nothing was taken");
    fake.set("USED", "0");
    assert!(load(&plan, false).is_ok());
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
        let error = load(&plan, false).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains(shown), "{error}");
        fake.assert_nothing_left("the kernel failed");

        let mut model = load(&plan, false).unwrap();
        fake.set("FAIL_LAUNCH", failure);
        let error = model.generate_from(&[1, 2, 3], GenerateOptions::default()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        assert!(error.to_string().starts_with("cuda:0 "), "{error}");
        drop(model);
        fake.assert_nothing_left("the kernel failed");
    }
    assert!(load(&plan, false).is_ok());
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
        for scheme in [Scheme::Int8, Scheme::Int4, Scheme::Nl4] {
            let error = load(&plan(&checkpoint, scheme, r#"{"": "cuda:1"}"#, None), false).err().unwrap();
            assert_eq!(error.to_string(), format!("tensor `{TENSOR}` has {shown} at row 3, column 5"));
            assert_eq!(error.kind(), ErrorKind::Input);
            fake.assert_nothing_left("the load failed");
        }
    }
}

#[test]
fn a_load_can_be_stopped() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let plan = plan(&checkpoint, Scheme::Int4, r#"{"": "cuda:0"}"#, None);
    let cancel = Cancel::new();
    let options = LoadOptions { cancel: cancel.clone(), ..LoadOptions::default() };
    let result = plan.load(&options, |event| {
        if let LoadEvent::Placed { .. } = event {
            cancel.cancel();
        }
    });
    assert_eq!(result.err().unwrap().kind(), ErrorKind::Interrupted);
    fake.assert_nothing_left("the load was stopped");
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
        "normalize: parameter 9 points to memory of device 1, but the kernel runs on device 0"
    );
}

/// The tokens of a generation and why it ended, or the error.
fn generated(model: &mut Model, options: &GenerateOptions) -> (Vec<u32>, String) {
    let mut generation = model.generate_from(&[1, 2, 3], options.clone()).unwrap();
    let mut tokens = Vec::new();
    for piece in generation.by_ref() {
        match piece {
            Ok(piece) => tokens.extend(piece.token),
            Err(e) => return (tokens, e.to_string()),
        }
    }
    let report = generation.report();
    assert_eq!(report.generated_tokens, tokens.len());
    (tokens, format!("{:?}", report.finish))
}

#[test]
fn tokens_that_run_ahead_are_those_of_one_step_after_the_other() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for (name, whole) in
        [("parity/gpt2", true), ("parity/llama31", true), ("parity/gemma2", true), ("parity/qwen3_moe", false)]
    {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let load_over = |devices: &[&str]| {
            load(&plan(&checkpoint, Scheme::None, &map(&checkpoint, devices), Some(24)), true).unwrap()
        };
        let runs = [("lazy", "1"), ("eager", "0"), ("eager", "1")];
        for (sampling, (streams, graphs)) in samplings().into_iter().zip(runs) {
            let options = GenerateOptions { sampling, ignore_eos: true, ..GenerateOptions::default() };
            let most = |tokens| GenerateOptions { max_new_tokens: Some(tokens), ..options.clone() };
            // Over two GPUs the host waits for every token.
            fake.set("STREAMS", "eager");
            let mut apart = load_over(&["cuda:0", "cuda:1"]);
            let (tokens, finish) = generated(&mut apart, &options);
            assert_eq!((tokens.len(), &*finish), (22, "Context"), "{name}, {options:?}");
            let what = format!("{name}, {options:?}, {streams}, graphs {graphs}");
            fake.set("STREAMS", streams);
            fake.set("GRAPHS", graphs);
            let mut model = load_over(&["cuda:0"]);
            let before = fake.stat("graph_launches", 0);
            assert_eq!(generated(&mut model, &options), (tokens.clone(), finish.clone()), "{what}");
            let repeated = fake.stat("graph_launches", 0) - before;
            // All but the prompt, and of choices that the load did not make ready for the first step.
            let wanted = if options.sampling == Sampling::greedy() { 21 } else { 20 };
            assert_eq!(repeated, if whole && graphs == "1" { wanted } else { 0 }, "{what}");

            // A generation that is left leaves nothing to the next one, whatever ends it.
            let left: Vec<u32> = model
                .generate_from(&[1, 2, 3], options.clone())
                .unwrap()
                .take(4)
                .map(|p| p.unwrap().token.unwrap())
                .collect();
            assert_eq!(left, tokens[..4], "{what}");
            assert_eq!(generated(&mut model, &most(9)), (tokens[..9].to_vec(), "MaxNewTokens".into()), "{what}");
            assert_eq!(logits(&mut model, &tokens[..5]), logits(&mut apart, &tokens[..5]), "{what}");
            let at = tokens.iter().position(|token| *token == tokens[6]).unwrap();
            model.eos_token_ids = vec![tokens[at]];
            let ended = generated(&mut model, &GenerateOptions { ignore_eos: false, ..options.clone() });
            assert_eq!(ended, (tokens[..=at].to_vec(), "EndOfText".into()), "{what}");
            assert_eq!(generated(&mut model, &options), (tokens.clone(), finish.clone()), "{what}");
        }
        fake.assert_nothing_left(name);
    }
}

#[test]
fn one_step_runs_ahead_and_no_more() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let plan = plan(&checkpoint, Scheme::None, r#"{"": "cuda:0"}"#, None);
    let mut model = load(&plan, false).unwrap();
    let mut launches = |options: &GenerateOptions| {
        let before = fake.stat("launches", 0);
        let tokens = generated(&mut model, options).0;
        (fake.stat("launches", 0) - before, tokens)
    };
    let most =
        |tokens| GenerateOptions { max_new_tokens: Some(tokens), ignore_eos: true, ..GenerateOptions::default() };
    let (three, _) = launches(&most(3));
    let (four, _) = launches(&most(4));
    let (eight, tokens) = launches(&most(8));
    let step = four - three;
    assert_eq!(eight, four + 4 * step);
    // The end of a text is known only when the step behind it is under way.
    let at = tokens.iter().position(|token| *token == tokens[3]).unwrap();
    model.eos_token_ids = vec![tokens[3]];
    let before = fake.stat("launches", 0);
    assert_eq!(generated(&mut model, &GenerateOptions::default()).0, tokens[..=at]);
    assert_eq!(fake.stat("launches", 0) - before, three + (at as u64 - 1) * step);
}

#[test]
fn a_logit_that_is_no_number_is_reported_behind_its_token() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    let broken = Broken::sharded();
    let run = |devices: &[&str]| {
        let checkpoint = Checkpoint::open(broken.directory()).unwrap();
        let plan = plan(&checkpoint, Scheme::None, &map(&checkpoint, devices), None);
        let options = GenerateOptions { max_new_tokens: Some(12), ignore_eos: true, ..GenerateOptions::default() };
        generated(&mut load(&plan, false).unwrap(), &options)
    };
    let (tokens, _) = run(&["cuda:0"]);
    // The row of a token that is generated: what comes behind it is no number.
    let at = (4..12).find(|at| !tokens[..*at].contains(&tokens[*at])).unwrap();
    let checkpoint = Checkpoint::open(broken.directory()).unwrap();
    let tensor = &checkpoint.catalog["model.embed_tokens.weight"];
    let shard = &checkpoint.shards[tensor.shard];
    let mut bytes = broken.read(shard);
    let row = usize::try_from(tensor.range.start + 4 * tensor.shape[1] * u64::from(tokens[at])).unwrap();
    bytes[row..row + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    broken.write(shard, &bytes);
    for devices in [&["cpu"][..], &["cuda:0", "cuda:1"], &["cuda:0"]] {
        let (before, error) = run(devices);
        assert_eq!(before, tokens[..=at], "{devices:?}");
        assert_eq!(error, format!("a logit behind token {} is not a number", 3 + at + 1), "{devices:?}");
    }
    fake.assert_nothing_left("the model failed");
}

#[test]
fn the_host_chooses_the_tokens_that_a_gpu_does() {
    let Some((_, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("parity/gemma2")).unwrap();
    let plan = plan(&checkpoint, Scheme::None, &map(&checkpoint, &["cuda:0"]), None);
    let mut model = load(&plan, false).unwrap();
    model.limit_prefill_chunk(1);
    for sampling in samplings() {
        let options = GenerateOptions { sampling, ignore_eos: true, max_new_tokens: Some(12), ..Default::default() };
        let (tokens, _) = generated(&mut model, &options);
        let choice = options.sampling.choice();
        let (mut chooser, mut draws) = (Chooser::new(choice, &[1, 2, 3]), Draws::new(options.sampling.seed));
        let all = logits(&mut model, &[&[1, 2, 3], &tokens[..11]].concat());
        let ours = all[2..].iter().map(|logits| chooser.choose(&mut logits.clone(), draws.draw()).token);
        assert_eq!(ours.collect::<Vec<_>>(), tokens, "{choice:?}");
    }
}

#[test]
fn a_seed_gives_the_same_tokens_on_a_gpu_and_on_the_cpu() {
    let Some((_, _turn)) = fake_cuda::load(GPUS) else { return };
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let drawn = Sampling { temperature: 1.0, ..Sampling::greedy() };
    for sampling in [
        Sampling { top_k: Some(3), ..drawn.clone() },
        Sampling { top_k: Some(1), ..drawn.clone() },
        Sampling { temperature: 0.5, top_p: Some(0.05), ..drawn.clone() },
        Sampling { min_p: Some(0.7), ..drawn.clone() },
        drawn,
    ] {
        let [gpu, cpu] = [&["cuda:0"], &["cpu"]].map(|devices| {
            let plan = plan(&checkpoint, Scheme::None, &map(&checkpoint, devices), None);
            let mut model = load(&plan, false).unwrap();
            let token = |seed| {
                let sampling = Sampling { seed, ..sampling.clone() };
                let options = GenerateOptions { sampling, max_new_tokens: Some(1), ..GenerateOptions::default() };
                generated(&mut model, &options).0[0]
            };
            (0..16).map(token).collect::<Vec<_>>()
        });
        assert_eq!(gpu, cpu, "{sampling:?}");
    }
}

/// On the CPU the tokens are those of Transformers; see tests/as_found.rs.
#[test]
fn frequencies_follow_the_length_of_a_sequence() {
    let Some((_, _turn)) = fake_cuda::load(GPUS) else { return };
    let factors = |by: f64, from: f64| (0..8).map(|at| from + by * f64::from(at)).collect::<Vec<_>>();
    let longrope = json!({"original_max_position_embeddings": 16, "rope_scaling": {
        "type": "longrope", "short_factor": factors(0.1, 1.0), "long_factor": factors(0.5, 2.0)}});
    let dynamic = json!({"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}});
    for (name, keys) in [("parity/phi3", longrope), ("parity/llama", dynamic)] {
        let bent = Bent::of(name);
        bent.configure(&keys);
        let tokens: Vec<u32> = (0..40).map(|at| 3 + at * 7 % 300).collect();
        let (checkpoint, mut exact) = (bent.open().unwrap(), bent.load(None));
        let plan = plan(&checkpoint, Scheme::None, r#"{"": "cuda:0"}"#, None);
        let mut model = load(&plan, false).unwrap();
        // A prompt that is short, the steps over the border, and a short prompt again.
        for _ in 0..2 {
            for (start, end) in [(0, 10), (10, 11), (11, 12), (12, 16), (16, 17), (17, 18), (18, 19), (19, 40)] {
                let pages: Vec<u32> = (0..64).collect();
                let run = Run { slot: 0, pages: &pages, position: start, tokens: end - start, length: end };
                let logits = |model: &mut Model| {
                    let pipeline = model.core().pipeline();
                    pipeline.run(&tokens[start..end], &[run]).unwrap();
                    pipeline.logits(&[end - start - 1]).unwrap().to_vec()
                };
                assert_near(&format!("{name}, {end} tokens"), &logits(&mut model), &logits(&mut exact));
            }
        }
        // Steps that run ahead stop at the border.
        let prompt = &tokens[..10];
        assert_eq!(greedy(&mut model, prompt, 12), greedy(&mut exact, prompt, 12), "{name}");
    }
}

/// `up_proj` times 2^`power` and `down_proj` by as much less: the same model, with larger values between.
fn with_larger_values(name: &str, [up, down]: [&str; 2], power: i32) -> Bent {
    let bent = Bent::of(name);
    let mut tensors = bent.tensors();
    for (name, tensor) in &mut tensors {
        let power = if name.contains(up) { power } else { -power * i32::from(name.contains(down)) };
        tensor.values.iter_mut().for_each(|value| *value *= 2f32.powi(power));
    }
    bent.without_weights();
    let bytes = |tensor: &Tensor| kernels::encode(WeightDtype::Bf16, &tensor.values);
    bent.save_as("model.safetensors", Dtype::BF16, &tensors, bytes);
    bent
}

/// The tokens behind a prompt, or the error.
fn tokens_or_error(
    bent: &Bent,
    devices: &[&str],
    change: impl FnOnce(&mut PlanOptions, &mut GenerateOptions),
) -> evenkeel::Result<Vec<u32>> {
    let checkpoint = bent.open().unwrap();
    let mut generate = GenerateOptions { max_new_tokens: Some(8), ignore_eos: true, ..GenerateOptions::default() };
    let mut options = options(Scheme::None, &map(&checkpoint, devices), None);
    change(&mut options, &mut generate);
    let mut model = load(&Plan::new(&checkpoint, &machine(), options).unwrap(), false).unwrap();
    let prompt: Vec<u32> = (3..20).collect();
    model.generate_from(&prompt, generate)?.map(|piece| piece.map(|piece| piece.token.unwrap())).collect()
}

#[test]
fn values_beyond_the_range_of_f16_between_gate_and_down_change_nothing() {
    let Some((_, _turn)) = fake_cuda::load(GPUS) else { return };
    for name in ["parity/llama", "parity/gemma2", "parity/qwen3_moe"] {
        let sequence: Vec<u32> = numbers(&expected(name)["input_ids"]);
        for scheme in [Scheme::None, Scheme::Int8] {
            let run = |power: i32, device: &str, chunk: usize| {
                let checkpoint = with_larger_values(name, ["up_proj", "down_proj"], power);
                let checkpoint = checkpoint.open().unwrap();
                let plan = plan(&checkpoint, scheme, &map(&checkpoint, &[device]), None);
                let mut model = load(&plan, false).unwrap();
                model.limit_prefill_chunk(chunk);
                logits(&mut model, &sequence)
            };
            // The CPU rounds activations to int8 where weights are quantized.
            let exact = run(0, if scheme == Scheme::None { "cpu" } else { "cuda:0" }, sequence.len());
            for (power, chunk) in [12, 13, 15].into_iter().flat_map(|power| [(power, sequence.len()), (power, 1)]) {
                let what = format!("{name}, {scheme}, 2^{power}, chunks of {chunk}");
                assert_all_near(&what, &run(power, "cuda:0", chunk), &exact, name == "parity/qwen3_moe");
            }
        }
    }
}

#[test]
fn what_no_f16_holds_ends_with_an_error_that_says_so() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for (name, ends, power) in [
        ("parity/llama", ["up_proj", "down_proj"], 30),
        ("parity/gemma2", ["up_proj", "down_proj"], 30),
        ("parity/qwen3_moe", ["up_proj", "down_proj"], 30),
        // Of gemma2 scores and logits have soft caps.
        ("parity/gemma2", ["k_proj", "q_proj"], 24),
        ("parity/llama", ["v_proj", "o_proj"], 24),
    ] {
        let bent = with_larger_values(name, ends, power);
        for (devices, kv_cache, sampling) in [
            (&["cuda:0"][..], KvDtype::F16, 0),
            (&["cuda:0"], KvDtype::Int8, 1),
            (&["cuda:1", "cuda:0", "cpu"], KvDtype::Bf16, 2),
        ] {
            let error = tokens_or_error(&bent, devices, |options, generate| {
                options.kv_cache = Some(kv_cache);
                generate.sampling = samplings()[sampling].clone();
            });
            let (what, error) = (format!("{name}, {ends:?}, {devices:?}"), error.unwrap_err());
            assert_eq!(error.to_string(), "a logit behind token 17 is not a number", "{what}");
            let hint = &error.hints()[0];
            assert!(hint.to_string().contains("f16, whose largest value is 65,504"), "{what}: {hint}");
            assert_eq!(hint.settings(), [Setting::Cpu, Setting::KvCache("bf16")], "{what}");
        }
        // What the hint says helps, and the error has no such hint where there is no GPU.
        let run = |bent: &Bent| tokens_or_error(bent, &["cpu"], |options, _| options.kv_cache = Some(KvDtype::Bf16));
        let same = with_larger_values(name, ends, 0);
        assert_eq!(run(&bent).unwrap(), run(&same).unwrap(), "{name}, {ends:?}");
    }
    fake.assert_nothing_left("errors");
}
