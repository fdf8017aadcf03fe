//! The whole binary over GPUs that are not there.

#[path = "support/command.rs"]
mod command;
#[path = "support/fake_cuda.rs"]
mod fake_cuda;
mod support;

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Once;

use command::{evenkeel, run_with, stderr, stdout};
use serde_json::Value;
use support::bent::Bent;

const FERRIS: &str = "tests/fixtures/ferris-7m";
const LLAMA: &str = "tests/fixtures/parity/llama";

/// The binary with the stand-in first on its library path, under these settings, where both GPUs were used before.
fn on_gpus(arguments: &[&str], settings: &[(&str, &str)]) -> Option<Command> {
    static ARE_USED: Once = Once::new();
    ARE_USED.call_once(|| {
        let (_directory, map) = map(r#"{"": "cuda:0", "model.layers.1": "cuda:1"}"#);
        let generate = ["generate", LLAMA, "--prompt", "a", "--max-new-tokens", "1", "--device-map", &map];
        let output = stand_in(&generate, &[]).map(|command| run_with(command, b""));
        assert!(output.is_none_or(|output| output.status.success()));
    });
    stand_in(arguments, settings)
}

fn stand_in(arguments: &[&str], settings: &[(&str, &str)]) -> Option<Command> {
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
        let peak = counted["peak_bytes"].as_u64().unwrap().next_multiple_of(2 << 20);
        assert_eq!(loaded["planned"], peak, "{report}");
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
    let settings =
        [("USED", "1GiB,0"), ("CONTEXT_BYTES", "300MiB"), ("SMS", "82"), ("CLOCK_KHZ", "9751000"), ("BUS_BITS", "384")];
    let Some(command) = on_gpus(&["plan", FERRIS, "--format", "json"], &settings) else { return };
    let output = run_with(command, b"");
    let plan: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let gpu = &plan["devices"][0];
    assert_eq!([&gpu["id"], &gpu["name"]], ["cuda:0", "Fake GPU 0"]);
    // What this process's context takes is in the plan, as `driver`.
    assert_eq!(gpu["free"], (24u64 << 30) - (1 << 30) - (300 << 20) + (262 << 20));
    assert_eq!(plan["devices"][1]["id"], "cuda:1");
    assert_eq!([&gpu["bandwidth"]["bytes_per_second"], &gpu["context"]], [936_096_000_000u64, 262 << 20]);
    assert!(plan["speed"].is_object());
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
    let replan = [&generate[..], &["--on-shortfall", "replan"]].concat();
    for (setting, refused) in [
        (("FAIL_ALLOC", "1"), "cuda:0 cannot give "),
        (("FAIL_PINNED", "1"), "cannot take 5.0 KiB of page-locked host memory: CUDA_ERROR_OUT_OF_MEMORY"),
        (("FAIL_MODULE", "3:2"), " cannot load the kernels `"),
        (("FAIL_LAUNCH", "1:2"), "cuda:0 cannot run the kernel "),
    ] {
        let Some(command) = on_gpus(&generate, &[setting]) else { return };
        let output = run_with(command, b"");
        assert_refused(&output, refused);
        assert!(stderr(&output).contains("`--on-shortfall replan` plans again"), "{}", stderr(&output));
        let output = run_with(on_gpus(&replan, &[setting]).unwrap(), b"");
        assert_eq!(output.status.code(), Some(0), "{setting:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("; planning again with what is left\n"), "{}", stderr(&output));
    }
    let output = run_with(on_gpus(&replan, &[("FAIL_ALLOC", "1+")]).unwrap(), b"");
    assert_refused(&output, "cuda:0 cannot give ");
}

#[test]
fn a_step_that_cannot_be_repeated_is_said_and_takes_nothing_later() {
    let generate = ["generate", LLAMA, "--prompt", "a", "--max-new-tokens", "4", "--stats"];
    let apart =
        "each kernel is launched by itself: cuda:0 cannot keep the launches of a step: CUDA_ERROR_OUT_OF_MEMORY";
    let whole = on_gpus(&generate, &[]).map(|command| stdout(&run_with(command, b"")));
    for (setting, code, said) in [
        (("FAIL_INSTANTIATE", "1"), 0, apart),
        (("FAIL_UPLOAD", "1"), 0, apart),
        (("GRAPH_BYTES", "25GiB"), 0, apart),
        (("FAIL_GRAPH_LAUNCH", "1"), 3, "cuda:0 cannot repeat the launches of a step: CUDA_ERROR_OUT_OF_MEMORY"),
    ] {
        let Some(command) = on_gpus(&generate, &[setting]) else { return };
        let output = run_with(command, b"");
        assert_eq!(output.status.code(), Some(code), "{setting:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(said), "{setting:?}: {}", stderr(&output));
        // What fails does before the first token.
        assert_eq!(Some(stdout(&output)), if code == 0 { whole.clone() } else { Some(String::new()) }, "{setting:?}");
    }
}

/// The bytes of a GPU on which the plan of `arguments` says that nothing is left.
fn exactly(arguments: &[&str], settings: &[(&str, &str)]) -> Option<u64> {
    let output = run_with(on_gpus(&[&["plan"], arguments, &["--format", "json"]].concat(), settings)?, b"");
    let plan: Value = serde_json::from_str(&stdout(&output)).unwrap();
    plan["totals"][0]["total"].as_u64()
}

#[test]
fn what_fits_without_a_reserve_loads() {
    // What the driver takes is what the plan has for it.
    let taken = [("CONTEXT_BYTES", "40MiB"), ("MODULE_BYTES", "2MiB"), ("GRAPH_BYTES", "32MiB"), ("DEVICES", "350MiB")];
    for (model, context) in [(FERRIS, "512"), (FERRIS, "301"), (LLAMA, "64")] {
        let all = [model, "--context", context, "--reserve", "0", "--max-memory", "cuda:0=1GiB"];
        let Some(total) = exactly(&all, &taken) else { return };
        for (missing, code) in [(0, 0), (1, 3)] {
            let devices = format!("{}B", total - missing);
            let settings = [&taken[..3], &[("DEVICES", devices.as_str())]].concat();
            let (_directory, map) = map(r#"{"": "cuda:0"}"#);
            let on_it = ["--context", context, "--reserve", "0", "--device-map", &map];
            let plan = run_with(on_gpus(&[&["plan", model][..], &on_it].concat(), &settings).unwrap(), b"");
            assert_eq!(plan.status.code(), Some(code), "{model} {context}: {}", stdout(&plan));
            let generate = ["generate", model, "--prompt", "a", "--max-new-tokens", "2", "--stats"];
            let output = run_with(on_gpus(&[&generate[..], &on_it].concat(), &settings).unwrap(), b"");
            assert_eq!(output.status.code(), Some(code), "{model} {context}: {}", stderr(&output));
            let said = stderr(&output);
            assert!(code != 0 || said.contains("driver planned 98.0 MiB, measured 90.0 MiB; free "), "{said}");
        }
    }
}

#[test]
fn kernels_are_compiled_once_and_kept() {
    let caches = tempfile::tempdir().unwrap();
    let generate = ["generate", LLAMA, "--prompt", "a", "--max-new-tokens", "2"];
    let run = || {
        let mut command = on_gpus(&generate, &[])?;
        let output = run_with(std::mem::replace(command.env("XDG_CACHE_HOME", caches.path()), Command::new("")), b"");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        Some(stderr(&output))
    };
    let compiled = "compiling kernels for compute capability 8.6; they are kept\n";
    let Some(said) = run() else { return };
    // What was compiled is tried, too.
    assert!(said.starts_with(compiled) && said.lines().count() == 3, "{said}");
    assert_eq!(run().unwrap(), "");
    let kernels = caches.path().join("evenkeel/kernels");
    let file = std::fs::read_dir(&kernels).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(run().unwrap(), compiled);
    assert_eq!(run().unwrap(), "");
    // Where nothing can be kept all works the same.
    std::fs::remove_dir_all(&kernels).unwrap();
    std::fs::write(&kernels, "in the way").unwrap();
    assert_eq!(run().unwrap(), compiled);
    let error = run_with(on_gpus(&generate, &[("DRIVER", "12040"), ("FAIL_LINK", "1+:221")]).unwrap(), b"");
    assert_refused(&error, "CUDA_ERROR_JIT_COMPILER_NOT_FOUND");
    assert!(stderr(&error).contains("NVIDIA_DRIVER_CAPABILITIES=compute,utility"), "{}", stderr(&error));
}

#[test]
fn two_that_start_at_once_take_turns() {
    let directory = tempfile::tempdir().unwrap();
    let shared = directory.path().join("memory");
    // Room for one of them.
    let settings = [("SHARED", shared.to_str().unwrap()), ("DEVICES", "180MiB"), ("CONTEXT_BYTES", "30MiB")];
    let generate =
        ["generate", FERRIS, "--prompt", "a", "--ignore-eos", "--max-new-tokens", "60", "--stats", "--reserve", "0"];
    let spawn = || Some(on_gpus(&generate, &settings)?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let Some(both) = spawn().zip(spawn()) else { return };
    let both = [both.0, both.1].map(|child| child.wait_with_output().unwrap());
    for output in &both {
        assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    }
    assert_eq!(stdout(&both[0]), stdout(&both[1]));
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
    let first = "cuda:0  is not used: its driver is for CUDA 12.2; evenkeel needs compute capability 7.5";
    assert!(text.starts_with(first) && text.contains("\n        24.0 GiB; Fake GPU 0\n"), "{text}");
    assert!(text.contains("\ndriver  for CUDA 12.2\n") && text.contains("\ncpu     "), "{text}");
    let text = stdout(&run_with(evenkeel(&["devices", "--offload-dir", "/"]), b""));
    assert!(text.contains("disk    ") && text.contains("`/`\n"), "{text}");
}

/// Puts the stand-in for NVIDIA's management library on the library path too.
fn with_management(mut command: Command, settings: &[(&str, &str)]) -> (tempfile::TempDir, Command) {
    let directory = tempfile::tempdir().unwrap();
    let library = directory.path().join("libnvidia-ml.so.1");
    let arguments = ["-shared", "-fPIC", "-O1", "-w", "-o", library.to_str().unwrap(), "tests/support/fake_nvml.c"];
    let built = Command::new("gcc").current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).status().unwrap();
    assert!(built.success());
    let path = [directory.path(), fake_cuda::directory().unwrap()].map(|path| path.to_str().unwrap()).join(":");
    command.env("LD_LIBRARY_PATH", path).envs(settings.iter().copied());
    (directory, command)
}

#[test]
fn who_has_a_gpus_memory_is_said() {
    let own = std::process::id().to_string();
    let processes = format!("999999999:2147483648,{own}:3221225472");
    let settings = [("COMPUTE_MODE", "3"), ("CLOCK_KHZ", "9751000"), ("BUS_BITS", "384"), ("SMS", "82")];
    let Some(command) = on_gpus(&["devices"], &settings) else { return };
    let (_directory, command) = with_management(command, &[("FAKE_NVML_PROCESSES", &processes)]);
    let text = stdout(&run_with(command, b""));
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    for line in [
        "        compute capability 8.6, 82 multiprocessors, 936.096GB/s, compute mode exclusive\n",
        &format!("           3.0 GiB  process {own}, {name}"),
        "           2.0 GiB  process 999999999, whose name is not to be seen\n",
        "\ndriver  550.54.15, for CUDA 12.8\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let (_directory, command) = with_management(
        on_gpus(&["devices", "--format", "json"], &[]).unwrap(),
        &[("FAKE_NVML_PROCESSES", &processes)],
    );
    let shown: Value = serde_json::from_str(&stdout(&run_with(command, b""))).unwrap();
    assert_eq!(shown["gpus"][0]["processes"][0]["used"], 3u64 << 30);
    assert_eq!(
        [&shown["gpus"][1]["processes"], &shown["driver_version"]],
        [&Value::Array(vec![]), &"550.54.15".into()]
    );
}

#[test]
fn a_context_is_measured_where_the_management_library_tells_what_was_free() {
    for (before, context) in [(24u64 << 30, 300u64 << 20), (23 << 30, 40 << 20), (21 << 30, 40 << 20)] {
        let Some(command) = on_gpus(&["devices", "--format", "json"], &[("CONTEXT_BYTES", "300MiB")]) else { return };
        let (_directory, command) = with_management(command, &[("FAKE_NVML_FREE", &before.to_string())]);
        let shown: Value = serde_json::from_str(&stdout(&run_with(command, b""))).unwrap();
        assert_eq!(shown["gpus"][0]["context"], context, "{before}");
        assert_eq!(shown["gpus"][0]["free"], (24u64 << 30) - (300 << 20) + context, "{before}");
    }
}

#[test]
fn memory_that_a_gpu_shares_with_the_host_is_counted_once() {
    let Some(command) = on_gpus(&["devices", "--format", "json"], &[("INTEGRATED", "1"), ("DEVICES", "900GiB")]) else {
        return;
    };
    let shown: Value = serde_json::from_str(&stdout(&run_with(command, b""))).unwrap();
    let free = |device: &Value| device["free"].as_u64().unwrap();
    let (gpu, cpu) = (&shown["gpus"][0], &shown["cpu"]);
    assert_eq!(gpu["is_shared"], true);
    assert!(free(cpu) <= 2 << 30 && free(gpu) + free(cpu) <= cpu["total"].as_u64().unwrap(), "{shown}");
    let plan = run_with(on_gpus(&["plan", FERRIS], &[("INTEGRATED", "1")]).unwrap(), b"");
    assert!(
        stdout(&plan).contains("\ncuda:0 shares the host's memory: 2.0 GiB are counted as the host's\n"),
        "{}",
        stdout(&plan)
    );
}

#[test]
fn a_part_of_a_divided_gpu_has_a_name_and_a_speed_of_its_own() {
    let settings =
        [("NAME", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"), ("MIG", "1"), ("CLOCK_KHZ", "1215000"), ("BUS_BITS", "5120")];
    let Some(command) = on_gpus(&["devices", "--format", "json"], &settings) else { return };
    let gpu = &serde_json::from_str::<Value>(&stdout(&run_with(command, b""))).unwrap()["gpus"][0];
    assert!(gpu["uuid"].as_str().unwrap().starts_with("MIG-"), "{gpu}");
    assert_eq!(gpu["bandwidth"]["bytes_per_second"], 1_555_000_000_000u64 / 8);
}

#[test]
fn devices_are_watched_until_interrupted() {
    let mut command = evenkeel(&["devices", "--watch=1"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    // Twice.
    assert!(lines.by_ref().filter(|line| line.starts_with("driver ")).nth(1).is_some());
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
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
        let plan = stdout(&output);
        assert!(plan.contains("cuda:1 (Fake GPU 1) is not used: its ") && plan.contains(needs), "{plan}");
        let generate = ["generate", FERRIS, "--prompt", "a", "--device-map", &map];
        let output = run_with(on_gpus(&generate, &[setting]).unwrap(), b"");
        assert_refused(&output, "the placement needs `cuda:0`; what can be used is cpu, disk");
        assert!(
            stderr(&output).contains("cuda:0 is there but cannot be used: its ") && stderr(&output).contains(needs),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn what_is_too_old_is_said_where_the_cpu_computes() {
    for setting in [("DRIVER", "11040"), ("CC", "6.1")] {
        let Some(command) = on_gpus(&["generate", FERRIS, "--prompt", "a", "--max-new-tokens", "2"], &[setting]) else {
            return;
        };
        let output = run_with(command, b"");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(
            said.contains("warning: cuda:0 (Fake GPU 0) is not used: its ") && said.contains("driver 550"),
            "{said}"
        );
    }
}

#[test]
fn a_driver_or_a_gpu_that_fails_is_named_with_its_cause() {
    const BOTH: &str = "no GPU of this machine can be used";
    for (setting, name, help) in [
        (("FAIL_INIT", "802"), "CUDA_ERROR_SYSTEM_NOT_READY", "systemctl start nvidia-fabricmanager"),
        (("FAIL_INIT", "803"), "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "reboot"),
        (("FAIL_INIT", "804"), "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "`compat`"),
        (("FAIL_INIT", "34"), "CUDA_ERROR_STUB_LIBRARY", "`…/stubs`"),
        (("FAIL_INIT", "999"), "CUDA_ERROR_UNKNOWN", "nvidia_uvm"),
        (("FAIL_CONTEXT", "0:46,1:46"), "CUDA_ERROR_DEVICE_UNAVAILABLE", "compute mode"),
        (("FAIL_CONTEXT", "0:2,1:2"), "CUDA_ERROR_OUT_OF_MEMORY", "`nvidia-smi` lists them"),
        (("FAIL_MEMINFO", "0:999,1:999"), "CUDA_ERROR_UNKNOWN", "nvidia_uvm"),
    ] {
        let on_gpus = |arguments: &[&str]| Some(run_with(on_gpus(arguments, &[setting])?, b""));
        let Some(devices) = on_gpus(&["devices"]) else { return };
        let is_said = |text: &str| text.contains(name) && text.contains(help);
        assert!(is_said(&stdout(&devices)), "{setting:?}: {}", stdout(&devices));
        let plan = on_gpus(&["plan", FERRIS]).unwrap();
        assert!(is_said(&stdout(&plan)), "{setting:?}: {}", stdout(&plan));
        let generate = ["generate", FERRIS, "--prompt", "a", "--max-new-tokens", "2"];
        let refused = on_gpus(&generate).unwrap();
        assert_refused(&refused, BOTH);
        assert!(is_said(&stderr(&refused)) && stderr(&refused).contains("`--device-map cpu`"), "{}", stderr(&refused));
        for wanted in [["--device-map", "cpu"], ["--max-memory", "cpu=1GiB"]] {
            let output = on_gpus(&[&generate[..], &wanted].concat()).unwrap();
            assert_eq!(output.status.code(), Some(0), "{setting:?} {wanted:?}: {}", stderr(&output));
        }
    }
}

#[test]
fn one_gpu_of_two_that_fails_is_said_and_the_other_computes() {
    let arguments = ["generate", FERRIS, "--prompt", "a", "--max-new-tokens", "2", "--stats"];
    for setting in [("FAIL_CONTEXT", "0:46"), ("FAIL_MEMINFO", "0:999")] {
        let Some(command) = on_gpus(&arguments, &[setting]) else { return };
        let output = run_with(command, b"");
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(
            said.contains("warning: cuda:0 (Fake GPU 0) is not used: ") && said.contains("cuda:1    planned"),
            "{said}"
        );
    }
}

#[test]
fn no_gpu_is_opened_where_the_map_names_none() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("report.json");
    let settings = [("REPORT", file.to_str().unwrap()), ("FAIL_INIT", "802")];
    let generate = ["generate", FERRIS, "--prompt", "a", "--max-new-tokens", "2", "--device-map", "cpu"];
    let Some(command) = on_gpus(&generate, &settings) else { return };
    let output = run_with(command, b"");
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn a_driver_without_gpus_is_none() {
    let (_directory, map) = map(r#"{"": "cuda:0"}"#);
    let generate = ["generate", FERRIS, "--prompt", "a", "--device-map", &map];
    let Some(command) = on_gpus(&generate, &[("DEVICES", "")]) else { return };
    assert_refused(&run_with(command, b""), "the placement needs `cuda:0`; what can be used is cpu, disk");
    let mut masked = on_gpus(&generate, &[("DEVICES", "")]).unwrap();
    masked.env("CUDA_VISIBLE_DEVICES", "7");
    assert_refused(&run_with(masked, b""), "hint: `CUDA_VISIBLE_DEVICES=7` says which GPUs there are");
    let shown = run_with(on_gpus(&["plan", FERRIS], &[("DEVICES", "")]).unwrap(), b"");
    assert!(!stdout(&shown).contains("cuda:") && stdout(&shown).contains("docker's `gpus`"), "{}", stdout(&shown));
    let plain = ["generate", FERRIS, "--prompt", "a", "--max-new-tokens", "2"];
    let output = run_with(on_gpus(&plain, &[("DEVICES", "")]).unwrap(), b"");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).starts_with("warning: no GPU is used: "), "{}", stderr(&output));
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

/// Where an instruction of a kernel stands for the first time, as the stand-in is told to leave it out.
fn left_out(file: &str, kernel: &str, instruction: &str) -> String {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cuda/kernels");
    let ptx = std::fs::read_to_string(directory.join(file).with_extension("ptx")).unwrap();
    let start = format!(".visible .entry {kernel}(");
    let lines = ptx.lines().zip(1..).skip_while(|(line, _)| !line.starts_with(&start)).skip(1);
    let mut its = lines.take_while(|(line, _)| !line.starts_with(".visible .entry"));
    let (_, at) = its.find(|(line, _)| line.trim().starts_with(instruction)).expect(instruction);
    format!("{kernel}:{at}")
}

/// `devices --verify` with caches of its own, and what it says of that in JSON.
fn verified(settings: &[(&str, &str)]) -> Option<(Output, Value)> {
    let caches = tempfile::tempdir().unwrap();
    let mut command = on_gpus(&["devices", "--verify", "--format", "json"], settings)?;
    command.env("XDG_CACHE_HOME", caches.path());
    let output = run_with(command, b"");
    let said: Value = serde_json::from_str(&stdout(&output)).unwrap_or_else(|e| panic!("{e}: {}", stderr(&output)));
    // That a GPU is right is kept.
    let gpus = said["verification"]["gpus"].as_array().unwrap();
    let right = gpus.iter().filter(|gpu| gpu["wrong"].as_array().unwrap().is_empty()).count();
    let kept = std::fs::read_dir(caches.path().join("evenkeel/verified")).map_or(0, Iterator::count);
    assert_eq!(kept, right);
    Some((output, said["verification"].clone()))
}

#[test]
fn every_kernel_that_a_gpu_has_is_verified() {
    for (capability, kernels) in [("7.5", 26), ("8.6", 34), ("9.0", 34)] {
        let Some((output, said)) = verified(&[("CC", capability), ("CONTEXT_BYTES", "40MiB")]) else { return };
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        for gpu in said["gpus"].as_array().unwrap() {
            assert_eq!(gpu["untried"], Value::Array(Vec::new()), "{capability}");
            assert_eq!(gpu["kernels"].as_array().unwrap().len(), kernels, "{capability}");
            let models = gpu["models"].as_array().unwrap();
            assert!(models.len() == 8 && models.iter().all(|of| of["planned"] == of["measured"]), "{gpu}");
        }
        assert_eq!(said["hops"].as_array().unwrap().len(), 2);
    }
    let text = stdout(&run_with(on_gpus(&["devices", "--verify"], &[]).unwrap(), b""));
    assert!(
        text.contains("cuda:1  34 of 34 kernels tried, in ") && text.contains("\nverify  all is right, in "),
        "{text}"
    );
}

#[test]
fn a_kernel_that_lacks_an_instruction_is_named() {
    for (file, kernel, instruction) in [
        ("attention", "rotate_and_store", "st.global.u16"),
        ("attention_mma", "attend_many_128", "mma.sync"),
        ("choose", "draw", "ex2.approx"),
        ("elementwise", "gather", "st.global.u16"),
        ("matmul", "few_bf16", "fma.rn.f32"),
        ("mma_few", "mma_few_int4", "mma.sync"),
        ("mma_many", "mma_many_int8_64", "mma.sync"),
        ("norm", "normalize", "sqrt.rn"),
        ("quantize", "quantize_nl4", "st.global.f32"),
    ] {
        let drop = left_out(file, kernel, instruction);
        let Some((output, said)) = verified(&[("DROP", &drop), ("DEVICES", "24GiB")]) else { return };
        assert_eq!(output.status.code(), Some(3), "{drop}: {}", stderr(&output));
        let named = format!("cuda:0 gives something else than the reference with `{kernel}`: ");
        let wrong = said["gpus"][0]["wrong"].as_array().unwrap();
        let is_named = |error: &&Value| error.as_str().unwrap().contains(&format!("`{kernel}`"));
        assert!(wrong.iter().filter(is_named).count() > 0 && wrong.iter().all(|error| is_named(&error)), "{wrong:?}");
        assert!(kernel == "draw" || stderr(&output).contains(&named), "{drop}: {}", stderr(&output));
    }
}

#[test]
fn a_copy_between_gpus_that_is_wrong_is_named() {
    let Some((output, said)) = verified(&[("BREAK_PEER", "1")]) else { return };
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let named = "error: cuda:1 does not get what cuda:0 has: 65536 words, element 32768: ";
    assert!(stderr(&output).contains(named), "{}", stderr(&output));
    assert!(said["hops"].as_array().unwrap().iter().all(|hop| hop["wrong"].as_array().unwrap().len() == 1), "{said}");
    assert!(said["gpus"].as_array().unwrap().iter().all(|gpu| gpu["wrong"].as_array().unwrap().is_empty()), "{said}");
}

#[test]
fn there_has_to_be_a_gpu_to_verify() {
    let Some(command) = on_gpus(&["devices", "--verify"], &[("DEVICES", "")]) else { return };
    assert_refused(&run_with(command, b""), "CUDA_ERROR_NO_DEVICE");
}

#[test]
fn a_gpu_is_verified_before_its_first_use() {
    let caches = tempfile::tempdir().unwrap();
    let (_directory, map) = map(r#"{"": "cuda:0"}"#);
    let generate = ["generate", LLAMA, "--prompt", "a", "--max-new-tokens", "2", "--device-map", &map];
    let run = |settings: &[(&str, &str)]| {
        let mut command = on_gpus(&generate, settings)?;
        command.env("XDG_CACHE_HOME", caches.path());
        Some(run_with(command, b""))
    };
    let drop = left_out("mma_many", "mma_many_int8_64", "mma.sync");
    let Some(output) = run(&[("DROP", &drop)]) else { return };
    assert_refused(
        &output,
        "cuda:0 gives something else than the reference with `mma_many_int8_64`: int8 70×72 by 66, ",
    );
    let said = [(); 2].map(|()| stderr(&run(&[]).unwrap()));
    assert!(said[0].contains("cuda:0 is used for the first time: 34 kernels are right, in "), "{}", said[0]);
    assert_eq!(said[1], "");
    // Another driver may compile something else.
    assert!(stderr(&run(&[("DRIVER", "12090")]).unwrap()).contains(" is used for the first time: "));
}
