//! The Hub, served by a fake one on this machine.
#![cfg(feature = "hub")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::disallowed_methods,
    reason = "small numbers, and a test of the environment"
)]

#[path = "support/fake_hub.rs"]
mod fake_hub;
#[path = "hub/faults.rs"]
mod faults;
#[path = "hub/hostile.rs"]
mod hostile;
#[path = "hub/resume.rs"]
mod resume;
#[path = "support/shapes.rs"]
mod shapes;

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use evenkeel::bytes::{Bytes, MIB};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::hub::{Hub, HubEvent, HubOptions, Refusal, RepoId, Repository, Token};
use evenkeel::pool::Pool;
use evenkeel::source::Source;
use evenkeel::{Error, Result};
use fake_hub::{FakeHub, Fault, Files, Part};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const LATER: &str = "89abcdef0123456789abcdef0123456789abcdef";
const INDEX: &str = "model.safetensors.index.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
/// What is fetched of a shard at first.
const FIRST_READ: u64 = MIB / 8;
const SHARD_DATA: usize = 3 * MIB as usize;

fn shard(tensor: &str) -> Vec<u8> {
    let data: Vec<u8> = (0..SHARD_DATA).map(|i| (i * 31 % 251) as u8).collect();
    let view = TensorView::new(Dtype::U8, vec![SHARD_DATA], &data).unwrap();
    safetensors::serialize([(tensor, view)], None).unwrap()
}

/// Two shards of 3 MiB, their index, the small files, and a pickle that nobody may read.
fn files() -> Files {
    let index = format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{}","b":"{}"}}}}"#, SHARDS[0], SHARDS[1]);
    [
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", br#"{"version":"1.0"}"#.to_vec()),
        (INDEX, index.into_bytes()),
        (SHARDS[0], shard("a")),
        (SHARDS[1], shard("b")),
        ("pytorch_model.bin", vec![0; 1000]),
    ]
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .into()
}

struct Scene {
    hub: FakeHub,
    cache: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self::with(files())
    }

    fn with(files: Files) -> Self {
        Self { hub: FakeHub::start("org/name", COMMIT, files), cache: tempfile::tempdir().unwrap() }
    }

    fn options(&self) -> HubOptions {
        HubOptions { endpoint: self.hub.endpoint(), ..HubOptions::new(self.cache.path()) }
    }

    fn open(&self) -> Result<Repository> {
        open(self.options(), "main")
    }

    fn offline(&self, revision: &str) -> Result<Repository> {
        open(HubOptions { offline: true, ..self.options() }, revision)
    }

    fn download(&self) -> Result<PathBuf> {
        self.open()?.download(&mut |_| {})
    }

    fn blobs(&self) -> PathBuf {
        self.cache.path().join("models--org--name/blobs")
    }

    fn snapshot(&self) -> PathBuf {
        self.cache.path().join("models--org--name/snapshots").join(COMMIT)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let strange = self.hub.strange_requests();
        assert!(thread::panicking() || strange.is_empty(), "{strange:?}");
    }
}

fn open(options: HubOptions, revision: &str) -> Result<Repository> {
    Hub::new(options)?.repository(&"org/name".parse()?, revision)
}

/// The error, its causes and its hints, a line each.
fn text(error: &Error) -> String {
    let mut lines = vec![error.to_string()];
    let mut source = error.source();
    while let Some(cause) = source {
        lines.push(format!("cause: {cause}"));
        source = cause.source();
    }
    lines.extend(error.hints().iter().map(|hint| format!("hint: {hint}")));
    lines.join("\n")
}

#[track_caller]
fn assert_says<T>(result: Result<T>, all: &[&str]) {
    let Err(error) = result else { panic!("no error, where {all:?} was to be said") };
    let text = text(&error);
    for part in all {
        assert!(text.contains(part), "{part:?} is not said in:\n{text}");
    }
}

fn assert_same(directory: &Path, files: &Files, names: &[&str]) {
    for name in names {
        assert!(std::fs::read(directory.join(name)).unwrap() == files[*name], "{name}");
    }
}

#[test]
fn what_is_downloaded_is_not_downloaded_again() {
    let scene = Scene::new();
    let mut events = Vec::new();
    let directory = scene.open().unwrap().download(&mut |event| events.push(event)).unwrap();
    assert_eq!(directory, scene.snapshot());
    assert_same(&directory, &files(), &["config.json", "tokenizer.json", INDEX, SHARDS[0], SHARDS[1]]);
    assert!(!directory.join("pytorch_model.bin").exists());
    // The index is there already: it was read to learn the shards' names.
    let total = ["config.json", "tokenizer.json", SHARDS[0], SHARDS[1]].map(|name| files()[name].len() as u64);
    let total = Bytes(total.iter().sum());
    assert_eq!(events[0], HubEvent::Total { bytes: total, files: 4 });
    assert_eq!(events.last(), Some(&HubEvent::Downloaded(total)));

    scene.hub.forget();
    events.clear();
    scene.open().unwrap().download(&mut |event| events.push(event)).unwrap();
    assert_eq!(scene.hub.gets(""), 0);
    assert_eq!(events, [HubEvent::Total { bytes: Bytes::ZERO, files: 0 }]);
}

#[test]
fn all_files_are_of_one_commit() {
    let scene = Scene::new();
    let repository = scene.open().unwrap();
    scene.hub.commit(LATER, [("config.json".to_owned(), b"later".to_vec())].into());
    assert_eq!(repository.commit(), COMMIT);
    assert_eq!(repository.read("config.json", Bytes(10)).unwrap(), b"{}");
    let requests = scene.hub.requests();
    assert!(requests.len() > 1 && requests[1..].iter().all(|request| request.path.contains(COMMIT)), "{requests:?}");
    assert_eq!(scene.open().unwrap().commit(), LATER);
    assert_eq!(open(scene.options(), COMMIT).unwrap().commit(), COMMIT);
    assert_says(open(scene.options(), "v2"), &["repository `org/name` has no revision `v2`", "404"]);
}

#[test]
fn offline_the_cache_suffices() {
    let scene = Scene::new();
    scene.download().unwrap();
    scene.hub.forget();
    for revision in ["main", COMMIT] {
        let repository = scene.offline(revision).unwrap();
        assert_eq!(repository.commit(), COMMIT);
        assert_eq!(repository.download(&mut |_| {}).unwrap(), scene.snapshot());
        assert_eq!(repository.size(SHARDS[0]).unwrap().0, files()[SHARDS[0]].len() as u64);
        assert_eq!(repository.read("config.json", Bytes(10)).unwrap(), b"{}");
        assert_eq!(repository.read_range(SHARDS[0], 0, 8).unwrap(), files()[SHARDS[0]][..8]);
    }
    assert_eq!(scene.hub.requests().len(), 0);
}

#[test]
fn offline_what_is_missing_is_named() {
    let scene = Scene::new();
    let hint = "hint: hf download org/name --revision main";
    assert_says(
        scene.offline("main"),
        &["the Hub is not asked while offline, and the commit of org/name@main is not cached", hint],
    );
    scene.download().unwrap();
    std::fs::remove_file(scene.snapshot().join(SHARDS[1])).unwrap();
    let repository = scene.offline("main").unwrap();
    let message = format!("the Hub is not asked while offline, and {} of org/name@main is not cached", SHARDS[1]);
    assert_says(repository.download(&mut |_| {}), &[&message, hint]);
    assert_says(repository.read_range(SHARDS[1], 0, 8), &[&message, hint]);
    assert_says(repository.size(SHARDS[1]), &[&message, hint]);
}

#[test]
fn a_cached_file_of_another_size_is_downloaded_again() {
    let scene = Scene::new();
    let directory = scene.download().unwrap();
    let blob = directory.join(SHARDS[0]).canonicalize().unwrap();
    std::fs::write(&blob, b"cut").unwrap();
    std::fs::remove_file(directory.join(SHARDS[1]).canonicalize().unwrap()).unwrap();
    scene.hub.forget();
    scene.download().unwrap();
    assert_eq!(scene.hub.gets(""), 2);
    assert_same(&directory, &files(), &SHARDS);
}

#[test]
fn the_token_is_sent_and_not_shown() {
    let scene = Scene::new();
    let options = HubOptions { token: Some(Token::new("hf_secret").unwrap()), ..scene.options() };
    assert!(format!("{options:?}").contains("***"));
    let hub = Hub::new(options.clone()).unwrap();
    let repository = hub.repository(&"org/name".parse().unwrap(), "main").unwrap();
    repository.download(&mut |_| {}).unwrap();
    let requests = scene.hub.requests();
    let has_token = |request: &fake_hub::Request| request.authorization.as_deref() == Some("Bearer hf_secret");
    assert!(requests.len() > SHARDS.len() && requests.iter().all(has_token), "{requests:?}");
    for shown in [format!("{options:?}"), format!("{hub:?}"), format!("{repository:?}")] {
        assert!(!shown.contains("hf_secret"), "{shown}");
    }
    for bad in ["", "hf secret", "hf_\n", "hf_é"] {
        let error = Token::new(bad).unwrap_err();
        assert!(bad.is_empty() || !text(&error).contains(bad));
    }
}

#[test]
fn the_token_stays_with_the_endpoint() {
    let scene = Scene::new();
    let cdn = FakeHub::start("org/name", COMMIT, files());
    scene.hub.redirect_weights(&cdn.endpoint());
    let options = HubOptions { token: Some(Token::new("hf_secret").unwrap()), ..scene.options() };
    let repository = open(options, "main").unwrap();
    assert_eq!(repository.read_range(SHARDS[0], 0, 8).unwrap(), files()[SHARDS[0]][..8]);
    let directory = repository.download(&mut |_| {}).unwrap();
    assert_same(&directory, &files(), &SHARDS);
    assert!(cdn.gets(".safetensors") >= 2);
    assert!(cdn.requests().iter().all(|request| request.authorization.is_none()));
}

/// Runs itself again with tokens in the environment.
#[test]
fn no_token_is_looked_for() {
    const MARK: &str = "EVENKEEL_TEST_TOKEN_IN_ENVIRONMENT";
    if std::env::var_os(MARK).is_none() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_stored").unwrap();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "no_token_is_looked_for"])
            .env(MARK, "1")
            .env("HF_HOME", home.path())
            .env("HF_TOKEN", "hf_implicit")
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .env("HF_HUB_CACHE", "/nowhere")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let scene = Scene::new();
    scene.download().unwrap();
    let requests = scene.hub.requests();
    assert!(requests.len() > 5 && requests.iter().all(|request| request.authorization.is_none()));
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["../../x.safetensors", "/etc/x.safetensors", "a\\..\\x.safetensors", "..", "model.bin"] {
        let index = serde_json::json!({ "weight_map": { "a": name } }).to_string();
        let mut files = files();
        files.insert(INDEX.to_owned(), index.into_bytes());
        files.insert(name.to_owned(), vec![0; 10]);
        let scene = Scene::with(files);
        let repository = scene.open().unwrap();
        scene.hub.forget();
        assert_says(repository.download(&mut |_| {}), &["is no plain name of a .safetensors file"]);
        assert_eq!(scene.hub.gets(""), scene.hub.gets(INDEX), "{name}");
        if name != "model.bin" {
            assert_says(repository.read_range(name, 0, 8), &["is no file name inside a repository"]);
            assert_says(repository.size(name), &["is no file name inside a repository"]);
            assert_says(repository.read(name, Bytes(10)), &["is no file name inside a repository"]);
        }
    }
}

#[test]
fn a_commit_that_is_none_is_refused() {
    for commit in ["../../../x", "", "0123"] {
        let scene = Scene::new();
        scene.hub.commit(commit, files());
        assert_says(scene.open(), &["the commit is missing"]);
    }
}

#[test]
fn headers_cost_few_bytes() {
    let scene = Scene::new();
    let repository = scene.open().unwrap();
    let files = files();
    scene.hub.forget();
    for name in SHARDS {
        let file = &files[name];
        assert_eq!(repository.size(name).unwrap(), Bytes(file.len() as u64));
        let length = repository.read_range(name, 0, 8).unwrap();
        let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        assert_eq!(repository.read_range(name, 8, length).unwrap(), file[8..8 + length]);
    }
    assert_eq!(scene.hub.gets(".safetensors"), SHARDS.len(), "one request for each header");
    assert_eq!(scene.hub.sent(), SHARDS.len() as u64 * FIRST_READ);
    assert!(!scene.snapshot().join(SHARDS[0]).exists());

    let file = &files[SHARDS[0]];
    let end = file.len();
    assert_eq!(repository.read_range(SHARDS[0], 2_000_000, 100).unwrap(), file[2_000_000..2_000_100]);
    assert_eq!(repository.read_range(SHARDS[0], end as u64 - 5, 100).unwrap(), file[end - 5..]);
    assert_eq!(repository.read_range(SHARDS[0], end as u64, 100).unwrap().len(), 0);
    assert_says(repository.read("config.json", Bytes(1)), &["org/name@main/config.json", "2 B", "1 B"]);
    assert_says(repository.size("nothing.json"), &["`nothing.json` is not in `org/name@main`"]);
}

#[test]
fn a_checkpoint_opens_without_its_weights() {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "rms_norm_eps": 1e-05, "max_position_embeddings": 256}"#;
    let mut files = files();
    files.insert("config.json".to_owned(), config.into());
    let weights: usize = SHARDS.iter().map(|name| files[*name].len()).sum();
    let scene = Scene::with(files);
    let remote = Checkpoint::read("name", &scene.open().unwrap(), &Pool::default()).unwrap();
    assert_eq!(remote.catalog.len(), 2);
    assert_eq!(scene.hub.gets(".safetensors"), SHARDS.len());
    assert!(scene.hub.sent() < weights as u64 / 2);
    let local = Checkpoint::open(scene.download().unwrap()).unwrap();
    assert_eq!(remote.catalog, local.catalog);
}

#[test]
fn a_70b_checkpoint_costs_few_bytes_once() {
    let shapes = tempfile::tempdir().unwrap();
    shapes::write(shapes.path(), &shapes::llama_70b(), 30);
    let scene = Scene::with(Files::new());
    let mut files = Files::new();
    for entry in std::fs::read_dir(shapes.path()).unwrap() {
        let path = entry.unwrap().path();
        let (file, name) = (std::fs::File::open(&path).unwrap(), path.file_name().unwrap().to_str().unwrap());
        let mut start = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(&file, MIB), &mut start).unwrap();
        if name.ends_with(".safetensors") {
            scene.hub.extend(name, file.metadata().unwrap().len() as usize);
        }
        files.insert(name.to_owned(), start);
    }
    scene.hub.commit(LATER, files);
    let first = Checkpoint::read("70B", &scene.open().unwrap(), &Pool::default()).unwrap();
    let parameters: u64 = first.catalog.values().map(|tensor| tensor.shape.iter().product::<u64>()).sum();
    assert_eq!(parameters, 70_553_706_496);
    assert!(scene.hub.sent() < 20_000_000, "{} bytes", scene.hub.sent());
    assert_eq!(scene.hub.gets(".safetensors"), first.shards.len());

    scene.hub.forget();
    let again = Checkpoint::read("70B", &scene.open().unwrap(), &Pool::default()).unwrap();
    assert_eq!(again.catalog, first.catalog);
    assert_eq!(scene.hub.gets(".safetensors"), 0, "headers are kept by commit");

    // A kept header that is broken is fetched again.
    let kept = scene.cache.path().join(".evenkeel/models--org--name").join(LATER);
    let header = kept.join(&first.shards[3]);
    for broken in [&b"x"[..], &[255; 9], b""] {
        std::fs::write(&header, broken).unwrap();
        assert_eq!(Checkpoint::read("70B", &scene.open().unwrap(), &Pool::default()).unwrap().catalog, first.catalog);
    }
    assert_eq!(scene.hub.gets(".safetensors"), 3);
}

#[test]
fn two_downloads_at_once_share_the_work() {
    let scene = Scene::new();
    thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| scene.download().map_err(|e| text(&e))));
        for download in both {
            assert_same(&download.join().unwrap().unwrap(), &files(), &SHARDS);
        }
    });
    assert_eq!(scene.hub.gets(".safetensors"), SHARDS.len());
}

#[test]
fn a_held_lock_is_announced_and_waited_for() {
    let scene = Scene::new();
    let locks = scene.cache.path().join(".locks/models--org--name");
    std::fs::create_dir_all(&locks).unwrap();
    let held = std::fs::File::create(locks.join("evenkeel.lock")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut held = Some(held);
    let mut announced = 0;
    let repository = scene.open().unwrap();
    repository
        .download(&mut |event| {
            if matches!(event, HubEvent::LockHeld(_)) {
                announced += 1;
                held = None;
            }
        })
        .unwrap();
    assert_eq!(announced, 1);
}

#[test]
fn names_of_repositories() {
    let long = "x".repeat(97);
    for good in ["gpt2", "org/name", "meta-llama/Llama-3.1-8B", "a_b/c.d_e"] {
        assert_eq!(good.parse::<RepoId>().unwrap().to_string(), good);
    }
    for bad in [
        "", "/", "a/", "/a", "a/b/c", "..", "a/..", "../a", "a..b", "a--b", "-a", "a.", "a b", "a\n", "a/b.git", "é",
        "a?b", "a#b", "a%2fb", &long,
    ] {
        assert!(bad.parse::<RepoId>().is_err(), "{bad:?}");
    }
}

#[test]
fn revisions_and_endpoints_are_checked() {
    let scene = Scene::new();
    for bad in ["", "..", "a/../b", "/a", "a b", "a\n", "a:b", "a\\b"] {
        assert_says(open(scene.options(), bad), &["is not a revision"]);
    }
    for bad in ["", "huggingface.co", "file:///etc", "https://", "http://[", "http://a b"] {
        let options = HubOptions { endpoint: bad.to_owned(), ..scene.options() };
        assert_says(open(options, "main"), &["is no address of a Hub", "HF_ENDPOINT"]);
    }
    let options = HubOptions { endpoint: "https://me:secret@host".to_owned(), ..scene.options() };
    let error = Hub::new(options).unwrap_err();
    assert!(!text(&error).contains("secret"));
}
