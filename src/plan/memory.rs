//! The bytes of everything that a load allocates. The loader and the backends
//! take their sizes from here and from nowhere else.

use std::collections::BTreeMap;

use crate::architecture::{Role, Weight};
use crate::bytes::{Bytes, MIB};
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::model_config::ModelConfig;
use crate::quant::{GROUP_SIZE, KvDtype, MatrixLayout, QuantizeRules, Storage};

/// Tokens that prefill takes at once.
pub const PREFILL_CHUNK: usize = 512;
/// What a CUDA context takes of a GPU before anything is allocated.
const CUDA_CONTEXT: Bytes = Bytes(330 * MIB);
/// Every buffer of a GPU starts on a multiple of this many bytes.
const CUDA_ALIGNMENT: u64 = 256;
/// Bytes of a slab of the host's staging ring, unless a single row is longer.
const SLAB: u64 = 2 * MIB;
/// What reads past the page cache are multiples of: their place in the file, their length, and where they go.
pub const BLOCK: usize = 4096;
/// Of a slab, what the whole blocks around rows may take beside them.
pub const SLAB_MARGIN: usize = 2 * BLOCK;
/// Slabs in the host's staging ring.
pub const STAGING_SLABS: usize = 8;
/// Bytes of a group of quantized activations on the CPU: its codes, its scale and their sum.
pub const ACTIVATION_GROUP: usize = GROUP_SIZE + 2 * size_of::<u32>();
/// No single allocation may be planned beyond this.
const MAX_BYTES: u64 = 1 << 60;

/// A parameter and its place in its device's weights arena.
#[derive(Clone, Debug)]
pub struct Placed<'a> {
    /// The parameter and its tensor.
    pub weight: Weight<'a>,
    /// The device that holds it.
    pub device: DeviceId,
    /// How it is packed.
    pub layout: MatrixLayout,
    /// Offset of the matrix in the arena.
    pub offset: u64,
}

/// Every weight with its layout and its offset in the arena of its device;
/// `devices` has one for every module of the tree.
pub fn lay_out<'a>(weights: &[Weight<'a>], devices: &[DeviceId], rules: &QuantizeRules) -> Result<Vec<Placed<'a>>> {
    let mut ends: BTreeMap<DeviceId, u64> = BTreeMap::new();
    weights
        .iter()
        .map(|weight| {
            let device = devices[weight.module];
            let too_large = || Error::input(format!("`{}` is too large to plan for", weight.parameter.tensor()));
            let layout = layout(weight, rules).ok_or_else(too_large)?;
            let end = ends.entry(device).or_default();
            let offset = *end;
            *end = offset.checked_add(layout.size().0).filter(|end| *end <= MAX_BYTES).ok_or_else(too_large)?;
            Ok(Placed { weight: *weight, device, layout, offset })
        })
        .collect()
}

/// The layout of a weight under `rules`: what is not quantizable, or packed already, is kept as it is.
pub fn layout(weight: &Weight, rules: &QuantizeRules) -> Option<MatrixLayout> {
    let parameter = weight.parameter;
    let storage = match weight.data {
        Storage::Plain(dtype) if parameter.is_quantizable() => Storage::of(rules.scheme(&parameter.module), dtype),
        kept => kept,
    };
    MatrixLayout::new(storage, parameter.rows, parameter.cols)
}

/// The keys, or the values, that one block caches: codes as
/// `[batch][kv_heads][context][head_dim]`, then scales as `[batch][kv_heads][context]`.
/// A block with a sliding window has the whole context too. On the CPU, the elements of some keys
/// in turn stand side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// The type of the elements.
    pub dtype: KvDtype,
    /// Bytes of all codes, a multiple of 4.
    pub codes: usize,
    /// Bytes of all scales.
    pub scales: usize,
}

impl KvLayout {
    /// The layout for `batch` sequences of `context` tokens; `None` where it is beyond what a plan can hold.
    pub fn new(config: &ModelConfig, context: usize, batch: usize, dtype: KvDtype) -> Option<Self> {
        let vectors = batch.checked_mul(config.num_key_value_heads)?.checked_mul(context)?;
        let codes =
            vectors.checked_mul(dtype.code_bytes(config.head_dim))?.checked_next_multiple_of(size_of::<f32>())?;
        let scales = vectors.checked_mul(dtype.scale_bytes())?;
        (codes.checked_add(scales)? as u64 <= MAX_BYTES / 2).then_some(Self { dtype, codes, scales })
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> Bytes {
        Bytes((self.codes + self.scales) as u64)
    }
}

/// The lengths, in elements, of the buffers that a step works in, for `tokens` tokens at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkspaceLayout {
    /// Tokens at once.
    pub tokens: usize,
    /// The normalized hidden state.
    pub normed: usize,
    /// Queries.
    pub query: usize,
    /// Keys; values take as much again.
    pub key: usize,
    /// What attention gives.
    pub attended: usize,
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

impl WorkspaceLayout {
    /// The buffers for chunks of `tokens` tokens.
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
            attended: tokens * queries,
            gate: tokens * feed_forward,
            routes: tokens * routes,
            mixed: if experts.is_some() { tokens * config.hidden_size } else { 0 },
            activation_groups: tokens * widest.div_ceil(GROUP_SIZE),
            rope: config.ropes.iter().map(|rope| tokens * rope.rotary_dim / 2).sum(),
        }
    }

    /// Bytes of all of them on the CPU, where everything but activations for integer products is f32.
    pub fn bytes(&self) -> Bytes {
        let block = self.normed + self.query + 2 * self.key + self.attended + 2 * self.gate;
        let f32s = block + 2 * self.mixed + self.routes + 2 * self.rope;
        Bytes((f32s * size_of::<f32>() + self.activation_groups * ACTIVATION_GROUP) as u64)
    }
}

/// Tokens that a step takes at most under `context`.
pub fn chunk(context: usize) -> usize {
    context.min(PREFILL_CHUNK)
}

/// Bytes of the hidden state that passes from stage to stage, and of the
/// logits; they are the host's.
pub fn host_state(config: &ModelConfig, context: usize) -> Bytes {
    Bytes(((chunk(context) * config.hidden_size + config.vocab_size) * size_of::<f32>()) as u64)
}

/// Page-locked memory of the host for what a GPU answers.
pub const CUDA_ANSWERS: Bytes = Bytes((CudaChoice::ANSWER * CudaChoice::ANSWERS) as u64);

/// The workspace of a device that computes.
pub fn workspace(config: &ModelConfig, context: usize, device: DeviceId) -> Bytes {
    let layout = WorkspaceLayout::new(config, chunk(context));
    match device {
        DeviceId::Cuda(_) => cuda_workspace(config, context).into_iter().sum(),
        DeviceId::Cpu => layout.bytes() + host_state(config, context),
        DeviceId::Disk => Bytes::ZERO,
    }
}

/// How a GPU shares out attention over the keys that are cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaAttention {
    /// Query heads that a block of threads takes, all of one key-value head.
    pub heads: usize,
    /// Blocks of heads.
    pub blocks: usize,
    /// Parts of the keys, each a block of threads for every token and block of heads.
    pub parts: usize,
}

impl CudaAttention {
    /// For `tokens` tokens that see at most `keys` keys: so many parts that one token over
    /// many keys fills a GPU, and none so short that adding them up is what takes the time.
    pub fn new(heads: usize, kv_heads: usize, tokens: usize, keys: usize) -> Self {
        const BLOCKS: usize = 1024;
        const SHORTEST: usize = 128;
        let sharing = heads / kv_heads;
        let of_a_block = if sharing > 1 { 4 } else { 1 };
        let blocks = kv_heads * sharing.div_ceil(of_a_block);
        let parts = (BLOCKS / (tokens * blocks)).min(keys.div_ceil(SHORTEST)).max(1);
        Self { heads: of_a_block, blocks, parts }
    }

    /// Bytes of what the parts leave and of the counts of those that are done, for at most `tokens` tokens
    /// under `context`: sums, the largest score and the total of each, f32, and a u32 for each count.
    pub fn scratch(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize, context: usize) -> [usize; 2] {
        let most = |bytes: &dyn Fn(usize, Self) -> usize| {
            let each = (1..=tokens).map(|tokens| (tokens, Self::new(heads, kv_heads, tokens, context)));
            each.filter(|(_, shares)| shares.parts > 1).map(|(tokens, shares)| bytes(tokens, shares)).max().unwrap_or(0)
        };
        let row = (head_dim + 2) * size_of::<f32>();
        [
            most(&|tokens, shares| tokens * heads * shares.parts * row),
            most(&|tokens, shares| tokens * shares.blocks * size_of::<u32>()),
        ]
    }
}

/// What a GPU needs to choose a token among the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaChoice {
    /// Blocks of threads, each of which takes as many logits.
    pub blocks: usize,
    /// Bytes of what launches and blocks leave each other.
    pub scratch: usize,
    /// Bytes of a bit for each token.
    pub seen: usize,
}

impl CudaChoice {
    /// Bytes of a chosen token, a flag, and the random number behind it.
    pub const CHOSEN: usize = 3 * size_of::<u32>();
    /// Bytes of the first two, in page-locked memory of the host.
    pub const ANSWER: usize = 2 * size_of::<u32>();
    /// Tokens that are on their way to the host at once: one step runs ahead.
    pub const ANSWERS: usize = 2;

    /// For so many logits.
    pub fn new(logits: usize) -> Self {
        /// Logits of a block, and bytes of what all share and of what each leaves, as in choose.cu.
        const SHARE: usize = 1024;
        const SHARED: usize = 24_616;
        const LEFT: usize = size_of::<u64>() + size_of::<u32>();
        let blocks = logits.div_ceil(SHARE);
        Self { blocks, scratch: SHARED + blocks * LEFT, seen: logits.div_ceil(32) * size_of::<u32>() }
    }
}

/// The most blocks of threads that share out a product of a few tokens, and the f32 that each leaves: what
/// it has of the first and of the last rows that it shares, for 16 rows and 8 tokens.
pub const CUDA_FEW_BLOCKS: usize = 512;
/// See [`CUDA_FEW_BLOCKS`].
pub const CUDA_FEW_PARTS: usize = 2 * 16 * 8;

/// Number of buffers in a GPU's workspace.
pub const CUDA_BUFFERS: usize = 21;

/// The buffers of a GPU's workspace: the hidden state and the normalized one;
/// queries, keys, values and what attention gives; gate and up; what a half of
/// a block gives where that is not added at once; the experts' scores, the
/// inputs and the outputs of one, its tokens and their weights; logits, tokens,
/// the frequencies of all ropes, what blocks that share attention or a product leave, how many are done, the
/// position, what launches that choose a token leave each other, and a bit for each token that occurred. Tokens
/// are u32, with room for what is chosen; normalized states, queries
/// to up, and the experts' inputs f16; all others f32.
pub fn cuda_workspace(config: &ModelConfig, context: usize) -> [Bytes; CUDA_BUFFERS] {
    const HALF: usize = 2;
    const WORD: usize = 4;
    let layout = WorkspaceLayout::new(config, chunk(context));
    let roles = || config.family.block().map(|(role, _)| role);
    let norms_outputs = roles().any(|role| matches!(role, Role::AttentionOutputNorm | Role::FeedForwardOutputNorm));
    let routed =
        if layout.routes > 0 { config.experts.map_or(0, |experts| layout.tokens * experts.per_token) } else { 0 };
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let [parts, arrivals] = CudaAttention::scratch(heads, kv_heads, config.head_dim, layout.tokens, context);
    let choice = CudaChoice::new(config.vocab_size);
    let rotated: usize = config.ropes.iter().map(|rope| rope.rotary_dim / 2).sum();
    [
        layout.normed * WORD,
        layout.normed * HALF,
        layout.query * HALF,
        layout.key * HALF,
        layout.key * HALF,
        layout.attended * HALF,
        layout.gate * HALF,
        layout.gate * HALF,
        if norms_outputs || layout.mixed > 0 { layout.normed * WORD } else { 0 },
        layout.routes * WORD,
        layout.mixed * HALF,
        layout.mixed * WORD,
        2 * routed * WORD,
        config.vocab_size * WORD,
        (layout.tokens * WORD).max(CudaChoice::CHOSEN),
        rotated * WORD,
        parts.max(CUDA_FEW_BLOCKS * CUDA_FEW_PARTS * WORD),
        arrivals.max(CUDA_FEW_BLOCKS * WORD),
        WORD,
        choice.scratch,
        choice.seen,
    ]
    .map(cuda_aligned)
}

/// The regions of a GPU's staging ring: as many slabs as the host's has, and a word for each that
/// says whether packing it failed.
pub fn cuda_staging(slab: usize) -> [Bytes; STAGING_SLABS + 1] {
    let mut sizes = [cuda_aligned(slab); STAGING_SLABS + 1];
    sizes[STAGING_SLABS] = cuda_aligned(STAGING_SLABS * size_of::<u32>());
    sizes
}

fn cuda_aligned(bytes: usize) -> Bytes {
    Bytes((bytes as u64).next_multiple_of(CUDA_ALIGNMENT))
}

/// What the device's driver takes before anything is allocated.
pub fn driver_context(device: DeviceId) -> Bytes {
    match device {
        DeviceId::Cuda(_) => CUDA_CONTEXT,
        DeviceId::Cpu | DeviceId::Disk => Bytes::ZERO,
    }
}

/// The sizes of the host's staging ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostStaging {
    /// Bytes of one slab; [`STAGING_SLABS`] of them are read into in turn.
    pub slab: usize,
    /// Bytes of the packed rows of one slab.
    pub packed: usize,
    /// Bytes in which the rows of transposed tensors are put together: a slab, if there are any.
    pub transposed: usize,
}

impl HostStaging {
    /// A ring for `weights`: slabs of 2 MiB, or of the blocks around the longest row, or of half the largest tensor
    /// where that is less.
    pub fn new(weights: &[Weight], rules: &QuantizeRules) -> Self {
        let longest_row = weights.iter().map(Weight::row_bytes).max().unwrap_or(0);
        let largest = weights.iter().map(|weight| weight.tensor.size().0).max().unwrap_or(0);
        let slab = usize::try_from(SLAB.min(largest.div_ceil(2))).unwrap_or(usize::MAX).max(longest_row + SLAB_MARGIN);
        let packed = weights
            .iter()
            .filter_map(|weight| {
                let layout = layout(weight, rules)?;
                let rows = ((slab - SLAB_MARGIN) / weight.row_bytes().max(1)).min(layout.rows);
                let per_row = layout.code_row + layout.sub_scale_row + layout.scale_row;
                (layout.storage != weight.data).then_some(rows * per_row)
            })
            .max()
            .unwrap_or(0);
        let transposed = if weights.iter().any(Weight::is_transposed) { slab } else { 0 };
        Self { slab, packed, transposed }
    }

    /// Bytes of the ring that shards are read into, and of the rows of transposed tensors.
    pub fn ring(&self) -> Bytes {
        Bytes((self.slab * STAGING_SLABS + self.transposed) as u64)
    }
}

/// The staging of a device while it is filled.
pub fn staging(device: DeviceId, host: HostStaging) -> Bytes {
    match device {
        DeviceId::Cuda(_) => cuda_staging(host.slab).into_iter().sum(),
        DeviceId::Cpu => host.ring() + Bytes(host.packed as u64),
        DeviceId::Disk => Bytes::ZERO,
    }
}
