//! The KV cache of a block and attention over it.

use rayon::prelude::*;

use super::matmul::dot;
use super::ops::soft_cap;

/// Keys whose scores are held at once.
const SPAN: usize = 64;

/// The shape of a block's cache, `[kv_heads][context][head_dim]`, and of its queries.
#[derive(Clone, Copy)]
pub struct Cache {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
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

impl Cache {
    /// Puts `rows`, `[tokens][kv_heads][head_dim]`, into `cache` from `position` on.
    pub fn append(&self, rows: &[f32], cache: &mut [f32], position: usize) {
        for (token, row) in rows.chunks(self.kv_heads * self.head_dim).enumerate() {
            for (head, values) in row.chunks(self.head_dim).enumerate() {
                let at = (head * self.context + position + token) * self.head_dim;
                cache[at..at + self.head_dim].copy_from_slice(values);
            }
        }
    }

    /// Causal attention with grouped queries: `softmax(scores) · v` for each
    /// query of `[tokens][heads][head_dim]`, over the keys up to its own
    /// position, those of its window if there is one.
    pub fn attend(&self, query: &[f32], keys: &[f32], values: &[f32], position: usize, attended: &mut [f32]) {
        let width = self.head_dim;
        attended.par_chunks_mut(width).zip(query.par_chunks(width)).enumerate().for_each(|(at, (out, query))| {
            let (token, head) = (at / self.heads, at % self.heads);
            let kv_head = head * self.kv_heads / self.heads;
            let start = kv_head * self.context * width;
            let end = position + token + 1;
            let first = self.scores.window.map_or(0, |window| end.saturating_sub(window));
            let seen = start + first * width..start + end * width;
            attend_one(query, &keys[seen.clone()], &values[seen], self.scores, out);
        });
    }
}

/// One query over its keys and values, `[keys][head_dim]`. The softmax runs
/// along with the keys (its largest score so far is kept, and what was summed
/// is rescaled when a larger one comes), so nothing is held that grows with them.
fn attend_one(query: &[f32], keys: &[f32], values: &[f32], how: Scores, out: &mut [f32]) {
    let width = query.len();
    let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    out.fill(0.0);
    for (keys, values) in keys.chunks(SPAN * width).zip(values.chunks(SPAN * width)) {
        let mut scores = [0.0f32; SPAN];
        let scores = &mut scores[..keys.len() / width];
        for (score, key) in scores.iter_mut().zip(keys.chunks(width)) {
            *score = soft_cap(dot(query, key) * how.scale, how.softcap);
        }
        let before = largest;
        largest = scores.iter().fold(largest, |max, score| max.max(*score));
        let rescale = (before - largest).exp();
        sum *= rescale;
        for out in &mut *out {
            *out *= rescale;
        }
        for (score, value) in scores.iter().zip(values.chunks(width)) {
            let weight = (score - largest).exp();
            sum += weight;
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight * value;
            }
        }
    }
    for out in out {
        *out /= sum;
    }
}

#[cfg(test)]
mod tests {
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

    fn assert_close(ours: &[f32], exact: &[f64], case: &str) {
        for (ours, exact) in ours.iter().zip(exact) {
            assert!((f64::from(*ours) - exact).abs() < 1e-5, "{case}: {ours} {exact}");
        }
    }

    #[test]
    fn attention_is_softmax() {
        for softcap in [None, Some(3.0)] {
            let how = Scores { scale: 0.25, softcap, window: None };
            for keys in [1, 2, 63, 64, 65, 200] {
                let (query, keys, values) = (wave(16, 0.7), wave(keys * 16, 0.31), wave(keys * 16, 0.17));
                let mut out = vec![0.0; 16];
                attend_one(&query, &keys, &values, how, &mut out);
                let exact = reference(&query, &keys, &values, how);
                assert_close(&out, &exact, &format!("{} keys, cap {softcap:?}", keys.len() / 16));
            }
        }
    }

    #[test]
    fn a_window_ends_with_the_token_itself() {
        let (width, context) = (4, 10);
        let (keys, values, query) = (wave(context * width, 0.31), wave(context * width, 0.17), wave(3 * width, 0.7));
        for (window, first) in [(None, [0, 0, 0]), (Some(1), [5, 6, 7]), (Some(6), [0, 1, 2]), (Some(99), [0, 0, 0])] {
            let scores = Scores { scale: 0.5, softcap: None, window };
            let cache = Cache { heads: 1, kv_heads: 1, head_dim: width, context, scores };
            let mut out = vec![0.0; 3 * width];
            cache.attend(&query, &keys, &values, 5, &mut out);
            for (token, first) in first.into_iter().enumerate() {
                let (seen, at) = (first * width..(5 + token + 1) * width, token * width..(token + 1) * width);
                let exact = reference(&query[at.clone()], &keys[seen.clone()], &values[seen], scores);
                assert_close(&out[at], &exact, &format!("token {token}, window {window:?}"));
            }
        }
    }
}
