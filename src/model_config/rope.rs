//! Rotary position embedding: its configuration in both dialects, and the
//! frequencies that follow from it.

use std::borrow::Cow;
use std::f64::consts::TAU;

use super::fields::Fields;
use super::{Family, MAX_CONTEXT};
use crate::error::{Result, printable};
use crate::json::Node;

const MAX_THETA: f64 = 1e12;
const MAX_FACTOR: f64 = 1e6;

/// Rotary position embedding of a kind of blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// d: leading elements of a head that are rotated, as the pairs (i, i + d/2); even.
    pub rotary_dim: usize,
    /// Factor of cosines and sines.
    pub attention_factor: f64,
    /// The angular frequency of each pair, for a sequence that is not long.
    usual: Vec<f32>,
    long: Option<Long>,
}

/// The frequencies of sequences of more than so many tokens.
#[derive(Clone, Debug, PartialEq)]
enum Long {
    /// These, whatever the length.
    Fixed(usize, Vec<f32>),
    /// Those of a base that grows with the length, by a factor.
    Growing { original: usize, theta: f64, factor: f64 },
}

impl Rope {
    /// The angular frequency of each pair, `rotary_dim / 2` of them, for the tokens that a sequence of `length` tokens
    /// ends with. Those before them were rotated by what was right for the sequence then, as in Transformers.
    pub fn frequencies(&self, length: usize) -> Cow<'_, [f32]> {
        match &self.long {
            Some(Long::Fixed(original, long)) if length > *original => long.into(),
            Some(Long::Growing { original, theta, factor }) if length > *original => {
                let (pairs, grown) =
                    (self.rotary_dim as f64, factor * length as f64 / *original as f64 - (factor - 1.0));
                frequencies(theta * grown.powf(pairs / (pairs - 2.0)), self.rotary_dim, |_, f| f).into()
            }
            _ => (&self.usual).into(),
        }
    }

    /// The shortest length that has the frequencies of `length`.
    pub fn shortest_alike(&self, length: usize) -> usize {
        match &self.long {
            Some(Long::Fixed(original, _)) if length > *original => original + 1,
            Some(Long::Growing { original, .. }) if length > *original => length,
            _ => 0,
        }
    }

    /// The length beyond which a sequence has frequencies of another list.
    pub fn border(&self) -> Option<usize> {
        match &self.long {
            Some(Long::Fixed(original, _)) => Some(*original),
            _ => None,
        }
    }

    /// The longest sequence that the frequencies are meant for, where that of the model is `longest`.
    pub fn longest(&self, longest: usize) -> usize {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive, and cut to a limit")]
        match &self.long {
            Some(Long::Growing { factor, .. }) => {
                ((longest as f64 * factor).min(MAX_CONTEXT as f64) as usize).max(longest)
            }
            _ => longest,
        }
    }
}

/// RoPE of all blocks; or, where the family has two, that of blocks with full
/// attention and that of blocks with a window. `longest` is the longest context, in tokens.
pub fn read(fields: &Fields, family: &Family, head_dim: usize, longest: usize) -> Result<Vec<Rope>> {
    let theta = fields.positive_or("rope_theta", MAX_THETA, family.rope_theta)?;
    let newer = fields.optional("rope_parameters");
    let one = |node, theta| one(fields, node, theta, family, head_dim, longest);
    let Some(local_theta) = family.local_rope_theta else {
        return Ok(vec![one(newer.or_else(|| fields.optional("rope_scaling")), theta)?]);
    };
    // What is for no kind of attention counts for nothing.
    let nested = newer.map(Fields::of).transpose()?;
    let of_kind = |kind| nested.as_ref().and_then(|nested| nested.optional(kind));
    let local_theta = fields.positive_or("rope_local_base_freq", MAX_THETA, local_theta)?;
    let full = of_kind("full_attention").or_else(|| fields.optional("rope_scaling"));
    Ok(vec![one(full, theta)?, one(of_kind("sliding_attention"), local_theta)?])
}

fn one(
    fields: &Fields,
    node: Option<Node>,
    theta: f64,
    family: &Family,
    head_dim: usize,
    longest: usize,
) -> Result<Rope> {
    let share = |fields: &Fields, outer| {
        if family.is_partly_rotated { fields.positive_or("partial_rotary_factor", 1.0, outer) } else { Ok(1.0) }
    };
    let outer_share = share(fields, 1.0)?;
    let Some(node) = node else {
        let rotary_dim = rotary_dim(fields, outer_share, head_dim)?;
        return Ok(Rope {
            rotary_dim,
            attention_factor: 1.0,
            usual: frequencies(theta, rotary_dim, |_, f| f),
            long: None,
        });
    };
    let rope = Fields::of(node)?;
    let theta = rope.positive_or("rope_theta", MAX_THETA, theta)?;
    let rotary_dim = rotary_dim(&rope, share(&rope, outer_share)?, head_dim)?;
    let kind = rope.text_or_none(["rope_type", "type"])?;
    let kind = match kind.as_deref().unwrap_or("default") {
        "su" | "yarn" if family.has_longrope => "longrope",
        kind => kind,
    };
    // Phi-3 has it beside the parameters, not among them.
    let original = match fields.optional("original_max_position_embeddings") {
        Some(_) => fields.size("original_max_position_embeddings", MAX_CONTEXT)?,
        None => rope.size_or("original_max_position_embeddings", MAX_CONTEXT, longest)?,
    };
    let stretch = longest as f64 / original as f64;
    let factor = || rope.positive_or("factor", MAX_FACTOR, stretch);
    // How pair i's frequency is scaled.
    let scaled = |by: &dyn Fn(usize, f64) -> f64| frequencies(theta, rotary_dim, by);
    let (mut attention_factor, mut long) = (1.0, None);
    let usual = match kind {
        "default" => scaled(&|_, frequency| frequency),
        "linear" => {
            let factor = rope.positive("factor", MAX_FACTOR)?;
            scaled(&|_, frequency| frequency / factor)
        }
        "dynamic" => {
            let factor = rope.positive("factor", MAX_FACTOR)?;
            if rotary_dim <= 2 {
                return Err(node.error("RoPE of type `dynamic` needs heads of more than 2 rotated elements"));
            }
            long = Some(Long::Growing { original: longest, theta, factor });
            scaled(&|_, frequency| frequency)
        }
        // Low frequencies are divided, high ones kept, those between blended.
        "llama3" => {
            let (low, high) =
                (rope.positive("low_freq_factor", MAX_FACTOR)?, rope.positive("high_freq_factor", MAX_FACTOR)?);
            if high <= low {
                return Err(rope.error(
                    "high_freq_factor",
                    format!("`high_freq_factor` {high} must be above `low_freq_factor` {low}"),
                ));
            }
            let factor = rope.positive("factor", MAX_FACTOR)?;
            scaled(&|_, frequency| {
                let turns = original as f64 * frequency / TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            })
        }
        // A divisor for each frequency, of one list up to the original context and of another beyond it.
        "longrope" => {
            let factor = factor()?;
            // Of a context of 1 there is no logarithm to divide by.
            let length = (original.max(2) as f64).ln();
            let grown = if factor > 1.0 { (1.0 + factor.ln() / length).sqrt() } else { 1.0 };
            attention_factor = rope.positive_or("attention_factor", MAX_FACTOR, grown)?;
            let divided = |key| {
                let factors = rope.positives(key, MAX_FACTOR)?;
                if factors.len() == rotary_dim / 2 {
                    Ok(scaled(&|at, frequency| frequency / factors[at]))
                } else {
                    Err(rope.error(key, format!("`{key}` has {} numbers, not {}", factors.len(), rotary_dim / 2)))
                }
            };
            let short = divided("short_factor")?;
            long = Some(Long::Fixed(original, divided("long_factor")?));
            short
        }
        // Divided but for the first few, with a ramp between.
        "yarn" => {
            let factor = factor()?;
            attention_factor = rope.positive_or("attention_factor", MAX_FACTOR, yarn_attention(&rope, factor)?)?;
            let (low, high) = yarn_ramp(&rope, theta, rotary_dim, original as f64)?;
            scaled(&|at, frequency| {
                let divided = ((at as f64 - low) / (high - low)).clamp(0.0, 1.0);
                divided * frequency / factor + (1.0 - divided) * frequency
            })
        }
        other => {
            let other = printable(other);
            return Err(node.error(format!(
                "RoPE of type `{other}` is not supported; `default`, `dynamic`, `linear`, `llama3`, `longrope` and `yarn` are"
            )));
        }
    };
    Ok(Rope { rotary_dim, attention_factor, usual, long })
}

/// The frequencies θ^(−2i/d), each as `scaled` has it.
fn frequencies(theta: f64, rotary_dim: usize, scaled: impl Fn(usize, f64) -> f64) -> Vec<f32> {
    let frequency = |at: usize| scaled(at, theta.powf(-((2 * at) as f64 / rotary_dim as f64)));
    #[expect(clippy::cast_possible_truncation, reason = "angles are f32")]
    (0..rotary_dim / 2).map(|at| frequency(at) as f32).collect()
}

fn rotary_dim(fields: &Fields, share: f64, head_dim: usize) -> Result<usize> {
    // At most the head's width, for the share is at most 1.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rounded down on purpose")]
    let rotated = (head_dim as f64 * share) as usize;
    if rotated >= 2 && rotated.is_multiple_of(2) {
        return Ok(rotated);
    }
    Err(if rotated == head_dim {
        fields.error("head_dim", format!("a head of width {rotated} cannot be rotated: it is odd"))
    } else {
        let problem = format!("{rotated} of {head_dim} elements of a head cannot be rotated in pairs");
        fields.error("partial_rotary_factor", problem)
    })
}

fn yarn_attention(rope: &Fields, factor: f64) -> Result<f64> {
    let grown = |by: f64| if factor > 1.0 { 0.1 * by * factor.ln() + 1.0 } else { 1.0 };
    Ok(match (rope.optional("mscale"), rope.optional("mscale_all_dim")) {
        (Some(_), Some(_)) => {
            grown(rope.positive("mscale", MAX_FACTOR)?) / grown(rope.positive("mscale_all_dim", MAX_FACTOR)?)
        }
        _ => grown(1.0),
    })
}

/// The indices between which YaRN goes over from frequencies that turn often in
/// the original context to those that turn seldom.
fn yarn_ramp(rope: &Fields, theta: f64, rotary_dim: usize, original: f64) -> Result<(f64, f64)> {
    let width = rotary_dim as f64;
    let index_of = |turns: f64| width * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
    let mut low = index_of(rope.positive_or("beta_fast", MAX_FACTOR, 32.0)?);
    let mut high = index_of(rope.positive_or("beta_slow", MAX_FACTOR, 1.0)?);
    if rope.truth_or("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(width - 1.0));
    // Where both are one index the ramp is a step.
    let high = if (high - low).abs() < f64::EPSILON { low + 0.001 } else { high };
    if high > low {
        Ok((low, high))
    } else {
        Err(rope.error("beta_fast", "`beta_fast` must turn more often than `beta_slow`"))
    }
}
