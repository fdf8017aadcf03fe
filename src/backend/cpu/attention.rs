//! The KV cache of a block and attention over it.

use std::ops::Range;

use super::matmul::dot;
use super::ops::soft_cap;
use super::pool::Pool;
use crate::quant::KvDtype;

/// Keys whose scores are held at once.
const SPAN: usize = 64;

/// The shape of a block's cache, `[kv_heads][context][head_dim]`, and of its queries.
#[derive(Clone, Copy)]
pub struct Cache {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
    pub dtype: KvDtype,
    pub scores: Scores,
}

/// How queries score keys: `cap · tanh(scale · q·k / cap)`, or without the cap
/// `scale · q·k`, for the last `window` keys or for all.
#[derive(Clone, Copy)]
pub struct Scores {
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
}

/// The keys, or the values, of a block: codes and scales as [`KvLayout`] has them.
///
/// [`KvLayout`]: crate::plan::memory::KvLayout
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    pub codes: &'a [u8],
    pub scales: &'a [f32],
}

impl Cache {
    /// Stores `rows`, `[tokens][kv_heads][head_dim]`, from `position` on.
    pub fn append(&self, rows: &[f32], codes: &mut [u8], scales: &mut [f32], position: usize) {
        let width = self.dtype.code_bytes(self.head_dim);
        for (token, row) in rows.chunks(self.kv_heads * self.head_dim).enumerate() {
            for (head, vector) in row.chunks(self.head_dim).enumerate() {
                let at = head * self.context + position + token;
                let scale = self.dtype.encode(vector, &mut codes[at * width..][..width]);
                if let Some(stored) = scales.get_mut(at) {
                    *stored = scale;
                }
            }
        }
    }

    /// Causal attention with grouped queries: `softmax(scores) · v` for each
    /// query of `[tokens][heads][head_dim]`, over the keys up to its own
    /// position, those of its window if there is one.
    pub fn attend(
        &self,
        pool: &Pool,
        query: &[f32],
        keys: Stored,
        values: Stored,
        position: usize,
        attended: &mut [f32],
    ) {
        let width = self.head_dim;
        pool.chunks(attended, width, |at, out| {
            let (token, head) = (at / self.heads, at % self.heads);
            let start = head * self.kv_heads / self.heads * self.context;
            let end = position + token + 1;
            let first = self.scores.window.map_or(0, |window| end.saturating_sub(window));
            let query = &query[at * width..][..width];
            self.attend_one(query, keys, values, start + first..start + end, &mut vec![0.0; width], out);
        });
    }

    /// One query over the keys and values at `seen`. The softmax runs along
    /// with the keys (its largest score so far is kept, and what was summed is
    /// rescaled when a larger one comes), so nothing is held that grows with
    /// them but `vector`, one of them as f32.
    fn attend_one(
        &self,
        query: &[f32],
        keys: Stored,
        values: Stored,
        seen: Range<usize>,
        vector: &mut [f32],
        out: &mut [f32],
    ) {
        let Scores { scale, softcap, .. } = self.scores;
        let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0f32);
        out.fill(0.0);
        for start in seen.clone().step_by(SPAN) {
            let mut scores = [0.0f32; SPAN];
            let scores = &mut scores[..SPAN.min(seen.end - start)];
            for (at, score) in (start..).zip(scores.iter_mut()) {
                self.read(keys, at, vector);
                *score = soft_cap(dot(query, vector) * scale, softcap);
            }
            let before = largest;
            largest = scores.iter().fold(largest, |max, score| max.max(*score));
            let rescale = (before - largest).exp();
            sum *= rescale;
            for out in &mut *out {
                *out *= rescale;
            }
            for (at, score) in (start..).zip(scores.iter()) {
                let weight = (score - largest).exp();
                sum += weight;
                self.read(values, at, vector);
                for (out, value) in out.iter_mut().zip(vector.iter()) {
                    *out += weight * value;
                }
            }
        }
        for out in out {
            *out /= sum;
        }
    }

    fn read(&self, stored: Stored, at: usize, vector: &mut [f32]) {
        let width = self.dtype.code_bytes(self.head_dim);
        let scale = stored.scales.get(at).copied().unwrap_or(1.0);
        self.dtype.decode(&stored.codes[at * width..][..width], scale, vector);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    /// Softmax in f64, all scores at once.
    fn reference(query: &[f32], keys: &[f32], values: &[f32], how: Scores) -> Vec<f64> {
        let width = query.len();
        let score = |key: &[f32]| {
            let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            let score = dot * f64::from(how.scale);
            how.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()).exp()
        };
        let weights: Vec<f64> = keys.chunks(width).map(score).collect();
        let sum: f64 = weights.iter().sum();
        (0..width)
            .map(|i| weights.iter().zip(values.chunks(width)).map(|(w, v)| w / sum * f64::from(v[i])).sum())
            .collect()
    }

    fn wave(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * step).sin() * 2.0).collect()
    }

    /// What `cache` reads of rows that it stored.
    struct Store {
        cells: Vec<u32>,
        scales: Vec<f32>,
    }

    impl Store {
        fn of(cache: &Cache, rows: &[f32]) -> Self {
            let mut cells = vec![0u32; cache.context * cache.dtype.code_bytes(cache.head_dim) / 4];
            let mut scales = vec![0.0; cache.context * cache.dtype.scale_bytes() / 4];
            cache.append(rows, bytemuck::cast_slice_mut(&mut cells), &mut scales, 0);
            Self { cells, scales }
        }

        fn all(&self) -> Stored<'_> {
            Stored { codes: bytemuck::cast_slice(&self.cells), scales: &self.scales }
        }
    }

    fn assert_close(ours: &[f32], exact: &[f64], error: f64, case: &str) {
        for (ours, exact) in ours.iter().zip(exact) {
            assert!((f64::from(*ours) - exact).abs() < error, "{case}: {ours} {exact}");
        }
    }

    #[test]
    fn attention_is_softmax() {
        let pool = Pool::new(NonZeroUsize::MIN);
        for (dtype, error) in [(KvDtype::F32, 1e-5), (KvDtype::F16, 2e-3), (KvDtype::Bf16, 2e-2), (KvDtype::Int8, 3e-2)]
        {
            for (softcap, count) in [(None, 1), (Some(3.0), 2), (None, 63), (None, 64), (Some(3.0), 65), (None, 200)] {
                let scores = Scores { scale: 0.25, softcap, window: None };
                let cache = Cache { heads: 1, kv_heads: 1, head_dim: 16, context: count + 3, dtype, scores };
                let (query, keys, values) = (wave(16, 0.7), wave(count * 16, 0.31), wave(count * 16, 0.17));
                let (stored_keys, stored_values) = (Store::of(&cache, &keys), Store::of(&cache, &values));
                let mut out = vec![0.0; 16];
                cache.attend(&pool, &query, stored_keys.all(), stored_values.all(), count - 1, &mut out);
                let exact = reference(&query, &keys, &values, scores);
                assert_close(&out, &exact, error, &format!("{dtype}, {count} keys, cap {softcap:?}"));
            }
        }
    }

    #[test]
    fn a_window_ends_with_the_token_itself() {
        let pool = Pool::new(NonZeroUsize::MIN);
        let (width, context) = (4, 10);
        let (keys, values, query) = (wave(context * width, 0.31), wave(context * width, 0.17), wave(3 * width, 0.7));
        for (window, first) in [(None, [0, 0, 0]), (Some(1), [5, 6, 7]), (Some(6), [0, 1, 2]), (Some(99), [0, 0, 0])] {
            let scores = Scores { scale: 0.5, softcap: None, window };
            let cache = Cache { heads: 1, kv_heads: 1, head_dim: width, context, dtype: KvDtype::F32, scores };
            let (stored_keys, stored_values) = (Store::of(&cache, &keys), Store::of(&cache, &values));
            let mut out = vec![0.0; 3 * width];
            cache.attend(&pool, &query, stored_keys.all(), stored_values.all(), 5, &mut out);
            for (token, first) in first.into_iter().enumerate() {
                let (seen, at) = (first * width..(5 + token + 1) * width, token * width..(token + 1) * width);
                let exact = reference(&query[at.clone()], &keys[seen.clone()], &values[seen], scores);
                assert_close(&out[at], &exact, 1e-5, &format!("token {token}, window {window:?}"));
            }
        }
    }
}
