//! AVX-512 VNNI: sixteen rows side by side for many tokens.
#![expect(unsafe_code, reason = "vector instructions")]
#![expect(clippy::modulo_one, reason = "what a wider vector has several of, or a narrower one")]

use std::arch::x86_64::{
    __m128i, __m512 as Floats, __m512i as Integers, _mm_set_epi8, _mm_set_epi32, _mm_shuffle_epi8,
    _mm512_add_epi32 as add, _mm512_add_ps as add_floats, _mm512_and_si512 as and, _mm512_broadcast_i32x4 as broadcast,
    _mm512_castsi128_si512, _mm512_castsi512_ps as as_floats, _mm512_cvtepi8_epi32 as extend,
    _mm512_cvtepi32_ps as to_floats, _mm512_dpbusd_epi32 as dot, _mm512_fmadd_ps as multiply_add, _mm512_inserti32x4,
    _mm512_loadu_ps as load_numbers, _mm512_loadu_si512 as load_bytes, _mm512_mul_ps as multiply_floats,
    _mm512_permutexvar_epi32, _mm512_set_epi32, _mm512_set1_epi8 as set_8, _mm512_set1_epi32 as set_32,
    _mm512_set1_ps as set_floats, _mm512_setzero_ps as zero_floats, _mm512_setzero_si512 as zero,
    _mm512_shuffle_epi8 as shuffle, _mm512_shuffle_i32x4, _mm512_slli_epi32 as shift_left,
    _mm512_srli_epi16 as shift_right, _mm512_storeu_ps as store_numbers, _mm512_sub_epi32 as subtract,
    _mm512_unpackhi_epi32 as unpack_high_32, _mm512_unpackhi_epi64 as unpack_high_64,
    _mm512_unpacklo_epi32 as unpack_low_32, _mm512_unpacklo_epi64 as unpack_low_64, _mm512_xor_si512 as xor,
};

use super::packed::{INT4, INT8, NL4, codes_of, copy, kernels, prefetch, sixteen};
use super::{Codes, PARTS, Quantized, ROWS, Row, SPAN, TILE, TOKENS, Token};
use crate::quant::GROUP_SIZE;
use crate::simd::{Isa, Level};

/// Vectors, and tokens, whose sums are held in registers.
const BESIDE: usize = 2;
const TOGETHER: usize = 6;

kernels!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", Level::Avx512, -128, dot, [1, 2, 3, 4, 5]);

/// Columns 0 to 15 and 16 to 31 of four groups of which each vector holds two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn halves(first: Integers, second: Integers) -> [Integers; 2] {
    [_mm512_shuffle_i32x4::<0b10_00_10_00>(first, second), _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second)]
}

/// Each of four numbers four times.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn spread([a, b, c, d]: [i32; 4]) -> Integers {
    let by_four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    _mm512_permutexvar_epi32(by_four, _mm512_castsi128_si512(_mm_set_epi32(d, c, b, a)))
}

/// The sub-scales of four groups of four rows, as `[group][row]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn by_group(sub_scales: [[i8; 4]; ROWS]) -> __m128i {
    let [a, b, c, d] = sub_scales.map(bytemuck::must_cast);
    let by_group = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm_shuffle_epi8(_mm_set_epi32(d, c, b, a), by_group)
}

/// Sixteen bytes of rows `i`, `i + 4`, `i + 8` and `i + 12`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gather(rows: &[Row; 16], i: usize, at: usize) -> Integers {
    let two = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(sixteen(&rows[i], at)), sixteen(&rows[i + 4], at));
    _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(two, sixteen(&rows[i + 8], at)), sixteen(&rows[i + 12], at))
}
