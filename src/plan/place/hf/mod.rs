//! The placement that Transformers 5.23 chooses for `device_map="auto"`, byte
//! for byte: the budgets of `get_max_memory` and `get_balanced_memory`, the
//! walk of `infer_auto_device_map` (`transformers/integrations/accelerate.py`)
//! and `clean_device_map` (`accelerate/utils/modeling.py`).
//!
//! It counts weights and nothing else: no KV cache, no workspace, no scales.
//! So it is here to be compared with, not to be followed. The functions are
//! pure; a [`Model`] is any tree of named modules, and [`tree_of`] makes it of
//! the modules of an architecture.

mod budget;
mod flat;
mod infer;
mod tree;

use std::collections::BTreeMap;

use indexmap::IndexMap;

use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::device_map::MaxMemory;
use crate::error::Result;
use crate::module_path::and_above;
use crate::plan::Strategy;

pub use budget::budgets;
pub use infer::{clean_device_map, infer_auto_device_map};
pub use tree::tree_of;

/// A parameter or a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in its module, for example `weight`.
    pub name: String,
    /// Its bytes as Transformers and bitsandbytes count them.
    pub bytes: Bytes,
}

/// A module as PyTorch registers it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// Whether its class is in `_no_split_modules`, so that it goes to one device whole.
    pub is_whole: bool,
    /// Its own parameters.
    pub parameters: Vec<Tensor>,
    /// Its own buffers, persistent or not.
    pub buffers: Vec<Tensor>,
    /// Its children and their names, in the order they are registered. A name has no dot.
    pub children: IndexMap<String, Module>,
}

/// A model to place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// The whole model.
    pub root: Module,
    /// Parameters that are another one: path to path, `lm_head.weight` to
    /// `model.embed_tokens.weight`. They stand in the tree too and take no bytes there.
    pub ties: BTreeMap<String, String>,
    /// Whether bitsandbytes quantizes it, for which a tenth of every budget is kept free.
    pub is_quantized: bool,
}

/// Where Transformers puts what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The map as `hf_device_map` shows it; a key is a path, the empty one the whole model.
    pub device_map: BTreeMap<String, DeviceId>,
    /// Bytes that are put on each device that is used.
    pub planned: BTreeMap<DeviceId, Bytes>,
}

impl Placement {
    /// The device of the module at `path`: that of the longest key that contains it.
    pub fn device_of(&self, path: &str) -> Option<DeviceId> {
        and_above(path).find_map(|path| self.device_map.get(path)).copied()
    }
}

/// What `from_pretrained(device_map=strategy, max_memory=max_memory)` chooses where
/// `free` bytes are free: those of every GPU as `mem_get_info` gives them, and
/// those of the host.
pub fn place(model: &Model, free: &MaxMemory, max_memory: Option<&MaxMemory>, strategy: Strategy) -> Result<Placement> {
    infer_auto_device_map(model, &budgets(model, free, max_memory, strategy)?)
}

/// The path of `name` in the module at `path`.
fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

#[cfg(test)]
mod tests;
