//! Checkpoints that are cut, malformed, hostile or contradict themselves: each
//! is refused by name, before any weights are read.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use evenkeel::error::printable;
use evenkeel::model_config::FAMILIES;
use evenkeel::{ErrorKind, Note};
use proptest::prelude::*;
use proptest::sample;
use serde_json::Value;
use support::broken::{Broken, CONFIG, INDEX, SHARD, Spec, TINY_CONFIG, header, rows, shard, tiny_tensors};

/// How a shard of this header, with `data` bytes behind it, is refused.
fn header_refusal(header: impl AsRef<[u8]>, data: usize) -> String {
    let broken = Broken::tiny();
    broken.write(SHARD, shard(header, data));
    broken.refusal()
}

/// An entry of a header.
fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

/// The line of the sharded checkpoint's index that stands last.
const NORM: &str = "\"model.norm.weight\": \"model-00004-of-00005.safetensors\"";

/// An index by which this shard holds all of [`tiny_tensors`].
fn weight_map(shard: &str) -> Value {
    let names: serde_json::Map<_, _> = tiny_tensors().into_iter().map(|t| (t.name, shard.into())).collect();
    serde_json::json!({ "weight_map": names })
}

/// How [`Broken::tiny`] is refused with `new` in place of `old` in its configuration.
fn config_refusal(old: &str, new: &str) -> String {
    let broken = Broken::tiny();
    broken.replace(CONFIG, old, new);
    broken.refusal()
}

#[test]
fn what_is_broken_here_was_right_before() {
    for right in [Broken::tiny(), Broken::sharded()] {
        right.plan().unwrap();
    }
}

#[test]
fn row_01_truncated_shard() {
    let broken = Broken::sharded();
    let file = "model-00003-of-00005.safetensors";
    for size in [148_919, 148_912, 100_000, 952, 951, 8, 7, 0] {
        broken.resize(file, size);
        let needed = match size {
            952.. => 148_920,
            8.. => 952,
            _ => 8,
        };
        let message = format!("is {size} bytes, its header needs {needed}; the download is incomplete");
        broken.refused(format!("`DIR/{file}` {message}; hint: download the file again"));
    }
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 148920\n";
    broken.write(file, pointer);
    let message = "is a Git LFS pointer, not the file itself; hint: `git lfs pull` fetches the file itself";
    broken.refused(format!("`DIR/{file}` {message}"));
}

#[test]
fn row_02_header_length() {
    let broken = Broken::tiny();
    let table = "
        93 | 100 | is 100 bytes, its header needs 101; the download is incomplete; hint: download the file again
        100000000 | 100000007 | is 100000007 bytes, its header needs 100000008; the download is incomplete; hint: download the file again
        100000001 | 1000000000 | says that its header has 100000001 bytes; at most 100000000 are read
        18446744073709551615 | 1000 | says that its header has 18446744073709551615 bytes; at most 100000000 are read
    ";
    for [length, size, message] in rows(table) {
        broken.write(SHARD, u64::to_le_bytes(length.parse().unwrap()));
        broken.resize(SHARD, size.parse().unwrap());
        broken.refused(format!("`DIR/{SHARD}` {message}"));
    }
}

#[test]
fn row_03_huge_but_legal_header() {
    let broken = Broken::tiny();
    let extra = (0..200_000).map(|i| Spec::new(&format!("extra.{i:06}"), "F32", &[0]));
    broken.write_tensors(SHARD, &tiny_tensors().into_iter().chain(extra).collect::<Vec<_>>());
    let (checkpoint, _) = broken.plan().unwrap();
    let unused = "200000 tensors not read, for which the model has no place: `extra.000000`, `extra.000001`, \
                  `extra.000002`, `extra.000003`, `extra.000004` and 199995 more";
    assert_eq!(Note::Unused(checkpoint.unused_tensors()).to_string(), unused);
    let many = |count: u32| (0..count).map(|i| format!("\"{i}\":\"\"")).collect::<Vec<_>>().join(",");
    let too_many_names = header_refusal(format!("{{{}}}", many(500_001)), 0);
    assert_eq!(too_many_names, format!("`DIR/{SHARD}` names 500001 tensors; at most 500000 are read"));
    let too_much_metadata = header_refusal(format!("{{\"__metadata__\":{{{}}}}}", many((1 << 20) + 1)), 0);
    assert!(too_much_metadata.ends_with("an object of more than 1048576 members is not read"));
}

#[test]
fn row_04_ranges_that_add_up_to_two_to_the_64() {
    let header = |part: u64, parts: u64| {
        let entries = (0..parts).map(|i| {
            let (start, end) = (part * i, part * (i + 1));
            let (shape, offsets) = (format!("[{part}]"), format!("[{start},{end}]"));
            entry(&format!("t{i}"), "U8", &shape, &offsets)
        });
        format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
    };
    let refusal = header_refusal(header((1 << 61) - 1, 8), 64);
    assert!(refusal.contains("its header needs 18446744073709551615; the download is incomplete"), "{refusal}");
    for (part, parts) in [(u64::MAX / 2, 2), (u64::MAX, 1)] {
        let refusal = header_refusal(header(part, parts), 64);
        assert!(refusal.contains(&format!("tensor `t0` of shape [{part}] and dtype U8 does not take")), "{refusal}");
    }
}

#[test]
fn row_05_ranges_that_do_not_follow_each_other() {
    let cannot = "describes tensor `b` in a way that cannot be read; cause: `header`, line 1, column 58:";
    let table = r#"
        [2,6] | tensor `b` starts at byte 2 of the data, but the data before it ends at byte 4
        [0,4] | tensor `b` starts at byte 0 of the data, but the data before it ends at byte 4
        [6,10] | tensor `b` starts at byte 6 of the data, but the data before it ends at byte 4
        [8,4] | tensor `b` of shape [4] and dtype U8 does not take the bytes 8..4 that it is given
        [-4,0] | CANNOT invalid value: integer `-4`, expected u64
        [4.0,8.0] | CANNOT invalid type: floating point `4.0`, expected u64
        [4,8,12] | CANNOT trailing characters
        [4] | CANNOT invalid length 1, expected a tuple of size 2
        [4,8],"x":0 | CANNOT unknown field `x`, expected one of `dtype`, `shape`, `data_offsets`
    "#;
    for [offsets, message] in rows(table) {
        let (a, b) = (entry("a", "U8", "[4]", "[0,4]"), entry("b", "U8", "[4]", offsets));
        let (header, message) = (format!("{{{a},{b}}}"), message.replace("CANNOT", cannot));
        assert_eq!(header_refusal(header, 12), format!("`DIR/{SHARD}` {message}"));
    }
    let (header, data) = header(&tiny_tensors());
    let (needed, size) = (header.len() + 8 + data, header.len() + 8 + data + 22);
    let message = format!("is {size} bytes, but its header describes only {needed}: 22 bytes follow the last tensor");
    assert_eq!(header_refusal(&header, data + 22), format!("`DIR/{SHARD}` {message}"));
}

#[test]
fn row_06_shape_and_range_that_differ() {
    let table = "
        F32 | [2] | 4
        F32 | [2, 2] | 4
        F32 | [] | 8
        F4 | [3] | 2
        U8 | [18446744073709551615, 2] | 4
        F64 | [2305843009213693952] | 0
        U8 | [4294967296, 4294967296] | 0
    ";
    for [dtype, shape, data] in rows(table) {
        let header = format!("{{{}}}", entry("w", dtype, shape, &format!("[0,{data}]")));
        let refusal = header_refusal(header, data.parse().unwrap());
        let message = format!("of shape {shape} and dtype {dtype} does not take the bytes 0..{data} that it is given");
        assert_eq!(refusal, format!("`DIR/{SHARD}` tensor `w` {message}"));
    }
    let shape = format!("{:?}", vec![1; 100_000]);
    let long = header_refusal(format!("{{{}}}", entry("w", "U8", &shape, "[0,2]")), 2);
    assert_eq!(long, format!("`DIR/{SHARD}` tensor `w` has 100000 dimensions; at most 64 are read"));
    let shape = format!("{:?}", [1; 64]);
    let long = header_refusal(format!("{{{}}}", entry("w", "U8", &shape, "[0,2]")), 2);
    assert!(long.len() < 300 && long.contains("tensor `w` of shape [1, 1, "));
    let dtype = header_refusal(format!("{{{}}}", entry("w", "\\u001b[31m", "[1]", "[0,4]")), 4);
    assert!(dtype.contains(r"unknown variant `\u{1b}[31m`"), "{dtype}");
}

#[test]
fn row_07_duplicate_key_in_a_header() {
    let w = entry("w", "F32", "[1]", "[0,4]");
    let table = r#"
        {W,"w":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}} | line 1, column 55: `w` stands twice in this object
        {W,"\u0077":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} | line 1, column 55: `w` stands twice in this object
        {"__metadata__":{"a":"x","a":"y"},W} | line 1, column 26: `a` stands twice in this object
        {"w":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}} | line 1, column 6: duplicate field `shape`
    "#;
    for [header, cause] in rows(table) {
        let refusal = header_refusal(header.replace('W', &w), 4);
        assert!(refusal.ends_with(&format!("cannot be read; cause: `header`, {cause}")), "{refusal}");
    }
}

#[test]
fn row_08_same_tensor_in_two_shards() {
    let two = |strays: &[Spec]| {
        let broken = Broken::tiny();
        let (tensors, mut map) = (tiny_tensors(), weight_map("1.safetensors"));
        map["weight_map"]["lm_head.weight"] = "2.safetensors".into();
        broken.remove(SHARD);
        broken.write(INDEX, map.to_string());
        broken.write_tensors("1.safetensors", &[&tensors, strays].concat());
        broken.write_tensors("2.safetensors", &[&tensors[11..], strays].concat());
        broken
    };
    let (checkpoint, _) = two(&[]).plan().unwrap();
    let named_by_the_index = checkpoint.catalog["lm_head.weight"].shard;
    assert_eq!(checkpoint.shards[named_by_the_index], "2.safetensors");
    let message = "tensor `stray` stands in `1.safetensors` and in `2.safetensors`, and the index names neither";
    two(&[Spec::new("stray", "F32", &[1])]).refused(message);

    let broken = Broken::sharded();
    broken.replace(INDEX, NORM, &format!("{NORM},\n{}", NORM.replace("00004", "00001")));
    let message = "line 37, column 1: `model.norm.weight` stands twice in this object";
    broken.refused(format!("`DIR/{INDEX}`, {message}"));
}

#[test]
fn row_09_names_of_tensors() {
    let broken = Broken::tiny();
    let add = |name: &str| {
        broken.write_tensors(SHARD, &[&tiny_tensors()[..], &[Spec::new(name, "F32", &[1])]].concat());
        printable(name)
    };
    let (longest, longer, huge) = ("n".repeat(512), "n".repeat(513), "n".repeat(1 << 20));
    for name in ["", "a\0b", "\u{1b}[2J", "a\nb", "\u{85}", &longer, &huge] {
        let message = format!("names a tensor `{}`; names have 1 to 512 bytes and no control characters", add(name));
        broken.refused(format!("`DIR/{SHARD}` {message}"));
    }
    // Names like any other: none becomes a path, and no tensor of the model has it.
    for name in ["../x", "/etc/passwd", "lm_he\u{301}ad.weight", "\u{202e}x", &longest] {
        let message = format!("1 tensor not read, for which the model has no place: `{}`", add(name));
        assert_eq!(Note::Unused(broken.plan().unwrap().0.unused_tensors()).to_string(), message);
    }
    let wrong = header_refusal(format!("{{{}}}", entry("\u{202e}w", "F32", "[2]", "[0,4]")), 4);
    assert!(wrong.contains(r"tensor `\u{202e}w` of shape"), "{wrong}");
}

#[test]
fn row_10_headers_that_are_no_json() {
    let (header, data) = header(&tiny_tensors());
    let (json, end) = (header.as_bytes(), header.len() + 1);
    let padded = format!("`header` is not JSON; cause: trailing characters at line 1 column {end}");
    let comma = "`header` is not JSON; cause: key must be a string at line 1 column 2";
    let empty = "`header` is not JSON; cause: EOF while parsing a value at line 1 column 0";
    for (bytes, cause) in [
        (&[json, b"\0\0\0"].concat()[..], padded.as_str()),
        (&[b"\xef\xbb\xbf", json].concat(), "`header` starts with a byte order mark; JSON must not"),
        (&[b"{\"\xff", json].concat(), "`header` is not UTF-8: byte 2 starts no character"),
        (&[b"{,", json].concat(), comma),
        (b"", empty),
        (b"[]", "`header`, line 1, column 1: an object is wanted here, not a list"),
    ] {
        let message = format!("`DIR/{SHARD}` has a header that cannot be read; cause: {cause}");
        assert_eq!(header_refusal(bytes, data), message);
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
    let message = format!("lacks 2 of the 5 shards that its index names: `{second}`, `{fourth}`");
    let hint = "hint: the download is incomplete; download the checkpoint again";
    broken.refused(format!("`DIR` {message}; {hint}"));

    // Where a tensor is counts, not where the index says.
    let broken = Broken::sharded();
    broken.replace(INDEX, NORM, &NORM.replace(fourth, second));
    let (checkpoint, _) = broken.plan().unwrap();
    assert_eq!(checkpoint.notes, [Note::Displaced(vec!["model.norm.weight".to_owned()])]);
    assert_eq!(checkpoint.shards[checkpoint.catalog["model.norm.weight"].shard], fourth);
    broken.replace(INDEX, &NORM.replace(fourth, second), "\"x\": \"model-00004-of-00005.safetensors\"");
    assert_eq!(broken.plan().unwrap().0.catalog, checkpoint.catalog);

    let broken = Broken::sharded();
    broken.write("orphan.safetensors", "no safetensors");
    let tensors = ["lm_head.weight", "x", "y"].map(|name| Spec::new(name, "F32", &[320, 64]));
    broken.write_tensors("model-00005-of-00005.safetensors", &tensors);
    assert_eq!(broken.plan().unwrap().1.parameters, 152_000);
    let (code, stderr) = run_plan(broken.directory());
    let warnings = "warning: `model`: 2 tensors not in the shard that the index names, taken where they are: `x`, `y`\n\
                    warning: `model`: 2 tensors not read, for which the model has no place: `x`, `y`\n";
    assert_eq!((code, stderr.as_str()), (0, warnings));
}

#[test]
fn row_12_names_that_lead_out_of_the_directory() {
    let table = r"
        ../../x.safetensors
        a/../../x.safetensors
        /etc/passwd
        /etc/x.safetensors
        .
        ..
        C:\\x.safetensors
        a\\..\\b.safetensors
        ./x.safetensors
        x//y.safetensors
        x.safetensors/
        x.safetensors?y=.safetensors
        x%2f.safetensors
        x\u0000.safetensors
        pytorch_model.bin
    ";
    for [name] in rows(table).chain([[""]]) {
        let broken = Broken::sharded();
        broken.replace(INDEX, "model-00004-of-00005.safetensors\"\n", &format!("{name}\"\n"));
        let name = name.replace("\\u0000", "\\0");
        let message = format!("line 36, column 26: `{name}` is no plain name of a .safetensors file");
        broken.refused(format!("`DIR/{INDEX}`, {message}"));
    }
}

#[test]
fn row_12_links_that_their_owner_has_made() {
    let (broken, outside) = (Broken::sharded(), Broken::sharded());
    for entry in broken.directory().read_dir().unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        broken.link(&file, outside.path(&file));
    }
    broken.plan().unwrap();
    broken.link("sub", outside.directory());
    let name = "model-00004-of-00005.safetensors\"\n";
    let index = broken.read(INDEX);
    broken.remove(INDEX);
    broken.write(INDEX, index);
    broken.replace(INDEX, name, &format!("sub/{name}"));
    broken.plan().unwrap();
    for file in [INDEX, CONFIG, "generation_config.json"] {
        broken.link(file, "/dev/zero");
        broken.refused(format!("`DIR/{file}` is a pipe or a device, not a regular file"));
        broken.remove(file);
        std::fs::copy(outside.path(file), broken.path(file)).ok();
    }
}

#[test]
fn row_12_links_into_the_blobs_of_a_hugging_face_cache() {
    let cached = Broken::tiny_in("models--org--name/snapshots/f00");
    let (own, other) = ("models--org--name/blobs", "models--org--other/blobs");
    for blobs in [own, other] {
        std::fs::create_dir_all(cached.root().join(blobs)).unwrap();
        std::fs::copy(cached.path(SHARD), cached.root().join(blobs).join("bar")).unwrap();
    }
    cached.link(SHARD, "../../blobs/bar");
    cached.plan().unwrap();
    std::os::unix::fs::symlink("/etc/passwd", cached.root().join(own).join("out")).unwrap();
    let hint = "hint: a snapshot of a Hugging Face cache holds links into its own `blobs` only; download it again";
    for target in [&format!("../../../{other}/bar"), "../../blobs/out", "/etc/passwd"] {
        cached.link(SHARD, target);
        cached.refused(format!("`DIR/{SHARD}` is a link to a file outside its repository; {hint}"));
    }
    // Blobs on another disk.
    cached.link(SHARD, "../../blobs/bar");
    let elsewhere = cached.root().join("elsewhere");
    std::fs::rename(cached.root().join(own), &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, cached.root().join(own)).unwrap();
    cached.plan().unwrap();
}

#[test]
fn row_13_files_that_are_no_regular_files() {
    for file in [CONFIG, INDEX, SHARD, "generation_config.json"] {
        let broken = if file == INDEX { Broken::sharded() } else { Broken::tiny() };
        broken.pipe(file);
        broken.refused(format!("`DIR/{file}` is a pipe or a device, not a regular file"));
        broken.link(file, file);
        let cause = "Too many levels of symbolic links (os error 40)";
        broken.refused(format!("cannot open `DIR/{file}`; cause: {cause}"));
        broken.link(file, "nowhere");
        let cause = "No such file or directory (os error 2)";
        broken.refused(format!("cannot open `DIR/{file}`; cause: {cause}"));
        broken.remove(file);
        std::fs::create_dir(broken.path(file)).unwrap();
        broken.refused(format!("`DIR/{file}` is a directory, not a regular file"));
    }
}

#[test]
fn row_14_files_that_are_too_large() {
    for (file, cap) in [(CONFIG, "1.0 MiB"), ("generation_config.json", "1.0 MiB"), (INDEX, "64.0 MiB")] {
        let broken = if file == INDEX { Broken::sharded() } else { Broken::tiny() };
        broken.resize(file, 2 << 30);
        let message = format!("is 2.0 GiB, and at most {cap} is read of such a file");
        broken.refused(format!("`DIR/{file}` {message}"));
    }
}

#[test]
fn row_14_json_that_is_deep() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let broken = Broken::sharded();
    let deep = format!("{{\n\"deep\": {},\n  \"meta", nested(1_000_000));
    broken.replace(INDEX, "{\n  \"meta", &deep);
    broken.plan().unwrap();
    broken.write(INDEX, format!("{{\"weight_map\": {}}}", nested(1_000_000)));
    broken.refused(format!("`DIR/{INDEX}`, line 1, column 16: an object is wanted here, not a list"));
    broken.write(INDEX, "[".repeat(1_000_000));
    let cause = "EOF while parsing a list at line 1 column 1000000";
    broken.refused(format!("`DIR/{INDEX}` is not JSON; cause: {cause}"));

    let broken = Broken::tiny();
    broken.replace(CONFIG, "{\n", &format!("{{\"deep\": {},\n", nested(500_000)));
    broken.plan().unwrap();

    let (header, data) = header(&tiny_tensors());
    let header = header.replacen("\"dtype\"", &format!("\"deep\":{},\"dtype\"", nested(1_000_000)), 1);
    assert!(header_refusal(header, data).contains("line 1, column 30: unknown field `deep`"));
    let header = format!("{{\"__metadata__\":{}}}", nested(1_000_000));
    assert!(header_refusal(header, 0).ends_with("line 1, column 17: an object is wanted here, not a list"));
}

#[test]
fn row_14_json_of_another_shape() {
    let broken = Broken::sharded();
    let table = r#"
        [ |  is not JSON; cause: EOF while parsing a list at line 1 column 1
        [] | , line 1, column 1: an object is wanted here, not a list
        {} | , line 1, column 1: the index has no `weight_map`
        {"weight_map": {}} | , line 1, column 16: the `weight_map` is empty
        {"weight_map": []} | , line 1, column 16: an object is wanted here, not a list
        {"weight_map": null} | , line 1, column 16: an object is wanted here, not null
        {"weight_map": {"a": 1}} | , line 1, column 22: a text is wanted here, not 1
        {"weight_map": {"a": ["x.safetensors"]}} | , line 1, column 22: a text is wanted here, not a list
        {"weight_map": {}, "weight_map": {}} | , line 1, column 20: `weight_map` stands twice in this object
        {"weight_map": {"a": "x.safetensors",}} |  is not JSON; cause: key must be a string at line 1 column 38
        {'weight_map': {}} |  is not JSON; cause: key must be a string at line 1 column 2
    "#;
    for [json, message] in rows(table) {
        broken.write(INDEX, json);
        broken.refused(format!("`DIR/{INDEX}`{message}"));
    }
    let table = r#"
        32, | 32,, |  is not JSON; cause: key must be a string at line 10 column 33
        false | false, |  is not JSON; cause: key must be a string at line 12 column 1
        ["Llama | "Llama |  is not JSON; cause: expected `,` or `}` at line 2 column 38
        "vocab_size" | "hidden_size" | , line 8, column 3: `hidden_size` stands twice in this object
        16 | [16] | , line 8, column 17: a whole number, 0 or more, is wanted here, not a list
        false | "no" | , line 11, column 26: `true` or `false` is wanted here, not a text
    "#;
    for [old, new, message] in rows(table) {
        assert_eq!(config_refusal(old, new), format!("`DIR/{CONFIG}`{message}"));
    }
}

#[test]
fn row_15_configurations_out_of_range() {
    let table = r#"
        n_size": 8 | n_size": 0 | line 3, column 18: `hidden_size` is 0; it must be from 1 to 1048576
        n_size": 8 | n_size": 9 | line 3, column 18: a hidden size of 9 does not divide over 2 attention heads
        n_size": 8 | n_size": 6 | line 1, column 1: a head of width 3 cannot be rotated: it is odd
        n_size": 8 | n_size": -8 | line 3, column 18: a whole number, 0 or more, is wanted here, not -8
        n_heads": 2 | n_heads": 0 | line 6, column 26: `num_attention_heads` is 0; it must be from 1 to 65536
        e_heads": 1 | e_heads": 0 | line 7, column 26: `num_key_value_heads` is 0; it must be from 1 to 65536
        e_heads": 1 | e_heads": 4 | line 6, column 26: 2 attention heads do not divide over 4 key-value heads
        layers": 1 | layers": 1000000000 | line 5, column 24: `num_hidden_layers` is 1000000000; it must be from 1 to 10000
        16 | 1e99 | line 8, column 17: a whole number, 0 or more, is wanted here, not 1e99
        1e-05 | 0 | line 9, column 19: `rms_norm_eps` is 0.0; it must be from 1e-30 to 1
        1e-05 | 1e-40 | line 9, column 19: `rms_norm_eps` is 1e-40; it must be from 1e-30 to 1
        1e-05 | 1e999 | line 9, column 19: a number is wanted here, not 1e999
        1e-05 | "NaN" | line 9, column 19: a number is wanted here, not a text
        LlamaFor | \u001b[2JFor | line 2, column 20: architecture `\u{1b}[2JForCausalLM` is not supported; supported: SUPPORTED
        architectures": ["LlamaForCausalLM"] | model_type": "warp" | line 2, column 17: model type `warp` is not supported; supported: SUPPORTED
    "#;
    for [old, new, message] in rows(table) {
        let names: Vec<_> = FAMILIES.iter().map(|family| family.architecture).collect();
        let message = message.replace("SUPPORTED", &names.join(", "));
        assert_eq!(config_refusal(old, new), format!("`DIR/{CONFIG}`, {message}"));
    }
    for number in ["NaN", "Infinity", "-Infinity"] {
        let message = format!("line 9, column 19: a number is wanted here, not {number}");
        assert_eq!(config_refusal("1e-05", number), format!("`DIR/{CONFIG}`, {message}"));
    }
}

#[test]
fn row_15_configurations_that_the_tensors_contradict() {
    for rows in [17, 1 << 24] {
        let wrong = format!("weight has shape [16, 8], not [{rows}, 8]`");
        let both = format!("`model.embed_tokens.{wrong}, `lm_head.{wrong}");
        let message = format!("`broken` contradicts its config.json in 2 tensors: {both}");
        assert_eq!(config_refusal("16", &rows.to_string()), message);
    }
    let refusal = config_refusal("layers\": 1", "layers\": 10000");
    let start =
        "`broken` lacks 89991 tensors that its config.json calls for: `model.layers.1.input_layernorm.weight`, ";
    assert!(refusal.starts_with(start) && refusal.ends_with(" and 89986 more"), "{refusal}");
}

#[test]
fn row_15_code_that_a_configuration_names_is_never_read() {
    let broken = Broken::tiny();
    let (_, plain) = broken.plan().unwrap();
    broken.pipe("modeling_evil.py");
    let auto_map = "{\"auto_map\": {\"AutoModelForCausalLM\": \"modeling_evil.Evil\"},\n";
    broken.replace(CONFIG, "{\n", auto_map);
    assert_eq!(broken.plan().unwrap().1, plain);
}

#[test]
fn row_16_wrong_dtype_or_shape() {
    let with = |part: &str, change: &dyn Fn(&mut Spec)| {
        let mut tensors = tiny_tensors();
        tensors.iter_mut().filter(|tensor| tensor.name.contains(part)).for_each(change);
        let broken = Broken::tiny();
        broken.write_tensors(SHARD, &tensors);
        broken
    };
    let of_shape = |part, shape: &[u64]| with(part, &|tensor| tensor.shape = shape.to_vec()).refusal();
    let contradicts = "`broken` contradicts its config.json in 1 tensor: `model.layers.0";
    for dtype in ["U8", "I8", "F8_E4M3", "F8_E5M2", "BOOL"] {
        let message = format!("{contradicts}.mlp.up_proj.weight has dtype {dtype}, not BF16, F16, F32 or F64`");
        assert_eq!(with("up_proj", &|tensor| tensor.dtype = dtype).refusal(), message);
    }
    for (part, shape, right) in [
        ("mlp.up_proj", &[8, 12][..], "[12, 8]"),
        ("self_attn.k_proj", &[8, 8], "[4, 8]"),
        ("self_attn.v_proj", &[32], "[4, 8]"),
        ("input_layernorm", &[], "[8]"),
    ] {
        let message = format!("{contradicts}.{part}.weight has shape {shape:?}, not {right}`");
        assert_eq!(of_shape(part, shape), message);
    }
    let all = with("", &|tensor| tensor.dtype = "I8").refusal();
    assert!(all.starts_with("`broken` contradicts its config.json in 12 tensors: `model.embed_tokens.weight has "));
    assert!(all.ends_with(" and 7 more") && all.matches("has dtype").count() == 5, "{all}");
    for dtype in ["F16", "BF16", "F64"] {
        with("", &|tensor| tensor.dtype = dtype).plan().unwrap();
    }
}

#[test]
fn row_17_missing_and_unexpected_tensors() {
    let broken = Broken::tiny();
    broken.write_tensors(SHARD, &tiny_tensors()[..11]);
    let lacks_head = "`broken` lacks 1 tensor that its config.json calls for: `lm_head.weight`";
    broken.refused(lacks_head);
    broken.replace(CONFIG, ",\n  \"tie_word_embeddings\": false", "");
    broken.refused(lacks_head);
    broken.replace(CONFIG, "{\n", "{\"tie_word_embeddings\": true,\n");
    broken.plan().unwrap();
    broken.write_tensors(SHARD, &tiny_tensors());
    broken.plan().unwrap();

    let broken = Broken::tiny();
    broken.write_tensors(SHARD, &[]);
    let refusal = broken.refusal();
    let start = "`broken` lacks 12 tensors that its config.json calls for: `model.embed_tokens.weight`, ";
    assert!(refusal.starts_with(start) && refusal.ends_with(" and 7 more"), "{refusal}");
    for (before, hint) in [
        ("teacher.", "the names of all its tensors begin with `teacher.`"),
        ("x", "it holds others: `xlm_head.weight`, `xmodel.embed_tokens.weight`, "),
    ] {
        let other = |tensor: Spec| Spec { name: format!("{before}{}", tensor.name), ..tensor };
        broken.write_tensors(SHARD, &tiny_tensors().into_iter().map(other).collect::<Vec<_>>());
        let refusal = broken.refusal();
        assert!(refusal.starts_with(start) && refusal.contains(&format!(" and 7 more; hint: {hint}")), "{refusal}");
    }
}

/// The exit code of `evenkeel plan`, and what it writes to standard error.
fn run_plan(directory: &Path) -> (i32, String) {
    const PATIENCE: Duration = Duration::from_mins(1);
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
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code().expect("a signal ended it"), stderr)
}

#[test]
fn the_command_refuses_with_exit_code_1() {
    type Break = fn(&Broken);
    assert_eq!(run_plan(Broken::tiny().directory()), (0, String::new()));
    let breaks: [(Break, &str); 6] = [
        (|b| b.resize(SHARD, 7), "model.safetensors` is 7 bytes, its header needs 8"),
        (|b| b.pipe(SHARD), "model.safetensors` is a pipe or a device"),
        (|b| b.pipe(CONFIG), "config.json` is a pipe or a device"),
        (|b| b.resize(CONFIG, 2 << 30), "config.json` is 2.0 GiB, and at most 1.0 MiB"),
        (|b| b.replace(CONFIG, "_size\": 8", "_size\": 0"), "`hidden_size` is 0; it must be"),
        (|b| b.write_tensors(SHARD, &[]), "lacks 12 tensors that its config.json calls for"),
    ];
    for (break_it, message) in breaks {
        let broken = Broken::tiny();
        break_it(&broken);
        let (code, stderr) = run_plan(broken.directory());
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(message), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// Places in a file, the number of bytes that go there, and those that come.
type Mutations = Vec<(sample::Index, usize, Vec<u8>)>;

fn mutations() -> impl Strategy<Value = Mutations> {
    let byte = prop_oneof![any::<u8>(), sample::select(&b"0123456789-+.eE\"\\{}[]:, \n\0\xff"[..])];
    let mutation = (any::<sample::Index>(), 0..3usize, prop::collection::vec(byte, 0..3));
    prop::collection::vec(mutation, 1..5)
}

fn mutate(bytes: impl Into<Vec<u8>>, mutations: &Mutations) -> Vec<u8> {
    let mut bytes = bytes.into();
    for (place, going, coming) in mutations {
        let start = place.index(bytes.len() + 1);
        let end = bytes.len().min(start + going);
        bytes.splice(start..end, coming.iter().copied());
    }
    bytes
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
        assert_plans_or_refuses(&Broken::tiny(), CONFIG, &mutate(TINY_CONFIG, &mutations));
        let broken = Broken::tiny();
        std::fs::rename(broken.path(SHARD), broken.path("1.safetensors")).unwrap();
        assert_plans_or_refuses(&broken, INDEX, &mutate(weight_map("1.safetensors").to_string(), &mutations));
    }

    #[test]
    fn mutated_shards_are_planned_or_refused(mutations in mutations()) {
        let (header, data) = header(&tiny_tensors());
        let with_length = mutate(shard(&header, 0), &mutations);
        let broken = Broken::tiny();
        assert_plans_or_refuses(&broken, SHARD, &shard(mutate(header, &mutations), data));
        assert_plans_or_refuses(&broken, SHARD, &[with_length, vec![0; data]].concat());
    }
}
