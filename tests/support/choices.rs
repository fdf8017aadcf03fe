//! Cases for the choice of a token.

use std::collections::HashMap;

use evenkeel::backend::cuda::Choosing;
use evenkeel::backend::{Choice, Chooser, Draws};
use evenkeel::footprint::CudaChoice;

use super::*;

/// What a GPU chooses in.
struct OnGpu<'a> {
    gpu: &'a Arc<Gpu>,
    scratch: Region,
    seen: Region,
    chosen: Region,
}

impl<'a> OnGpu<'a> {
    fn new(gpu: &'a Arc<Gpu>, count: usize) -> Self {
        let needed = CudaChoice::new(count);
        let [scratch, seen, chosen] = [needed.scratch, needed.seen, 12].map(|len| buffer(gpu, len));
        scratch.clear().unwrap();
        seen.clear().unwrap();
        Self { gpu, scratch, seen, chosen }
    }

    fn mark(&self, tokens: &[usize]) {
        let mut bits = vec![0u32; self.seen.len() / 4];
        for token in tokens {
            bits[token / 32] |= 1 << (token % 32);
        }
        self.seen.write(bytemuck::cast_slice(&bits)).unwrap();
    }

    /// The token, and whether all logits are finite.
    fn choose(&self, choice: &Choice, softcap: f32, logits: &Region, uniform: u32) -> (usize, bool) {
        self.chosen.part(8, 4).fill(uniform).unwrap();
        let choosing = Choosing { scratch: &self.scratch, seen: &self.seen, chosen: &self.chosen, stride: 1 };
        self.gpu.choose(choice, softcap, logits, logits.len() / 4, &choosing).unwrap();
        let mut words = [0u32; 3];
        self.chosen.read(bytemuck::cast_slice_mut(&mut words)).unwrap();
        (words[0] as usize, words[1] == 0)
    }
}

pub fn the_first_of_the_largest_logits_is_found(gpu: &Arc<Gpu>) {
    for count in [1, 5, 1024, 1025, 70_000] {
        let on_gpu = OnGpu::new(gpu, count);
        let largest = |logits: &[f32]| {
            let on_host = Chooser::new(Choice::GREEDY, &[]).choose(&mut logits.to_vec(), 0);
            let chosen = on_gpu.choose(&Choice::GREEDY, 0.0, &floats(gpu, logits), 0);
            assert_eq!((on_host.token as usize, on_host.is_finite), chosen);
            chosen
        };
        let mut logits = random(count, 23);
        let order = |a: &usize, b: &usize| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a));
        assert_eq!(largest(&logits), ((0..count).max_by(order).unwrap(), true), "{count} logits");
        for at in [0, count / 3, count - 1] {
            (logits[at], logits[count - 1]) = (2.0, 2.0);
            assert_eq!(largest(&logits), (at, true), "{at} of {count} logits");
            logits[at] = -2.0;
        }
    }
    let on_gpu = OnGpu::new(gpu, 3);
    let largest = |logits: [f32; 3]| on_gpu.choose(&Choice::GREEDY, 0.0, &floats(gpu, &logits), 0);
    assert_eq!(largest([-1.0, -0.0, 0.0]), (1, true), "zeros are the same");
    assert_eq!(largest([f32::MIN; 3]), (0, true));
}

const DRAWN: Choice = Choice { temperature: 1.0, ..Choice::GREEDY };

pub fn a_logit_that_is_not_finite_is_found(gpu: &Arc<Gpu>) {
    let cut = Choice { top_k: 5, top_p: 0.9, ..DRAWN };
    let penalized = Choice { penalty: 1.5, ..Choice::GREEDY };
    for choice in [Choice::GREEDY, DRAWN, cut, penalized] {
        let on_gpu = OnGpu::new(gpu, 3000);
        for at in [0, 1023, 2999] {
            let mut logits = random(3000, 23);
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                logits[at] = value;
                // A soft cap makes no number of what is none.
                for softcap in [0.0, 30.0] {
                    let (_, is_finite) = on_gpu.choose(&choice, softcap, &floats(gpu, &logits), 1 << 31);
                    assert!(!is_finite, "{value} at {at}, {choice:?}");
                }
            }
            logits[at] = 0.5;
            assert!(on_gpu.choose(&choice, 0.0, &floats(gpu, &logits), 1 << 31).1, "{choice:?}");
        }
    }
}

/// The logits behind a soft cap.
fn capped(softcap: f32, logits: &[f32]) -> Vec<f32> {
    let cap = |logit: &f32| if softcap > 0.0 { softcap * (logit / softcap).tanh() } else { *logit };
    logits.iter().map(cap).collect()
}

/// The weights of the tokens that may come, by plain sorting and adding up.
fn weights(choice: &Choice, seen: &[usize], logits: &[f32]) -> Vec<f64> {
    let adjusted = logits.iter().enumerate().map(|(token, logit)| match (seen.contains(&token), *logit >= 0.0) {
        (false, _) => *logit,
        (true, true) => logit / choice.penalty,
        (true, false) => logit * choice.penalty,
    });
    let logits: Vec<f32> = adjusted.collect();
    let largest = logits.iter().copied().fold(f32::MIN, f32::max);
    let weigh = |logit: &f32| f64::from(((logit - largest) * choice.temperature.recip()).exp());
    let mut weights: Vec<f64> = logits.iter().map(weigh).collect();
    let total: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let mut reached = 0.0;
    for (rank, token) in order.into_iter().enumerate() {
        let weight = weights[token];
        let is_out = rank >= choice.top_k as usize
            || choice.top_p < 1.0 && reached >= f64::from(choice.top_p) * total
            || weight < f64::from(choice.min_p);
        if is_out {
            weights[token] = 0.0;
        }
        reached += weight;
    }
    weights
}

/// The token at which the weights up to it pass a share of all.
fn drawn(weights: &[f64], uniform: u32) -> usize {
    let target = f64::from(uniform) / 2f64.powi(32) * weights.iter().sum::<f64>();
    let mut reached = 0.0;
    let passes = |weight: &f64| {
        reached += weight;
        reached > target
    };
    weights.iter().position(passes).unwrap()
}

/// Settings that try all bounds, alone and together.
const CHOICES: [Choice; 12] = [
    DRAWN,
    Choice { temperature: 0.3, ..DRAWN },
    Choice { temperature: 50.0, ..DRAWN },
    Choice { temperature: 1e-30, ..DRAWN },
    Choice { top_k: 1, ..DRAWN },
    Choice { top_k: 40, ..DRAWN },
    Choice { top_p: 0.9, ..DRAWN },
    Choice { top_p: 1e-6, ..DRAWN },
    Choice { min_p: 0.2, ..DRAWN },
    Choice { min_p: 0.1, top_k: 9, top_p: 0.7, ..DRAWN },
    Choice { temperature: 2.0, top_k: 1_000_000, top_p: 0.99, penalty: 1.3, ..DRAWN },
    Choice { temperature: 0.7, top_k: 20, penalty: 0.5, ..DRAWN },
];

pub fn a_token_is_drawn_as_the_reference_draws_it(gpu: &Arc<Gpu>) {
    for (count, spread, step) in
        [(1, 1.0, 0.0), (7, 3.0, 0.0), (300, 0.0, 0.0), (1025, 10.0, 0.5), (2048, 30.0, 0.0), (40_000, 12.0, 0.1)]
    {
        // Rounded to steps, many are equal.
        let round = |v: f32| if step > 0.0 { (v / step).round() * step } else { v };
        let logits: Vec<f32> = random(count, 31).iter().map(|v| round(v * spread)).collect();
        let on_gpu = OnGpu::new(gpu, count);
        let mut draws = Draws::new(5);
        for choice in CHOICES {
            for softcap in [0.0, 5.0] {
                let seen = if choice.is_penalized() { vec![0, count / 2, count - 1] } else { Vec::new() };
                let capped = capped(softcap, &logits);
                let weights = weights(&choice, &seen, &capped);
                let ids: Vec<u32> = seen.iter().map(|token| u32::try_from(*token).unwrap()).collect();
                for uniform in [1, u32::MAX, draws.draw(), draws.draw()] {
                    on_gpu.mark(&seen);
                    let (token, _) = on_gpu.choose(&choice, softcap, &floats(gpu, &logits), uniform);
                    let exact = drawn(&weights, uniform);
                    let on_host = Chooser::new(choice, &ids).choose(&mut capped.clone(), uniform);
                    assert_eq!(
                        [token, on_host.token as usize],
                        [exact; 2],
                        "{count} logits, {choice:?}, soft cap {softcap}, {uniform}"
                    );
                }
            }
        }
    }
}

pub fn a_token_that_was_chosen_is_penalized(gpu: &Arc<Gpu>) {
    for temperature in [0.0, 1e-3] {
        let choice = Choice { temperature, penalty: 2.0, ..Choice::GREEDY };
        let on_gpu = OnGpu::new(gpu, 4);
        on_gpu.mark(&[3]);
        let chosen = [0; 4].map(|_| on_gpu.choose(&choice, 0.0, &floats(gpu, &[1.0, 1.1, 1.2, 1.9]), 7).0);
        assert_eq!(chosen, [2, 1, 0, 3], "at {temperature}");
    }
}

pub fn tokens_are_drawn_as_often_as_they_are_likely(gpu: &Arc<Gpu>) {
    const ROUNDS: u32 = 2000;
    let logits: Vec<f32> = [0.3f32, 0.02, 0.5, 0.1, 0.08].iter().map(|p| p.ln()).collect();
    let on_gpu = OnGpu::new(gpu, logits.len());
    for (choice, left) in [
        (DRAWN, &[0.3, 0.02, 0.5, 0.1, 0.08][..]),
        (Choice { top_p: 0.85, ..DRAWN }, &[0.3, 0.0, 0.5, 0.1, 0.0]),
        (Choice { top_k: 2, ..DRAWN }, &[0.3, 0.0, 0.5, 0.0, 0.0]),
        (Choice { min_p: 0.15, ..DRAWN }, &[0.3, 0.0, 0.5, 0.1, 0.08]),
    ] {
        let (mut draws, mut counts) = (Draws::new(11), HashMap::<usize, u32>::new());
        for _ in 0..ROUNDS {
            *counts.entry(on_gpu.choose(&choice, 0.0, &floats(gpu, &logits), draws.draw()).0).or_default() += 1;
        }
        let total: f64 = left.iter().sum();
        for (token, share) in left.iter().map(|p| p / total).enumerate() {
            let count = f64::from(counts.get(&token).copied().unwrap_or_default());
            let deviation = (share * (1.0 - share) * f64::from(ROUNDS)).sqrt();
            assert!((count - share * f64::from(ROUNDS)).abs() <= 4.0 * deviation, "{token}: {count}, {choice:?}");
        }
    }
}
