//! The stage that the CPU computes: over weights in host memory, or over a
//! packed file on the disk that is mapped.
//!
//! Activations and the KV cache are f32. All buffers are made when the stage
//! is; a step allocates nothing but a row of scratch for each thread.

mod arena;
mod attention;
mod matmul;
mod ops;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub use arena::{Arena, zeroed};
pub use matmul::{Activations, matmul};
pub(super) use ops::rope_frequencies;

use super::{Hidden, Stage};
use crate::architecture::Role;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::model_config::ModelConfig;
use crate::plan::memory::{self, WorkspaceLayout};
use crate::quant::{Matrix, MatrixLayout, Storage};

/// A matrix in an arena.
#[derive(Clone)]
pub struct Parameter {
    layout: MatrixLayout,
    offset: usize,
    arena: Arc<Arena>,
}

impl Parameter {
    /// The matrix of `layout` at `offset` of `arena`.
    pub fn new(layout: MatrixLayout, offset: usize, arena: Arc<Arena>) -> Self {
        Self { layout, offset, arena }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.layout, &self.arena.bytes()[self.offset..])
    }
}

/// The parameters of one module, by role.
pub type Parameters = HashMap<Role, Parameter>;

/// The dimensions that a step needs.
#[derive(Clone, Debug)]
struct Dimensions {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    feed_forward: usize,
    epsilon: f32,
    context: usize,
    frequencies: Vec<f32>,
}

/// The buffers of a step, shared by all CPU stages of a model: they run in turn.
pub struct Workspace {
    normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    product: Vec<f32>,
    activation_codes: Vec<i8>,
    activation_scales: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Workspace {
    /// Buffers of the lengths that the plan counts.
    pub fn new(layout: &WorkspaceLayout) -> Self {
        let buffer = |len| vec![0.0; len];
        Self {
            normed: buffer(layout.normed),
            query: buffer(layout.query),
            key: buffer(layout.key),
            value: buffer(layout.key),
            attended: buffer(layout.attended),
            gate: buffer(layout.gate),
            up: buffer(layout.gate),
            product: buffer(layout.product),
            activation_codes: vec![0; layout.activation_codes],
            activation_scales: buffer(layout.activation_scales),
            cos: buffer(layout.rope),
            sin: buffer(layout.rope),
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> Bytes {
        let f32s = [
            &self.normed,
            &self.query,
            &self.key,
            &self.value,
            &self.attended,
            &self.gate,
            &self.up,
            &self.product,
            &self.activation_scales,
            &self.cos,
            &self.sin,
        ];
        let elements: usize = f32s.iter().map(|buffer| buffer.len()).sum();
        Bytes((elements * size_of::<f32>() + self.activation_codes.len()) as u64)
    }
}

struct Block {
    parameters: Parameters,
    /// Keys and values, `[batch][kv_heads][context][head_dim]` each; sequence 0 is used.
    keys: memmap2::MmapMut,
    values: memmap2::MmapMut,
}

/// A run of modules that the CPU computes.
pub struct CpuStage {
    dimensions: Dimensions,
    workspace: Arc<Mutex<Workspace>>,
    embedding: Option<Parameter>,
    blocks: Vec<Block>,
    norm: Option<Parameter>,
    head: Option<Parameter>,
}

impl CpuStage {
    /// A stage without modules, for sequences of at most `context` tokens.
    pub fn new(config: &ModelConfig, context: usize, workspace: Arc<Mutex<Workspace>>) -> Self {
        Self {
            dimensions: Dimensions {
                hidden: config.hidden_size,
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                feed_forward: config.intermediate_size,
                epsilon: config.rms_norm_eps,
                context,
                frequencies: ops::rope_frequencies(&config.rope, config.head_dim),
            },
            workspace,
            embedding: None,
            blocks: Vec::new(),
            norm: None,
            head: None,
        }
    }

    /// Gives the stage the embedding.
    pub fn set_embedding(&mut self, parameter: Parameter) {
        self.embedding = Some(parameter);
    }

    /// Gives the stage the last norm.
    pub fn set_norm(&mut self, parameter: Parameter) {
        self.norm = Some(parameter);
    }

    /// Gives the stage the head.
    pub fn set_head(&mut self, parameter: Parameter) {
        self.head = Some(parameter);
    }

    /// Adds a block with an empty KV cache of `kv_len` elements for keys and as many for values.
    ///
    /// # Errors
    /// The memory is not to be had.
    pub fn push_block(&mut self, parameters: Parameters, kv_len: usize) -> Result<()> {
        let bytes = Bytes((kv_len * memory::kv_element(crate::device::DeviceId::Cpu)) as u64);
        self.blocks.push(Block {
            parameters,
            keys: zeroed("the KV cache", bytes)?,
            values: zeroed("the KV cache", bytes)?,
        });
        Ok(())
    }

    /// Bytes of the KV caches.
    pub fn kv_bytes(&self) -> Bytes {
        self.blocks.iter().map(|block| Bytes((block.keys.len() + block.values.len()) as u64)).sum()
    }
}

/// The parameter of a role that [`crate::architecture::ModuleTree`] gives every block.
fn of(parameters: &Parameters, role: Role) -> Matrix<'_> {
    match parameters.get(&role) {
        Some(parameter) => parameter.matrix(),
        None => unreachable!("the loader gives every module all of its parameters: {role:?}"),
    }
}

/// `x` as activations, quantized if one of `matrices` computes on integers.
fn activations<'a>(
    x: &'a [f32],
    cols: usize,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    matrices: &[&Matrix],
) -> Activations<'a> {
    let quantized = matrices.iter().any(|matrix| !matches!(matrix.layout.storage, Storage::Plain(_)));
    Activations::new(x, cols, codes, scales, quantized)
}

impl Stage for CpuStage {
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()> {
        if let Some(embedding) = &self.embedding {
            let matrix = embedding.matrix();
            for (token, row) in tokens.iter().zip(hidden.on_host()?.chunks_mut(self.dimensions.hidden)) {
                matrix.dequantize_row(*token as usize, row);
            }
        }
        Ok(())
    }

    fn run_blocks(&mut self, hidden: &mut Hidden, position: usize) -> Result<()> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        let hidden = hidden.on_host()?;
        // A panic while the lock was held leaves only scratch data behind.
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = hidden.len() / self.dimensions.hidden;
        let rope = tokens * self.dimensions.head_dim / 2;
        let Workspace { cos, sin, .. } = &mut *workspace;
        ops::rope_table(&self.dimensions.frequencies, position, &mut cos[..rope], &mut sin[..rope]);
        for block in &mut self.blocks {
            block.run(&self.dimensions, &mut workspace, hidden, tokens, position);
        }
        Ok(())
    }

    fn norm(&mut self, hidden: &mut Hidden) -> Result<()> {
        if let Some(norm) = &self.norm {
            let hidden = hidden.on_host()?;
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let normed = &mut workspace.normed[..hidden.len()];
            ops::rms_norm(hidden, norm.matrix(), self.dimensions.epsilon, normed);
            hidden.copy_from_slice(normed);
        }
        Ok(())
    }

    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()> {
        if let Some(head) = &self.head {
            let hidden = hidden.on_host()?;
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let Workspace { activation_codes, activation_scales, .. } = &mut *workspace;
            let matrix = head.matrix();
            let x = activations(hidden, hidden.len(), activation_codes, activation_scales, &[&matrix]);
            matmul(&matrix, &x, &mut [], logits);
        }
        Ok(())
    }
}

impl Block {
    /// `hidden += attention(norm(hidden)); hidden += feed_forward(norm(hidden))`.
    #[expect(clippy::many_single_char_names, reason = "q, k and v are what they are called")]
    fn run(&mut self, d: &Dimensions, workspace: &mut Workspace, hidden: &mut [f32], tokens: usize, position: usize) {
        let Workspace {
            normed,
            query,
            key,
            value,
            attended,
            gate,
            up,
            product,
            activation_codes: codes,
            activation_scales: scales,
            cos,
            sin,
        } = workspace;
        let (queries, keys) = (d.heads * d.head_dim, d.kv_heads * d.head_dim);
        let normed = &mut normed[..tokens * d.hidden];
        let (query, attended) = (&mut query[..tokens * queries], &mut attended[..tokens * queries]);
        let (key, value) = (&mut key[..tokens * keys], &mut value[..tokens * keys]);
        let (gate, up) = (&mut gate[..tokens * d.feed_forward], &mut up[..tokens * d.feed_forward]);
        let (cos, sin) = (&cos[..tokens * d.head_dim / 2], &sin[..tokens * d.head_dim / 2]);
        let parameters = &self.parameters;

        ops::rms_norm(hidden, of(parameters, Role::InputNorm), d.epsilon, normed);
        let (q, k, v) = (of(parameters, Role::Query), of(parameters, Role::Key), of(parameters, Role::Value));
        let x = activations(normed, d.hidden, codes, scales, &[&q, &k, &v]);
        matmul(&q, &x, product, query);
        matmul(&k, &x, product, key);
        matmul(&v, &x, product, value);
        ops::rotate(query, d.head_dim, cos, sin);
        ops::rotate(key, d.head_dim, cos, sin);

        let cache = attention::Cache { heads: d.heads, kv_heads: d.kv_heads, head_dim: d.head_dim, context: d.context };
        let cached_keys: &mut [f32] = bytemuck::cast_slice_mut(&mut self.keys);
        let cached_values: &mut [f32] = bytemuck::cast_slice_mut(&mut self.values);
        cache.append(key, cached_keys, position);
        cache.append(value, cached_values, position);
        cache.attend(query, cached_keys, cached_values, position, attended);

        let output = of(parameters, Role::Output);
        let x = activations(attended, queries, codes, scales, &[&output]);
        matmul(&output, &x, product, normed);
        ops::add(hidden, normed);

        ops::rms_norm(hidden, of(parameters, Role::PostAttentionNorm), d.epsilon, normed);
        let (g, u) = (of(parameters, Role::Gate), of(parameters, Role::Up));
        let x = activations(normed, d.hidden, codes, scales, &[&g, &u]);
        matmul(&g, &x, product, gate);
        matmul(&u, &x, product, up);
        ops::swiglu(gate, up);
        let down = of(parameters, Role::Down);
        let x = activations(gate, d.feed_forward, codes, scales, &[&down]);
        matmul(&down, &x, product, normed);
        ops::add(hidden, normed);
    }
}
