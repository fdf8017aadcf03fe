//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::{BTreeMap, BTreeSet};

use crate::bytes::{Bytes, MIB};
use crate::error::{Result, printable};
use crate::fs;
use crate::json::Document;
use crate::source::Source;

/// The index's file name.
pub const FILE: &str = "model.safetensors.index.json";
/// The largest index that is read.
pub const CAP: Bytes = Bytes(64 * MIB);

/// The index, checked: every shard is a plain name that ends in `.safetensors`.
#[derive(Debug, Default)]
pub struct Index {
    /// Tensor name to shard, as a position in `shards`.
    pub weight_map: BTreeMap<String, usize>,
    /// File names, sorted.
    pub shards: Vec<String>,
}

impl Index {
    /// Reads the index of `source`.
    pub fn read(source: &dyn Source) -> Result<Self> {
        let document = Document::parse(source.display(FILE), source.read(FILE, CAP)?)?;
        let root = document.root();
        let members = root.members_to_read()?;
        let Some(map) = members.iter().find(|member| member.name == "weight_map") else {
            return Err(root.error("the index has no `weight_map`"));
        };
        let mut named = BTreeMap::new();
        for entry in map.value.members()? {
            let shard = entry.value.text()?;
            if !is_plain_shard_name(&shard) {
                let shard = printable(&shard);
                return Err(entry.value.error(format!("`{shard}` is no plain name of a .safetensors file")));
            }
            named.insert(entry.name, shard);
        }
        if named.is_empty() {
            return Err(map.value.error("the `weight_map` is empty"));
        }
        let shards: Vec<_> = named.values().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        let position = |shard| shards.binary_search(&shard).unwrap_or_default();
        let weight_map = named.into_iter().map(|(tensor, shard)| (tensor, position(shard))).collect();
        Ok(Self { weight_map, shards })
    }
}

/// Whether `name` is a plain name that ends in `.safetensors` and means the same in a URL.
pub fn is_plain_shard_name(name: &str) -> bool {
    const LONGEST: usize = 255;
    name.len() <= LONGEST
        && name.ends_with(".safetensors")
        && !name.contains(['?', '#', '%'])
        && fs::is_plain_name(name)
}

#[cfg(test)]
mod tests {
    use super::is_plain_shard_name;

    #[test]
    fn shard_names() {
        for good in ["model-00001-of-00003.safetensors", "sub/model.safetensors"] {
            assert!(is_plain_shard_name(good), "{good}");
        }
        for bad in [
            "",
            "model.bin",
            "../x.safetensors",
            "/etc/x.safetensors",
            "a//x.safetensors",
            "C:\\x.safetensors",
            "a\\..\\b.safetensors",
            ".",
            "x.safetensors\0",
        ] {
            assert!(!is_plain_shard_name(bad), "{bad}");
        }
    }
}
