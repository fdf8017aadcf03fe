//! Attention over the keys and values of a sequence.

use std::ops::Range;

use super::exp::exp;
use super::flash::{self, QUERIES, Query, Softmax};
use super::kv::{Cache, KEY_TILE, Stored};
use crate::pool::{Pool, Table};
use crate::simd::{Isa, vectorized};

/// Keys that a query's sums go over before they are added to those of the keys before, however
/// many threads there are.
const PART: usize = 16 * KEY_TILE;
/// Tasks for each thread that are enough to keep all threads busy.
const TASKS: usize = 4;

impl Cache<'_> {
    /// Causal attention with grouped queries: `softmax(scores) · v` for each
    /// query of `[tokens][heads][head_dim]`, over the keys up to its own
    /// position, those of its window if there is one. `attended` begins with
    /// what it gives; what is behind is scratch.
    pub fn attend(&self, pool: &Pool, query: &[f32], stored: [Stored; 2], position: usize, attended: &mut [f32]) {
        let (attended, scratch) = attended.split_at_mut(query.len());
        let tokens = query.len() / (self.heads * self.head_dim);
        let attention = Attention { cache: self, isa: pool.isa(), query, stored, position };
        let first = attention.query(0, 0);
        let parts = first.first / PART..first.end.div_ceil(PART);
        let partial = self.group() * (self.head_dim + 2);
        let needed = self.kv_heads * parts.len() * partial;
        if tokens == 1 && parts.len() > 1 && self.kv_heads < TASKS * pool.threads() && needed <= scratch.len() {
            attention.by_parts(pool, &parts, &mut scratch[..needed], attended);
        } else {
            attention.by_tiles(pool, attended);
        }
    }
}

struct Attention<'a> {
    cache: &'a Cache<'a>,
    isa: Isa,
    query: &'a [f32],
    stored: [Stored<'a>; 2],
    position: usize,
}

impl<'a> Attention<'a> {
    /// Query `at` of those that a head of keys and values has, over tokens and their heads of queries.
    fn query(&self, kv_head: usize, at: usize) -> Query<'a> {
        let (cache, group) = (self.cache, self.cache.group());
        let (token, head) = (at / group, kv_head * group + at % group);
        let end = self.position + token + 1;
        Query {
            vector: &self.query[(token * cache.heads + head) * cache.head_dim..][..cache.head_dim],
            first: cache.scores.window.map_or(0, |window| end.saturating_sub(window)),
            end,
        }
    }

    /// Runs `count` queries from `at` on over a part of the keys.
    fn part(
        &self,
        kv_head: usize,
        at: usize,
        count: usize,
        part: usize,
        mixed: &mut [f32],
    ) -> ([Query<'a>; QUERIES], [Softmax; QUERIES]) {
        let mut queries = [self.query(kv_head, at); QUERIES];
        for (i, query) in queries[..count].iter_mut().enumerate() {
            *query = self.query(kv_head, at + i);
        }
        let softmax = flash::attend(self.cache, self.isa, self.stored, kv_head, &queries[..count], keys(part), mixed);
        (queries, softmax)
    }

    /// One task for some tokens and a head of keys and values, over all parts in turn.
    fn by_tiles(&self, pool: &Pool, attended: &mut [f32]) {
        let (width, group) = (self.cache.head_dim, self.cache.group());
        let table = Table { values: attended, stride: self.cache.heads * width };
        pool.tiles(&mut [table], group * width, (QUERIES / group).max(1), |_, mut columns| {
            let (kv_head, tokens) = (columns.start() / (group * width), columns.tokens());
            let all = tokens.start * group..tokens.end * group;
            let mut mixed = vec![0.0; QUERIES.min(all.len()) * width];
            for start in all.clone().step_by(QUERIES) {
                let count = QUERIES.min(all.end - start);
                let mut totals = [Softmax::EMPTY; QUERIES];
                let parts =
                    self.query(kv_head, start).first / PART..self.query(kv_head, start + count - 1).end.div_ceil(PART);
                for part in parts.clone() {
                    let mixed = &mut mixed[..count * width];
                    let (queries, softmax) = self.part(kv_head, start, count, part, mixed);
                    for (i, mixed) in mixed.chunks(width).enumerate() {
                        let out = &mut columns.row((start + i) / group)[(start + i) % group * width..][..width];
                        if part == parts.start {
                            out.fill(0.0);
                        }
                        if !queries[i].sees(&keys(part)).is_empty() {
                            add(self.isa, &mut totals[i], out, softmax[i], mixed);
                        }
                    }
                }
                for (i, total) in totals[..count].iter().enumerate() {
                    let out = &mut columns.row((start + i) / group)[(start + i) % group * width..][..width];
                    divide(self.isa, out, total.sum);
                }
            }
        });
    }

    /// The same for one token, with a task for each part; then the parts are added up. In `scratch`
    /// each has for each query what it gives, then for each query its softmax.
    fn by_parts(&self, pool: &Pool, parts: &Range<usize>, scratch: &mut [f32], attended: &mut [f32]) {
        let (width, group) = (self.cache.head_dim, self.cache.group());
        let partial = group * (width + 2);
        pool.chunks(scratch, partial, |at, partial| {
            let (kv_head, part) = (at / parts.len(), parts.start + at % parts.len());
            let (mixed, sums) = partial.split_at_mut(group * width);
            for (start, mixed) in (0..group).step_by(QUERIES).zip(mixed.chunks_mut(QUERIES * width)) {
                let count = mixed.len() / width;
                let (_, softmax) = self.part(kv_head, start, count, part, mixed);
                for (sums, softmax) in sums[2 * start..].chunks_mut(2).zip(&softmax[..count]) {
                    sums.copy_from_slice(&[softmax.largest, softmax.sum]);
                }
            }
        });
        let scratch = &*scratch;
        pool.chunks(attended, width, |head, out| {
            let (kv_head, at) = (head / group, head % group);
            let mut total = Softmax::EMPTY;
            out.fill(0.0);
            for partial in scratch[kv_head * parts.len() * partial..].chunks(partial).take(parts.len()) {
                let (mixed, sums) = partial.split_at(group * width);
                let softmax = Softmax { largest: sums[2 * at], sum: sums[2 * at + 1] };
                add(self.isa, &mut total, out, softmax, &mixed[at * width..][..width]);
            }
            divide(self.isa, out, total.sum);
        });
    }
}

fn keys(part: usize) -> Range<usize> {
    part * PART..(part + 1) * PART
}

vectorized! {
    /// Adds a part to what a query has so far.
    fn add(total: &mut Softmax, out: &mut [f32], part: Softmax, mixed: &[f32]) {
        let largest = if part.largest > total.largest { part.largest } else { total.largest };
        let (before, now) = (exp(total.largest - largest), exp(part.largest - largest));
        for (out, mixed) in out.iter_mut().zip(mixed) {
            *out = *out * before + mixed * now;
        }
        *total = Softmax { largest, sum: total.sum * before + part.sum * now };
    }

    fn divide(values: &mut [f32], by: f32) {
        for value in values {
            *value /= by;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::super::kv::{Pages, Scores};
    use super::*;
    use crate::footprint::PAGE;
    use crate::quant::KvDtype;

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

    fn pool(threads: usize, isa: Isa) -> Pool {
        Pool::new(NonZeroUsize::new(threads).unwrap()).with_isa(isa)
    }

    /// Keys and values of `context` tokens, as they were given and as `cache` has them.
    struct Case<'a> {
        cache: Cache<'a>,
        rows: [Vec<f32>; 2],
        cells: [Vec<u32>; 2],
        scales: [Vec<f32>; 2],
    }

    impl<'a> Case<'a> {
        /// In as many pages as `cache` has.
        fn new(cache: Cache<'a>, context: usize) -> Self {
            let rows = [0.31, 0.17].map(|step| wave(cache.kv_heads * context * cache.head_dim, step));
            let slots = match cache.pages {
                Pages::Ring { slots, .. } => slots,
                Pages::Table(pages) => PAGE * (1 + *pages.iter().max().unwrap() as usize),
            };
            let vectors = cache.kv_heads * slots;
            let mut cells = [0, 1].map(|_| vec![0u32; (vectors * cache.dtype.code_bytes(cache.head_dim)).div_ceil(4)]);
            let mut scales = [0, 1].map(|_| vec![0.0; vectors * cache.dtype.scale_bytes() / 4]);
            let row = cache.kv_heads * cache.head_dim;
            // In two pieces, as a prompt and what is generated behind it.
            for (first, end) in [(0, context / 3), (context / 3, context)] {
                let [keys, values] = [0, 1].map(|i| &rows[i][first * row..end * row]);
                cache.append_keys(keys, (bytemuck::cast_slice_mut(&mut cells[0]), &mut scales[0]), first);
                cache.append_values(values, (bytemuck::cast_slice_mut(&mut cells[1]), &mut scales[1]), first);
            }
            Self { cache, rows, cells, scales }
        }

        fn queries(&self, tokens: usize) -> Vec<f32> {
            wave(tokens * self.cache.heads * self.cache.head_dim, 0.7)
        }

        /// What the last tokens of the context, whose queries these are, attend to.
        fn attend(&self, pool: &Pool, query: &[f32], position: usize, scratch: usize) -> Vec<f32> {
            let stored = [0, 1].map(|i| (bytemuck::cast_slice(&self.cells[i]), &self.scales[i][..]));
            let mut attended = vec![f32::NAN; query.len() + scratch];
            self.cache.attend(pool, query, stored, position, &mut attended);
            attended.truncate(query.len());
            attended
        }

        fn reference(&self, query: &[f32], token: usize, head: usize) -> Vec<f64> {
            let (cache, width) = (&self.cache, self.cache.head_dim);
            let kv_head = head / cache.group();
            let first = cache.scores.window.map_or(0, |window| (token + 1).saturating_sub(window));
            let [keys, values] = [0, 1].map(|i| {
                let row = |key: usize| &self.rows[i][(key * cache.kv_heads + kv_head) * width..][..width];
                (first..=token).flat_map(row).copied().collect::<Vec<_>>()
            });
            reference(query, &keys, &values, cache.scores)
        }
    }

    /// Pages in order, for so many tokens.
    fn whole(context: usize) -> Pages<'static> {
        Pages::Ring { first: 0, slots: context.next_multiple_of(PAGE) }
    }

    /// Heads, heads of keys and values, and their width, of models that there are and at the edges.
    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 16), (4, 2, 4), (3, 3, 44), (6, 2, 64), (8, 1, 128), (40, 1, 8), (1, 1, 300)];

    #[test]
    fn attention_is_softmax() {
        for (dtype, error) in [(KvDtype::F32, 1e-5), (KvDtype::F16, 3e-3), (KvDtype::Bf16, 3e-2), (KvDtype::Int8, 5e-2)]
        {
            for (heads, kv_heads, head_dim) in SHAPES {
                for (softcap, window, context, tokens) in [
                    (None, None, 1, 1),
                    (Some(3.0), None, 2, 1),
                    (None, Some(6), 63, 9),
                    (None, None, 64, 64),
                    (Some(3.0), Some(1), 65, 40),
                    (None, Some(70), 200, 3),
                    (None, None, 2 * PART + 40, 1),
                    (None, Some(PART + 10), 3 * PART, 2),
                ] {
                    let scores = Scores { scale: 1.0 / head_dim as f32, softcap, window };
                    let case =
                        Case::new(Cache { heads, kv_heads, head_dim, pages: whole(context), dtype, scores }, context);
                    let query = case.queries(tokens);
                    let position = context - tokens;
                    let wanted = case.attend(&pool(1, Isa::PORTABLE), &query, position, 0);
                    for (at, (query, ours)) in query.chunks(head_dim).zip(wanted.chunks(head_dim)).enumerate() {
                        let exact = case.reference(query, position + at / heads, at % heads);
                        for (ours, exact) in ours.iter().zip(exact) {
                            let what =
                                format!("{dtype} {heads}/{kv_heads}×{head_dim} {context} {window:?} {softcap:?}");
                            assert!((f64::from(*ours) - exact).abs() < error, "{what}: {ours} {exact}");
                        }
                    }
                    for isa in Isa::available() {
                        assert!(case.attend(&pool(1, isa), &query, position, 0) == wanted, "{isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_token_depends_neither_on_those_beside_it_nor_on_threads() {
        for (heads, kv_heads, head_dim) in SHAPES {
            for window in [None, Some(50)] {
                let (context, tokens) = (2 * PART + 30, 70);
                let scores = Scores { scale: 0.1, softcap: None, window };
                let cache = Cache { heads, kv_heads, head_dim, pages: whole(context), dtype: KvDtype::F16, scores };
                let case = Case::new(cache, context);
                let (query, position) = (case.queries(tokens), context - tokens);
                let together = case.attend(&pool(3, Isa::best()), &query, position, 0);
                let row = heads * head_dim;
                for scratch in [0, 100 * row] {
                    for threads in [1, 3] {
                        let pool = pool(threads, Isa::best());
                        for (token, query) in query.chunks(row).enumerate() {
                            let alone = case.attend(&pool, query, position + token, scratch);
                            assert!(alone == together[token * row..][..row], "token {token} of {heads}×{head_dim}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_ring_of_slots_gives_what_all_slots_give() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
            for (heads, kv_heads, head_dim) in SHAPES {
                for (window, slots, tokens) in [(1, 64, 33), (31, 64, 33), (50, 128, 1), (600, 704, 70)] {
                    let scores = Scores { scale: 0.1, softcap: None, window: Some(window) };
                    for context in [slots - 1, slots + 1, 2 * slots, 3 * slots + 41] {
                        let case =
                            |pages| Case::new(Cache { heads, kv_heads, head_dim, pages, dtype, scores }, context);
                        let (whole, ring) = (case(whole(context)), case(whole(slots)));
                        let (query, position) = (whole.queries(tokens), context - tokens);
                        let attend = |case: &Case| case.attend(&pool(2, Isa::best()), &query, position, 0);
                        assert!(
                            attend(&ring) == attend(&whole),
                            "{dtype} {heads}×{head_dim} {window} {slots} {context}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn pages_in_any_order_give_what_pages_in_order_give() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
            for (heads, kv_heads, head_dim) in SHAPES {
                for (context, tokens) in [(1, 1), (PAGE, 3), (5 * PAGE + 7, 1), (PART + 3 * PAGE, 70)] {
                    let scores = Scores { scale: 0.1, softcap: None, window: None };
                    let case = |pages| Case::new(Cache { heads, kv_heads, head_dim, pages, dtype, scores }, context);
                    let backwards: Vec<u32> =
                        (0..context.div_ceil(PAGE) as u32).map(|page| 3 * page + 2).rev().collect();
                    let (ordered, paged) = (case(whole(context)), case(Pages::Table(&backwards)));
                    let (query, position) = (ordered.queries(tokens), context - tokens);
                    let attend = |case: &Case| case.attend(&pool(2, Isa::best()), &query, position, 0);
                    assert!(attend(&paged) == attend(&ordered), "{dtype} {heads}×{head_dim} {context}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_with_its_token() {
        let scores = Scores { scale: 0.1, softcap: None, window: None };
        for (at, broken) in [(0, f32::NAN), (1, f32::NAN), (1, f32::INFINITY)] {
            let cache = Cache { heads: 4, kv_heads: 1, head_dim: 8, pages: whole(40), dtype: KvDtype::F32, scores };
            let mut case = Case::new(cache, 40);
            let query = case.queries(40);
            let pool = pool(1, Isa::best());
            let whole = case.attend(&pool, &query, 0, 0);
            let mut row = case.rows[at][30 * 8..31 * 8].to_vec();
            row[3] = broken;
            let codes = bytemuck::cast_slice_mut(&mut case.cells[at]);
            if at == 0 {
                case.cache.append_keys(&row, (codes, &mut []), 30);
            } else {
                case.cache.append_values(&row, (codes, &mut []), 30);
            }
            let ours = case.attend(&pool, &query, 0, 0);
            assert!(ours[..30 * 32] == whole[..30 * 32], "{broken}");
            assert!(ours[30 * 32..].chunks(8).all(|out| out.iter().any(|x| !x.is_finite())), "{broken}");
        }
    }
}
