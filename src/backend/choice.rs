//! How a token is chosen.

/// How a device chooses a token among the logits. Where the largest is not taken, tokens are drawn
/// by their probabilities, of those that all bounds leave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Logits are divided by this; at 0, the largest is taken.
    pub temperature: f32,
    /// Only the k likeliest tokens; at least 1.
    pub top_k: u32,
    /// Only the likeliest tokens that together reach this probability; above 0.
    pub top_p: f32,
    /// Only tokens at least this probable, as a share of the likeliest one's probability.
    pub min_p: f32,
    /// Positive logits of tokens that occurred are divided by this, negative ones multiplied.
    pub penalty: f32,
}

impl Choice {
    /// The largest logit.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: u32::MAX, top_p: 1.0, min_p: 0.0, penalty: 1.0 };

    /// Whether the largest is taken, so that no random number is looked at.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether only so many of the likeliest tokens may come.
    pub fn is_cut(&self) -> bool {
        self.top_k < u32::MAX || self.top_p < 1.0
    }

    /// Whether it matters which tokens occurred.
    pub fn is_penalized(&self) -> bool {
        #[expect(clippy::float_cmp, reason = "exactly 1 does nothing")]
        let is_one = self.penalty == 1.0;
        !is_one
    }
}
