//! A Hub that fails, and the words for it.

use super::*;

#[test]
fn every_fault_has_its_own_message() {
    use Fault::{Cut, Page, RateLimit, Short, Status};
    use Part::{Api, Get};
    let token = "hf_secret";
    let page = "/org/name";
    let cases: [(Part, Fault, Option<&str>, &[&str]); 19] = [
        (Api, Status(401, ""), Some(token), &["refused the token", "hf auth login", "401", "the fake Hub says no"]),
        (Api, Status(401, ""), None, &["may not be read without a token", "HF_TOKEN", page]),
        (
            Api,
            Status(401, "RepoNotFound"),
            None,
            &["repository `org/name` is not at http://", "or is private", "HF_TOKEN"],
        ),
        (Api, Status(401, "GatedRepo"), None, &["`org/name` is gated", "request access at http://", page, "HF_TOKEN"]),
        (Api, Status(403, "GatedRepo"), Some(token), &["`org/name` is gated", "request access at http://"]),
        (Get, Status(403, "GatedRepo"), Some(token), &["`org/name` is gated"]),
        (Api, Status(403, ""), Some(token), &["denies access to `org/name@main`"]),
        (Api, Status(404, "RepoNotFound"), None, &["repository `org/name` is not at", "check the name"]),
        (Api, Status(404, "RevisionNotFound"), None, &["has no revision `main`", "/tree/main"]),
        (Api, Status(404, ""), None, &["`org/name@main` is not at http://"]),
        (Get, Status(404, "EntryNotFound"), None, &["of `org/name@main` is not there", "/tree/main"]),
        (Api, RateLimit(None), None, &["too many requests", "set HF_TOKEN"]),
        (Api, RateLimit(Some(100)), Some(token), &["too many requests", "the next one in 100 s"]),
        (Api, Status(503, ""), None, &["failed, asked for `org/name@main`", "503", "status.huggingface.co"]),
        (Get, Status(500, ""), None, &["failed, asked for", "500"]),
        (Api, Page, None, &["did not send `org/name@main` as the Hub sends it", "login page"]),
        (Get, Page, None, &["as the Hub sends it", "login page"]),
        (Get, Cut, None, &["the connection to http://", "broke while it sent"]),
        (Get, Short, None, &["came as ", " bytes instead of "]),
    ];
    thread::scope(|scope| {
        for (part, fault, token, all) in cases {
            scope.spawn(move || {
                let scene = Scene::new();
                let case = format!("{part:?} {fault:?}");
                let answered = if let Status(status, code) = fault { Some((status, code)) } else { None };
                scene.hub.fail(part, fault, usize::MAX);
                let token = token.map(|token| Token::new(token).unwrap());
                let options = HubOptions { token, ..scene.options() };
                let result = open(options, "main").and_then(|repository| repository.download(&mut |_| {}));
                let error = result.expect_err(&case);
                if let Some((status, code)) = answered {
                    let refusal = error.cause::<Refusal>().unwrap();
                    let code = Some(code).filter(|code| !code.is_empty());
                    assert_eq!((refusal.status, refusal.code.as_deref()), (status, code), "{case}");
                }
                let text = text(&error);
                for part in all {
                    assert!(text.contains(part), "{case}: {part:?} is not said in:\n{text}");
                }
                assert!(!text.contains("hf_secret"), "{text}");
            });
        }
    });
}

#[test]
fn a_wrong_file_does_not_stay_in_the_cache() {
    let scene = Scene::new();
    scene.hub.fail(Part::Get, Fault::Short, usize::MAX);
    assert!(scene.download().is_err());
    let left = std::fs::read_dir(scene.snapshot()).map_or(0, Iterator::count);
    let blobs = std::fs::read_dir(scene.cache.path().join("models--org--name/blobs")).unwrap().count();
    assert_eq!((left, blobs), (0, 0));
}

#[test]
fn what_may_pass_is_tried_again() {
    for (part, fault) in [
        (Part::Api, Fault::Status(502, "")),
        (Part::Api, Fault::RateLimit(Some(0))),
        (Part::Get, Fault::RateLimit(Some(1))),
        (Part::Get, Fault::Status(500, "")),
        (Part::Get, Fault::Cut),
        (Part::Get, Fault::Short),
    ] {
        let scene = Scene::new();
        scene.hub.fail(part, fault.clone(), 1);
        let directory = scene.download().unwrap_or_else(|e| panic!("{part:?} {fault:?}: {}", text(&e)));
        assert_same(&directory, &files(), &["config.json", INDEX, SHARDS[0], SHARDS[1]]);
    }
}

#[test]
fn a_rate_limit_is_announced() {
    let scene = Scene::new();
    let repository = scene.open().unwrap();
    repository.read(INDEX, Bytes(MIB)).unwrap();
    scene.hub.fail(Part::Get, Fault::RateLimit(Some(1)), 1);
    let mut announced = 0;
    repository.download(&mut |event| announced += usize::from(matches!(event, HubEvent::RateLimited(_)))).unwrap();
    assert!(announced > 0);
}

#[test]
fn a_server_without_ranges_is_not_read_to_the_end() {
    let scene = Scene::new();
    let repository = scene.open().unwrap();
    scene.hub.fail(Part::Get, Fault::NoRanges, usize::MAX);
    let hint = "hf download org/name --revision main";
    assert_says(repository.read_range(SHARDS[0], 0, 8), &["sent more of", "131072 bytes", hint]);
    assert_says(repository.read_range(SHARDS[0], 2_000_000, 8), &["sent more of", hint]);
}

#[test]
fn a_size_beyond_all_bounds_is_not_believed() {
    let scene = Scene::new();
    let repository = scene.open().unwrap();
    scene.hub.fail(Part::Get, Fault::Announce(u64::MAX), usize::MAX);
    assert_eq!(repository.read(INDEX, Bytes(MIB)).unwrap(), files()[INDEX]);
    assert_eq!(repository.read_range(SHARDS[0], 0, 8).unwrap(), files()[SHARDS[0]][..8]);

    let mirror = Scene::new();
    mirror.hub.forget_paths_info(404);
    mirror.hub.fail(Part::Head, Fault::Announce(u64::MAX), usize::MAX);
    assert_says(mirror.open().unwrap().read(INDEX, Bytes(MIB)), &["at most 1.0 MiB is read of such a file"]);
    mirror.hub.fail(Part::Head, Fault::Announce(u64::MAX), 3);
    assert_says(mirror.download(), &["at most"]);
}

#[test]
fn an_unreachable_hub_says_what_the_cache_has() {
    let scene = Scene::new();
    scene.download().unwrap();
    let gone = HubOptions { endpoint: "http://127.0.0.1:9".to_owned(), ..scene.options() };
    let result = open(gone.clone(), "main");
    let cached = format!("commit {COMMIT} of `org/name` is in the cache: HF_HUB_OFFLINE=1 uses it");
    assert_says(result, &["cannot reach http://127.0.0.1:9", "HF_ENDPOINT", &cached]);
    let empty = tempfile::tempdir().unwrap();
    let error = open(HubOptions { cache: empty.path().to_owned(), ..gone }, "main").unwrap_err();
    assert!(!text(&error).contains("commit"), "{}", text(&error));
}

#[test]
fn silence_is_tried_again_and_given_up_at_last() {
    let scene = Scene::new();
    let options = HubOptions { timeout: Duration::from_millis(100), ..scene.options() };
    scene.hub.fail(Part::Api, Fault::Silence(Duration::from_millis(900)), 1);
    open(options.clone(), "main").unwrap();
    scene.hub.fail(Part::Api, Fault::Silence(Duration::from_millis(900)), usize::MAX);
    assert_says(open(options, "main"), &["sent nothing for", "asked for `org/name@main`"]);
}
