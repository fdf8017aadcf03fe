//! The token that comes next, out of the logits, as `choose.cu` has it: what the host chooses by, and the
//! judge of those kernels.
//!
//! A token weighs `exp((logit - the largest) / temperature)`, between 0 and 1. Weights are summed up as
//! integers, so that no order of additions shows in what is chosen.

use std::collections::BTreeSet;

use super::{Choice, Chosen};

/// Chooses tokens, and remembers which occurred.
#[derive(Clone, Debug)]
pub struct Chooser {
    choice: Choice,
    seen: BTreeSet<u32>,
}

impl Chooser {
    /// A chooser behind these tokens.
    pub fn new(choice: Choice, seen: &[u32]) -> Self {
        let seen = if choice.is_penalized() { seen.iter().copied().collect() } else { BTreeSet::new() };
        Self { choice, seen }
    }

    /// The token at which the weights up to it pass the share `uniform` / 2^32 of all; the first of the
    /// largest, where that is wanted; the first whose logit is not finite, if there is one. The logits
    /// are used up.
    ///
    /// # Panics
    /// There are no logits, or there is none for a token that occurred.
    pub fn choose(&mut self, logits: &mut [f32], uniform: u32) -> Chosen {
        for token in &self.seen {
            let logit = &mut logits[*token as usize];
            *logit = if *logit >= 0.0 { *logit / self.choice.penalty } else { *logit * self.choice.penalty };
        }
        let most = logits.iter().map(|logit| rank(*logit)).fold(0, u32::max);
        let first = logits.iter().position(|logit| rank(*logit) == most).unwrap_or_default();
        let is_finite = most < u32::MAX;
        let is_drawn = is_finite && !self.choice.is_greedy();
        let at = if is_drawn { self.draw(logits, logits[first], uniform) } else { first };
        let token = u32::try_from(at).unwrap_or_default();
        if is_finite && self.choice.is_penalized() {
            self.seen.insert(token);
        }
        Chosen { token, is_finite }
    }

    fn draw(&self, logits: &mut [f32], largest: f32, uniform: u32) -> usize {
        let per_temperature = self.choice.temperature.recip().min(f32::MAX);
        for logit in &mut *logits {
            *logit = ((*logit - largest) * per_temperature).exp();
        }
        let weights = logits;
        let (least, mut ties) = if self.choice.is_cut() { self.least(weights) } else { (0.0, 0) };
        for weight in &mut *weights {
            let is_tie = *weight <= least;
            if *weight < least.max(self.choice.min_p) || is_tie && ties == 0 {
                *weight = 0.0;
            } else if is_tie {
                ties -= 1;
            }
        }
        let units = units(weights.len());
        let total: u64 = weights.iter().map(units).sum();
        let target = (u128::from(total) * u128::from(uniform)) >> 32;
        let mut reached = 0;
        let passes = |weight| {
            reached += u128::from(units(weight));
            reached > target
        };
        weights.iter().position(passes).unwrap_or_default()
    }

    /// The least weight among the likeliest, and how many of that weight are among them: at most `top_k`,
    /// and no more than weigh the share `top_p` of all together. Weights of no unit are left out.
    fn least(&self, weights: &[f32]) -> (f32, u32) {
        let units = units(weights.len());
        let total: u64 = weights.iter().map(units).sum();
        let (mut limit, mut rank) = (total, self.choice.top_k);
        if self.choice.top_p < 1.0 {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of the total")]
            let share = (f64::from(self.choice.top_p) * total as f64).ceil() as u64;
            limit = share.min(total);
        }
        // The bits of the weight, whose order is that of weights, some at a time.
        let mut key = 0;
        for (shift, width) in [(19, 11), (8, 11), (0, 8)] {
            let mut sums = vec![(0, 0); 1 << width];
            for weight in weights {
                let (bits, units) = (weight.to_bits() >> shift, units(weight));
                if units > 0 && bits >> width == key {
                    let (sum, count) = &mut sums[bits as usize % (1 << width)];
                    (*sum, *count) = (*sum + units, *count + 1);
                }
            }
            let digit = (0..1 << width).rev().find(|digit| {
                let (sum, count) = sums[*digit as usize];
                let is_reached = sum >= limit || count >= rank;
                if !is_reached {
                    (limit, rank) = (limit - sum, rank - count);
                }
                is_reached
            });
            key = key << width | digit.unwrap_or_default();
        }
        let weight = f32::from_bits(key);
        let needed = limit.div_ceil(units(&weight));
        (weight, u32::try_from(needed).map_or(rank, |needed| needed.min(rank)))
    }
}

/// What makes a weight an integer; `count` of them sum up to less than 2^62.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a weight is from 0 to 1, and part of a unit none"
)]
fn units(count: usize) -> impl Fn(&f32) -> u64 + Copy {
    let scale = f32::from_bits((127 + 30 + (count as u32).leading_zeros()) << 23);
    move |weight| (weight * scale) as u64
}

/// The order of logits as that of integers, zeros the same; all that are not finite come last.
fn rank(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    if logit.is_finite() { if bits >> 31 == 0 { bits | 1 << 31 } else { !bits } } else { u32::MAX }
}

#[cfg(test)]
mod tests {
    use super::super::Draws;
    use super::*;

    const DRAWN: Choice = Choice { temperature: 1.0, ..Choice::GREEDY };

    /// Which tokens come out of a choice, of logits whose probabilities are 0.5, 0.3, 0.15, 0.05 at temperature 1.
    fn tokens(choice: Choice) -> Vec<u32> {
        let logits = [0.3f32.ln(), 0.5f32.ln(), 0.05f32.ln(), 0.15f32.ln()];
        let (mut chooser, mut draws) = (Chooser::new(choice, &[]), Draws::new(7));
        let mut tokens: Vec<u32> = (0..400).map(|_| chooser.choose(&mut logits.clone(), draws.draw()).token).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn cuts_leave_the_likeliest() {
        for (choice, left) in [
            (Choice::GREEDY, vec![1]),
            (DRAWN, vec![0, 1, 2, 3]),
            (Choice { top_k: 2, ..DRAWN }, vec![0, 1]),
            (Choice { top_p: 0.6, ..DRAWN }, vec![0, 1]),
            (Choice { min_p: 0.2, ..DRAWN }, vec![0, 1, 3]),
            (Choice { top_k: 3, top_p: 0.4, ..DRAWN }, vec![1]),
            (Choice { min_p: 1.0, top_k: 3, ..DRAWN }, vec![1]),
        ] {
            assert_eq!(tokens(choice), left, "{choice:?}");
        }
    }

    #[test]
    fn of_equals_the_first_are_left() {
        for (choice, left) in [
            (Choice { top_k: 7, ..DRAWN }, 7),
            (Choice { top_p: 0.5, ..DRAWN }, 50),
            (Choice { top_p: 0.501, ..DRAWN }, 51),
            (Choice { top_p: 0.5, top_k: 9, ..DRAWN }, 9),
        ] {
            let choose = |uniform| Chooser::new(choice, &[]).choose(&mut [0.5; 100], uniform).token;
            assert_eq!([choose(0), choose(1 << 31), choose(u32::MAX)], [0, left / 2, left - 1], "{choice:?}");
        }
    }

    #[test]
    fn the_first_of_the_largest() {
        for count in [1, 5, 16, 17, 40] {
            for at in 0..count {
                let mut logits = vec![-2.0; count];
                logits[at] = -1.0;
                logits[count - 1] = -1.0;
                let chosen = Chooser::new(Choice::GREEDY, &[]).choose(&mut logits, 0);
                assert_eq!((chosen.token as usize, chosen.is_finite), (at, true), "{count}");
            }
        }
        assert_eq!(Chooser::new(Choice::GREEDY, &[]).choose(&mut [-1.0, -0.0, 0.0], 0).token, 1);
    }

    #[test]
    fn a_penalty_moves_on() {
        let mut chooser = Chooser::new(Choice { penalty: 2.0, ..Choice::GREEDY }, &[3]);
        let chosen = [0; 4].map(|_| chooser.choose(&mut [1.0, 1.1, 1.2, 1.9], 0).token);
        assert_eq!(chosen, [2, 1, 0, 3]);
        let mut chooser = Chooser::new(Choice { penalty: 2.0, ..Choice::GREEDY }, &[0]);
        assert_eq!(chooser.choose(&mut [-1.0, -1.5, -3.0], 0).token, 1);
    }

    #[test]
    fn what_is_not_finite_is_told() {
        for choice in [Choice::GREEDY, DRAWN, Choice { penalty: 1.5, top_k: 2, ..DRAWN }] {
            for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let chosen = Chooser::new(choice, &[0]).choose(&mut [0.0, broken, 1.0, broken], 0);
                assert_eq!(chosen, Chosen { token: 1, is_finite: false }, "{choice:?}");
            }
        }
        let mut chooser = Chooser::new(Choice { penalty: 2.0, ..Choice::GREEDY }, &[1]);
        assert!(!chooser.choose(&mut [0.0, -2e38], 0).is_finite, "it became so");
    }
}
