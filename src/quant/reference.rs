//! The judge: matrix products in plain scalar Rust with f64 accumulation.
//! Every kernel, on every backend, is held against these.

use super::{GROUP_SIZE, Matrix};

/// `y[t][n] = Σ_k x[t][k] · w[n][k]` with exact activations, for `tokens` rows of `x`.
pub fn matmul(matrix: &Matrix, x: &[f32], tokens: usize) -> Vec<f64> {
    let (rows, cols) = (matrix.layout.rows, matrix.layout.cols);
    let mut weights = vec![0.0; cols];
    let mut y = vec![0.0; tokens * rows];
    for row in 0..rows {
        matrix.dequantize_row(row, &mut weights);
        for token in 0..tokens {
            let x = &x[token * cols..][..cols];
            y[token * rows + row] = x.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        }
    }
    y
}

/// The activations that a product on packed integers sees: `x` after
/// [`super::quantize_activations`], dequantized again.
pub fn rounded_activations(x: &[f32], cols: usize) -> Vec<f32> {
    let padded = cols.next_multiple_of(GROUP_SIZE);
    let (mut codes, mut scales) = (vec![0; padded], vec![0.0; padded / GROUP_SIZE]);
    x.chunks(cols)
        .flat_map(|x| {
            super::quantize_activations(x, &mut codes, &mut scales);
            (0..cols).map(|k| f32::from(codes[k]) * scales[k / GROUP_SIZE]).collect::<Vec<_>>()
        })
        .collect()
}
