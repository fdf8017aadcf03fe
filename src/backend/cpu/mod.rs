//! The stage that the CPU computes: over weights in host memory, or over a
//! packed file on the disk that is mapped.
//!
//! Activations are f32. Their buffers are made when the stage is; all that a step allocates beside
//! them are lists of tables and of experts, and some rows of scratch for each thread.

mod arena;
mod attention;
mod block;
mod exp;
mod flash;
mod kernels;
mod matmul;
mod ops;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub use arena::{Arena, zeroed};
pub use kernels::GROUP_WORDS;
pub use matmul::{Activations, Affine, matmul};
pub(super) use ops::{route, soft_cap};

use super::{Hidden, Stage};
use crate::architecture::{Part, Role};
use crate::bytes::Bytes;
use crate::error::Result;
use crate::model_config::ModelConfig;
use crate::plan::memory::{KvLayout, WorkspaceLayout};
use crate::pool::Pool;
use crate::quant::{Matrix, MatrixLayout};
use block::Block;
use ops::Norm;

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

/// The parameters of modules, by what they are for.
#[derive(Clone, Default)]
pub struct Parameters(HashMap<(Role, Part), Parameter>);

impl Parameters {
    /// Adds a parameter.
    pub fn insert(&mut self, role: Role, part: Part, parameter: Parameter) {
        self.0.insert((role, part), parameter);
    }

    /// The module of a role, if the model has one.
    fn find(&self, role: Role) -> Option<Affine<'_>> {
        let matrix = |part| self.0.get(&(role, part)).map(Parameter::matrix);
        Some(Affine::new(matrix(Part::Weight)?, matrix(Part::Bias)))
    }

    /// The module of a role that [`crate::architecture::ModuleTree`] gives every model.
    fn of(&self, role: Role) -> Affine<'_> {
        match self.find(role) {
            Some(affine) => affine,
            None => unreachable!("the loader gives every module all of its parameters: {role:?}"),
        }
    }
}

/// What all steps of a stage need to know.
struct Setup {
    config: ModelConfig,
    pool: Arc<Pool>,
    norm: Norm,
    context: usize,
    /// The angular frequencies of each of the model's ropes.
    frequencies: Vec<Vec<f32>>,
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
    routes: Vec<f32>,
    gathered: Vec<f32>,
    mixed: Vec<f32>,
    /// Quantized activations.
    words: Vec<i32>,
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
            routes: buffer(layout.routes),
            gathered: buffer(layout.mixed),
            mixed: buffer(layout.mixed),
            words: vec![0; layout.activation_groups * GROUP_WORDS],
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
            &self.routes,
            &self.gathered,
            &self.mixed,
            &self.cos,
            &self.sin,
        ];
        let elements: usize = f32s.iter().map(|buffer| buffer.len()).sum();
        Bytes(((elements + self.words.len()) * size_of::<f32>()) as u64)
    }
}

/// A run of modules that the CPU computes.
pub struct CpuStage {
    setup: Setup,
    workspace: Arc<Mutex<Workspace>>,
    /// All that is in no block.
    parameters: Parameters,
    blocks: Vec<Block>,
}

impl CpuStage {
    /// A stage without modules, for sequences of at most `context` tokens, which `pool` computes.
    pub fn new(config: &ModelConfig, context: usize, workspace: Arc<Mutex<Workspace>>, pool: Arc<Pool>) -> Self {
        let setup = Setup {
            norm: Norm { kind: config.norm_kind, epsilon: config.norm_eps },
            pool,
            context,
            frequencies: config.ropes.iter().map(|rope| rope.frequencies(context)).collect(),
            config: config.clone(),
        };
        Self { setup, workspace, parameters: Parameters::default(), blocks: Vec::new() }
    }

    /// Gives the stage the parameters of a module that is no block.
    pub fn add(&mut self, parameters: Parameters) {
        self.parameters.0.extend(parameters.0);
    }

    /// Makes the embedding the head too.
    pub fn tie_head(&mut self) {
        if let Some(embedding) = self.parameters.0.get(&(Role::Embedding, Part::Weight)).cloned() {
            self.parameters.insert(Role::Head, Part::Weight, embedding);
        }
    }

    /// Adds the block at `index` of the model with an empty KV cache: keys and
    /// values as `kv` lays them out.
    pub fn push_block(&mut self, index: usize, parameters: Parameters, kv: KvLayout) -> Result<()> {
        let empty = || zeroed("the KV cache", kv.bytes());
        let layer = self.setup.config.layers[index];
        self.blocks.push(Block { layer, parameters, kv, keys: empty()?, values: empty()? });
        Ok(())
    }

    /// Bytes of the KV caches.
    pub fn kv_bytes(&self) -> Bytes {
        self.blocks.iter().map(|block| Bytes((block.keys.len() + block.values.len()) as u64)).sum()
    }
}

impl Stage for CpuStage {
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()> {
        if let Some(embedding) = self.parameters.find(Role::Embedding) {
            let scale = self.setup.config.embedding_scale;
            for (token, row) in tokens.iter().zip(hidden.on_host()?.chunks_mut(self.setup.config.hidden_size)) {
                embedding.weight.dequantize_row(*token as usize, row);
                for x in row {
                    *x *= scale;
                }
            }
        }
        Ok(())
    }

    fn run_blocks(&mut self, hidden: &mut Hidden, position: usize) -> Result<()> {
        if self.blocks.is_empty() && self.parameters.find(Role::Positions).is_none() {
            return Ok(());
        }
        let hidden = hidden.on_host()?;
        // A panic while the lock was held leaves only scratch data behind.
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let Setup { config, frequencies, pool, .. } = &self.setup;
        let tokens = hidden.len() / config.hidden_size;
        let Workspace { cos, sin, normed, .. } = &mut *workspace;
        if let Some(positions) = self.parameters.find(Role::Positions) {
            let row = &mut normed[..config.hidden_size];
            for (token, hidden) in hidden.chunks_mut(config.hidden_size).enumerate() {
                positions.weight.dequantize_row(position + token, row);
                ops::add(pool.isa(), hidden, row, 1.0);
            }
        }
        let (mut cos, mut sin) = (&mut cos[..], &mut sin[..]);
        for (rope, frequencies) in config.ropes.iter().zip(frequencies) {
            let (table_cos, table_sin);
            (table_cos, cos) = cos.split_at_mut(tokens * frequencies.len());
            (table_sin, sin) = sin.split_at_mut(tokens * frequencies.len());
            #[expect(clippy::cast_possible_truncation, reason = "angles are f32")]
            ops::rope_table(frequencies, rope.attention_factor as f32, position, table_cos, table_sin);
        }
        for block in &mut self.blocks {
            block.run(&self.setup, &mut workspace, hidden, tokens, position);
        }
        Ok(())
    }

    fn norm(&mut self, hidden: &mut Hidden) -> Result<()> {
        if let Some(norm) = self.parameters.find(Role::OutputNorm) {
            self.setup.norm.apply(&self.setup.pool, hidden.on_host()?, &norm);
        }
        Ok(())
    }

    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()> {
        if let Some(head) = self.parameters.find(Role::Head) {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let pool = &self.setup.pool;
            let x = Activations::of(pool, hidden.on_host()?, &mut workspace.words, &[&head]);
            matmul(pool, &x, [(&head, &mut *logits)]);
            let config = &self.setup.config;
            ops::cap(pool, logits, config.logit_scale, config.logit_softcap);
        }
        Ok(())
    }
}
