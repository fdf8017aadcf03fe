//! Checkpoints that `quantize` writes: what they hold, how they load, and what a failure leaves.

#[path = "support/command.rs"]
mod command;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use command::{evenkeel, run, run_with, stderr, stdout};
use evenkeel::bytes::Bytes;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::export::{DEFAULT_SHARD_SIZE, SaveFormat, SaveOptions, save_quantized};
use evenkeel::plan::{Plan, PlanOptions, Quantize};
use evenkeel::quant::Scheme;
use evenkeel::{Cancel, Error, ErrorKind};
use support::{fixture, load_plan, roomy};

const PACKED: [Scheme; 3] = [Scheme::Int8, Scheme::Int4, Scheme::Nl4];

/// A fixture quantized into a directory of its own.
fn quantized(name: &str, scheme: Scheme, shard_size: Bytes) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("model");
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let (format, cancel) = (SaveFormat::Evenkeel, Cancel::new());
    let options = SaveOptions { scheme, format, output: output.clone(), shard_size, pool: Arc::default(), cancel };
    save_quantized(&checkpoint, &options, |_| ()).unwrap();
    (directory, output)
}

fn plan(checkpoint: &Checkpoint, quantize: Option<Quantize>) -> evenkeel::Result<Plan> {
    Plan::new(checkpoint, &roomy(), &PlanOptions { quantize, context: Some(64), ..PlanOptions::default() })
}

/// The logits behind some tokens, as bits.
fn logits(plan: &Plan) -> Vec<u32> {
    let mut model = load_plan(plan).unwrap();
    let mut all = Vec::new();
    model.score(&[3, 200, 41, 5, 77], |_, logits| all.extend(logits.iter().map(|logit| logit.to_bits()))).unwrap();
    for device in &model.report.devices {
        assert_eq!(device.planned, device.measured, "{}", device.id);
    }
    all
}

#[test]
fn what_was_quantized_before_is_what_a_load_makes() {
    for name in ["ferris-7m", "parity/gpt2", "parity/llama", "parity/phi3", "parity/qwen3_moe"] {
        for scheme in PACKED {
            let original = Checkpoint::open(fixture(name)).unwrap();
            let on_load = plan(&original, Some(scheme.into())).unwrap();
            // One file, and as many as there are tensors.
            for shard_size in [DEFAULT_SHARD_SIZE, Bytes(1)] {
                let (_directory, output) = quantized(name, scheme, shard_size);
                let packed = Checkpoint::open(&output).unwrap();
                assert_eq!(packed.shards.len() > 1, shard_size == Bytes(1));
                let before = plan(&packed, None).unwrap();
                assert_eq!(before.quantize, on_load.quantize);
                let weights = |plan: &Plan| plan.modules.iter().map(|module| module.weights).collect::<Vec<_>>();
                assert_eq!(weights(&before), weights(&on_load), "{name}, {scheme}");
                for quantize in [Quantize::Auto, scheme.into()] {
                    assert_eq!(plan(&packed, Some(quantize)).unwrap(), before);
                }
                assert!(logits(&before) == logits(&on_load), "{name}, {scheme}");
            }
        }
    }
}

#[test]
fn the_command_writes_what_generate_reads() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("ferris-7m-int4");
    let output = output.to_str().unwrap();
    let done = run(&["quantize", "tests/fixtures/ferris-7m", "--quantize", "int4", "--output", output]);
    assert!(stdout(&done).starts_with(&format!("wrote `{output}`: 4.3 MiB for 14.0 MiB, 4.85 bits")), "{done:?}");
    let prompt = ["--prompt", "Ownership is", "--max-new-tokens", "40"];
    let before = run(&[&["generate", output], &prompt[..]].concat());
    let on_load = run(&[&["generate", "tests/fixtures/ferris-7m", "--quantize", "int4"], &prompt[..]].concat());
    assert!(before.status.success() && stdout(&before) == stdout(&on_load), "{}", stderr(&before));
    let again = run(&["quantize", "tests/fixtures/ferris-7m", "--quantize", "int8", "--output", output]);
    assert_eq!(again.status.code(), Some(2));
    assert!(stderr(&again).contains("is there already"), "{}", stderr(&again));
    for (arguments, message) in [
        (&["generate", output, "--quantize", "int8", "--prompt", "x"][..], "it cannot be loaded as int8"),
        (&["quantize", output, "--quantize", "int8", "--output", "/nowhere/x"], "is quantized already"),
        (&["quantize", "tests/fixtures/ferris-7m", "--quantize", "none", "--output", "/nowhere/x"], "`none` leaves"),
        (&["quantize", "tests/fixtures/ferris-7m", "--quantize", "int4", "--output", "/nowhere/x"], "cannot write"),
    ] {
        let refused = run(arguments);
        assert!(!refused.status.success() && stderr(&refused).contains(message), "{}", stderr(&refused));
    }
}

/// What a load of a checkpoint with other bytes says.
fn broken(change: impl FnOnce(&Path)) -> Error {
    let (_directory, output) = quantized("parity/llama", Scheme::Int4, DEFAULT_SHARD_SIZE);
    change(&output);
    let load = || {
        let checkpoint = Checkpoint::open(&output)?;
        load_plan(&plan(&checkpoint, None)?)
    };
    load().err().unwrap()
}

fn edit(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    fs::write(file, text.replace(from, to)).unwrap();
}

#[test]
fn packed_files_are_not_trusted() {
    for (from, to, message) in [
        (r#""version": 1"#, r#""version": 2"#, "only version 1 of packed checkpoints is read"),
        (r#""evenkeel""#, r#""gptq""#, "already quantized (`gptq`)"),
        (r#""": "int4""#, r#""": "int3""#, "config.json has a `quantization_config` of another kind"),
        (r#""": "int4""#, r#""": 4"#, "text is wanted here"),
        (r#""": "int4""#, r#""": "int8""#, "contradicts its config.json"),
        (r#""": "int4""#, r#""": "none""#, "contradicts its config.json"),
        (r#""lm_head""#, r#""head": "int8", "lm_head""#, "`quantize` names unknown module `head`"),
        (r#""hidden_size": "#, r#""hidden_size": 1"#, "has shape [64], not [164]"),
    ] {
        let error = broken(|directory| edit(&directory.join("config.json"), from, to));
        assert!(error.to_string().contains(message), "{from} → {to}: {error}");
        assert_eq!(error.kind(), ErrorKind::Input);
    }
    // The last 64 bytes of a packed matrix are scales and padding.
    let error = broken(|directory| {
        let checkpoint = Checkpoint::open(directory).unwrap();
        let tensor = &checkpoint.catalog["model.layers.1.mlp.down_proj.weight"];
        let path = directory.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let rows = checkpoint.config.hidden_size * 2;
        let scales = usize::try_from(tensor.range.end).unwrap() - rows.next_multiple_of(64);
        bytes[scales + 6..scales + 8].copy_from_slice(&0x7c00u16.to_le_bytes());
        fs::write(path, bytes).unwrap();
    });
    let wanted = "tensor `model.layers.1.mlp.down_proj.weight` has a scale at row 3 that is not finite";
    assert_eq!(error.to_string(), wanted);
}

/// What stands in `directory`.
fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn quantize_llama(output: &Path) -> Command {
    evenkeel(&["quantize", "tests/fixtures/parity/llama", "--quantize", "int4", "--output", output.to_str().unwrap()])
}

#[test]
fn the_failure_of_any_write_leaves_nothing() {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fail_write-{}.so", std::process::id()));
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o", library.to_str().unwrap(), "tests/support/fail_write.c"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    assert!(built.unwrap().success());
    for call in 1.. {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("model");
        let mut command = quantize_llama(&output);
        command.env("LD_PRELOAD", &library).env("FAIL_WRITE_AT", call.to_string());
        let done = run_with(command, b"");
        if done.status.success() {
            assert!(call > 30, "only {call} writes, syncs and renames");
            assert_eq!(names(directory.path()), ["model"]);
            break;
        }
        assert_eq!(done.status.code(), Some(3), "call {call}: {}", stderr(&done));
        assert!(stderr(&done).contains("No space left on device"), "call {call}: {}", stderr(&done));
        if output.exists() {
            // Only the sync of the directory that it stands in comes after it has its name.
            let checkpoint = Checkpoint::open(&output).unwrap();
            load_plan(&plan(&checkpoint, None).unwrap()).unwrap();
        } else {
            assert_eq!(names(directory.path()), [""; 0], "call {call}");
        }
    }
    fs::remove_file(library).unwrap();
}

#[test]
fn a_limit_of_the_size_of_files_leaves_nothing_under_the_name() {
    for limit in [16, 64] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("model");
        let command = quantize_llama(&output);
        let words: Vec<_> = command.get_args().map(|word| word.to_str().unwrap().to_owned()).collect();
        let script = format!(r#"ulimit -f {limit}; exec "$0" "$@""#);
        let mut limited = Command::new("sh");
        limited.args(["-c", &script, command.get_program().to_str().unwrap()]).args(words);
        limited.current_dir(env!("CARGO_MANIFEST_DIR"));
        let done = run_with(limited, b"");
        assert_eq!(done.status.code(), Some(3), "{limit}: {}", stderr(&done));
        assert_eq!(names(directory.path()), [""; 0], "{limit}");
    }
}

#[test]
fn it_can_be_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let options = SaveOptions {
        scheme: Scheme::Int8,
        format: SaveFormat::Evenkeel,
        output: directory.path().join("model"),
        shard_size: DEFAULT_SHARD_SIZE,
        pool: Arc::default(),
        cancel: Cancel::new(),
    };
    options.cancel.cancel();
    let error = save_quantized(&checkpoint, &options, |_| ()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Interrupted);
    assert_eq!(names(directory.path()), [""; 0]);
}
