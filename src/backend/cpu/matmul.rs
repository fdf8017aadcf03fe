//! Matrix products on packed weights.
//!
//! `y[t][n] = Σ_k x[t][k] · w[n][k]`. Quantized weights are multiplied as
//! integers with activations quantized to int8 in groups of 32; plain weights
//! in f32. Threads share the rows of the matrix, and each row is unpacked once
//! for all tokens. A token's result does not depend on the others beside it.

use std::ops::Range;

use rayon::prelude::*;

use crate::quant::{GROUP_SIZE, Matrix, NL4_LEVELS, NL4_UNIT, Storage, quantize_activations};

/// Rows that a thread takes at once.
const ROWS: usize = 16;
/// Sums that a product runs in side by side.
const LANES: usize = 16;

/// The input of a product: K values for each token, and the same quantized if
/// a matrix wants them so.
pub struct Activations<'a> {
    x: &'a [f32],
    cols: usize,
    codes: &'a [i8],
    scales: &'a [f32],
}

impl<'a> Activations<'a> {
    /// `x` is `[tokens][cols]`; `codes` and `scales` have room for its padded
    /// groups, and are written only if `quantized`.
    pub fn new(x: &'a [f32], cols: usize, codes: &'a mut [i8], scales: &'a mut [f32], quantized: bool) -> Self {
        let padded = cols.next_multiple_of(GROUP_SIZE);
        let tokens = x.len() / cols;
        let (codes, scales) = (&mut codes[..tokens * padded], &mut scales[..tokens * padded / GROUP_SIZE]);
        if quantized {
            x.par_chunks(cols)
                .zip(codes.par_chunks_mut(padded))
                .zip(scales.par_chunks_mut(padded / GROUP_SIZE))
                .for_each(|((x, codes), scales)| quantize_activations(x, codes, scales));
        }
        Self { x, cols, codes, scales }
    }

    /// The input of `affines`, quantized if one of them computes on integers.
    pub fn of(x: &'a [f32], codes: &'a mut [i8], scales: &'a mut [f32], affines: &[&Affine]) -> Self {
        let is_packed = |affine: &&Affine| !matches!(affine.weight.layout.storage, Storage::Plain(_));
        let cols = affines.first().map_or(x.len(), |affine| affine.weight.layout.cols);
        Self::new(x, cols, codes, scales, affines.iter().any(is_packed))
    }

    fn tokens(&self) -> usize {
        self.x.len() / self.cols
    }
}

/// The weight of a module and its bias, or some of their rows.
#[derive(Clone)]
pub struct Affine<'a> {
    /// The weight.
    pub weight: Matrix<'a>,
    /// The bias, a plain vector.
    pub bias: Option<Matrix<'a>>,
    /// The rows that are meant.
    pub rows: Range<usize>,
}

impl<'a> Affine<'a> {
    /// All rows of `weight`.
    pub fn new(weight: Matrix<'a>, bias: Option<Matrix<'a>>) -> Self {
        Self { weight, bias, rows: 0..weight.layout.rows }
    }

    /// Some rows, which lie within those that are meant now.
    #[must_use]
    pub fn slice(mut self, rows: Range<usize>) -> Self {
        debug_assert!(self.rows.end - self.rows.start >= rows.end);
        self.rows = self.rows.start + rows.start..self.rows.start + rows.end;
        self
    }
}

/// `y = x · wᵀ + b`, `[tokens][rows]`. `product` has room for as much, unless
/// there is one token only.
pub fn matmul(affine: &Affine, x: &Activations, product: &mut [f32], y: &mut [f32]) {
    let (tokens, rows) = (x.tokens(), affine.rows.len());
    debug_assert_eq!(affine.weight.layout.cols, x.cols);
    if tokens == 1 {
        return by_rows(affine, x, 1, y);
    }
    let product = &mut product[..tokens * rows];
    by_rows(affine, x, tokens, product);
    let product = &*product;
    y.par_chunks_mut(rows).enumerate().for_each(|(token, y)| {
        for (row, y) in y.iter_mut().enumerate() {
            *y = product[row * tokens + token];
        }
    });
}

/// The product as `[rows][tokens]`, so that each thread writes its own rows.
fn by_rows(affine: &Affine, x: &Activations, tokens: usize, product: &mut [f32]) {
    let matrix = &affine.weight;
    let (cols, padded) = (matrix.layout.cols, matrix.layout.padded_cols);
    product.par_chunks_mut(ROWS * tokens).enumerate().for_each_init(
        || (vec![0.0f32; cols], vec![0i8; padded]),
        |(plain, unpacked), (at, sums)| {
            for (i, sums) in sums.chunks_mut(tokens).enumerate() {
                let row = affine.rows.start + at * ROWS + i;
                match matrix.layout.storage {
                    Storage::Plain(_) => {
                        matrix.dequantize_row(row, plain);
                        for (sum, x) in sums.iter_mut().zip(x.x.chunks(cols)) {
                            *sum = dot(x, plain);
                        }
                    }
                    Storage::Int8 => {
                        let weights: &[i8] = bytemuck::must_cast_slice(matrix.codes(row));
                        let scale = matrix.scale(row);
                        for_tokens(x, sums, |codes, scales| scale * int8_dot(codes, scales, weights));
                    }
                    Storage::Int4 | Storage::Nl4 => {
                        let unit = if matrix.layout.storage == Storage::Nl4 {
                            unpack(matrix.codes(row), unpacked, |code| NL4_LEVELS[usize::from(code)]);
                            NL4_UNIT
                        } else {
                            unpack(matrix.codes(row), unpacked, |code| code.cast_signed() - 8);
                            1.0
                        };
                        let (scale, sub_scales) = (unit * matrix.scale(row), matrix.sub_scales(row));
                        for_tokens(x, sums, |codes, scales| scale * grouped_dot(codes, scales, unpacked, sub_scales));
                    }
                }
                if let Some(bias) = &affine.bias {
                    let bias = bias.element(row);
                    for sum in sums {
                        *sum += bias;
                    }
                }
            }
        },
    );
}

fn for_tokens(x: &Activations, sums: &mut [f32], product: impl Fn(&[i8], &[f32]) -> f32) {
    let padded = x.cols.next_multiple_of(GROUP_SIZE);
    let tokens = x.codes.chunks(padded).zip(x.scales.chunks(padded / GROUP_SIZE));
    for (sum, (codes, scales)) in sums.iter_mut().zip(tokens) {
        *sum = product(codes, scales);
    }
}

/// Four-bit codes as their levels, in the order of the columns.
fn unpack(codes: &[u8], unpacked: &mut [i8], level: impl Fn(u8) -> i8) {
    for (bytes, unpacked) in codes.chunks_exact(GROUP_SIZE / 2).zip(unpacked.chunks_exact_mut(GROUP_SIZE)) {
        let (low, high) = unpacked.split_at_mut(GROUP_SIZE / 2);
        for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
            *low = level(byte & 0x0f);
            *high = level(byte >> 4);
        }
    }
}

/// `Σ_g scale[g] · Σ_k x[k] w[k]` over groups.
fn int8_dot(x: &[i8], scales: &[f32], weights: &[i8]) -> f32 {
    let (x, weights) = (x.as_chunks::<GROUP_SIZE>().0, weights.as_chunks::<GROUP_SIZE>().0);
    x.iter().zip(weights).zip(scales).fold(0.0, |sum, ((x, w), scale)| sum + scale * group_dot(x, w))
}

/// `Σ_g scale[g] · sub_scale[g] · Σ_k x[k] level[k]` over groups.
fn grouped_dot(x: &[i8], scales: &[f32], levels: &[i8], sub_scales: &[i8]) -> f32 {
    let (x, levels) = (x.as_chunks::<GROUP_SIZE>().0, levels.as_chunks::<GROUP_SIZE>().0);
    x.iter()
        .zip(levels)
        .zip(scales.iter().zip(sub_scales))
        .fold(0.0, |sum, ((x, levels), (scale, sub_scale))| sum + scale * f32::from(*sub_scale) * group_dot(x, levels))
}

/// The integer product of a group: at most 32 · 127 · 127 in size, so i32 and f32 hold it exactly.
fn group_dot(x: &[i8; GROUP_SIZE], w: &[i8; GROUP_SIZE]) -> f32 {
    let mut sum = 0i32;
    for (x, w) in x.iter().zip(w) {
        sum = sum.wrapping_add(i32::from(*x).wrapping_mul(i32::from(*w)));
    }
    sum as f32
}

/// `Σ x[k] y[k]` in [`LANES`] sums side by side.
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_tail), (y, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let mut sums = [0.0f32; LANES];
    for (x, y) in x.iter().zip(y) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let tail: f32 = x_tail.iter().zip(y_tail).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{MatrixLayout, PackedRows, WeightDtype, quantize_rows, reference};

    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 2.0
        };
        (0..count).map(next).collect()
    }

    fn packed(layout: &MatrixLayout, weights: &[f32]) -> Vec<u8> {
        let bytes: Vec<u8> = match layout.storage {
            Storage::Plain(WeightDtype::Bf16) => {
                weights.iter().flat_map(|w| half::bf16::from_f32(*w).to_le_bytes()).collect()
            }
            Storage::Plain(WeightDtype::F16) => {
                weights.iter().flat_map(|w| half::f16::from_f32(*w).to_le_bytes()).collect()
            }
            _ => weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
        };
        let mut matrix = vec![0; layout.size().as_usize().unwrap()];
        let mut put =
            |at: u64, section: &[u8]| matrix[at as usize..at as usize + section.len()].copy_from_slice(section);
        if let Storage::Plain(_) = layout.storage {
            put(layout.codes_at(0), &bytes);
            return matrix;
        }
        let mut rows = PackedRows::default();
        quantize_rows(layout, WeightDtype::F32, &bytes, &mut rows).unwrap();
        put(layout.codes_at(0), &rows.codes);
        put(layout.sub_scales_at(0), &rows.sub_scales);
        put(layout.scales_at(0), &rows.scales);
        matrix
    }

    const STORAGES: [Storage; 6] = [
        Storage::Plain(WeightDtype::Bf16),
        Storage::Plain(WeightDtype::F16),
        Storage::Plain(WeightDtype::F32),
        Storage::Int8,
        Storage::Int4,
        Storage::Nl4,
    ];

    #[test]
    fn every_storage_equals_the_reference() {
        for storage in STORAGES {
            for (rows, cols, tokens) in
                [(1, 1, 1), (3, 5, 2), (17, 31, 3), (16, 32, 1), (33, 33, 5), (40, 100, 8), (64, 256, 1), (5, 768, 7)]
            {
                let layout = MatrixLayout::new(storage, rows, cols).unwrap();
                let bytes = packed(&layout, &random(rows * cols, 1));
                let matrix = Matrix::new(&layout, &bytes);
                let x = random(tokens * cols, 2);
                let padded = cols.next_multiple_of(GROUP_SIZE);
                let (mut codes, mut scales) = (vec![0; tokens * padded], vec![0.0; tokens * padded / GROUP_SIZE]);
                let quantized = !matches!(storage, Storage::Plain(_));
                let activations = Activations::new(&x, cols, &mut codes, &mut scales, quantized);
                let (mut product, mut y) = (vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * rows]);
                matmul(&Affine::new(matrix, None), &activations, &mut product, &mut y);
                let seen = if quantized { reference::rounded_activations(&x, cols) } else { x };
                let exact = reference::matmul(&matrix, &seen, tokens);
                for (ours, exact) in y.iter().zip(exact) {
                    let tolerance = 1e-5 * (cols as f64).sqrt() + 1e-6 * exact.abs();
                    assert!(
                        (f64::from(*ours) - exact).abs() < tolerance,
                        "{storage:?} {rows}×{cols}, {tokens} tokens: {ours} {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_token_does_not_depend_on_those_beside_it() {
        for storage in STORAGES {
            let (rows, cols, tokens) = (20, 70, 6);
            let layout = MatrixLayout::new(storage, rows, cols).unwrap();
            let bytes = packed(&layout, &random(rows * cols, 3));
            let matrix = Matrix::new(&layout, &bytes);
            let x = random(tokens * cols, 4);
            let run = |x: &[f32]| {
                let (mut codes, mut scales) = (vec![0; x.len() * 2], vec![0.0; x.len()]);
                let activations = Activations::new(x, cols, &mut codes, &mut scales, true);
                let outputs = x.len() / cols * rows;
                let (mut product, mut y) = (vec![0.0; outputs], vec![0.0; outputs]);
                matmul(&Affine::new(matrix, None), &activations, &mut product, &mut y);
                y
            };
            let alone: Vec<f32> = x.chunks(cols).flat_map(run).collect();
            assert_eq!(run(&x), alone, "{storage:?}");
        }
    }

    #[test]
    fn a_slice_is_a_part_of_the_whole_with_its_bias() {
        let (rows, cols, tokens) = (40, 33, 3);
        for storage in STORAGES {
            let layout = MatrixLayout::new(storage, rows, cols).unwrap();
            let bytes = packed(&layout, &random(rows * cols, 5));
            let vector = MatrixLayout::new(Storage::Plain(WeightDtype::F16), 1, rows).unwrap();
            let bias = packed(&vector, &random(rows, 6));
            let whole = Affine::new(Matrix::new(&layout, &bytes), Some(Matrix::new(&vector, &bias)));
            let x = random(tokens * cols, 7);
            let run = |affine: &Affine| {
                let (mut codes, mut scales) = (vec![0; x.len() * 2], vec![0.0; x.len()]);
                let activations = Activations::new(&x, cols, &mut codes, &mut scales, true);
                let outputs = tokens * affine.rows.len();
                let (mut product, mut y) = (vec![0.0; outputs], vec![0.0; outputs]);
                matmul(affine, &activations, &mut product, &mut y);
                y
            };
            let all = run(&whole);
            let unbiased = run(&Affine::new(whole.weight, None));
            assert_eq!(all[5], unbiased[5] + whole.bias.unwrap().element(5), "{storage:?}");
            for part in [0..17, 17..40] {
                let wanted: Vec<f32> = all.chunks(rows).flat_map(|row| &row[part.clone()]).copied().collect();
                assert_eq!(run(&whole.clone().slice(part)), wanted, "{storage:?}");
            }
        }
    }
}
