//! The steps of a block that are no matrix product.

use std::f64::consts::TAU;

use rayon::prelude::*;

use crate::model_config::{Rope, RopeScaling};
use crate::quant::Matrix;

/// RMSNorm of each row: `y = x / sqrt(mean(x²) + ε) · w`. `weight` is a plain
/// vector as long as a row.
pub fn rms_norm(x: &[f32], weight: Matrix, epsilon: f32, y: &mut [f32]) {
    let width = weight.layout.cols;
    y.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(y, x)| {
        weight.dequantize_row(0, y);
        let mean = sum_of_squares(x) / width as f32;
        let factor = 1.0 / (mean + epsilon).sqrt();
        for (y, x) in y.iter_mut().zip(x) {
            *y *= x * factor;
        }
    });
}

fn sum_of_squares(x: &[f32]) -> f32 {
    super::matmul::dot(x, x)
}

/// The angular frequency of each pair of a head: θ^(−2i/d), scaled.
///
/// Llama 3.1's scaling is that of its reference implementation: by wavelength,
/// long ones divided by `factor`, short ones kept, those between blended.
pub fn rope_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f64 / head_dim as f64;
            let frequency = rope.theta.powf(-exponent);
            let scaled = match rope.scaling {
                RopeScaling::Default => frequency,
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                    let wavelength = TAU / frequency;
                    let turns = original_max_position_embeddings / wavelength;
                    if turns < low_freq_factor {
                        frequency / factor
                    } else if turns > high_freq_factor {
                        frequency
                    } else {
                        let blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - blend) * frequency / factor + blend * frequency
                    }
                }
            };
            #[expect(clippy::cast_possible_truncation, reason = "angles are f32")]
            let frequency = scaled as f32;
            frequency
        })
        .collect()
}

/// Cosines and sines, `[tokens][head_dim / 2]`, for tokens from `position` on.
pub fn rope_table(frequencies: &[f32], position: usize, cos: &mut [f32], sin: &mut [f32]) {
    let rows = cos.chunks_mut(frequencies.len()).zip(sin.chunks_mut(frequencies.len()));
    for (token, (cos, sin)) in rows.enumerate() {
        let position = (position + token) as f32;
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
            (*sin, *cos) = (position * frequency).sin_cos();
        }
    }
}

/// Rotates every head of `x`, `[tokens][heads][head_dim]`: pairs are (i, i + d/2).
pub fn rotate(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    let tokens = cos.len() / half;
    let row = x.len() / tokens;
    x.par_chunks_mut(row).zip(cos.par_chunks(half).zip(sin.par_chunks(half))).for_each(|(row, (cos, sin))| {
        for head in row.chunks_mut(head_dim) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = a * cos[i] - b * sin[i];
                high[i] = b * cos[i] + a * sin[i];
            }
        }
    });
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `gate = silu(gate) · up`.
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    const PIECE: usize = 4096;
    gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE)).for_each(|(gate, up)| {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
    });
}
