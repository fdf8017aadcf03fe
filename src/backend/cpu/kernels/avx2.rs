//! AVX2, with AVX-VNNI or without: eight rows side by side for many tokens.
#![expect(unsafe_code, reason = "vector instructions")]
#![allow(clippy::wildcard_imports, reason = "their names say where they are from")]

use std::arch::x86_64::*;

use super::{Codes, PARTS, Quantized, ROWS, Row, SPAN, TILE, Token, prefetch};
use crate::quant::GROUP_SIZE;
use crate::simd::{Isa, Level};

/// Lanes of a vector of 32-bit numbers.
const LANES: usize = 8;
/// Vectors of a tile's rows.
const VECTORS: usize = TILE / LANES;
/// Steps of four columns in a group.
const STEPS: usize = GROUP_SIZE / 4;
/// Tokens whose sums are held in registers.
const BLOCK: usize = 4;

/// Unpacked codes of a span of groups: `[vectors][groups][steps][rows][4]`.
#[repr(align(32))]
struct Tile {
    codes: [[[[u8; 32]; STEPS]; SPAN]; VECTORS],
    scales: [[[f32; LANES]; SPAN]; VECTORS],
}

/// A span of unpacked groups, and the tokens to multiply it with.
struct Span<'a> {
    tile: &'a Tile,
    x: Quantized<'a>,
    token: usize,
    vector: usize,
    /// The first group; the others follow by [`PARTS`].
    first: usize,
    groups: usize,
    /// Whether a part begins and ends with this span.
    ends: (bool, bool),
}

/// `$offset` is added to levels, and `$dot` adds to each of eight sums the products of four such
/// levels with four activations.
macro_rules! kernels {
    ($name:ident, $features:literal, $level:pat, $offset:literal, $dot:ident) => {
        pub mod $name {
            use super::*;

            pub fn few(isa: Isa, codes: Codes, rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
                assert!(matches!(isa.level(), $level));
                // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
                unsafe { few_of(codes, rows, x) }
            }

            pub fn many(isa: Isa, codes: Codes, rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
                assert!(matches!(isa.level(), $level));
                // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
                unsafe { many_of(codes, rows, x, totals) }
            }

            /// The levels of four-bit codes plus the offset, in each half.
            #[inline]
            #[target_feature(enable = $features)]
            fn table(codes: Codes) -> __m256i {
                let levels = codes.levels().map(i8::cast_unsigned);
                _mm256_xor_si256(_mm256_broadcastsi128_si256(load16(&levels)), _mm256_set1_epi8($offset))
            }

            /// The levels of two groups plus the offset: columns 0 to 15 of each, and 16 to 31.
            #[inline]
            #[target_feature(enable = $features)]
            fn levels(codes: Codes, table: __m256i, bytes: &[u8]) -> [__m256i; 2] {
                let bytes = bytes.as_chunks::<32>().0;
                if codes == Codes::Int8 {
                    let offset = _mm256_set1_epi8($offset);
                    let [low, high] = halves(load(&bytes[0]), load(&bytes[1]));
                    return [_mm256_xor_si256(low, offset), _mm256_xor_si256(high, offset)];
                }
                let [low, high] = nibbles(load(&bytes[0]));
                [_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high)]
            }

            #[target_feature(enable = $features)]
            fn few_of(codes: Codes, rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
                let table = table(codes);
                let bytes = 2 * codes.group_bytes();
                let mut sums = [_mm256_setzero_ps(); 2];
                for first in (0..x.groups()).step_by(2) {
                    let at = first / 2 % 2;
                    if first + 2 <= x.groups() {
                        prefetch(rows, codes.group_bytes(), first / 2 * ROWS * bytes, ROWS * bytes);
                        let (mut code_bytes, mut sub_scales) = ([[].as_slice(); ROWS], [[1; 2]; ROWS]);
                        for (i, row) in rows.iter().enumerate() {
                            code_bytes[i] = &row.codes[first / 2 * bytes..][..bytes];
                            if codes != Codes::Int8 {
                                sub_scales[i] = [row.sub_scales[first], row.sub_scales[first + 1]];
                            }
                        }
                        let pair = first..first + 2;
                        let x = Token {
                            codes: &x.codes[pair.clone()],
                            scales: &x.scales[pair.clone()],
                            sums: &x.sums[pair],
                        };
                        sums[at] = pair_of(codes, table, code_bytes, sub_scales, x, sums[at]);
                    } else {
                        // The group that is missing to two has scales of zero.
                        let mut code_bytes = [[0u8; 64]; ROWS];
                        let mut sub_scales = [[1i8; 2]; ROWS];
                        for (row, (code_bytes, sub_scales)) in
                            rows.iter().zip(code_bytes.iter_mut().zip(&mut sub_scales))
                        {
                            code_bytes[..bytes / 2].copy_from_slice(&row.codes[first / 2 * bytes..]);
                            if codes != Codes::Int8 {
                                sub_scales[0] = row.sub_scales[first];
                            }
                        }
                        let x_codes = [x.codes[first], [[0; 4]; STEPS]];
                        let x = Token { codes: &x_codes, scales: &[x.scales[first], 0.0], sums: &[x.sums[first], 0] };
                        let code_bytes = code_bytes.each_ref().map(|codes| &codes[..bytes]);
                        sums[at] = pair_of(codes, table, code_bytes, sub_scales, x, sums[at]);
                    }
                }
                let [first, second] = sums;
                let parts = [
                    _mm256_castps256_ps128(first),
                    _mm256_extractf128_ps::<1>(first),
                    _mm256_castps256_ps128(second),
                    _mm256_extractf128_ps::<1>(second),
                ];
                let total = _mm_add_ps(_mm_add_ps(_mm_add_ps(parts[0], parts[1]), parts[2]), parts[3]);
                let mut totals = [0.0; ROWS];
                // SAFETY: a reference to as many numbers.
                unsafe { _mm_storeu_ps(totals.as_mut_ptr(), total) };
                totals
            }

            /// Two groups of four rows; the sums are `[part][row]`.
            #[inline]
            #[target_feature(enable = $features)]
            fn pair_of(
                codes: Codes,
                table: __m256i,
                code_bytes: [&[u8]; ROWS],
                sub_scales: [[i8; 2]; ROWS],
                x: Token,
                sums: __m256,
            ) -> __m256 {
                let x_bytes: &[u8] = bytemuck::must_cast_slice(x.codes.as_flattened().as_flattened());
                let x_bytes = x_bytes.as_chunks::<32>().0;
                let [low_x, high_x] = halves(load(&x_bytes[0]), load(&x_bytes[1]));
                let mut dots = [_mm256_setzero_si256(); ROWS];
                for (dots, bytes) in dots.iter_mut().zip(code_bytes) {
                    let [low, high] = levels(codes, table, bytes);
                    *dots = $dot($dot(*dots, low, low_x), high, high_x);
                }
                let [a, b, c, d] = dots;
                // Four sums of each row and group become one.
                let ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
                let cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
                let mut dots = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
                if $offset != 0 {
                    let sums = _mm256_set_m128i(_mm_set1_epi32(x.sums[1]), _mm_set1_epi32(x.sums[0]));
                    dots = _mm256_sub_epi32(dots, _mm256_slli_epi32::<7>(sums));
                }
                let dots = _mm256_cvtepi32_ps(dots);
                let x_scales = _mm256_set_m128(_mm_set1_ps(x.scales[1]), _mm_set1_ps(x.scales[0]));
                if codes == Codes::Int8 {
                    return _mm256_fmadd_ps(dots, x_scales, sums);
                }
                let [a, b, c, d] = sub_scales;
                let sub_scales = _mm_set_epi8(0, 0, 0, 0, 0, 0, 0, 0, d[1], c[1], b[1], a[1], d[0], c[0], b[0], a[0]);
                let sub_scales = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(sub_scales));
                _mm256_fmadd_ps(dots, _mm256_mul_ps(sub_scales, x_scales), sums)
            }

            #[target_feature(enable = $features)]
            fn many_of(codes: Codes, rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
                let tokens = x.tokens();
                let table = table(codes);
                let mut tile =
                    Tile { codes: [[[[0; 32]; STEPS]; SPAN]; VECTORS], scales: [[[1.0; LANES]; SPAN]; VECTORS] };
                // Parts of a total that more than one span makes.
                #[expect(clippy::large_stack_arrays, reason = "a thread's stack has room")]
                let mut parts = [[0.0f32; TILE]; super::super::TOKENS];
                for totals in &mut totals[..tokens] {
                    *totals = [0.0; TILE];
                }
                for part in 0..PARTS.min(x.groups) {
                    let count = (x.groups - part).div_ceil(PARTS);
                    for first in (0..count).step_by(SPAN) {
                        let span = SPAN.min(count - first);
                        for at in 0..span {
                            unpack(codes, table, rows, part + (first + at) * PARTS, at, &mut tile);
                        }
                        let ends = (first == 0, first + span == count);
                        for vector in 0..VECTORS {
                            for token in (0..tokens).step_by(BLOCK) {
                                let block = BLOCK.min(tokens - token);
                                let first = part + first * PARTS;
                                let from = Span { tile: &tile, x, token, vector, first, groups: span, ends };
                                let parts = &mut parts[token..token + block];
                                let totals = &mut totals[token..token + block];
                                match block {
                                    1 => multiply::<1>(codes, &from, parts, totals),
                                    2 => multiply::<2>(codes, &from, parts, totals),
                                    3 => multiply::<3>(codes, &from, parts, totals),
                                    _ => multiply::<BLOCK>(codes, &from, parts, totals),
                                }
                            }
                        }
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn multiply<const N: usize>(
                codes: Codes,
                from: &Span,
                parts: &mut [[f32; TILE]],
                totals: &mut [[f32; TILE]],
            ) {
                let lanes = from.vector * LANES..(from.vector + 1) * LANES;
                let mut sums = [_mm256_setzero_ps(); N];
                if !from.ends.0 {
                    for n in 0..N {
                        sums[n] = load_lanes(&parts[n][lanes.clone()]);
                    }
                }
                let mut x = [[].as_slice(); N];
                let (mut x_scales, mut x_sums) = ([[].as_slice(); N], [[].as_slice(); N]);
                for n in 0..N {
                    Token { codes: x[n], scales: x_scales[n], sums: x_sums[n] } = from.x.token(from.token + n);
                }
                for at in 0..from.groups {
                    let group = from.first + at * PARTS;
                    let mut dots = [_mm256_setzero_si256(); N];
                    for (step, codes) in from.tile.codes[from.vector][at].iter().enumerate() {
                        let codes = load(codes);
                        for n in 0..N {
                            let x = _mm256_set1_epi32(bytemuck::must_cast(x[n][group][step]));
                            dots[n] = $dot(dots[n], codes, x);
                        }
                    }
                    let scales = load_lanes(&from.tile.scales[from.vector][at]);
                    for n in 0..N {
                        if $offset != 0 {
                            dots[n] = _mm256_sub_epi32(dots[n], _mm256_set1_epi32(x_sums[n][group] << 7));
                        }
                        let x_scale = _mm256_set1_ps(x_scales[n][group]);
                        let scale = if codes == Codes::Int8 { x_scale } else { _mm256_mul_ps(scales, x_scale) };
                        sums[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[n]), scale, sums[n]);
                    }
                }
                for n in 0..N {
                    if from.ends.1 {
                        let before = load_lanes(&totals[n][lanes.clone()]);
                        store_lanes(_mm256_add_ps(before, sums[n]), &mut totals[n][lanes.clone()]);
                    } else {
                        store_lanes(sums[n], &mut parts[n][lanes.clone()]);
                    }
                }
            }

            /// A group of a tile's rows into the order of [`Tile`].
            #[inline]
            #[target_feature(enable = $features)]
            fn unpack(codes: Codes, table: __m256i, rows: &[Row; TILE], group: usize, at: usize, tile: &mut Tile) {
                let bytes = codes.group_bytes();
                for (vector, rows) in rows.as_chunks::<LANES>().0.iter().enumerate() {
                    let mut halves = [[_mm256_setzero_si256(); 4]; 2];
                    for i in 0..4 {
                        let (pair, [low, high]) = ([&rows[i], &rows[i + 4]], &mut halves);
                        if codes == Codes::Int8 {
                            let offset = _mm256_set1_epi8($offset);
                            low[i] = _mm256_xor_si256(gather(pair, group * bytes), offset);
                            high[i] = _mm256_xor_si256(gather(pair, group * bytes + 16), offset);
                        } else {
                            let [low_codes, high_codes] = nibbles(gather(pair, group * bytes));
                            low[i] = _mm256_shuffle_epi8(table, low_codes);
                            high[i] = _mm256_shuffle_epi8(table, high_codes);
                        }
                    }
                    for (half, pairs) in halves.into_iter().enumerate() {
                        for (step, lanes) in transpose(pairs).into_iter().enumerate() {
                            store(lanes, &mut tile.codes[vector][at][half * STEPS / 2 + step]);
                        }
                    }
                    if codes != Codes::Int8 {
                        for (scale, row) in tile.scales[vector][at].iter_mut().zip(rows) {
                            *scale = f32::from(row.sub_scales[group]);
                        }
                    }
                }
            }
        }
    };
}

kernels!(plain, "avx2,fma", Level::Avx2, 0, dot_plain);
kernels!(vnni, "avx2,fma,avxvnni", Level::AvxVnni, -128, dot_vnni);

/// One side has to be positive: that of the levels, which a file may hold down to −128. No pair of
/// products is beyond i16.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dot_plain(sums: __m256i, levels: __m256i, x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(x, levels));
    _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2,fma,avxvnni")]
fn dot_vnni(sums: __m256i, levels: __m256i, x: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sums, levels, x)
}

/// Columns 0 to 15 and 16 to 31 of two groups.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn halves(first: __m256i, second: __m256i) -> [__m256i; 2] {
    [_mm256_permute2x128_si256::<0x20>(first, second), _mm256_permute2x128_si256::<0x31>(first, second)]
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn nibbles(bytes: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(0x0f);
    [_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask)]
}

/// Rows i and i + 4 of four 32-bit numbers in vector i, into four columns of eight.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transpose([a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
    let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab, cd),
        _mm256_unpackhi_epi64(ab, cd),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: a reference to as many bytes; no alignment is asked for.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: a reference to as many bytes; no alignment is asked for.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn store(vector: __m256i, bytes: &mut [u8; 32]) {
    // SAFETY: a reference to as many bytes; no alignment is asked for.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load_lanes(values: &[f32]) -> __m256 {
    let values = &values.as_chunks::<LANES>().0[0];
    // SAFETY: a reference to as many numbers; no alignment is asked for.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn store_lanes(lanes: __m256, values: &mut [f32]) {
    let values = &mut values.as_chunks_mut::<LANES>().0[0];
    // SAFETY: a reference to as many numbers; no alignment is asked for.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), lanes) }
}

/// Sixteen bytes of each of two rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn gather([a, b]: [&Row; 2], at: usize) -> __m256i {
    _mm256_set_m128i(load16(sixteen(b.codes, at)), load16(sixteen(a.codes, at)))
}

fn sixteen(codes: &[u8], at: usize) -> &[u8; 16] {
    &codes[at..at + 16].as_chunks::<16>().0[0]
}
