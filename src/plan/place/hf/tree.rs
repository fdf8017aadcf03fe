//! The modules of an architecture as Transformers registers them.

use std::collections::BTreeMap;

use super::{Model, Module, Tensor, join};
use crate::architecture::{ModuleKind, ModuleTree, Parameter, Part, Role};
use crate::bytes::Bytes;
use crate::model_config::{ModelConfig, Rope};
use crate::quant::{Scheme, WeightDtype};

/// Bytes of a parameter whose dtype is `dtype`, as bitsandbytes' counterpart of `scheme` stores it:
/// half a byte a weight for `load_in_4bit`, one for `load_in_8bit`, scales not counted.
fn bytes(parameter: &Parameter, dtype: WeightDtype, scheme: Scheme) -> u64 {
    let elements = (parameter.rows as u64).saturating_mul(parameter.cols as u64);
    match scheme {
        Scheme::Int4 | Scheme::Nl4 => elements.div_ceil(2),
        Scheme::Int8 => elements,
        Scheme::None => elements.saturating_mul(dtype.size() as u64),
    }
}

/// `modules` as Transformers counts them when it loads every weight as `dtype`,
/// which is config.json's, or the checkpoint's where that names none, and bitsandbytes
/// quantizes the linear layers of the blocks.
///
/// The order is that of registration: in a block attention, feed-forward layer
/// and norms; then the final norm, the frequencies of RoPE (two f32 buffers of
/// `rotary_dim / 2` for each of the model's ropes) and the head. The matrices of
/// all experts are parameters of one module and no linear layers, so that
/// bitsandbytes leaves them as they are; so are the scores of the experts.
pub fn tree_of(config: &ModelConfig, modules: &ModuleTree, dtype: WeightDtype, scheme: Scheme) -> Model {
    let mut root = Module::default();
    for module in &modules.modules {
        let is_block = module.is_block();
        descend(&mut root, &module.path).is_whole = is_block;
        let mut parameters: Vec<&Parameter> = module.parameters.iter().collect();
        parameters.sort_by_key(|parameter| parameter.role.is_norm());
        for parameter in parameters {
            let is_expert = matches!(parameter.role, Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_));
            let is_quantized = is_block && parameter.is_quantizable() && !is_expert;
            let stored = if is_quantized { scheme } else { Scheme::None };
            // An expert's module is `experts.N.up_proj`, which Transformers holds in `experts`.
            let path = parameter.module.rsplitn(if is_expert { 3 } else { 1 }, '.').last().unwrap_or_default();
            let name = if parameter.part == Part::Bias { "bias" } else { WEIGHT };
            let tensor = Tensor { name: name.to_owned(), bytes: Bytes(bytes(parameter, dtype, stored)) };
            descend(&mut root, path).parameters.push(tensor);
        }
        let buffer = |name: String, bytes: usize| Tensor { name, bytes: Bytes(bytes as u64) };
        match module.kind {
            ModuleKind::Embedding if config.family.scales_embedding => {
                descend(&mut root, &module.path).buffers = vec![buffer("embed_scale".to_owned(), dtype.size())];
            }
            ModuleKind::Positions => modules.weightless.iter().for_each(|path| {
                descend(&mut root, path);
            }),
            ModuleKind::Norm if !config.ropes.is_empty() => {
                let frequencies = config.ropes.iter().enumerate().flat_map(|(rope, Rope { rotary_dim, .. })| {
                    // Where there are two, that of full attention is the first.
                    let kind = match (config.ropes.len(), rope) {
                        (1, _) => "",
                        (_, 0) => "full_attention_",
                        _ => "sliding_attention_",
                    };
                    ["inv_freq", "original_inv_freq"]
                        .map(|name| buffer(format!("{kind}{name}"), rotary_dim / 2 * size_of::<f32>()))
                });
                descend(&mut root, &join(modules.base, "rotary_emb")).buffers = frequencies.collect();
            }
            _ => {}
        }
    }
    let mut ties = BTreeMap::new();
    if modules.tied
        && let [embedding, .., head] = modules.modules.as_slice()
    {
        for parameter in &embedding.parameters {
            let bytes = Bytes(bytes(parameter, dtype, Scheme::None));
            descend(&mut root, &head.path).parameters.push(Tensor { name: WEIGHT.to_owned(), bytes });
            ties.insert(join(&head.path, WEIGHT), parameter.tensor());
        }
    }
    Model { root, ties, is_quantized: scheme != Scheme::None }
}

/// The name of a weight in its module.
const WEIGHT: &str = "weight";

/// The module at `path` under `module`, made where it is not there yet.
fn descend<'a>(module: &'a mut Module, path: &str) -> &'a mut Module {
    path.split('.').fold(module, |module, name| module.children.entry(name.to_owned()).or_default())
}
