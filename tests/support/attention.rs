//! Rotary positions, the KV cache, and attention over it.

use std::sync::Arc;

use evenkeel::backend::cuda::{Affine, Attention, Gpu, Norm, Output, Rotation};
use evenkeel::footprint::{CudaAttention, PAGE};
use evenkeel::model_config::NormKind;
use evenkeel::quant::{KvDtype, WeightDtype};
use evenkeel::verify::{Place, Room, Stored, attended, case, run, stored};

use super::{DTYPES, buffer, download, floats, halves, near, random, rounded, scratch, vector};

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
        let places = run(position, tokens, 1);
        let (shape, room) = case([heads, kv_heads, head_dim], &places, window, softcap);
        let room = Room { slots: shape.keys.next_multiple_of(PAGE), is_ring: false, ..room };
        for dtype in KvDtype::ALL {
            attended(gpu, &shape, &places, room, dtype).unwrap();
        }
    }
}

pub fn attention_of_several_sequences_equals_the_reference(gpu: &Arc<Gpu>) {
    let many: Vec<Place> = (-1..).step_by(11).zip((0..17).map(|row| row * 5 % 17)).collect();
    // So many that no keys are shared out.
    let whole = [vec![(-1, 0); 512], vec![(400, 1)]].concat();
    for places in
        [vec![(-1, 0)], vec![(200, 1), (-1, 0), (64, 2), (63, 0)], vec![(700, 3), (-1, 0), (5, 4)], many, whole]
    {
        for (heads, kv_heads, head_dim, window, softcap) in [
            (4, 1, 16, 0, 0.0),
            (2, 2, 64, 0, 3.0),
            (6, 2, 20, 0, 0.0),
            (3, 3, 130, 0, 0.0),
            (4, 2, 128, 100, 0.0),
            (1, 1, 66, 1, 0.0),
            (1, 1, 72, 0, 0.0),
            (2, 1, 136, 0, 0.0),
        ] {
            let (shape, room) = case([heads, kv_heads, head_dim], &places, window, softcap);
            for dtype in KvDtype::ALL {
                attended(gpu, &shape, &places, room, dtype).unwrap();
                stored(gpu, &shape, &places, (head_dim / 2, 1.25), room, dtype).unwrap();
            }
        }
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
        let least = (tokens + window).next_multiple_of(PAGE);
        for slots in [least, least + PAGE] {
            // Not yet full; full; the border among the tokens, among the keys, and before either.
            for position in [0, slots - tokens, slots - tokens / 2, slots + window / 2, 100_000 * slots + least] {
                let places = run(position, tokens, 1);
                let (shape, room) = case([heads, kv_heads, head_dim], &places, window, softcap);
                for dtype in KvDtype::ALL {
                    attended(gpu, &shape, &places, Room { slots, ..room }, dtype).unwrap();
                }
            }
        }
    }
}

/// NaN in a key or a value, or what becomes too large as it is rotated, shows in all tokens that see it.
pub fn attention_over_what_is_no_number_is_none(gpu: &Arc<Gpu>) {
    let (heads, kv_heads, head_dim, slots, before) = (4, 2, 16, 192, 140);
    let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, slots, slots));
    let rotation = Rotation { frequencies: floats(gpu, &[1.0; 8]), stride: 0, pairs: 8, factor: 1.0 };
    let room = Room { slots, is_ring: false, sequences: 2 };
    for dtype in KvDtype::ALL {
        // The query is far below, so that a key that were infinite would weigh nothing.
        for (broken, softcap, value) in
            [("key", 0.0, f32::NAN), ("key", 30.0, f32::NAN), ("value", 0.0, f32::NAN), ("query", 30.0, 60_000.0)]
        {
            let (shape, _) = case([heads, kv_heads, head_dim], &run(0, 1, 0), 0, softcap);
            let cache = Stored::new(gpu, dtype, &shape, room, [83, 84]).unwrap().cache();
            let given = |position: usize, tokens: usize, broken: Option<&str>| {
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
                let places = run(position, tokens, 1);
                let (shape, _) = case([heads, kv_heads, head_dim], &places, 0, softcap);
                let shape = Attention { scale: 1.0, ..shape };
                let (rows, out) = (room.rows(gpu, &places).unwrap(), buffer(gpu, query.len()));
                let vectors = [&query, &key, &value];
                gpu.rotate_and_store(&shape, vectors, [None; 2], &cache, &rows, Some(&rotation)).unwrap();
                gpu.attend(&shape, &query, &cache, &out, &rows, &scratch).unwrap();
                let out = download(&out, WeightDtype::F16);
                out.chunks(head_dim).map(|head| head.iter().any(|x| x.is_nan())).collect::<Vec<_>>()
            };
            let what = format!("{broken} of {value}, {dtype}, a cap of {softcap}");
            // Of a token the first two heads read the first of keys and values.
            assert!(!given(0, 20, None).contains(&true), "{what}");
            for (position, tokens, broken) in
                [(20, 1, Some(broken)), (21, 1, None), (22, 30, None), (52, before - 52, None), (before, 3, None)]
            {
                let is_query = broken == Some("query");
                for (at, is_nan) in given(position, tokens, broken).into_iter().enumerate() {
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
        let rotation = Rotation { frequencies: floats(gpu, &[1.0, 0.1]), stride: 0, pairs: 2, factor: 1.0 };
        let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, chunk, context));
        for dtype in KvDtype::ALL {
            let least = (window + chunk - 1).next_multiple_of(PAGE);
            let whole = Room { slots: context.next_multiple_of(PAGE), is_ring: false, sequences: 2 };
            let rings = [least, least + PAGE].map(|slots| Room { slots, is_ring: true, sequences: 2 });
            // What has not been written reads as NaN.
            let caches = [whole, rings[0], rings[1]].map(|room| {
                let (shape, _) = case([heads, kv_heads, head_dim], &run(0, 1, 0), 0, 0.0);
                let stored = Stored::new(gpu, dtype, &shape, room, [4, 5]).unwrap();
                for region in stored.regions() {
                    region.fill(u32::MAX).unwrap();
                }
                (room, stored.cache())
            });
            let mut position = 0;
            for (at, tokens) in chunks.iter().copied().enumerate() {
                let vectors = |heads: usize, seed: u64| random(tokens * heads * head_dim, 100 * at as u64 + seed);
                let [query, key, value] = [(heads, 1), (kv_heads, 2), (kv_heads, 3)].map(|(h, seed)| vectors(h, seed));
                let [whole, rings @ ..] = caches.each_ref().map(|(room, cache)| {
                    let places = run(position, tokens, 1);
                    let (shape, _) = case([heads, kv_heads, head_dim], &places, window, 0.0);
                    let shape = Attention { scale: 1.0, ..shape };
                    let [query, key, value] = [&query, &key, &value].map(|vectors| halves(gpu, vectors));
                    let (rows, out) = (room.rows(gpu, &places).unwrap(), buffer(gpu, query.len()));
                    let vectors = [&query, &key, &value];
                    gpu.rotate_and_store(&shape, vectors, [None; 2], cache, &rows, Some(&rotation)).unwrap();
                    gpu.attend(&shape, &query, cache, &out, &rows, &scratch).unwrap();
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
    for (heads, kv_heads, head_dim, pairs, position, tokens, window, factor) in [
        (4, 2, 16, 8, 0, 3, 0, 1.0),
        (3, 1, 10, 5, 1000, 2, 0, 1.0),
        (2, 2, 64, 16, 62, 4, 0, 1.25),
        (2, 1, 8, 0, 1, 1, 0, 1.0),
        // Rings.
        (3, 1, 10, 5, 1022, 4, 7, 1.0),
        (2, 2, 16, 8, 127, 3, 125, 1.0),
        // Angles that take all bits of their reduction.
        (1, 1, 8, 4, 9_999_990, 2, 4, 1.0),
    ] {
        let places = run(position, tokens, 1);
        let (shape, room) = case([heads, kv_heads, head_dim], &places, window, 0.0);
        let input = |heads: usize, seed| rounded(&random(tokens * heads * head_dim, seed));
        let (query, key, value) = (input(heads, 16), input(kv_heads, 17), input(kv_heads, 18));
        for (case, dtype) in KvDtype::ALL.into_iter().enumerate() {
            stored(gpu, &shape, &places, (pairs, factor), room, dtype).unwrap();

            // What is normalized on the way is what is normalized before.
            let [of_weight, of_shift] = [case, case + 1].map(|case| DTYPES[case % DTYPES.len()]);
            let rotation = Rotation { frequencies: floats(gpu, &vec![0.5; pairs + 1]), stride: 0, pairs, factor };
            for kind in [NormKind::Rms, NormKind::Layer] {
                let affines = [20, 21].map(|seed| {
                    let [weight, shift] = [seed, seed + 10].map(|seed| random(head_dim, seed));
                    let shift = (kind == NormKind::Layer).then(|| vector(gpu, of_shift, &shift));
                    Affine::new(vector(gpu, of_weight, &weight), shift)
                });
                let norms = affines.each_ref().map(|affine| Norm { kind, epsilon: 1e-5, affine });
                let [on_the_way, first] = [true, false].map(|on_the_way| {
                    let cache = Stored::new(gpu, dtype, &shape, room, [19, 19]).unwrap();
                    let (query, key) = (halves(gpu, &query), halves(gpu, &key));
                    let given = norms.each_ref().map(|norm| on_the_way.then_some(norm));
                    for (x, heads, norm) in [(&query, heads, &norms[0]), (&key, kv_heads, &norms[1])] {
                        if !on_the_way {
                            let (x, shape) = ((x, WeightDtype::F16), (tokens * heads, head_dim));
                            gpu.normalize(Some(norm), x, shape, x.0, Output::F16, 1.0).unwrap();
                        }
                    }
                    let (inputs, rows) = ([&query, &key, &halves(gpu, &value)], room.rows(gpu, &places).unwrap());
                    gpu.rotate_and_store(&shape, inputs, given, &cache.cache(), &rows, Some(&rotation)).unwrap();
                    [download(&query, WeightDtype::F16), cache.read_back(0).unwrap(), cache.read_back(1).unwrap()]
                });
                assert_eq!(on_the_way, first, "{shape:?}, {dtype}, {kind:?}");
            }
        }
    }
}
