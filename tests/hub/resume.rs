//! Connections that break, mirrors that know less, and callers that stop.

use std::time::Instant;

use evenkeel::{Cancel, ErrorKind};

use super::*;

fn ranges(hub: &FakeHub, file: &str) -> Vec<(usize, Option<String>)> {
    let asked = hub.requests().into_iter().filter(|request| request.method == "GET" && request.path.ends_with(file));
    asked.filter_map(|request| Some((request.range?.0, request.if_range))).collect()
}

#[test]
fn a_broken_connection_is_gone_on_with() {
    let shard = &files()[SHARDS[0]];
    let tag = format!("\"{}\"", fake_hub::oid(SHARDS[0], shard));
    for fault in [Fault::Cut, Fault::Stall(Duration::from_secs(2))] {
        let scene = Scene::new();
        // The index, so that only weights are left.
        let repository = open(HubOptions { timeout: Duration::from_millis(300), ..scene.options() }, "main").unwrap();
        repository.read(INDEX, Bytes(MIB)).unwrap();
        scene.hub.forget();
        scene.hub.fail(Part::Weights, fault, 2);
        assert_same(&repository.download(&mut |_| {}).unwrap(), &files(), &SHARDS);
        let all: Vec<_> = SHARDS.into_iter().flat_map(|file| ranges(&scene.hub, file)).collect();
        assert_eq!(all.len(), 2, "{all:?}");
        assert!(
            all.iter()
                .all(|(first, _)| [shard.len() / 2, shard.len() * 3 / 4].iter().any(|at| at.abs_diff(*first) < 2))
        );
        assert!(all.iter().any(|(_, if_range)| *if_range == Some(tag.clone())) || scene.hub.gets(SHARDS[0]) == 1);
        assert!(scene.hub.sent() < 2 * shard.len() as u64 + 5000, "{} bytes", scene.hub.sent());
    }
}

#[test]
fn a_new_run_goes_on_where_the_last_one_ended() {
    let shard = &files()[SHARDS[0]];
    let scene = Scene::new();
    scene.download().unwrap();
    let blob = scene.snapshot().join(SHARDS[0]).canonicalize().unwrap();
    let partial = blob.with_extension("evenkeel");
    for (left, first) in [
        (&shard[..2_000_000], Some(2_000_000)),
        (&shard[..1], Some(1)),
        // Whole, but not in its place yet.
        (&shard[..], None),
        // Longer than the file.
        (&vec![0; SHARD_DATA + 4096], None),
    ] {
        std::fs::remove_file(&blob).unwrap();
        std::fs::write(&partial, left).unwrap();
        scene.hub.forget();
        let mut events = Vec::new();
        scene.open().unwrap().download(&mut |event| events.push(event)).unwrap();
        assert_same(&scene.snapshot(), &files(), &SHARDS);
        assert_eq!(ranges(&scene.hub, SHARDS[0]).first().map(|(first, _)| *first), first);
        assert_eq!(scene.hub.gets(""), usize::from(left.len() != shard.len()));
        assert_eq!(events.last(), Some(&HubEvent::Downloaded(Bytes(shard.len() as u64))));
        assert!(!partial.exists());
    }
    // What was left is of other bytes: found out by the SHA-256, and fetched anew.
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&partial, [7; 1000]).unwrap();
    scene.download().unwrap();
    assert_same(&scene.snapshot(), &files(), &SHARDS);
}

#[test]
fn another_file_behind_the_same_name_begins_anew() {
    let scene = Scene::new();
    let repository = scene.open().unwrap();
    repository.read(INDEX, Bytes(MIB)).unwrap();
    // After the first half the server has another ETag, and sends all from the beginning.
    scene.hub.fail(Part::Weights, Fault::Cut, 2);
    let mut broken = false;
    let mut on_event = |event| {
        if let HubEvent::Downloaded(bytes) = event
            && bytes.0 > MIB
            && !broken
        {
            broken = true;
            scene.hub.fail(Part::Weights, Fault::NoRanges, 2);
        }
    };
    assert_same(&repository.download(&mut on_event).unwrap(), &files(), &SHARDS);
}

#[test]
fn what_killed_runs_have_left_is_swept_after_a_week() {
    let scene = Scene::new();
    std::fs::create_dir_all(scene.blobs()).unwrap();
    let (old, young, other) = (
        scene.blobs().join("old.evenkeel"),
        scene.blobs().join("young.evenkeel"),
        scene.blobs().join("old.incomplete"),
    );
    for path in [&old, &young, &other] {
        let file = std::fs::File::create(path).unwrap();
        if path != &young {
            file.set_modified(std::time::SystemTime::now() - Duration::from_hours(8 * 24)).unwrap();
        }
    }
    scene.download().unwrap();
    assert_eq!([&old, &young, &other].map(|path| path.exists()), [false, true, true]);
}

#[test]
fn a_blob_that_is_there_is_linked_and_not_downloaded() {
    let scene = Scene::new();
    scene.download().unwrap();
    let mut later = files();
    later.insert("config.json".to_owned(), b"{ }".to_vec());
    scene.hub.commit(LATER, later.clone());
    scene.hub.forget();
    assert_same(&scene.download().unwrap(), &later, &["config.json", INDEX, SHARDS[0], SHARDS[1]]);
    assert_eq!((scene.hub.gets(""), scene.hub.gets("config.json")), (1, 1));
    let link = std::fs::read_link(scene.snapshot().join(SHARDS[0])).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(fake_hub::oid(SHARDS[0], &files()[SHARDS[0]])));
}

#[test]
fn a_mirror_that_knows_no_sizes_is_asked_for_each() {
    for status in [404, 405, 501] {
        let scene = Scene::new();
        scene.hub.forget_paths_info(status);
        assert_same(
            &scene.download().unwrap(),
            &files(),
            &["config.json", "tokenizer.json", INDEX, SHARDS[0], SHARDS[1]],
        );
        let heads: Vec<_> = scene.hub.requests().into_iter().filter(|r| r.method == "HEAD").map(|r| r.path).collect();
        assert_eq!(heads.len(), 5, "{heads:?}");
        assert!(!heads.iter().any(|path| path.contains(".bin")));
        let cdn = FakeHub::start("org/name", COMMIT, files());
        let redirected = Scene::new();
        redirected.hub.forget_paths_info(status);
        redirected.hub.redirect_weights(&cdn.endpoint());
        assert_same(&redirected.download().unwrap(), &files(), &SHARDS);
    }
}

#[test]
fn a_wish_to_stop_is_heard_wherever_it_waits() {
    let long = Duration::from_secs(20);
    let cases = [
        (Part::Api, Fault::Silence(long)),
        (Part::Get, Fault::Silence(long)),
        (Part::Get, Fault::RateLimit(Some(100))),
        (Part::Weights, Fault::Trickle(Duration::from_millis(20))),
        (Part::Weights, Fault::Stall(long)),
    ];
    thread::scope(|scope| {
        for (part, fault) in cases {
            scope.spawn(move || {
                let scene = Scene::new();
                let cancel = Cancel::new();
                let options = HubOptions { cancel: cancel.clone(), ..scene.options() };
                if part == Part::Api {
                    scene.hub.fail(part, fault.clone(), usize::MAX);
                }
                let asked = cancel.clone();
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(1500));
                    asked.cancel();
                });
                let begun = Instant::now();
                let result = open(options, "main").and_then(|repository| {
                    repository.read(INDEX, Bytes(MIB))?;
                    scene.hub.fail(part, fault.clone(), usize::MAX);
                    repository.download(&mut |_| {})
                });
                assert_eq!(result.unwrap_err().kind(), ErrorKind::Interrupted, "{part:?} {fault:?}");
                assert!(begun.elapsed() < Duration::from_secs(3), "{part:?} {fault:?}: {:?}", begun.elapsed());
            });
        }
    });
}
