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
mod kv;
mod matmul;
mod ops;

use std::sync::{Arc, Mutex};

pub use arena::{Arena, map, zeroed};
pub(super) use exp::exp;
pub use kernels::GROUP_WORDS;
pub use kv::KvCache;
pub use matmul::matmul;
pub(super) use ops::{route, routed, soft_cap};

use super::block::{Linear, Modules};
use super::{Hidden, Run, Stage};
use crate::error::Result;
use crate::footprint::CpuBuffers;
use crate::model_config::ModelConfig;
use crate::pool::{Pool, lock};
use crate::quant::{Matrix, MatrixLayout};

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
        Matrix::new(&self.layout, &self.arena[self.offset..])
    }
}

impl AsRef<MatrixLayout> for Parameter {
    fn as_ref(&self) -> &MatrixLayout {
        &self.layout
    }
}

/// What a product takes.
pub type Affine<'a> = Linear<Matrix<'a>>;

impl Linear<Parameter> {
    fn affine(&self) -> Affine<'_> {
        let bias = self.bias.as_ref().map(Parameter::matrix);
        Linear { weight: self.weight.matrix(), bias, rows: self.rows.clone() }
    }
}

/// What all steps of a stage need to know.
struct Setup {
    config: Arc<ModelConfig>,
    pool: Arc<Pool>,
}

/// The buffers of a step, shared by all CPU stages of a model: they run in turn.
pub type Workspace = CpuBuffers<Vec<f32>>;

/// A run of modules that the CPU computes.
pub struct CpuStage {
    setup: Setup,
    workspace: Arc<Mutex<Workspace>>,
    modules: Modules<Parameter>,
    /// What each block keeps.
    caches: Vec<KvCache>,
}

impl CpuStage {
    /// A stage of `modules`, whose blocks keep what they see in `caches`; `pool` computes it.
    pub fn new(
        config: &Arc<ModelConfig>,
        (modules, caches): (Modules<Parameter>, Vec<KvCache>),
        workspace: Arc<Mutex<Workspace>>,
        pool: Arc<Pool>,
    ) -> Self {
        Self { setup: Setup { pool, config: Arc::clone(config) }, workspace, modules, caches }
    }
}

impl Stage for CpuStage {
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()> {
        if let Some(embedding) = &self.modules.embedding {
            let (embedding, scale) = (embedding.affine(), self.setup.config.embedding_scale);
            for (token, row) in tokens.iter().zip(hidden.on_host()?.chunks_mut(self.setup.config.hidden_size)) {
                embedding.weight.dequantize_row(*token as usize, row);
                for x in row {
                    *x *= scale;
                }
            }
        }
        Ok(())
    }

    fn run_blocks(&mut self, hidden: &mut Hidden, runs: &[Run]) -> Result<()> {
        let Modules { positions, blocks, .. } = &self.modules;
        if blocks.is_empty() && positions.is_none() {
            return Ok(());
        }
        let hidden = hidden.on_host()?;
        let mut workspace = lock(&self.workspace);
        let Setup { config, pool } = &self.setup;
        let Workspace { cos, sin, normed, .. } = &mut *workspace;
        if let Some(positions) = positions {
            let (positions, row) = (positions.affine(), &mut normed[..config.hidden_size]);
            let each = runs.iter().flat_map(|run| run.position..run.position + run.tokens);
            for (position, hidden) in each.zip(hidden.chunks_mut(config.hidden_size)) {
                positions.weight.dequantize_row(position, row);
                ops::add(pool.isa(), hidden, row, 1.0);
            }
        }
        let (mut cos, mut sin) = (&mut cos[..], &mut sin[..]);
        for rope in &config.ropes {
            for run in runs {
                let frequencies = rope.frequencies(run.length);
                let (table_cos, table_sin);
                (table_cos, cos) = cos.split_at_mut(run.tokens * frequencies.len());
                (table_sin, sin) = sin.split_at_mut(run.tokens * frequencies.len());
                #[expect(clippy::cast_possible_truncation, reason = "angles are f32")]
                ops::rope_table(&frequencies, rope.attention_factor as f32, run.position, table_cos, table_sin);
            }
        }
        for (block, cache) in blocks.iter().zip(&mut self.caches) {
            self.setup.run(block, cache, &mut workspace, hidden, runs);
        }
        Ok(())
    }

    fn norm(&mut self, hidden: &mut Hidden) -> Result<()> {
        if self.modules.norm.is_some() {
            self.setup.normalize(self.modules.norm.as_ref(), hidden.on_host()?);
        }
        Ok(())
    }

    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()> {
        if let Some(head) = &self.modules.head {
            let head = head.affine();
            let mut workspace = lock(&self.workspace);
            let Setup { config, pool } = &self.setup;
            matmul(pool, hidden.on_host()?, &mut workspace.words, [(&head, &mut *logits)]);
            ops::cap(pool, logits, config.logit_scale, config.logit_softcap);
        }
        Ok(())
    }
}
