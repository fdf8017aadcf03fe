//! AVX2, with AVX-VNNI or without: eight rows side by side for many tokens.
#![expect(unsafe_code, reason = "vector instructions")]
#![expect(clippy::modulo_one, reason = "what a wider vector has several of, or a narrower one")]
#![allow(clippy::wildcard_imports, reason = "two kinds share what is named here")]

use std::arch::x86_64::{
    __m128i, __m256 as Floats, __m256i as Integers, _mm_set_epi8, _mm_set1_epi32, _mm256_abs_epi8,
    _mm256_add_epi32 as add, _mm256_add_ps as add_floats, _mm256_and_si256 as and,
    _mm256_broadcastsi128_si256 as broadcast, _mm256_castsi256_ps as as_floats, _mm256_cvtepi8_epi32 as extend,
    _mm256_cvtepi32_ps as to_floats, _mm256_dpbusd_avx_epi32 as dot_vnni, _mm256_fmadd_ps as multiply_add,
    _mm256_loadu_ps as load_numbers, _mm256_loadu_si256 as load_bytes, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps as multiply_floats, _mm256_permute2x128_si256, _mm256_set_m128i, _mm256_set1_epi8 as set_8,
    _mm256_set1_epi16, _mm256_set1_epi32 as set_32, _mm256_set1_ps as set_floats, _mm256_setzero_ps as zero_floats,
    _mm256_setzero_si256 as zero, _mm256_shuffle_epi8 as shuffle, _mm256_sign_epi8, _mm256_slli_epi32 as shift_left,
    _mm256_srli_epi16 as shift_right, _mm256_storeu_ps as store_numbers, _mm256_sub_epi32 as subtract,
    _mm256_unpackhi_epi32 as unpack_high_32, _mm256_unpackhi_epi64 as unpack_high_64,
    _mm256_unpacklo_epi32 as unpack_low_32, _mm256_unpacklo_epi64 as unpack_low_64, _mm256_xor_si256 as xor,
};

use super::packed::{INT4, INT8, NL4, codes_of, copy, kernels, prefetch, sixteen};
use super::{Codes, PARTS, Quantized, ROWS, Row, SPAN, TILE, TOKENS, Token};
use crate::quant::GROUP_SIZE;
use crate::simd::{Isa, Level};

/// Vectors, and tokens, whose sums are held in registers.
const BESIDE: usize = 1;
const TOGETHER: usize = 4;

pub mod plain {
    use super::*;
    kernels!("avx2,fma", Level::Avx2, 0, dot_plain, [1, 2, 3]);
}

pub mod vnni {
    use super::*;
    kernels!("avx2,fma,avxvnni", Level::AvxVnni, -128, dot_vnni, [1, 2, 3]);
}

/// One side has to be positive: that of the levels, which a file may hold down to −128. No pair of
/// products is beyond i16.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dot_plain(sums: Integers, levels: Integers, x: Integers) -> Integers {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(x, levels));
    add(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Columns 0 to 15 and 16 to 31 of two groups.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn halves(first: Integers, second: Integers) -> [Integers; 2] {
    [_mm256_permute2x128_si256::<0x20>(first, second), _mm256_permute2x128_si256::<0x31>(first, second)]
}

/// Each of two numbers four times.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn spread([a, b]: [i32; 2]) -> Integers {
    _mm256_set_m128i(_mm_set1_epi32(b), _mm_set1_epi32(a))
}

/// The sub-scales of two groups of four rows, as `[group][row]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn by_group([a, b, c, d]: [[i8; 2]; ROWS]) -> __m128i {
    _mm_set_epi8(0, 0, 0, 0, 0, 0, 0, 0, d[1], c[1], b[1], a[1], d[0], c[0], b[0], a[0])
}

/// Sixteen bytes of rows `i` and `i + 4`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn gather(rows: &[Row; 8], i: usize, at: usize) -> Integers {
    _mm256_set_m128i(sixteen(&rows[i + 4], at), sixteen(&rows[i], at))
}
