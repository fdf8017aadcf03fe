//! What a step works in, by its shape, and the buffers of the CPU.

use super::{Extent, buffers};
use crate::bytes::Bytes;
use crate::model_config::ModelConfig;
use crate::quant::GROUP_SIZE;

/// Bytes of a group of quantized activations on the CPU: its codes, its scale and their sum.
pub const ACTIVATION_GROUP: usize = GROUP_SIZE + 2 * size_of::<u32>();

/// The lengths, in elements, of what a step works in, for `tokens` tokens at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Tokens at once.
    pub tokens: usize,
    /// The normalized hidden state.
    pub normed: usize,
    /// Queries, and what attention gives.
    pub query: usize,
    /// Keys; values take as much again.
    pub key: usize,
    /// The gate's output; up's takes as much again.
    pub gate: usize,
    /// The experts' weights for each token; f32.
    pub routes: usize,
    /// The sum of what experts give; the inputs of one take as much again.
    pub mixed: usize,
    /// Groups of quantized activations, of [`ACTIVATION_GROUP`] bytes each.
    pub activation_groups: usize,
    /// Cosines of all ropes; sines take as much again.
    pub rope: usize,
}

impl StepShape {
    /// The shape of chunks of `tokens` tokens.
    pub fn new(config: &ModelConfig, tokens: usize) -> Self {
        let (queries, keys) = (config.queries(), config.keys());
        let has_dense = config.layers.iter().any(|layer| !layer.has_experts);
        let dense = if has_dense { config.intermediate_size } else { 0 };
        let experts = config.experts.filter(|_| config.layers.iter().any(|layer| layer.has_experts));
        let feed_forward = experts.map_or(0, |experts| experts.intermediate_size).max(dense);
        let routes = experts.map_or(0, |experts| experts.count);
        let widest = config.hidden_size.max(queries).max(feed_forward);
        Self {
            tokens,
            normed: tokens * config.hidden_size,
            query: tokens * queries,
            key: tokens * keys,
            gate: tokens * feed_forward,
            routes: tokens * routes,
            mixed: if experts.is_some() { tokens * config.hidden_size } else { 0 },
            activation_groups: tokens * widest.div_ceil(GROUP_SIZE),
            rope: config.ropes.iter().map(|rope| tokens * rope.rotary_dim / 2).sum(),
        }
    }
}

buffers! {
    /// The buffers that the CPU computes a step in.
    CpuBuffers {
        /// The normalized hidden state, and what a half of a block gives.
        normed,
        /// Queries.
        query,
        /// Keys.
        key,
        /// Values.
        value,
        /// What attention gives.
        attended,
        /// The gate's output.
        gate,
        /// Up's output.
        up,
        /// The experts' weights for each token.
        routes,
        /// The inputs of an expert.
        gathered,
        /// The sum of what experts give.
        mixed,
        /// Quantized activations.
        words,
        /// Cosines of all ropes.
        cos,
        /// Sines of all ropes.
        sin,
    }
}

impl CpuBuffers<Bytes> {
    /// Their sizes: f32, but for quantized activations.
    pub fn sizes(config: &ModelConfig, extent: Extent) -> Self {
        let shape = StepShape::new(config, extent.chunk);
        let f32s = |len: usize| Bytes((len * size_of::<f32>()) as u64);
        Self {
            normed: f32s(shape.normed),
            query: f32s(shape.query),
            key: f32s(shape.key),
            value: f32s(shape.key),
            attended: f32s(shape.query),
            gate: f32s(shape.gate),
            up: f32s(shape.gate),
            routes: f32s(shape.routes),
            gathered: f32s(shape.mixed),
            mixed: f32s(shape.mixed),
            words: Bytes((shape.activation_groups * ACTIVATION_GROUP) as u64),
            cos: f32s(shape.rope),
            sin: f32s(shape.rope),
        }
    }
}

/// The host's own buffers, wherever a model is computed: the hidden states that pass from stage to stage,
/// and the logits.
pub fn host_state(config: &ModelConfig, extent: Extent) -> [(&'static str, Bytes); 2] {
    let f32s = |len: usize| Bytes((len * size_of::<f32>()) as u64);
    [("hidden", f32s(extent.chunk * config.hidden_size)), ("logits", f32s(config.vocab_size))]
}
