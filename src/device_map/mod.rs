//! The JSON device map: which module goes where, and under what conditions.
//!
//! Two forms are read. The plain dictionary of Hugging Face,
//! `{"model.embed_tokens": 0, "lm_head": "cpu"}`, and the form that
//! a plan is written in, which carries model, schemes, context and
//! budgets beside it. Keys are module paths, `""` the whole model, and in our
//! form ranges of blocks (`model.layers.0-19`); the longest path wins.

mod resolve;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use crate::bytes::{Bytes, MIB};
use crate::device::DeviceId;
use crate::error::{Error, ParseError, Result, did_you_mean, printable};
use crate::fs;
use crate::json::{Document, Member, Node, Place};
use crate::model_config::MAX_CONTEXT;
use crate::quant::{KvDtype, QuantizeRules};

pub use write::to_hugging_face;

/// The version of the form that is written and read.
pub const SCHEMA_VERSION: u64 = 1;
/// The largest map that is read.
const CAP: Bytes = Bytes(4 * MIB);
/// The most sequences at once.
pub const MAX_BATCH: usize = 1 << 16;

/// Budgets by device.
pub type MaxMemory = BTreeMap<DeviceId, Bytes>;

/// A device map as it was read; not yet held against a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceMap {
    origin: String,
    /// The model that the map was made for.
    pub model: Option<String>,
    /// The schemes that its sizes assume.
    pub quantize: Option<QuantizeRules>,
    /// Longest context, in tokens.
    pub context: Option<usize>,
    /// Sequences at once.
    pub batch: Option<usize>,
    /// The type of the KV cache's elements.
    pub kv_cache: Option<KvDtype>,
    /// What sequences share to keep keys and values in.
    pub kv_memory: Option<Bytes>,
    /// Budgets.
    pub max_memory: Option<MaxMemory>,
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    path: String,
    device: DeviceId,
    place: Place,
}

impl DeviceMap {
    /// The map that puts the whole model on a device.
    pub fn whole(device: DeviceId) -> Self {
        let entry = Entry { path: String::new(), device, place: Place::default() };
        Self { origin: device.to_string(), entries: vec![entry], ..Self::default() }
    }

    /// Whether it puts anything on a GPU, or has a budget for one.
    pub fn names_gpus(&self) -> bool {
        let budgets = self.max_memory.iter().flatten().map(|(device, _)| *device);
        self.entries.iter().map(|entry| entry.device).chain(budgets).any(DeviceId::is_gpu)
    }

    /// Reads a map from a file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(&path.display().to_string(), fs::read_capped(path, CAP)?)
    }

    /// Reads a map from JSON; `origin` is its name in messages.
    pub fn parse(origin: &str, json: Vec<u8>) -> Result<Self> {
        let document = Document::parse(origin, json)?;
        let members = document.root().members()?;
        let mut map = Self { origin: origin.to_owned(), ..Self::default() };
        // `model` alone does not tell: it is a module's path too.
        if !members.iter().any(|member| member.name != "model" && KEYS.contains(&member.name.as_str())) {
            map.entries = entries(document.root())?;
            return Ok(map);
        }
        for member in &members {
            let value = member.value;
            match member.name.as_str() {
                "schema_version" => {
                    let version = value.whole()?;
                    if version != SCHEMA_VERSION {
                        return Err(value.error(format!("schema_version {version} is not known; {SCHEMA_VERSION} is")));
                    }
                }
                "model" => map.model = Some(value.text()?),
                "quantize" => map.quantize = Some(rules(value)?),
                "context" => map.context = Some(value.size("context", MAX_CONTEXT)?),
                "batch" => map.batch = Some(value.size("batch", MAX_BATCH as u64)?),
                "kv_cache" => map.kv_cache = Some(value.spelled()?),
                "kv_memory" => map.kv_memory = Some(size(value)?),
                "max_memory" => map.max_memory = Some(max_memory(value)?),
                "device_map" => map.entries = entries(value)?,
                other => return Err(unknown_key(member, other)),
            }
        }
        // A map that is there and empty was refused.
        if map.entries.is_empty() { Err(document.root().error("`device_map` is missing")) } else { Ok(map) }
    }
}

const KEYS: &[&str] =
    &["schema_version", "model", "quantize", "context", "batch", "kv_cache", "kv_memory", "max_memory", "device_map"];

fn unknown_key(member: &Member, name: &str) -> Error {
    let error = member.key.error(format!("`{}` is no key of a device map", printable(name)));
    error.hint(did_you_mean(name, KEYS.iter().copied(), format!("the keys are {}", KEYS.join(", "))))
}

fn rules(node: Node) -> Result<QuantizeRules> {
    if node.is_text() {
        return node.spelled().map(QuantizeRules::whole_model);
    }
    let rule = |member: Member| Ok((member.name, member.value.spelled()?));
    node.members()?.into_iter().map(rule).collect::<Result<_>>().map(QuantizeRules::new)
}

fn max_memory(node: Node) -> Result<MaxMemory> {
    let budget = |Member { name, key, value }: Member| {
        let device = name.parse().map_err(|e: ParseError| key.error(e))?;
        Ok((device, size(value)?))
    };
    node.members()?.into_iter().map(budget).collect()
}

fn size(node: Node) -> Result<Bytes> {
    if node.is_text() { node.spelled() } else { node.whole().map(Bytes) }
}

fn entries(node: Node) -> Result<Vec<Entry>> {
    let members = node.members()?;
    if members.is_empty() {
        return Err(node.error("the device map is empty"));
    }
    let mut place = Place::default();
    let entry = |Member { name, key, value }: Member| {
        let device = if value.is_text() {
            value.spelled()?
        } else {
            let index = value.whole()?;
            let no_index = |_| value.error(format!("{index} is no index of a GPU"));
            u32::try_from(index).map(DeviceId::Cuda).map_err(no_index)?
        };
        place = key.place_behind(place);
        Ok(Entry { path: name, device, place })
    };
    members.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests;
