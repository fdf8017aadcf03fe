//! Which module is stored in which scheme.

use serde::{Serialize, Serializer};

use super::Scheme;
use crate::module_path::longest_prefix;

/// Module paths and their schemes; the longest path that contains a module decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizeRules(Vec<(String, Scheme)>);

impl QuantizeRules {
    /// The rules that `--quantize` gives: one scheme for the whole model,
    /// except that `int4` keeps the embedding and the head in `int8`.
    pub fn whole_model(scheme: Scheme) -> Self {
        let mut rules = vec![(String::new(), scheme)];
        if scheme == Scheme::Int4 {
            rules.extend(["model.embed_tokens", "lm_head"].map(|path| (path.to_owned(), Scheme::Int8)));
        }
        Self(rules)
    }

    /// Rules as a map lists them.
    pub fn new(rules: Vec<(String, Scheme)>) -> Self {
        Self(rules)
    }

    /// The rules in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Scheme)> {
        self.0.iter().map(|(path, scheme)| (path.as_str(), *scheme))
    }

    /// The scheme of the module at `path`; `none` where no rule contains it.
    pub fn scheme(&self, path: &str) -> Scheme {
        longest_prefix(self.0.iter().map(|(rule, _)| rule.as_str()), path).map_or(Scheme::None, |at| self.0[at].1)
    }
}

impl Serialize for QuantizeRules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
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
        assert_eq!(
            QuantizeRules::new(vec![("model.layers.1".into(), Scheme::Int8)]).scheme("model.layers.10"),
            Scheme::None
        );
    }
}
