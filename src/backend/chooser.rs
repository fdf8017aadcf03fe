//! The token that comes next, out of the logits, as `choose.cu` has it: what the host chooses by, and the
//! judge of those kernels.
//!
//! A token weighs `exp((logit - the largest) / temperature)`, between 0 and 1. Weights are summed up as
//! integers, so that no order of additions shows in what is chosen.

use std::collections::BTreeSet;

use super::cpu::exp;
use super::{Choice, Chosen};
use crate::simd::{Isa, vectorized};

/// Chooses tokens, and remembers which occurred.
#[derive(Clone, Debug)]
pub struct Chooser {
    choice: Choice,
    seen: BTreeSet<u32>,
    isa: Isa,
}

impl Chooser {
    /// A chooser behind these tokens.
    pub fn new(choice: Choice, seen: &[u32]) -> Self {
        let seen = if choice.is_penalized() { seen.iter().copied().collect() } else { BTreeSet::new() };
        Self { choice, seen, isa: Isa::best() }
    }

    /// Lowers the logits of tokens that occurred, where that is wanted.
    ///
    /// # Panics
    /// There is none for a token that occurred.
    pub fn penalize(&self, logits: &mut [f32]) {
        for token in &self.seen {
            let logit = &mut logits[*token as usize];
            *logit = if *logit >= 0.0 { *logit / self.choice.penalty } else { *logit * self.choice.penalty };
        }
    }

    /// Takes note of a token that occurred.
    pub fn see(&mut self, token: u32) {
        if self.choice.is_penalized() {
            self.seen.insert(token);
        }
    }

    /// Lowers the logits of tokens that occurred, picks one, and takes note of it.
    ///
    /// # Panics
    /// There are no logits, or there is none for a token that occurred.
    pub fn choose(&mut self, logits: &mut [f32], uniform: u32) -> Chosen {
        self.penalize(logits);
        let chosen = self.pick(logits, uniform);
        if chosen.is_finite {
            self.see(chosen.token);
        }
        chosen
    }

    /// The token at which the weights up to it pass the share `uniform` / 2^32 of all; the first of the
    /// largest, where that is wanted; the first whose logit is not finite, if there is one. The logits
    /// are used up.
    ///
    /// # Panics
    /// There are no logits.
    pub fn pick(&self, logits: &mut [f32], uniform: u32) -> Chosen {
        let (mut most, mut piece) = (0, 0);
        for (at, logits) in logits.chunks(PIECE).enumerate() {
            let here = logits.iter().map(|logit| rank(*logit)).fold(0, u32::max);
            if here > most {
                (most, piece) = (here, at * PIECE);
            }
        }
        let first = piece + logits[piece..].iter().position(|logit| rank(*logit) == most).unwrap_or_default();
        let is_finite = most < u32::MAX;
        let is_drawn = is_finite && !self.choice.is_greedy();
        let at = if is_drawn { self.draw(logits, logits[first], uniform) } else { first };
        Chosen { token: u32::try_from(at).unwrap_or_default(), is_finite }
    }

    fn draw(&self, logits: &mut [f32], largest: f32, uniform: u32) -> usize {
        let per_temperature = self.choice.temperature.recip().min(f32::MAX);
        let units = Units::of(logits.len());
        weigh(self.isa, logits, largest, per_temperature);
        let weights = logits;
        let mut bound = self.choice.min_p;
        if self.choice.is_cut() {
            let (least, ties, there) = self.least(weights, units);
            if ties < there {
                #[expect(clippy::float_cmp, reason = "exactly as much is a tie")]
                let is_tie = |weight: &&mut f32| **weight == least;
                weights.iter_mut().filter(is_tie).skip(ties as usize).for_each(|weight| *weight = 0.0);
            }
            bound = bound.max(least);
        }
        let (total, _) = above(self.isa, weights, bound, units);
        let target = (u128::from(total) * u128::from(uniform)) >> 32;
        let mut reached = 0;
        for (at, piece) in weights.chunks(PIECE).enumerate() {
            let end = reached + u128::from(above(self.isa, piece, bound, units).0);
            if end > target {
                let passes = |weight: &f32| {
                    reached += if *weight < bound { 0 } else { u128::from(units.of_weight(*weight)) };
                    reached > target
                };
                return at * PIECE + piece.iter().position(passes).unwrap_or_default();
            }
            reached = end;
        }
        0
    }

    /// What the likeliest may weigh of a `total` together.
    fn share(&self, total: u64) -> u64 {
        if self.choice.top_p >= 1.0 {
            return total;
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of the total")]
        let share = (f64::from(self.choice.top_p) * total as f64).ceil() as u64;
        share.min(total)
    }

    /// The least weight among the likeliest, how many of that weight are among them, and how many there are: at
    /// most `top_k`, and no more than weigh the share `top_p` of all together. Weights of no unit are left out.
    fn least(&self, weights: &[f32], units: Units) -> (f32, u32, u32) {
        let (total, _) = above(self.isa, weights, 0.0, units);
        let (mut limit, mut rank) = (self.share(total), self.choice.top_k);
        // Mostly they are few, and only those above a bound are looked at one by one.
        let is_enough = |bound: &f32| {
            let (sum, count) = above(self.isa, weights, *bound, units);
            sum >= limit || count >= rank
        };
        let bound = BOUNDS.into_iter().find(is_enough).unwrap_or_default();
        let mut likely = Vec::new();
        gather(self.isa, weights, bound, &mut likely);
        // The bits of the weight, whose order is that of weights, some at a time.
        let (mut key, mut there) = (0, 0);
        for (shift, width) in [(19, 11), (8, 11), (0, 8)] {
            let mut sums = vec![(0, 0); 1 << width];
            for weight in &likely {
                let bits = weight.to_bits() >> shift;
                if bits >> width == key {
                    let units = units.of_weight(*weight);
                    let (sum, count) = &mut sums[bits as usize % (1 << width)];
                    (*sum, *count) = (*sum + units, *count + u32::from(units > 0));
                }
            }
            let digit = (0..1 << width).rev().find(|digit| {
                let (sum, count) = sums[*digit as usize];
                let is_reached = sum >= limit || count >= rank;
                if is_reached {
                    there = count;
                } else {
                    (limit, rank) = (limit - sum, rank - count);
                }
                is_reached
            });
            key = key << width | digit.unwrap_or_default();
        }
        let weight = f32::from_bits(key);
        let needed = limit.div_ceil(units.of_weight(weight));
        (weight, u32::try_from(needed).map_or(rank, |needed| needed.min(rank)), there)
    }
}

/// Weights above which the likeliest are looked for, one after the other.
const BOUNDS: [f32; 4] = [0.1, 0.01, 0.001, 0.000_01];
/// Weights that are passed over together.
const PIECE: usize = 4096;

/// What makes weights from 0 to 1 integers.
#[derive(Clone, Copy)]
struct Units {
    /// What the mantissa, brought to bit 61, is shifted by, together with the exponent.
    shift: u32,
}

impl Units {
    /// A weight of 1 has 2^(30 + leading zeros of their number) units, so that `count` of them sum up to less than 2^62.
    fn of(count: usize) -> Self {
        Self { shift: 158 - u32::try_from(count).map_or(0, u32::leading_zeros) }
    }

    /// Whole units of a weight; part of one is none.
    #[inline(always)]
    fn of_weight(self, weight: f32) -> u64 {
        let (mantissa, exponent) = (weight.to_bits() & 0x7f_ffff | 0x80_0000, weight.to_bits() >> 23);
        (u64::from(mantissa) << 38) >> self.shift.saturating_sub(exponent).min(63)
    }
}

vectorized! {
    /// Makes weights of logits.
    fn weigh(logits: &mut [f32], largest: f32, per_temperature: f32) {
        for logit in logits {
            *logit = exp((*logit - largest) * per_temperature);
        }
    }

    /// Appends the weights that are at least `bound` to others.
    fn gather(weights: &[f32], bound: f32, likely: &mut Vec<f32>) {
        // Mostly there is none among so many.
        for weights in weights.chunks(32) {
            if weights.iter().fold(0.0, |most, weight| if *weight > most { *weight } else { most }) >= bound {
                likely.extend(weights.iter().filter(|weight| **weight >= bound));
            }
        }
    }

    /// The units of the weights that are at least `bound`, and how many weights those are.
    fn above(weights: &[f32], bound: f32, units: Units) -> (u64, u32) {
        let (mut sum, mut count) = (0u64, 0u32);
        for weight in weights {
            let counts = *weight >= bound;
            let units = units.of_weight(*weight);
            // They do not wrap, and are not asked whether they do.
            sum = sum.wrapping_add(if counts { units } else { 0 });
            count = count.wrapping_add(u32::from(counts));
        }
        (sum, count)
    }
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

    /// As it is defined: by sorting.
    #[expect(clippy::cast_sign_loss, reason = "nothing is below 0")]
    fn by_sorting(choice: Choice, logits: &[f32], uniform: u32) -> u32 {
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let per_temperature = choice.temperature.recip().min(f32::MAX);
        let scale = 2f32.powi(30 + (logits.len() as u32).leading_zeros().cast_signed());
        let weight = |logit: &f32| exp((logit - largest) * per_temperature);
        let all: Vec<(usize, f32, u64)> =
            logits.iter().map(weight).enumerate().map(|(at, weight)| (at, weight, (weight * scale) as u64)).collect();
        let mut sorted = all.clone();
        sorted.retain(|token| token.2 > 0);
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        let total: u64 = all.iter().map(|token| token.2).sum();
        let share = if choice.top_p < 1.0 { (f64::from(choice.top_p) * total as f64).ceil() as u64 } else { total };
        let mut sum = 0;
        let likeliest = |token: &&(usize, f32, u64)| {
            let is_one = sum < share;
            sum += token.2;
            is_one
        };
        let mut left: Vec<_> = sorted.iter().take(choice.top_k as usize).take_while(likeliest).collect();
        left.retain(|token| token.1 >= choice.min_p);
        left.sort_by_key(|token| token.0);
        let total: u64 = left.iter().map(|token| token.2).sum();
        let target = (u128::from(total) * u128::from(uniform)) >> 32;
        let mut reached = 0;
        let chosen = left.iter().find(|token| {
            reached += u128::from(token.2);
            reached > target
        });
        chosen.unwrap().0 as u32
    }

    #[test]
    fn what_sorting_would_choose_is_chosen() {
        let mut draws = Draws::new(3);
        for (count, spread) in [(7, 3.0), (300, 0.0), (300, 2.0), (5000, 12.0), (5000, 90.0)] {
            let logits: Vec<f32> =
                (0..count).map(|_| (f64::from(draws.draw()) / 2f64.powi(32) * spread).round() as f32 / 2.0).collect();
            for temperature in [0.3, 1.0, 4.0] {
                for (top_k, top_p, min_p) in [
                    (u32::MAX, 1.0, 0.0),
                    (u32::MAX, 0.9, 0.0),
                    (u32::MAX, 0.1, 0.0),
                    (u32::MAX, 1e-30, 0.0),
                    (40, 1.0, 0.0),
                    (40, 0.95, 0.02),
                    (3, 0.999, 0.5),
                ] {
                    let choice = Choice { temperature, top_k, top_p, min_p, ..DRAWN };
                    for uniform in [0, draws.draw(), draws.draw(), u32::MAX] {
                        let chosen = Chooser::new(choice, &[]).choose(&mut logits.clone(), uniform).token;
                        assert_eq!(chosen, by_sorting(choice, &logits, uniform), "{count} {choice:?} {uniform}");
                    }
                }
            }
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
