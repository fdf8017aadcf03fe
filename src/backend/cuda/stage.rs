//! A run of modules on one GPU. All buffers are there before it is made; a step takes no memory
//! but what the driver needs to repeat launches, and what it queues runs in order on the compute stream.

use std::sync::Arc;

use super::operands::{HALF, WORD};
use super::repeat::Repeated;
use super::workspace::Workspace;
use super::{Affine, Attention, Cache, Choosing, DeviceMatrix, Input, Norm, Output, Region};
use crate::backend::block::{self, Block, Dense, FeedForward, Modules};
use crate::backend::cpu::{route, routed, soft_cap};
use crate::backend::{Choice, Chosen, DeviceChooser, Hidden, Run, Stage};
use crate::error::Result;
use crate::model_config::{Experts, Layer, ModelConfig};
use crate::quant::WeightDtype;

/// A run of modules that a GPU computes.
pub struct CudaStage {
    workspace: Arc<Workspace>,
    config: Arc<ModelConfig>,
    modules: Modules<DeviceMatrix>,
    /// What each block keeps of each sequence.
    caches: Vec<Vec<Cache>>,
    /// The launches of one token of a sequence: through the blocks alone.
    step: Repeated<usize>,
    /// And those from the embedding to this choice of the next.
    whole_step: Repeated<(usize, Choice)>,
    choice: Choice,
}

impl CudaStage {
    /// A stage of `modules`, whose blocks keep what they see of each sequence in `caches`.
    pub fn new(
        config: &Arc<ModelConfig>,
        (modules, caches): (Modules<DeviceMatrix>, Vec<Vec<Cache>>),
        workspace: Arc<Workspace>,
    ) -> Self {
        let config = Arc::clone(config);
        Self {
            workspace,
            config,
            modules,
            caches,
            step: Repeated::New,
            whole_step: Repeated::New,
            choice: Choice::GREEDY,
        }
    }

    fn norm_of<'a>(&self, affine: &'a Affine) -> Norm<'a> {
        Norm { kind: self.config.family.norm_kind, epsilon: self.config.norm_eps, affine }
    }

    fn input<'a>(&'a self, states: &'a Region, norm: Option<&'a Norm<'a>>) -> Input<'a> {
        Input::Hidden { states, norm, normed: &self.workspace.normed }
    }

    /// `hidden += norm(attention(norm(hidden))); hidden += norm(feed_forward(norm(hidden)))`,
    /// with those norms that the model has.
    fn run(&self, block: &Block<DeviceMatrix>, caches: &[Cache], hidden: &Region, runs: &[Run]) -> Result<()> {
        let tokens = runs.iter().map(|run| run.tokens).sum();
        let norm = block.input_norm.as_ref().map(|norm| self.norm_of(norm));
        let branch = Branch::new(self, block.attention_output_norm.as_ref(), hidden, false);
        let input = self.input(hidden, norm.as_ref());
        self.attention(&block.attention, block.layer, caches, input, &branch, runs)?;
        branch.add(tokens)?;

        let norm = block.feed_forward_norm.as_ref().map(|norm| self.norm_of(norm));
        let input = self.input(hidden, norm.as_ref());
        let is_sum = matches!(block.feed_forward, FeedForward::Experts { .. });
        let branch = Branch::new(self, block.feed_forward_output_norm.as_ref(), hidden, is_sum);
        match &block.feed_forward {
            FeedForward::Experts { routing, router, experts } => {
                self.experts(*routing, router, experts, input, &branch, tokens)?;
            }
            FeedForward::Dense(dense) => {
                let x = self.gated(dense, input, tokens)?;
                branch.matmul(&dense.down, x, tokens)?;
            }
        }
        branch.add(tokens)
    }

    fn attention(
        &self,
        attention: &block::Attention<DeviceMatrix>,
        layer: Layer,
        caches: &[Cache],
        input: Input,
        branch: &Branch,
        runs: &[Run],
    ) -> Result<()> {
        let (w, config) = (&*self.workspace, &self.config);
        let gpu = &*w.gpu;
        let tokens = runs.iter().map(|run| run.tokens).sum();
        let (queries, keys) = (config.queries(), config.keys());
        let [query, key, value] = &attention.query_key_value;
        gpu.matmuls(&[(query, &w.query), (key, &w.key), (value, &w.value)], input, tokens, &w.scratch)?;
        let norms = [(&attention.query_norm, &w.query, queries), (&attention.key_norm, &w.key, keys)];
        let [query_norm, key_norm] = norms.map(|(norm, x, width)| {
            let Some(norm) = norm.as_ref().map(|norm| self.norm_of(norm)) else { return Ok(None) };
            if norm.affine.cols() == config.head_dim {
                return Ok(Some(norm));
            }
            gpu.normalize(Some(&norm), (x, WeightDtype::F16), (tokens, width), x, Output::F16, 1.0)?;
            Ok(None)
        });
        let norms = [query_norm?, key_norm?];
        let norms = norms.each_ref().map(Option::as_ref);
        let mut start = 0;
        for (at, run) in runs.iter().enumerate() {
            let cache = &caches[run.slot];
            let rows = |region: &Region, width: usize| region.part(start * width * HALF, run.tokens * width * HALF);
            let [query, attended] = [&w.query, &w.attended].map(|region| rows(region, queries));
            let [key, value] = [&w.key, &w.value].map(|region| rows(region, keys));
            let shape = Attention {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                position: run.position,
                tokens: run.tokens,
                window: layer.window.unwrap_or(0),
                scale: config.attention_scale,
                softcap: config.attention_softcap.unwrap_or(0.0),
            };
            let (position, frequencies) = (w.position(at), layer.rope.map(|rope| w.frequencies(at, rope)));
            #[expect(clippy::cast_possible_truncation, reason = "angles are f32")]
            let factor = layer.rope.map_or(1.0, |rope| config.ropes[rope].attention_factor as f32);
            let rope = frequencies.as_ref().map(|frequencies| (frequencies, factor));
            gpu.rotate_and_store(&shape, [&query, &key, &value], norms, cache, &position, rope)?;
            gpu.attend(&shape, &query, cache, &attended, &position, &w.scratch)?;
            start += run.tokens;
        }
        branch.matmul(&attention.output, Input::Half(&w.attended), tokens)
    }

    /// What goes into a feed-forward layer's last matrix.
    fn gated(&self, dense: &Dense<DeviceMatrix>, input: Input, tokens: usize) -> Result<Input<'_>> {
        let w = &*self.workspace;
        let (pair, rooms) = ((dense.gate.as_ref(), &dense.up), [&w.gate, &w.up]);
        w.gpu.gated(self.config.activation, pair, input, tokens, rooms, &w.scratch)
    }

    /// The weighted sum of what each token's experts give. The host reads the scores and says which
    /// tokens go to which expert.
    fn experts(
        &self,
        routing: Experts,
        router: &Affine,
        experts: &[Dense<DeviceMatrix>],
        input: Input,
        branch: &Branch,
        tokens: usize,
    ) -> Result<()> {
        let (w, hidden) = (&*self.workspace, self.config.hidden_size);
        let gpu = &*w.gpu;
        let input = gpu.half(input, (tokens, hidden))?;
        gpu.matmul(router, input, tokens, (&w.routes, Output::F32, 1.0), &w.scratch)?;
        let mut scores = vec![0.0f32; tokens * routing.count];
        w.routes.read(bytemuck::must_cast_slice_mut(&mut scores))?;
        route(&mut scores, routing);

        // All experts' tokens, one expert after the other, then their weights.
        let tokens_of = |expert| routed(&scores, routing.count, expert);
        let (chosen, shares): (Vec<_>, Vec<_>) = (0..routing.count).flat_map(tokens_of).unzip();
        let total = chosen.len();
        w.shares.write(bytemuck::must_cast_slice(&chosen))?;
        w.shares.part(total * WORD, total * WORD).write(bytemuck::must_cast_slice(&shares))?;
        branch.target.part(0, tokens * hidden * WORD).clear()?;
        let mut start = 0;
        for (at, expert) in experts.iter().enumerate() {
            let count = tokens_of(at).count();
            if count > 0 {
                let indices = w.shares.part(start * WORD, count * WORD);
                let weights = w.shares.part((total + start) * WORD, count * WORD);
                gpu.gather(&w.normed, &indices, hidden, &w.gathered)?;
                let x = self.gated(expert, Input::Half(&w.gathered), count)?;
                let given = (&w.expert, Output::F32, 1.0);
                gpu.matmul(&expert.down, x, count, given, &w.scratch)?;
                gpu.scatter_add(&w.expert, &indices, &weights, hidden, branch.target)?;
            }
            start += count;
        }
        Ok(())
    }

    /// The logits of one hidden state before the soft cap, with a norm before them or as it is.
    fn head_of(&self, head: &Affine, states: &Region, norm: Option<&Norm>) -> Result<()> {
        let w = &*self.workspace;
        let logits = (&w.logits, Output::F32, self.config.logit_scale);
        w.gpu.matmul(head, self.input(states, norm), 1, logits, &w.scratch)
    }

    fn choose_one(&self) -> Result<()> {
        let w = &*self.workspace;
        let at = Choosing { scratch: &w.choice, seen: &w.seen, chosen: &w.chosen() };
        let softcap = self.config.logit_softcap.unwrap_or(0.0);
        w.gpu.choose(&self.choice, softcap, &w.logits, self.config.vocab_size, &at)
    }

    /// Puts the random number of the next choice where it is looked for.
    fn place_draw(&self, draw: u32) -> Result<()> {
        if self.choice.is_greedy() { Ok(()) } else { self.workspace.chosen().part(2 * WORD, WORD).fill(draw) }
    }

    /// Runs hidden states through all blocks. The workspace holds the positions; those of one token, its own region
    /// says too.
    fn through(&self, states: &Region, runs: &[Run]) -> Result<()> {
        let w = &*self.workspace;
        if let Some(positions) = &self.modules.positions {
            let ids = if let [Run { tokens: 1, .. }] = runs {
                w.position(0)
            } else {
                let rows: Vec<u32> =
                    runs.iter().flat_map(|run| (run.position..run.position + run.tokens).map(row)).collect();
                let ids = w.tokens.part(0, size_of_val(&*rows));
                ids.write(bytemuck::must_cast_slice(&rows))?;
                ids
            };
            w.gpu.embed(positions, &ids, 1.0, states, Output::Add)?;
        }
        let mut blocks = self.modules.blocks.iter().zip(&self.caches);
        blocks.try_for_each(|(block, caches)| self.run(block, caches, states, runs))
    }

    /// What a whole step takes, from the embedding to the head, if all of it is here.
    fn whole(&self) -> Option<[&Affine; 3]> {
        let Modules { embedding, norm, head, blocks, .. } = &self.modules;
        let is_whole = blocks.len() == self.config.layers.len() && !self.has_experts();
        is_whole.then_some([embedding.as_ref()?, norm.as_ref()?, head.as_ref()?])
    }

    /// Whether the host reads the scores of experts between launches.
    fn has_experts(&self) -> bool {
        self.modules.blocks.iter().any(|block| block.layer.has_experts)
    }

    /// Queues a step of one token through the blocks.
    fn step_through(&mut self, run: Run, states: &Region) -> Result<()> {
        let mut step = std::mem::take(&mut self.step);
        let queued = step.queue(&self.workspace.gpu, run.slot, || self.through(states, &[run]));
        self.step = step;
        queued
    }

    /// Queues a step of one token from the embedding to the choice of the next.
    fn step_whole(&mut self, run: Run, states: &Region) -> Result<()> {
        let mut step = std::mem::take(&mut self.whole_step);
        let queued = step.queue(&self.workspace.gpu, (run.slot, self.choice), || {
            let Some([embedding, norm, head]) = self.whole() else { unreachable!("the whole model is here") };
            let (gpu, token) = (&self.workspace.gpu, self.workspace.chosen().part(0, WORD));
            gpu.embed(embedding, &token, self.config.embedding_scale, states, Output::F32)?;
            self.through(states, &[run])?;
            self.head_of(head, states, Some(&self.norm_of(norm)))?;
            self.choose_one()
        });
        self.whole_step = step;
        queued
    }

    /// Puts positions and frequencies where kernels look for them.
    fn place(&self, runs: &[Run]) -> Result<()> {
        self.workspace.place_frequencies(&self.config.ropes, runs)?;
        let mut positions = runs.iter().enumerate().map(|(at, run)| (self.workspace.position(at), row(run.position)));
        positions.try_for_each(|(region, position)| region.fill(position))
    }
}

/// A position as kernels take it: it is below the context, which a configuration bounds.
#[expect(clippy::cast_possible_truncation, reason = "below 2^28")]
fn row(position: usize) -> u32 {
    position as u32
}

/// What a half of a block gives: onto the hidden state at once, or into a buffer
/// of its own, where a norm or a sum comes before that.
struct Branch<'a> {
    stage: &'a CudaStage,
    norm: Option<Norm<'a>>,
    hidden: &'a Region,
    target: &'a Region,
    is_apart: bool,
}

impl<'a> Branch<'a> {
    fn new(stage: &'a CudaStage, norm: Option<&'a Affine>, hidden: &'a Region, is_sum: bool) -> Self {
        let norm = norm.map(|norm| stage.norm_of(norm));
        let is_apart = norm.is_some() || is_sum;
        Self { stage, norm, hidden, target: if is_apart { &stage.workspace.branch } else { hidden }, is_apart }
    }

    fn matmul(&self, affine: &Affine, x: Input, tokens: usize) -> Result<()> {
        let onto = (Output::Add, self.stage.config.residual_scale);
        let (output, factor) = if self.is_apart { (Output::F32, 1.0) } else { onto };
        let w = &*self.stage.workspace;
        w.gpu.matmul(affine, x, tokens, (self.target, output, factor), &w.scratch)
    }

    fn add(&self, tokens: usize) -> Result<()> {
        if !self.is_apart {
            return Ok(());
        }
        let config = &self.stage.config;
        let (x, shape) = ((self.target, WeightDtype::F32), (tokens, config.hidden_size));
        let gpu = &self.stage.workspace.gpu;
        gpu.normalize(self.norm.as_ref(), x, shape, self.hidden, Output::Add, config.residual_scale)
    }
}

impl Stage for CudaStage {
    fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<()> {
        let Some(embedding) = &self.modules.embedding else { return Ok(()) };
        let w = &*self.workspace;
        let ids = w.tokens.part(0, size_of_val(tokens));
        ids.write(bytemuck::must_cast_slice(tokens))?;
        let states = hidden.begin_on_gpu(&w.hidden);
        w.gpu.embed(embedding, &ids, self.config.embedding_scale, &states, Output::F32)
    }

    fn run_blocks(&mut self, hidden: &mut Hidden, runs: &[Run]) -> Result<()> {
        if self.modules.blocks.is_empty() && self.modules.positions.is_none() {
            return Ok(());
        }
        let states = hidden.on_gpu(&self.workspace.hidden)?;
        self.place(runs)?;
        match runs {
            [run] if run.tokens == 1 && !self.has_experts() => self.step_through(*run, &states),
            _ => self.through(&states, runs),
        }
    }

    fn norm(&mut self, hidden: &mut Hidden) -> Result<()> {
        let Some(norm) = &self.modules.norm else { return Ok(()) };
        let w = &*self.workspace;
        let shape = (hidden.tokens(), self.config.hidden_size);
        let states = hidden.on_gpu(&w.hidden)?;
        let norm = self.norm_of(norm);
        w.gpu.normalize(Some(&norm), (&states, WeightDtype::F32), shape, &states, Output::F32, 1.0)
    }

    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()> {
        let Some(head) = &self.modules.head else { return Ok(()) };
        let states = hidden.on_gpu(&self.workspace.hidden)?;
        let width = self.config.hidden_size * WORD;
        for (row, logits) in logits.chunks_mut(self.config.vocab_size).enumerate() {
            self.head_of(head, &states.part(row * width, width), None)?;
            self.workspace.logits.read(bytemuck::must_cast_slice_mut(logits))?;
            for logit in logits {
                *logit = soft_cap(*logit, self.config.logit_softcap);
            }
        }
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        if self.has_experts() || self.modules.blocks.is_empty() {
            return Ok(());
        }
        let w = Arc::clone(&self.workspace);
        let run = Run { slot: 0, pages: &[0], position: 0, tokens: 1, length: 1 };
        let states = w.hidden.part(0, self.config.hidden_size * WORD);
        self.place(&[run])?;
        self.place_draw(0)?;
        // What this leaves of a token is written over when there is one.
        for _ in ["launched", "kept"] {
            states.clear()?;
            w.chosen().clear()?;
            if self.whole().is_some() {
                self.step_whole(run, &states)?;
            } else {
                self.step_through(run, &states)?;
            }
        }
        w.gpu.synchronize()
    }

    fn launch_each_kernel(&mut self) {
        (self.step, self.whole_step) = (Repeated::Apart(None), Repeated::Apart(None));
    }

    fn why_apart(&self) -> Option<&str> {
        self.step.why_apart().or_else(|| self.whole_step.why_apart())
    }

    fn keeps_halves(&self) -> bool {
        self.modules.head.is_some() || !self.modules.blocks.is_empty()
    }

    fn chooser(&mut self) -> Option<&mut dyn DeviceChooser> {
        if self.modules.head.is_some() { Some(self) } else { None }
    }
}

impl DeviceChooser for CudaStage {
    fn begin(&mut self, _: usize, choice: &Choice, seen: &[u32]) -> Result<()> {
        self.choice = *choice;
        self.workspace.answers().forget()?;
        if choice.is_penalized() {
            let mut bits = vec![0u32; self.config.vocab_size.div_ceil(32)];
            for token in seen {
                bits[*token as usize / 32] |= 1 << (token % 32);
            }
            self.workspace.seen.write(bytemuck::must_cast_slice(&bits))?;
        }
        Ok(())
    }

    fn choose(&mut self, hidden: &mut Hidden, rows: &[(usize, u32)]) -> Result<()> {
        let draw = rows[0].1;
        if let Some(head) = &self.modules.head {
            self.head_of(head, &hidden.on_gpu(&self.workspace.hidden)?, None)?;
        }
        self.place_draw(draw)?;
        self.choose_one()?;
        self.workspace.answers().send(&self.workspace.chosen())
    }

    fn does_whole_steps(&self) -> bool {
        self.whole().is_some()
    }

    fn step(&mut self, tokens: Option<&[u32]>, runs: &[Run], draws: &[u32]) -> Result<()> {
        let w = Arc::clone(&self.workspace);
        let (run, draw) = (runs[0], draws[0]);
        if let Some(tokens) = tokens {
            w.chosen().part(0, WORD).fill(tokens[0])?;
        }
        self.place(&[run])?;
        self.place_draw(draw)?;
        let states = w.hidden.part(0, self.config.hidden_size * WORD);
        self.step_whole(run, &states)?;
        w.answers().send(&w.chosen())
    }

    fn chosen(&mut self) -> Result<Vec<Chosen>> {
        self.workspace.answers().receive().map(|chosen| vec![chosen])
    }
}
