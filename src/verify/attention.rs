//! Cases of attention, and of what comes before it: rotary positions and the KV cache.

use std::sync::Arc;

use super::numbers::{
    buffer, download, equal, floats, halves, mismatch, near, near_each, random, rounded, scratch, upload, words,
};
use crate::backend::cuda::{Attention, Cache, Gpu, Output, Region, Rotation, Rows};
use crate::error::Result;
use crate::footprint::{CudaAttention, HALF, KvLayout, PAGE, WORD};
use crate::quant::{KvDtype, WeightDtype};

/// Where a token stands: its position, or −1 for none, and its sequence.
pub type Place = (i32, usize);

/// Tokens that follow on each other in a sequence.
pub fn run(position: usize, tokens: usize, sequence: usize) -> Vec<Place> {
    (position..position + tokens).map(|at| (i32::try_from(at).unwrap_or(i32::MAX), sequence)).collect()
}

/// What sequences have room for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Tokens of each, a multiple of [`PAGE`].
    pub slots: usize,
    /// Whether pages follow on each other; else they come from the last one down, each beside another sequence's.
    pub is_ring: bool,
    /// How many there are.
    pub sequences: usize,
}

impl Room {
    fn pages(self) -> usize {
        self.sequences * self.slots / PAGE
    }

    fn page(self, sequence: usize, at: usize) -> usize {
        let of_ring = sequence * (self.slots / PAGE) + at;
        if self.is_ring { of_ring } else { self.pages() - 1 - (at * self.sequences + sequence) }
    }

    /// Where the vector of a head for a token stands, in vectors.
    fn vector(self, shape: &Attention, (position, sequence): Place, kv_head: usize) -> usize {
        let slot = usize::try_from(position).unwrap_or_default() % self.slots;
        (self.page(sequence, slot / PAGE) * shape.kv_heads + kv_head) * PAGE + slot % PAGE
    }

    /// Where tokens stand, as kernels take it.
    pub fn rows(self, gpu: &Arc<Gpu>, places: &[Place]) -> Result<Rows> {
        let word = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let each = |of: &dyn Fn(&Place) -> u32| words(gpu, &places.iter().map(of).collect::<Vec<_>>());
        let pages = (0..self.sequences).flat_map(|sequence| (0..self.slots / PAGE).map(move |at| (sequence, at)));
        Ok(Rows {
            positions: each(&|place| place.0.cast_unsigned())?,
            sequences: each(&|place| word(place.1))?,
            tables: words(gpu, &pages.map(|(sequence, at)| word(self.page(sequence, at))).collect::<Vec<_>>())?,
        })
    }
}

/// A case by its heads, those of keys and values, and their width: tokens of one sequence, where there are no others,
/// follow on each other. A window is a ring as short as it can be.
pub fn case(
    [heads, kv_heads, head_dim]: [usize; 3],
    places: &[Place],
    window: usize,
    softcap: f32,
) -> (Attention, Room) {
    let last = places.iter().map(|place| place.0).max().unwrap_or_default();
    let (tokens, keys) = (places.len(), usize::try_from(last).unwrap_or_default() + 1);
    let is_run = places.iter().all(|place| place.1 == places[0].1);
    let is_ring = window > 0;
    let room = Room {
        slots: (if is_ring { window + tokens } else { keys }).next_multiple_of(PAGE),
        is_ring,
        sequences: places.iter().map(|place| place.1).max().unwrap_or_default() + 1,
    };
    let scale = 1.0 / (head_dim as f32).sqrt();
    (Attention { heads, kv_heads, head_dim, tokens, is_run, keys, window, scale, softcap }, room)
}

/// A cache of one dtype: vectors as the host stores them, on the GPU, and as they read back.
pub struct Stored {
    room: Room,
    layout: KvLayout,
    head_dim: usize,
    regions: [Region; 2],
    vectors: [Vec<f32>; 2],
}

impl Stored {
    /// Keys and values, `[pages][kv_heads][PAGE][head_dim]`, the same numbers for the same seeds.
    pub fn new(gpu: &Arc<Gpu>, dtype: KvDtype, shape: &Attention, room: Room, seeds: [u64; 2]) -> Result<Self> {
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let Room { slots, is_ring, .. } = room;
        let layout = KvLayout::new(dtype, (kv_heads, head_dim), room.pages());
        let layout = layout.ok_or_else(|| mismatch("a cache that no plan holds"))?;
        let each = seeds.map(|seed| {
            let mut bytes = vec![0u8; layout.codes + layout.scales];
            let width = dtype.code_bytes(head_dim);
            let values: Vec<f32> = random(layout.slots * kv_heads * head_dim, seed).iter().map(|v| v * 2.0).collect();
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
        let layout = KvLayout { slots, is_ring, ..layout };
        Ok(Self { room, layout, head_dim, regions: [keys, values], vectors: [stored_keys, stored_values] })
    }

    /// The cache as kernels take it.
    pub fn cache(&self) -> Cache {
        Cache::new(self.layout, &self.regions)
    }

    /// Keys and values on the GPU.
    pub fn regions(&self) -> &[Region; 2] {
        &self.regions
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
    for (at, codes) in bytes[..layout.codes].chunks(width).enumerate() {
        let scale = bytes[layout.codes..].as_chunks().0.get(at).map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
        let mut vector = vec![0.0; head_dim];
        layout.dtype.decode(codes, scale, &mut vector);
        values.extend(vector);
    }
    values
}

/// Softmax over all keys that each query sees, in f64; and for each element the root of the sum of the squares
/// of its terms, by which what comes of their rounding is measured.
fn exact_attention(shape: &Attention, places: &[Place], query: &[f32], stored: &Stored) -> (Vec<f64>, Vec<f64>) {
    let width = shape.head_dim;
    let [keys, values] = &stored.vectors;
    let (mut out, mut spread) = (Vec::new(), Vec::new());
    for (at, query) in query.chunks(width).enumerate() {
        let ((last, sequence), head) = (places[at / shape.heads], at % shape.heads);
        let window = i32::try_from(shape.window).unwrap_or(i32::MAX);
        let first = if window > 0 { (last + 1 - window).max(0) } else { 0 };
        let kv_head = head * shape.kv_heads / shape.heads;
        let row = |cache: &'_ [f32], key: i32, d: usize| {
            f64::from(cache[stored.room.vector(shape, (key, sequence), kv_head) * width + d])
        };
        let score = |key: i32| {
            let dot: f64 =
                (0..width).map(|d| f64::from(query[d]) * row(keys, key, d)).sum::<f64>() * f64::from(shape.scale);
            let cap = f64::from(shape.softcap);
            if cap > 0.0 { cap * (dot / cap).tanh() } else { dot }
        };
        let weights: Vec<(i32, f64)> = (first..=last).map(|key| (key, score(key).exp())).collect();
        let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
        for d in 0..width {
            let terms = weights.iter().map(|(key, weight)| weight / sum * row(values, *key, d));
            out.push(terms.clone().sum());
            spread.push(terms.map(|term| term * term).sum::<f64>().sqrt());
        }
    }
    (out, spread)
}

/// Attention over what sequences keep, twice: a step leaves the counts as the next one needs them.
pub fn attended(gpu: &Arc<Gpu>, shape: &Attention, places: &[Place], room: Room, dtype: KvDtype) -> Result<()> {
    let Attention { heads, kv_heads, head_dim, tokens, .. } = *shape;
    let query = rounded(WeightDtype::F16, &random(tokens * heads * head_dim, 13));
    let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, tokens, room.slots))?;
    let stored = Stored::new(gpu, dtype, shape, room, [14, 15])?;
    let (exact, spread) = exact_attention(shape, places, &query, &stored);
    for _ in 0..2 {
        let (query, out) = (halves(gpu, &query)?, buffer(gpu, tokens * heads * head_dim * HALF)?);
        gpu.attend(shape, &query, &stored.cache(), &out, &room.rows(gpu, places)?, &scratch)?;
        // Tensor cores take weights and values as f16.
        let rounding = if shape.is_run && tokens > 8 { 1.5e-3 } else { 0.0 };
        let what = format!("{shape:?} over {room:?} {dtype}");
        let ours = download(&out, WeightDtype::F16)?;
        near_each(&what, &ours, &exact, |i| 1e-5 + rounding * spread[i], Output::F16)?;
    }
    Ok(())
}

/// The frequencies of each sequence, with some behind them that are none.
fn frequencies(sequences: usize, pairs: usize) -> (Vec<f32>, usize) {
    let one = |sequence: usize| (0..=pairs).map(move |i| 10f32.powf(-(i as f32) / 4.0) / (1 + sequence) as f32);
    ((0..sequences).flat_map(one).collect(), pairs + 1)
}

/// Vectors whose first `pairs` pairs are rotated by their positions.
fn rotated(shape: &Attention, places: &[Place], heads: usize, x: &[f32], pairs: usize, factor: f32) -> Vec<f64> {
    let mut y: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    for (at, head) in y.chunks_mut(shape.head_dim).enumerate() {
        let (position, sequence) = places[at / heads];
        let (frequencies, stride) = frequencies(sequence + 1, pairs);
        for (i, frequency) in frequencies[sequence * stride..][..pairs].iter().enumerate().filter(|_| position >= 0) {
            let angle = f64::from(position as f32 * frequency);
            let (sin, cos) = (angle.sin() * f64::from(factor), angle.cos() * f64::from(factor));
            let (a, b) = (head[i], head[i + pairs]);
            (head[i], head[i + pairs]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
    y
}

/// Queries and keys that are rotated, and keys and values that go into a cache.
pub fn stored(
    gpu: &Arc<Gpu>,
    shape: &Attention,
    places: &[Place],
    (pairs, factor): (usize, f32),
    room: Room,
    dtype: KvDtype,
) -> Result<()> {
    let Attention { heads, kv_heads, head_dim, tokens, .. } = *shape;
    let input = |heads: usize, seed| rounded(WeightDtype::F16, &random(tokens * heads * head_dim, seed));
    let (query, key, value) = (input(heads, 16), input(kv_heads, 17), input(kv_heads, 18));
    let cache = Stored::new(gpu, dtype, shape, room, [19, 20])?;
    let (table, stride) = frequencies(room.sequences, pairs);
    let rotation = Rotation { frequencies: floats(gpu, &table)?, stride, pairs, factor };
    let (queries, rotation) = (halves(gpu, &query)?, (pairs > 0).then_some(&rotation));
    let inputs = [&queries, &halves(gpu, &key)?, &halves(gpu, &value)?];
    gpu.rotate_and_store(shape, inputs, [None; 2], &cache.cache(), &room.rows(gpu, places)?, rotation)?;
    let what = format!("{shape:?}, {pairs} pairs, {room:?} {dtype}");
    let exact = rotated(shape, places, heads, &query, pairs, factor);
    near(&what, &download(&queries, WeightDtype::F16)?, &exact, 1e-6, Output::F16)?;
    let step = match dtype {
        KvDtype::F32 => 1e-6,
        KvDtype::F16 => 1e-3,
        KvDtype::Bf16 => 1e-2,
        KvDtype::Int8 => 1.3 / 127.0,
    };
    let key = rotated(shape, places, kv_heads, &key, pairs, factor);
    let value = value.iter().map(|v| f64::from(*v)).collect();
    for (which, rows) in [key, value].iter().enumerate() {
        let mut all: Vec<f64> = cache.vectors[which].iter().map(|v| f64::from(*v)).collect();
        for (at, row) in rows.chunks(head_dim).enumerate().filter(|(at, _)| places[at / kv_heads].0 >= 0) {
            let vector = room.vector(shape, places[at / kv_heads], at % kv_heads);
            all[vector * head_dim..][..head_dim].copy_from_slice(row);
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
