//! Matrix products on packed weights.
//!
//! `y[t][n] = Σ_k x[t][k] · w[n][k]`. Quantized weights are multiplied as integers with activations
//! quantized to int8 in groups of 32; plain weights in f32, read as they are stored. Threads share
//! the rows of the matrices. A token's result does not depend on the others beside it, nor on the
//! processor; see [`super::kernels`].

use std::array::from_fn;
use std::ops::Range;

use super::Affine;
use super::kernels::{self, Codes, MANY, Quantized, ROWS, Row, TILE, TOKENS, plain};
use crate::pool::{Pool, Table};
use crate::quant::{NL4_UNIT, Storage, WeightDtype};
use crate::simd::{Isa, vectorized};

/// Bytes of weights that a thread takes at once for one token.
const TASK: usize = 64 << 10;

/// What the rows of a matrix are multiplied with, as its storage wants it.
#[derive(Clone, Copy)]
enum Input<'a> {
    /// So many values for each token.
    Plain(WeightDtype, &'a [f32], usize),
    Packed(Codes, Quantized<'a>),
}

impl Input<'_> {
    fn few(self, isa: Isa, rows: &[Row; ROWS], token: usize) -> [f32; ROWS] {
        match self {
            Self::Plain(dtype, x, cols) => plain::few(isa, dtype, rows, &x[token * cols..][..cols]),
            Self::Packed(codes, x) => kernels::few(isa, codes, rows, x.token(token)),
        }
    }

    /// The totals of a tile of rows with each token from `first` on.
    fn many(self, isa: Isa, rows: &[Row; TILE], first: usize, totals: &mut [[f32; TILE]]) {
        let count = totals.len();
        match self {
            Self::Plain(dtype, x, cols) => {
                plain::many(isa, dtype, rows, &x[first * cols..][..count * cols], cols, totals);
            }
            Self::Packed(codes, x) => kernels::many(isa, codes, rows, x.slice(first, count), totals),
        }
    }
}

/// `y = x · wᵀ + b`, `[tokens][rows]`, for several matrices with one input, which is quantized into `words`
/// if one of them computes on integers: they have room for [`kernels::GROUP_WORDS`] for each group.
pub fn matmul<const N: usize>(pool: &Pool, x: &[f32], words: &mut [f32], products: [(&Affine, &mut [f32]); N]) {
    let affines = products.each_ref().map(|(affine, _)| *affine);
    let cols = affines[0].weight.layout.cols;
    let tokens = x.len() / cols;
    let is_packed = |affine: &&Affine| !matches!(affine.weight.layout.storage, Storage::Plain(_));
    let wanted = if affines.iter().any(is_packed) { x } else { &[] };
    let quantized = Quantized::new(pool, wanted, cols, bytemuck::must_cast_slice_mut(words));
    let inputs = affines.map(|affine| match affine.weight.layout.storage {
        Storage::Plain(dtype) => Input::Plain(dtype, x, cols),
        Storage::Int8 => Input::Packed(Codes::Int8, quantized),
        Storage::Int4 => Input::Packed(Codes::Int4, quantized),
        Storage::Nl4 => Input::Packed(Codes::Nl4, quantized),
    });
    let row_bytes = affines.iter().map(|affine| affine.weight.layout.row_bytes[0]).max().unwrap_or(0);
    let mut tables = products.map(|(affine, values)| {
        debug_assert_eq!(affine.weight.layout.cols, cols);
        Table { values, stride: affine.rows.len() }
    });
    let is_few = tokens < MANY;
    let at_once = if is_few { (TASK / row_bytes.max(1)).next_multiple_of(ROWS).clamp(ROWS, 2 * TILE) } else { TILE };
    pool.tiles(&mut tables, at_once, usize::MAX, |table, mut columns| {
        let (affine, x, width) = (affines[table], inputs[table], columns.width());
        let start = affine.rows.start + columns.start();
        if is_few {
            for at in (0..width).step_by(ROWS) {
                let tile = Tile::<ROWS>::new(affine, start + at..start + width);
                for token in 0..tokens {
                    tile.put(pool.isa(), &x.few(pool.isa(), &tile.rows, token), &mut columns.row(token)[at..]);
                }
            }
        } else {
            let tile = Tile::<TILE>::new(affine, start..start + width);
            #[expect(clippy::large_stack_arrays, reason = "a thread's stack has room")]
            let mut totals = [[0.0; TILE]; TOKENS];
            for first in (0..tokens).step_by(TOKENS) {
                let totals = &mut totals[..TOKENS.min(tokens - first)];
                x.many(pool.isa(), &tile.rows, first, totals);
                for (token, totals) in (first..).zip(totals) {
                    tile.put(pool.isa(), totals, columns.row(token));
                }
            }
        }
    });
}

/// N rows of a matrix that are multiplied at once.
struct Tile<'a, const N: usize> {
    rows: [Row<'a>; N],
    scales: [f32; N],
    biases: [f32; N],
}

impl<'a, const N: usize> Tile<'a, N> {
    /// The first of `rows`; where these are fewer than N, the last one stands for those that are missing.
    fn new(affine: &Affine<'a>, rows: Range<usize>) -> Self {
        let matrix = &affine.weight;
        let unit = if matrix.layout.storage == Storage::Nl4 { NL4_UNIT } else { 1.0 };
        let row = |i: usize| (rows.start + i).min(rows.end - 1);
        Self {
            rows: from_fn(|i| Row { codes: matrix.codes(row(i)), sub_scales: matrix.sub_scales(row(i)) }),
            scales: from_fn(|i| unit * matrix.scale(row(i))),
            biases: affine.bias.map_or([0.0; N], |bias| from_fn(|i| bias.element(row(i)))),
        }
    }

    /// As many of the rows' results as there is room for.
    fn put(&self, isa: Isa, totals: &[f32; N], y: &mut [f32]) {
        let count = N.min(y.len());
        scale_and_add(isa, &totals[..count], &self.scales[..count], &self.biases[..count], &mut y[..count]);
    }
}

vectorized! {
    fn scale_and_add(totals: &[f32], scales: &[f32], biases: &[f32], y: &mut [f32]) {
        for (y, (total, (scale, bias))) in y.iter_mut().zip(totals.iter().zip(scales.iter().zip(biases))) {
            *y = total * scale + bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::kernels::GROUP_WORDS;
    use crate::quant::{GROUP_SIZE, Matrix, MatrixLayout, PackedRows, quantize_rows, reference};

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
        if let Storage::Plain(_) = layout.storage {
            return [&bytes[..], &vec![0; layout.size().as_usize().unwrap() - bytes.len()]].concat();
        }
        let mut rows = PackedRows::default();
        quantize_rows(&Pool::default(), layout, WeightDtype::F32, &bytes, &mut rows).unwrap();
        rows.matrix(layout)
    }

    const STORAGES: [Storage; 6] = [
        Storage::Plain(WeightDtype::Bf16),
        Storage::Plain(WeightDtype::F16),
        Storage::Plain(WeightDtype::F32),
        Storage::Int8,
        Storage::Int4,
        Storage::Nl4,
    ];

    const CASES: [(usize, usize, usize); 14] = [
        (1, 1, 1),
        (3, 5, 2),
        (17, 31, 3),
        (16, 32, 1),
        (33, 33, 5),
        (40, 100, 8),
        (64, 256, 1),
        (5, 768, 7),
        (70, 161, 4),
        (32, 64, 6),
        (31, 96, 13),
        (4, 2080, 9),
        (65, 2304, 2),
        (2, 40, 260),
    ];

    fn run(pool: &Pool, affine: &Affine, x: &[f32]) -> Vec<f32> {
        let cols = affine.weight.layout.cols;
        let mut words = vec![0.0; x.len() / cols * cols.div_ceil(GROUP_SIZE) * GROUP_WORDS];
        let mut y = vec![f32::NAN; x.len() / cols * affine.rows.len()];
        matmul(pool, x, &mut words, [(affine, &mut y)]);
        y
    }

    #[test]
    fn every_storage_equals_the_reference() {
        for storage in STORAGES {
            for (rows, cols, tokens) in CASES {
                let layout = MatrixLayout::new(storage, rows, cols).unwrap();
                let bytes = packed(&layout, &random(rows * cols, 1));
                let matrix = Matrix::new(&layout, &bytes);
                let x = random(tokens * cols, 2);
                let y = run(&Pool::default(), &Affine::new(matrix, None), &x);
                let quantized = !matches!(storage, Storage::Plain(_));
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
    fn every_processor_gives_the_same_bits() {
        for storage in STORAGES {
            for (rows, cols, tokens) in CASES {
                let layout = MatrixLayout::new(storage, rows, cols).unwrap();
                let bytes = packed(&layout, &random(rows * cols, 1));
                let affine = Affine::new(Matrix::new(&layout, &bytes), None);
                let x = random(tokens * cols, 2);
                let wanted = run(&Pool::default().with_isa(Isa::PORTABLE), &affine, &x);
                for isa in Isa::available() {
                    let y = run(&Pool::default().with_isa(isa), &affine, &x);
                    assert!(y == wanted, "{isa:?} {storage:?} {rows}×{cols}, {tokens} tokens");
                }
            }
        }
    }

    #[test]
    fn the_largest_codes_do_not_overflow() {
        let (rows, cols, tokens) = (32, 96, 6);
        let signs = |at: usize| if at.is_multiple_of(3) { -1.0 } else { 1.0 };
        for storage in STORAGES {
            for x in [vec![1.0; tokens * cols], vec![-1.0; tokens * cols], (0..tokens * cols).map(signs).collect()] {
                let layout = MatrixLayout::new(storage, rows, cols).unwrap();
                let bytes = packed(&layout, &(0..rows * cols).map(signs).collect::<Vec<_>>());
                let matrix = Matrix::new(&layout, &bytes);
                let exact = reference::matmul(&matrix, &x, tokens);
                for isa in Isa::available() {
                    let y = run(&Pool::default().with_isa(isa), &Affine::new(matrix, None), &x);
                    for (ours, exact) in y.iter().zip(&exact) {
                        assert!((f64::from(*ours) - exact).abs() < 1e-3, "{isa:?} {storage:?}: {ours} {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_code_that_no_quantizer_writes_is_a_number_as_any() {
        let layout = MatrixLayout::new(Storage::Int8, 4, 64).unwrap();
        let mut bytes = packed(&layout, &random(4 * 64, 1));
        bytes[..4 * 64].fill(0x80);
        let matrix = Matrix::new(&layout, &bytes);
        for (tokens, x) in [(1, -1.0), (1, 1.0), (6, -1.0), (6, 1.0)] {
            let x = vec![x; tokens * 64];
            let exact = reference::matmul(&matrix, &x, tokens);
            for isa in Isa::available() {
                let y = run(&Pool::default().with_isa(isa), &Affine::new(matrix, None), &x);
                for (ours, exact) in y.iter().zip(&exact) {
                    assert!((f64::from(*ours) - exact).abs() < 1e-4 * exact.abs(), "{isa:?}: {ours} {exact}");
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
            let affine = Affine::new(Matrix::new(&layout, &bytes), None);
            let x = random(tokens * cols, 4);
            let pool = Pool::default();
            let alone: Vec<f32> = x.chunks(cols).flat_map(|x| run(&pool, &affine, x)).collect();
            assert_eq!(run(&pool, &affine, &x), alone, "{storage:?}");
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
            let pool = Pool::default();
            let all = run(&pool, &whole, &x);
            let unbiased = run(&pool, &Affine::new(whole.weight, None), &x);
            assert_eq!(all[5], unbiased[5] + whole.bias.unwrap().element(5), "{storage:?}");
            for part in [0..17, 17..40] {
                let wanted: Vec<f32> = all.chunks(rows).flat_map(|row| &row[part.clone()]).copied().collect();
                assert_eq!(run(&pool, &whole.slice(part), &x), wanted, "{storage:?}");
            }
        }
    }

    #[test]
    fn products_of_one_input_are_each_their_own() {
        let (cols, tokens) = (64, 5);
        let x = random(tokens * cols, 8);
        let layouts = [(Storage::Int4, 70), (Storage::Int8, 3)]
            .map(|(storage, rows)| MatrixLayout::new(storage, rows, cols).unwrap());
        let bytes = layouts.each_ref().map(|layout| packed(layout, &random(layout.rows * cols, 9)));
        let [a, b] = [0, 1].map(|at| Affine::new(Matrix::new(&layouts[at], &bytes[at]), None));
        let pool = Pool::default();
        let mut words = vec![0.0; tokens * cols / GROUP_SIZE * GROUP_WORDS];
        let (mut y_a, mut y_b) = (vec![f32::NAN; tokens * 70], vec![f32::NAN; tokens * 3]);
        matmul(&pool, &x, &mut words, [(&a, &mut y_a), (&b, &mut y_b)]);
        assert_eq!((y_a, y_b), (run(&pool, &a, &x), run(&pool, &b, &x)));
    }
}
