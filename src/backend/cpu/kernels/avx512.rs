//! AVX-512 VNNI: sixteen rows side by side for many tokens.
//!
//! `vpdpbusd` wants one side unsigned: levels are taken with an offset, of which the sum of the
//! activations times that offset is taken away again.
#![expect(unsafe_code, reason = "vector instructions")]
#![allow(clippy::wildcard_imports, reason = "their names say where they are from")]

use std::arch::x86_64::*;

use super::{Codes, PARTS, Quantized, ROWS, Row, SPAN, TILE, Token, prefetch};
use crate::quant::GROUP_SIZE;
use crate::simd::{Isa, Level};

/// Lanes of a vector of 32-bit numbers.
const LANES: usize = 16;
/// Vectors of a tile's rows.
const VECTORS: usize = TILE / LANES;
/// Steps of four columns in a group.
const STEPS: usize = GROUP_SIZE / 4;
/// Tokens whose sums are held in registers.
const BLOCK: usize = 6;

/// What is added to make levels unsigned.
const OFFSET: i32 = 128;

/// Unpacked codes of a span of groups: `[groups][steps][vectors][rows][4]`.
#[repr(align(64))]
struct Tile {
    codes: [[[[u8; 64]; VECTORS]; STEPS]; SPAN],
    scales: [[[f32; LANES]; VECTORS]; SPAN],
}

pub fn few(isa: Isa, codes: Codes, rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
    assert_eq!(isa.level(), Level::Avx512);
    // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
    unsafe {
        match codes {
            Codes::Int8 => few_of::<INT8>(rows, x),
            Codes::Int4 => few_of::<INT4>(rows, x),
            Codes::Nl4 => few_of::<NL4>(rows, x),
        }
    }
}

pub fn many(isa: Isa, codes: Codes, rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
    assert_eq!(isa.level(), Level::Avx512);
    // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
    unsafe {
        match codes {
            Codes::Int8 => many_of::<INT8>(rows, x, totals),
            Codes::Int4 => many_of::<INT4>(rows, x, totals),
            Codes::Nl4 => many_of::<NL4>(rows, x, totals),
        }
    }
}

const INT8: u8 = 0;
const INT4: u8 = 1;
const NL4: u8 = 2;

const fn codes_of(kind: u8) -> Codes {
    match kind {
        INT8 => Codes::Int8,
        INT4 => Codes::Int4,
        _ => Codes::Nl4,
    }
}

/// Bytes of four groups of codes.
const fn chunk_bytes(kind: u8) -> usize {
    PARTS * codes_of(kind).group_bytes()
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: a reference to as many bytes; no alignment is asked for.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// The levels of four groups plus an offset: columns 0 to 15 of each, and 16 to 31.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn levels<const KIND: u8>(chunk: &[u8]) -> [__m512i; 2] {
    let chunk = chunk.as_chunks::<64>().0;
    if KIND == INT8 {
        let offset = _mm512_set1_epi8(-128);
        let [low, high] = halves(load(&chunk[0]), load(&chunk[1]));
        return [_mm512_xor_si512(low, offset), _mm512_xor_si512(high, offset)];
    }
    let mask = _mm512_set1_epi8(0x0f);
    let bytes = load(&chunk[0]);
    let (low, high) = (_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask));
    if KIND == INT4 {
        return [low, high];
    }
    let table = table::<KIND>();
    [_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high)]
}

/// The levels of four-bit codes plus [`OFFSET`], in each quarter.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn table<const KIND: u8>() -> __m512i {
    let levels = const { codes_of(KIND).levels() };
    // SAFETY: a reference to as many bytes.
    let levels = unsafe { _mm_loadu_si128(levels.as_ptr().cast()) };
    _mm512_xor_si512(_mm512_broadcast_i32x4(levels), _mm512_set1_epi8(-128))
}

/// Columns 0 to 15 and 16 to 31 of four groups of which each vector holds two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn halves(first: __m512i, second: __m512i) -> [__m512i; 2] {
    [_mm512_shuffle_i32x4::<0b10_00_10_00>(first, second), _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second)]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn few_of<const KIND: u8>(rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
    let chunk = const { chunk_bytes(KIND) };
    let whole = x.groups() / PARTS;
    let mut sums = _mm512_setzero_ps();
    for at in 0..whole {
        let groups = at * PARTS..(at + 1) * PARTS;
        let (mut codes, mut sub_scales) = ([[].as_slice(); ROWS], [[1; PARTS]; ROWS]);
        prefetch(rows, chunk / PARTS, at * ROWS * chunk, ROWS * chunk);
        for (i, row) in rows.iter().enumerate() {
            codes[i] = &row.codes[at * chunk..][..chunk];
            if KIND != INT8 {
                sub_scales[i] = four(&row.sub_scales[groups.clone()]);
            }
        }
        sums = chunk_of::<KIND>(
            codes,
            sub_scales,
            &x.codes[groups.clone()],
            four(&x.scales[groups.clone()]),
            four(&x.sums[groups]),
            sums,
        );
    }
    if whole * PARTS < x.groups() {
        // The groups that are missing to four have scales of zero.
        let mut codes = [[0u8; 2 * 64]; ROWS];
        let (mut sub_scales, mut x_codes) = ([[0i8; PARTS]; ROWS], [[[0i8; 4]; STEPS]; PARTS]);
        let (mut scales, mut x_sums) = ([0.0f32; PARTS], [0i32; PARTS]);
        for (row, (codes, sub_scales)) in rows.iter().zip(codes.iter_mut().zip(&mut sub_scales)) {
            copy(&row.codes[whole * chunk..], codes);
            if KIND == INT8 { *sub_scales = [1; PARTS] } else { copy(&row.sub_scales[whole * PARTS..], sub_scales) }
        }
        copy(&x.codes[whole * PARTS..], &mut x_codes);
        copy(&x.scales[whole * PARTS..], &mut scales);
        copy(&x.sums[whole * PARTS..], &mut x_sums);
        let codes = codes.each_ref().map(|codes| &codes[..chunk]);
        sums = chunk_of::<KIND>(codes, sub_scales, &x_codes, scales, x_sums, sums);
    }
    let parts = [
        _mm512_castps512_ps128(sums),
        _mm512_extractf32x4_ps::<1>(sums),
        _mm512_extractf32x4_ps::<2>(sums),
        _mm512_extractf32x4_ps::<3>(sums),
    ];
    let total = _mm_add_ps(_mm_add_ps(_mm_add_ps(parts[0], parts[1]), parts[2]), parts[3]);
    let mut totals = [0.0; ROWS];
    // SAFETY: a reference to as many numbers.
    unsafe { _mm_storeu_ps(totals.as_mut_ptr(), total) };
    totals
}

/// Four groups of four rows; the sums are `[part][row]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn chunk_of<const KIND: u8>(
    codes: [&[u8]; ROWS],
    sub_scales: [[i8; PARTS]; ROWS],
    x_codes: &[[[i8; 4]; STEPS]],
    x_scales: [f32; PARTS],
    x_sums: [i32; PARTS],
    sums: __m512,
) -> __m512 {
    // Each of four numbers four times.
    let spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    let x_bytes: &[u8] = bytemuck::must_cast_slice(x_codes.as_flattened().as_flattened());
    let x_bytes = x_bytes.as_chunks::<64>().0;
    let [low_x, high_x] = halves(load(&x_bytes[0]), load(&x_bytes[1]));
    let mut dots = [_mm512_setzero_si512(); ROWS];
    for (dots, codes) in dots.iter_mut().zip(codes) {
        let [low, high] = levels::<KIND>(codes);
        *dots = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(*dots, low, low_x), high, high_x);
    }
    let [a, b, c, d] = dots;
    // Four sums of each row and group become one.
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let dots = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let [s0, s1, s2, s3] = x_sums;
    let x_sums = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(_mm_set_epi32(s3, s2, s1, s0)));
    let offset = if KIND == INT4 { _mm512_slli_epi32::<3>(x_sums) } else { _mm512_slli_epi32::<7>(x_sums) };
    let dots = _mm512_cvtepi32_ps(_mm512_sub_epi32(dots, offset));
    let [s0, s1, s2, s3] = x_scales;
    let x_scales = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_set_ps(s3, s2, s1, s0)));
    if KIND == INT8 {
        return _mm512_fmadd_ps(dots, x_scales, sums);
    }
    let [a, b, c, d] = sub_scales.map(bytemuck::must_cast);
    let by_group = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    let sub_scales = _mm_shuffle_epi8(_mm_set_epi32(d, c, b, a), by_group);
    let sub_scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sub_scales));
    _mm512_fmadd_ps(dots, _mm512_mul_ps(sub_scales, x_scales), sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn many_of<const KIND: u8>(rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
    let tokens = x.tokens();
    let mut tile = Tile { codes: [[[[0; 64]; VECTORS]; STEPS]; SPAN], scales: [[[0.0; LANES]; VECTORS]; SPAN] };
    // Parts of a total that more than one span makes.
    #[expect(clippy::large_stack_arrays, reason = "a thread's stack has room")]
    let mut parts = [[0.0f32; TILE]; super::TOKENS];
    let parts = &mut parts[..tokens];
    for totals in &mut totals[..tokens] {
        *totals = [0.0; TILE];
    }
    for part in 0..PARTS.min(x.groups) {
        let count = (x.groups - part).div_ceil(PARTS);
        for first in (0..count).step_by(SPAN) {
            let span = SPAN.min(count - first);
            for at in 0..span {
                unpack::<KIND>(rows, part + (first + at) * PARTS, &mut tile.codes[at], &mut tile.scales[at]);
            }
            let ends = (first == 0, first + span == count);
            let mut token = 0;
            while token < tokens {
                let block = BLOCK.min(tokens - token);
                let from = Span { tile: &tile, x, token, first: part + first * PARTS, groups: span, ends };
                let (parts, totals) = (&mut parts[token..token + block], &mut totals[token..token + block]);
                match block {
                    1 => from.multiply::<KIND, 1>(parts, totals),
                    2 => from.multiply::<KIND, 2>(parts, totals),
                    3 => from.multiply::<KIND, 3>(parts, totals),
                    4 => from.multiply::<KIND, 4>(parts, totals),
                    5 => from.multiply::<KIND, 5>(parts, totals),
                    _ => from.multiply::<KIND, BLOCK>(parts, totals),
                }
                token += block;
            }
        }
    }
}

/// A span of unpacked groups, and the tokens to multiply it with.
struct Span<'a> {
    tile: &'a Tile,
    x: Quantized<'a>,
    token: usize,
    /// The first group; the others follow by [`PARTS`].
    first: usize,
    groups: usize,
    /// Whether a part begins and ends with this span.
    ends: (bool, bool),
}

impl Span<'_> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn multiply<const KIND: u8, const N: usize>(&self, parts: &mut [[f32; TILE]], totals: &mut [[f32; TILE]]) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; N];
        if !self.ends.0 {
            for n in 0..N {
                sums[n] = load_sums(&parts[n]);
            }
        }
        let mut x = [[].as_slice(); N];
        let (mut x_scales, mut x_sums) = ([[].as_slice(); N], [[].as_slice(); N]);
        for n in 0..N {
            Token { codes: x[n], scales: x_scales[n], sums: x_sums[n] } = self.x.token(self.token + n);
        }
        for at in 0..self.groups {
            let group = self.first + at * PARTS;
            let mut dots = [[_mm512_setzero_si512(); VECTORS]; N];
            for (step, codes) in self.tile.codes[at].iter().enumerate() {
                let codes = [load(&codes[0]), load(&codes[1])];
                for n in 0..N {
                    let x = _mm512_set1_epi32(bytemuck::must_cast(x[n][group][step]));
                    for v in 0..VECTORS {
                        dots[n][v] = _mm512_dpbusd_epi32(dots[n][v], codes[v], x);
                    }
                }
            }
            let scales = [load_lanes(&self.tile.scales[at][0]), load_lanes(&self.tile.scales[at][1])];
            for n in 0..N {
                let offset = _mm512_set1_epi32(x_sums[n][group] * OFFSET);
                let x_scale = _mm512_set1_ps(x_scales[n][group]);
                for v in 0..VECTORS {
                    let dots = _mm512_cvtepi32_ps(_mm512_sub_epi32(dots[n][v], offset));
                    let scale = if KIND == INT8 { x_scale } else { _mm512_mul_ps(scales[v], x_scale) };
                    sums[n][v] = _mm512_fmadd_ps(dots, scale, sums[n][v]);
                }
            }
        }
        for n in 0..N {
            if self.ends.1 {
                let [a, b] = load_sums(&totals[n]);
                store_sums([_mm512_add_ps(a, sums[n][0]), _mm512_add_ps(b, sums[n][1])], &mut totals[n]);
            } else {
                store_sums(sums[n], &mut parts[n]);
            }
        }
    }
}

/// A group of a tile's rows into the order of [`Tile`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn unpack<const KIND: u8>(
    rows: &[Row; TILE],
    group: usize,
    codes: &mut [[[u8; 64]; VECTORS]; STEPS],
    scales: &mut [[f32; LANES]; VECTORS],
) {
    let bytes = const { codes_of(KIND).group_bytes() };
    let (table, mask) = (table::<KIND>(), _mm512_set1_epi8(0x0f));
    for (vector, rows) in rows.as_chunks::<LANES>().0.iter().enumerate() {
        let mut halves = [[_mm512_setzero_si512(); 4]; 2];
        for quarter in 0..4 {
            let rows = &rows.as_chunks::<4>().0[quarter];
            let [low, high] = &mut halves;
            if KIND == INT8 {
                let offset = _mm512_set1_epi8(-128);
                low[quarter] = _mm512_xor_si512(gather(rows, group * bytes), offset);
                high[quarter] = _mm512_xor_si512(gather(rows, group * bytes + 16), offset);
            } else {
                let codes = gather(rows, group * bytes);
                low[quarter] = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, mask));
                high[quarter] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask));
            }
        }
        for (half, quarters) in halves.into_iter().enumerate() {
            for (step, lanes) in transpose(quarters).into_iter().enumerate() {
                store(lanes, &mut codes[half * STEPS / 2 + step][vector]);
            }
        }
        if KIND != INT8 {
            for (scale, row) in scales[vector].iter_mut().zip(rows) {
                *scale = f32::from(row.sub_scales[group]);
            }
        }
    }
}

/// Sixteen bytes of each of four rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gather(rows: &[Row; 4], at: usize) -> __m512i {
    let [a, b, c, d] = rows;
    let pair = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(quarter_of(a.codes, at)), quarter_of(b.codes, at));
    _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(pair, quarter_of(c.codes, at)), quarter_of(d.codes, at))
}

/// Sixteen rows of four 32-bit numbers, four rows in each vector, into four columns of sixteen.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn transpose(quarters: [__m512i; 4]) -> [__m512i; 4] {
    let by_column = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    let [mut a, mut b, mut c, mut d] = quarters;
    for rows in [&mut a, &mut b, &mut c, &mut d] {
        *rows = _mm512_permutexvar_epi32(by_column, *rows);
    }
    let ab = [_mm512_shuffle_i32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b)];
    let cd = [_mm512_shuffle_i32x4::<0b01_00_01_00>(c, d), _mm512_shuffle_i32x4::<0b11_10_11_10>(c, d)];
    [
        _mm512_shuffle_i32x4::<0b10_00_10_00>(ab[0], cd[0]),
        _mm512_shuffle_i32x4::<0b11_01_11_01>(ab[0], cd[0]),
        _mm512_shuffle_i32x4::<0b10_00_10_00>(ab[1], cd[1]),
        _mm512_shuffle_i32x4::<0b11_01_11_01>(ab[1], cd[1]),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quarter_of(codes: &[u8], at: usize) -> __m128i {
    let bytes: &[u8; 16] = codes[at..].first_chunk().expect("a group is at least sixteen bytes");
    // SAFETY: a reference to as many bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn store(vector: __m512i, bytes: &mut [u8; 64]) {
    // SAFETY: a reference to as many bytes.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn load_lanes(values: &[f32; LANES]) -> __m512 {
    // SAFETY: a reference to as many numbers.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn load_sums(values: &[f32; TILE]) -> [__m512; VECTORS] {
    let values = values.as_chunks::<LANES>().0;
    [load_lanes(&values[0]), load_lanes(&values[1])]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn store_sums(sums: [__m512; VECTORS], values: &mut [f32; TILE]) {
    for (sums, values) in sums.into_iter().zip(values.as_chunks_mut::<LANES>().0) {
        // SAFETY: a reference to as many numbers.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), sums) }
    }
}

#[inline(always)]
fn four<T: Copy>(values: &[T]) -> [T; PARTS] {
    [values[0], values[1], values[2], values[3]]
}

fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    to[..from.len()].copy_from_slice(from);
}
