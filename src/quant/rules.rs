//! Which module is stored in which scheme.

use std::collections::HashMap;

use indexmap::IndexMap;
use serde::{Serialize, Serializer};

use super::Scheme;
use crate::error::{Error, Result};
use crate::model_config::ModelConfig;
use crate::module_path::and_above;

/// Module paths and their schemes; the longest path that contains a module decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizeRules {
    rules: Vec<(String, Scheme)>,
    by_path: HashMap<String, Scheme>,
    /// The embedding's path is Llama's, whatever the model's own is.
    is_for_any_model: bool,
}

const EMBEDDING: &str = "model.embed_tokens";

impl QuantizeRules {
    /// The rules of one scheme for the whole model,
    /// except that `int4` and `nl4` keep the embedding and the head in `int8`.
    pub fn whole_model(scheme: Scheme) -> Self {
        let mut rules = vec![(String::new(), scheme)];
        let has_four_bits = matches!(scheme, Scheme::Int4 | Scheme::Nl4);
        if has_four_bits {
            rules.extend([EMBEDDING, "lm_head"].map(|path| (path.to_owned(), Scheme::Int8)));
        }
        Self { is_for_any_model: has_four_bits, ..Self::new(rules) }
    }

    /// Rules as a map lists them.
    pub fn new(rules: Vec<(String, Scheme)>) -> Self {
        Self { by_path: rules.iter().cloned().collect(), rules, is_for_any_model: false }
    }

    /// The fewest rules that give each of `schemes`, which are of paths none of which contains another.
    pub fn shortest(schemes: &[(&str, Scheme)]) -> Self {
        let mut root = Node::default();
        for (path, scheme) in schemes {
            let mut node = &mut root;
            for (at, _) in path.match_indices('.').chain([(path.len(), "")]) {
                node = node.children.entry(&path[..at]).or_default();
            }
            node.scheme = Some(*scheme);
        }
        root.count();
        let mut rules = vec![(String::new(), root.best())];
        root.list(root.best(), &mut rules);
        Self::new(rules)
    }

    /// The rules that the weights of a checkpoint are packed by; `None` where they are not packed.
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
        Self::new(self.rules)
    }

    /// The rules in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Scheme)> {
        self.rules.iter().map(|(path, scheme)| (path.as_str(), *scheme))
    }

    /// The scheme of the module at `path`; `none` where no rule contains it.
    pub fn scheme(&self, path: &str) -> Scheme {
        and_above(path).find_map(|path| self.by_path.get(path)).copied().unwrap_or(Scheme::None)
    }
}

/// A path, those under it, and how many rules they take.
#[derive(Default)]
struct Node<'a> {
    scheme: Option<Scheme>,
    children: IndexMap<&'a str, Node<'a>>,
    /// Rules for all under it, where the rule that holds for it names each of [`Scheme::ALL`].
    rules: [usize; Scheme::ALL.len()],
}

impl Node<'_> {
    fn count(&mut self) {
        self.children.values_mut().for_each(Self::count);
        let under = |at: usize, scheme| match self.scheme {
            Some(own) => usize::from(own != scheme),
            None => self.children.values().map(|child| child.rules[at].min(child.rules[child.best_at()] + 1)).sum(),
        };
        self.rules = std::array::from_fn(|at| under(at, Scheme::ALL[at]));
    }

    /// The position of the scheme under which the fewest rules are needed; of several, that of the fewest bits.
    fn best_at(&self) -> usize {
        (0..self.rules.len()).rev().min_by_key(|at| self.rules[*at]).unwrap_or(0)
    }

    fn best(&self) -> Scheme {
        self.scheme.unwrap_or(Scheme::ALL[self.best_at()])
    }

    /// Adds the rules for all under it, where a rule for it names `scheme`.
    fn list(&self, scheme: Scheme, rules: &mut Vec<(String, Scheme)>) {
        let at = scheme as usize;
        for (path, child) in &self.children {
            let keeps = if child.scheme.is_some() {
                child.rules[at] == 0
            } else {
                child.rules[at] <= child.rules[child.best_at()] + 1
            };
            let own = if keeps { scheme } else { child.best() };
            if !keeps {
                rules.push(((*path).to_owned(), own));
            }
            child.list(own, rules);
        }
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
    fn the_shortest_rules_give_every_scheme() {
        let schemes = |text: &'static str| -> Vec<(&str, Scheme)> {
            text.split_whitespace()
                .map(|pair| pair.split_once('=').unwrap())
                .map(|(path, scheme)| (path, scheme.parse().unwrap()))
                .collect()
        };
        for (given, wanted) in [
            ("e=int8 m.0.q=int4 m.0.k=int4 m.1.q=int4", "=int4 e=int8"),
            ("e=int4 m.0.q=int8 m.0.k=int8 m.1.q=int4 m.1.k=int4 m.1.v=int4", "=int4 m.0=int8"),
            ("m.0.q=int8 m.0.k=int8 m.0.v=none m.1.q=int4 m.1.k=int4 m.1.v=int4", "=int4 m.0=int8 m.0.v=none"),
            ("m.1.q=int8 m.10.q=int4 h=int4", "=int4 m.1.q=int8"),
            ("h=none", "=none"),
        ] {
            let rules = QuantizeRules::shortest(&schemes(given));
            let listed: Vec<_> = rules.iter().map(|(path, scheme)| format!("{path}={scheme}")).collect();
            assert_eq!(listed.join(" "), wanted, "{given}");
            for (path, scheme) in schemes(given) {
                assert_eq!(rules.scheme(path), scheme, "{given}: {path} by {listed:?}");
            }
        }
    }

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
