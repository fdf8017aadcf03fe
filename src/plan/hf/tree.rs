//! The modules of an architecture as Transformers registers them.

use std::collections::BTreeMap;

use super::{Model, Module, Tensor, join};
use crate::architecture::{ModuleKind, ModuleTree, Parameter};
use crate::bytes::Bytes;
use crate::model_config::ModelConfig;
use crate::quant::WeightDtype;

/// What bitsandbytes makes of the linear layers of the blocks. The embedding,
/// the head, norms and biases keep their dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// `load_in_4bit`: half a byte a weight, scales not counted.
    FourBit,
    /// `load_in_8bit`: one byte a weight, scales not counted.
    EightBit,
    /// Nothing.
    None,
}

impl Quantization {
    /// Bytes of a parameter whose dtype is `dtype`.
    fn bytes(self, parameter: &Parameter, dtype: WeightDtype) -> u64 {
        let elements = (parameter.rows as u64).saturating_mul(parameter.cols as u64);
        match self {
            Self::FourBit => elements.div_ceil(2),
            Self::EightBit => elements,
            Self::None => elements.saturating_mul(dtype.size() as u64),
        }
    }
}

/// `modules` as Transformers counts them when it loads every weight as `dtype`,
/// which is config.json's, or the checkpoint's where that names none.
///
/// The order is that of registration: in a block attention, feed-forward layer
/// and norms; then the final norm, the frequencies of RoPE (two buffers of
/// `head_dim / 2` f32) and the head.
pub fn tree_of(config: &ModelConfig, modules: &ModuleTree, dtype: WeightDtype, quantization: Quantization) -> Model {
    let mut root = Module::default();
    for module in &modules.modules {
        let is_block = matches!(module.kind, ModuleKind::Block(_));
        descend(&mut root, &module.path).is_whole = is_block;
        let mut parameters: Vec<&Parameter> = module.parameters.iter().collect();
        parameters.sort_by_key(|parameter| !parameter.is_quantizable());
        for parameter in parameters {
            let is_quantized = is_block && parameter.is_quantizable();
            let stored = if is_quantized { quantization } else { Quantization::None };
            descend(&mut root, &parameter.module).parameters.push(weight(stored.bytes(parameter, dtype)));
        }
        if module.kind == ModuleKind::Norm {
            let parent = module.path.rsplit_once('.').map_or("", |(parent, _)| parent);
            let frequencies = |name: &str| Tensor {
                name: name.to_owned(),
                bytes: Bytes((config.head_dim / 2 * size_of::<f32>()) as u64),
            };
            descend(&mut root, &join(parent, "rotary_emb")).buffers =
                ["inv_freq", "original_inv_freq"].map(frequencies).into();
        }
    }
    let mut ties = BTreeMap::new();
    if modules.tied
        && let [embedding, .., head] = modules.modules.as_slice()
    {
        for parameter in &embedding.parameters {
            let copy = weight(Quantization::None.bytes(parameter, dtype));
            descend(&mut root, &head.path).parameters.push(copy);
            ties.insert(join(&head.path, WEIGHT), parameter.tensor());
        }
    }
    Model { root, ties, is_quantized: quantization != Quantization::None }
}

/// The name of every parameter in its module.
const WEIGHT: &str = "weight";

fn weight(bytes: u64) -> Tensor {
    Tensor { name: WEIGHT.to_owned(), bytes: Bytes(bytes) }
}

/// The module at `path` under `module`, made where it is not there yet.
fn descend<'a>(module: &'a mut Module, path: &str) -> &'a mut Module {
    path.split('.').fold(module, |module, name| {
        let at = module.children.iter().position(|(child, _)| child == name).unwrap_or_else(|| {
            module.children.push((name.to_owned(), Module::default()));
            module.children.len() - 1
        });
        &mut module.children[at].1
    })
}
