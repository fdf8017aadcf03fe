//! From logits to a token.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Method};
use candle_transformers::utils::apply_repeat_penalty;

use crate::backend::Choice;
use crate::error::{Error, Result};

/// How a token is chosen: the logits are penalized, divided by the
/// temperature, made probabilities, and cut by `min_p`, `top_k` and `top_p`.
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

    /// Fails where a number is out of its range.
    pub fn check(&self) -> Result<()> {
        let share = |share: f64| (0.0..=1.0).contains(&share);
        let wrong = if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            format!("a temperature of {} is not 0 or more", self.temperature)
        } else if self.top_k == Some(0) {
            "a top-k of 0 leaves no token".to_owned()
        } else if let Some(p) = self.top_p.filter(|p| !share(*p) || *p == 0.0) {
            format!("a top-p of {p} is not above 0 and at most 1")
        } else if let Some(p) = self.min_p.filter(|p| !share(*p)) {
            format!("a min-p of {p} is not from 0 to 1")
        } else if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            format!("a repetition penalty of {} is not above 0", self.repetition_penalty)
        } else {
            return Ok(());
        };
        Err(Error::usage(wrong))
    }

    /// As a device is told that chooses by itself.
    #[expect(clippy::cast_possible_truncation, reason = "probabilities are f32")]
    pub(super) fn choice(&self) -> Choice {
        Choice {
            // The likeliest alone.
            temperature: if self.top_k == Some(1) { 0.0 } else { self.temperature as f32 },
            top_k: self.top_k.map_or(u32::MAX, |k| u32::try_from(k).unwrap_or(u32::MAX)),
            top_p: self.top_p.unwrap_or(1.0) as f32,
            min_p: self.min_p.unwrap_or(0.0) as f32,
            penalty: self.repetition_penalty,
        }
    }

    fn method(&self) -> Method {
        let temperature = self.temperature;
        if temperature == 0.0 {
            return Method::ArgMax;
        }
        match (self.top_k, self.top_p) {
            (None, None) => Method::All { temperature },
            (Some(k), None) => Method::TopK { k, temperature },
            (None, Some(p)) => Method::TopP { p, temperature },
            (Some(k), Some(p)) => Method::TopKThenTopP { k, p, temperature },
        }
    }
}

/// Chooses tokens, and remembers those that were chosen.
pub struct Sampler {
    sampling: Sampling,
    processor: LogitsProcessor,
    seen: Vec<u32>,
}

impl Sampler {
    /// A sampler that has seen `prompt`.
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let processor = LogitsProcessor::from_sampling(sampling.seed, sampling.method());
        Self { sampling, processor, seen: prompt.to_vec() }
    }

    /// Whether the token with the largest logit is all that it looks at.
    fn wants_best(&self) -> bool {
        #[expect(clippy::float_cmp, reason = "exactly 1 is the default, which does nothing")]
        let is_plain = self.sampling.repetition_penalty == 1.0;
        self.sampling.temperature == 0.0 && is_plain
    }

    /// The next token.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if self.wants_best() {
            return Ok(largest(logits));
        }
        self.choose(logits).map_err(|e| Error::input("no token can be sampled").caused_by(e))
    }

    /// Remembers a token that was chosen.
    pub fn saw(&mut self, token: u32) {
        self.seen.push(token);
    }

    fn choose(&mut self, logits: &[f32]) -> candle_core::Result<u32> {
        let mut logits = Tensor::from_slice(logits, logits.len(), &Device::Cpu)?;
        #[expect(clippy::float_cmp, reason = "exactly 1 is the default, which does nothing")]
        if self.sampling.repetition_penalty != 1.0 {
            logits = apply_repeat_penalty(&logits, self.sampling.repetition_penalty, &self.seen)?;
        }
        let min_p = self.sampling.min_p;
        self.processor.sample_f(&logits, |probabilities| {
            if let Some(min_p) = min_p {
                #[expect(clippy::cast_possible_truncation, reason = "probabilities are f32")]
                let least = probabilities.iter().fold(0.0f32, |max, p| max.max(*p)) * min_p as f32;
                probabilities.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
            }
        })
    }
}

/// The first token with the largest logit.
fn largest(logits: &[f32]) -> u32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    // Lanes side by side, and the position afterwards, are many times faster than one by one.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = logits.as_chunks::<16>();
    for logits in whole {
        for (lane, logit) in lanes.iter_mut().zip(logits) {
            *lane = larger(*lane, *logit);
        }
    }
    let largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    let at = logits.iter().position(|logit| *logit >= largest).unwrap_or_default();
    u32::try_from(at).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which tokens come out of `sampling`, of logits whose probabilities are 0.5, 0.3, 0.15, 0.05 at temperature 1.
    fn tokens(sampling: Sampling) -> Vec<u32> {
        let logits = [0.3f32.ln(), 0.5f32.ln(), 0.05f32.ln(), 0.15f32.ln()];
        let mut sampler = Sampler::new(sampling, &[]);
        let mut tokens: Vec<u32> = (0..400).map(|_| sampler.sample(&logits).unwrap()).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn cuts_leave_the_likeliest() {
        let base = Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy() };
        for (sampling, left) in [
            (Sampling::greedy(), vec![1]),
            (base.clone(), vec![0, 1, 2, 3]),
            (Sampling { top_k: Some(2), ..base.clone() }, vec![0, 1]),
            (Sampling { top_p: Some(0.6), ..base.clone() }, vec![0, 1]),
            (Sampling { min_p: Some(0.2), ..base.clone() }, vec![0, 1, 3]),
            (Sampling { top_k: Some(3), top_p: Some(0.4), ..base.clone() }, vec![1]),
            (Sampling { min_p: Some(1.0), top_k: Some(3), ..base }, vec![1]),
        ] {
            assert_eq!(tokens(sampling.clone()), left, "{sampling:?}");
        }
    }

    #[test]
    fn the_first_of_the_largest() {
        for count in [1, 5, 16, 17, 40] {
            for at in 0..count {
                let mut logits = vec![-2.0; count];
                logits[at] = -1.0;
                logits[count - 1] = -1.0;
                assert_eq!(largest(&logits) as usize, at, "{count}");
            }
        }
    }

    #[test]
    fn a_seed_repeats_itself() {
        let run = |seed| {
            let sampling = Sampling { temperature: 1.0, seed, ..Sampling::greedy() };
            let mut sampler = Sampler::new(sampling, &[]);
            (0..50).map(|_| sampler.sample(&[0.0; 100]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn a_penalty_moves_on() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        let mut sampler = Sampler::new(sampling, &[3]);
        let mut choose = |_| {
            let token = sampler.sample(&[1.0, 1.1, 1.2, 1.9]).unwrap();
            sampler.saw(token);
            token
        };
        let chosen: Vec<u32> = (0..4).map(&mut choose).collect();
        assert_eq!(chosen, [2, 1, 0, 3]);
    }

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
        ] {
            assert_eq!(sampling.check().unwrap_err().kind(), crate::ErrorKind::Usage, "{sampling:?}");
        }
    }
}
