//! Checkpoints that are cut, malformed, hostile or contradict themselves: each
//! is refused by name, before any weights are read.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use evenkeel::ErrorKind;
use evenkeel::checkpoint::MAX_NAME;
use proptest::prelude::*;
use serde_json::Value;
use support::broken::{Broken, CONFIG, INDEX, SHARD, Spec, TINY_CONFIG, header, shard, tiny_tensors};

/// What is wrong with a shard of this header and `data` bytes behind it.
fn header_refusal(header: impl AsRef<[u8]>, data: usize) -> String {
    let broken = Broken::tiny();
    broken.write(SHARD, shard(header, data));
    broken.refusal()
}

/// An entry of a header.
fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn what_is_broken_here_is_right_before() {
    for right in [Broken::tiny(), Broken::sharded()] {
        right.plan().unwrap();
    }
}

#[test]
fn row_01_truncated_shard() {
    let broken = Broken::sharded();
    let file = "model-00003-of-00005.safetensors";
    for (size, needed) in [
        (148_919, 148_920),
        (148_912, 148_920),
        (100_000, 148_920),
        (952, 148_920),
        (951, 952),
        (8, 952),
        (7, 8),
        (0, 8),
    ] {
        broken.resize(file, size);
        assert_eq!(
            broken.refusal(),
            format!(
                "`DIR/{file}` is {size} bytes, its header needs {needed}; the download is incomplete\n\
                 hint: download the file again"
            )
        );
    }
    broken.write(
        file,
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 148920\n",
    );
    assert_eq!(
        broken.refusal(),
        format!(
            "`DIR/{file}` is a Git LFS pointer, not the file itself\n\
             hint: `git lfs pull` fetches the file itself"
        )
    );
}

#[test]
fn row_02_header_length() {
    let broken = Broken::tiny();
    for (length, size, message) in [
        (
            93,
            100,
            "is 100 bytes, its header needs 101; the download is incomplete\nhint: download the file again",
        ),
        (
            100_000_000,
            100_000_007,
            "is 100000007 bytes, its header needs 100000008; the download is incomplete\nhint: download the file again",
        ),
        (
            100_000_001,
            1 << 30,
            "says that its header has 100000001 bytes; at most 100000000 are read",
        ),
        (
            u64::MAX,
            1 << 30,
            "says that its header has 18446744073709551615 bytes; at most 100000000 are read",
        ),
    ] {
        broken.write(SHARD, u64::to_le_bytes(length));
        broken.resize(SHARD, size);
        assert_eq!(broken.refusal(), format!("`DIR/{SHARD}` {message}"));
    }
}

#[test]
fn row_03_huge_but_legal_header() {
    let broken = Broken::tiny();
    let extra = (0..200_000).map(|i| Spec::new(&format!("extra.{i:06}"), "F32", &[0]));
    broken.write_tensors(SHARD, &tiny_tensors().into_iter().chain(extra).collect::<Vec<_>>());
    assert_eq!(
        broken.refusal(),
        "`broken` holds 200000 tensors that the model has no place for, so its config.json is not the whole truth: \
         `extra.000000`, `extra.000001`, `extra.000002`, `extra.000003`, `extra.000004` and 199995 more"
    );
    let entries: Vec<String> = (0..1_000_001).map(|i| format!("\"{i}\":{{}}")).collect();
    assert_eq!(
        header_refusal(format!("{{{}}}", entries.join(",")), 0),
        "`DIR/model.safetensors` names 1000001 tensors; at most 1000000 are read"
    );
}

#[test]
fn row_04_ranges_that_add_up_to_two_to_the_64() {
    let part = (1u64 << 61) - 1;
    let offsets = |i| format!("[{},{}]", part * i, part * (i + 1));
    let entries: Vec<String> = (0..8)
        .map(|i| entry(&format!("t{i}"), "U8", &format!("[{part}]"), &offsets(i)))
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    assert_eq!(
        header_refusal(&header, 64),
        format!(
            "`DIR/model.safetensors` is {} bytes, its header needs {}; the download is incomplete\n\
             hint: download the file again",
            header.len() + 8 + 64,
            part * 8 + header.len() as u64 + 8
        )
    );
    let end = u64::MAX;
    let header = format!("{{{}}}", entry("t", "U8", &format!("[{end}]"), &format!("[0,{end}]")));
    assert!(header_refusal(&header, 64).contains("its header needs 18446744073709551615;"));
}

#[test]
fn row_05_ranges_that_do_not_follow_each_other() {
    let (a, b) = (entry("a", "U8", "[4]", "[0,4]"), |offsets| {
        entry("b", "U8", "[4]", offsets)
    });
    for (entry, message) in [
        (
            b("[2,6]"),
            "tensor `b` starts at byte 2 of the data, but the data before it ends at byte 4",
        ),
        (
            b("[0,4]"),
            "tensor `b` starts at byte 0 of the data, but the data before it ends at byte 4",
        ),
        (
            b("[6,10]"),
            "tensor `b` starts at byte 6 of the data, but the data before it ends at byte 4",
        ),
        (
            b("[8,4]"),
            "tensor `b` of shape [4] and dtype U8 does not take the bytes 8..4 that it is given",
        ),
        (
            b("[-4,0]"),
            "describes tensor `b` in a way that cannot be read\n\
             cause: `header`, line 1, column 56: invalid value: integer `-4`, expected u64",
        ),
        (
            b("[4.0,8.0]"),
            "describes tensor `b` in a way that cannot be read\n\
             cause: `header`, line 1, column 56: invalid type: floating point `4.0`, expected u64",
        ),
        (
            b("[4,8,12]"),
            "describes tensor `b` in a way that cannot be read\ncause: `header`, line 1, column 56: trailing characters",
        ),
        (
            b("[4]"),
            "describes tensor `b` in a way that cannot be read\n\
             cause: `header`, line 1, column 56: invalid length 1, expected a tuple of size 2",
        ),
    ] {
        let message = format!("`DIR/model.safetensors` {message}");
        assert_eq!(header_refusal(format!("{{{a},{entry}}}"), 12), message);
    }
    let (header, data) = header(&tiny_tensors());
    let size = header.len() + 8 + data;
    assert_eq!(
        header_refusal(&header, data + 22),
        format!(
            "`DIR/model.safetensors` is {} bytes, but its header describes only {size}: 22 bytes follow the last tensor",
            size + 22
        )
    );
}

#[test]
fn row_06_shape_and_range_that_differ() {
    for (dtype, shape, data) in [
        ("F32", "[2]", 4),
        ("F32", "[2,2]", 4),
        ("F32", "[]", 8),
        ("F4", "[3]", 2),
        ("U8", "[18446744073709551615, 2]", 4),
        ("F64", "[2305843009213693952]", 0),
        ("U8", "[4294967296, 4294967296]", 0),
    ] {
        assert_eq!(
            header_refusal(
                format!("{{{}}}", entry("w", dtype, shape, &format!("[0,{data}]"))),
                data
            )
            .replace(", ", ","),
            format!(
                "`DIR/model.safetensors` tensor `w` of shape {} and dtype {dtype} \
                 does not take the bytes 0..{data} that it is given",
                shape.replace(", ", ",")
            )
        );
    }
    let long = header_refusal(
        format!("{{{}}}", entry("w", "U8", &format!("{:?}", [1; 100_000]), "[0,2]")),
        2,
    );
    assert!(long.len() < 300, "{long}");
    let dtype = header_refusal(format!("{{{}}}", entry("w", "\\u001b[31m", "[1]", "[0,4]")), 4);
    assert!(dtype.contains(r"unknown variant `\u{1b}[31m`"), "{dtype}");
}

#[test]
fn row_07_duplicate_key_in_a_header() {
    let w = entry("w", "F32", "[1]", "[0,4]");
    for (header, cause) in [
        (
            format!("{{{w},{}}}", w.replace("F32", "I32")),
            "`header`, line 1, column 55: `w` stands twice in this object",
        ),
        (
            format!("{{{w},{}}}", w.replace('w', "\\u0077")),
            "`header`, line 1, column 55: `w` stands twice in this object",
        ),
        (
            format!("{{\"__metadata__\":{{\"format\":\"pt\",\"format\":\"tf\"}},{w}}}"),
            "`header`, line 1, column 32: `format` stands twice in this object",
        ),
    ] {
        assert_eq!(
            header_refusal(header, 4),
            format!("`DIR/model.safetensors` has a header that cannot be read\ncause: {cause}")
        );
    }
    assert_eq!(
        header_refusal(
            format!("{{{}}}", w.replacen("\"shape\":[1]", "\"shape\":[1],\"shape\":[1]", 1)),
            4
        ),
        "`DIR/model.safetensors` describes tensor `w` in a way that cannot be read\n\
         cause: `header`, line 1, column 6: duplicate field `shape`"
    );
}

#[test]
fn row_08_same_tensor_in_two_shards() {
    let two = |tensors: &[Spec]| {
        let broken = Broken::tiny();
        let (first, second) = ("1.safetensors", "2.safetensors");
        let mut index: Vec<String> = tiny_tensors()
            .iter()
            .map(|tensor| format!("\"{}\":\"{first}\"", tensor.name))
            .collect();
        index[11] = format!("\"lm_head.weight\":\"{second}\"");
        broken.write(INDEX, format!("{{\"weight_map\":{{{}}}}}", index.join(",")));
        broken.write_tensors(first, &[&tiny_tensors(), tensors].concat());
        broken.write_tensors(second, &[&tiny_tensors()[11..], tensors].concat());
        broken
    };
    let (checkpoint, _) = two(&[]).plan().unwrap();
    assert_eq!(
        checkpoint.shards[checkpoint.catalog["lm_head.weight"].shard], "2.safetensors",
        "the one that the index names"
    );
    assert_eq!(
        two(&[Spec::new("stray", "F32", &[1])]).refusal(),
        "tensor `stray` stands in `1.safetensors` and in `2.safetensors`, and the index names neither"
    );

    let broken = Broken::sharded();
    let line = "    \"model.norm.weight\": \"model-00004-of-00005.safetensors\"";
    broken.replace(INDEX, line, &format!("{line},\n{}", line.replace("00004", "00001")));
    assert_eq!(
        broken.refusal(),
        format!("`DIR/{INDEX}`, line 37, column 5: `model.norm.weight` stands twice in this object")
    );
}

#[test]
fn row_09_names_of_tensors() {
    let named = |name: &str| {
        let broken = Broken::tiny();
        broken.write_tensors(SHARD, &[&tiny_tensors()[..], &[Spec::new(name, "F32", &[1])]].concat());
        broken.refusal()
    };
    for (name, shown) in [
        (String::new(), String::new()),
        ("a\0b".to_owned(), "a\\0b".to_owned()),
        ("\u{1b}[2J".to_owned(), "\\u{1b}[2J".to_owned()),
        ("a\nb".to_owned(), "a\\nb".to_owned()),
        ("\u{85}".to_owned(), "\\u{85}".to_owned()),
        ("n".repeat(MAX_NAME + 1), format!("{}…", "n".repeat(80))),
        ("n".repeat(1 << 20), format!("{}…", "n".repeat(80))),
    ] {
        assert_eq!(
            named(&name),
            format!(
                "`DIR/model.safetensors` names a tensor `{shown}`; names have 1 to 512 bytes and no control characters"
            )
        );
    }
    // These are names like any other; none becomes a path, and no tensor of the model has it.
    for (name, shown) in [
        ("../x".to_owned(), "../x".to_owned()),
        ("/etc/passwd".to_owned(), "/etc/passwd".to_owned()),
        (
            "model.norm.we\u{131}ght".to_owned(),
            "model.norm.we\u{131}ght".to_owned(),
        ),
        ("lm_he\u{301}ad.weight".to_owned(), "lm_he\\u{301}ad.weight".to_owned()),
        ("\u{202e}thgiew".to_owned(), "\\u{202e}thgiew".to_owned()),
        ("n".repeat(MAX_NAME), format!("{}…", "n".repeat(80))),
    ] {
        assert!(
            named(&name).ends_with(&format!(" not the whole truth: `{shown}`")),
            "{}",
            named(&name)
        );
    }
    let wrong = header_refusal(format!("{{{}}}", entry("\u{202e}w", "F32", "[2]", "[0,4]")), 4);
    assert!(wrong.contains(r"tensor `\u{202e}w` of shape"), "{wrong}");
}

#[test]
fn row_10_headers_that_are_no_json() {
    let (header, data) = header(&tiny_tensors());
    let size = header.len();
    for (bytes, cause) in [
        (
            [header.as_bytes(), b"\0\0\0"].concat(),
            format!(
                "`header` is not JSON\ncause: trailing characters at line 1 column {}",
                size + 1
            ),
        ),
        (
            [b"\xef\xbb\xbf", header.as_bytes()].concat(),
            "`header` starts with a byte order mark; JSON must not".to_owned(),
        ),
        (
            [b"{\"\xff", &header.as_bytes()[2..]].concat(),
            "`header` is not UTF-8: byte 2 starts no character".to_owned(),
        ),
        (
            b"".to_vec(),
            "`header` is not JSON\ncause: EOF while parsing a value at line 1 column 0".to_owned(),
        ),
        (
            b"[]".to_vec(),
            "`header`, line 1, column 1: an object is wanted here, not a list".to_owned(),
        ),
        (
            header.replacen('{', "{,", 1).into_bytes(),
            "`header` is not JSON\ncause: expected value at line 1 column 2".to_owned(),
        ),
    ] {
        assert_eq!(
            header_refusal(bytes, data),
            format!("`DIR/model.safetensors` has a header that cannot be read\ncause: {cause}")
        );
    }
    let broken = Broken::tiny();
    broken.write(SHARD, shard(format!(" \n\t{header}   "), data));
    broken.plan().unwrap();
}

#[test]
fn row_11_index_and_shards_that_differ() {
    let (second, fourth) = ("model-00002-of-00005.safetensors", "model-00004-of-00005.safetensors");
    let broken = Broken::sharded();
    broken.remove(second);
    broken.remove(fourth);
    assert_eq!(
        broken.refusal(),
        format!(
            "`DIR` lacks 2 of the 5 shards that its index names: `{second}`, `{fourth}`\n\
             hint: the download is incomplete; download the checkpoint again"
        )
    );

    let broken = Broken::sharded();
    broken.replace(
        INDEX,
        &format!("\"model.norm.weight\": \"{fourth}\""),
        &format!("\"model.norm.weight\": \"{second}\""),
    );
    assert_eq!(
        broken.refusal(),
        format!(
            "`DIR/{second}` lacks what the index says it holds: `model.norm.weight`\n\
             hint: download the shard and the index again; they are from different revisions"
        )
    );

    // Nothing that the index does not name is read: it does no harm.
    let broken = Broken::sharded();
    broken.write("orphan.safetensors", "no safetensors");
    let head = Spec::new("lm_head.weight", "F32", &[320, 64]);
    let strays = ["x", "y"].map(|name| Spec::new(name, "F32", &[1]));
    broken.write_tensors("model-00005-of-00005.safetensors", &[&[head][..], &strays].concat());
    let (checkpoint, plan) = broken.plan().unwrap();
    assert_eq!(
        (checkpoint.unlisted, checkpoint.shards.len(), plan.parameters),
        (2, 5, 152_000)
    );
    let (code, stderr) = run_plan(broken.directory());
    assert_eq!(
        (code, stderr.as_str()),
        (
            0,
            "warning: the shards of `model` hold 2 tensors that its index does not name; they are not read\n"
        )
    );
}

#[test]
fn row_12_names_that_lead_out_of_the_directory() {
    let model = Broken::sharded();
    let index = String::from_utf8(model.read(INDEX)).unwrap();
    let line = "\"model.norm.weight\": ";
    for name in [
        "../../x.safetensors",
        "sub/../../x.safetensors",
        "/etc/passwd",
        "/etc/x.safetensors",
        "C:\\x.safetensors",
        "a\\..\\b.safetensors",
        ".",
        "..",
        "",
        "./x.safetensors",
        "x//y.safetensors",
        "x.safetensors/",
        "pytorch_model.bin",
        "x\0.safetensors",
        "x.safetensors?y=.safetensors",
    ] {
        let old = format!("{line}\"model-00004-of-00005.safetensors\"");
        model.write(INDEX, index.replace(&old, &format!("{line}{}", Value::from(name))));
        assert_eq!(
            model.refusal(),
            format!(
                "`DIR/{INDEX}`, line 36, column 26: `{}` is no plain name of a .safetensors file",
                evenkeel::error::printable(name)
            )
        );
    }
}

#[test]
fn row_12_links_that_lead_out_of_the_directory() {
    for file in [SHARD, CONFIG, INDEX, "generation_config.json"] {
        let broken = Broken::tiny();
        let outside = broken.root().join("outside");
        std::fs::write(&outside, TINY_CONFIG).unwrap();
        broken.link(file, "../outside");
        assert_eq!(
            broken.refusal(),
            format!("`DIR/{file}` is a link to a file outside its directory")
        );
        broken.link(file, &outside);
        assert_eq!(
            broken.refusal(),
            format!("`DIR/{file}` is a link to a file outside its directory")
        );
    }
    let broken = Broken::sharded();
    let outside = Broken::tiny();
    broken.link("sub", outside.directory());
    broken.replace(
        INDEX,
        "\"model.norm.weight\": \"model-00004-of-00005",
        "\"model.norm.weight\": \"sub/model",
    );
    assert_eq!(
        broken.refusal(),
        "`DIR/sub/model.safetensors` is a link to a file outside its directory"
    );
}

#[test]
fn row_12_links_into_the_blobs_of_a_hugging_face_cache() {
    let cached = Broken::tiny_in("models--org--name/snapshots/f00");
    let blobs = cached.root().join("models--org--name/blobs");
    std::fs::create_dir(&blobs).unwrap();
    for file in [CONFIG, SHARD] {
        std::fs::rename(cached.path(file), blobs.join(file)).unwrap();
        cached.link(file, Path::new("../../blobs").join(file));
    }
    cached.plan().unwrap();

    let refusal = format!("`DIR/{SHARD}` is a link to a file outside its directory");
    std::fs::create_dir_all(cached.root().join("models--org--other/blobs")).unwrap();
    std::fs::copy(blobs.join(SHARD), cached.root().join("models--org--other/blobs/bar")).unwrap();
    cached.link(SHARD, "../../../models--org--other/blobs/bar");
    assert_eq!(cached.refusal(), refusal, "another repository's");
    std::os::unix::fs::symlink("/etc/passwd", blobs.join("out")).unwrap();
    cached.link(SHARD, "../../blobs/out");
    assert_eq!(cached.refusal(), refusal, "a link behind the link");
}

#[test]
fn row_13_files_that_are_no_regular_files() {
    for file in [CONFIG, INDEX, SHARD, "generation_config.json"] {
        let broken = Broken::tiny();
        broken.pipe(file);
        assert_eq!(
            broken.refusal(),
            format!("`DIR/{file}` is a pipe or a device, not a regular file")
        );
        broken.link(file, "/dev/zero");
        assert_eq!(
            broken.refusal(),
            format!("`DIR/{file}` is a link to a file outside its directory")
        );
        broken.link(file, file);
        let cause = "Too many levels of symbolic links (os error 40)";
        assert_eq!(broken.refusal(), format!("cannot open `DIR/{file}`\ncause: {cause}"));
        broken.link(file, "nowhere");
        let cause = "No such file or directory (os error 2)";
        assert_eq!(broken.refusal(), format!("cannot open `DIR/{file}`\ncause: {cause}"));
        broken.remove(file);
        std::fs::create_dir(broken.path(file)).unwrap();
        assert_eq!(
            broken.refusal(),
            format!("`DIR/{file}` is a directory, not a regular file")
        );
    }
}

#[test]
fn row_14_files_that_are_too_large() {
    for (file, cap) in [
        (CONFIG, "1.0 MiB"),
        ("generation_config.json", "1.0 MiB"),
        (INDEX, "64.0 MiB"),
    ] {
        let broken = Broken::tiny();
        broken.resize(file, 2 << 30);
        assert_eq!(
            broken.refusal(),
            format!("`DIR/{file}` is 2.0 GiB, and at most {cap} is read of such a file")
        );
    }
}

#[test]
fn row_14_json_that_is_deep() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let broken = Broken::sharded();
    let index = String::from_utf8(broken.read(INDEX)).unwrap();
    broken.write(
        INDEX,
        index.replacen('{', &format!("{{\"deep\": {},", nested(1_000_000)), 1),
    );
    broken.plan().unwrap();
    broken.write(INDEX, format!("{{\"weight_map\": {}}}", nested(1_000_000)));
    assert_eq!(
        broken.refusal(),
        format!("`DIR/{INDEX}`, line 1, column 16: an object is wanted here, not a list")
    );
    broken.write(INDEX, "[".repeat(1_000_000));
    assert_eq!(
        broken.refusal(),
        format!("`DIR/{INDEX}` is not JSON\ncause: EOF while parsing a list at line 1 column 1000000")
    );

    let broken = Broken::tiny();
    broken.replace(CONFIG, "{\n", &format!("{{\"deep\": {},\n", nested(500_000)));
    broken.plan().unwrap();

    let (header, data) = header(&tiny_tensors());
    let deep = header.replacen("\"dtype\"", &format!("\"deep\":{},\"dtype\"", nested(1_000_000)), 1);
    let refusal = header_refusal(deep, data);
    assert!(
        refusal.starts_with(
            "`DIR/model.safetensors` has a header that the safetensors crate refuses\ncause: recursion limit"
        ),
        "{refusal}"
    );
}

#[test]
fn row_14_json_of_another_shape() {
    let broken = Broken::sharded();
    for (json, message) in [
        ("", " is not JSON\ncause: EOF while parsing a value at line 1 column 0"),
        ("[]", ", line 1, column 1: an object is wanted here, not a list"),
        ("{}", ", line 1, column 1: the index has no `weight_map`"),
        ("{\"weight_map\": {}}", ", line 1, column 16: the `weight_map` is empty"),
        (
            "{\"weight_map\": []}",
            ", line 1, column 16: an object is wanted here, not a list",
        ),
        (
            "{\"weight_map\": null}",
            ", line 1, column 16: an object is wanted here, not null",
        ),
        (
            "{\"weight_map\": {\"a\": 1}}",
            ", line 1, column 22: a text is wanted here, not 1",
        ),
        (
            "{\"weight_map\": {\"a\": [\"x.safetensors\"]}}",
            ", line 1, column 22: a text is wanted here, not a list",
        ),
        (
            "{\n\"weight_map\": {},\n\"weight_map\": {}}",
            ", line 3, column 1: `weight_map` stands twice in this object",
        ),
        (
            "{\"weight_map\": {\"a\": \"x.safetensors\",}}",
            " is not JSON\ncause: trailing comma at line 1 column 39",
        ),
        (
            "{'weight_map': {}}",
            " is not JSON\ncause: key must be a string at line 1 column 2",
        ),
        ("\u{feff}{}", " starts with a byte order mark; JSON must not"),
    ] {
        broken.write(INDEX, json);
        assert_eq!(broken.refusal(), format!("`DIR/{INDEX}`{message}"));
    }
    for (old, new, message) in [
        (
            "false\n",
            "false,\n",
            " is not JSON\ncause: trailing comma at line 12 column 1",
        ),
        (
            "\"vocab_size\"",
            "\"hidden_size\"",
            ", line 8, column 3: `hidden_size` stands twice in this object",
        ),
        (
            "[\"Llama",
            "\"Llama",
            " is not JSON\ncause: expected `,` or `}` at line 2 column 38",
        ),
        (
            "16",
            "[16]",
            ", line 8, column 17: a whole number, 0 or more, is wanted here, not a list",
        ),
        (
            "false",
            "\"no\"",
            ", line 11, column 26: `true` or `false` is wanted here, not a text",
        ),
    ] {
        let broken = Broken::tiny();
        broken.replace(CONFIG, old, new);
        assert_eq!(broken.refusal(), format!("`DIR/{CONFIG}`{message}"));
    }
}

#[test]
fn row_15_configurations_out_of_range() {
    for (old, new, message) in [
        (
            "\"hidden_size\": 8",
            "\"hidden_size\": 0",
            "line 3, column 18: `hidden_size` is 0; it must be from 1 to 1048576",
        ),
        (
            "\"hidden_size\": 8",
            "\"hidden_size\": 9",
            "line 3, column 18: a hidden size of 9 does not divide over 2 attention heads",
        ),
        (
            "\"hidden_size\": 8",
            "\"hidden_size\": 6",
            "line 1, column 1: a head of width 3 cannot be rotated: it is odd",
        ),
        (
            "attention_heads\": 2",
            "attention_heads\": 0",
            "line 6, column 26: `num_attention_heads` is 0; it must be from 1 to 65536",
        ),
        (
            "key_value_heads\": 1",
            "key_value_heads\": 0",
            "line 7, column 26: `num_key_value_heads` is 0; it must be from 1 to 65536",
        ),
        (
            "key_value_heads\": 1",
            "key_value_heads\": 4",
            "line 6, column 26: 2 attention heads do not divide over 4 key-value heads",
        ),
        (
            "layers\": 1",
            "layers\": 1000000000",
            "line 5, column 24: `num_hidden_layers` is 1000000000; it must be from 1 to 10000",
        ),
        (
            "vocab_size\": 16",
            "vocab_size\": 1e99",
            "line 8, column 17: a whole number, 0 or more, is wanted here, not 1e99",
        ),
        (
            "1e-05",
            "0",
            "line 9, column 19: `rms_norm_eps` is 0.0; it must be from 1e-30 to 1",
        ),
        (
            "1e-05",
            "1e-60",
            "line 9, column 19: `rms_norm_eps` is 1e-60; it must be from 1e-30 to 1",
        ),
        (
            "1e-05",
            "1e999",
            "line 9, column 19: a number is wanted here, not 1e999",
        ),
        (
            "1e-05",
            "\"NaN\"",
            "line 9, column 19: a number is wanted here, not a text",
        ),
        (
            "LlamaFor",
            "\\u001b[2JFor",
            "line 2, column 20: architecture `\\u{1b}[2JForCausalLM` is not supported; supported: LlamaForCausalLM",
        ),
        (
            "\"architectures\": [\"LlamaForCausalLM\"]",
            "\"model_type\": \"warp\"",
            "line 2, column 17: model type `warp` is not supported; supported: LlamaForCausalLM",
        ),
    ] {
        let broken = Broken::tiny();
        broken.replace(CONFIG, old, new);
        let refusal = broken.refusal();
        let first = refusal.split("\ncause: ").next().unwrap();
        assert_eq!(first, format!("`DIR/{CONFIG}`, {message}"));
    }
    let broken = Broken::tiny();
    broken.replace(CONFIG, "1e-05", "NaN");
    assert_eq!(
        broken.refusal(),
        format!("`DIR/{CONFIG}` is not JSON\ncause: expected value at line 9 column 19")
    );
}

#[test]
fn row_15_configurations_that_the_tensors_contradict() {
    for (old, new, message) in [
        (
            "vocab_size\": 16",
            "vocab_size\": 17",
            "contradicts its config.json in 2 tensors: `model.embed_tokens.weight has shape [16, 8], not [17, 8]`, \
             `lm_head.weight has shape [16, 8], not [17, 8]`",
        ),
        (
            "vocab_size\": 16",
            "vocab_size\": 16777216",
            "contradicts its config.json in 2 tensors: `model.embed_tokens.weight has shape [16, 8], not [16777216, 8]`, \
             `lm_head.weight has shape [16, 8], not [16777216, 8]`",
        ),
        (
            "layers\": 1",
            "layers\": 10000",
            "lacks 89991 tensors that its config.json calls for: `model.layers.1.input_layernorm.weight`, \
             `model.layers.1.self_attn.q_proj.weight`, `model.layers.1.self_attn.k_proj.weight`, \
             `model.layers.1.self_attn.v_proj.weight`, `model.layers.1.self_attn.o_proj.weight` and 89986 more",
        ),
    ] {
        let broken = Broken::tiny();
        broken.replace(CONFIG, old, new);
        assert_eq!(broken.refusal(), format!("`broken` {message}"));
    }
}

#[test]
fn row_15_code_that_a_configuration_names_is_never_read() {
    let broken = Broken::tiny();
    let (_, plain) = broken.plan().unwrap();
    broken.pipe("modeling_evil.py");
    broken.replace(
        CONFIG,
        "{\n",
        "{\"auto_map\": {\"AutoModelForCausalLM\": \"modeling_evil.Evil\"},\n",
    );
    assert_eq!(broken.plan().unwrap().1, plain);
}

#[test]
fn row_16_wrong_dtype_or_shape() {
    let with = |change: &dyn Fn(&mut Spec)| {
        let mut tensors = tiny_tensors();
        tensors.iter_mut().for_each(change);
        let broken = Broken::tiny();
        broken.write_tensors(SHARD, &tensors);
        broken
    };
    let only = |name: &'static str, change: fn(&mut Spec)| {
        move |tensor: &mut Spec| {
            if tensor.name.contains(name) {
                change(tensor);
            }
        }
    };
    for dtype in ["U8", "I8", "F64", "F8_E4M3", "F8_E5M2", "BOOL"] {
        let broken = with(&|tensor| {
            if tensor.name.contains("up_proj") {
                tensor.dtype = dtype;
            }
        });
        assert_eq!(
            broken.refusal(),
            format!(
                "`broken` contradicts its config.json in 1 tensor: \
                 `model.layers.0.mlp.up_proj.weight has dtype {dtype}, not BF16, F16 or F32`"
            )
        );
    }
    for (change, found) in [
        (
            &only("up_proj", |tensor| tensor.shape.reverse()) as &dyn Fn(&mut Spec),
            "mlp.up_proj.weight has shape [8, 12], not [12, 8]",
        ),
        (
            &only("k_proj", |tensor| tensor.shape[0] = 8),
            "self_attn.k_proj.weight has shape [8, 8], not [4, 8]",
        ),
        (
            &only("v_proj", |tensor| tensor.shape = vec![32]),
            "self_attn.v_proj.weight has shape [32], not [4, 8]",
        ),
        (
            &only("input_layernorm", |tensor| tensor.shape.clear()),
            "input_layernorm.weight has shape [], not [8]",
        ),
    ] {
        assert_eq!(
            with(change).refusal(),
            format!("`broken` contradicts its config.json in 1 tensor: `model.layers.0.{found}`")
        );
    }
    let all = with(&|tensor| tensor.dtype = "I8").refusal();
    assert!(
        all.starts_with("`broken` contradicts its config.json in 12 tensors: `model.embed_tokens.weight has"),
        "{all}"
    );
    assert!(
        all.ends_with(" and 7 more") && all.matches("has dtype").count() == 5,
        "{all}"
    );
    for dtype in ["F16", "BF16"] {
        with(&|tensor| tensor.dtype = dtype).plan().unwrap();
    }
}

#[test]
fn row_17_missing_and_unexpected_tensors() {
    let broken = Broken::tiny();
    broken.write_tensors(SHARD, &tiny_tensors()[..11]);
    let lacks_head = "`broken` lacks 1 tensor that its config.json calls for: `lm_head.weight`";
    assert_eq!(broken.refusal(), lacks_head);
    broken.replace(CONFIG, ",\n  \"tie_word_embeddings\": false", "");
    assert_eq!(broken.refusal(), lacks_head, "untied unless the configuration says so");
    broken.replace(CONFIG, "{\n", "{\"tie_word_embeddings\": true,\n");
    broken.plan().unwrap();
    broken.write_tensors(SHARD, &tiny_tensors());
    broken.plan().unwrap();

    let broken = Broken::tiny();
    let biases: Vec<Spec> = ["q", "k", "v"]
        .iter()
        .map(|name| Spec::new(&format!("model.layers.0.self_attn.{name}_proj.bias"), "F32", &[8]))
        .collect();
    broken.write_tensors(SHARD, &[tiny_tensors(), biases].concat());
    assert_eq!(
        broken.refusal(),
        "`broken` holds 3 tensors that the model has no place for, so its config.json is not the whole truth: \
         `model.layers.0.self_attn.k_proj.bias`, `model.layers.0.self_attn.q_proj.bias`, \
         `model.layers.0.self_attn.v_proj.bias`"
    );
    broken.write_tensors(SHARD, &[]);
    assert!(
        broken
            .refusal()
            .starts_with("`broken` lacks 12 tensors that its config.json calls for: ")
    );
}

/// The exit code of `evenkeel plan`, and what it writes to standard error.
fn run_plan(directory: &Path) -> (i32, String) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut child = Command::new(env!("CARGO_BIN_EXE_evenkeel"))
        .arg("plan")
        .arg(directory)
        .args(["--device", "cpu=1GiB"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("`evenkeel plan` hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    (
        output.status.code().expect("a signal ended it"),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn the_command_refuses_with_exit_code_1() {
    assert_eq!(run_plan(Broken::tiny().directory()), (0, String::new()));
    let breaks: [(&str, fn(&Broken)); 8] = [
        ("model.safetensors` is 7 bytes, its header needs 8", |b| {
            b.resize(SHARD, 7)
        }),
        ("model.safetensors` is a pipe or a device", |b| b.pipe(SHARD)),
        ("config.json` is a pipe or a device", |b| b.pipe(CONFIG)),
        ("index.json` is a link to a file outside its directory", |b| {
            b.link(INDEX, "/dev/zero")
        }),
        ("config.json` is 2.0 GiB, and at most 1.0 MiB", |b| {
            b.resize(CONFIG, 2 << 30)
        }),
        ("index.json` is not JSON\n  Caused by: EOF", |b| {
            b.write(INDEX, "[".repeat(1_000_000))
        }),
        ("`hidden_size` is 0; it must be", |b| {
            b.replace(CONFIG, "\"hidden_size\": 8", "\"hidden_size\": 0")
        }),
        ("lacks 12 tensors that its config.json calls for", |b| {
            b.write_tensors(SHARD, &[])
        }),
    ];
    for (message, break_it) in breaks {
        let broken = Broken::tiny();
        break_it(&broken);
        let (code, stderr) = run_plan(broken.directory());
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(message), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// A change of one place in a file.
#[derive(Clone, Debug)]
enum Mutation {
    Insert(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Replace(prop::sample::Index, u8),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Insert(at, byte) => bytes.insert(at.index(bytes.len() + 1), *byte),
            Self::Remove(at) if !bytes.is_empty() => drop(bytes.remove(at.index(bytes.len()))),
            Self::Replace(at, byte) if !bytes.is_empty() => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Self::Remove(_) | Self::Replace(..) => {}
        }
    }
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let byte = || {
        prop_oneof![
            any::<u8>(),
            prop::sample::select(&b"0123456789-+.eE\"\\{}[]:, \n\0\xff"[..])
        ]
    };
    let mutation = prop_oneof![
        (any::<prop::sample::Index>(), byte()).prop_map(|(at, byte)| Mutation::Insert(at, byte)),
        any::<prop::sample::Index>().prop_map(Mutation::Remove),
        (any::<prop::sample::Index>(), byte()).prop_map(|(at, byte)| Mutation::Replace(at, byte)),
    ];
    prop::collection::vec(mutation, 1..5)
}

/// A mutated file gives a plan or an error of the input, and no panic.
fn assert_plans_or_refuses(broken: &Broken, file: &str, bytes: &[u8]) {
    broken.write(file, bytes);
    if let Err(error) = broken.plan() {
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_json_is_planned_or_refused(mutations in mutations()) {
        let index: Vec<String> = tiny_tensors().iter().map(|t| format!("\"{}\": \"{SHARD}\"", t.name)).collect();
        let index = format!("{{\"weight_map\": {{{}}}}}", index.join(", "));
        for (file, right) in [(CONFIG, TINY_CONFIG), (INDEX, &index)] {
            let mut bytes = right.as_bytes().to_vec();
            mutations.iter().for_each(|mutation| mutation.apply(&mut bytes));
            assert_plans_or_refuses(&Broken::tiny(), file, &bytes);
        }
    }

    #[test]
    fn mutated_shards_are_planned_or_refused(mutations in mutations()) {
        let (header, data) = header(&tiny_tensors());
        let mut json = header.clone().into_bytes();
        mutations.iter().for_each(|mutation| mutation.apply(&mut json));
        let mut whole = shard(&header, data);
        whole.truncate(8 + header.len());
        mutations.iter().for_each(|mutation| mutation.apply(&mut whole));
        whole.resize(whole.len() + data, 0);
        let broken = Broken::tiny();
        assert_plans_or_refuses(&broken, SHARD, &shard(json, data));
        assert_plans_or_refuses(&broken, SHARD, &whole);
    }
}
