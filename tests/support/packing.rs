//! Packing on a GPU: the host's bytes.

use std::sync::Arc;

use evenkeel::backend::cuda::{DeviceMatrix, Gpu};
use evenkeel::pool::Pool;
use evenkeel::quant::{MatrixLayout, PackedRows, Storage, WeightDtype, quantize_rows};

use super::{DTYPES, buffer, download, encode, random, upload};

/// Quantizes `weights` from row `first` of a matrix on; gives the rows, and whether it failed.
fn quantized(
    gpu: &Arc<Gpu>,
    layout: &MatrixLayout,
    first: usize,
    dtype: WeightDtype,
    bytes: &[u8],
) -> (PackedRows, bool) {
    let rows = bytes.len() / (layout.cols * dtype.size());
    let region = buffer(gpu, layout.size().as_usize().unwrap());
    let failed = upload(gpu, &[0; 4]);
    let matrix = DeviceMatrix::new(layout.clone(), region.clone());
    gpu.quantize(&matrix, first, rows, dtype, &upload(gpu, bytes), &failed).unwrap();
    let packed = [0, 1, 2].map(|section| {
        let mut bytes = vec![0; rows * layout.row_bytes[section]];
        if !bytes.is_empty() {
            region.part(layout.sections(first)[section] as usize, bytes.len()).read(&mut bytes).unwrap();
        }
        bytes
    });
    (PackedRows(packed), download(&failed, WeightDtype::F32)[0].to_bits() != 0)
}

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
                    same(gpu, storage, first, rows, cols, dtype, &weights);
                }
            }
            for cols in [5, 32, 96] {
                for (at, weights) in corners(cols).into_iter().enumerate() {
                    same(gpu, storage, at, 1, cols, dtype, &weights);
                }
            }
        }
    }
}

fn same(gpu: &Arc<Gpu>, storage: Storage, first: usize, rows: usize, cols: usize, dtype: WeightDtype, weights: &[f32]) {
    let what = format!("{storage:?} from {dtype:?}, {rows} rows of {cols} from row {first}");
    let layout = MatrixLayout::new(storage, first + rows + 1, cols).unwrap();
    let bytes = encode(dtype, weights);
    let mut host = PackedRows::default();
    quantize_rows(&Pool::default(), &layout, dtype, &bytes, &mut host).unwrap();
    let (ours, failed) = quantized(gpu, &layout, first, dtype, &bytes);
    assert!(!failed, "{what}");
    for (at, section) in ["codes", "sub-scales", "scales"].into_iter().enumerate().rev() {
        assert_eq!(ours.0[at], host.0[at], "{what}: {section}");
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
        let (_, failed) = quantized(gpu, &layout, 0, WeightDtype::F32, &encode(WeightDtype::F32, &weights));
        assert!(failed, "{storage:?} {value}");
    }
}
