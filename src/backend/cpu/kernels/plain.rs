//! Rows of floating-point numbers, read as they are stored.
//!
//! A product runs in [`LANES`] sums side by side, each over the columns of its place in every
//! sixteen, by fused multiplications; the sums are then added in halves. So a total does not
//! depend on the processor or on how many tokens there are.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "vector instructions"))]

use super::{ROWS, Row, TILE};
use crate::quant::WeightDtype;
use crate::simd::{Isa, Level};

/// Sums that a product runs in.
const LANES: usize = 16;
/// Tokens whose sums are held in registers, where there are enough of these.
const TOGETHER: usize = 4;

type Lanes = [f32; LANES];

pub fn few(isa: Isa, dtype: WeightDtype, rows: &[Row; ROWS], x: &[f32]) -> [f32; ROWS] {
    let [totals] = totals_of(isa, dtype, rows, [x]);
    totals
}

/// The totals of a tile of rows with each token of `x`, which has `cols` columns.
pub fn many(isa: Isa, dtype: WeightDtype, rows: &[Row; TILE], x: &[f32], cols: usize, totals: &mut [[f32; TILE]]) {
    for (x, totals) in x.chunks(cols * TOGETHER).zip(totals.chunks_mut(TOGETHER)) {
        for (at, rows) in rows.as_chunks::<ROWS>().0.iter().enumerate() {
            let mut put = |token: usize, sums: [f32; ROWS]| totals[token][at * ROWS..][..ROWS].copy_from_slice(&sums);
            if x.len() == cols * TOGETHER {
                let x = std::array::from_fn(|token| &x[token * cols..][..cols]);
                for (token, sums) in totals_of::<TOGETHER>(isa, dtype, rows, x).into_iter().enumerate() {
                    put(token, sums);
                }
            } else {
                for (token, x) in x.chunks(cols).enumerate() {
                    put(token, few(isa, dtype, rows, x));
                }
            }
        }
    }
}

/// The totals of four rows with each of several tokens.
fn totals_of<const N: usize>(isa: Isa, dtype: WeightDtype, rows: &[Row; ROWS], x: [&[f32]; N]) -> [[f32; ROWS]; N] {
    let cols = x[0].len();
    for row in rows {
        assert_eq!(row.codes.len(), cols * dtype.size());
    }
    for x in x {
        assert_eq!(x.len(), cols);
    }
    let mut sums = match isa.level() {
        Level::Portable => portable(dtype, rows, x),
        // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::AvxVnni => unsafe { avx2::sums(dtype, rows, x) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::sums(dtype, rows, x) },
    };
    let whole = cols / LANES * LANES;
    let mut totals = [[0.0; ROWS]; N];
    for (r, row) in rows.iter().enumerate() {
        let mut tail = [0.0; LANES];
        dtype.decode(&row.codes[whole * dtype.size()..], &mut tail[..cols - whole]);
        for n in 0..N {
            for (sum, (weight, x)) in sums[n][r].iter_mut().zip(tail.iter().zip(&x[n][whole..])) {
                *sum = weight.mul_add(*x, *sum);
            }
            totals[n][r] = add_up(sums[n][r]);
        }
    }
    totals
}

/// The sums over all whole sixteens of columns.
fn portable<const N: usize>(dtype: WeightDtype, rows: &[Row; ROWS], x: [&[f32]; N]) -> [[Lanes; ROWS]; N] {
    let mut sums = [[[0.0; LANES]; ROWS]; N];
    for (r, row) in rows.iter().enumerate() {
        for (at, row) in row.codes.chunks_exact(LANES * dtype.size()).enumerate() {
            let mut weights = [0.0; LANES];
            dtype.decode(row, &mut weights);
            for n in 0..N {
                let x = &x[n][at * LANES..];
                for lane in 0..LANES {
                    sums[n][r][lane] = weights[lane].mul_add(x[lane], sums[n][r][lane]);
                }
            }
        }
    }
    sums
}

fn add_up(mut sums: Lanes) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// Vectors of `$width` sums, of which `$vectors` make [`LANES`]. `$bf16`, `$f16` and `$f32` read as many weights.
#[cfg(target_arch = "x86_64")]
macro_rules! kernels {
    ($name:ident, $features:literal, $vectors:literal, $width:literal, $zero:ident, $fma:ident, $load:ident, $store:ident,
     $bf16:expr, $f16:expr) => {
        mod $name {

            use std::arch::x86_64::*;

            use super::super::packed::prefetch;
            use super::{LANES, Lanes, ROWS, Row};
            use crate::quant::WeightDtype;

            #[target_feature(enable = $features)]
            pub fn sums<const N: usize>(dtype: WeightDtype, rows: &[Row; ROWS], x: [&[f32]; N]) -> [[Lanes; ROWS]; N] {
                match dtype {
                    WeightDtype::Bf16 => sums_of::<N, 0, 2>(rows, x),
                    WeightDtype::F16 => sums_of::<N, 1, 2>(rows, x),
                    WeightDtype::F32 => sums_of::<N, 2, 4>(rows, x),
                }
            }

            #[target_feature(enable = $features)]
            fn sums_of<const N: usize, const DTYPE: u8, const SIZE: usize>(
                rows: &[Row; ROWS],
                x: [&[f32]; N],
            ) -> [[Lanes; ROWS]; N] {
                let mut sums = [[[$zero(); $vectors]; ROWS]; N];
                let whole = x[0].len() / LANES;
                let (mut row_at, mut x_at) = ([[].as_slice(); ROWS], [[].as_slice(); N]);
                for r in 0..ROWS {
                    row_at[r] = &rows[r].codes.as_chunks::<SIZE>().0.as_chunks::<LANES>().0[..whole];
                }
                for n in 0..N {
                    x_at[n] = &x[n].as_chunks::<LANES>().0[..whole];
                }
                for at in 0..whole {
                    if N == 1 {
                        prefetch(rows, 1, at * ROWS * LANES * SIZE, ROWS * LANES * SIZE);
                    }
                    let mut weights = [[$zero(); $vectors]; ROWS];
                    for r in 0..ROWS {
                        let bytes = row_at[r][at].as_ptr().cast::<u8>();
                        for v in 0..$vectors {
                            // SAFETY: a reference to `LANES` weights of `SIZE` bytes, of which `$width` are read
                            // from `v · $width` on; no alignment is asked for.
                            weights[r][v] = unsafe {
                                let bytes = bytes.add(v * $width * SIZE);
                                match DTYPE {
                                    0 => $bf16(bytes),
                                    1 => $f16(bytes),
                                    _ => $load(bytes.cast()),
                                }
                            };
                        }
                    }
                    for n in 0..N {
                        for v in 0..$vectors {
                            // SAFETY: as above, of `LANES` numbers.
                            let x = unsafe { $load(x_at[n][at].as_ptr().add(v * $width)) };
                            for r in 0..ROWS {
                                sums[n][r][v] = $fma(weights[r][v], x, sums[n][r][v]);
                            }
                        }
                    }
                }
                let mut lanes = [[[0.0; LANES]; ROWS]; N];
                for n in 0..N {
                    for r in 0..ROWS {
                        for v in 0..$vectors {
                            // SAFETY: a reference to `LANES` numbers, of which `$width` are written.
                            unsafe { $store(lanes[n][r].as_mut_ptr().add(v * $width), sums[n][r][v]) };
                        }
                    }
                }
                lanes
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels! {
    avx2, "avx2,fma,f16c", 2, 8, _mm256_setzero_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_storeu_ps,
    |x: *const u8| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(x.cast())))),
    |x: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(x.cast()))
}
#[cfg(target_arch = "x86_64")]
kernels! {
    avx512, "avx512f", 1, 16, _mm512_setzero_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_storeu_ps,
    |x: *const u8| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.cast())))),
    |x: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(x.cast()))
}
