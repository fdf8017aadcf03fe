//! Where every weight stands in the arena of its device.

use std::collections::BTreeMap;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::{MAX_BYTES, aligned};
use crate::architecture::Weight;
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::quant::{MatrixLayout, QuantizeRules, Storage};

/// A parameter and its place in its device's weights arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The parameter and its tensor.
    pub weight: Weight,
    /// The device that holds it.
    pub device: DeviceId,
    /// How it is packed.
    pub layout: MatrixLayout,
    /// Offset of the matrix in the arena.
    pub offset: u64,
}

/// As a plan shows it: the tensor, and where it goes.
impl Serialize for Placed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Placed", 5)?;
        fields.serialize_field("tensor", &self.weight.parameter.tensor())?;
        fields.serialize_field("device", &self.device)?;
        fields.serialize_field("storage", self.layout.storage.name())?;
        fields.serialize_field("offset", &self.offset)?;
        fields.serialize_field("bytes", &self.bytes())?;
        fields.end()
    }
}

impl Placed {
    /// What it takes of the arena.
    pub fn bytes(&self) -> Bytes {
        aligned(self.layout.size().0)
    }
}

/// Every weight with its layout and its offset in the arena of its device;
/// `devices` has one for every module of the tree.
pub fn lay_out(weights: &[Weight], devices: &[DeviceId], rules: &QuantizeRules) -> Result<Vec<Placed>> {
    let mut ends: BTreeMap<DeviceId, u64> = BTreeMap::new();
    weights
        .iter()
        .map(|weight| {
            let device = devices[weight.module];
            let layout = layout(weight, rules).ok_or_else(|| too_large(weight))?;
            let end = ends.entry(device).or_default();
            let placed = Placed { weight: weight.clone(), device, layout, offset: *end };
            *end =
                end.checked_add(placed.bytes().0).filter(|end| *end <= MAX_BYTES).ok_or_else(|| too_large(weight))?;
            Ok(placed)
        })
        .collect()
}

/// What a weight takes of an arena under `rules`.
pub fn weight_bytes(weight: &Weight, rules: &QuantizeRules) -> Result<Bytes> {
    let bytes = layout(weight, rules).map(|layout| aligned(layout.size().0));
    bytes.filter(|bytes| bytes.0 <= MAX_BYTES).ok_or_else(|| too_large(weight))
}

/// The layout of a weight under `rules`: what is not quantizable, or packed already, is kept as it is.
pub fn layout(weight: &Weight, rules: &QuantizeRules) -> Option<MatrixLayout> {
    let parameter = &weight.parameter;
    let storage = match weight.data {
        Storage::Plain(dtype) if parameter.is_quantizable() => Storage::of(rules.scheme(&parameter.module), dtype),
        kept => kept,
    };
    MatrixLayout::new(storage, parameter.rows, parameter.cols)
}

fn too_large(weight: &Weight) -> Error {
    Error::input(format!("`{}` is too large to plan for", weight.parameter.tensor()))
}
