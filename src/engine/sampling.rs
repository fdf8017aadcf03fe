//! How a token is chosen, as users say it.

use std::ops::RangeInclusive;

use crate::backend::Choice;
use crate::error::{Error, Result};
use crate::model_config::{GenerationDefaults, ModelConfig};

/// How a token is chosen: the logits are penalized, divided by the temperature and made
/// probabilities, and of the tokens that `min_p`, `top_k` and `top_p` all leave, one is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the k likeliest tokens.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability.
    pub top_p: Option<f64>,
    /// Only tokens at least this probable, as a share of the likeliest one's probability.
    pub min_p: Option<f64>,
    /// Positive logits of tokens that occurred are divided by this, negative ones multiplied; 1 does nothing.
    pub repetition_penalty: f32,
    /// The same seed gives the same text on the same devices.
    pub seed: u64,
}

/// Beyond these, a penalty alone can make a finite logit infinite.
const PENALTIES: RangeInclusive<f32> = 1e-6..=1e6;

impl Default for Sampling {
    fn default() -> Self {
        Self::greedy()
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0, seed: 0 }
    }

    /// As a model's generation_config.json asks for; greedy where it does not.
    pub fn of_model(config: &ModelConfig) -> Self {
        let GenerationDefaults { temperature, top_k, top_p, min_p, repetition_penalty, .. } = config.generation;
        #[expect(clippy::cast_possible_truncation, reason = "divides logits, which are f32")]
        let repetition_penalty = repetition_penalty.unwrap_or(1.0) as f32;
        Self { temperature: temperature.unwrap_or(0.0), top_k, top_p, min_p, repetition_penalty, seed: 0 }
    }

    /// Fails where a number is out of its range, or is not in it as the f32 that a device is told.
    pub fn check(&self) -> Result<()> {
        let share = |share: f64| (0.0..=1.0).contains(&share);
        let Choice { temperature, top_p, .. } = self.choice();
        let wrong = if self.temperature < 0.0 || self.temperature.is_nan() {
            format!("a temperature of {} is not 0 or more", self.temperature)
        } else if self.temperature > 0.0 && self.top_k != Some(1) && !temperature.is_normal() {
            format!("a temperature of {:e} is too small or too large to divide by", self.temperature)
        } else if self.top_k == Some(0) {
            "a top-k of 0 leaves no token".to_owned()
        } else if let Some(p) = self.top_p.filter(|p| !share(*p) || top_p == 0.0) {
            format!("a top-p of {p:e} is not above 0 and at most 1")
        } else if let Some(p) = self.min_p.filter(|p| !share(*p)) {
            format!("a min-p of {p} is not from 0 to 1")
        } else if !PENALTIES.contains(&self.repetition_penalty) {
            let (penalty, least, most) = (self.repetition_penalty, PENALTIES.start(), PENALTIES.end());
            format!("a repetition penalty of {penalty:e} is not from {least:e} to {most:e}")
        } else {
            return Ok(());
        };
        Err(Error::usage(wrong))
    }

    /// As a device is told, or the host.
    #[expect(clippy::cast_possible_truncation, reason = "probabilities are f32")]
    pub fn choice(&self) -> Choice {
        Choice {
            // The likeliest alone.
            temperature: if self.top_k == Some(1) { 0.0 } else { self.temperature as f32 },
            top_k: self.top_k.map_or(u32::MAX, |k| u32::try_from(k).unwrap_or(u32::MAX)),
            top_p: self.top_p.unwrap_or(1.0) as f32,
            min_p: self.min_p.unwrap_or(0.0) as f32,
            penalty: self.repetition_penalty,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_are_usage_errors() {
        let greedy = Sampling::greedy;
        for sampling in [
            Sampling { temperature: f64::NAN, ..greedy() },
            Sampling { temperature: -1.0, ..greedy() },
            Sampling { top_k: Some(0), ..greedy() },
            Sampling { top_p: Some(0.0), ..greedy() },
            Sampling { top_p: Some(1.5), ..greedy() },
            Sampling { min_p: Some(-0.1), ..greedy() },
            Sampling { repetition_penalty: 0.0, ..greedy() },
            Sampling { repetition_penalty: 1e-45, ..greedy() },
            Sampling { repetition_penalty: 1e38, ..greedy() },
            Sampling { repetition_penalty: f32::NAN, ..greedy() },
            Sampling { temperature: 1e-320, ..greedy() },
            Sampling { temperature: 1e-40, ..greedy() },
            Sampling { temperature: 1e39, ..greedy() },
            Sampling { temperature: f64::INFINITY, ..greedy() },
            Sampling { top_p: Some(1e-320), ..greedy() },
            Sampling { top_p: Some(f64::NAN), ..greedy() },
        ] {
            assert_eq!(sampling.check().unwrap_err().kind(), crate::ErrorKind::Usage, "{sampling:?}");
        }
    }
}
