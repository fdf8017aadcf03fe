//! A run of modules on one GPU. All buffers are there before it is made; a step
//! allocates nothing, and what it queues runs in order on the compute stream.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Activation, Attention, DeviceMatrix, Gpu, MAX_HEAD_DIM, Norm, NormKind, Output, Region, arena};
use crate::architecture::Role;
use crate::backend::cpu::rope_frequencies;
use crate::backend::{Hidden, Stage};
use crate::error::{Error, Result};
use crate::model_config::ModelConfig;
use crate::plan::memory;
use crate::quant::WeightDtype;

/// The parameters of one module, by role.
pub type Parameters = HashMap<Role, DeviceMatrix>;

/// The buffers of a step on one GPU, shared by all its stages: they run in turn.
/// What each holds stands at [`memory::cuda_workspace`].
pub struct Workspace {
    gpu: Arc<Gpu>,
    hidden: Region,
    normed: Region,
    query: Region,
    key: Region,
    value: Region,
    attended: Region,
    gate: Region,
    up: Region,
    logits: Region,
    tokens: Region,
    frequencies: Region,
}

impl Workspace {
    /// Takes the buffers that the plan counts.
    ///
    /// # Errors
    /// The memory is not to be had, or the GPU fails, or the model's heads are too wide for the kernels.
    pub fn take(gpu: &Arc<Gpu>, config: &ModelConfig, context: usize, separate: bool) -> Result<Self> {
        if config.head_dim > MAX_HEAD_DIM {
            return Err(Error::input(format!(
                "heads of width {} cannot be computed on a GPU; the widest are {MAX_HEAD_DIM}",
                config.head_dim
            ))
            .hint("a device map of `{\"\": \"cpu\"}` computes on the CPU"));
        }
        let regions = arena(gpu, "the workspace", &memory::cuda_workspace(config, context), separate)?;
        let Ok([hidden, normed, query, key, value, attended, gate, up, logits, tokens, frequencies]) =
            <[Region; 11]>::try_from(regions)
        else {
            unreachable!("an arena has a region for every size")
        };
        let table = rope_frequencies(&config.rope, config.head_dim);
        let frequencies = frequencies.part(0, table.len() * size_of::<f32>());
        frequencies.write(bytemuck::must_cast_slice(&table))?;
        let gpu = Arc::clone(gpu);
        Ok(Self { gpu, hidden, normed, query, key, value, attended, gate, up, logits, tokens, frequencies })
    }
}

struct Block {
    parameters: Parameters,
    /// Keys and values, `[batch][kv_heads][context][head_dim]` each; sequence 0 is used.
    keys: Region,
    values: Region,
}

/// A run of modules that a GPU computes.
pub struct CudaStage {
    workspace: Arc<Workspace>,
    shape: Attention,
    feed_forward: usize,
    hidden: usize,
    epsilon: f32,
    embedding: Option<DeviceMatrix>,
    blocks: Vec<Block>,
    norm: Option<DeviceMatrix>,
    head: Option<DeviceMatrix>,
}

impl CudaStage {
    /// A stage without modules, for sequences of at most `context` tokens.
    pub fn new(config: &ModelConfig, context: usize, workspace: Arc<Workspace>) -> Self {
        let shape = Attention {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            context,
            position: 0,
            tokens: 0,
            window: 0,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
            softcap: 0.0,
        };
        Self {
            workspace,
            shape,
            feed_forward: config.intermediate_size,
            hidden: config.hidden_size,
            epsilon: config.rms_norm_eps,
            embedding: None,
            blocks: Vec::new(),
            norm: None,
            head: None,
        }
    }

    /// Gives the stage the embedding.
    pub fn set_embedding(&mut self, parameter: DeviceMatrix) {
        self.embedding = Some(parameter);
    }

    /// Gives the stage the last norm.
    pub fn set_norm(&mut self, parameter: DeviceMatrix) {
        self.norm = Some(parameter);
    }

    /// Gives the stage the head.
    pub fn set_head(&mut self, parameter: DeviceMatrix) {
        self.head = Some(parameter);
    }

    /// Adds a block with its KV cache, a region for keys and one for values.
    pub fn push_block(&mut self, parameters: Parameters, [keys, values]: [Region; 2]) {
        self.blocks.push(Block { parameters, keys, values });
    }

    fn rms_norm<'a>(&self, weight: &'a DeviceMatrix) -> Norm<'a> {
        Norm { kind: NormKind::Rms, weight, bias: None, offset: 0.0, epsilon: self.epsilon }
    }

    /// `hidden += attention(norm(hidden)); hidden += feed_forward(norm(hidden))`.
    fn run(&self, block: &Block, hidden: &Region, shape: &Attention) -> Result<()> {
        let w = &*self.workspace;
        let (gpu, tokens) = (&*w.gpu, shape.tokens);
        let of = |role| match block.parameters.get(&role) {
            Some(parameter) => parameter,
            None => unreachable!("the loader gives every module all of its parameters: {role:?}"),
        };
        let normalize = |role| {
            let norm = Some(self.rms_norm(of(role)));
            gpu.normalize(norm, hidden, WeightDtype::F32, (tokens, self.hidden), &w.normed, Output::F16)
        };
        let matmul = |role, x, y, output| gpu.matmul(of(role), None, x, tokens, y, output);

        normalize(Role::InputNorm)?;
        matmul(Role::Query, &w.normed, &w.query, Output::F16)?;
        matmul(Role::Key, &w.normed, &w.key, Output::F16)?;
        matmul(Role::Value, &w.normed, &w.value, Output::F16)?;
        let cache = [&block.keys, &block.values];
        gpu.rotate_and_append(shape, [&w.query, &w.key, &w.value], cache, &w.frequencies, 1.0)?;
        gpu.attend(shape, &w.query, cache, &w.attended)?;
        matmul(Role::Output, &w.attended, hidden, Output::Add)?;

        normalize(Role::PostAttentionNorm)?;
        matmul(Role::Gate, &w.normed, &w.gate, Output::F16)?;
        matmul(Role::Up, &w.normed, &w.up, Output::F16)?;
        gpu.activate(Activation::Silu, &w.gate, Some(&w.up), tokens * self.feed_forward)?;
        matmul(Role::Down, &w.gate, hidden, Output::Add)
    }
}

impl Stage for CudaStage {
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()> {
        let Some(embedding) = &self.embedding else { return Ok(()) };
        let w = &*self.workspace;
        let ids = w.tokens.part(0, size_of_val(tokens));
        ids.write(bytemuck::must_cast_slice(tokens))?;
        w.gpu.embed(embedding, &ids, 1.0, &hidden.begin_on_gpu(&w.hidden))
    }

    fn run_blocks(&mut self, hidden: &mut Hidden, position: usize) -> Result<()> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        let shape = Attention { position, tokens: hidden.tokens(), ..self.shape };
        let states = hidden.on_gpu(&self.workspace.hidden)?;
        self.blocks.iter().try_for_each(|block| self.run(block, &states, &shape))
    }

    fn norm(&mut self, hidden: &mut Hidden) -> Result<()> {
        let Some(weight) = &self.norm else { return Ok(()) };
        let w = &*self.workspace;
        let shape = (hidden.tokens(), self.hidden);
        let states = hidden.on_gpu(&w.hidden)?;
        w.gpu.normalize(Some(self.rms_norm(weight)), &states, WeightDtype::F32, shape, &states, Output::F32)
    }

    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()> {
        let Some(head) = &self.head else { return Ok(()) };
        let w = &*self.workspace;
        let states = hidden.on_gpu(&w.hidden)?;
        w.gpu.normalize(None, &states, WeightDtype::F32, (1, self.hidden), &w.normed, Output::F16)?;
        w.gpu.matmul(head, None, &w.normed, 1, &w.logits, Output::F32)?;
        w.logits.read(bytemuck::must_cast_slice_mut(logits))
    }
}
