//! The canonical packing: where codes and scales of a matrix stand.
//!
//! A matrix of N rows and K columns is one run of bytes in up to three
//! sections, each starting on a multiple of [`ALIGNMENT`]:
//!
//! | section | `int8` | `int4`, `nl4` | plain |
//! | --- | --- | --- | --- |
//! | codes | i8 `[N][Kp]` | u8 `[N][Kp/2]` | elements `[N][K]` |
//! | sub-scales | | i8 `[N][Kp/32]` | |
//! | scales | f32 `[N]` | f16 `[N]` | |
//!
//! Kp is K rounded up to a multiple of [`GROUP_SIZE`]; the columns between hold
//! zero. A group of four-bit codes takes 16 bytes: byte j holds column j in its low half
//! and column j + 16 in its high half.

use std::array::from_fn;

use half::f16;

use super::{NL4_LEVELS, NL4_UNIT, Storage};
use crate::bytes::Bytes;

/// Every section, and every matrix in an arena, starts on a multiple of this many bytes.
pub const ALIGNMENT: u64 = PACKED_ROW as u64;
/// Bytes of a packed matrix that count as one row of what a checkpoint stores.
pub const PACKED_ROW: usize = 64;
/// Columns that share a sub-scale.
pub const GROUP_SIZE: usize = 32;

/// Where the sections of a matrix stand, from the start of the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixLayout {
    /// How it is stored.
    pub storage: Storage,
    /// Number of rows, N.
    pub rows: usize,
    /// Number of columns, K.
    pub cols: usize,
    /// Number of columns with padding, Kp.
    pub padded_cols: usize,
    /// Bytes of a row's codes, of its sub-scales and of its scale: 0 where the storage has none.
    pub row_bytes: [usize; 3],
    starts: [u64; 3],
    size: u64,
}

impl MatrixLayout {
    /// The layout of an N × K matrix; `None` where its size is beyond 2^63 bytes.
    pub fn new(storage: Storage, rows: usize, cols: usize) -> Option<Self> {
        let padded_cols = match storage {
            Storage::Plain(_) => cols,
            Storage::Int8 | Storage::Int4 | Storage::Nl4 => cols.checked_next_multiple_of(GROUP_SIZE)?,
        };
        let row_bytes = match storage {
            Storage::Plain(dtype) => [cols.checked_mul(dtype.size())?, 0, 0],
            Storage::Int8 => [padded_cols, 0, size_of::<f32>()],
            Storage::Int4 | Storage::Nl4 => [padded_cols / 2, padded_cols / GROUP_SIZE, size_of::<f16>()],
        };
        let (mut starts, mut size) = ([0; 3], 0u64);
        for (start, row) in starts.iter_mut().zip(row_bytes) {
            *start = size;
            let bytes = (row as u64).checked_mul(rows as u64)?;
            size = size.checked_add(bytes)?.checked_next_multiple_of(ALIGNMENT)?;
        }
        (size <= i64::MAX.unsigned_abs()).then_some(Self { storage, rows, cols, padded_cols, row_bytes, starts, size })
    }

    /// Bytes of the whole matrix, padding included; a multiple of [`ALIGNMENT`].
    pub fn size(&self) -> Bytes {
        Bytes(self.size)
    }

    /// The first row whose scale is not finite, of the scales that stand in `bytes`, which begin
    /// at `offset` of the matrix; both are whole multiples of [`ALIGNMENT`].
    pub fn broken_scale(&self, offset: u64, bytes: &[u8]) -> Option<usize> {
        let ([.., start], [.., width]) = (self.starts, self.row_bytes);
        let end = start + (self.rows * width) as u64;
        let (from, to) = (offset.max(start), (offset + bytes.len() as u64).min(end));
        if from >= to {
            return None;
        }
        // Both lie between the ends of `bytes`, and rows are a usize.
        #[expect(clippy::cast_possible_truncation, reason = "offsets into `bytes`, and a row")]
        let (scales, first) =
            (&bytes[(from - offset) as usize..(to - offset) as usize], (from - start) as usize / width);
        scales.chunks(width).position(|bytes| !scale(bytes).is_finite()).map(|at| first + at)
    }

    /// Offsets of the codes, the sub-scales and the scale of `row`.
    pub fn sections(&self, row: usize) -> [u64; 3] {
        from_fn(|at| self.starts[at] + (row * self.row_bytes[at]) as u64)
    }
}

/// A scale by its bytes; 1 where there is none.
fn scale(bytes: &[u8]) -> f32 {
    match *bytes {
        [a, b] => f16::from_le_bytes([a, b]).to_f32(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => 1.0,
    }
}

/// A packed matrix: its layout and its bytes.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Where the sections stand.
    pub layout: &'a MatrixLayout,
    bytes: &'a [u8],
}

impl AsRef<MatrixLayout> for Matrix<'_> {
    fn as_ref(&self) -> &MatrixLayout {
        self.layout
    }
}

impl<'a> Matrix<'a> {
    /// # Panics
    /// `bytes` is shorter than the layout's size: the arena was made for another layout.
    pub fn new(layout: &'a MatrixLayout, bytes: &'a [u8]) -> Self {
        assert!(bytes.len() as u64 >= layout.size, "an arena is shorter than the matrices in it");
        Self { layout, bytes }
    }

    /// What `row` has in the section at this place among codes, sub-scales and scales.
    fn section(&self, at: usize, row: usize) -> &'a [u8] {
        // The whole matrix lies in `bytes`, whose length is a usize.
        #[expect(clippy::cast_possible_truncation, reason = "an offset into `bytes`")]
        let start = self.layout.sections(row)[at] as usize;
        &self.bytes[start..start + self.layout.row_bytes[at]]
    }

    /// The codes of `row`; for plain storage its elements.
    pub fn codes(&self, row: usize) -> &'a [u8] {
        self.section(0, row)
    }

    /// The sub-scales of `row`, one a group.
    pub fn sub_scales(&self, row: usize) -> &'a [i8] {
        bytemuck::must_cast_slice(self.section(1, row))
    }

    /// The scale of `row`; 1 for plain storage.
    pub fn scale(&self, row: usize) -> f32 {
        scale(self.section(2, row))
    }

    /// The element at `col` of a plain vector.
    pub fn element(&self, col: usize) -> f32 {
        let mut value = [0.0];
        self.elements(col, &mut value);
        value[0]
    }

    /// The elements from `col` on of a plain vector.
    pub fn elements(&self, col: usize, values: &mut [f32]) {
        if let Storage::Plain(dtype) = self.layout.storage {
            dtype.decode(&self.codes(0)[col * dtype.size()..][..values.len() * dtype.size()], values);
        }
    }

    /// The dequantized weights of `row` into `values`, K of them.
    pub fn dequantize_row(&self, row: usize, values: &mut [f32]) {
        debug_assert_eq!(values.len(), self.layout.cols);
        let codes = self.codes(row);
        match self.layout.storage {
            Storage::Plain(dtype) => dtype.decode(codes, values),
            Storage::Int8 => {
                let scale = self.scale(row);
                for (value, code) in values.iter_mut().zip(bytemuck::must_cast_slice::<u8, i8>(codes)) {
                    *value = scale * f32::from(*code);
                }
            }
            Storage::Int4 | Storage::Nl4 => {
                let level = |code: u8| match self.layout.storage {
                    Storage::Nl4 => f32::from(NL4_LEVELS[usize::from(code)]) * NL4_UNIT,
                    _ => f32::from(code) - 8.0,
                };
                let scale = self.scale(row);
                let groups = codes.chunks_exact(GROUP_SIZE / 2).zip(self.sub_scales(row));
                for (values, (codes, sub_scale)) in values.chunks_mut(GROUP_SIZE).zip(groups) {
                    let scale = scale * f32::from(*sub_scale);
                    for (k, value) in values.iter_mut().enumerate() {
                        *value = scale * level(code(codes, k));
                    }
                }
            }
        }
    }
}

/// The code of column `k` of a group's 16 bytes, 0..16.
fn code(group: &[u8], k: usize) -> u8 {
    let byte = group[k % (GROUP_SIZE / 2)];
    if k < GROUP_SIZE / 2 { byte & 0x0f } else { byte >> 4 }
}

#[cfg(test)]
mod tests {
    use super::super::WeightDtype;
    use super::*;

    #[test]
    fn sizes_by_hand() {
        for (storage, rows, cols, size) in [
            (Storage::Plain(WeightDtype::Bf16), 3, 5, 64),
            (Storage::Plain(WeightDtype::F32), 4096, 4096, 4096 * 4096 * 4),
            (Storage::Int8, 4096, 4096, 4096 * 4096 + 4096 * 4),
            (Storage::Int8, 3, 33, 192 + 64),
            (Storage::Int4, 4096, 4096, 4096 * 2048 + 4096 * 128 + 4096 * 2),
            (Storage::Int4, 2, 40, 64 + 64 + 64),
            (Storage::Nl4, 2, 40, 64 + 64 + 64),
            (Storage::Int4, 0, 0, 0),
        ] {
            let layout = MatrixLayout::new(storage, rows, cols).unwrap();
            assert_eq!(layout.size(), Bytes(size), "{storage:?} {rows} × {cols}");
        }
    }

    #[test]
    fn sizes_beyond_the_address_space_are_none() {
        assert_eq!(MatrixLayout::new(Storage::Int8, usize::MAX, 64), None);
        assert_eq!(MatrixLayout::new(Storage::Int8, 1, usize::MAX), None);
        assert_eq!(MatrixLayout::new(Storage::Plain(WeightDtype::F32), usize::MAX / 2, usize::MAX / 2), None);
    }
}
