//! Rotary positions, the KV cache, and attention over it.

use std::sync::Arc;

use evenkeel::backend::cuda::{Affine, Attention, Cache, Gpu, Norm, Output, Region};
use evenkeel::footprint::{CudaAttention, KvLayout};
use evenkeel::model_config::NormKind;
use evenkeel::quant::{KvDtype, WeightDtype};
use evenkeel::verify::exact_attention;

use super::{
    DTYPES, buffer, download, floats, halves, near, near_each, placed, random, rounded, scratch, upload, vector,
};

/// A cache of one dtype: vectors as the host stores them, on the GPU, and as they read back.
struct TestCache {
    layout: KvLayout,
    regions: [Region; 2],
    stored: [Vec<f32>; 2],
}

impl TestCache {
    fn new(gpu: &Arc<Gpu>, dtype: KvDtype, [kv_heads, head_dim]: [usize; 2], values: [&[f32]; 2]) -> Self {
        let layout = KvLayout::flat(dtype, kv_heads, head_dim, values[0].len() / head_dim / kv_heads).unwrap();
        let each = values.map(|values| {
            let mut bytes = vec![0u8; layout.codes + layout.scales];
            for (at, vector) in values.chunks(head_dim).enumerate() {
                let width = dtype.code_bytes(head_dim);
                let mut words = vec![0u32; width.div_ceil(4)];
                let scale = dtype.encode(vector, &mut bytemuck::cast_slice_mut(&mut words)[..width]);
                bytes[at * width..][..width].copy_from_slice(&bytemuck::cast_slice(&words)[..width]);
                if layout.scales > 0 {
                    bytes[layout.codes + at * 4..][..4].copy_from_slice(&scale.to_le_bytes());
                }
            }
            (upload(gpu, &bytes), Self::decode(layout, head_dim, &bytes))
        });
        let [(keys, stored_keys), (values, stored_values)] = each;
        Self { layout, regions: [keys, values], stored: [stored_keys, stored_values] }
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

    fn cache(&self) -> Cache {
        Cache::new(self.layout, &self.regions)
    }

    fn read_back(&self, which: usize, head_dim: usize) -> Vec<f32> {
        let mut bytes = vec![0; self.regions[which].len()];
        self.regions[which].read(&mut bytes).unwrap();
        Self::decode(self.layout, head_dim, &bytes)
    }
}

pub fn attention_equals_the_reference(gpu: &Arc<Gpu>) {
    for (heads, kv_heads, head_dim, position, tokens, window, softcap) in [
        (1, 1, 2, 0, 1, 0, 0.0),
        (4, 2, 16, 0, 5, 0, 0.0),
        (6, 2, 20, 3, 4, 0, 30.0),
        (2, 1, 64, 140, 2, 0, 0.0),
        (2, 2, 66, 300, 1, 130, 0.0),
        (4, 1, 8, 2, 9, 3, 5.0),
        (1, 1, 256, 127, 2, 0, 0.0),
        (1, 1, 512, 5, 1, 0, 0.0),
        (10, 2, 24, 700, 1, 0, 0.0),
        (4, 2, 16, 1500, 3, 900, 20.0),
        (3, 3, 130, 2100, 1, 0, 0.0),
        (2, 1, 4, 300, 280, 0, 0.0),
        (4, 2, 64, 0, 40, 0, 0.0),
        (4, 1, 128, 100, 35, 0, 0.0),
        (3, 3, 80, 5, 70, 30, 0.0),
        (6, 2, 256, 37, 20, 0, 20.0),
        (2, 1, 192, 300, 9, 0, 0.0),
        (4, 1, 32, 700, 33, 130, 50.0),
        (7, 1, 128, 200, 67, 1, 0.0),
        // So many blocks that no keys are shared out: several tiles of them for each.
        (8, 8, 24, 100, 130, 0, 0.0),
        // Scores far beyond their cap, for each kernel.
        (2, 1, 128, 30, 35, 0, 0.3),
        (2, 2, 40, 70, 70, 0, 0.3),
        (7, 1, 136, 3, 10, 0, 0.3),
        (2, 1, 128, 30, 35, 0, 3.0),
        (7, 1, 136, 3, 10, 0, 3.0),
        (1, 1, 12, 300, 1, 0, 3.0),
        (4, 1, 64, 300, 1, 0, 3.0),
        (4, 1, 20, 300, 2, 0, 0.3),
        (4, 1, 16, 300, 1, 0, 3.0),
        (4, 1, 20, 140, 1, 0, 3.0),
        // Parts that are added up, some of them by a remainder.
        (4, 2, 64, 600, 9, 0, 0.0),
        (4, 2, 128, 700, 9, 0, 0.0),
        (4, 2, 136, 1000, 9, 0, 0.0),
        (4, 1, 16, 900, 1, 0, 0.0),
        (2, 2, 16, 900, 1, 0, 0.0),
        (1, 1, 64, 300, 1, 0, 0.3),
        (4, 1, 6, 40, 1, 7, 0.0),
    ] {
        let (slots, scale) = (position + tokens + 3, 1.0 / (head_dim as f32).sqrt());
        let shape = Attention { heads, kv_heads, head_dim, position, tokens, window, scale, softcap };
        attends_as_the_reference(gpu, &shape, slots);
    }
}

pub fn attention_over_a_ring_equals_the_reference(gpu: &Arc<Gpu>) {
    for (heads, kv_heads, head_dim, tokens, window, softcap) in [
        (4, 2, 16, 1_usize, 1, 0.0),
        (2, 2, 66, 1, 130, 0.0),
        (6, 2, 20, 4, 3, 30.0),
        (4, 1, 24, 1, 700, 0.0),
        (4, 2, 64, 40, 20, 0.0),
        (3, 3, 80, 70, 30, 0.0),
        (2, 1, 4, 100, 60, 0.0),
        (6, 2, 256, 20, 150, 20.0),
        (7, 1, 128, 67, 1, 0.0),
        (4, 1, 32, 33, 130, 50.0),
    ] {
        let (least, scale) = (tokens + window - 1, 1.0 / (head_dim as f32).sqrt());
        for slots in [least, least.next_multiple_of(64) + 64] {
            // Not yet full; full; the border among the tokens, among the keys, and before either.
            for position in [0, slots - tokens, slots - tokens / 2, slots + window / 2, 100_000 * slots + least] {
                let shape = Attention { heads, kv_heads, head_dim, position, tokens, window, scale, softcap };
                attends_as_the_reference(gpu, &shape, slots);
            }
        }
    }
}

#[track_caller]
fn attends_as_the_reference(gpu: &Arc<Gpu>, shape: &Attention, slots: usize) {
    let Attention { heads, kv_heads, head_dim, tokens, .. } = *shape;
    let random_cache = |seed| random(kv_heads * slots * head_dim, seed).iter().map(|v| v * 2.0).collect::<Vec<_>>();
    let query = rounded(&random(tokens * heads * head_dim, 13));
    let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, tokens, slots));
    for dtype in KvDtype::ALL {
        let cache = TestCache::new(gpu, dtype, [kv_heads, head_dim], [&random_cache(14), &random_cache(15)]);
        let (exact, spread) = exact_attention(shape, slots, &query, cache.stored.each_ref().map(Vec::as_slice));
        // A step leaves the counts as the next one needs them.
        for _ in 0..2 {
            let out = buffer(gpu, tokens * heads * head_dim * 2);
            let (query, cache) = (halves(gpu, &query), cache.cache());
            gpu.attend(shape, &query, &cache, &out, &placed(gpu, shape.position), &scratch).unwrap();
            let ours = download(&out, WeightDtype::F16);
            // Tensor cores take weights and values as f16.
            let rounding = if tokens > 8 { 1.5e-3 } else { 0.0 };
            let what = format!("{shape:?} over {slots} {dtype}");
            near_each(&what, &ours, &exact, |i| 1e-5 + rounding * spread[i], Output::F16);
        }
    }
}

/// NaN in a key or a value, or what becomes too large as it is rotated, shows in all tokens that see it.
pub fn attention_over_what_is_no_number_is_none(gpu: &Arc<Gpu>) {
    let (heads, kv_heads, head_dim, slots, before) = (4, 2, 16, 150, 140);
    let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, slots, slots));
    let frequencies = floats(gpu, &[1.0; 8]);
    for dtype in KvDtype::ALL {
        // The query is far below, so that a key that were infinite would weigh nothing.
        for (broken, softcap, value) in
            [("key", 0.0, f32::NAN), ("key", 30.0, f32::NAN), ("value", 0.0, f32::NAN), ("query", 30.0, 60_000.0)]
        {
            let layout = KvLayout::flat(dtype, kv_heads, head_dim, slots).unwrap();
            let cache = Cache::new(layout, &[0; 2].map(|_| buffer(gpu, layout.codes + layout.scales)));
            let run = |position: usize, tokens: usize, broken: Option<&str>| {
                let vectors = |name: &str, heads: usize, seed| {
                    let mut values = random(tokens * heads * head_dim, seed);
                    if broken == Some(name) {
                        // In the first token a pair, of the first head alone.
                        values[1] = value;
                        values[1 + head_dim / 2] = value;
                    }
                    halves(gpu, &values)
                };
                let query = vectors("query", heads, 80);
                let [key, value] = [("key", 81), ("value", 82)].map(|(name, seed)| vectors(name, kv_heads, seed));
                let shape = Attention { heads, kv_heads, head_dim, position, tokens, window: 0, scale: 1.0, softcap };
                let (at, out) = (placed(gpu, position), buffer(gpu, query.len()));
                let rope = Some((&frequencies, 1.0));
                gpu.rotate_and_store(&shape, [&query, &key, &value], [None; 2], &cache, &at, rope).unwrap();
                gpu.attend(&shape, &query, &cache, &out, &at, &scratch).unwrap();
                let out = download(&out, WeightDtype::F16);
                out.chunks(head_dim).map(|head| head.iter().any(|x| x.is_nan())).collect::<Vec<_>>()
            };
            let what = format!("{broken} of {value}, {dtype}, a cap of {softcap}");
            // Of a token the first two heads read the first of keys and values.
            assert!(!run(0, 20, None).contains(&true), "{what}");
            for (position, tokens, broken) in
                [(20, 1, Some(broken)), (21, 1, None), (22, 30, None), (52, before - 52, None), (before, 3, None)]
            {
                let is_query = broken == Some("query");
                for (at, is_nan) in run(position, tokens, broken).into_iter().enumerate() {
                    let shows = if value.is_nan() { at % heads < 2 } else { is_query && at == 0 };
                    assert_eq!(is_nan, shows, "{what}: head {at} of {tokens} tokens at {position}");
                }
            }
        }
    }
}

/// A prompt in chunks that is longer than the window, tokens one by one, and another prompt.
pub fn a_ring_gives_what_the_whole_context_does(gpu: &Arc<Gpu>) {
    for (heads, kv_heads, head_dim, window, chunk) in [(4, 2, 16, 5, 7), (2, 1, 64, 50, 30), (4, 2, 12, 1, 9)] {
        let prompt = [chunk; 5].into_iter().chain([chunk / 2]);
        let chunks: Vec<usize> = prompt.clone().chain([1; 12]).chain(prompt).collect();
        let context: usize = chunks.iter().sum();
        let table = floats(gpu, &[1.0, 0.1]);
        let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, chunk, context));
        for dtype in KvDtype::ALL {
            // What has not been written reads as NaN.
            let empty = |slots: usize| {
                let layout = KvLayout::flat(dtype, kv_heads, head_dim, slots).unwrap();
                let keys_and_values = [0; 2].map(|_| buffer(gpu, layout.codes + layout.scales));
                for region in &keys_and_values {
                    region.fill(u32::MAX).unwrap();
                }
                Cache::new(layout, &keys_and_values)
            };
            let least = window + chunk - 1;
            let caches = [context, least, least + 1, least.next_multiple_of(64)].map(empty);
            let mut position = 0;
            for (at, tokens) in chunks.iter().copied().enumerate() {
                let vectors = |heads: usize, seed: u64| random(tokens * heads * head_dim, 100 * at as u64 + seed);
                let [query, key, value] = [(heads, 1), (kv_heads, 2), (kv_heads, 3)].map(|(h, seed)| vectors(h, seed));
                let [whole, rings @ ..] = caches.each_ref().map(|cache| {
                    let (softcap, scale) = (0.0, 1.0);
                    let shape = Attention { heads, kv_heads, head_dim, position, tokens, window, scale, softcap };
                    let [query, key, value] = [&query, &key, &value].map(|vectors| halves(gpu, vectors));
                    let (at, out) = (placed(gpu, position), buffer(gpu, query.len()));
                    let rope = Some((&table, 1.0));
                    gpu.rotate_and_store(&shape, [&query, &key, &value], [None; 2], cache, &at, rope).unwrap();
                    gpu.attend(&shape, &query, cache, &out, &at, &scratch).unwrap();
                    download(&out, WeightDtype::F16)
                });
                let whole: Vec<f64> = whole.into_iter().map(f64::from).collect();
                for ring in rings {
                    // Keys come in other groups.
                    near(&format!("{dtype}, {tokens} tokens at {position}"), &ring, &whole, 2e-3, Output::F16);
                }
                position += tokens;
            }
        }
    }
}

pub fn rotation_equals_the_reference(gpu: &Arc<Gpu>) {
    for (heads, kv_heads, head_dim, pairs, position, tokens, slots, factor) in [
        (4, 2, 16, 8, 0, 3, 4, 1.0),
        (3, 1, 10, 5, 1000, 2, 1003, 1.0),
        (2, 2, 64, 16, 7, 4, 12, 1.25),
        (2, 1, 8, 0, 1, 1, 3, 1.0),
        // Rings.
        (3, 1, 10, 5, 1000, 4, 7, 1.0),
        (2, 2, 16, 8, 13, 3, 5, 1.0),
        // Angles that take all bits of their reduction.
        (1, 1, 8, 4, 9_999_990, 2, 4, 1.0),
    ] {
        let (window, scale, softcap) = (if slots < position + tokens { 2 } else { 0 }, 1.0, 0.0);
        let shape = Attention { heads, kv_heads, head_dim, position, tokens, window, scale, softcap };
        let frequencies: Vec<f32> = (0..pairs).map(|i| 10f32.powf(-(i as f32) / 4.0)).collect();
        let input = |heads: usize, seed| rounded(&random(tokens * heads * head_dim, seed));
        let (query, key, value) = (input(heads, 16), input(kv_heads, 17), input(kv_heads, 18));
        let rotate = |x: &[f32], heads: usize| -> Vec<f64> {
            let mut y: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            for (at, head) in y.chunks_mut(head_dim).enumerate() {
                for i in 0..pairs {
                    let angle = f64::from((position + at / heads) as f32 * frequencies[i]);
                    let (sin, cos) = (angle.sin() * f64::from(factor), angle.cos() * f64::from(factor));
                    let (a, b) = (head[i], head[i + pairs]);
                    (head[i], head[i + pairs]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
            y
        };
        let before = random(kv_heads * slots * head_dim, 19);
        for (case, dtype) in KvDtype::ALL.into_iter().enumerate() {
            let [of_weight, of_shift] = [case, case + 1].map(|case| DTYPES[case % DTYPES.len()]);
            let queries = halves(gpu, &query);
            let cache = TestCache::new(gpu, dtype, [kv_heads, head_dim], [&before, &before]);
            let table = floats(gpu, &frequencies);
            let rope = (pairs > 0).then_some((&table, factor));
            let inputs = [&queries, &halves(gpu, &key), &halves(gpu, &value)];
            let (at, no_norms) = (placed(gpu, position), [None; 2]);
            gpu.rotate_and_store(&shape, inputs, no_norms, &cache.cache(), &at, rope).unwrap();
            let what = format!("{shape:?}, {pairs} pairs, {dtype}");

            // What is normalized on the way is what is normalized before.
            for kind in [NormKind::Rms, NormKind::Layer] {
                let affines = [20, 21].map(|seed| {
                    let [weight, shift] = [seed, seed + 10].map(|seed| random(head_dim, seed));
                    let shift = (kind == NormKind::Layer).then(|| vector(gpu, of_shift, &shift));
                    Affine::new(vector(gpu, of_weight, &weight), shift)
                });
                let norms = affines.each_ref().map(|affine| Norm { kind, epsilon: 1e-5, affine });
                let [on_the_way, first] = [true, false].map(|on_the_way| {
                    let cache = TestCache::new(gpu, dtype, [kv_heads, head_dim], [&before, &before]);
                    let (query, key) = (halves(gpu, &query), halves(gpu, &key));
                    let given = norms.each_ref().map(|norm| on_the_way.then_some(norm));
                    for (x, heads, norm) in [(&query, heads, &norms[0]), (&key, kv_heads, &norms[1])] {
                        if !on_the_way {
                            let (x, shape) = ((x, WeightDtype::F16), (tokens * heads, head_dim));
                            gpu.normalize(Some(norm), x, shape, x.0, Output::F16, 1.0).unwrap();
                        }
                    }
                    let inputs = [&query, &key, &halves(gpu, &value)];
                    gpu.rotate_and_store(&shape, inputs, given, &cache.cache(), &at, rope).unwrap();
                    [download(&query, WeightDtype::F16), cache.read_back(0, head_dim), cache.read_back(1, head_dim)]
                });
                assert_eq!(on_the_way, first, "{what}, {kind:?}");
            }

            near(&what, &download(&queries, WeightDtype::F16), &rotate(&query, heads), 1e-6, Output::F16);
            let stored = |rows: &[f64], unchanged: &[f32]| {
                let mut all: Vec<f64> = unchanged.iter().map(|v| f64::from(*v)).collect();
                for (at, row) in rows.chunks(head_dim).enumerate() {
                    let (token, head) = (at / kv_heads, at % kv_heads);
                    all[(head * slots + (position + token) % slots) * head_dim..][..head_dim].copy_from_slice(row);
                }
                all
            };
            let step = match dtype {
                KvDtype::F32 => 1e-6,
                KvDtype::F16 => 1e-3,
                KvDtype::Bf16 => 1e-2,
                KvDtype::Int8 => 1.3 / 127.0,
            };
            let value: Vec<f64> = value.iter().map(|v| f64::from(*v)).collect();
            for (which, rows) in [rotate(&key, kv_heads), value].iter().enumerate() {
                let exact = stored(rows, &cache.stored[which]);
                near(&what, &cache.read_back(which, head_dim), &exact, step, Output::F32);
            }
        }
    }
}
