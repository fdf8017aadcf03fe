//! Packing on a GPU: the host's bytes.

use std::sync::Arc;

use evenkeel::backend::cuda::Gpu;
use evenkeel::quant::{MatrixLayout, Storage, WeightDtype};
use evenkeel::verify;

use super::{DTYPES, encode, random};

/// Rows that try the corners of the search: zeros, ties, extremes and numbers of every size.
fn corners(cols: usize) -> Vec<Vec<f32>> {
    let row = |f: &dyn Fn(usize) -> f32| (0..cols).map(f).collect();
    vec![
        row(&|_| 0.0),
        row(&|k| if k == cols / 2 { -3.0 } else { 0.0 }),
        row(&|k| (k % 16) as f32 - 8.0),
        row(&|k| (k % 31) as f32 * 0.5),
        row(&|_| 1e-6),
        row(&|k| if k % 2 == 0 { 1e-42 } else { 0.0 }),
        row(&|k| (k as f32 * 0.37).sin() * 10f32.powf((k % 9) as f32 - 5.0)),
        row(&|k| (k as f32 * 0.61).cos() * 3000.0),
        row(&|k| -0.0 * k as f32),
    ]
}

pub fn quantizing_is_bit_for_bit_the_hosts(gpu: &Arc<Gpu>) {
    for storage in [Storage::Int8, Storage::Int4, Storage::Nl4] {
        for dtype in DTYPES {
            for (rows, cols) in [(1, 1), (3, 5), (7, 31), (2, 32), (3, 33), (5, 100), (2, 768), (1, 5000)] {
                for (first, weights) in
                    [(0, random(rows * cols, 1)), (4, random(rows * cols, 2).iter().map(|w| w * w * w).collect())]
                {
                    verify::quantized(gpu, storage, (first, cols), dtype, &weights).unwrap();
                }
            }
            for cols in [5, 32, 96] {
                for (at, weights) in corners(cols).into_iter().enumerate() {
                    verify::quantized(gpu, storage, (at, cols), dtype, &weights).unwrap();
                }
            }
        }
    }
}

pub fn what_cannot_be_packed_is_noticed(gpu: &Arc<Gpu>) {
    for (storage, value) in [
        (Storage::Int8, f32::NAN),
        (Storage::Int8, f32::INFINITY),
        (Storage::Int4, f32::NAN),
        (Storage::Int4, f32::NEG_INFINITY),
        (Storage::Int4, 3e38),
        (Storage::Nl4, f32::NAN),
        (Storage::Nl4, f32::INFINITY),
        (Storage::Nl4, 3e38),
    ] {
        let (rows, cols) = (3, 70);
        let mut weights = random(rows * cols, 3);
        weights[cols + 66] = value;
        let layout = MatrixLayout::new(storage, rows, cols).unwrap();
        let bytes = encode(WeightDtype::F32, &weights);
        let (_, failed) = verify::pack(gpu, &layout, 0, WeightDtype::F32, &bytes).unwrap();
        assert!(failed, "{storage:?} {value}");
    }
}
