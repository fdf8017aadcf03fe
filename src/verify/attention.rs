//! Cases of attention, and of what comes before it: rotary positions and the KV cache.

use std::sync::Arc;

use super::numbers::{
    buffer, download, equal, floats, halves, mismatch, near, near_each, random, rounded, scratch, upload, words,
};
use crate::backend::cuda::{Attention, Cache, Gpu, Output, Region};
use crate::error::Result;
use crate::footprint::{CudaAttention, HALF, KvLayout, WORD};
use crate::quant::{KvDtype, WeightDtype};

/// A cache of one dtype: vectors as the host stores them, on the GPU, and as they read back.
pub struct Stored {
    layout: KvLayout,
    head_dim: usize,
    regions: [Region; 2],
    vectors: [Vec<f32>; 2],
}

impl Stored {
    /// Keys and values, `[kv_heads][slots][head_dim]`.
    pub fn new(gpu: &Arc<Gpu>, dtype: KvDtype, shape: &Attention, values: [&[f32]; 2]) -> Result<Self> {
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let layout = KvLayout::flat(dtype, kv_heads, head_dim, values[0].len() / head_dim / kv_heads);
        let layout = layout.ok_or_else(|| mismatch("a cache that no plan holds"))?;
        let each = values.map(|values| {
            let mut bytes = vec![0u8; layout.codes + layout.scales];
            let width = dtype.code_bytes(head_dim);
            for (at, vector) in values.chunks(head_dim).enumerate() {
                let mut words = vec![0u32; width.div_ceil(WORD)];
                let scale = dtype.encode(vector, &mut bytemuck::must_cast_slice_mut(&mut words)[..width]);
                bytes[at * width..][..width].copy_from_slice(&bytemuck::must_cast_slice(&words)[..width]);
                if layout.scales > 0 {
                    bytes[layout.codes + at * WORD..][..WORD].copy_from_slice(&scale.to_le_bytes());
                }
            }
            Ok((upload(gpu, &bytes)?, decode(layout, head_dim, &bytes)))
        });
        let [keys, values] = each;
        let ((keys, stored_keys), (values, stored_values)) = (keys?, values?);
        Ok(Self { layout, head_dim, regions: [keys, values], vectors: [stored_keys, stored_values] })
    }

    /// The cache as kernels take it.
    pub fn cache(&self) -> Cache {
        Cache::new(self.layout, &self.regions)
    }

    /// Keys or values as they are now.
    pub fn read_back(&self, which: usize) -> Result<Vec<f32>> {
        let mut bytes = vec![0; self.regions[which].len()];
        self.regions[which].read(&mut bytes)?;
        Ok(decode(self.layout, self.head_dim, &bytes))
    }
}

fn decode(layout: KvLayout, head_dim: usize, bytes: &[u8]) -> Vec<f32> {
    let width = layout.dtype.code_bytes(head_dim);
    let mut values = Vec::new();
    for (at, codes) in bytes[..layout.codes / width * width].chunks(width).enumerate() {
        let scale = bytes[layout.codes..].as_chunks().0.get(at).map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
        let mut vector = vec![0.0; head_dim];
        layout.dtype.decode(codes, scale, &mut vector);
        values.extend(vector);
    }
    values
}

/// Softmax over all keys that each query sees, in f64; and for each element the root of the sum of the squares
/// of its terms, by which what comes of their rounding is measured.
pub fn exact_attention(
    shape: &Attention,
    slots: usize,
    query: &[f32],
    [keys, values]: [&[f32]; 2],
) -> (Vec<f64>, Vec<f64>) {
    let width = shape.head_dim;
    let (mut out, mut spread) = (Vec::new(), Vec::new());
    for (at, query) in query.chunks(width).enumerate() {
        let (token, head) = (at / shape.heads, at % shape.heads);
        let last = shape.position + token;
        let first = if shape.window > 0 { (last + 1).saturating_sub(shape.window) } else { 0 };
        let row = |cache: &'_ [f32], key: usize, d: usize| {
            let slot = head * shape.kv_heads / shape.heads * slots + key % slots;
            f64::from(cache[slot * width + d])
        };
        let score = |key: usize| {
            let dot: f64 =
                (0..width).map(|d| f64::from(query[d]) * row(keys, key, d)).sum::<f64>() * f64::from(shape.scale);
            let cap = f64::from(shape.softcap);
            if cap > 0.0 { cap * (dot / cap).tanh() } else { dot }
        };
        let weights: Vec<f64> = (first..=last).map(|key| score(key).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for d in 0..width {
            let terms = (first..=last).map(|key| weights[key - first] / sum * row(values, key, d));
            out.push(terms.clone().sum());
            spread.push(terms.map(|term| term * term).sum::<f64>().sqrt());
        }
    }
    (out, spread)
}

/// A position, as kernels read it.
pub fn placed(gpu: &Arc<Gpu>, position: usize) -> Result<Region> {
    words(gpu, &[u32::try_from(position).unwrap_or(u32::MAX)])
}

/// Attention over a cache of `slots`, twice: a step leaves the counts as the next one needs them.
pub fn attended(gpu: &Arc<Gpu>, shape: &Attention, slots: usize, dtype: KvDtype) -> Result<()> {
    let Attention { heads, kv_heads, head_dim, tokens, .. } = *shape;
    let random_cache = |seed| random(kv_heads * slots * head_dim, seed).iter().map(|v| v * 2.0).collect::<Vec<_>>();
    let query = rounded(WeightDtype::F16, &random(tokens * heads * head_dim, 13));
    let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, tokens, slots))?;
    let stored = Stored::new(gpu, dtype, shape, [&random_cache(14), &random_cache(15)])?;
    let (exact, spread) = exact_attention(shape, slots, &query, stored.vectors.each_ref().map(Vec::as_slice));
    for _ in 0..2 {
        let (query, out) = (halves(gpu, &query)?, buffer(gpu, tokens * heads * head_dim * HALF)?);
        gpu.attend(shape, &query, &stored.cache(), &out, &placed(gpu, shape.position)?, &scratch)?;
        // Tensor cores take weights and values as f16.
        let rounding = if tokens > 8 { 1.5e-3 } else { 0.0 };
        let what = format!("{shape:?} over {slots} {dtype}");
        let ours = download(&out, WeightDtype::F16)?;
        near_each(&what, &ours, &exact, |i| 1e-5 + rounding * spread[i], Output::F16)?;
    }
    Ok(())
}

/// Vectors whose first `pairs` pairs are rotated by their positions.
fn rotated(shape: &Attention, heads: usize, x: &[f32], frequencies: &[f32], factor: f32) -> Vec<f64> {
    let mut y: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    for (at, head) in y.chunks_mut(shape.head_dim).enumerate() {
        for (i, frequency) in frequencies.iter().enumerate() {
            let angle = f64::from((shape.position + at / heads) as f32 * frequency);
            let (sin, cos) = (angle.sin() * f64::from(factor), angle.cos() * f64::from(factor));
            let (a, b) = (head[i], head[i + frequencies.len()]);
            (head[i], head[i + frequencies.len()]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
    y
}

/// Queries and keys that are rotated, and keys and values that go into a cache of `slots`.
pub fn stored(
    gpu: &Arc<Gpu>,
    shape: &Attention,
    pairs: usize,
    factor: f32,
    slots: usize,
    dtype: KvDtype,
) -> Result<()> {
    let Attention { heads, kv_heads, head_dim, position, tokens, .. } = *shape;
    let frequencies: Vec<f32> = (0..pairs).map(|i| 10f32.powf(-(i as f32) / 4.0)).collect();
    let input = |heads: usize, seed| rounded(WeightDtype::F16, &random(tokens * heads * head_dim, seed));
    let (query, key, value) = (input(heads, 16), input(kv_heads, 17), input(kv_heads, 18));
    let before = random(kv_heads * slots * head_dim, 19);
    let cache = Stored::new(gpu, dtype, shape, [&before, &before])?;
    let (queries, table) = (halves(gpu, &query)?, floats(gpu, &frequencies)?);
    let rope = (pairs > 0).then_some((&table, factor));
    let inputs = [&queries, &halves(gpu, &key)?, &halves(gpu, &value)?];
    gpu.rotate_and_store(shape, inputs, [None; 2], &cache.cache(), &placed(gpu, position)?, rope)?;
    let what = format!("{shape:?}, {pairs} pairs, {dtype}");
    let exact = rotated(shape, heads, &query, &frequencies, factor);
    near(&what, &download(&queries, WeightDtype::F16)?, &exact, 1e-6, Output::F16)?;
    let step = match dtype {
        KvDtype::F32 => 1e-6,
        KvDtype::F16 => 1e-3,
        KvDtype::Bf16 => 1e-2,
        KvDtype::Int8 => 1.3 / 127.0,
    };
    let key = rotated(shape, kv_heads, &key, &frequencies, factor);
    let value = value.iter().map(|v| f64::from(*v)).collect();
    for (which, rows) in [key, value].iter().enumerate() {
        let mut all: Vec<f64> = cache.vectors[which].iter().map(|v| f64::from(*v)).collect();
        for (at, row) in rows.chunks(head_dim).enumerate() {
            let (token, head) = (at / kv_heads, at % kv_heads);
            all[(head * slots + (position + token) % slots) * head_dim..][..head_dim].copy_from_slice(row);
        }
        near(&what, &cache.read_back(which)?, &all, step, Output::F32)?;
    }
    Ok(())
}

/// A pattern that is copied from one GPU to another, while what is queued behind the copy waits for it.
pub fn hop(from: &Arc<Gpu>, to: &Arc<Gpu>) -> Result<()> {
    const WORDS: u32 = 1 << 16;
    let pattern: Vec<u32> = (0..WORDS).map(|at| at.wrapping_mul(0x9e37_79b9)).collect();
    let (here, there) = (words(from, &pattern)?, words(to, &vec![0; pattern.len()])?);
    there.copy_from(&here)?;
    here.clear()?;
    let mut back = vec![0u32; pattern.len()];
    there.read(bytemuck::must_cast_slice_mut(&mut back))?;
    equal(&format!("{} words", pattern.len()), &back, &pattern)
}
