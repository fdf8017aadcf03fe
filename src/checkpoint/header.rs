//! The header of a safetensors shard: 8 bytes of length, little-endian, then
//! JSON that gives each tensor a dtype, a shape and a range of the data behind.
//!
//! Everything is checked here, with arithmetic that cannot wrap, before any
//! byte of data is read or any memory is taken; the `safetensors` crate then
//! parses the same header as a second judge.

use std::ops::Range;

use safetensors::Dtype;
use serde::Deserialize;

use crate::bytes::Bytes;
use crate::error::printable;
use crate::json::Document;

/// The length field in front of the JSON.
pub const LENGTH_FIELD: usize = 8;
/// The longest header that is read, in bytes (the format's own limit).
pub const MAX_HEADER: u64 = 100_000_000;
/// The most tensors that one shard may name.
pub const MAX_TENSORS: usize = 1_000_000;
/// The most dimensions that a tensor may have.
pub const MAX_RANK: usize = 64;
/// The longest name of a tensor, in bytes.
pub const MAX_NAME: usize = 512;

const GIT_LFS_POINTER: &[u8] = b"version https://git-lfs";

/// A tensor as its shard's header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, 1 to [`MAX_NAME`] bytes without control characters.
    pub name: String,
    /// Type of an element.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// Where its data stands in the file.
    pub range: Range<u64>,
}

/// What can be wrong with a header. The shard's name is added by the caller.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// A tensor is described in another shape than the format's.
    #[error("describes tensor `{}` in a way that cannot be read", printable(.name))]
    Entry {
        /// The tensor.
        name: String,
        /// What cannot be read.
        #[source]
        cause: crate::Error,
    },
    /// The file is a pointer that `git` left in place of the file.
    #[error("is a Git LFS pointer, not the file itself")]
    GitLfsPointer,
    /// Gaps, overlaps, or an order that runs backwards.
    #[error("tensor `{}` starts at byte {start} of the data, but the data before it ends at byte {expected}", printable(.name))]
    Gap {
        /// The tensor.
        name: String,
        /// Where it says it starts.
        start: u64,
        /// Where it must start.
        expected: u64,
    },
    /// Not JSON, not UTF-8, or JSON of another shape.
    #[error("has a header that cannot be read")]
    Json(#[source] crate::Error),
    /// A name that is empty, too long or holds control characters.
    #[error("names a tensor `{}`; names have 1 to {MAX_NAME} bytes and no control characters", printable(.0))]
    Name(String),
    /// A shape of more dimensions than the limit.
    #[error("tensor `{}` has {rank} dimensions; at most {MAX_RANK} are read", printable(.name))]
    Rank {
        /// The tensor.
        name: String,
        /// How many dimensions it says it has.
        rank: usize,
    },
    /// The shape, the dtype and the range do not agree.
    #[error(
        "tensor `{}` of shape {} and dtype {dtype:?} does not take the bytes {start}..{end} that it is given",
        printable(.name), printable(&format!("{shape:?}"))
    )]
    Size {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its dtype.
        dtype: Dtype,
        /// First byte of its range.
        start: u64,
        /// End of its range.
        end: u64,
    },
    /// The second judge found what the first did not.
    #[error("has a header that the safetensors crate refuses")]
    SecondJudge(#[source] serde_json::Error),
    /// The length field is beyond the limit.
    #[error("says that its header has {0} bytes; at most {MAX_HEADER} are read")]
    TooLong(u64),
    /// More tensors than the limit.
    #[error("names {0} tensors; at most {MAX_TENSORS} are read")]
    TooManyTensors(usize),
    /// Bytes stand behind the last tensor.
    #[error("is {file} bytes, but its header describes only {needed}: {} bytes follow the last tensor", .file - .needed)]
    Trailing {
        /// The file's size.
        file: u64,
        /// What the header accounts for.
        needed: u64,
    },
    /// The file ends before its data does.
    #[error("is {file} bytes, its header needs {needed}; the download is incomplete")]
    Truncated {
        /// The file's size.
        file: u64,
        /// What the header accounts for.
        needed: u64,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's length, from the first bytes of a file of `file` bytes.
pub fn length(start: &[u8], file: Bytes) -> Result<usize, HeaderError> {
    if start.starts_with(&GIT_LFS_POINTER[..LENGTH_FIELD]) {
        return Err(HeaderError::GitLfsPointer);
    }
    let Some(field) = start.first_chunk::<LENGTH_FIELD>() else {
        return Err(HeaderError::Truncated { file: file.0, needed: LENGTH_FIELD as u64 });
    };
    let length = u64::from_le_bytes(*field);
    if length > MAX_HEADER {
        return Err(HeaderError::TooLong(length));
    }
    let needed = length + LENGTH_FIELD as u64;
    if needed > file.0 {
        return Err(HeaderError::Truncated { file: file.0, needed });
    }
    usize::try_from(length).map_err(|_| HeaderError::TooLong(length))
}

/// The tensors that the JSON `header` describes, in the order of their data,
/// for a file of `file` bytes. Their ranges cover all bytes behind the header
/// without a gap.
pub fn parse(header: Vec<u8>, file: Bytes) -> Result<Vec<TensorInfo>, HeaderError> {
    let data = (LENGTH_FIELD + header.len()) as u64;
    let second_judge = header.clone();
    let document = Document::parse("header", header).map_err(HeaderError::Json)?;
    let members = document.root().members().map_err(HeaderError::Json)?;
    if members.len() > MAX_TENSORS {
        return Err(HeaderError::TooManyTensors(members.len()));
    }
    let mut tensors = Vec::with_capacity(members.len());
    for member in members {
        if member.name == "__metadata__" {
            member.value.members().map_err(HeaderError::Json)?;
            continue;
        }
        let name = member.name;
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(HeaderError::Name(name));
        }
        let entry: Entry = match member.value.parse() {
            Ok(entry) => entry,
            Err(cause) => return Err(HeaderError::Entry { name, cause }),
        };
        let rank = entry.shape.len();
        if rank > MAX_RANK {
            return Err(HeaderError::Rank { name, rank });
        }
        let (start, end) = entry.data_offsets;
        if byte_size(entry.dtype, &entry.shape).is_none_or(|size| start.checked_add(size) != Some(end)) {
            return Err(HeaderError::Size { name, shape: entry.shape, dtype: entry.dtype, start, end });
        }
        tensors.push(TensorInfo { name, dtype: entry.dtype, shape: entry.shape, range: start..end });
    }
    tensors.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    let mut expected = 0;
    for tensor in &mut tensors {
        if tensor.range.start != expected {
            return Err(HeaderError::Gap { name: tensor.name.clone(), start: tensor.range.start, expected });
        }
        expected = tensor.range.end;
    }
    let needed = data.saturating_add(expected);
    if needed > file.0 {
        return Err(HeaderError::Truncated { file: file.0, needed });
    }
    if needed < file.0 {
        return Err(HeaderError::Trailing { file: file.0, needed });
    }
    // The whole range lies in the file, so no sum below can wrap.
    for tensor in &mut tensors {
        tensor.range = data + tensor.range.start..data + tensor.range.end;
    }
    serde_json::from_slice::<safetensors::tensor::Metadata>(&second_judge).map_err(HeaderError::SecondJudge)?;
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
    use super::*;

    /// `json` as a shard whose data is `data` bytes long.
    fn read(json: &str, data: u64) -> Result<Vec<TensorInfo>, String> {
        let file = Bytes((LENGTH_FIELD + json.len()) as u64 + data);
        parse(json.as_bytes().to_vec(), file).map_err(|e| {
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
        let names: Vec<_> = tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "empty"]);
        assert_eq!(tensors[1].range.end - tensors[1].range.start, 12);
    }

    #[test]
    fn each_error_on_literal_bytes() {
        let huge = u64::MAX / 8;
        for (json, data, message) in [
            ("", 0, "has a header that cannot be read: `header` is not JSON"),
            ("{}\0\0", 0, "has a header that cannot be read: `header` is not JSON"),
            ("[]", 0, "an object is wanted here, not a list"),
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
        let length = |bytes: &[u8], file| length(bytes, Bytes(file)).map_err(|e| e.to_string());
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
            assert_eq!(length(bytes, file), Err(message.to_owned()));
        }
    }
}
