//! The whole binary: exit codes and what users see.

#[path = "support/command.rs"]
mod command;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use command::{evenkeel, run, run_with, stderr, stdout, transcript};
use insta::assert_snapshot;

const FERRIS: &str = "tests/fixtures/ferris-7m";
const LLAMA: &str = "tests/fixtures/parity/llama";

fn generate(arguments: &[&str]) -> std::process::Output {
    run(&[&["generate", "--model", FERRIS], arguments].concat())
}

#[test]
fn generate_prints_the_text_and_nothing_else() {
    let output = generate(&["--quantize", "int4", "--prompt", "Ownership is", "--max-new-tokens", "40"]);
    assert_snapshot!(transcript(&output));
}

#[test]
fn generate_unquantized_is_what_transformers_prints() {
    let expected: serde_json::Value =
        serde_json::from_slice(&fs::read(format!("{FERRIS}/expected.json")).unwrap()).unwrap();
    for case in expected["cases"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let output = generate(&[
            "--quantize",
            "none",
            "--temperature",
            "0",
            "--max-new-tokens",
            "48",
            "--ignore-eos",
            "--prompt",
            prompt,
        ]);
        assert_eq!(stdout(&output), case["text"].as_str().unwrap(), "{prompt}");
    }
}

#[test]
fn generate_takes_the_state_of_one_sequence_whatever_the_map_was_made_for() {
    let directory = tempfile::tempdir().unwrap();
    let taken = |batch: &str| {
        let map = directory.path().join(format!("{batch}.json"));
        let map = map.to_str().unwrap();
        let written = run(&["plan", FERRIS, "--batch", batch, "--device", "cpu=64GiB", "--output", map]);
        assert!(written.status.success(), "{}", stderr(&written));
        assert!(fs::read_to_string(map).unwrap().contains(&format!("\"batch\": {batch}")));
        let output = generate(&["--device-map", map, "--prompt", "fn", "--max-new-tokens", "1", "--stats"]);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output).lines().find(|line| line.starts_with("cpu")).unwrap().to_owned()
    };
    assert_eq!(taken("64"), taken("1"));
}

#[test]
fn generate_takes_its_prompt_from_anywhere() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("prompt.txt");
    fs::write(&file, "A trait object").unwrap();
    let base = ["generate", FERRIS, "--max-new-tokens", "8"];
    let flag = run(&[&base[..], &["--prompt", "A trait object"]].concat());
    assert!(flag.status.success() && !flag.stdout.is_empty());
    let from_file = run(&[&base[..], &["--prompt-file", file.to_str().unwrap()]].concat());
    let dash = run_with(evenkeel(&[&base[..], &["--prompt", "-"]].concat()), b"A trait object");
    let pipe = run_with(evenkeel(&base), b"A trait object\n");
    for output in [from_file, dash, pipe] {
        assert_eq!(stdout(&output), stdout(&flag), "{}", stderr(&output));
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let generate = |threads| {
        generate(&["--prompt", "A trait object", "--max-new-tokens", "8", "--quantize", "int4", "--threads", threads])
    };
    let one = generate("1");
    assert!(one.status.success() && !one.stdout.is_empty(), "{}", stderr(&one));
    assert_eq!(stdout(&generate("3")), stdout(&one));
    assert_eq!(generate("0").status.code(), Some(2));
}

#[test]
fn generate_speaks_json_lines() {
    let output = generate(&["--prompt", "A trait object", "--max-new-tokens", "5", "--format", "json"]);
    let lines: Vec<serde_json::Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (done, tokens) = lines.split_last().unwrap();
    assert!(tokens.iter().all(|line| line["event"] == "token"));
    let text: String = tokens.iter().map(|line| line["text"].as_str().unwrap()).collect();
    let plain = generate(&["--prompt", "A trait object", "--max-new-tokens", "5"]);
    assert_eq!(text, stdout(&plain));
    assert_eq!(tokens.iter().filter(|line| line["token"].is_u64()).count(), 5);
    assert_eq!(done["event"], "done");
    assert_eq!(done["finish"], "max_new_tokens");
    assert_eq!((&done["prompt_tokens"], &done["generated_tokens"]), (&3.into(), &5.into()));
    let cpu = &done["loaded"]["devices"][0];
    assert_eq!(cpu["planned"], cpu["measured"]);
}

#[test]
fn generate_shows_stats_on_standard_error() {
    let output = generate(&["--prompt", "A trait object", "--max-new-tokens", "5", "--stats", "--quantize", "int8"]);
    let stats = stderr(&output);
    let names: Vec<_> = stats.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["load", "waited", "tokenizer", "prefill", "decode", "cpu"], "{stats}");
}

#[test]
fn generate_through_the_chat_template() {
    let output =
        generate(&["--chat", "--system", "You know Rust.", "--prompt", "What is a trait?", "--max-new-tokens", "12"]);
    assert_snapshot!(transcript(&output));
}

#[test]
fn generate_ends_before_a_stop_text() {
    let base = ["--prompt", "Ownership is", "--max-new-tokens", "20"];
    let whole = stdout(&generate(&base));
    let (before, _) = whole.split_once("Send").expect(&whole);
    let stopped = stdout(&generate(&[&base[..], &["--stop", "nowhere", "--stop", "Send"]].concat()));
    assert_eq!(stopped, before);
}

#[test]
fn a_seed_repeats_a_sampled_text() {
    let sampled = |seed| {
        let sampling = [
            "--temperature",
            "0.9",
            "--top-k",
            "50",
            "--top-p",
            "0.95",
            "--min-p",
            "0.01",
            "--repetition-penalty",
            "1.1",
        ];
        stdout(&generate(
            &[&["--prompt", "In Rust,", "--max-new-tokens", "16", "--seed", seed][..], &sampling].concat(),
        ))
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn what_is_wrong_with_a_prompt_or_an_option() {
    let long = "word ".repeat(600);
    let cases: &[(&str, &[&str], &[u8])] = &[
        ("empty prompt", &["--prompt", ""], b""),
        ("prompt longer than the context", &["--prompt", &long], b""),
        ("more new tokens than the context", &["--prompt", "x", "--max-new-tokens", "600"], b""),
        ("prompt that is no text", &[], b"\xff\xfe"),
        ("prompt file that is missing", &["--prompt-file", "nowhere.txt"], b""),
        ("context beyond the model's", &["--prompt", "x", "--context", "513"], b""),
        ("negative temperature", &["--prompt", "x", "--temperature", "-1"], b""),
        ("temperature that is no number", &["--prompt", "x", "--temperature", "nan"], b""),
        ("unknown scheme", &["--prompt", "x", "--quantize", "int3"], b""),
        ("unknown flag", &["--prompt", "x", "--quantise", "int4"], b""),
        ("budget without a size", &["--prompt", "x", "--max-memory", "cpu"], b""),
    ];
    let mut text = String::new();
    for (name, arguments, stdin) in cases {
        let output = run_with(evenkeel(&[&["generate", FERRIS], *arguments].concat()), stdin);
        text += &["# ", name, "\n", &transcript(&output), "\n"].concat();
    }
    assert_snapshot!(text);
}

#[test]
fn no_new_tokens_is_no_text() {
    let output = generate(&["--prompt", "x", "--max-new-tokens", "0"]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(0), String::new()));
}

#[test]
fn a_map_that_names_a_gpu_ends_with_3_where_there_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let map = directory.path().join("map.json");
    fs::write(&map, r#"{"": "cpu", "model.layers.0": "cuda:0"}"#).unwrap();
    let output = generate(&["--prompt", "x", "--device-map", map.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    let error = "error: the placement needs `cuda:0`; what can be used is cpu, disk\n\nhint: ";
    assert!(stderr(&output).starts_with(error), "{}", stderr(&output));
}

#[test]
fn plan_for_described_devices() {
    let output = run(&[
        "plan",
        FERRIS,
        "--quantize",
        "int4",
        "--device",
        "cuda:0=4GiB",
        "--device",
        "cuda:1=2GiB",
        "--device",
        "cpu=8GiB",
    ]);
    assert_snapshot!(transcript(&output));
}

#[test]
fn a_plan_that_does_not_fit_says_what_would() {
    let output = run(&["plan", FERRIS, "--device", "cpu=566MiB"]);
    assert_snapshot!(transcript(&output));
}

#[test]
fn generate_refuses_what_does_not_fit_before_it_reads_weights() {
    let output = generate(&["--prompt", "x", "--max-memory", "cpu=10MiB,disk=1MiB"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stdout(&output).is_empty());
    assert!(stderr(&output).starts_with("error: `ferris-7m` does not fit: cpu lacks "), "{}", stderr(&output));
}

#[test]
fn a_budget_for_host_memory_spills_to_the_disk_and_changes_no_token() {
    let base = ["--prompt", "A trait object", "--max-new-tokens", "10", "--format", "json"];
    let whole = stdout(&generate(&base));
    let spilled = stdout(&generate(&[&base[..], &["--max-memory", "cpu=52MiB"]].concat()));
    let tokens = |text: &str| {
        text.lines().filter(|line| line.contains(r#""event":"token""#)).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(tokens(&whole).len(), 10, "{whole}");
    assert_eq!(tokens(&whole), tokens(&spilled));
    let done: serde_json::Value = serde_json::from_str(spilled.lines().last().unwrap()).unwrap();
    let disk = &done["loaded"]["devices"][1];
    assert_eq!(disk["id"], "disk");
    assert!(disk["measured"].as_u64().unwrap() > 1 << 20, "{disk}");
    assert_eq!(disk["planned"], disk["measured"]);
}

#[test]
fn a_map_is_written_checked_and_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let map = directory.path().join("map.json");
    let map = map.to_str().unwrap();
    let write = [
        "plan",
        FERRIS,
        "--quantize",
        "int4",
        "--context",
        "256",
        "--max-memory",
        "cpu=43147KiB,disk=1GiB",
        "--output",
        map,
    ];
    let written = run(&write);
    assert_eq!(written.status.code(), Some(0), "{}", transcript(&written));
    assert_snapshot!("a_written_map", fs::read_to_string(map).unwrap());

    let again = run(&write);
    assert_eq!(again.status.code(), Some(2));
    assert!(stderr(&again).contains("hint: `--force` replaces it"));
    assert_eq!(run(&[&write[..], &["--force"]].concat()).status.code(), Some(0));

    assert_eq!(run(&["plan", FERRIS, "--check", map]).status.code(), Some(0));
    let small = run(&["plan", FERRIS, "--check", map, "--device", "cpu=600MiB", "--device", "disk=1KiB"]);
    assert_eq!(small.status.code(), Some(3), "{}", transcript(&small));
    let other = run(&["plan", "tests/fixtures/parity/llama", "--check", map]);
    assert_eq!(other.status.code(), Some(1));
    assert!(stderr(&other).contains("was made for `ferris-7m`, not for `llama`"), "{}", stderr(&other));

    let tokens = |arguments: &[&str]| {
        stdout(&generate(&[&["--prompt", "A trait object", "--max-new-tokens", "20"], arguments].concat()))
    };
    let by_map = tokens(&["--device-map", map]);
    assert!(!by_map.is_empty());
    assert_eq!(by_map, tokens(&["--quantize", "int4"]));
}

#[test]
fn a_model_that_is_not_there() {
    let output = run(&["plan", "./nowhere"]);
    assert_snapshot!(transcript(&output));
}

#[test]
fn a_closed_pipe_is_no_error() {
    let arguments = ["generate", FERRIS, "--prompt", "Ownership is", "--ignore-eos", "--max-new-tokens", "400"];
    let mut child =
        evenkeel(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let mut first = [0; 1];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
}

#[test]
fn an_interrupt_keeps_what_was_printed_and_exits_with_130() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        let arguments = [
            "generate",
            FERRIS,
            "--prompt",
            "Ownership is",
            "--ignore-eos",
            "--max-new-tokens",
            "480",
            "--format",
            "json",
        ];
        let mut child =
            evenkeel(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.next().unwrap().unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
        if signal == "-HUP" && u64::from_str_radix(ignored, 16).unwrap() & 1 == 1 {
            // As under `nohup`, the end of a terminal is no reason to stop.
            child.kill().unwrap();
            child.wait().unwrap();
            continue;
        }
        let killed = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{signal}: {}", stderr(&output));
        let last = rest.last().unwrap();
        assert!(last.contains(r#""finish":"interrupted""#), "{last}");
        assert!(rest.len() < 480, "it went on");
    }
}

#[test]
fn a_pipe_in_place_of_a_shard_does_not_hang() {
    let directory = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(format!("{FERRIS}/{file}"), directory.path().join(file)).unwrap();
    }
    assert!(Command::new("mkfifo").arg(directory.path().join("model.safetensors")).status().unwrap().success());
    let mut child = evenkeel(&["plan", directory.path().to_str().unwrap()]).stderr(Stdio::null()).spawn().unwrap();
    for _ in 0..200 {
        if let Some(status) = child.try_wait().unwrap() {
            assert_eq!(status.code(), Some(1));
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    panic!("it hangs");
}

#[test]
fn perplexity_compares_schemes_on_overlapping_windows() {
    let base = ["perplexity", FERRIS, "--text", "tests/fixtures/ferris-7m/eval.txt"];
    let windows = ["--max-tokens", "100", "--context", "64", "--stride", "16"];
    let json = |more: &[&str]| -> serde_json::Value {
        let output = run(&[&base[..], &windows, &["--format", "json"], more].concat());
        serde_json::from_str(&stdout(&output)).unwrap_or_else(|e| panic!("{e}: {}", stderr(&output)))
    };
    let compared = json(&["--compare", "nl4,int8"]);
    let rows = compared["rows"].as_array().unwrap();
    let schemes: Vec<_> = rows.iter().map(|row| row["quantize"][""].as_str().unwrap()).collect();
    assert_eq!(schemes, ["none", "nl4", "int8"]);
    assert_eq!(rows[0]["divergence"], serde_json::Value::Null);
    let kl = |row: usize| rows[row]["divergence"]["mean_kl"].as_f64().unwrap();
    assert!(0.0 < kl(2) && kl(2) < kl(1) && kl(1) < 0.2, "{rows:?}");
    for (row, alone) in rows.iter().zip(["none", "nl4", "int8"]) {
        assert_eq!(row["tokens"], 99);
        assert_eq!(json(&["--quantize", alone])["rows"][0]["perplexity"], row["perplexity"], "{alone}");
    }
    let table = stdout(&run(&[&base[..], &["--max-tokens", "100", "--quantize", "int4"]].concat()));
    assert!(table.starts_with("ferris-7m: 99 tokens scored in windows of 512 tokens\n\nscheme "), "{table}");
    for (arguments, code, message) in [
        (&["--compare", "int8", "--quantize", "int8"][..], 2, "cannot be used with"),
        (&["--stride", "0"], 2, "a stride of 0 is not between 1 and the 512 of a window"),
        (&["--context", "1"], 2, "a window of 1 tokens has none to score"),
        (&["--max-tokens", "1"], 1, "has 1 tokens; 2 is the least to score"),
        (&["--context", "9999"], 2, "longer than the 512"),
    ] {
        let output = run(&[&base[..], arguments].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(message), "{arguments:?}: {}", stderr(&output));
    }
}

/// A copy of a small checkpoint, with some files of another content.
fn altered(name: &str, files: &[(&str, &str)]) -> (tempfile::TempDir, String) {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join(name);
    fs::create_dir(&directory).unwrap();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(LLAMA)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, directory.join(path.file_name().unwrap())).unwrap();
    }
    for (file, content) in files {
        fs::write(directory.join(file), content).unwrap();
    }
    let directory = directory.to_str().unwrap().to_owned();
    (root, directory)
}

/// Whether a character acts on a terminal, or on the text around it, without being seen.
fn acts(c: char) -> bool {
    c.is_control() && c != '\n' || "\u{200b}\u{200d}\u{202a}\u{202d}\u{202e}\u{2066}\u{2069}\u{feff}".contains(c)
}

#[test]
fn what_strangers_wrote_reaches_no_terminal_raw() {
    let tokenizer =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(LLAMA).join("tokenizer.json")).unwrap();
    let tokenizer = tokenizer.replacen("1.0", "\\u001b]0;pwned\\u0007", 1);
    let title = r"{{ raise_exception('\x1b]0;pwned\x07\u202e\u200b\x9b2J\r') }}";
    let lines = "{{ raise_exception('a\nerror: b\nhint: c') }}";
    let chat = ["--chat", "--prompt", "t1", "--max-new-tokens", "1"];
    let prompt = ["--prompt", "t1", "--max-new-tokens", "1"];
    for (name, files, arguments, code) in [
        ("plain", &[("chat_template.jinja", title)][..], &chat[..], 1),
        ("plain", &[("chat_template.jinja", lines)], &chat, 1),
        ("plain", &[("tokenizer.json", &tokenizer)], &prompt, 1),
        ("\u{1b}]0;pwned\u{7}", &[("config.json", "{")], &prompt, 1),
        ("a\u{9b}2J\u{202e}\u{fffe}", &[], &prompt, 0),
    ] {
        let (_root, directory) = altered(name, files);
        let output = run(&[&["generate", directory.as_str()], arguments].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(!text.contains(acts), "{text:?}");
        assert!(text.lines().filter(|line| line.starts_with("error:")).count() <= 1, "{text}");
        assert!(!text.contains("\nhint: c"), "{text}");
    }
    let (_root, directory) = altered("a\u{1b}]0;pwned\u{7}\u{9b}2J\u{202e}\u{7f}\u{fffe}\r<&", &[]);
    for format in ["text", "json", "svg", "html", "hf"] {
        let output = run(&["plan", &directory, "--format", format, "--max-memory", "cpu=1MiB,disk=1MiB"]);
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        let text = stdout(&output);
        assert!(!text.contains(acts) && !text.contains('\u{fffe}'), "{format}: {text:?}");
        assert!(format == "hf" || format == "json" || text.contains(r"a\u{1b}]0;pwned\u{7}"), "{format}: {text}");
        if format == "json" {
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!(json["model"].as_str().unwrap().starts_with("a\u{1b}]0;pwned\u{7}\u{9b}2J\u{202e}"));
        }
    }
    let output = run(&["plan", FERRIS, "--quantize", "\u{1b}]0;pwned"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!stderr(&output).contains(acts), "{:?}", stderr(&output));
    for map in [
        r#"{"schema_version": 1, "model": "\u001b]0;pwned", "device_map": {"": "cpu"}}"#,
        r#"{"quantize": {"\u001b]0;pwned": "int8"}, "device_map": {"": "cpu"}}"#,
        r#"{"\u001b]0;pwned": "cpu"}"#,
        r#"{"": "\u009b2J"}"#,
    ] {
        let (root, file) = (tempfile::tempdir().unwrap(), "\u{1b}[2J.json");
        let file = root.path().join(file);
        fs::write(&file, map).unwrap();
        let output = run(&["plan", FERRIS, "--device-map", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{map}");
        assert!(!stderr(&output).contains(acts), "{:?}", stderr(&output));
    }
}

#[test]
fn standard_error_that_cannot_be_written_changes_no_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let packed = directory.path().join("packed");
    let packed = packed.to_str().unwrap();
    let map = directory.path().join("map.json");
    let generate = ["generate", FERRIS, "--prompt", "fn", "--max-new-tokens", "2", "--stats", "--progress", "always"];
    for (arguments, code) in [
        (&generate[..], 0),
        (&["plan", "./nowhere"], 1),
        (&["plan"], 2),
        (&["generate", FERRIS, "--prompt", "x", "--temperature", "-1"], 2),
        (&["generate", FERRIS, "--prompt", "x", "--max-memory", "cpu=1MiB,disk=1MiB"], 3),
        (&["plan", FERRIS, "--output", map.to_str().unwrap()], 0),
        (&["quantize", FERRIS, "--quantize", "int8", "--output", packed, "--progress", "always"], 0),
    ] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = evenkeel(arguments).stdin(Stdio::null()).stderr(full).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        for left in [map.as_path(), Path::new(packed)] {
            let _ = fs::remove_file(left).or_else(|_| fs::remove_dir_all(left));
        }
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = evenkeel(arguments).stdin(Stdio::null()).stderr(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}, closed");
    }
}

#[test]
fn numbers_at_their_ends_are_right_or_usage_errors() {
    const VALUES: [&str; 8] =
        ["0", "1", "-1", "18446744073709551615", "18446744073709551616", "1e308", "1e-320", "nan"];
    let directory = tempfile::tempdir().unwrap();
    let generate = ["generate", FERRIS, "--prompt", "fn", "--max-new-tokens", "1"];
    let whole = ["generate", FERRIS, "--prompt", "fn"];
    let plan = ["plan", FERRIS];
    let gpus = ["plan", FERRIS, "--device", "cuda:0=1GiB@100GB/s", "--device", "cpu=9GiB@9GB/s"];
    let score = ["perplexity", FERRIS, "--text", "tests/fixtures/ferris-7m/eval.txt", "--max-tokens", "3"];
    let rows = ["perplexity", FERRIS, "--text", "Cargo.toml", "--context", "16"];
    let quantize = ["quantize", FERRIS, "--quantize", "int8"];
    for (command, flag, before) in [
        (&generate[..], "--temperature", ""),
        (&generate, "--top-p", ""),
        (&generate, "--min-p", ""),
        (&generate, "--top-k", ""),
        (&generate, "--repetition-penalty", ""),
        (&generate, "--seed", ""),
        (&generate, "--context", ""),
        (&generate, "--threads", ""),
        (&whole, "--max-new-tokens", ""),
        (&plan, "--batch", ""),
        (&plan, "--context", ""),
        (&plan, "--reserve", ""),
        (&plan, "--max-memory", "cpu="),
        (&plan, "--max-memory", "disk="),
        (&gpus, "--reserve", ""),
        (&gpus, "--batch", ""),
        (&gpus, "--max-memory", "cuda:0="),
        (&gpus, "--max-memory", "cpu="),
        (&gpus, "--device", "cuda:1="),
        (&gpus, "--device", "disk="),
        (&gpus, "--device", "cuda:1=1GiB@"),
        (&gpus, "--device-map", ""),
        (&score, "--stride", ""),
        (&score, "--context", ""),
        (&rows, "--max-tokens", ""),
        (&quantize, "--max-shard-size", ""),
        (&quantize, "--threads", ""),
    ] {
        for (at, value) in VALUES.into_iter().enumerate() {
            let value = format!("{flag}={before}{value}");
            let out = directory.path().join(format!("{flag}{at}"));
            let output = if command[0] == "quantize" { vec!["--output", out.to_str().unwrap()] } else { vec![] };
            // A drawn token needs a temperature, which is not given twice.
            let drawn = ["--top-p", "--min-p", "--top-k"].contains(&flag).then_some(["--temperature", "1"]);
            let output = run(&[command, &[&value], &output, drawn.as_ref().map_or(&[], |drawn| &drawn[..])].concat());
            let text = stderr(&output);
            let code = output.status.code();
            assert!(matches!(code, Some(0..=3)), "{command:?} {value}: {code:?} {text}");
            assert!(!text.contains("panicked"), "{command:?} {value}: {text}");
            let is_one_of = |flags: &[&str]| flags.contains(&flag);
            let must_fail = match VALUES[at] {
                "-1" | "nan" | "18446744073709551616" => {
                    !is_one_of(&["--temperature", "--repetition-penalty", "--device-map"])
                }
                "18446744073709551615" => is_one_of(&["--context", "--max-new-tokens", "--batch", "--threads"]),
                "1e-320" => is_one_of(&["--temperature", "--top-p"]),
                "1e308" => is_one_of(&["--temperature", "--top-p", "--min-p", "--repetition-penalty"]),
                "0" => is_one_of(&["--repetition-penalty", "--top-k", "--threads", "--batch", "--context", "--stride"]),
                _ => false,
            };
            assert!(!must_fail || code != Some(0), "{command:?} {value}: {text}");
            assert!(
                code != Some(1) || ["--context", "--max-new-tokens", "--max-tokens", "--device-map"].contains(&flag),
                "{command:?} {value}: {text}"
            );
        }
    }
    for (command, wrong, message) in [
        (&generate[..], "--temperature=1e-320", "a temperature of 1e-320 is too small or too large to divide by"),
        (&generate, "--repetition-penalty=1e-45", "a repetition penalty of 1e-45 is not from 1e-6 to 1e6"),
        (&plan, "--batch=65537", "a batch of 65537 is above 65536, which is the most"),
        (&generate, "--threads=1000000", "4 for each core"),
    ] {
        let output = run(&[command, &[wrong]].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong}: {}", stderr(&output));
        assert!(stderr(&output).contains(message), "{wrong}: {}", stderr(&output));
    }
}

#[test]
fn devices_and_placements_by_their_names_in_transformers() {
    let devices =
        ["--device", "cuda:0=4GiB", "--device", "cuda:1=4GiB", "--device", "cpu=8GiB", "--device", "disk=9GiB"];
    let used = |arguments: &[&str]| -> Vec<String> {
        let output = run(&[&["plan", FERRIS, "--format", "json"], &devices[..], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        let plan: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        let device = |module: &serde_json::Value| module["device"].as_str().unwrap().to_owned();
        let mut used: Vec<_> = plan["modules"].as_array().unwrap().iter().map(device).collect();
        used.sort();
        used.dedup();
        used
    };
    for (name, on) in [
        ("auto", &["cuda:0", "cuda:1"][..]),
        ("balanced", &["cuda:0", "cuda:1"]),
        ("balanced_low_0", &["cuda:1"]),
        ("sequential", &["cuda:0"]),
        ("packed", &["cuda:0"]),
        ("cpu", &["cpu"]),
        ("disk", &["disk"]),
        ("cuda", &["cuda:0"]),
        ("cuda:1", &["cuda:1"]),
        ("0", &["cuda:0"]),
        ("1", &["cuda:1"]),
    ] {
        assert_eq!(used(&["--device-map", name]), on, "{name}");
    }
    // Where both are given, the placement is meant.
    assert_eq!(used(&["--device-map", "sequential", "--placement", "balanced"]), ["cuda:0", "cuda:1"]);
    let directory = tempfile::tempdir().unwrap();
    let map = directory.path().join("map.json");
    fs::write(&map, r#"{"": "cuda"}"#).unwrap();
    assert_eq!(used(&["--device-map", map.to_str().unwrap()]), ["cuda:0"]);
    let no_weights = used(&["--max-memory", "cuda:0=0,cuda:1=0,cpu=0"]);
    assert_eq!(no_weights, ["disk"]);
    for (arguments, code, message) in [
        (&["--device-map", "mps"][..], 1, "a device map is a file, or one of `auto`, `cpu`, `cuda:0`, …"),
        (&["--device-map", "cuda:7"], 3, "there is no cuda:7; `--device-map auto` uses what is there"),
        (
            &["--max-memory", "cuda:3=1GiB"],
            2,
            "a budget is set for cuda:3, which cannot be used; what can be is cuda:0, cuda:1, cpu, disk",
        ),
        (&["--device-map", "cpu", "--max-memory", "cpu=0"], 3, ""),
    ] {
        let output = run(&[&["plan", FERRIS], &devices[..], arguments].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(message), "{arguments:?}: {}", stderr(&output));
        assert!(!stderr(&output).contains("no NVIDIA driver"), "{arguments:?}: {}", stderr(&output));
    }
    let output = generate(&["--prompt", "fn", "--max-new-tokens", "1", "--max-memory", "cpu=0", "--stats"]);
    assert!(output.status.success() && stderr(&output).contains("\ndisk      planned"), "{}", stderr(&output));
}

/// A tokenizer of a letter a token that puts `<s>` before a text, and the text of the case.
fn with_start_token() -> (tempfile::TempDir, String, String) {
    let mut words: Vec<String> = "▁abcdefghijklmnopqrstuvwxyz,.".chars().map(String::from).collect();
    words.extend(["▁h", "▁he", "▁w"].map(str::to_owned));
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let specials = ["<unk>", "<s>", "</s>"];
    let tokens = specials.into_iter().map(str::to_owned).chain(bytes).chain(words);
    let vocab: serde_json::Map<_, _> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<_> = specials
        .iter()
        .enumerate()
        .map(|(id, token)| {
            serde_json::json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "h"], ["▁h", "e"], ["▁", "w"]]},
    });
    let (root, directory) = altered("llama", &[("tokenizer.json", &tokenizer.to_string())]);
    let text = root.path().join("text.txt");
    fs::write(&text, ["hello world, he was here"; 12].join(" ")).unwrap();
    let text = text.to_str().unwrap().to_owned();
    (root, directory, text)
}

#[test]
fn a_start_token_stands_before_every_window() {
    let (_root, directory, text) = with_start_token();
    let score = |more: &[&str]| -> serde_json::Value {
        let base = ["perplexity", &directory, "--text", &text, "--kv-cache", "f32", "--format", "json"];
        let output = run(&[&base[..], more].concat());
        serde_json::from_str(&stdout(&output)).unwrap_or_else(|e| panic!("{e}: {}", stderr(&output)))
    };
    // What Transformers gives in f32 with and without <s>: cases/perplexity_without_bos.py.
    for (flags, perplexity, tokens) in
        [(&["--context", "64"][..], 823.81, 204), (&["--context", "64", "--no-start-token"], 757.87, 200)]
    {
        let report = score(flags);
        let row = &report["rows"][0];
        assert_eq!(row["tokens"], tokens, "{report}");
        assert!((row["perplexity"].as_f64().unwrap() - perplexity).abs() < 0.01, "{report}");
        assert_eq!(report["start_tokens"], serde_json::json!([1]));
        assert_eq!(report["is_behind_start"], flags.len() == 2);
    }
    let strided = score(&["--context", "64", "--stride", "32"]);
    assert_eq!(strided["rows"][0]["tokens"], 204);
    assert_eq!(score(&["--max-tokens", "1"])["rows"][0]["tokens"], 1);
    let base = ["perplexity", &directory, "--text", &text, "--context", "64"];
    for (flag, said) in [
        (None, "each behind the tokenizer's start token"),
        (Some("--no-start-token"), "without the tokenizer's start token"),
    ] {
        let flags: Vec<_> = base.into_iter().chain(flag).collect();
        assert!(stdout(&run(&flags)).lines().next().unwrap().ends_with(said), "{said}");
    }
}

#[test]
fn an_interrupted_comparison_keeps_what_is_finished() {
    let base = ["perplexity", FERRIS, "--text", "tests/fixtures/ferris-7m/eval.txt", "--compare", "int8,nl4,int4"];
    let arguments = [&base[..], &["--max-tokens", "3000"]].concat();
    let mut child =
        evenkeel(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let mut notes = BufReader::new(child.stderr.take().unwrap()).lines();
    while !notes.next().unwrap().unwrap().starts_with("none: ") {}
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let rest: Vec<_> = notes.map(Result::unwrap).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{rest:?}");
    let table = stdout(&output);
    assert!(table.lines().nth(3).unwrap().starts_with("none "), "{table}");
    assert!(table.lines().count() < 7, "it went on: {table}");
    let small = [&base[..5], &["none,auto", "--max-tokens", "20"]].concat();
    let table = stdout(&run(&small));
    let schemes: Vec<_> = table.lines().skip(3).map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(schemes, ["none", "auto"], "{table}");
}

/// Runs the binary by a shell behind `limit`.
fn limited(limit: &str, arguments: &[&str]) -> std::process::Output {
    let mut command = evenkeel(&[]);
    let program = command.get_program().to_owned();
    let script = format!("{limit} && exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    for (name, value) in command.env("NO_COLOR", "1").get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    run_with(shell, b"")
}

#[test]
fn too_little_memory_is_an_error() {
    // Less than the first does not hold the program itself.
    for kib in [55_000, 60_000, 80_000, 120_000, 200_000, 400_000] {
        for arguments in
            [&["plan", FERRIS][..], &["generate", FERRIS, "--prompt", "fn", "--max-new-tokens", "1", "--threads", "4"]]
        {
            let output = limited(&format!("ulimit -v {kib}"), arguments);
            let text = stderr(&output);
            // A few bytes that are not there end the process; what is large, or a thread, is an error.
            let ends = arguments[0] == "generate" && output.status.code().is_none();
            assert!(
                ends || matches!(output.status.code(), Some(0 | 1 | 3)),
                "{kib} {arguments:?}: {:?} {text}",
                output.status
            );
            assert!(!text.contains("panicked"), "{kib} {arguments:?}: {text}");
        }
    }
}

#[test]
fn a_file_that_may_not_grow_so_far_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let packed = directory.path().join("packed");
    let output =
        limited("ulimit -f 64", &["quantize", FERRIS, "--quantize", "int8", "--output", packed.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn only_a_regular_file_is_replaced_by_a_map() {
    let root = tempfile::tempdir().unwrap();
    let [pipe, directory, device] = ["pipe", "directory", "device"].map(|name| root.path().join(name));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fs::create_dir(&directory).unwrap();
    std::os::unix::fs::symlink("/dev/full", &device).unwrap();
    for path in [pipe, directory, device] {
        let output = run(&["plan", FERRIS, "--output", path.to_str().unwrap(), "--force"]);
        assert_eq!(output.status.code(), Some(2), "{}: {}", path.display(), stderr(&output));
        assert!(stderr(&output).contains(", not a regular file"), "{}: {}", path.display(), stderr(&output));
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3);
}
