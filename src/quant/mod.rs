//! Quantized formats: what they are, how they are packed, how weights get into
//! them, and the scalar reference that judges every kernel.
//!
//! | scheme | a weight is | bits a weight, K columns |
//! | --- | --- | --- |
//! | `int8` | `scale[row] * q`, q in −127..=127 | 8 + 32/K |
//! | `int4` | `scale[row] * sub_scale[row][k/32] * (q − 8)`, q in 0..16 | 4.25 + 16/K |
//! | `nl4` | `scale[row] * sub_scale[row][k/32] * level[q]`, 16 levels on a cubic | 4.25 + 16/K |
//! | `none` | as the checkpoint stores it | 16 or 32 |

mod groups;
mod kv_cache;
mod layout;
mod levels;
mod nl4;
mod quantize;
pub mod reference;
mod round;
mod rules;

use half::bf16;
use safetensors::Dtype;

use crate::name::named;

pub use kv_cache::KvDtype;
pub use layout::{ALIGNMENT, GROUP_SIZE, Matrix, MatrixLayout, PACKED_ROW};
pub use nl4::{NL4_LEVELS, NL4_UNIT};
pub use quantize::{PackedRows, QuantizeError, quantize_activations, quantize_rows, squared_error};
pub(crate) use round::ROUND;
pub use rules::QuantizeRules;

/// How the weights of a module are to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// As the checkpoint stores them.
    None,
    /// 8 bits, one scale per output row.
    Int8,
    /// 4 bits, a scale per group of 32 along a row.
    Int4,
    /// As many bits, on levels that are finer near zero.
    Nl4,
}

impl Scheme {
    /// Those that every device computes, most bits first; a plan chooses among them.
    pub const AUTOMATIC: [Self; 3] = [Self::None, Self::Int8, Self::Int4];
}

named!(Scheme, "a scheme", {
    None => "none",
    Int8 => "int8",
    Int4 => "int4",
    Nl4 => "nl4",
});

/// The dtypes that a checkpoint's weights may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl WeightDtype {
    /// What weights that a checkpoint stores as `dtype` are taken as: f64 becomes f32.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 | Dtype::F64 => Some(Self::F32),
            _ => None,
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Reads little-endian elements into `values`; both have as many elements.
    #[inline(always)]
    pub fn decode(self, bytes: &[u8], values: &mut [f32]) {
        debug_assert_eq!(bytes.len(), values.len() * self.size());
        let pairs = || bytes.as_chunks::<2>().0.iter();
        match self {
            Self::Bf16 => {
                for (bytes, value) in pairs().zip(values) {
                    *value = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
            Self::F16 => {
                for (bytes, value) in pairs().zip(values) {
                    *value = f16_to_f32(u16::from_le_bytes(*bytes));
                }
            }
            Self::F32 => {
                for (bytes, value) in bytes.as_chunks::<4>().0.iter().zip(values) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
        }
    }
}

/// Turns the f64 in `bytes`, little-endian, into f32 at their beginning. Returns their bytes.
pub fn narrow(bytes: &mut [u8]) -> usize {
    const WIDE: usize = size_of::<f64>();
    const NARROW: usize = size_of::<f32>();
    let count = bytes.len() / WIDE;
    for at in 0..count {
        let Some(wide) = bytes[at * WIDE..].first_chunk::<WIDE>() else { break };
        #[expect(clippy::cast_possible_truncation, reason = "rounded on purpose, as PyTorch does")]
        let value = f64::from_le_bytes(*wide) as f32;
        bytes[at * NARROW..][..NARROW].copy_from_slice(&value.to_le_bytes());
    }
    count * NARROW
}

/// The value of an f16 by its bits, in steps that are the same for every value: the exponent
/// is moved to where f32 has it and its bias made up for, which is exact.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    const INFINITE: u32 = 0x7c00;
    let (sign, magnitude) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    let finite = (f32::from_bits(magnitude << 13) * BIAS).to_bits();
    let value = if magnitude < INFINITE { finite } else { magnitude << 13 | f32::INFINITY.to_bits() };
    f32::from_bits(sign | value)
}

/// How one matrix or vector is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Elements of a dtype, row after row.
    Plain(WeightDtype),
    /// [`Scheme::Int8`].
    Int8,
    /// [`Scheme::Int4`].
    Int4,
    /// [`Scheme::Nl4`].
    Nl4,
}

impl Storage {
    /// What `scheme` makes of weights that the checkpoint stores as `dtype`.
    pub fn of(scheme: Scheme, dtype: WeightDtype) -> Self {
        Self::packed(scheme).unwrap_or(Self::Plain(dtype))
    }

    /// What `scheme` packs weights into; `None` where it leaves them as they are.
    pub fn packed(scheme: Scheme) -> Option<Self> {
        match scheme {
            Scheme::None => None,
            Scheme::Int8 => Some(Self::Int8),
            Scheme::Int4 => Some(Self::Int4),
            Scheme::Nl4 => Some(Self::Nl4),
        }
    }

    /// Its name: that of the scheme or of the dtype.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain(WeightDtype::Bf16) => "bf16",
            Self::Plain(WeightDtype::F16) => "f16",
            Self::Plain(WeightDtype::F32) => "f32",
            Self::Int8 => Scheme::Int8.name(),
            Self::Int4 => Scheme::Int4.name(),
            Self::Nl4 => Scheme::Nl4.name(),
        }
    }

    /// Bytes of a row of `cols` columns as a checkpoint stores it. What is packed is stored whole,
    /// as [`MatrixLayout`] has it, in rows of [`PACKED_ROW`] bytes.
    pub fn stored_row(self, cols: usize) -> usize {
        match self {
            Self::Plain(dtype) => cols * dtype.size(),
            Self::Int8 | Self::Int4 | Self::Nl4 => PACKED_ROW,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_is_read_exactly() {
        for bits in 0..=u16::MAX {
            let (value, wanted) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(value.to_bits() == wanted.to_bits() || value.is_nan() && wanted.is_nan(), "{bits:#x}");
        }
    }
}
