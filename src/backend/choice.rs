//! How a token is chosen, and the random numbers for it.

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

/// Random numbers, the same for the same seed: SplitMix64.
#[derive(Clone, Debug)]
pub struct Draws(u64);

impl Draws {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one: each u32 is as likely as any other.
    pub fn draw(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_splitmix64() {
        // The reference implementation's first outputs for the seed 1234567, without their lower halves.
        let mut draws = Draws::new(1_234_567);
        let expected = [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        for number in expected {
            assert_eq!(u64::from(draws.draw()), number >> 32);
        }
    }
}
