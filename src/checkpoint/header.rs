//! The header of a safetensors shard: 8 bytes of length, little-endian, then
//! JSON that gives each tensor a dtype, a shape and a range of the data behind.
//!
//! Everything is checked here, with arithmetic that cannot wrap, before any
//! byte of data is read or any memory is taken. The `safetensors` crate takes
//! the same headers, but for names, and does not say which bytes are wrong.

use safetensors::Dtype;
use serde::Deserialize;

use super::Tensor;
use crate::bytes::Bytes;
use crate::error::{Error, Result, printable};
use crate::json::Document;
use crate::source::Source;

/// The length field in front of the JSON.
const LENGTH_FIELD: usize = 8;
/// The longest header that is read, in bytes (the format's own limit).
const MAX_HEADER: u64 = 100_000_000;
/// The most tensors of a shard, and of all shards together.
pub const MAX_TENSORS: usize = 500_000;
const MAX_RANK: usize = 64;
/// The longest name of a tensor, in bytes.
const MAX_NAME: usize = 512;

const GIT_LFS_POINTER: &[u8] = b"version https://git-lfs";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The size of a shard and the tensors in it, in the order of their data. Their
/// ranges cover all bytes behind the header without a gap.
pub fn read(source: &dyn Source, file: &str, shard: usize) -> Result<(Bytes, Vec<(String, Tensor)>)> {
    let (name, size) = (source.display(file), source.size(file)?);
    let start = source.read_range(file, 0, LENGTH_FIELD)?;
    let length = length(&name, &start, size)?;
    let json = source.read_range(file, LENGTH_FIELD as u64, length)?;
    Ok((size, parse(&name, shard, json, size)?))
}

fn truncated(name: &str, file: Bytes, needed: u64) -> Error {
    Error::input(format!("`{name}` is {} bytes, its header needs {needed}; the download is incomplete", file.0))
        .hint("download the file again")
}

/// The header's length, from the first bytes of a file of `file` bytes.
fn length(name: &str, start: &[u8], file: Bytes) -> Result<usize> {
    if start.starts_with(&GIT_LFS_POINTER[..LENGTH_FIELD]) {
        return Err(Error::input(format!("`{name}` is a Git LFS pointer, not the file itself"))
            .hint("`git lfs pull` fetches the file itself"));
    }
    let Some(field) = start.first_chunk::<LENGTH_FIELD>() else {
        return Err(truncated(name, file, LENGTH_FIELD as u64));
    };
    let stated = u64::from_le_bytes(*field);
    let Some(length) = usize::try_from(stated).ok().filter(|_| stated <= MAX_HEADER) else {
        let problem = format!("says that its header has {stated} bytes; at most {MAX_HEADER} are read");
        return Err(Error::input(format!("`{name}` {problem}")));
    };
    let needed = stated + LENGTH_FIELD as u64;
    if needed > file.0 { Err(truncated(name, file, needed)) } else { Ok(length) }
}

fn parse(name: &str, shard: usize, header: Vec<u8>, file: Bytes) -> Result<Vec<(String, Tensor)>> {
    let wrong = |problem: String| Error::input(format!("`{name}` {problem}"));
    let unreadable = |cause| wrong("has a header that cannot be read".to_owned()).caused_by(cause);
    let data = (LENGTH_FIELD + header.len()) as u64;
    let document = Document::parse("header", header).map_err(unreadable)?;
    let members = document.root().members().map_err(unreadable)?;
    if members.len() > MAX_TENSORS {
        return Err(wrong(format!("names {} tensors; at most {MAX_TENSORS} are read", members.len())));
    }
    let mut tensors = Vec::with_capacity(members.len());
    for member in members {
        if member.name == "__metadata__" {
            let texts = member.value.members().map_err(unreadable)?;
            texts.iter().try_for_each(|member| member.value.text().map(drop)).map_err(unreadable)?;
            continue;
        }
        let shown = || printable(&member.name);
        if member.name.is_empty() || member.name.len() > MAX_NAME || member.name.chars().any(char::is_control) {
            return Err(wrong(format!(
                "names a tensor `{}`; names have 1 to {MAX_NAME} bytes and no control characters",
                shown()
            )));
        }
        let Entry { dtype, shape, data_offsets: (start, end) } = member.value.parse().map_err(|cause| {
            wrong(format!("describes tensor `{}` in a way that cannot be read", shown())).caused_by(cause)
        })?;
        let rank = shape.len();
        if rank > MAX_RANK {
            return Err(wrong(format!("tensor `{}` has {rank} dimensions; at most {MAX_RANK} are read", shown())));
        }
        if byte_size(dtype, &shape).is_none_or(|size| start.checked_add(size) != Some(end)) {
            let shape = printable(&format!("{shape:?}"));
            return Err(wrong(format!(
                "tensor `{}` of shape {shape} and dtype {dtype:?} does not take the bytes {start}..{end} that it is given",
                shown()
            )));
        }
        tensors.push((member.name, Tensor { shard, dtype, shape, range: start..end }));
    }
    tensors.sort_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
    let mut expected = 0;
    for (name, tensor) in &tensors {
        if tensor.range.start != expected {
            return Err(wrong(format!(
                "tensor `{}` starts at byte {} of the data, but the data before it ends at byte {expected}",
                printable(name),
                tensor.range.start
            )));
        }
        expected = tensor.range.end;
    }
    let needed = data.saturating_add(expected);
    if needed > file.0 {
        return Err(truncated(name, file, needed));
    }
    if needed < file.0 {
        let (file, behind) = (file.0, file.0 - needed);
        return Err(wrong(format!(
            "is {file} bytes, but its header describes only {needed}: {behind} bytes follow the last tensor"
        )));
    }
    // The whole range lies in the file, so no sum below can wrap.
    for (_, tensor) in &mut tensors {
        tensor.range = data + tensor.range.start..data + tensor.range.end;
    }
    Ok(tensors)
}

/// The bytes of a tensor, where they are a number of whole bytes below 2^64.
fn byte_size(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |product, extent| product.checked_mul(*extent))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;
    use serde_json::{Map, Value, json};

    use super::*;

    /// `json` as a shard whose data is `data` bytes long.
    fn read(json: &str, data: u64) -> Result<Vec<(String, Tensor)>, String> {
        let file = Bytes((LENGTH_FIELD + json.len()) as u64 + data);
        parse("x", 0, json.as_bytes().to_vec(), file).map_err(|e| {
            let mut text = e.to_string();
            let mut cause = std::error::Error::source(&e);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            text
        })
    }

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let tensors = read(
            r#" {"__metadata__":{"format":"pt"},
                "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
                "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
                "empty":{"dtype":"F32","shape":[0,7],"data_offsets":[16,16]}} "#,
            16,
        )
        .unwrap();
        let names: Vec<_> = tensors.iter().map(|t| t.0.as_str()).collect();
        assert_eq!(names, ["a", "b", "empty"]);
        assert_eq!(tensors[1].1.size(), Bytes(12));
    }

    #[test]
    fn each_error_on_literal_bytes() {
        let huge = u64::MAX / 8;
        for (json, data, message) in [
            ("", 0, "has a header that cannot be read: `header` is not JSON"),
            ("{}\0\0", 0, "has a header that cannot be read: `header` is not JSON"),
            ("[]", 0, "an object is wanted here, not a list"),
            (r#"{"__metadata__":{"format":1}}"#, 0, "line 1, column 27: a text is wanted here, not 1"),
            (r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, 4, "unknown variant `F99`"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}"#, 4, "invalid value: integer `-4`"),
            (r#"{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}"#, 4, "duplicate field `shape`"),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
                "`a` stands twice in this object",
            ),
            (r#"{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, "names a tensor ``"),
            (r#"{"a\u0000b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, r"names a tensor `a\0b`"),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
                4,
                "tensor `a` of shape [2] and dtype F32 does not take the bytes 0..4",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
                4,
                "tensor `a` of shape [1] and dtype F32 does not take the bytes 4..0",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[18446744073709551615,2],"data_offsets":[0,4]}}"#,
                4,
                "tensor `a` of shape [18446744073709551615, 2]",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#,
                12,
                "tensor `b` starts at byte 8 of the data, but the data before it ends at byte 4",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
                6,
                "tensor `b` starts at byte 2 of the data, but the data before it ends at byte 4",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                3,
                "is 65 bytes, its header needs 66; the download is incomplete",
            ),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 9, "5 bytes follow the last tensor"),
            (
                &format!(
                    r#"{{"a":{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}},"b":{{"dtype":"U8","shape":[{huge}],"data_offsets":[{huge},{}]}}}}"#,
                    huge * 2
                ),
                4,
                "the download is incomplete",
            ),
        ] {
            let error = read(json, data).expect_err(json);
            assert!(error.contains(message), "{json}\n{error}");
        }
    }

    #[test]
    fn sums_near_two_to_the_64_are_refused() {
        let part = (1u64 << 61) - 1;
        let entries: Vec<_> = (0..8)
            .map(|i| {
                format!(r#""t{i}":{{"dtype":"U8","shape":[{part}],"data_offsets":[{},{}]}}"#, part * i, part * (i + 1))
            })
            .collect();
        let error = read(&format!("{{{}}}", entries.join(",")), 0).unwrap_err();
        assert!(error.contains("the download is incomplete"), "{error}");
    }

    #[test]
    fn a_name_of_a_megabyte_is_refused() {
        let json = format!(r#"{{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#, "n".repeat(1 << 20));
        let error = read(&json, 4).unwrap_err();
        assert!(error.len() < 300 && error.contains("names a tensor `nnn"), "{error}");
    }

    #[test]
    fn the_length_field() {
        let length = |bytes: &[u8], file| length("x", bytes, Bytes(file)).map_err(|e| e.to_string());
        assert_eq!(length(&64u64.to_le_bytes(), 100), Ok(64));
        for (bytes, file, message) in [
            (&b""[..], 0, "is 0 bytes, its header needs 8; the download is incomplete"),
            (&[1, 0, 0, 0, 0, 0, 0], 7, "is 7 bytes, its header needs 8; the download is incomplete"),
            (&93u64.to_le_bytes(), 100, "is 100 bytes, its header needs 101; the download is incomplete"),
            (
                &u64::MAX.to_le_bytes(),
                100,
                "says that its header has 18446744073709551615 bytes; at most 100000000 are read",
            ),
            (b"version https://git-lfs.github.com/spec/v1", 130, "is a Git LFS pointer, not the file itself"),
        ] {
            assert_eq!(length(bytes, file), Err(format!("`x` {message}")));
        }
    }

    proptest! {
        #[test]
        fn headers_are_read_that_safetensors_reads(
            tensors in prop::collection::vec(
                (select(vec!["F4", "F6_E2M3", "U8", "BF16", "F32", "I64"]), prop::collection::vec(0u64..5, 0..4)),
                0..5,
            ),
            // A tensor's place, which of its numbers is wrong, and by how much; and so for the data.
            (wrong, number, by, behind) in (0usize..8, 0usize..3, -2i64..3, prop_oneof![9 => Just(0i64), 1 => -2i64..3]),
        ) {
            let (mut header, mut end) = (Map::new(), 0);
            for (at, (dtype, shape)) in tensors.iter().enumerate().rev() {
                let bits: Dtype = serde_json::from_value(json!(dtype)).unwrap();
                let start = end;
                end += shape.iter().product::<u64>() * bits.bitsize() as u64 / 8;
                let mut numbers = [start, end, shape.first().copied().unwrap_or_default()];
                if at == wrong {
                    numbers[number] = numbers[number].wrapping_add_signed(by);
                }
                let [start, end, first] = numbers;
                let shape: Vec<u64> = shape.iter().enumerate().map(|(at, n)| if at == 0 { first } else { *n }).collect();
                header.insert(format!("t{at}"), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
            }
            let json = Value::from(header).to_string();
            let data = end.saturating_add_signed(behind);
            let ours = read(&json, data);
            let file = [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &vec![0; data as usize]].concat();
            let theirs = safetensors::SafeTensors::read_metadata(&file);
            prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{}: {:?} {:?}", json, ours, theirs.err());
            for (name, tensor) in ours.unwrap_or_default() {
                let (_, theirs) = theirs.as_ref().unwrap();
                let (start, end) = theirs.info(&name).unwrap().data_offsets;
                let before = (LENGTH_FIELD + json.len()) as u64;
                prop_assert_eq!(tensor.range, start as u64 + before..end as u64 + before);
            }
        }
    }
}
