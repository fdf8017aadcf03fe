//! The whole binary over GPUs that are not there.

#[path = "support/command.rs"]
mod command;
#[path = "support/fake_cuda.rs"]
mod fake_cuda;
mod support;

use std::path::Path;
use std::process::{Command, Output};

use command::{evenkeel, run_with, stderr, stdout};
use serde_json::Value;
use support::bent::Bent;

const FERRIS: &str = "tests/fixtures/ferris-7m";
const LLAMA: &str = "tests/fixtures/parity/llama";

/// The binary with the stand-in first on its library path, under these settings.
fn on_gpus(arguments: &[&str], settings: &[(&str, &str)]) -> Option<Command> {
    let mut command = evenkeel(arguments);
    command.env("LD_LIBRARY_PATH", fake_cuda::directory()?).env("FAKE_CUDA_QUIET", "1");
    command.env("FAKE_CUDA_DEVICES", "24GiB,8GiB").env_remove("CUDA_VISIBLE_DEVICES");
    for (key, value) in settings {
        command.env(format!("FAKE_CUDA_{key}"), value);
    }
    Some(command)
}

fn map(json: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("map.json");
    std::fs::write(&path, json).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (directory, path)
}

/// The stand-in's counters at the end of the run.
fn report(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// An error on standard error, in one line with its hints, and exit code 3.
#[track_caller]
fn assert_refused(output: &Output, message: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains(message), "{text}");
    assert!(text.lines().any(|line| line.starts_with("error: ")), "{text}");
    assert_eq!(stdout(output), "");
}

#[test]
fn generate_over_two_gpus_and_the_cpu_says_what_the_cpu_alone_says() {
    let (directory, map) = map(r#"{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0,
        "model.layers.2": "cuda:1", "model.layers.3": "cuda:1", "model.layers.4": 1, "model.layers.5": "cpu",
        "model.layers.6": "cpu", "model.layers.7": "cuda:0", "model.norm": "cuda:1", "lm_head": 0}"#);
    let counters = directory.path().join("report.json");
    let generate = ["generate", FERRIS, "--prompt", "Ownership is", "--max-new-tokens", "12", "--format", "json"];
    let cpu = directory.path().join("cpu.json");
    std::fs::write(&cpu, r#"{"": "cpu"}"#).unwrap();
    let alone = run_with(evenkeel(&[&generate[..], &["--device-map", cpu.to_str().unwrap()]].concat()), b"");
    let arguments = [&generate[..], &["--device-map", &map]].concat();
    let Some(command) = on_gpus(&arguments, &[("REPORT", counters.to_str().unwrap())]) else { return };
    let output = run_with(command, b"");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let lines = |output: &Output| -> Vec<Value> {
        stdout(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (ours, theirs) = (lines(&output), lines(&alone));
    let tokens = |lines: &[Value]| lines.iter().map(|line| line["token"].clone()).collect::<Vec<_>>();
    assert_eq!(tokens(&ours), tokens(&theirs));
    let report = report(&counters);
    for (device, loaded) in ours.last().unwrap()["loaded"]["devices"].as_array().unwrap().iter().take(2).enumerate() {
        assert_eq!(loaded["planned"], loaded["measured"]);
        let counted = &report["devices"][device];
        assert_eq!(counted["peak_bytes"], loaded["planned"], "{report}");
        assert!(counted["launches"].as_u64().unwrap() > 100 && counted["p2p_bytes"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(counted["live_bytes"], 0, "{report}");
    }
    // Of the head's 12 steps an index and its logit return, not the logits.
    let vocabulary = 4096 * 4;
    assert!(report["devices"][0]["d2h_bytes"].as_u64().unwrap() < 2 * vocabulary, "{report}");
    assert_eq!([&report["host_bytes"], &report["streams"], &report["events"], &report["contexts"]], [0; 4], "{report}");
}

#[test]
fn without_a_map_the_gpu_is_used() {
    let arguments = ["generate", LLAMA, "--prompt", "a", "--max-new-tokens", "3", "--quantize", "int4", "--stats"];
    let Some(command) = on_gpus(&arguments, &[("CONTEXT_BYTES", "400MiB")]) else { return };
    let output = run_with(command, b"");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("\ncuda:0    planned "), "{}", stderr(&output));
}

#[test]
fn a_plan_for_this_machine_counts_its_gpus() {
    let Some(command) =
        on_gpus(&["plan", FERRIS, "--format", "json"], &[("USED", "1GiB,0"), ("CONTEXT_BYTES", "300MiB")])
    else {
        return;
    };
    let output = run_with(command, b"");
    let plan: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let gpu = &plan["devices"][0];
    assert_eq!([&gpu["id"], &gpu["name"]], ["cuda:0", "Fake GPU 0"]);
    // What this process's context takes is in the plan, as `driver`.
    assert_eq!(gpu["free"], (24u64 << 30) - (1 << 30) - (300 << 20) + (330 << 20));
    assert_eq!(plan["devices"][1]["id"], "cuda:1");
    assert_eq!((&gpu["bandwidth"]["measured"], plan["speed"].is_object()), (&true.into(), true));
    assert_eq!(plan["idle"], Value::Array(Vec::new()));
}

#[test]
fn the_failure_of_any_allocation_ends_with_exit_code_3() {
    let (directory, map) = map(r#"{"": "cuda:0", "model.layers.1": "cuda:1", "model.layers.2": "cpu"}"#);
    let counters = directory.path().join("report.json");
    let arguments =
        ["generate", LLAMA, "--prompt", "a", "--max-new-tokens", "2", "--device-map", &map, "--quantize", "int8"];
    for call in 1.. {
        let settings = [("FAIL_ALLOC", call.to_string()), ("REPORT", counters.to_str().unwrap().to_owned())];
        let settings = settings.each_ref().map(|(key, value)| (*key, value.as_str()));
        let Some(command) = on_gpus(&arguments, &settings) else { return };
        let output = run_with(command, b"");
        if output.status.code() == Some(0) {
            assert!(call > 10, "only {call} allocations");
            break;
        }
        assert_refused(&output, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)");
        let report = report(&counters);
        for device in 0..2 {
            let counted = &report["devices"][device];
            assert_eq!([&counted["live_bytes"], &counted["leaked_bytes"]], [0; 2], "call {call}: {report}");
        }
        assert_eq!([&report["host_bytes"], &report["contexts"]], [0; 2], "call {call}: {report}");
    }
}

#[test]
fn a_shortfall_is_planned_again_if_that_is_wished() {
    let generate = ["generate", LLAMA, "--prompt", "a", "--max-new-tokens", "2"];
    let Some(command) = on_gpus(&generate, &[("FAIL_ALLOC", "2")]) else { return };
    let output = run_with(command, b"");
    assert_refused(&output, "cuda:0 cannot give ");
    assert!(stderr(&output).contains("`--on-shortfall replan` plans again"), "{}", stderr(&output));
    let generate = [&generate[..], &["--on-shortfall", "replan"]].concat();
    let output = run_with(on_gpus(&generate, &[("FAIL_ALLOC", "2")]).unwrap(), b"");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("; planning again with what is left\n"), "{}", stderr(&output));
    let output = run_with(on_gpus(&generate, &[("FAIL_ALLOC", "2+")]).unwrap(), b"");
    assert_refused(&output, "cuda:0 cannot give ");
}

#[test]
fn devices_are_listed() {
    let settings = [("USED", "0,1GiB"), ("CC", "9.0")];
    let Some(mut command) = on_gpus(&["devices", "--format", "json"], &settings) else { return };
    command.env("CUDA_VISIBLE_DEVICES", "3,5");
    let shown: Value = serde_json::from_str(&stdout(&run_with(command, b""))).unwrap();
    let gpu = &shown["gpus"][1];
    assert_eq!([&gpu["id"], &gpu["name"], &gpu["compute_capability"]], ["cuda:1", "Fake GPU 1", "9.0"]);
    assert_eq!([&gpu["uuid"], &shown["driver"]], ["GPU-fafafafa-fafa-fafa-fafa-fafafafafa01", "12.8"]);
    assert_eq!(gpu["total"], 8u64 << 30);
    assert_eq!((&gpu["is_usable"], &shown["cuda_visible_devices"]), (&true.into(), &"3,5".into()));
    let text = stdout(&run_with(on_gpus(&["devices"], &[("DRIVER", "12020")]).unwrap(), b""));
    let first = "cuda:0  24.0 GiB free of 24.0 GiB; Fake GPU 0, compute capability 8.6, GPU-fafafafa-fafa-fafa-fafa-fafafafafa00";
    assert!(text.starts_with(&format!("{first}; too old, or its driver is\n")), "{text}");
    assert!(text.contains("\ndriver  for CUDA 12.2\n") && text.contains("\ncpu     "), "{text}");
    let text = stdout(&run_with(evenkeel(&["devices", "--offload-dir", "/"]), b""));
    assert!(text.contains("disk    ") && text.contains("`/`\n"), "{text}");
}

#[test]
fn a_kernel_that_fails_ends_with_exit_code_3() {
    let (_directory, map) = map(r#"{"": "cuda:0"}"#);
    let arguments = ["generate", LLAMA, "--prompt", "a", "--device-map", &map, "--quantize", "int8"];
    for (failure, message) in [
        ("2", "CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)"),
        ("1:701", "cuda:0 cannot run the kernel `quantize_int8`: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
        ("60", "cuda:0 "),
    ] {
        let Some(command) = on_gpus(&arguments, &[("FAIL_LAUNCH", failure)]) else { return };
        assert_refused(&run_with(command, b""), message);
    }
}

#[test]
fn a_gpu_that_others_have_filled_does_not_fit() {
    let (_directory, map) = map(r#"{"": "cuda:1"}"#);
    let Some(command) = on_gpus(&["generate", FERRIS, "--prompt", "a", "--device-map", &map], &[("USED", "0,7800MiB")])
    else {
        return;
    };
    assert_refused(&run_with(command, b""), "`ferris-7m` does not fit: cuda:1 lacks ");
}

#[test]
fn what_is_too_old_is_idle() {
    let (_directory, map) = map(r#"{"": "cuda:0"}"#);
    for setting in [("DRIVER", "12020"), ("CC", "7.0")] {
        let Some(command) = on_gpus(&["plan", FERRIS], &[setting]) else { return };
        let output = run_with(command, b"");
        let needs = "evenkeel needs compute capability 7.5 and the NVIDIA driver 550";
        assert!(stdout(&output).contains(&format!("cuda:1 (Fake GPU 1) is not used: {needs}")), "{}", stdout(&output));
        let generate = ["generate", FERRIS, "--prompt", "a", "--device-map", &map];
        let output = run_with(on_gpus(&generate, &[setting]).unwrap(), b"");
        assert_refused(&output, "the placement needs `cuda:0`; what can be used is cpu, disk");
        assert!(
            stderr(&output).contains(&format!("cuda:0 is there but cannot be used: {needs}")),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn a_driver_without_gpus_is_none() {
    let (_directory, map) = map(r#"{"": "cuda:0"}"#);
    let generate = ["generate", FERRIS, "--prompt", "a", "--device-map", &map];
    let Some(command) = on_gpus(&generate, &[("DEVICES", "")]) else { return };
    assert_refused(&run_with(command, b""), "no NVIDIA driver was found, or it shows no cuda:0");
    let mut masked = on_gpus(&generate, &[("DEVICES", "")]).unwrap();
    masked.env("CUDA_VISIBLE_DEVICES", "7");
    assert_refused(&run_with(masked, b""), "hint: `CUDA_VISIBLE_DEVICES=7` says which GPUs there are");
    let shown = run_with(on_gpus(&["plan", FERRIS], &[("DEVICES", "")]).unwrap(), b"");
    assert!(!stdout(&shown).contains("cuda:"), "{}", stdout(&shown));
}

#[test]
fn values_that_no_f16_holds_are_told_with_what_helps() {
    let bent = Bent::of("parity/llama");
    bent.change_tensors(|tensors| {
        for (name, tensor) in tensors {
            let factor = if name.contains("up_proj") { 2f32.powi(30) } else { 1.0 };
            let factor = if name.contains("down_proj") { 2f32.powi(-30) } else { factor };
            tensor.values.iter_mut().for_each(|value| *value *= factor);
        }
    });
    let model = bent.path().to_str().unwrap();
    let generate = ["generate", model, "--prompt", "t5 t6 t7", "--max-new-tokens", "4"];
    for sampling in [&["--temperature", "0"][..], &["--temperature", "1", "--top-k", "9"]] {
        let arguments = [&generate[..], sampling].concat();
        let Some(command) = on_gpus(&arguments, &[]) else { return };
        let output = run_with(command, b"");
        let text = stderr(&output);
        assert_eq!((output.status.code(), stdout(&output)), (Some(1), String::new()), "{text}");
        assert!(text.contains("error: a logit behind token 3 is not a number\n"), "{text}");
        assert!(text.contains("f16, whose largest value is 65,504"), "{text}");
        assert!(text.contains("try `--device-map cpu` with `--kv-cache bf16`\n"), "{text}");
        let helped = [&arguments[..], &["--device-map", "cpu", "--kv-cache", "bf16"]].concat();
        let output = run_with(on_gpus(&helped, &[]).unwrap(), b"");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
}
