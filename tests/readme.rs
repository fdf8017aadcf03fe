//! The README's examples.

#[path = "support/command.rs"]
mod command;
#[path = "support/shapes.rs"]
mod shapes;

use std::fs;
use std::path::Path;

use command::{evenkeel, run, run_with, stderr, stdout};

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// Commands that begin with `$ evenkeel` and what the README says that they print.
fn examples() -> Vec<(Vec<String>, String)> {
    let text = readme();
    let blocks = text.split("```console\n").skip(1).map(|block| block.split("```").next().unwrap().to_owned());
    let example = |block: String| {
        let (command, output) = block.strip_prefix("$ evenkeel ")?.split_once('\n')?;
        Some((command.split_whitespace().map(str::to_owned).collect(), output.to_owned()))
    };
    blocks.filter_map(example).collect()
}

#[test]
fn examples_print_what_the_readme_says() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("Llama-3.1-8B");
    fs::create_dir(&model).unwrap();
    shapes::write(&model, &shapes::llama_8b(), 4);
    let ferris = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ferris-7m");
    std::os::unix::fs::symlink(ferris, directory.path().join("ferris-7m")).unwrap();
    let examples = examples();
    assert!(examples.len() >= 4);
    for (arguments, printed) in examples {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = evenkeel(&arguments);
        command.current_dir(directory.path());
        let output = run_with(command, b"");
        assert_eq!(stdout(&output), printed, "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn the_picture_is_what_the_plan_draws() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("Llama-3.1-8B");
    fs::create_dir(&model).unwrap();
    shapes::write(&model, &shapes::llama_8b(), 4);
    let map = Path::new(env!("CARGO_MANIFEST_DIR")).join("device_maps/Llama-3.1-8B/int4-8+6GiB.json");
    let arguments = ["plan", model.to_str().unwrap(), "--device-map", map.to_str().unwrap(), "--format"];
    let devices = ["--device", "cuda:0=8GiB", "--device", "cuda:1=6GiB"];
    let drawn = stdout(&run(&[&arguments[..], &["svg"], &devices].concat()));
    assert_eq!(fs::read_to_string(map.with_extension("svg")).unwrap(), drawn);
    let page = stdout(&run(&[&arguments[..], &["html"], &devices].concat()));
    assert!(page.starts_with("<!doctype html>") && page.contains(&drawn), "{page}");
}

#[test]
fn the_tests_and_the_first_command_are_those_that_run_here() {
    let text = readme();
    assert!(text.contains("\n```console\ncargo test\n```\n"));
    assert!(text.contains(r#"cargo run --release -- generate --model tests/fixtures/ferris-7m --quantize int4 --prompt "Ownership is" --max-new-tokens 40"#));
}

#[test]
fn exit_codes_and_variables_of_the_readme_are_those_of_the_help() {
    let help = stdout(&run(&["--help"]));
    for code in ["0 done", "1 bad input", "2 usage", "3 does not fit", "130 interrupted"] {
        let (number, meaning) = code.split_once(' ').unwrap();
        assert!(help.contains(code), "{code}");
        assert!(readme().contains(&format!("| {number} | {meaning}")), "{code}");
    }
    let variables = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/env.rs")).unwrap();
    let rows: Vec<_> = variables.lines().filter_map(|line| line.strip_prefix("//! | `")).collect();
    assert!(rows.len() > 5, "{rows:?}");
    for row in rows {
        for name in row.split('|').next().unwrap().split(", ") {
            let name = name.trim().trim_matches('`');
            assert!(readme().contains(&format!("`{name}`")), "{name}");
        }
    }
}
