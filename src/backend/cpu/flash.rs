//! Attention of several queries over a run of keys and values, tile by tile: each tile is
//! decoded once for all queries, and the softmax runs along.
//!
//! What a query gives does not depend on the queries beside it: it has its own sums, to which
//! tiles are added in the order of the keys.

use std::ops::Range;

use super::exp::{exp, tanh};
use super::kv::{Cache, KEY_TILE, Scores, Stored};
use crate::quant::KvDtype;
use crate::simd::{Isa, vectorized};

/// Queries that go over the keys together.
pub const QUERIES: usize = 32;
/// Queries whose sums are held in registers together.
const TOGETHER: usize = 4;
/// Dimensions that are decoded at once.
const DIMENSIONS: usize = 128;

/// A query and the keys that it sees.
#[derive(Clone, Copy)]
pub struct Query<'a> {
    pub vector: &'a [f32],
    pub first: usize,
    pub end: usize,
}

impl Query<'_> {
    /// Those of `keys` that it sees.
    pub fn sees(&self, keys: &Range<usize>) -> Range<usize> {
        let first = self.first.max(keys.start);
        first..self.end.min(keys.end).max(first)
    }
}

/// The softmax of a query so far: the largest score, and the sum of all weights relative to it.
#[derive(Clone, Copy)]
pub struct Softmax {
    pub largest: f32,
    pub sum: f32,
}

impl Softmax {
    /// That of no keys.
    pub const EMPTY: Self = Self { largest: f32::NEG_INFINITY, sum: 0.0 };
}

/// `softmax(scores) · v` of up to [`QUERIES`] queries over `keys`, the values not yet divided by
/// the sums, into `mixed`, `[queries][head_dim]`.
pub fn attend(
    cache: &Cache,
    isa: Isa,
    [keys, values]: [Stored; 2],
    kv_head: usize,
    queries: &[Query],
    run: Range<usize>,
    mixed: &mut [f32],
) -> [Softmax; QUERIES] {
    let width = cache.head_dim;
    let mut tile = [0.0f32; KEY_TILE * DIMENSIONS];
    let mut softmax = [Softmax::EMPTY; QUERIES];
    mixed.fill(0.0);
    for start in run.clone().step_by(KEY_TILE) {
        let tile_keys = start..run.end.min(start + KEY_TILE);
        let mut seen: [Range<usize>; QUERIES] = [const { 0..0 }; QUERIES];
        for (seen, query) in seen.iter_mut().zip(queries) {
            let keys = query.sees(&tile_keys);
            *seen = keys.start - start..keys.end - start;
        }
        let seen = &seen[..queries.len()];
        let visible = || seen.iter().filter(|seen| !seen.is_empty());
        let (Some(first), Some(end)) = (visible().map(|s| s.start).min(), visible().map(|s| s.end).max()) else {
            continue;
        };
        let all = first..end;
        let slot = cache.vector(kv_head, start);

        let mut weights = [[0.0f32; KEY_TILE]; QUERIES];
        for piece in pieces(width) {
            read_keys(cache, isa, keys, slot, piece.clone(), &mut tile);
            for (queries, weights) in queries.chunks(TOGETHER).zip(weights.chunks_mut(TOGETHER)) {
                let vector = |at: usize| &queries[at].vector[piece.clone()];
                if queries.len() == TOGETHER {
                    let [a, b, c, d] = [0, 1, 2, 3].map(vector);
                    score_four(isa, &tile, [a, b, c, d], weights);
                } else {
                    for (at, weights) in (0..queries.len()).zip(weights) {
                        score_one(isa, &tile, vector(at), weights);
                    }
                }
            }
        }
        let scales = keys.1.get(slot..).unwrap_or_default();
        let mut rescale = [1.0f32; QUERIES];
        for (at, seen) in seen.iter().enumerate().filter(|(_, seen)| !seen.is_empty()) {
            rescale[at] = weigh(isa, cache.scores, scales, &mut weights[at], seen, &mut softmax[at]);
        }
        for piece in pieces(width) {
            read_values(cache, isa, values, slot, &all, piece.clone(), &mut tile);
            let groups = mixed.chunks_mut(TOGETHER * width).zip(seen.chunks(TOGETHER));
            for (at, (mixed, seen)) in (0..).step_by(TOGETHER).zip(groups) {
                let same = seen.len() == TOGETHER && seen.iter().all(|other| *other == seen[0]);
                if same && !seen[0].is_empty() {
                    mix_four(isa, &tile, &seen[0], &weights[at..], &rescale[at..], mixed, width, &piece);
                } else {
                    let each = mixed.chunks_mut(width).zip(seen).enumerate().filter(|(_, (_, seen))| !seen.is_empty());
                    for (i, (mixed, seen)) in each {
                        mix_one(isa, &tile, seen, &weights[at + i], rescale[at + i], &mut mixed[piece.clone()]);
                    }
                }
            }
        }
    }
    softmax
}

/// Pieces of a vector that are decoded at once.
fn pieces(width: usize) -> impl Iterator<Item = Range<usize>> {
    (0..width).step_by(DIMENSIONS).map(move |start| start..width.min(start + DIMENSIONS))
}

/// Some dimensions of the keys of the tile that begins with vector `start`, as they stand in the cache but in f32
/// and without scales: `[dimensions][KEY_TILE]`.
fn read_keys(cache: &Cache, isa: Isa, (codes, _): Stored, start: usize, dimensions: Range<usize>, tile: &mut [f32]) {
    let element = cache.dtype.code_bytes(1);
    let first = start * cache.head_dim + dimensions.start * KEY_TILE;
    let count = dimensions.len() * KEY_TILE;
    decode(isa, cache.dtype, &codes[first * element..][..count * element], 1.0, &mut tile[..count]);
}

/// Some dimensions of the values at `rows` behind `start` in f32, `[KEY_TILE][dimensions]`; rows beyond are not written.
fn read_values(
    cache: &Cache,
    isa: Isa,
    (codes, scales): Stored,
    start: usize,
    rows: &Range<usize>,
    dimensions: Range<usize>,
    tile: &mut [f32],
) {
    let (element, width) = (cache.dtype.code_bytes(1), cache.head_dim);
    if dimensions.len() == width && cache.dtype != KvDtype::Int8 {
        let codes = &codes[(start + rows.start) * width * element..][..rows.len() * width * element];
        return decode(isa, cache.dtype, codes, 1.0, &mut tile[rows.start * width..rows.end * width]);
    }
    for row in rows.clone() {
        let codes = &codes[((start + row) * width + dimensions.start) * element..];
        let scale = scales.get(start + row).copied().unwrap_or(1.0);
        let tile = &mut tile[row * dimensions.len()..][..dimensions.len()];
        decode(isa, cache.dtype, &codes[..dimensions.len() * element], scale, tile);
    }
}

vectorized! {
    fn decode(dtype: KvDtype, codes: &[u8], scale: f32, values: &mut [f32]) {
        dtype.decode(codes, scale, values);
    }
}

/// Adds to the scores of a tile what some dimensions give, for several queries.
#[inline(always)]
fn score<const N: usize>(tile: &[f32], queries: [&[f32]; N], scores: &mut [[f32; KEY_TILE]; N]) {
    let mut sums = *scores;
    for (d, keys) in tile.as_chunks::<KEY_TILE>().0.iter().enumerate().take(queries[0].len()) {
        for (sums, query) in sums.iter_mut().zip(queries) {
            for (sum, key) in sums.iter_mut().zip(keys) {
                *sum = query[d].mul_add(*key, *sum);
            }
        }
    }
    *scores = sums;
}

vectorized! {
    fn score_one(tile: &[f32], query: &[f32], scores: &mut [f32; KEY_TILE]) {
        score(tile, [query], std::array::from_mut(scores));
    }

    fn score_four(tile: &[f32], queries: [&[f32]; TOGETHER], scores: &mut [[f32; KEY_TILE]]) {
        if let Some(scores) = scores.first_chunk_mut() {
            score(tile, queries, scores);
        }
    }

    /// Turns the products of a query with a tile's keys into weights, 0 where it does not see the
    /// key, and takes them into its softmax. Gives the factor for what was weighted before.
    fn weigh(
        how: Scores,
        scales: &[f32],
        weights: &mut [f32; KEY_TILE],
        seen: &Range<usize>,
        softmax: &mut Softmax,
    ) -> f32 {
        let mut scores = *weights;
        for (score, scale) in scores.iter_mut().zip(scales) {
            *score *= scale;
        }
        for score in &mut scores {
            *score *= how.scale;
        }
        if let Some(cap) = how.softcap {
            for score in &mut scores {
                *score = cap * tanh(*score / cap);
            }
        }
        let sees = |at: usize| at >= seen.start && at < seen.end;
        let mut largest = [softmax.largest; KEY_TILE];
        for at in 0..KEY_TILE {
            largest[at] = if sees(at) && scores[at] > largest[at] { scores[at] } else { largest[at] };
        }
        let largest = reduce(largest, |a, b| if b > a { b } else { a });
        for at in 0..KEY_TILE {
            weights[at] = if sees(at) { exp(scores[at] - largest) } else { 0.0 };
        }
        let rescale = exp(softmax.largest - largest);
        let sum = reduce(*weights, |a, b| a + b);
        *softmax = Softmax { largest, sum: softmax.sum * rescale + sum };
        rescale
    }
}

/// Lanes to one, half with half.
#[inline(always)]
fn reduce(mut lanes: [f32; KEY_TILE], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = KEY_TILE / 2;
    while half > 0 {
        for at in 0..half {
            lanes[at] = combine(lanes[at], lanes[at + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `mixed = mixed · rescale + Σ weight · value` for lanes from `at` on, of several queries with `pitch` between them.
#[inline(always)]
fn mix_lanes<const N: usize, const LANES: usize>(
    tile: &[f32],
    width: usize,
    seen: &Range<usize>,
    weights: [&[f32; KEY_TILE]; N],
    rescale: [f32; N],
    mixed: [&mut [f32; LANES]; N],
    at: usize,
) {
    let mut sums = [[0.0f32; LANES]; N];
    for ((sums, mixed), rescale) in sums.iter_mut().zip(&mixed).zip(rescale) {
        for (sum, mixed) in sums.iter_mut().zip(mixed.iter()) {
            *sum = mixed * rescale;
        }
    }
    for row in seen.clone() {
        let Some(values) = tile[row * width + at..].first_chunk::<LANES>() else { return };
        for (sums, weights) in sums.iter_mut().zip(weights) {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = weights[row].mul_add(*value, *sum);
            }
        }
    }
    for (mixed, sums) in mixed.into_iter().zip(sums) {
        *mixed = sums;
    }
}

/// Some dimensions of several queries.
#[inline(always)]
fn mix<const N: usize>(
    tile: &[f32],
    seen: &Range<usize>,
    weights: [&[f32; KEY_TILE]; N],
    rescale: [f32; N],
    mixed: [&mut [f32]; N],
) {
    let width = mixed[0].len();
    let mut wide = mixed.map(|mixed| mixed.as_chunks_mut::<32>());
    for i in 0..width / 32 {
        let lanes = wide.each_mut().map(|(chunks, _)| &mut chunks[i]);
        mix_lanes(tile, width, seen, weights, rescale, lanes, 32 * i);
    }
    let mut at = width - width % 32;
    let mut narrow = wide.map(|(_, rest)| rest.as_chunks_mut::<8>());
    for i in 0..width % 32 / 8 {
        let lanes = narrow.each_mut().map(|(chunks, _)| &mut chunks[i]);
        mix_lanes(tile, width, seen, weights, rescale, lanes, at);
        at += 8;
    }
    let mut single = narrow.map(|(_, rest)| rest.as_chunks_mut::<1>().0);
    for i in 0..width % 8 {
        let lanes = single.each_mut().map(|chunks| &mut chunks[i]);
        mix_lanes(tile, width, seen, weights, rescale, lanes, at + i);
    }
}

vectorized! {
    fn mix_one(tile: &[f32], seen: &Range<usize>, weights: &[f32; KEY_TILE], rescale: f32, mixed: &mut [f32]) {
        mix(tile, seen, [weights], [rescale], [mixed]);
    }

    fn mix_four(
        tile: &[f32],
        seen: &Range<usize>,
        weights: &[[f32; KEY_TILE]],
        rescale: &[f32],
        mixed: &mut [f32],
        width: usize,
        piece: &Range<usize>,
    ) {
        let mut each = mixed.chunks_mut(width);
        let mixed = [(); TOGETHER].map(|()| &mut each.next().unwrap_or_default()[piece.clone()]);
        if let (Some(weights), Some(rescale)) = (weights.first_chunk::<TOGETHER>(), rescale.first_chunk::<TOGETHER>()) {
            mix(tile, seen, weights.each_ref(), *rescale, mixed);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn every_half_is_its_number() {
        let codes: Vec<u16> = (0..=u16::MAX).collect();
        let bytes = bytemuck::cast_slice(&codes);
        let mut values = vec![0.0; codes.len()];
        for isa in Isa::available() {
            let mut check = |dtype, exact: fn(u16) -> f32| {
                decode(isa, dtype, bytes, 1.0, &mut values);
                for (code, value) in codes.iter().zip(&values) {
                    let exact = exact(*code);
                    let same = value.to_bits() == exact.to_bits() || (value.is_nan() && exact.is_nan());
                    assert!(same, "{dtype} {code:04x}: {value} for {exact}, {isa:?}");
                }
            };
            check(KvDtype::F16, |code| f16::from_bits(code).to_f32());
            check(KvDtype::Bf16, |code| bf16::from_bits(code).to_f32());
        }
    }
}
