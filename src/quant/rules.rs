//! Which module is stored in which scheme.

use serde::{Serialize, Serializer};

use super::Scheme;
use crate::error::{Error, Result};
use crate::model_config::ModelConfig;
use crate::module_path::longest_prefix;

/// Module paths and their schemes; the longest path that contains a module decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizeRules {
    rules: Vec<(String, Scheme)>,
    /// The embedding's path is Llama's, whatever the model's own is.
    is_for_any_model: bool,
}

const EMBEDDING: &str = "model.embed_tokens";

impl QuantizeRules {
    /// The rules that `--quantize` gives: one scheme for the whole model,
    /// except that `int4` and `nl4` keep the embedding and the head in `int8`.
    pub fn whole_model(scheme: Scheme) -> Self {
        let mut rules = vec![(String::new(), scheme)];
        let has_four_bits = matches!(scheme, Scheme::Int4 | Scheme::Nl4);
        if has_four_bits {
            rules.extend([EMBEDDING, "lm_head"].map(|path| (path.to_owned(), Scheme::Int8)));
        }
        Self { rules, is_for_any_model: has_four_bits }
    }

    /// Rules as a map lists them.
    pub fn new(rules: Vec<(String, Scheme)>) -> Self {
        Self { rules, is_for_any_model: false }
    }

    /// The rules that the weights of a checkpoint are packed by; `None` where they are not packed.
    ///
    /// # Errors
    /// config.json names a scheme that is not known.
    pub fn of_checkpoint(config: &ModelConfig) -> Result<Option<Self>> {
        let rule = |(path, scheme): &(String, String)| match scheme.parse() {
            Ok(scheme) => Ok((path.clone(), scheme)),
            Err(error) => Err(Error::input("config.json has a `quantization_config` of another kind").caused_by(error)),
        };
        config.packed.as_ref().map(|rules| Ok(Self::new(rules.iter().map(rule).collect::<Result<_>>()?))).transpose()
    }

    /// The rules for a model whose embedding is at `path`: those of
    /// [`QuantizeRules::whole_model`] mean it, those of a map are meant as they are.
    #[must_use]
    pub fn for_embedding(mut self, path: &str) -> Self {
        if self.is_for_any_model
            && let Some((rule, _)) = self.rules.iter_mut().find(|(rule, _)| rule == EMBEDDING)
        {
            path.clone_into(rule);
        }
        Self { is_for_any_model: false, ..self }
    }

    /// The rules in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Scheme)> {
        self.rules.iter().map(|(path, scheme)| (path.as_str(), *scheme))
    }

    /// The scheme of the module at `path`; `none` where no rule contains it.
    pub fn scheme(&self, path: &str) -> Scheme {
        let rules = self.rules.iter().map(|(rule, _)| rule.as_str());
        longest_prefix(rules, path).map_or(Scheme::None, |at| self.rules[at].1)
    }
}

impl Serialize for QuantizeRules {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_rule_decides() {
        let rules = QuantizeRules::whole_model(Scheme::Int4);
        assert_eq!(rules.scheme("model.layers.3.mlp.up_proj"), Scheme::Int4);
        assert_eq!(rules.scheme("model.embed_tokens"), Scheme::Int8);
        assert_eq!(rules.scheme("lm_head"), Scheme::Int8);
        assert_eq!(rules.for_embedding("transformer.wte").scheme("transformer.wte"), Scheme::Int8);
        assert_eq!(
            QuantizeRules::new(vec![("model.layers.1".into(), Scheme::Int8)]).scheme("model.layers.10"),
            Scheme::None
        );
    }
}
