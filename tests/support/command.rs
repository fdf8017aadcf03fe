//! The whole binary, run as a user would.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

/// The binary in the project's directory, with no variables that have an effect but those given.
pub fn evenkeel(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_evenkeel"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    #[allow(clippy::disallowed_methods, reason = "a command is run without this process's variables")]
    for (name, _) in std::env::vars() {
        if name.starts_with("HF_") || ["NO_COLOR", "CLICOLOR_FORCE", "TERM"].contains(&name.as_str()) {
            command.env_remove(name);
        }
    }
    command.env("TMPDIR", env!("CARGO_TARGET_TMPDIR"));
    command.env("XDG_CACHE_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/caches"));
    command
}

/// Runs it to its end with `stdin` as its standard input.
pub fn run_with(mut command: Command, stdin: &[u8]) -> Output {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that does not read its input closes it.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

/// Runs it to its end with no input.
pub fn run(arguments: &[&str]) -> Output {
    run_with(evenkeel(arguments), b"")
}

/// What it printed on standard output.
pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What it printed on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Exit code and both outputs as one text.
pub fn transcript(output: &Output) -> String {
    format!(
        "exit code: {}\n--- stdout ---\n{}\n--- stderr ---\n{}",
        output.status.code().map_or("none".to_owned(), |code| code.to_string()),
        stdout(output),
        stderr(output)
    )
}
