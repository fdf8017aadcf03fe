//! The whole binary: exit codes and what users see.

#[path = "support/command.rs"]
mod command;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

use command::{evenkeel, run, run_with, stderr, stdout, transcript};
use insta::assert_snapshot;

const FERRIS: &str = "tests/fixtures/ferris-7m";

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
    let output = run(&["plan", FERRIS, "--device", "cpu=540MiB"]);
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
    let spilled = stdout(&generate(&[&base[..], &["--max-memory", "cpu=26MiB"]].concat()));
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
        "cpu=16896KiB,disk=1GiB",
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
    let arguments =
        ["generate", FERRIS, "--prompt", "Ownership is", "--ignore-eos", "--max-new-tokens", "480", "--format", "json"];
    let mut child =
        evenkeel(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let last = rest.last().unwrap();
    assert!(last.contains(r#""finish":"interrupted""#), "{last}");
    assert!(rest.len() < 480, "it went on");
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
