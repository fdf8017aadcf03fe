//! A conversation with the binary, whose lines come from a pipe.

#[path = "support/command.rs"]
mod command;

use std::fs;
use std::process::Output;

use command::{evenkeel, run, run_with, stderr, stdout};
use serde_json::{Value, json};

const FERRIS: &str = "tests/fixtures/ferris-7m";

fn chat(arguments: &[&str], lines: &str) -> Output {
    run_with(evenkeel(&[&["chat", FERRIS], arguments].concat()), lines.as_bytes())
}

#[test]
fn a_turn_is_what_generate_gives_in_the_template() {
    for (system, question) in [(None, "What is a trait?"), (Some("Be brief."), "What is a lifetime?")] {
        let flags: Vec<&str> = system.into_iter().flat_map(|text| ["--system", text]).collect();
        let own = ["generate", FERRIS, "--chat", "--prompt", question, "--max-new-tokens", "12"];
        let wanted = stdout(&run(&[&own[..], &flags].concat()));
        let answered = chat(&[&["--max-new-tokens", "12"], &flags[..]].concat(), &format!("{question}\n"));
        assert_eq!(answered.status.code(), Some(0), "{}", stderr(&answered));
        assert_eq!(stdout(&answered), wanted + "\n", "{system:?} {question}");
        // The same, told on the way.
        let command = system.map(|text| format!("/system {text}\n")).unwrap_or_default();
        let told = chat(&["--max-new-tokens", "12"], &format!("{command}{question}\n/quit\nnever asked\n"));
        assert_eq!(stdout(&told), stdout(&answered));
    }
}

#[test]
fn commands_do_what_they_say() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("said.json");
    let save = format!("/save {}\n", file.display());
    let lines = format!("/system Be brief.\nHello\n\n/memory\n{save}{save}/clear\n/memory\n/nope\n/help\n");
    let output = chat(&["--max-new-tokens", "5", "--context", "200"], &lines);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let told = stderr(&output);
    for part in [
        "of 200 tokens are left",
        "200 of 200 tokens are left",
        "3 messages are in",
        "there is no `/nope`",
        "/save FILE",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(told.contains("error: `") && told.contains("said.json` is there already"), "{told}");
    let said: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let answer = stdout(&output).strip_suffix('\n').unwrap().to_owned();
    let wanted = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": answer},
    ]);
    assert_eq!(said, wanted);
}

#[test]
fn what_the_context_does_not_hold_is_said_and_the_conversation_goes_on() {
    let long = "word ".repeat(200);
    let output = chat(&["--max-new-tokens", "4", "--context", "64"], &format!("{long}\n/memory\nHello\n"));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("the context holds 64 tokens"), "{}", stderr(&output));
    assert!(stderr(&output).contains("64 of 64 tokens are left"), "{}", stderr(&output));
    assert!(stdout(&output).len() > 1, "the second is answered");
}
