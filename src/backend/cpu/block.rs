//! A block: attention and a feed-forward layer, each of what the model gives it.

use memmap2::MmapMut;

use super::attention::{Cache, Scores, Stored};
use super::matmul::{Activations, Affine, matmul};
use super::{Parameters, Setup, Workspace, ops};
use crate::architecture::Role;
use crate::model_config::{Experts, Layer};
use crate::plan::memory::KvLayout;

pub struct Block {
    pub layer: Layer,
    pub parameters: Parameters,
    pub kv: KvLayout,
    /// Keys and values, each laid out as `kv` says; sequence 0 is used.
    pub keys: MmapMut,
    pub values: MmapMut,
}

impl Block {
    /// `hidden += norm(attention(norm(hidden))); hidden += norm(feed_forward(norm(hidden)))`,
    /// with those norms that the model has.
    pub fn run(
        &mut self,
        setup: &Setup,
        workspace: &mut Workspace,
        hidden: &mut [f32],
        tokens: usize,
        position: usize,
    ) {
        let normalize = |parameters: &Parameters, role, x: &mut [f32]| {
            if let Some(norm) = parameters.find(role) {
                setup.norm.apply(&setup.pool, x, &norm);
            }
        };
        let scale = setup.config.residual_scale;
        let width = hidden.len();

        workspace.normed[..width].copy_from_slice(hidden);
        normalize(&self.parameters, Role::InputNorm, &mut workspace.normed[..width]);
        self.attention(setup, workspace, tokens, position);
        normalize(&self.parameters, Role::AttentionOutputNorm, &mut workspace.normed[..width]);
        ops::add(setup.pool.isa(), hidden, &workspace.normed[..width], scale);

        workspace.normed[..width].copy_from_slice(hidden);
        normalize(&self.parameters, Role::FeedForwardNorm, &mut workspace.normed[..width]);
        match setup.config.experts {
            Some(experts) if self.layer.has_experts => self.experts(setup, experts, workspace, tokens),
            _ => self.feed_forward(setup, workspace, tokens),
        }
        normalize(&self.parameters, Role::FeedForwardOutputNorm, &mut workspace.normed[..width]);
        ops::add(setup.pool.isa(), hidden, &workspace.normed[..width], scale);
    }

    /// Replaces the normalized hidden state by what attention makes of it.
    fn attention(&mut self, setup: &Setup, workspace: &mut Workspace, tokens: usize, position: usize) {
        let config = &setup.config;
        let Workspace { normed, query, key, value, attended, words, cos, sin, .. } = workspace;
        let (queries, keys) = (config.queries(), config.keys());
        let normed = &mut normed[..tokens * config.hidden_size];
        let query = &mut query[..tokens * queries];
        let (key, value) = (&mut key[..tokens * keys], &mut value[..tokens * keys]);
        let parameters = &self.parameters;

        let [for_query, for_key, for_value] = match parameters.find(Role::QueryKeyValue) {
            Some(fused) => [0..queries, queries..queries + keys, queries + keys..queries + 2 * keys]
                .map(|rows| fused.clone().slice(rows)),
            None => [Role::Query, Role::Key, Role::Value].map(|role| parameters.of(role)),
        };
        let pool = &setup.pool;
        let x = Activations::of(pool, normed, words, &[&for_query, &for_key, &for_value]);
        matmul(pool, &x, [(&for_query, &mut *query), (&for_key, &mut *key), (&for_value, &mut *value)]);
        for (role, x) in [(Role::QueryNorm, &mut *query), (Role::KeyNorm, &mut *key)] {
            if let Some(norm) = parameters.find(role) {
                setup.norm.apply(pool, x, &norm);
            }
        }
        if let Some(rope) = self.layer.rope {
            let half = setup.frequencies[rope].len();
            let start: usize = setup.frequencies[..rope].iter().map(|frequencies| tokens * frequencies.len()).sum();
            let table = start..start + tokens * half;
            let (cos, sin) = (&cos[table.clone()], &sin[table]);
            ops::rotate(pool, query, config.head_dim, half, cos, sin);
            ops::rotate(pool, key, config.head_dim, half, cos, sin);
        }

        let cache = Cache {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            context: setup.context,
            dtype: self.kv.dtype,
            scores: Scores {
                scale: config.attention_scale,
                softcap: config.attention_softcap,
                window: self.layer.window,
            },
        };
        cache.append_keys(key, sections(self.kv, &mut self.keys), position);
        cache.append_values(value, sections(self.kv, &mut self.values), position);
        let stored = [&self.keys, &self.values].map(|bytes| Stored {
            codes: &bytes[..self.kv.codes],
            scales: bytemuck::cast_slice(&bytes[self.kv.codes..self.kv.codes + self.kv.scales]),
        });
        cache.attend(pool, query, stored, position, attended);

        let output = self.parameters.of(Role::Output);
        matmul(pool, &Activations::of(pool, &attended[..query.len()], words, &[&output]), [(&output, normed)]);
    }

    /// Replaces the normalized hidden state by what the feed-forward layer makes of it.
    fn feed_forward(&self, setup: &Setup, workspace: &mut Workspace, tokens: usize) {
        let config = &setup.config;
        let width = config.intermediate_size;
        let (gate, up) = match self.parameters.find(Role::GateUp) {
            Some(fused) => (Some(fused.clone().slice(0..width)), fused.slice(width..2 * width)),
            None => (self.parameters.find(Role::Gate), self.parameters.of(Role::Up)),
        };
        let Workspace { normed, gate: gated, up: other, words, .. } = workspace;
        let buffers = Buffers { gated, other, words };
        let x = &mut normed[..tokens * config.hidden_size];
        feed_forward(setup, [gate, Some(up), self.parameters.find(Role::Down)], x, buffers);
    }

    /// Replaces the normalized hidden state by the weighted sum of what each token's experts make of it.
    fn experts(&self, setup: &Setup, experts: Experts, workspace: &mut Workspace, tokens: usize) {
        let Workspace { normed, gate, up, routes, gathered, mixed, words, .. } = workspace;
        let hidden = setup.config.hidden_size;
        let normed = &mut normed[..tokens * hidden];
        let mixed = &mut mixed[..tokens * hidden];
        let routes = &mut routes[..tokens * experts.count];
        let scorer = self.parameters.of(Role::Router);
        let pool = &setup.pool;
        matmul(pool, &Activations::of(pool, normed, words, &[&scorer]), [(&scorer, &mut *routes)]);
        ops::route(routes, experts.count, experts.per_token, experts.is_normalized);

        mixed.fill(0.0);
        for expert in 0..experts.count {
            let weights = || routes.chunks(experts.count).map(|row| row[expert]).enumerate().filter(|(_, w)| *w != 0.0);
            let count = weights().count();
            if count == 0 {
                continue;
            }
            let x = &mut gathered[..count * hidden];
            for ((token, _), x) in weights().zip(x.chunks_mut(hidden)) {
                x.copy_from_slice(&normed[token * hidden..][..hidden]);
            }
            let modules = [Role::ExpertGate(expert), Role::ExpertUp(expert), Role::ExpertDown(expert)]
                .map(|role| self.parameters.find(role));
            let buffers = Buffers { gated: gate, other: up, words };
            feed_forward(setup, modules, x, buffers);
            for ((token, weight), x) in weights().zip(x.chunks(hidden)) {
                ops::add(setup.pool.isa(), &mut mixed[token * hidden..][..hidden], x, weight);
            }
        }
        normed.copy_from_slice(mixed);
    }
}

/// What a feed-forward layer works in.
struct Buffers<'a> {
    gated: &'a mut [f32],
    other: &'a mut [f32],
    words: &'a mut [i32],
}

/// `x = down(activation(gate(x)) · up(x))`, or without a gate `x = down(activation(up(x)))`.
fn feed_forward(setup: &Setup, modules: [Option<Affine>; 3], x: &mut [f32], buffers: Buffers) {
    let [gate, Some(up), Some(down)] = modules else {
        unreachable!("the loader gives every feed-forward layer all of its parameters")
    };
    let Buffers { gated, other, words } = buffers;
    let Setup { config, pool, .. } = setup;
    let len = x.len() / config.hidden_size * up.rows.len();
    let (gated, other) = (&mut gated[..len], &mut other[..len]);
    if let Some(gate) = gate {
        let input = Activations::of(pool, x, words, &[&gate, &up]);
        matmul(pool, &input, [(&gate, &mut *gated), (&up, &mut *other)]);
        ops::gate(pool, config.activation, gated, other);
    } else {
        matmul(pool, &Activations::of(pool, x, words, &[&up]), [(&up, &mut *gated)]);
        ops::activate(pool, config.activation, gated);
    }
    matmul(pool, &Activations::of(pool, gated, words, &[&down]), [(&down, x)]);
}

/// The codes and the scales that `kv` lays out in `bytes`.
fn sections(kv: KvLayout, bytes: &mut [u8]) -> (&mut [u8], &mut [f32]) {
    let (codes, scales) = bytes[..kv.codes + kv.scales].split_at_mut(kv.codes);
    (codes, bytemuck::cast_slice_mut(scales))
}
