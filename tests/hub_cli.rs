//! The whole binary against a Hub on this machine.
#![cfg(feature = "hub")]

#[path = "support/command.rs"]
mod command;
#[path = "support/fake_hub.rs"]
mod fake_hub;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use command::{evenkeel, run, run_with, stderr, stdout};
use fake_hub::{FakeHub, Fault, Files, Part};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const FERRIS: &str = "tests/fixtures/ferris-7m";
const GENERATE: [&str; 7] =
    ["generate", "ferris/ferris-7m", "--prompt", "A trait object", "--max-new-tokens", "8", "--quiet"];

fn ferris() -> Files {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(FERRIS);
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())).collect()
}

fn hub() -> FakeHub {
    FakeHub::start("ferris/ferris-7m", COMMIT, ferris())
}

/// Runs the binary with `hub` as the Hub and a cache in `home`.
fn with_hub(arguments: &[&str], hub: &FakeHub, home: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = evenkeel(arguments);
    command.env("HF_ENDPOINT", hub.endpoint()).env("HF_HOME", home).envs(variables.iter().copied());
    run_with(command, b"")
}

#[test]
fn generate_by_name_is_generate_from_a_directory() {
    let (hub, home) = (hub(), tempfile::tempdir().unwrap());
    let here = run(&[&["generate", FERRIS], &GENERATE[2..]].concat());
    let first = with_hub(&GENERATE, &hub, home.path(), &[]);
    assert_eq!((stdout(&first), stderr(&first)), (stdout(&here), String::new()));
    assert!(home.path().join("hub/models--ferris--ferris-7m/snapshots").join(COMMIT).is_dir());

    hub.forget();
    let cached = with_hub(&GENERATE, &hub, home.path(), &[]);
    assert_eq!(stdout(&cached), stdout(&here));
    assert_eq!(hub.gets(".safetensors"), 0, "the second run downloads no weights");

    hub.forget();
    let offline = with_hub(&GENERATE, &hub, home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(stdout(&offline), stdout(&here));
    assert!(hub.requests().is_empty());
}

#[test]
fn a_plan_by_name_downloads_no_weights() {
    let (hub, home) = (hub(), tempfile::tempdir().unwrap());
    let by_name =
        with_hub(&["plan", "ferris/ferris-7m", "--device", "cpu=1GiB", "--revision", COMMIT], &hub, home.path(), &[]);
    let here = run(&["plan", FERRIS, "--device", "cpu=1GiB"]);
    assert_eq!(
        stdout(&by_name).split_once('\n').unwrap().1,
        stdout(&here).split_once('\n').unwrap().1,
        "{}",
        stderr(&by_name)
    );
    assert!(stdout(&by_name).starts_with("ferris/ferris-7m: "));
    // Each shard is read for its first MiB at most, once.
    assert_eq!(hub.gets(".safetensors"), 3);
    assert!(hub.sent() < 4 << 20, "{} bytes", hub.sent());
}

#[test]
fn an_interrupt_ends_a_download_at_once_and_the_next_run_goes_on() {
    let (hub, home) = (hub(), tempfile::tempdir().unwrap());
    hub.fail(Part::Weights, Fault::Stall(Duration::from_mins(1)), usize::MAX);
    let mut command = evenkeel(&GENERATE);
    command.env("HF_ENDPOINT", hub.endpoint()).env("HF_HOME", home.path()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    while hub.gets(".safetensors") == 0 {
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());

    hub.fail(Part::Api, Fault::Cut, 0);
    hub.forget();
    let whole =
        ferris().into_iter().filter(|(name, _)| name.ends_with(".safetensors")).map(|(_, file)| file.len() as u64);
    let again = with_hub(&GENERATE, &hub, home.path(), &[]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert!(hub.requests().iter().any(|request| request.range.is_some()), "nothing was gone on with");
    assert!(hub.sent() < whole.sum::<u64>(), "{} bytes", hub.sent());
}

#[test]
fn what_the_hub_refuses_ends_with_1_and_a_hint() {
    let (hub, home) = (hub(), tempfile::tempdir().unwrap());
    let offline = with_hub(&GENERATE, &hub, home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.status.code(), Some(1));
    assert!(stderr(&offline).starts_with("error: the Hub is not asked while offline"), "{}", stderr(&offline));
    assert!(stderr(&offline).contains("\nhint: "), "{}", stderr(&offline));

    hub.fail(Part::Api, Fault::Status(403, "GatedRepo"), 9);
    let gated = with_hub(&GENERATE, &hub, home.path(), &[("HF_TOKEN", "hf_secret")]);
    assert_eq!(gated.status.code(), Some(1));
    assert!(stderr(&gated).contains("is gated") && !stderr(&gated).contains("hf_secret"), "{}", stderr(&gated));
}
