//! generation_config.json: how a model is to be sampled where its user does not say.

use super::fields::Fields;
use super::{GENERATION_FILE, MAX_CONTEXT, MAX_VOCABULARY};
use crate::error::Result;
use crate::json::Node;

const MAX_PENALTY: f64 = 1e6;
const MAX_TEMPERATURE: f64 = 1e6;
/// What Transformers takes where it samples and the file does not say.
const USUAL_TEMPERATURE: f64 = 1.0;
const USUAL_TOP_K: usize = 50;

/// What changes the tokens and is not done, and the value that asks for nothing.
const UNDONE: [(&str, f64); 24] = [
    ("bad_words_ids", 0.0),
    ("begin_suppress_tokens", 0.0),
    ("constraints", 0.0),
    ("dola_layers", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("exponential_decay_length_penalty", 0.0),
    ("force_words_ids", 0.0),
    ("forced_bos_token_id", -1.0),
    ("forced_eos_token_id", -1.0),
    ("guidance_scale", 1.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("sequence_bias", 0.0),
    ("stop_strings", 0.0),
    ("suppress_tokens", 0.0),
    ("top_h", 1.0),
    ("typical_p", 1.0),
    ("watermarking_config", 0.0),
];

/// What a checkpoint asks for, as far as it says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// The temperature; none where the likeliest token is taken.
    pub temperature: Option<f64>,
    /// The k likeliest tokens.
    pub top_k: Option<usize>,
    /// The likeliest tokens that together reach this probability.
    pub top_p: Option<f64>,
    /// Tokens at least this probable, as a share of the likeliest one's probability.
    pub min_p: Option<f64>,
    /// The divisor of the logits of tokens that occurred, which counts without sampling too.
    pub repetition_penalty: Option<f64>,
    /// The most tokens to generate.
    pub max_new_tokens: Option<usize>,
    /// Keys that ask for something that is not done.
    pub undone: Vec<&'static str>,
}

impl GenerationDefaults {
    pub(super) fn read(fields: &Fields) -> Result<Self> {
        let positive = |key, max| fields.optional(key).map(|_| fields.positive(key, max)).transpose();
        let max_new_tokens = fields.optional("max_new_tokens").map(|node| node.size("max_new_tokens", MAX_CONTEXT));
        let mut defaults = Self {
            repetition_penalty: positive("repetition_penalty", MAX_PENALTY)?,
            max_new_tokens: max_new_tokens.transpose()?,
            ..Self::default()
        };
        for (key, neutral) in UNDONE {
            if fields.optional(key).is_some_and(|node| asks(&node, neutral)) {
                defaults.undone.push(key);
            }
        }
        if !fields.truth_or("do_sample", false)? {
            return Ok(defaults);
        }
        let is_zero = |node: Node| node.number().is_ok_and(|number| number == 0.0);
        let temperature = if fields.optional("temperature").is_some_and(is_zero) {
            Some(0.0)
        } else {
            positive("temperature", MAX_TEMPERATURE)?
        };
        let top_k = fields.optional("top_k").map_or(Ok(USUAL_TOP_K as u64), |node| node.whole())?;
        Ok(Self {
            temperature: Some(temperature.unwrap_or(USUAL_TEMPERATURE)),
            // All tokens, as 0 says too.
            top_k: usize::try_from(top_k).ok().filter(|k| (1..MAX_VOCABULARY).contains(&(*k as u64))),
            top_p: positive("top_p", 1.0)?,
            min_p: fields.optional("min_p").map(|node| share(&node)).transpose()?,
            ..defaults
        })
    }

    /// Where it is read.
    pub const FILE: &str = GENERATION_FILE;
}

fn share(node: &Node) -> Result<f64> {
    let number = node.number()?;
    let is_share = (0.0..=1.0).contains(&number);
    if is_share { Ok(number) } else { Err(node.error(format!("`min_p` is {number:?}; it must be from 0 to 1"))) }
}

/// Whether a value asks for more than the neutral one: no empty list, and not `false`.
fn asks(node: &Node, neutral: f64) -> bool {
    match (node.number(), node.truth(), node.elements()) {
        (Ok(number), ..) => (number - neutral).abs() > 0.0,
        (_, Ok(truth), _) => truth,
        (.., Ok(elements)) => !elements.is_empty(),
        _ => true,
    }
}
