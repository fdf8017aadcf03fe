//! Weights that one scheme is chosen for.

use indexmap::IndexMap;

use crate::architecture::{ModuleTree, Role, Weight};
use crate::model_config::ModelConfig;

/// A projection of a block, all experts of a block, the embedding or the head.
pub struct Group<'a> {
    /// The path that all of its modules are, or are under.
    pub path: String,
    /// The path within a block, or the last name of what is in none: `self_attn.q_proj`, `lm_head`.
    pub kind: String,
    /// Position of its module in [`ModuleTree::modules`].
    pub module: usize,
    /// Whether that is a block.
    pub is_in_block: bool,
    /// Its matrices, those of a role together.
    pub roles: IndexMap<Role, Vec<&'a Weight>>,
}

/// A weight of the embedding or the head counts as so many of a block. In int4, the tied embedding
/// of ferris-7m adds 0.016 to the logarithm of its perplexity, and all blocks, of six times as many
/// weights, add 0.025; within the blocks, what a projection adds goes roughly with its weights.
const OUTER: f64 = 2.0;

impl Group<'_> {
    /// What an error in it counts: the number of weights that a token meets.
    pub fn importance(&self, config: &ModelConfig) -> f64 {
        let weights: f64 = self.weights().map(|w| w.parameter.rows as f64 * w.parameter.cols as f64).sum();
        let is_expert = self.roles.contains_key(&Role::ExpertGate(0));
        match (self.is_in_block, config.experts) {
            (false, _) if config.tie_word_embeddings => 2.0 * OUTER * weights,
            (false, _) => OUTER * weights,
            (true, Some(experts)) if is_expert => weights * experts.per_token as f64 / experts.count as f64,
            (true, _) => weights,
        }
    }

    /// All of its matrices.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        self.roles.values().flatten().copied()
    }
}

/// The groups of all weights that a scheme may pack, in the order they run.
pub fn groups<'a>(tree: &ModuleTree, weights: &'a [Weight]) -> Vec<Group<'a>> {
    let mut groups: Vec<Group> = Vec::new();
    for weight in weights.iter().filter(|weight| weight.parameter.is_quantizable()) {
        let module = weight.parameter.module.as_str();
        // Behind the experts' path come the number of one and the name of its projection.
        let experts = || module.rsplitn(3, '.').last().unwrap_or(module);
        let (path, role) = match weight.parameter.role {
            Role::ExpertGate(_) => (experts(), Role::ExpertGate(0)),
            Role::ExpertUp(_) => (experts(), Role::ExpertUp(0)),
            Role::ExpertDown(_) => (experts(), Role::ExpertDown(0)),
            role => (module, role),
        };
        // Those of a group follow on each other.
        if groups.last().is_none_or(|last| last.path != path) {
            let parent = &tree.modules[weight.module];
            let within = path.strip_prefix(&parent.path).and_then(|rest| rest.strip_prefix('.'));
            let kind = within.or_else(|| path.rsplit('.').next()).unwrap_or(path);
            groups.push(Group {
                path: path.to_owned(),
                kind: kind.to_owned(),
                module: weight.module,
                is_in_block: parent.is_block(),
                roles: IndexMap::new(),
            });
        }
        let Some(group) = groups.last_mut() else { unreachable!("one has just been added") };
        group.roles.entry(role).or_default().push(weight);
    }
    groups
}
