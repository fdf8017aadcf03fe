//! A file of prompts answered by the binary.

#[path = "support/command.rs"]
mod command;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use command::{evenkeel, run, stderr, stdout};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const FERRIS: &str = "tests/fixtures/ferris-7m";

struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new(input: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("in.jsonl"), input).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn arguments<'a>(&self, more: &'a [&'a str]) -> Vec<String> {
        let [input, output] = ["in.jsonl", "out.jsonl"].map(|name| self.path(name).display().to_string());
        let own = ["batch", FERRIS, "--input", &input, "--output", &output];
        own.into_iter().chain(more.iter().copied()).map(String::from).collect()
    }

    fn run(&self, more: &[&str]) -> Output {
        let arguments = self.arguments(more);
        run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The answers by the names of their lines.
    fn answers(&self) -> BTreeMap<String, Value> {
        answers(&fs::read_to_string(self.path("out.jsonl")).unwrap())
    }
}

fn answers(lines: &str) -> BTreeMap<String, Value> {
    let line = |line| {
        let value: Value = serde_json::from_str(line).unwrap();
        (value["custom_id"].as_str().unwrap().to_owned(), value["response"].clone())
    };
    let all: Vec<_> = lines.lines().map(line).collect();
    let count = all.len();
    let by_name: BTreeMap<_, _> = all.into_iter().collect();
    assert_eq!(by_name.len(), count, "a line has two answers: {lines}");
    by_name
}

fn text(response: &Value) -> &str {
    assert_eq!(response["status_code"], 200, "{response}");
    response["body"]["choices"][0]["text"].as_str().unwrap()
}

fn generated(prompt: &str, new: &str) -> String {
    let output = run(&["generate", FERRIS, "--prompt", prompt, "--max-new-tokens", new]);
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

const PROMPTS: [&str; 6] = ["Ownership is", "A trait", "fn main() {", "The borrow checker", "Cargo", "Lifetimes are"];

#[test]
fn answers_are_what_generate_gives() {
    let request = |(at, prompt): (usize, &&str)| {
        let body = json!({"prompt": prompt, "max_tokens": 16});
        match at % 3 {
            0 => json!({"custom_id": format!("r{at}"), "method": "POST", "url": "/v1/completions", "body": body}),
            1 => json!({"custom_id": format!("r{at}"), "prompt": prompt, "max_tokens": 16}),
            _ => body,
        }
    };
    let lines: Vec<_> = PROMPTS.iter().enumerate().map(request).map(|line| line.to_string()).collect();
    let lines = lines.join("\n");
    let wanted: Vec<_> = PROMPTS.iter().map(|prompt| generated(prompt, "16")).collect();
    for more in [&[][..], &["--batch", "1"], &["--batch", "3", "--kv-memory", "2MiB", "--context", "128"]] {
        let files = Files::new(&lines);
        let output = files.run(more);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(stderr(&output).contains("6 lines answered, 0 bad"), "{}", stderr(&output));
        let answers = files.answers();
        for (at, wanted) in wanted.iter().enumerate() {
            let name = if at % 3 == 2 { (at + 1).to_string() } else { format!("r{at}") };
            assert_eq!(text(&answers[&name]), wanted, "{name} {more:?}");
        }
    }
}

#[test]
fn a_text_has_a_prompt_a_line() {
    let files = Files::new("Ownership is\n\r\n  \nA trait\r\nCargo");
    let output = files.run(&["--input-format", "text", "--max-new-tokens", "9"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let answers = files.answers();
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["1", "4", "5"]);
    for (name, prompt) in [("1", "Ownership is"), ("4", "A trait"), ("5", "Cargo")] {
        assert_eq!(text(&answers[name]), generated(prompt, "9"), "{prompt}");
    }
    fs::remove_file(files.path("out.jsonl")).unwrap();
    assert!(files.run(&["--input-format", "text", "--chat", "--max-new-tokens", "4"]).status.success());
    for response in files.answers().values() {
        assert!(response["body"]["choices"][0]["message"]["content"].is_string(), "{response}");
    }
}

#[test]
fn bad_lines_are_named_and_do_not_stop_the_rest() {
    let too_long = "x ".repeat(5000);
    let lines = [
        r#"{"custom_id": "good", "prompt": "Cargo", "max_tokens": 3}"#.to_owned(),
        "not json".to_owned(),
        r#"{"custom_id": "url", "url": "/v1/images", "body": {}}"#.to_owned(),
        r#"{"custom_id": "good", "prompt": "again"}"#.to_owned(),
        format!(r#"{{"custom_id": "long", "prompt": "{too_long}"}}"#),
        r#"{"custom_id": "type", "prompt": "x", "temperature": "hot"}"#.to_owned(),
        r#"{"custom_id": "less", "prompt": "x", "temperature": -1}"#.to_owned(),
        r#"{"custom_id": "also good", "prompt": "Cargo", "max_tokens": 3, "n": 2}"#.to_owned(),
    ];
    let files = Files::new(&(lines.join("\n") + "\n"));
    let output = files.run(&[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let told = stderr(&output);
    for part in ["line 2 is bad", "line 3 is bad: `url` is", "line 4 is bad", "line 5 is bad", "others are bad too"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(told.contains("2 lines answered, 6 bad"), "{told}");
    let written = fs::read_to_string(files.path("out.jsonl")).unwrap();
    assert_eq!(written.lines().count(), lines.len());
    let of = |name: &str, status: u64| {
        let value = |line: &str| serde_json::from_str::<Value>(line).unwrap();
        let is_meant = |value: &Value| value["custom_id"] == name && value["response"]["status_code"] == status;
        written.lines().map(value).find(is_meant).unwrap_or_else(|| panic!("no {status} of {name} in {written}"))
    };
    assert_eq!(of("also good", 200)["response"]["body"]["choices"].as_array().unwrap().len(), 2);
    for name in ["2", "url", "good", "long", "type", "less"] {
        let error = &of(name, 400)["response"]["body"]["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
    }
    of("good", 200);
}

#[test]
fn what_was_stopped_goes_on() {
    let line =
        |at: usize| json!({"custom_id": format!("r{at}"), "prompt": PROMPTS[at % 6], "max_tokens": 8}).to_string();
    let all: Vec<_> = (0..8).map(line).collect();
    let files = Files::new(&(all[..5].join("\n") + "\n"));
    assert!(files.run(&[]).status.success());
    let again = files.run(&[]);
    assert_eq!(again.status.code(), Some(2), "{}", stderr(&again));
    assert!(stderr(&again).contains("`--resume`") && stderr(&again).contains("`--force`"), "{}", stderr(&again));
    // As if the last answer had been half written.
    let mut written = fs::read_to_string(files.path("out.jsonl")).unwrap();
    let kept = written.lines().take(3).map(str::to_owned).collect::<Vec<_>>();
    written.truncate(written.len() - 40);
    fs::write(files.path("out.jsonl"), &written).unwrap();
    fs::write(files.path("in.jsonl"), all.join("\n")).unwrap();
    let resumed = files.run(&["--resume"]);
    assert_eq!(resumed.status.code(), Some(0), "{}", stderr(&resumed));
    assert!(stderr(&resumed).contains("4 lines answered, 4 were before, 0 bad"), "{}", stderr(&resumed));
    assert_eq!(files.answers().len(), 8);
    let now = fs::read_to_string(files.path("out.jsonl")).unwrap();
    assert!(kept.iter().zip(now.lines()).all(|(kept, now)| kept == now), "what was there is there");
    assert!(files.run(&["--force"]).status.success());
    assert_eq!(files.answers().len(), 8);
}

#[test]
fn an_interrupt_leaves_whole_lines() {
    let line =
        |at: usize| json!({"custom_id": format!("r{at}"), "prompt": PROMPTS[at % 6], "max_tokens": 60}).to_string();
    let files = Files::new(&(0..400).map(line).collect::<Vec<_>>().join("\n"));
    let arguments = files.arguments(&["--batch", "2"]);
    let mut child = evenkeel(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).spawn().unwrap();
    let begun = Instant::now();
    while fs::read_to_string(files.path("out.jsonl")).unwrap_or_default().lines().count() < 3 {
        assert!(begun.elapsed() < Duration::from_mins(1), "nothing comes");
        std::thread::sleep(Duration::from_millis(10));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let there = files.answers().len();
    assert!((3..400).contains(&there), "{there}");
    assert!(files.path("out.jsonl").metadata().unwrap().len() > 0);
}

#[test]
fn inputs_and_outputs_that_cannot_be() {
    let files = Files::new("{\"prompt\": \"x\", \"max_tokens\": 2}\n");
    let path = files.path("in.jsonl").display().to_string();
    let missing = run(&["batch", FERRIS, "--input", "nowhere.jsonl", "--output", "-"]);
    assert_eq!(missing.status.code(), Some(1), "{}", stderr(&missing));
    let same = run(&["batch", FERRIS, "--input", &path, "--output", &path, "--force"]);
    assert_eq!(same.status.code(), Some(2), "{}", stderr(&same));
    assert!(Path::new(&path).metadata().unwrap().len() > 0, "the input is still there");
    let small = run(&["batch", FERRIS, "--input", &path, "--output", "-", "--kv-memory", "1KiB"]);
    assert_eq!(small.status.code(), Some(2), "{}", stderr(&small));
    assert!(stderr(&small).contains("`--context"), "{}", stderr(&small));
    let shown = run(&["batch", FERRIS, "--input", &path, "--output", "-"]);
    assert_eq!(answers(&stdout(&shown)).len(), 1);
}
