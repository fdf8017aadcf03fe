//! The steps of a block that are no matrix product.

use candle_core::cpu::erf::erf_f32;

use super::matmul::{Affine, dot};
use super::pool::Pool;
use crate::model_config::{Activation, NormKind};
use crate::simd::vectorized;

/// Elements that a thread takes at once.
const PIECE: usize = 16_384;

/// How norms are computed.
#[derive(Clone, Copy)]
pub struct Norm {
    pub kind: NormKind,
    pub epsilon: f32,
}

impl Norm {
    /// Normalizes each row of `x`; a row is as long as the norm's weight.
    pub fn apply(self, pool: &Pool, x: &mut [f32], affine: &Affine) {
        let width = affine.weight.layout.cols;
        let decode = || {
            let (mut weight, mut bias) = (vec![0.0; width], Vec::new());
            affine.weight.dequantize_row(0, &mut weight);
            if self.kind == NormKind::RmsPlusOne {
                for weight in &mut weight {
                    *weight += 1.0;
                }
            }
            if let Some(vector) = affine.bias {
                bias.resize(width, 0.0);
                vector.dequantize_row(0, &mut bias);
            }
            (weight, bias)
        };
        let (weight, bias) = decode();
        let normalize = |x: &mut [f32]| {
            if self.kind == NormKind::Layer {
                let mean = x.iter().sum::<f32>() / width as f32;
                for x in &mut *x {
                    *x -= mean;
                }
            }
            let factor = 1.0 / (dot(x, x) / width as f32 + self.epsilon).sqrt();
            for (x, weight) in x.iter_mut().zip(&weight) {
                *x *= factor * *weight;
            }
            add(x, &bias, 1.0);
        };
        pool.chunks(x, rows(width) * width, |_, rows| rows.chunks_mut(width).for_each(normalize));
    }
}

/// Rows of so many elements that a thread takes at once.
fn rows(width: usize) -> usize {
    (PIECE / width).max(1)
}

/// Cosines and sines, `[tokens][rotary_dim / 2]`, for tokens from `position` on.
pub fn rope_table(frequencies: &[f32], factor: f32, position: usize, cos: &mut [f32], sin: &mut [f32]) {
    let rows = cos.chunks_mut(frequencies.len()).zip(sin.chunks_mut(frequencies.len()));
    for (token, (cos, sin)) in rows.enumerate() {
        let position = (position + token) as f32;
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
            let (sine, cosine) = (position * frequency).sin_cos();
            (*sin, *cos) = (sine * factor, cosine * factor);
        }
    }
}

/// Rotates the beginning of every head of `x`, `[tokens][heads][head_dim]`, by
/// `half` angles for each token: pairs are (i, i + half).
pub fn rotate(pool: &Pool, x: &mut [f32], head_dim: usize, half: usize, cos: &[f32], sin: &[f32]) {
    let tokens = cos.len() / half;
    let row = x.len() / tokens;
    let at_once = rows(row);
    pool.chunks(x, at_once * row, |index, x| {
        let angles = cos.chunks(half).zip(sin.chunks(half)).skip(index * at_once);
        for (row, (cos, sin)) in x.chunks_mut(row).zip(angles) {
            rotate_heads(pool.isa(), row, head_dim, cos, sin);
        }
    });
}

vectorized! {
    fn rotate_heads(row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        for head in row.chunks_exact_mut(head_dim) {
            let (low, high) = head.split_at_mut(cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
    }
}

/// `x += scale · y`.
pub fn add(x: &mut [f32], y: &[f32], scale: f32) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += scale * y;
    }
}

/// `x = activation(x)`.
pub fn activate(pool: &Pool, activation: Activation, x: &mut [f32]) {
    pool.chunks(x, PIECE, |_, x| x.iter_mut().for_each(|x| *x = value(activation, *x)));
}

/// `gate = activation(gate) · up`.
pub fn gate(pool: &Pool, activation: Activation, gate: &mut [f32], up: &[f32]) {
    pool.chunks(gate, PIECE, |index, gate| {
        for (gate, up) in gate.iter_mut().zip(&up[index * PIECE..]) {
            *gate = value(activation, *gate) * up;
        }
    });
}

fn value(activation: Activation, x: f32) -> f32 {
    use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_PI};
    match activation {
        Activation::Gelu => 0.5 * x * (1.0 + erf_f32(x * FRAC_1_SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044_715 * x * x * x)).tanh()),
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// `x = cap · tanh(x / cap)`, which leaves small values as they are and none beyond the cap.
pub fn soft_cap(x: f32, cap: Option<f32>) -> f32 {
    cap.map_or(x, |cap| cap * (x / cap).tanh())
}

/// Turns the scores of each row of `scores`, `[tokens][experts]`, into the
/// weights of the `chosen` best, which are those of a softmax over all, made to
/// sum up to 1 if `is_normalized`; the others become 0.
pub fn route(scores: &mut [f32], experts: usize, chosen: usize, is_normalized: bool) {
    for row in scores.chunks_mut(experts) {
        let largest = row.iter().fold(f32::NEG_INFINITY, |max, score| max.max(*score));
        for score in &mut *row {
            *score = (*score - largest).exp();
        }
        let all: f32 = row.iter().sum();
        let mut best: Vec<usize> = (0..experts).collect();
        best.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        let sum = if is_normalized { best[..chosen].iter().map(|at| row[*at]).sum() } else { all };
        for (rank, at) in best.into_iter().enumerate() {
            row[at] = if rank < chosen { row[at] / sum } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_those_of_pytorch() {
        for (activation, x, y) in [
            (Activation::Silu, 1.0, 0.731_058_6),
            (Activation::Silu, -2.0, -0.238_405_84),
            (Activation::Gelu, 1.0, 0.841_344_8),
            (Activation::Gelu, -0.5, -0.154_268_77),
            (Activation::GeluTanh, 1.0, 0.841_192),
            (Activation::GeluTanh, -0.5, -0.154_286),
        ] {
            assert!((value(activation, x) - y).abs() < 1e-6, "{activation:?} of {x}: {}", value(activation, x));
        }
    }

    #[test]
    fn the_best_experts_share_a_token() {
        let logits = [0.1f32, 2.0, -1.0, 1.5];
        let exp = logits.map(f32::exp);
        for (is_normalized, sum) in [(true, exp[1] + exp[3]), (false, exp.iter().sum())] {
            let mut row = logits;
            route(&mut row, 4, 2, is_normalized);
            for (weight, wanted) in row.iter().zip([0.0, exp[1] / sum, 0.0, exp[3] / sum]) {
                assert!((weight - wanted).abs() < 1e-6, "{row:?}");
            }
        }
    }
}
