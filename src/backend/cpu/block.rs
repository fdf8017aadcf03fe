//! A block: attention and a feed-forward layer, each of what the model gives it.

use super::kv::{Cache, KvCache, Scores};
use super::matmul::matmul;
use super::{Parameter, Setup, Workspace, ops};
use crate::backend::Run;
use crate::backend::block::{Attention, Block, Dense, FeedForward, Linear};
use crate::model_config::{Experts, Layer};

impl Setup {
    /// `hidden += norm(attention(norm(hidden))); hidden += norm(feed_forward(norm(hidden)))`,
    /// with those norms that the model has.
    pub fn run(
        &self,
        block: &Block<Parameter>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        hidden: &mut [f32],
        runs: &[Run],
    ) {
        let (scale, width) = (self.config.residual_scale, hidden.len());
        workspace.normed[..width].copy_from_slice(hidden);
        self.normalize(block.input_norm.as_ref(), &mut workspace.normed[..width]);
        self.attention(&block.attention, block.layer, cache, workspace, runs);
        self.normalize(block.attention_output_norm.as_ref(), &mut workspace.normed[..width]);
        ops::add(self.pool.isa(), hidden, &workspace.normed[..width], scale);

        workspace.normed[..width].copy_from_slice(hidden);
        self.normalize(block.feed_forward_norm.as_ref(), &mut workspace.normed[..width]);
        let tokens = width / self.config.hidden_size;
        match &block.feed_forward {
            FeedForward::Experts { routing, router, experts } => {
                self.experts(*routing, router, experts, workspace, tokens);
            }
            FeedForward::Dense(dense) => {
                let Workspace { normed, gate, up, words, .. } = workspace;
                self.feed_forward(dense, &mut normed[..width], [gate, up, words]);
            }
        }
        self.normalize(block.feed_forward_output_norm.as_ref(), &mut workspace.normed[..width]);
        ops::add(self.pool.isa(), hidden, &workspace.normed[..width], scale);
    }

    pub fn normalize(&self, norm: Option<&Linear<Parameter>>, x: &mut [f32]) {
        if let Some(norm) = norm {
            ops::normalize(&self.pool, self.config.family.norm_kind, self.config.norm_eps, x, &norm.affine());
        }
    }

    /// Replaces the normalized hidden states by what attention makes of them.
    fn attention(
        &self,
        attention: &Attention<Parameter>,
        layer: Layer,
        kv: &mut KvCache,
        workspace: &mut Workspace,
        runs: &[Run],
    ) {
        let Self { config, pool } = self;
        let Workspace { normed, query, key, value, attended, words, cos, sin, .. } = workspace;
        let tokens: usize = runs.iter().map(|run| run.tokens).sum();
        let (queries, keys) = (config.queries(), config.keys());
        let normed = &mut normed[..tokens * config.hidden_size];
        let query = &mut query[..tokens * queries];
        let (key, value) = (&mut key[..tokens * keys], &mut value[..tokens * keys]);

        let [for_query, for_key, for_value] = attention.query_key_value.each_ref().map(Linear::affine);
        let products = [(&for_query, &mut *query), (&for_key, &mut *key), (&for_value, &mut *value)];
        matmul(pool, normed, words, products);
        self.normalize(attention.query_norm.as_ref(), query);
        self.normalize(attention.key_norm.as_ref(), key);
        if let Some(rope) = layer.rope {
            let half = config.ropes[rope].rotary_dim / 2;
            let start: usize = config.ropes[..rope].iter().map(|rope| tokens * (rope.rotary_dim / 2)).sum();
            let table = start..start + tokens * half;
            let (cos, sin) = (&cos[table.clone()], &sin[table]);
            ops::rotate(pool, query, config.head_dim, half, cos, sin);
            ops::rotate(pool, key, config.head_dim, half, cos, sin);
        }

        let mut start = 0;
        for run in runs {
            let cache = Cache {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                pages: kv.pages(run),
                dtype: kv.layout.dtype,
                scores: Scores {
                    scale: config.attention_scale,
                    softcap: config.attention_softcap,
                    window: layer.window,
                },
            };
            let rows = start..start + run.tokens;
            let [of_key, of_value] = kv.halves();
            let of_keys = rows.start * keys..rows.end * keys;
            cache.append_keys(&key[of_keys.clone()], of_key, run.position);
            cache.append_values(&value[of_keys], of_value, run.position);
            let stored = kv.halves().map(|(codes, scales)| (&*codes, &*scales));
            let of_queries = rows.start * queries..rows.end * queries;
            cache.attend(pool, &query[of_queries.clone()], stored, run.position, &mut attended[of_queries.start..]);
            start = rows.end;
        }

        let output = attention.output.affine();
        matmul(pool, &attended[..query.len()], words, [(&output, normed)]);
    }

    /// Replaces the normalized hidden states by the weighted sum of what each token's experts make of them.
    fn experts(
        &self,
        routing: Experts,
        router: &Linear<Parameter>,
        experts: &[Dense<Parameter>],
        workspace: &mut Workspace,
        tokens: usize,
    ) {
        let Workspace { normed, gate, up, routes: shares, gathered, mixed, words, .. } = workspace;
        let hidden = self.config.hidden_size;
        let normed = &mut normed[..tokens * hidden];
        let mixed = &mut mixed[..tokens * hidden];
        let shares = &mut shares[..tokens * routing.count];
        let (router, pool) = (router.affine(), &self.pool);
        matmul(pool, normed, words, [(&router, &mut *shares)]);
        ops::route(shares, routing);

        mixed.fill(0.0);
        for (at, expert) in experts.iter().enumerate() {
            let weights = || ops::routed(shares, routing.count, at).map(|(token, weight)| (token as usize, weight));
            let count = weights().count();
            if count == 0 {
                continue;
            }
            let x = &mut gathered[..count * hidden];
            for ((token, _), x) in weights().zip(x.chunks_mut(hidden)) {
                x.copy_from_slice(&normed[token * hidden..][..hidden]);
            }
            self.feed_forward(expert, x, [&mut *gate, &mut *up, &mut *words]);
            for ((token, weight), x) in weights().zip(x.chunks(hidden)) {
                ops::add(pool.isa(), &mut mixed[token * hidden..][..hidden], x, weight);
            }
        }
        normed.copy_from_slice(mixed);
    }

    /// `x = down(activation(gate(x)) · up(x))`, or without a gate `x = down(activation(up(x)))`.
    fn feed_forward(&self, dense: &Dense<Parameter>, x: &mut [f32], [gated, other, words]: [&mut Vec<f32>; 3]) {
        let Self { config, pool } = self;
        let (gate, up, down) = (dense.gate.as_ref().map(Linear::affine), dense.up.affine(), dense.down.affine());
        let len = x.len() / config.hidden_size * up.rows.len();
        let (gated, other) = (&mut gated[..len], &mut other[..len]);
        if let Some(gate) = &gate {
            matmul(pool, x, words, [(gate, &mut *gated), (&up, &mut *other)]);
        } else {
            matmul(pool, x, words, [(&up, &mut *gated)]);
        }
        ops::activate(pool, config.activation, gated, gate.map(|_| &*other));
        matmul(pool, gated, words, [(&down, x)]);
    }
}
