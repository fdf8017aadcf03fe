//! The steps of a block that are no matrix product.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use candle_core::cpu::erf::erf_f32;

use super::Affine;
use super::exp::{exp, tanh};
use crate::model_config::{Activation, Experts, NormKind};
use crate::pool::Pool;
use crate::simd::{Isa, vectorized};

/// Elements that a thread takes at once.
const PIECE: usize = 16_384;

/// Elements of a norm's weight that are decoded at once.
const DECODED: usize = 256;
/// Sums that run side by side.
const LANES: usize = 16;
const SQRT_FRAC_2_PI: f32 = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;

/// Normalizes each row of `x`; a row is as long as the norm's weight.
pub fn normalize(pool: &Pool, kind: NormKind, epsilon: f32, x: &mut [f32], affine: &Affine) {
    let width = affine.weight.layout.cols;
    pool.chunks(x, rows(width) * width, |_, x| {
        for x in x.chunks_exact_mut(width) {
            normalize_row(pool.isa(), kind, epsilon, x, affine);
        }
    });
}

fn normalize_row(isa: Isa, kind: NormKind, epsilon: f32, x: &mut [f32], affine: &Affine) {
    let width = x.len() as f32;
    if kind == NormKind::Layer {
        let mean = sum(isa, x) / width;
        for x in &mut *x {
            *x -= mean;
        }
    }
    let factor = 1.0 / (sum_of_squares(isa, x) / width + epsilon).sqrt();
    let one = if kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
    let mut decoded = [0.0; DECODED];
    for (at, x) in x.chunks_mut(DECODED).enumerate() {
        let decoded = &mut decoded[..x.len()];
        affine.weight.elements(at * DECODED, decoded);
        multiply(isa, x, decoded, one, factor);
        if let Some(bias) = affine.bias {
            bias.elements(at * DECODED, decoded);
            add(isa, x, decoded, 1.0);
        }
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

    /// `x += scale · y`.
    pub fn add(x: &mut [f32], y: &[f32], scale: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += scale * y;
        }
    }

    /// `x *= factor · (weight + one)`.
    fn multiply(x: &mut [f32], weight: &[f32], one: f32, factor: f32) {
        for (x, weight) in x.iter_mut().zip(weight) {
            *x *= factor * (weight + one);
        }
    }

    fn sum(x: &[f32]) -> f32 {
        sum_of(x, |x| x)
    }

    fn sum_of_squares(x: &[f32]) -> f32 {
        sum_of(x, |x| x * x)
    }
}

/// The sum of what `term` makes of each element, in [`LANES`] sums side by side.
#[inline(always)]
fn sum_of(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let (whole, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for x in whole {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += term(*x);
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|x| term(*x)).sum::<f32>()
}

/// `x = activation(x)`, times `up` where there is one.
pub fn activate(pool: &Pool, activation: Activation, x: &mut [f32], up: Option<&[f32]>) {
    pool.chunks(x, PIECE, |index, x| {
        let up = up.map(|up| &up[index * PIECE..][..x.len()]);
        match activation {
            Activation::Gelu => map(pool.isa(), gelu, x, up),
            Activation::GeluTanh => map(pool.isa(), gelu_tanh, x, up),
            Activation::QuickGelu => map(pool.isa(), quick_gelu, x, up),
            Activation::Relu => map(pool.isa(), relu, x, up),
            Activation::Silu => map(pool.isa(), silu, x, up),
        }
    });
}

vectorized! {
    fn map<F: Fn(f32) -> f32>(function: F, x: &mut [f32], factors: Option<&[f32]>) {
        if let Some(factors) = factors {
            for (x, factor) in x.iter_mut().zip(factors) {
                *x = function(*x) * factor;
            }
        } else {
            for x in x {
                *x = function(*x);
            }
        }
    }
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf_f32(x * FRAC_1_SQRT_2))
}

/// `x / 2 · (1 + tanh(y))` is `x / (1 + exp(-2y))`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    x / (1.0 + exp(-2.0 * SQRT_FRAC_2_PI * (x + 0.044_715 * x * x * x)))
}

#[inline(always)]
fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// What is not a number stays so.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x <= 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x = cap · tanh(x / cap)`, which leaves small values as they are and none beyond the cap.
#[inline(always)]
pub fn soft_cap(x: f32, cap: Option<f32>) -> f32 {
    cap.map_or(x, |cap| cap * tanh(x / cap))
}

/// Scales logits, and caps them if there is a cap.
pub fn cap(pool: &Pool, logits: &mut [f32], scale: f32, cap: Option<f32>) {
    if (scale, cap) != (1.0, None) {
        pool.chunks(logits, PIECE, |_, logits| map(pool.isa(), |logit| soft_cap(logit * scale, cap), logits, None));
    }
}

/// Turns the scores of each row of `scores`, `[tokens][experts]`, into the
/// weights of the best, which are those of a softmax over all, made to
/// sum up to 1 if they are to be normalized; the others become 0.
pub fn route(scores: &mut [f32], experts: Experts) {
    let chosen = experts.per_token;
    for row in scores.chunks_mut(experts.count) {
        let largest = row.iter().fold(f32::NEG_INFINITY, |max, score| max.max(*score));
        for score in &mut *row {
            *score = (*score - largest).exp();
        }
        let all: f32 = row.iter().sum();
        let mut best: Vec<usize> = (0..experts.count).collect();
        best.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        let sum = if experts.is_normalized { best[..chosen].iter().map(|at| row[*at]).sum() } else { all };
        for (rank, at) in best.into_iter().enumerate() {
            row[at] = if rank < chosen { row[at] / sum } else { 0.0 };
        }
    }
}

/// The tokens that go through an expert by what [`route`] leaves, and the weight of each.
pub fn routed(weights: &[f32], experts: usize, expert: usize) -> impl Iterator<Item = (u32, f32)> {
    (0..).zip(weights.chunks(experts).map(move |row| row[expert])).filter(|(_, weight)| *weight != 0.0)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use half::bf16;

    use super::*;
    use crate::quant::{Matrix, MatrixLayout, Storage, WeightDtype};

    #[test]
    fn activations_are_those_of_pytorch() {
        for (activation, x, y) in [
            (Activation::Silu, 1.0, 0.731_058_6),
            (Activation::Silu, -2.0, -0.238_405_84),
            (Activation::Gelu, 1.0, 0.841_344_8),
            (Activation::Gelu, -0.5, -0.154_268_77),
            (Activation::GeluTanh, 1.0, 0.841_192),
            (Activation::GeluTanh, -0.5, -0.154_286),
            (Activation::QuickGelu, 1.0, 0.845_795_77),
            (Activation::QuickGelu, -0.5, -0.149_611_56),
            (Activation::Relu, 1.5, 1.5),
            (Activation::Relu, -0.5, 0.0),
        ] {
            for isa in Isa::available() {
                let pool = Pool::new(NonZeroUsize::MIN).with_isa(isa);
                let (mut activated, mut gated) = ([x; 20], [x; 20]);
                activate(&pool, activation, &mut activated, None);
                activate(&pool, activation, &mut gated, Some(&[2.0; 20]));
                for (activated, gated) in activated.into_iter().zip(gated) {
                    assert!((activated - y).abs() < 1e-6, "{activation:?} of {x}: {activated}, {isa:?}");
                    assert_eq!(gated, 2.0 * activated, "{activation:?} of {x}, {isa:?}");
                }
            }
        }
    }

    #[test]
    fn activations_at_the_ends() {
        let pool = Pool::new(NonZeroUsize::MIN);
        for activation in
            [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Relu]
        {
            let mut x = [-1e30, 1e30, f32::NAN, 0.0];
            activate(&pool, activation, &mut x, None);
            assert!(x[2].is_nan());
            assert_eq!([x[0], x[1], x[3]], [0.0, 1e30, 0.0], "{activation:?}");
        }
    }

    #[test]
    fn norms_are_those_of_f64() {
        let (weight_layout, bias_layout) = [WeightDtype::F32, WeightDtype::Bf16]
            .map(|dtype| MatrixLayout::new(Storage::Plain(dtype), 1, 700).unwrap())
            .into();
        let values: Vec<f32> = (0..700u16).map(|i| bf16::from_f32((f32::from(i) * 0.3).cos()).to_f32()).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).chain([0; 64]).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).chain([0; 64]).collect();
        let x: Vec<f32> = (0..60 * 700u16).map(|i| (f32::from(i) * 0.7).sin() + 0.5).collect();
        for (kind, has_bias) in [(NormKind::Rms, false), (NormKind::RmsPlusOne, false), (NormKind::Layer, true)] {
            let bias = has_bias.then(|| Matrix::new(&bias_layout, &bf16s));
            let affine = Affine::new(Matrix::new(&weight_layout, &f32s), bias);
            for isa in Isa::available() {
                let mut ours = x.clone();
                let pool = Pool::new(NonZeroUsize::MIN.saturating_add(1)).with_isa(isa);
                normalize(&pool, kind, 1e-5, &mut ours, &affine);
                for (x, ours) in x.chunks(700).zip(ours.chunks(700)) {
                    let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                    let mean = if kind == NormKind::Layer { x.iter().sum::<f64>() / 700.0 } else { 0.0 };
                    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 700.0;
                    for ((x, weight), ours) in x.iter().zip(&values).zip(ours) {
                        let weight = f64::from(*weight);
                        let factor = if kind == NormKind::RmsPlusOne { weight + 1.0 } else { weight };
                        let bias = if has_bias { weight } else { 0.0 };
                        let exact = (x - mean) / (square + 1e-5).sqrt() * factor + bias;
                        assert!((f64::from(*ours) - exact).abs() < 1e-5, "{kind:?} {isa:?}: {ours} {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_best_experts_share_a_token() {
        let logits = [0.1f32, 2.0, -1.0, 1.5];
        let exp = logits.map(f32::exp);
        for (is_normalized, sum) in [(true, exp[1] + exp[3]), (false, exp.iter().sum())] {
            let mut row = logits;
            route(&mut row, Experts { count: 4, per_token: 2, intermediate_size: 1, is_normalized });
            for (weight, wanted) in row.iter().zip([0.0, exp[1] / sum, 0.0, exp[3] / sum]) {
                assert!((weight - wanted).abs() < 1e-6, "{row:?}");
            }
        }
    }
}
