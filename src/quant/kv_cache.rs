//! How keys and values are stored while a text grows.
//!
//! A head's vector of a token is stored as its elements; in 8 bits also with
//! one f32 scale, its largest magnitude over 127, in a section behind all codes.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::WeightDtype;
use crate::name::named;

/// The type of the elements of a KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32 bits, as the activations of the CPU.
    F32,
    /// 16 bits, 11 of precision.
    #[default]
    F16,
    /// 16 bits with the range of f32, 8 of precision.
    Bf16,
    /// 8 bits, a scale for each head's vector.
    Int8,
}

impl KvDtype {
    /// Bytes of a head's vector of `head_dim` elements without its scale.
    pub fn code_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => head_dim * 4,
            Self::F16 | Self::Bf16 => head_dim * 2,
            Self::Int8 => head_dim,
        }
    }

    /// Bytes of its scale.
    pub fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 0,
            Self::Int8 => size_of::<f32>(),
        }
    }

    /// Stores `vector`; returns its scale, which is 1 where there is none to store.
    pub fn encode(self, vector: &[f32], codes: &mut [u8]) -> f32 {
        match self {
            Self::F32 => bytemuck::cast_slice_mut(codes).copy_from_slice(vector),
            Self::F16 => bytemuck::cast_slice_mut::<_, f16>(codes).convert_from_f32_slice(vector),
            Self::Bf16 => bytemuck::cast_slice_mut::<_, bf16>(codes).convert_from_f32_slice(vector),
            Self::Int8 => {
                let largest = vector.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
                for (code, x) in bytemuck::cast_slice_mut::<_, i8>(codes).iter_mut().zip(vector) {
                    // Rounding keeps |x / scale| at 127 or below; a value that is not a number becomes 0.
                    #[expect(clippy::cast_possible_truncation, reason = "a saturating cast")]
                    let rounded = (x / scale).round() as i8;
                    *code = rounded;
                }
                return scale;
            }
        }
        1.0
    }

    /// Reads what [`KvDtype::encode`] stored.
    #[inline(always)]
    pub fn decode(self, codes: &[u8], scale: f32, vector: &mut [f32]) {
        match self {
            Self::F32 => WeightDtype::F32.decode(codes, vector),
            Self::F16 => WeightDtype::F16.decode(codes, vector),
            Self::Bf16 => WeightDtype::Bf16.decode(codes, vector),
            Self::Int8 => {
                for (x, code) in vector.iter_mut().zip(codes) {
                    *x = f32::from(code.cast_signed()) * scale;
                }
            }
        }
    }
}

named!(KvDtype, "a type of a KV cache", {
    F32 => "f32",
    F16 => "f16",
    Bf16 => "bf16",
    Int8 => "int8",
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_read_within_its_precision() {
        let vector: Vec<f32> = (0..40u8).map(|i| (f32::from(i) - 17.0) * 0.37).collect();
        let largest = 8.14f32;
        for (dtype, error) in [
            (KvDtype::F32, 0.0),
            (KvDtype::F16, largest / 2048.0),
            (KvDtype::Bf16, largest / 256.0),
            (KvDtype::Int8, largest / 127.0 / 2.0 * 1.001),
        ] {
            // Cells of four bytes, as a cache's pages are aligned.
            let mut cells = vec![0u32; dtype.code_bytes(vector.len()).div_ceil(4)];
            let codes: &mut [u8] = bytemuck::cast_slice_mut(&mut cells);
            let scale = dtype.encode(&vector, codes);
            let mut read = vec![0.0; vector.len()];
            dtype.decode(codes, scale, &mut read);
            for (read, x) in read.iter().zip(&vector) {
                assert!((read - x).abs() <= error, "{dtype}: {read} for {x}");
            }
            assert_eq!(dtype.name().parse::<KvDtype>().unwrap(), dtype);
        }
        assert_eq!(KvDtype::Int8.encode(&[0.0; 4], &mut [9; 4]), 1.0);
    }
}
