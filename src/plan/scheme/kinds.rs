//! Bits a weight and the measured error of each kind of module.

use indexmap::IndexMap;
use serde::Serialize;

use super::group::groups;
use super::sample::losses;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::footprint;
use crate::plan::PlanOptions;
use crate::plan::subject::Subject;
use crate::quant::{QuantizeRules, Scheme};

/// A kind of module, such as `mlp.down_proj`: all that quantizing it means.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KindReport {
    /// Its path within a block; the last name of what is in none.
    pub kind: String,
    /// How many modules have each scheme; all experts of a block are one.
    pub schemes: Vec<(Scheme, usize)>,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes of all of them, with scales and padding.
    pub weights: Bytes,
    /// Bits a weight.
    pub bits: f64,
    /// The root of the squared error over the squared weights, its mean over the modules; `None` where it was not measured.
    pub error: Option<f64>,
}

/// Every kind in the order that the first of them runs, under `rules`, measured as `options` say.
pub fn report(subject: &Subject, rules: &QuantizeRules, options: &PlanOptions) -> Result<Vec<KindReport>> {
    let groups = groups(&subject.tree, &subject.weights);
    let losses = losses(subject.checkpoint, &groups, options)?;
    let mut kinds: IndexMap<&str, KindReport> = IndexMap::new();
    for (at, group) in groups.iter().enumerate() {
        let kind = kinds.entry(&group.kind).or_insert_with(|| {
            let (kind, schemes, error) = (group.kind.clone(), Vec::new(), losses.as_ref().map(|_| 0.0));
            KindReport { kind, schemes, parameters: 0, weights: Bytes::ZERO, bits: 0.0, error }
        });
        let scheme = rules.scheme(&group.path);
        for weight in group.weights() {
            kind.parameters += (weight.parameter.rows * weight.parameter.cols) as u64;
            kind.weights += footprint::layout(weight, rules).map_or(Bytes::ZERO, |layout| layout.size());
        }
        match kind.schemes.iter_mut().find(|(known, _)| *known == scheme) {
            Some((_, count)) => *count += 1,
            None => kind.schemes.push((scheme, 1)),
        }
        // Sums of squares until all are known.
        if let (Some(sum), Some(losses)) = (&mut kind.error, &losses) {
            *sum += losses[at].of(scheme);
        }
    }
    for kind in kinds.values_mut() {
        let modules: usize = kind.schemes.iter().map(|(_, count)| count).sum();
        kind.bits = kind.weights.0 as f64 * 8.0 / kind.parameters as f64;
        kind.error = kind.error.map(|sum| (sum / modules as f64).sqrt());
        kind.schemes.sort_by_key(|(scheme, _)| *scheme);
    }
    Ok(kinds.into_values().collect())
}
