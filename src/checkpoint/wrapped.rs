//! Names of tensors with what training tools put before them.

use std::collections::BTreeMap;

use super::Tensor;
use crate::model_config::{HEAD_WEIGHT, ModelConfig};

/// What stands before a model's own names: wrappers of PyTorch and PEFT, and models that have a language model
/// as a part.
const BEFORE: [&str; 4] = ["module.", "base_model.model.", "model.language_model.", "language_model."];
/// What stands in the middle of names too.
const ANYWHERE: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

/// The catalog by the model's own names, and what stood in that of the embedding, where it was not its own.
pub fn unwrap(catalog: BTreeMap<String, Tensor>, config: &ModelConfig) -> (BTreeMap<String, Tensor>, Option<String>) {
    let mut own = config.family.embedding_weights().to_vec();
    if config.tie_word_embeddings {
        own.push(HEAD_WEIGHT.to_owned());
    }
    let is_own = |name: &str| own.iter().any(|own| own == name);
    if catalog.keys().any(|name| is_own(name)) {
        return (catalog, None);
    }
    let Some(known) = catalog.keys().find(|name| is_own(&bare(name))) else {
        return (catalog, None);
    };
    // In the middle it is one of those that may stand there.
    let inside = || ANYWHERE.into_iter().find(|wrapper| known.contains(wrapper));
    let wrapper = known.strip_suffix(&bare(known)).or_else(inside).unwrap_or(known).to_owned();
    let unwrapped: BTreeMap<_, _> = catalog.iter().map(|(name, tensor)| (bare(name), tensor.clone())).collect();
    // Two tensors that become one are not the model's.
    if unwrapped.len() == catalog.len() { (unwrapped, Some(wrapper)) } else { (catalog, None) }
}

fn bare(name: &str) -> String {
    let name = ANYWHERE.iter().fold(name.to_owned(), |name, wrapper| name.replace(wrapper, ""));
    let mut rest = &name[..];
    while let Some(inner) = BEFORE.iter().find_map(|wrapper| rest.strip_prefix(wrapper)) {
        rest = inner;
    }
    rest.to_owned()
}
