//! The buffers of the CPU.

use super::{Extent, buffers};
use crate::bytes::{Bytes, MIB};
use crate::model_config::{Experts, ModelConfig};
use crate::quant::GROUP_SIZE;

/// Bytes of a group of quantized activations on the CPU: its codes, its scale and their sum.
pub const ACTIVATION_GROUP: usize = GROUP_SIZE + 2 * size_of::<u32>();

/// The widest of a model's feed-forward layers, in elements for a token, and the experts that it has blocks of.
pub fn feed_forward(config: &ModelConfig) -> (usize, Option<Experts>) {
    let has_dense = config.layers.iter().any(|layer| !layer.has_experts);
    let dense = if has_dense { config.intermediate_size } else { 0 };
    let experts = config.experts.filter(|_| config.layers.iter().any(|layer| layer.has_experts));
    (experts.map_or(0, |experts| experts.intermediate_size).max(dense), experts)
}

buffers! {
    /// The buffers that the CPU computes a step in: f32, but for quantized activations.
    CpuBuffers(config, extent) {
        let (hidden, queries, keys) = (config.hidden_size, config.queries(), config.keys());
        let (feed_forward, experts) = feed_forward(config);
        let mixed = experts.map_or(0, |_| hidden);
        let groups = hidden.max(queries).max(feed_forward).div_ceil(GROUP_SIZE);
        let rope: usize = config.ropes.iter().map(|rope| extent.chunk * rope.rotary_dim / 2).sum();
        let each = |width: usize| f32s(extent.chunk * width);
    }
    /// The normalized hidden state, and what a half of a block gives.
    normed: each(hidden),
    query: each(queries),
    key: each(keys),
    value: each(keys),
    /// What attention gives.
    attended: each(queries),
    /// The gate's output.
    gate: each(feed_forward),
    /// Up's output.
    up: each(feed_forward),
    /// The experts' weights for each token.
    routes: each(experts.map_or(0, |experts| experts.count)),
    /// The inputs of an expert.
    gathered: each(mixed),
    /// The sum of what experts give.
    mixed: each(mixed),
    /// Quantized activations.
    words: Bytes((extent.chunk * groups * ACTIVATION_GROUP) as u64),
    /// Cosines of all ropes.
    cos: f32s(rope),
    /// Sines of all ropes.
    sin: f32s(rope),
}

/// The host's own buffers, wherever a model is computed: the hidden states that pass from stage to stage,
/// and the logits of some rows.
pub fn host_state(config: &ModelConfig, extent: Extent) -> [(&'static str, Bytes); 2] {
    [("hidden", f32s(extent.chunk * config.hidden_size)), ("logits", f32s(extent.logit_rows() * config.vocab_size))]
}

/// What the program takes beside what it allocates by a plan, with a tokenizer whose file has so many bytes: an
/// estimate. By what was measured, with vocabularies of 4,096 and 262,144 tokens, the tokenizer is 6.4 times its file.
pub fn program(tokenizer: Bytes) -> [(&'static str, Bytes); 2] {
    const PROGRAM: u64 = 24 * MIB;
    [("program", Bytes(PROGRAM)), ("tokenizer", Bytes(tokenizer.0.saturating_mul(13) / 2))]
}

fn f32s(len: usize) -> Bytes {
    Bytes((len * size_of::<f32>()) as u64)
}
