//! A run of modules on one GPU. All buffers are there before it is made; a step takes no memory
//! but what the driver needs to repeat launches, and what it queues runs in order on the compute stream.

use std::sync::Arc;

use super::kernels::FEW;
use super::operands::{HALF, WORD};
use super::repeat::Repeated;
use super::workspace::{Column, Workspace};
use super::{Affine, Attention, Cache, Choosing, DeviceMatrix, Input, Norm, Output, Region};
use crate::backend::block::{self, Block, Dense, FeedForward, Modules};
use crate::backend::cpu::{route, routed, soft_cap};
use crate::backend::{Choice, Chosen, DeviceChooser, Hidden, Run, Stage};
use crate::error::Result;
use crate::footprint::CudaChoice;
use crate::model_config::{Experts, Layer, ModelConfig};
use crate::quant::WeightDtype;

/// A run of modules that a GPU computes.
pub struct CudaStage {
    workspace: Arc<Workspace>,
    config: Arc<ModelConfig>,
    modules: Modules<DeviceMatrix>,
    /// What each block keeps of all sequences.
    caches: Vec<Cache>,
    /// The launches of a token each of some sequences, of each number of rows: through the blocks alone.
    steps: Vec<Repeated<()>>,
    /// And those from the embedding to these choices of the next.
    whole_steps: Vec<Repeated<Vec<RowChoice>>>,
    /// That of each sequence.
    choices: Vec<Choice>,
}

/// How the token behind a row is chosen; and where it matters which tokens occurred, of which sequence the row is.
#[derive(Clone, Copy, PartialEq)]
struct RowChoice {
    choice: Choice,
    slot: usize,
}

impl RowChoice {
    const PADDING: Self = Self { choice: Choice::GREEDY, slot: 0 };
}

/// Rows that one launch of attention takes.
#[derive(Clone, Copy)]
struct Group {
    tokens: usize,
    /// Whether they are one sequence's.
    is_run: bool,
    /// The most keys up to one of them.
    keys: usize,
}

impl Group {
    /// Of a token each of some sequences; wherever those stand, so that the launches can be repeated for the next ones.
    fn step(rows: usize, context: usize) -> Self {
        Self { tokens: rows, is_run: false, keys: context }
    }

    /// Long runs each alone, short ones with those beside them.
    fn of(runs: &[Run], context: usize) -> Vec<Self> {
        let group = |runs: &[Run]| {
            let keys = runs.iter().map(|run| run.position + run.tokens).max().unwrap_or_default();
            let tokens = runs.iter().map(|run| run.tokens).sum();
            if runs.len() == tokens {
                return Self::step(tokens, context);
            }
            Self { tokens, is_run: runs.len() == 1, keys }
        };
        runs.chunk_by(|a, b| a.tokens.max(b.tokens) <= FEW).map(group).collect()
    }
}

impl CudaStage {
    /// A stage of `modules`, whose blocks keep what they see in `caches`.
    pub fn new(
        config: &Arc<ModelConfig>,
        (modules, caches): (Modules<DeviceMatrix>, Vec<Cache>),
        workspace: Arc<Workspace>,
    ) -> Self {
        let (config, extent) = (Arc::clone(config), workspace.extent);
        Self {
            workspace,
            config,
            modules,
            caches,
            steps: extent.step_sizes().map(|_| Repeated::New).collect(),
            whole_steps: extent.step_sizes().map(|_| Repeated::New).collect(),
            choices: vec![Choice::GREEDY; extent.sequences],
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
    fn run(&self, block: &Block<DeviceMatrix>, cache: &Cache, hidden: &Region, groups: &[Group]) -> Result<()> {
        let tokens = groups.iter().map(|group| group.tokens).sum();
        let norm = block.input_norm.as_ref().map(|norm| self.norm_of(norm));
        let branch = Branch::new(self, block.attention_output_norm.as_ref(), hidden, false);
        let input = self.input(hidden, norm.as_ref());
        self.attention(&block.attention, block.layer, cache, input, &branch, groups)?;
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
        cache: &Cache,
        input: Input,
        branch: &Branch,
        groups: &[Group],
    ) -> Result<()> {
        let (w, config) = (&*self.workspace, &self.config);
        let gpu = &*w.gpu;
        let tokens = groups.iter().map(|group| group.tokens).sum();
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
        let shape = |Group { tokens, is_run, keys }| Attention {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            tokens,
            is_run,
            keys,
            window: layer.window.unwrap_or(0),
            scale: config.attention_scale,
            softcap: config.attention_softcap.unwrap_or(0.0),
        };
        let rows = w.standing(tokens);
        let all = shape(Group::step(tokens, w.extent.context));
        let rotation = layer.rope.map(|rope| w.rotation(&config.ropes, rope));
        gpu.rotate_and_store(&all, [&w.query, &w.key, &w.value], norms, cache, &rows, rotation.as_ref())?;
        let mut start = 0;
        for group in groups {
            let part = |region: &Region| region.part(start * queries * HALF, group.tokens * queries * HALF);
            let (query, attended, rows) = (part(&w.query), part(&w.attended), rows.part(start, group.tokens));
            gpu.attend(&shape(*group), &query, cache, &attended, &rows, &w.scratch)?;
            start += group.tokens;
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

    /// The logits of hidden states before the soft cap, with a norm before them or as they are.
    fn head_of(&self, head: &Affine, states: &Region, norm: Option<&Norm>, rows: usize) -> Result<()> {
        let w = &*self.workspace;
        let logits = (&w.logits, Output::F32, self.config.logit_scale);
        w.gpu.matmul(head, self.input(states, norm), rows, logits, &w.scratch)
    }

    /// Chooses the token behind each hidden state, in the order of the rows.
    fn choose_each(&self, head: &Affine, states: &Region, norm: Option<&Norm>, choices: &[RowChoice]) -> Result<()> {
        let (w, rows, vocabulary) = (&*self.workspace, choices.len(), self.config.vocab_size);
        let (width, softcap) = (self.config.hidden_size * WORD, self.config.logit_softcap.unwrap_or(0.0));
        let mut row = 0;
        for together in choices.chunks(w.extent.logit_rows()) {
            let states = states.part(row * width, together.len() * width);
            self.head_of(head, &states, norm, together.len())?;
            for (at, RowChoice { choice, slot }) in together.iter().enumerate() {
                let logits = w.logits.part(at * vocabulary * WORD, vocabulary * WORD);
                let chosen = &w.rows.part(row * WORD, (2 * rows + 1) * WORD);
                let at = Choosing { scratch: &w.choice, seen: &self.seen(*slot), chosen, stride: rows };
                w.gpu.choose(choice, softcap, &logits, vocabulary, &at)?;
                row += 1;
            }
        }
        Ok(())
    }

    /// The bits of the tokens that occurred in a sequence.
    fn seen(&self, slot: usize) -> Region {
        let each = CudaChoice::new(self.config.vocab_size).seen;
        self.workspace.seen.part(slot * each, each)
    }

    fn choice_of(&self, slot: usize) -> RowChoice {
        let choice = self.choices[slot];
        RowChoice { choice, slot: if choice.is_penalized() { slot } else { 0 } }
    }

    /// Runs hidden states through all blocks. The workspace holds where they stand.
    fn through(&self, states: &Region, groups: &[Group]) -> Result<()> {
        let w = &*self.workspace;
        if let Some(positions) = &self.modules.positions {
            let ids = w.column(Column::Position, groups.iter().map(|group| group.tokens).sum());
            w.gpu.embed(positions, &ids, 1.0, states, Output::Add)?;
        }
        let mut blocks = self.modules.blocks.iter().zip(&self.caches);
        blocks.try_for_each(|(block, cache)| self.run(block, cache, states, groups))
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

    /// Queues a step of a token for each row through the blocks.
    fn step_through(&mut self, rows: usize) -> Result<()> {
        let mut step = std::mem::take(&mut self.steps[size(rows)]);
        let group = Group::step(rows, self.workspace.extent.context);
        let queued = step.queue(&self.workspace.gpu, (), |()| self.through(&self.states(rows), &[group]));
        self.steps[size(rows)] = step;
        queued
    }

    /// Queues a step of a token for each of these from the embedding to the choice of the next.
    fn step_whole(&mut self, choices: Vec<RowChoice>) -> Result<()> {
        let rows = choices.len();
        let mut step = std::mem::take(&mut self.whole_steps[size(rows)]);
        let queued = step.queue(&self.workspace.gpu, choices, |choices| {
            let Some([embedding, norm, head]) = self.whole() else { unreachable!("the whole model is here") };
            let (w, states) = (&*self.workspace, self.states(rows));
            let tokens = w.column(Column::Token, rows);
            w.gpu.embed(embedding, &tokens, self.config.embedding_scale, &states, Output::F32)?;
            self.through(&states, &[Group::step(rows, w.extent.context)])?;
            self.choose_each(head, &states, Some(&self.norm_of(norm)), choices)
        });
        self.whole_steps[size(rows)] = step;
        queued
    }

    /// The hidden states of so many rows.
    fn states(&self, rows: usize) -> Region {
        self.workspace.hidden.part(0, rows * self.config.hidden_size * WORD)
    }
}

/// Which of [`Extent::step_sizes`](crate::footprint::Extent::step_sizes) so many rows are.
fn size(rows: usize) -> usize {
    rows.next_power_of_two().trailing_zeros() as usize
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
        let ids = w.rows.part(0, size_of_val(tokens));
        ids.write(bytemuck::must_cast_slice(tokens))?;
        let states = hidden.begin_on_gpu(&w.hidden);
        w.gpu.embed(embedding, &ids, self.config.embedding_scale, &states, Output::F32)
    }

    fn run_blocks(&mut self, hidden: &mut Hidden, runs: &[Run]) -> Result<()> {
        if self.modules.blocks.is_empty() && self.modules.positions.is_none() {
            return Ok(());
        }
        let states = hidden.on_gpu(&self.workspace.hidden)?;
        let (w, tokens) = (&*self.workspace, hidden.tokens());
        if tokens == runs.len() && !self.has_experts() {
            let rows = w.extent.padded(tokens);
            w.place(&self.config.ropes, runs, rows, None)?;
            return self.step_through(rows);
        }
        w.place(&self.config.ropes, runs, tokens, None)?;
        self.through(&states, &Group::of(runs, w.extent.context))
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
        self.head_of(head, &hidden.on_gpu(&self.workspace.hidden)?, None, hidden.tokens())?;
        self.workspace.logits.read(bytemuck::must_cast_slice_mut(logits))?;
        for logit in logits {
            *logit = soft_cap(*logit, self.config.logit_softcap);
        }
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        if self.has_experts() || self.modules.blocks.is_empty() {
            return Ok(());
        }
        let w = Arc::clone(&self.workspace);
        for rows in w.extent.step_sizes() {
            // All of them pad.
            w.place(&self.config.ropes, &[], rows, Some((Some(&[]), &[])))?;
            self.states(rows).clear()?;
            for _ in ["launched", "kept"] {
                if self.whole().is_some() {
                    self.step_whole(vec![RowChoice::PADDING; rows])?;
                }
                self.step_through(rows)?;
            }
        }
        w.gpu.synchronize()
    }

    fn launch_each_kernel(&mut self) {
        self.steps.fill_with(|| Repeated::Apart(None));
        self.whole_steps.fill_with(|| Repeated::Apart(None));
    }

    fn why_apart(&self) -> Option<&str> {
        let whole = self.whole_steps.iter().find_map(|step| step.why_apart());
        self.steps.iter().find_map(|step| step.why_apart()).or(whole)
    }

    fn keeps_halves(&self) -> bool {
        self.modules.head.is_some() || !self.modules.blocks.is_empty()
    }

    fn chooser(&mut self) -> Option<&mut dyn DeviceChooser> {
        if self.modules.head.is_some() { Some(self) } else { None }
    }
}

impl DeviceChooser for CudaStage {
    fn begin(&mut self, slot: usize, choice: &Choice, seen: &[u32]) -> Result<()> {
        self.choices[slot] = *choice;
        if choice.is_penalized() {
            let mut bits = vec![0u32; self.config.vocab_size.div_ceil(32)];
            for token in seen {
                bits[*token as usize / 32] |= 1 << (token % 32);
            }
            self.seen(slot).write(bytemuck::must_cast_slice(&bits))?;
        }
        Ok(())
    }

    fn choose(&mut self, hidden: &mut Hidden, rows: &[(usize, u32)]) -> Result<()> {
        let Some(head) = &self.modules.head else { return Ok(()) };
        let w = &*self.workspace;
        let (choices, draws): (Vec<_>, Vec<_>) = rows.iter().map(|(slot, draw)| (self.choice_of(*slot), *draw)).unzip();
        w.exchange().tell(&w.column(Column::Draw, rows.len()), &draws)?;
        self.choose_each(head, &hidden.on_gpu(&w.hidden)?, None, &choices)?;
        w.exchange().send(&w.rows, rows.len(), rows.len())
    }

    fn does_whole_steps(&self) -> bool {
        self.whole().is_some()
    }

    fn step(&mut self, tokens: Option<&[u32]>, runs: &[Run], draws: &[u32]) -> Result<()> {
        let w = Arc::clone(&self.workspace);
        let rows = w.extent.padded(runs.len());
        w.place(&self.config.ropes, runs, rows, Some((tokens, draws)))?;
        let mut choices: Vec<_> = runs.iter().map(|run| self.choice_of(run.slot)).collect();
        choices.resize(rows, RowChoice::PADDING);
        self.step_whole(choices)?;
        w.exchange().send(&w.rows, runs.len(), rows)
    }

    fn chosen(&mut self) -> Result<Vec<Chosen>> {
        self.workspace.exchange().receive()
    }
}
