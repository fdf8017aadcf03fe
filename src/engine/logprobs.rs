//! How likely tokens were.

/// How likely a token was, before penalties, temperature and cuts.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens and theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// The log probabilities of all tokens.
pub struct Distribution {
    logits: Vec<f32>,
    /// The logarithm of the sum of all that they are exponents of.
    total: f64,
}

impl Distribution {
    /// Those of `logits`.
    pub fn new(logits: &[f32]) -> Self {
        let largest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
        Self { logits: logits.to_vec(), total: largest + sum.ln() }
    }

    /// Of a token, beside the `count` likeliest; of equals the first.
    pub fn of(&self, token: u32, count: usize) -> Logprobs {
        #[expect(clippy::cast_possible_truncation, reason = "as logits are")]
        let of = |token: u32| (f64::from(self.logits[token as usize]) - self.total) as f32;
        let order = |a: &u32, b: &u32| self.logits[*b as usize].total_cmp(&self.logits[*a as usize]).then(a.cmp(b));
        let mut tokens: Vec<u32> = (0..).zip(&self.logits).map(|(token, _)| token).collect();
        let count = count.min(tokens.len());
        if count < tokens.len() && count > 0 {
            tokens.select_nth_unstable_by(count - 1, order);
        }
        tokens.truncate(count);
        tokens.sort_unstable_by(order);
        Logprobs { logprob: of(token), top: tokens.into_iter().map(|token| (token, of(token))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_a_softmax() {
        let distribution = Distribution::new(&[1f32.ln(), 4f32.ln(), 3f32.ln(), 4f32.ln()]);
        let told = distribution.of(2, 3);
        assert!((told.logprob - 0.25f32.ln()).abs() < 1e-6, "{told:?}");
        let tokens: Vec<u32> = told.top.iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, [1, 3, 2]);
        assert!((told.top[0].1 - (1f32 / 3.0).ln()).abs() < 1e-6, "{told:?}");
        assert_eq!(distribution.of(0, 0).top, []);
        assert_eq!(distribution.of(0, 9).top.len(), 4);
    }
}
