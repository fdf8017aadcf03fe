//! The KV cache of a block and attention over it.

use rayon::prelude::*;

use super::matmul::dot;

/// Keys whose scores are held at once.
const SPAN: usize = 64;

/// The shape of a block's cache, `[kv_heads][context][head_dim]`, and of its queries.
#[derive(Clone, Copy)]
pub struct Cache {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
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

    /// Causal attention with grouped queries: `softmax(q·k / sqrt(d)) · v` for
    /// each query of `[tokens][heads][head_dim]`, over the keys up to its own
    /// position.
    pub fn attend(&self, query: &[f32], keys: &[f32], values: &[f32], position: usize, attended: &mut [f32]) {
        let width = self.head_dim;
        attended.par_chunks_mut(width).zip(query.par_chunks(width)).enumerate().for_each(|(at, (out, query))| {
            let (token, head) = (at / self.heads, at % self.heads);
            let kv_head = head * self.kv_heads / self.heads;
            let start = kv_head * self.context * width;
            let seen = start..start + (position + token + 1) * width;
            attend_one(query, &keys[seen.clone()], &values[seen], out);
        });
    }
}

/// One query over its keys and values, `[keys][head_dim]`. The softmax runs
/// along with the keys (its largest score so far is kept, and what was summed
/// is rescaled when a larger one comes), so nothing is held that grows with them.
fn attend_one(query: &[f32], keys: &[f32], values: &[f32], out: &mut [f32]) {
    let width = query.len();
    let scale = 1.0 / (width as f32).sqrt();
    let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    out.fill(0.0);
    for (keys, values) in keys.chunks(SPAN * width).zip(values.chunks(SPAN * width)) {
        let mut scores = [0.0f32; SPAN];
        let scores = &mut scores[..keys.len() / width];
        for (score, key) in scores.iter_mut().zip(keys.chunks(width)) {
            *score = dot(query, key) * scale;
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
    fn reference(query: &[f32], keys: &[f32], values: &[f32]) -> Vec<f64> {
        let width = query.len();
        let score = |key: &[f32]| {
            let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            (dot / (width as f64).sqrt()).exp()
        };
        let weights: Vec<f64> = keys.chunks(width).map(score).collect();
        let sum: f64 = weights.iter().sum();
        (0..width)
            .map(|i| weights.iter().zip(values.chunks(width)).map(|(w, v)| w / sum * f64::from(v[i])).sum())
            .collect()
    }

    #[test]
    fn attention_is_softmax() {
        for keys in [1, 2, 63, 64, 65, 200] {
            let wave = |count: usize, step: f32| (0..count).map(|i| (i as f32 * step).sin() * 2.0).collect::<Vec<_>>();
            let (query, keys, values) = (wave(16, 0.7), wave(keys * 16, 0.31), wave(keys * 16, 0.17));
            let mut out = vec![0.0; 16];
            attend_one(&query, &keys, &values, &mut out);
            for (ours, exact) in out.iter().zip(reference(&query, &keys, &values)) {
                assert!((f64::from(*ours) - exact).abs() < 1e-5, "{} keys: {ours} {exact}", keys.len() / 16);
            }
        }
    }
}
