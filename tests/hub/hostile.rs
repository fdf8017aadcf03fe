//! A Hub, or somebody between here and the Hub, that means harm.

use std::time::Instant;

use super::*;

const NONE: [PathBuf; 0] = [];

/// What lies around, and must be as it was.
struct Victim(tempfile::TempDir);

impl Victim {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "mine").unwrap();
        std::fs::write(directory.path().join("config.json"), "mine").unwrap();
        Self(directory)
    }

    fn names(&self) -> [String; 2] {
        let path = self.0.path().to_str().unwrap();
        [path.to_owned(), format!("{path}/file")]
    }

    #[track_caller]
    fn assert_unharmed(&self, case: &str) {
        let mut names: Vec<_> = std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["config.json", "file"], "{case}");
        for name in names {
            assert_eq!(std::fs::read(self.0.path().join(name)).unwrap(), b"mine", "{case}");
        }
    }
}

/// All files and links under a directory.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() { found.extend(tree(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn an_etag_is_no_path() {
    let victim = Victim::new();
    let [directory, file] = victim.names();
    let relative = format!("../../../..{file}");
    let ways = [(false, Part::Get, "ETag"), (true, Part::Head, "ETag"), (true, Part::Get, "X-Linked-ETag")];
    let long = "a".repeat(300);
    for tag in [&file, &directory, &relative, "../x", "a/b", ".", "..", "", "a.lock", &long, "W/\"..\""] {
        for (mirror, part, header) in ways {
            let scene = Scene::new();
            if mirror {
                scene.hub.forget_paths_info(404);
            }
            scene.hub.fail(part, Fault::Header(header, format!("\"{tag}\"")), usize::MAX);
            if tag == file {
                assert_same(&scene.download().unwrap(), &files(), &["config.json", INDEX, SHARDS[0], SHARDS[1]]);
            } else {
                assert_eq!(scene.open().unwrap().read("config.json", Bytes(MIB)).unwrap(), b"{}", "{tag}");
            }
            victim.assert_unharmed(tag);
            assert!(tree(&scene.blobs()).iter().all(|blob| {
                let name = blob.file_name().unwrap().to_str().unwrap();
                [40, 64].contains(&name.len()) && name.bytes().all(|b| b.is_ascii_hexdigit())
            }));
            let known = ["blobs", "snapshots", "refs", ".locks"].map(|name| format!("{name}/"));
            let is_known = |path: &PathBuf| known.iter().any(|known| path.to_str().unwrap().contains(known));
            assert!(tree(scene.cache.path()).iter().all(is_known), "{tag}: {:?}", tree(scene.cache.path()));
        }
    }
}

#[test]
fn a_commit_is_no_path_and_only_the_one_asked_for() {
    let victim = Victim::new();
    for commit in [&victim.names()[0], "../../../../x", LATER, "", "..", &COMMIT.to_uppercase()] {
        let scene = Scene::new();
        scene.hub.fail(Part::Get, Fault::Header("X-Repo-Commit", commit.to_owned()), usize::MAX);
        assert_says(scene.download(), &["from another commit"]);
        victim.assert_unharmed(commit);
        assert_eq!(tree(&scene.snapshot()), NONE, "{commit}");
        assert_eq!(tree(&scene.blobs()), NONE, "{commit}");
    }
    let scene = Scene::new();
    let repository = scene.open().unwrap();
    scene.hub.fail(Part::Get, Fault::Missing(victim.names()[0].clone()), usize::MAX);
    assert_says(repository.read("config.json", Bytes(MIB)), &["`config.json` of `org/name@main` is not there"]);
    victim.assert_unharmed("a 404");
    assert_eq!(tree(&scene.cache.path().join("models--org--name")), NONE);
}

#[test]
fn no_link_is_followed_where_a_file_is_placed() {
    let victim = Victim::new();
    let scene = Scene::new();
    let blobs = scene.blobs();
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(scene.snapshot()).unwrap();
    let sha256 = fake_hub::oid(SHARDS[0], &files()[SHARDS[0]]);
    let target = &victim.names()[1];
    std::os::unix::fs::symlink(target, blobs.join(&sha256)).unwrap();
    std::os::unix::fs::symlink(target, scene.snapshot().join("tokenizer.json")).unwrap();
    std::os::unix::fs::symlink(target, scene.snapshot().join(SHARDS[1])).unwrap();
    let directory = scene.download().unwrap();
    assert_same(&directory, &files(), &["tokenizer.json", SHARDS[0], SHARDS[1]]);
    victim.assert_unharmed("links in place of files");

    std::fs::remove_dir_all(scene.cache.path().join("models--org--name")).unwrap();
    std::fs::create_dir_all(&blobs).unwrap();
    std::os::unix::fs::symlink(target, blobs.join(format!("{sha256}.evenkeel"))).unwrap();
    assert!(scene.download().is_err());
    victim.assert_unharmed("a link in place of a part");
}

#[test]
fn names_of_siblings_are_checked() {
    let mut hostile = files();
    for name in
        ["../../evil.safetensors", "/etc/evil.safetensors", "a/../../b.safetensors", "\x1b[31m.json", "a\\b.json"]
    {
        hostile.insert(name.to_owned(), vec![1; 10]);
    }
    let scene = Scene::with(hostile);
    let repository = scene.open().unwrap();
    repository.download(&mut |_| {}).unwrap();
    assert!(!repository.has("../../evil.safetensors") && !repository.has("\x1b[31m.json"));
    let asked: Vec<_> = scene.hub.requests().into_iter().map(|request| request.path).collect();
    assert!(asked.iter().all(|path| !path.contains("..") && !path.contains("evil")), "{asked:?}");
}

#[test]
fn the_token_goes_to_no_other_origin() {
    let elsewhere = FakeHub::start("org/name", COMMIT, files());
    let port = elsewhere.endpoint().rsplit_once(':').unwrap().1.to_owned();
    for origin in [
        format!("http://127.0.0.1:{port}"),
        format!("HTTP://127.0.0.1:{port}"),
        format!("http://localhost:{port}"),
        format!("//127.0.0.1:{port}"),
        format!("/\\127.0.0.1:{port}"),
        format!("\\\\127.0.0.1:{port}"),
        format!("http:\\\\127.0.0.1:{port}"),
        format!("http://x:y@127.0.0.1:{port}"),
        format!("//127.0.0.1@127.0.0.1:{port}"),
        format!("\t//127.0.0.1:{port}"),
    ] {
        for status in [301, 302, 303, 307, 308] {
            for (part, path) in [
                (Part::Api, "/api/models/org/name/revision/main".to_owned()),
                (Part::Get, format!("/org/name/resolve/{COMMIT}/config.json")),
            ] {
                let scene = Scene::new();
                scene.hub.fail(part, Fault::Redirect(status, format!("{origin}{path}")), 1);
                let options = HubOptions { token: Some(Token::new("hf_secret").unwrap()), ..scene.options() };
                // Some of these lead on, and some are errors.
                let read = open(options, "main").and_then(|repository| repository.read("config.json", Bytes(MIB)));
                assert!(read.is_err() || read.unwrap() == b"{}");
                let came = elsewhere.requests();
                assert!(came.iter().all(|request| request.authorization.is_none()), "{origin} {status}: {came:?}");
            }
        }
    }
    assert!(elsewhere.requests().len() > 20, "redirects are followed");
}

#[test]
fn redirects_end() {
    let scene = Scene::new();
    scene.hub.fail(Part::Api, Fault::Redirect(307, "/api/models/org/name/revision/main".to_owned()), usize::MAX);
    assert_says(scene.open(), &["is not followed", "too many"]);
    assert_eq!(scene.hub.requests().len(), 6);
    scene.hub.fail(Part::Api, Fault::Redirect(307, "/api/models/org/name/revision/main".to_owned()), 3);
    assert!(scene.open().is_ok());
    scene.hub.fail(Part::Api, Fault::Redirect(302, "file:///etc/passwd".to_owned()), 1);
    assert!(scene.open().is_err());
}

#[test]
fn an_answer_without_an_end_is_not_read_to_it() {
    for status in [200, 500] {
        let scene = Scene::new();
        scene.hub.fail(Part::Api, Fault::Endless(status), usize::MAX);
        let said = if status == 200 { "sent more of" } else { "failed, asked for" };
        assert_says(scene.open(), &[said]);
        assert!(scene.hub.sent() < 100 * MIB, "{} bytes", scene.hub.sent());
    }
    let scene = Scene::new();
    scene.hub.fail(Part::Get, Fault::Endless(200), usize::MAX);
    assert_says(scene.download(), &["sent more of"]);
    assert!(scene.hub.sent() < 50 * MIB, "{} bytes", scene.hub.sent());
    assert_eq!(tree(&scene.blobs()), NONE);
}

#[test]
fn a_trickle_is_as_good_as_silence() {
    let scene = Scene::new();
    scene.download().unwrap();
    std::fs::remove_file(scene.snapshot().join(SHARDS[0]).canonicalize().unwrap()).unwrap();
    // The floor is asked for over twice the timeout.
    let options = HubOptions { timeout: Duration::from_millis(200), ..scene.options() };
    scene.hub.fail(Part::Weights, Fault::Trickle(Duration::from_millis(20)), usize::MAX);
    let begun = Instant::now();
    let repository = open(options, "main").unwrap();
    assert_says(repository.download(&mut |_| {}), &["at less than 1 KiB/s for", SHARDS[0]]);
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn wrong_bytes_are_fetched_once_more_and_do_not_stay() {
    let scene = Scene::new();
    scene.hub.fail(Part::Weights, Fault::WrongByte, 1);
    assert_same(&scene.download().unwrap(), &files(), &SHARDS);

    for mirror in [false, true] {
        let scene = Scene::new();
        if mirror {
            scene.hub.forget_paths_info(405);
        }
        let repository = scene.open().unwrap();
        repository.read(INDEX, Bytes(MIB)).unwrap();
        scene.hub.fail(Part::Weights, Fault::WrongByte, usize::MAX);
        assert_says(repository.download(&mut |_| {}), &["other bytes than its SHA-256 says", "HF_ENDPOINT"]);
        let asked = SHARDS.map(|shard| scene.hub.gets(shard));
        assert!(asked.contains(&2) && asked.iter().all(|asked| *asked <= 2), "{asked:?}");
        // The other shard may have been on its way, and waits for a run that fetches the rest.
        let large = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|m| m.len() > MIB);
        let (parts, whole): (Vec<_>, Vec<_>) = tree(scene.cache.path())
            .into_iter()
            .filter(large)
            .partition(|path| path.extension().is_some_and(|extension| extension == "evenkeel"));
        assert_eq!(whole, NONE);
        assert!(parts.len() <= asked.iter().filter(|asked| **asked < 2).count(), "{parts:?} {asked:?}");
    }
}

#[test]
fn nothing_is_told_to_anybody() {
    let scene = Scene::new();
    scene.hub.fail(Part::Weights, Fault::Header("X-Xet-Hash", "b".repeat(64)), usize::MAX);
    assert_same(&scene.download().unwrap(), &files(), &SHARDS);
    // Two questions about the repository, and one for each of five files.
    assert_eq!(scene.hub.requests().len(), 7);
    assert_eq!(scene.hub.strange_requests().len(), 0);
}
