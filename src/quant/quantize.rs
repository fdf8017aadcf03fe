//! Weights and activations into their packed forms.

use std::iter::repeat_with;

use super::groups;
use super::levels::Int4;
use super::nl4::Nl4;
use super::round::round_i8;
use super::{GROUP_SIZE, Matrix, MatrixLayout, Storage, WeightDtype};
use crate::bytes::Bytes;
use crate::pool::Pool;
use crate::simd::vectorized;

/// Bytes of weights that a thread packs at once.
const AT_ONCE: usize = 64 << 10;

/// Weights that cannot be quantized; rows and columns are the slab's.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// NaN or an infinity.
    #[error("row {row}, column {col} is {value}")]
    NotFinite {
        /// Row in the slab.
        row: usize,
        /// Column.
        col: usize,
        /// The value.
        value: f32,
    },
    /// The weights are too large for an f16 scale.
    #[error("row {row} needs a scale of {scale}, which f16 cannot hold")]
    ScaleOverflow {
        /// Row in the slab.
        row: usize,
        /// The scale.
        scale: f32,
    },
}

/// The packed rows of a slab: codes, sub-scales and scales as [`MatrixLayout`] has them, for some of its rows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PackedRows(pub [Vec<u8>; 3]);

impl PackedRows {
    /// Bytes of all sections.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.0.iter().map(|section| section.len() as u64).sum())
    }

    /// Each section with its offset in the matrix, for rows from `row` on.
    pub fn sections(&self, layout: &MatrixLayout, row: usize) -> impl Iterator<Item = (u64, &[u8])> {
        layout.sections(row).into_iter().zip(self.0.iter().map(Vec::as_slice))
    }

    /// All rows of `layout` as one matrix.
    ///
    /// # Panics
    /// It has more rows than are packed.
    pub fn matrix(&self, layout: &MatrixLayout) -> Vec<u8> {
        // As many bytes are packed.
        let offset = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let mut bytes = vec![0; offset(layout.size().0)];
        for (at, section) in self.sections(layout, 0) {
            bytes[offset(at)..][..section.len()].copy_from_slice(section);
        }
        bytes
    }

    /// Room for `rows` rows of `layout`.
    fn resize(&mut self, layout: &MatrixLayout, rows: usize) {
        for (section, bytes) in self.0.iter_mut().zip(layout.row_bytes) {
            section.resize(rows * bytes, 0);
        }
    }
}

/// The sections of so many rows, again and again.
fn split<'a>(
    sections: [&'a mut [u8]; 3],
    layout: &MatrixLayout,
    rows: usize,
) -> impl Iterator<Item = [&'a mut [u8]; 3]> {
    let mut bytes = layout.row_bytes.into_iter();
    // Int8 has no sub-scales.
    let mut pieces = sections.map(|section| section.chunks_mut((rows * bytes.next().unwrap_or(0)).max(1)));
    repeat_with(move || pieces.each_mut().map(|pieces| pieces.next().unwrap_or_default()))
}

/// Quantizes whole rows, `weights` of `[rows][K]` in the checkpoint's dtype,
/// into `packed`, on the threads of `pool`.
///
/// # Panics
/// `layout` is of plain storage, which is copied and not quantized.
pub fn quantize_rows(
    pool: &Pool,
    layout: &MatrixLayout,
    dtype: WeightDtype,
    weights: &[u8],
    packed: &mut PackedRows,
) -> Result<(), QuantizeError> {
    assert!(!matches!(layout.storage, Storage::Plain(_)), "plain storage is copied, not quantized");
    let row_bytes = layout.cols * dtype.size();
    packed.resize(layout, weights.len() / row_bytes);
    let at_once = (AT_ONCE / row_bytes).max(1);
    let sections = split(packed.0.each_mut().map(Vec::as_mut_slice), layout, at_once);
    let pieces = weights.chunks(at_once * row_bytes).zip(sections);
    let mut pieces: Vec<_> = pieces.map(|(weights, sections)| (weights, sections, Ok(()))).collect();
    pool.chunks(&mut pieces, 1, |index, pieces| {
        for (weights, sections, result) in pieces {
            let mut values = vec![0.0; layout.padded_cols];
            let sections = split(sections.each_mut().map(|section| &mut **section), layout, 1);
            let mut rows = (index * at_once..).zip(weights.chunks(row_bytes).zip(sections));
            *result = rows.try_for_each(|(row, (weights, sections))| {
                pack_row(pool.isa(), layout, dtype, weights, row, &mut values, sections)
            });
        }
    });
    pieces.into_iter().try_for_each(|(.., result)| result)
}

vectorized! {
    /// Packs the weights of `row`, which `values` has room for, into its part of each section.
    fn pack_row(
        layout: &MatrixLayout,
        dtype: WeightDtype,
        weights: &[u8],
        row: usize,
        values: &mut [f32],
        sections: [&mut [u8]; 3],
    ) -> Result<(), QuantizeError> {
        let [codes, sub_scales, scale] = sections;
        dtype.decode(weights, &mut values[..layout.cols]);
        let absmax = absmax(values);
        if !absmax.is_finite()
            && let Some(col) = values.iter().position(|value| !value.is_finite())
        {
            return Err(QuantizeError::NotFinite { row, col, value: values[col] });
        }
        let factor = match layout.storage {
            Storage::Int4 => groups::pack_row::<Int4>(values, codes, sub_scales),
            Storage::Nl4 => groups::pack_row::<Nl4>(values, codes, sub_scales),
            Storage::Int8 | Storage::Plain(_) => {
                scale.copy_from_slice(&int8_row(values, absmax, codes).to_le_bytes());
                return Ok(());
            }
        };
        let factor = factor.map_err(|scale| QuantizeError::ScaleOverflow { row, scale })?;
        scale.copy_from_slice(&factor.to_le_bytes());
        Ok(())
    }
}

/// The squared error of rows of `cols` weights in `storage`, and the squared weights.
///
/// # Panics
/// `storage` is plain.
pub fn squared_error(
    pool: &Pool,
    storage: Storage,
    dtype: WeightDtype,
    cols: usize,
    weights: &[u8],
) -> Result<(f64, f64), QuantizeError> {
    let row_bytes = cols * dtype.size();
    let rows = weights.len() / row_bytes;
    let (Some(layout), mut packed) = (MatrixLayout::new(storage, rows, cols), PackedRows::default()) else {
        unreachable!("the rows are in memory")
    };
    quantize_rows(pool, &layout, dtype, weights, &mut packed)?;
    let bytes = packed.matrix(&layout);
    let matrix = Matrix::new(&layout, &bytes);
    let (mut exact, mut values) = (vec![0.0; cols], vec![0.0; cols]);
    let (mut error, mut norm) = (0.0, 0.0);
    for (row, bytes) in weights.chunks(row_bytes).enumerate() {
        dtype.decode(bytes, &mut exact);
        matrix.dequantize_row(row, &mut values);
        for (exact, value) in exact.iter().zip(&values) {
            error += f64::from(exact - value).powi(2);
            norm += f64::from(*exact).powi(2);
        }
    }
    Ok((error, norm))
}

/// The largest magnitude; not finite where a value is not. Magnitudes compare
/// as their bits do, and whole numbers are compared many at once.
#[inline(always)]
fn absmax(values: &[f32]) -> f32 {
    let magnitude = |value: &f32| value.abs().to_bits().cast_signed();
    f32::from_bits(values.iter().fold(0, |max, value| magnitude(value).max(max)).cast_unsigned())
}

/// A row to int8: `scale = absmax / 127`, `q = round(w / scale)`. Returns the scale, 1 for a row of zeros.
#[inline(always)]
fn int8_row(values: &[f32], absmax: f32, codes: &mut [u8]) -> f32 {
    let scale = if absmax > 0.0 { absmax / 127.0 } else { 1.0 };
    // A scale below the smallest normal number would lose its digits; weights there are zero to any purpose.
    let scale = if scale.is_normal() { scale } else { 1.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = round_i8(value / scale).cast_unsigned();
    }
    scale
}

/// Activations to int8 in groups of 32: `scale = absmax / 127` of the group.
///
/// `x` has K elements, `codes` Kp, `scales` Kp/32; codes behind K are zero.
/// A group of zeros has scale 0.
#[inline(always)]
pub fn quantize_activations(x: &[f32], codes: &mut [i8], scales: &mut [f32]) {
    let codes = codes.as_chunks_mut().0;
    let (groups, rest) = x.as_chunks();
    for ((group, codes), scale) in groups.iter().zip(&mut *codes).zip(&mut *scales) {
        *scale = quantize_group(group, codes);
    }
    if let (false, Some(codes), Some(scale)) = (rest.is_empty(), codes.last_mut(), scales.last_mut()) {
        let mut group = [0.0; GROUP_SIZE];
        group[..rest.len()].copy_from_slice(rest);
        *scale = quantize_group(&group, codes);
    }
}

#[inline(always)]
fn quantize_group(group: &[f32; GROUP_SIZE], codes: &mut [i8; GROUP_SIZE]) -> f32 {
    let absmax = absmax(group);
    let inverse = if absmax > 0.0 { 127.0 / absmax } else { 0.0 };
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(group) {
        *code = round_i8(value * inverse);
    }
    absmax / 127.0
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::super::{Matrix, NL4_LEVELS, NL4_UNIT, WeightDtype};
    use super::*;
    use crate::simd::Isa;

    const PACKED: [Storage; 3] = [Storage::Int8, Storage::Int4, Storage::Nl4];

    fn pack(storage: Storage, rows: usize, cols: usize, weights: &[f32]) -> Result<Vec<f32>, QuantizeError> {
        let layout = MatrixLayout::new(storage, rows, cols).unwrap();
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut packed = PackedRows::default();
        quantize_rows(&Pool::default(), &layout, WeightDtype::F32, &bytes, &mut packed)?;
        let matrix = packed.matrix(&layout);
        let matrix = Matrix::new(&layout, &matrix);
        let mut values = vec![0.0; rows * cols];
        for (row, values) in values.chunks_mut(cols).enumerate() {
            matrix.dequantize_row(row, values);
        }
        Ok(values)
    }

    #[test]
    fn zeros_stay_zeros() {
        for storage in PACKED {
            assert_eq!(pack(storage, 2, 40, &[0.0; 80]).unwrap(), [0.0; 80]);
        }
    }

    #[test]
    fn levels_are_kept_exactly() {
        let linear = |k: usize| (k % 16) as f32 - 8.0;
        let cubic = |k: usize| f32::from(NL4_LEVELS[k % 16]) * NL4_UNIT;
        for (storage, level) in [(Storage::Int4, &linear as &dyn Fn(usize) -> f32), (Storage::Nl4, &cubic)] {
            // On the other side of zero, the scale is negative.
            for sign in [1.0, -1.0] {
                let row: Vec<f32> = (0..32).map(|k| sign * level(k)).collect();
                let packed = pack(storage, 1, 32, &row).unwrap();
                let difference = packed.iter().zip(&row).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(difference < 0.01, "{storage:?} {difference}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_named() {
        for (value, text) in [(f32::NAN, "row 1, column 3 is NaN"), (f32::NEG_INFINITY, "row 1, column 3 is -inf")] {
            let mut weights = [1.0; 80];
            weights[43] = value;
            for storage in PACKED {
                assert_eq!(pack(storage, 2, 40, &weights).unwrap_err().to_string(), text);
            }
        }
    }

    #[test]
    fn extremes_of_f32_are_an_error_or_near() {
        assert!(matches!(pack(Storage::Int4, 1, 32, &[3e38; 32]), Err(QuantizeError::ScaleOverflow { row: 0, .. })));
        for storage in PACKED {
            let tiny = pack(storage, 1, 32, &[1e-6; 32]).unwrap();
            assert!(tiny.iter().all(|w| (w - 1e-6).abs() < 1e-7), "{tiny:?}");
            assert!(pack(storage, 1, 32, &[1e-42; 32]).unwrap().iter().all(|w| w.abs() < 1e-6));
        }
        assert!(pack(Storage::Int8, 1, 32, &[3e38; 32]).unwrap().iter().all(|w| (w / 3e38 - 1.0).abs() < 1e-5));
    }

    #[test]
    fn bf16_and_f16_are_read_as_f32_is() {
        let weights: Vec<f32> = (0..64).map(|k| bf16::from_f32((k as f32 * 0.37).sin()).to_f32()).collect();
        let layout = MatrixLayout::new(Storage::Int4, 2, 32).unwrap();
        let run = |dtype, bytes: Vec<u8>| {
            let mut packed = PackedRows::default();
            quantize_rows(&Pool::default(), &layout, dtype, &bytes, &mut packed).unwrap();
            packed
        };
        let f32s = run(WeightDtype::F32, weights.iter().flat_map(|w| w.to_le_bytes()).collect());
        assert_eq!(
            f32s,
            run(WeightDtype::Bf16, weights.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect())
        );
        assert_eq!(f32s, run(WeightDtype::F16, weights.iter().flat_map(|w| f16::from_f32(*w).to_le_bytes()).collect()));
    }

    #[test]
    fn every_processor_packs_the_same_bytes() {
        let weights: Vec<u8> =
            (0..3000u16).flat_map(|k| bf16::from_f32((f32::from(k) * 0.37).sin()).to_le_bytes()).collect();
        for storage in PACKED {
            let layout = MatrixLayout::new(storage, 1, 3000).unwrap();
            let pack = |isa| {
                let mut packed = PackedRows::default();
                packed.resize(&layout, 1);
                let (values, sections) =
                    (&mut vec![0.0; layout.padded_cols], packed.0.each_mut().map(Vec::as_mut_slice));
                pack_row(isa, &layout, WeightDtype::Bf16, &weights, 0, values, sections).unwrap();
                packed
            };
            for isa in Isa::available() {
                assert_eq!(pack(isa), pack(Isa::PORTABLE), "{storage:?} {isa:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn errors_are_bounded(rows in 1usize..4, cols in 1usize..100, seed in any::<u64>()) {
            let mut state = seed | 1;
            let weights: Vec<f32> = (0..rows * cols).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.1
            }).collect();
            // int8: half a step of the row; the others: half the widest step of the group, and what the 8-bit
            // sub-scale and the extreme that the search clips add.
            for (storage, part) in [(Storage::Int8, 0.5 / 127.0), (Storage::Int4, 0.16), (Storage::Nl4, 0.2)] {
                let values = pack(storage, rows, cols, &weights).unwrap();
                for (packed, exact) in values.chunks(cols).zip(weights.chunks(cols)) {
                    let absmax = exact.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                    for (p, e) in packed.iter().zip(exact) {
                        prop_assert!((p - e).abs() <= absmax * part * 1.001 + 1e-9, "{storage:?} {p} {e}");
                    }
                }
            }
        }
    }
}
