//! A run of modules on one GPU. All buffers are there before it is made; a step
//! allocates no memory there, and what it queues runs in order on the compute stream.

use std::collections::HashMap;
use std::sync::Arc;

use super::repeat::Repeated;
use super::workspace::{WORD, Workspace};
use super::{Affine, Attention, Cache, Choosing, DeviceMatrix, Input, Norm, Output, Region};
use crate::architecture::{Part, Role};
use crate::backend::cpu::{route, soft_cap};
use crate::backend::{Choice, Chosen, Hidden, Stage};
use crate::error::Result;
use crate::model_config::{Experts, Layer, ModelConfig};
use crate::quant::WeightDtype;

/// The parameters of modules, by what they are for.
#[derive(Clone, Default)]
pub struct Parameters(HashMap<(Role, Part), DeviceMatrix>);

impl Parameters {
    /// Adds a parameter.
    pub fn insert(&mut self, role: Role, part: Part, parameter: DeviceMatrix) {
        self.0.insert((role, part), parameter);
    }

    /// The module of a role, if the model has one.
    fn find(&self, role: Role) -> Option<Affine<'_>> {
        Some(Affine::new(self.0.get(&(role, Part::Weight))?, self.0.get(&(role, Part::Bias))))
    }

    /// The module of a role that [`crate::architecture::ModuleTree`] gives every model.
    fn of(&self, role: Role) -> Affine<'_> {
        match self.find(role) {
            Some(affine) => affine,
            None => unreachable!("the loader gives every module all of its parameters: {role:?}"),
        }
    }
}

struct Block {
    layer: Layer,
    parameters: Parameters,
    cache: Cache,
}

/// A run of modules that a GPU computes.
pub struct CudaStage {
    workspace: Arc<Workspace>,
    config: ModelConfig,
    context: usize,
    /// All that is in no block.
    parameters: Parameters,
    blocks: Vec<Block>,
    /// The launches of a step of one token: through the blocks alone, or all of it to this choice.
    step: Repeated<Option<Choice>>,
    choice: Choice,
}

impl CudaStage {
    /// A stage without modules, for sequences of at most `context` tokens.
    pub fn new(config: &ModelConfig, context: usize, workspace: Arc<Workspace>) -> Self {
        let config = config.clone();
        Self {
            workspace,
            config,
            context,
            parameters: Parameters::default(),
            blocks: Vec::new(),
            step: Repeated::New,
            choice: Choice::GREEDY,
        }
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

    /// Adds the block at `index` of the model with its KV cache.
    pub fn push_block(&mut self, index: usize, parameters: Parameters, cache: Cache) {
        self.blocks.push(Block { layer: self.config.layers[index], parameters, cache });
    }

    fn with<'a>(&self, affine: Affine<'a>) -> Norm<'a> {
        Norm { kind: self.config.norm_kind, epsilon: self.config.norm_eps, affine }
    }

    /// `hidden += norm(attention(norm(hidden))); hidden += norm(feed_forward(norm(hidden)))`,
    /// with those norms that the model has.
    fn run(&self, block: &Block, hidden: &Region, position: usize, tokens: usize) -> Result<()> {
        let norm = |role| block.parameters.find(role).map(|affine| self.with(affine));
        let input = norm(Role::InputNorm);
        let branch = Branch::new(self, block, Role::AttentionOutputNorm, hidden, false);
        self.attention(block, self.input(hidden, input.as_ref()), &branch, position, tokens)?;
        branch.add(tokens)?;

        let input = norm(Role::FeedForwardNorm);
        let input = self.input(hidden, input.as_ref());
        let experts = self.config.experts.filter(|_| block.layer.has_experts);
        let branch = Branch::new(self, block, Role::FeedForwardOutputNorm, hidden, experts.is_some());
        match experts {
            Some(experts) => self.experts(block, experts, input, &branch, tokens)?,
            None => self.dense(block, input, &branch, tokens)?,
        }
        branch.add(tokens)
    }

    fn input<'a>(&'a self, states: &'a Region, norm: Option<&'a Norm<'a>>) -> Input<'a> {
        Input::Hidden { states, norm, normed: &self.workspace.normed }
    }

    fn attention(&self, block: &Block, input: Input, branch: &Branch, position: usize, tokens: usize) -> Result<()> {
        let (w, config, parameters) = (&*self.workspace, &self.config, &block.parameters);
        let gpu = &*w.gpu;
        let (queries, keys) = (config.queries(), config.keys());
        let [query, key, value] = match parameters.find(Role::QueryKeyValue) {
            Some(fused) => [0..queries, queries..queries + keys, queries + keys..queries + 2 * keys]
                .map(|rows| fused.clone().slice(rows)),
            None => [Role::Query, Role::Key, Role::Value].map(|role| parameters.of(role)),
        };
        gpu.matmuls(&[(&query, &w.query), (&key, &w.key), (&value, &w.value)], input, tokens, &w.scratch)?;
        let norms = [(Role::QueryNorm, &w.query, queries), (Role::KeyNorm, &w.key, keys)].map(|(role, x, width)| {
            let Some(norm) = parameters.find(role).map(|affine| self.with(affine)) else { return Ok(None) };
            if norm.affine.cols() == config.head_dim {
                return Ok(Some(norm));
            }
            gpu.normalize(Some(&norm), (x, WeightDtype::F16), (tokens, width), x, Output::F16, 1.0)?;
            Ok(None)
        });
        let [query_norm, key_norm] = norms;
        let norms = [query_norm?, key_norm?];
        let shape = Attention {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            context: self.context,
            position,
            tokens,
            window: block.layer.window.unwrap_or(0),
            scale: config.attention_scale,
            softcap: config.attention_softcap.unwrap_or(0.0),
        };
        #[expect(clippy::cast_possible_truncation, reason = "angles are f32")]
        let rope = block.layer.rope.map(|rope| (&w.frequencies[rope], config.ropes[rope].attention_factor as f32));
        let (vectors, norms) = ([&w.query, &w.key, &w.value], norms.each_ref().map(Option::as_ref));
        gpu.rotate_and_store(&shape, vectors, norms, &block.cache, &w.position, rope)?;
        gpu.attend(&shape, &w.query, &block.cache, &w.attended, &w.position, &w.scratch)?;
        branch.matmul(&parameters.of(Role::Output), &w.attended, tokens)
    }

    fn dense(&self, block: &Block, input: Input, branch: &Branch, tokens: usize) -> Result<()> {
        let (w, width) = (&*self.workspace, self.config.intermediate_size);
        let (gate, up) = match block.parameters.find(Role::GateUp) {
            Some(fused) => (Some(fused.clone().slice(0..width)), fused.slice(width..2 * width)),
            None => (block.parameters.find(Role::Gate), block.parameters.of(Role::Up)),
        };
        let rooms = [&w.gate, &w.up];
        w.gpu.gated(self.config.activation, (gate.as_ref(), &up), input, tokens, rooms, &w.scratch)?;
        branch.matmul(&block.parameters.of(Role::Down), &w.gate, tokens)
    }

    /// The weighted sum of what each token's experts give. The host reads the scores and says which
    /// tokens go to which expert.
    fn experts(&self, block: &Block, experts: Experts, input: Input, branch: &Branch, tokens: usize) -> Result<()> {
        let (w, parameters, hidden) = (&*self.workspace, &block.parameters, self.config.hidden_size);
        let gpu = &*w.gpu;
        let input = gpu.half(input, (tokens, hidden))?;
        let scores = (&w.routes, Output::F32, 1.0);
        gpu.matmul(&parameters.of(Role::Router), input, tokens, scores, &w.scratch)?;
        let mut scores = vec![0.0f32; tokens * experts.count];
        w.routes.read(bytemuck::must_cast_slice_mut(&mut scores))?;
        route(&mut scores, experts.count, experts.per_token, experts.is_normalized);

        // All experts' tokens, one expert after the other, then their weights.
        let (mut chosen, mut shares, mut ends) = (Vec::<u32>::new(), Vec::<f32>::new(), Vec::new());
        for expert in 0..experts.count {
            for (token, row) in (0u32..).zip(scores.chunks(experts.count)) {
                if row[expert] != 0.0 {
                    chosen.push(token);
                    shares.push(row[expert]);
                }
            }
            ends.push(chosen.len());
        }
        let total = chosen.len();
        w.shares.write(bytemuck::must_cast_slice(&chosen))?;
        w.shares.part(total * WORD, total * WORD).write(bytemuck::must_cast_slice(&shares))?;
        branch.target.part(0, tokens * hidden * WORD).clear()?;
        let mut start = 0;
        for (expert, end) in ends.into_iter().enumerate().filter(|(_, end)| *end > 0) {
            let count = end - start;
            if count > 0 {
                let indices = w.shares.part(start * WORD, count * WORD);
                let weights = w.shares.part((total + start) * WORD, count * WORD);
                gpu.gather(&w.normed, &indices, hidden, &w.gathered)?;
                let gate = parameters.of(Role::ExpertGate(expert));
                let up = parameters.of(Role::ExpertUp(expert));
                let (input, rooms) = (Input::Half(&w.gathered), [&w.gate, &w.up]);
                gpu.gated(self.config.activation, (Some(&gate), &up), input, count, rooms, &w.scratch)?;
                let (down, given) = (parameters.of(Role::ExpertDown(expert)), (&w.expert, Output::F32, 1.0));
                gpu.matmul(&down, Input::Half(&w.gate), count, given, &w.scratch)?;
                gpu.scatter_add(&w.expert, &indices, &weights, hidden, branch.target)?;
            }
            start = end;
        }
        Ok(())
    }
}

impl CudaStage {
    /// Leaves the logits before the soft cap in the workspace; false where the head is elsewhere.
    fn head(&self, hidden: &mut Hidden) -> Result<bool> {
        if self.parameters.find(Role::Head).is_none() {
            return Ok(false);
        }
        let states = hidden.on_gpu(&self.workspace.hidden)?;
        self.head_of(&states, None)?;
        Ok(true)
    }

    /// The logits of one hidden state, with a norm before them or as it is.
    fn head_of(&self, states: &Region, norm: Option<&Norm>) -> Result<()> {
        let (w, head) = (&*self.workspace, self.parameters.of(Role::Head));
        let logits = (&w.logits, Output::F32, self.config.logit_scale);
        w.gpu.matmul(&head, self.input(states, norm), 1, logits, &w.scratch)
    }

    /// Chooses among the logits of the workspace.
    fn choose_one(&self) -> Result<()> {
        let w = &*self.workspace;
        let at = Choosing { scratch: &w.choice, seen: &w.seen, chosen: &w.chosen() };
        let softcap = self.config.logit_softcap.unwrap_or(0.0);
        w.gpu.choose(&self.choice, softcap, &w.logits, self.config.vocab_size, &at)
    }

    /// Puts the random number of the next choice where it is looked for.
    fn place(&self, draw: u32) -> Result<()> {
        if self.choice.is_greedy() { Ok(()) } else { self.workspace.chosen().part(2 * WORD, WORD).fill(draw) }
    }

    /// Runs hidden states through all blocks. The workspace holds the position; of one token, its own region says it too.
    fn through(&self, states: &Region, position: usize, tokens: usize) -> Result<()> {
        let w = &*self.workspace;
        if let Some(positions) = self.parameters.find(Role::Positions) {
            let ids = if tokens == 1 {
                w.position.part(0, WORD)
            } else {
                let rows: Vec<u32> = (position..position + tokens).map(row).collect();
                let ids = w.tokens.part(0, size_of_val(&*rows));
                ids.write(bytemuck::must_cast_slice(&rows))?;
                ids
            };
            w.gpu.embed(&positions, &ids, 1.0, states, Output::Add)?;
        }
        self.blocks.iter().try_for_each(|block| self.run(block, states, position, tokens))
    }

    /// One token from its embedding to the choice of the next.
    fn whole(&self, states: &Region, position: usize) -> Result<()> {
        let (w, embedding) = (&*self.workspace, self.parameters.of(Role::Embedding));
        w.gpu.embed(&embedding, &w.chosen().part(0, WORD), self.config.embedding_scale, states, Output::F32)?;
        self.through(states, position, 1)?;
        self.head_of(states, Some(&self.with(self.parameters.of(Role::OutputNorm))))?;
        self.choose_one()
    }

    /// Whether the host reads the scores of experts between launches.
    fn has_experts(&self) -> bool {
        self.blocks.iter().any(|block| block.layer.has_experts)
    }

    /// Whether the stage does a whole step without the host.
    fn is_whole(&self) -> bool {
        let roles = [Role::Embedding, Role::OutputNorm, Role::Head];
        self.blocks.len() == self.config.layers.len()
            && roles.into_iter().all(|role| self.parameters.find(role).is_some())
            && !self.has_experts()
    }

    /// Queues a step of one token at `position`: through the blocks, or with a choice all of it.
    fn repeat(&mut self, position: usize, choice: Option<Choice>, states: &Region) -> Result<()> {
        let mut step = std::mem::take(&mut self.step);
        let queued = step.queue(&self.workspace.gpu, choice, || match choice {
            Some(_) => self.whole(states, position),
            None => self.through(states, position, 1),
        });
        self.step = step;
        queued
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
}

impl<'a> Branch<'a> {
    fn new(stage: &'a CudaStage, block: &'a Block, norm: Role, hidden: &'a Region, is_sum: bool) -> Self {
        let norm = block.parameters.find(norm).map(|affine| stage.with(affine));
        let apart = norm.is_some() || is_sum;
        Self { stage, norm, hidden, target: if apart { &stage.workspace.branch } else { hidden } }
    }

    fn is_apart(&self) -> bool {
        !self.target.is(self.hidden)
    }

    fn matmul(&self, affine: &Affine, x: &Region, tokens: usize) -> Result<()> {
        let apart = self.is_apart();
        let (output, factor) = if apart { (Output::F32, 1.0) } else { (Output::Add, self.stage.config.residual_scale) };
        let w = &*self.stage.workspace;
        w.gpu.matmul(affine, Input::Half(x), tokens, (self.target, output, factor), &w.scratch)
    }

    fn add(&self, tokens: usize) -> Result<()> {
        if !self.is_apart() {
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
        let Some(embedding) = self.parameters.find(Role::Embedding) else { return Ok(()) };
        let w = &*self.workspace;
        let ids = w.tokens.part(0, size_of_val(tokens));
        ids.write(bytemuck::must_cast_slice(tokens))?;
        let states = hidden.begin_on_gpu(&w.hidden);
        w.gpu.embed(&embedding, &ids, self.config.embedding_scale, &states, Output::F32)
    }

    fn run_blocks(&mut self, hidden: &mut Hidden, position: usize) -> Result<()> {
        if self.blocks.is_empty() && self.parameters.find(Role::Positions).is_none() {
            return Ok(());
        }
        let tokens = hidden.tokens();
        let states = hidden.on_gpu(&self.workspace.hidden)?;
        self.workspace.position.fill(row(position))?;
        if tokens > 1 || self.has_experts() {
            return self.through(&states, position, tokens);
        }
        self.repeat(position, None, &states)
    }

    fn norm(&mut self, hidden: &mut Hidden) -> Result<()> {
        let Some(affine) = self.parameters.find(Role::OutputNorm) else { return Ok(()) };
        let w = &*self.workspace;
        let shape = (hidden.tokens(), self.config.hidden_size);
        let states = hidden.on_gpu(&w.hidden)?;
        let norm = self.with(affine);
        w.gpu.normalize(Some(&norm), (&states, WeightDtype::F32), shape, &states, Output::F32, 1.0)
    }

    fn logits(&mut self, hidden: &mut Hidden, logits: &mut [f32]) -> Result<()> {
        if self.head(hidden)? {
            self.workspace.logits.read(bytemuck::must_cast_slice_mut(logits))?;
            for logit in logits {
                *logit = soft_cap(*logit, self.config.logit_softcap);
            }
        }
        Ok(())
    }

    fn launch_each_kernel(&mut self) {
        self.step = Repeated::Apart;
    }

    fn prepare(&mut self, choice: &Choice, seen: &[u32]) -> Result<bool> {
        if self.parameters.find(Role::Head).is_none() {
            return Ok(false);
        }
        self.choice = *choice;
        self.workspace.answers().forget()?;
        if choice.is_penalized() {
            let mut bits = vec![0u32; self.config.vocab_size.div_ceil(32)];
            for token in seen {
                bits[*token as usize / 32] |= 1 << (token % 32);
            }
            self.workspace.seen.write(bytemuck::must_cast_slice(&bits))?;
        }
        Ok(true)
    }

    fn choose(&mut self, hidden: &mut Hidden, draw: u32) -> Result<()> {
        self.head(hidden)?;
        self.place(draw)?;
        self.choose_one()?;
        self.workspace.answers().send(&self.workspace.chosen())
    }

    fn step(&mut self, token: Option<u32>, position: usize, draw: u32) -> Result<bool> {
        if !self.is_whole() {
            return Ok(false);
        }
        let w = Arc::clone(&self.workspace);
        if let Some(token) = token {
            w.chosen().part(0, WORD).fill(token)?;
        }
        w.position.fill(row(position))?;
        self.place(draw)?;
        let states = w.hidden.part(0, self.config.hidden_size * WORD);
        self.repeat(position, Some(self.choice), &states)?;
        w.answers().send(&w.chosen())?;
        Ok(true)
    }

    fn chosen(&mut self) -> Result<Chosen> {
        self.workspace.answers().receive()
    }
}
