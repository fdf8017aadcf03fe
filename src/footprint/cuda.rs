//! What a GPU takes, and how its kernels share out their work where that decides about memory.

use super::cpu::feed_forward;
use super::{Extent, STAGING_SLABS, aligned, buffers};
use crate::architecture::Role;
use crate::bytes::{Bytes, MIB};
use crate::model_config::ModelConfig;

/// The driver gives memory in multiples of this, where that is a whole arena.
pub const CUDA_GRANULE: Bytes = Bytes(2 * MIB);
/// What the code of all kernels takes: 1.9 MB of it in nine files, each in granules; an estimate.
const CODE: Bytes = Bytes(24 * MIB);
/// The most blocks of threads that share out a product of a few tokens, and the f32 that each leaves: what
/// it has of the first and of the last rows that it shares, for 16 rows and 8 tokens.
pub const CUDA_FEW_BLOCKS: usize = 512;
/// See [`CUDA_FEW_BLOCKS`].
pub const CUDA_FEW_PARTS: usize = 2 * 16 * 8;

/// Bytes of an f16.
pub const HALF: usize = 2;
/// Bytes of an f32 and of a u32.
pub const WORD: usize = 4;

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
        let row = (head_dim + 2) * WORD;
        [
            most(&|tokens, shares| tokens * heads * shares.parts * row),
            most(&|tokens, shares| tokens * shares.blocks * WORD),
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
    /// For so many logits.
    pub fn new(logits: usize) -> Self {
        /// Logits of a block, and bytes of what all share and of what each leaves, as in choose.cu.
        const SHARE: usize = 1024;
        const SHARED: usize = 24_616;
        const LEFT: usize = size_of::<u64>() + size_of::<u32>();
        let blocks = logits.div_ceil(SHARE);
        Self { blocks, scratch: SHARED + blocks * LEFT, seen: logits.div_ceil(32) * WORD }
    }
}

/// What a GPU and the host tell each other of the rows of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaRows;

impl CudaRows {
    /// Words of a row: its token, or what is chosen in place of it; whether no token could be; the random number for
    /// that; its position, and its sequence. All tokens stand first, then all of the next.
    pub const WORDS: usize = 5;
    /// The first two of them go back to the host.
    pub const ANSWER: usize = 2;
    /// Steps that are on their way at once: one runs ahead.
    pub const STEPS: usize = 2;

    /// Bytes of page-locked memory of the host for what a step is told, and for its answer.
    pub fn of_step(extent: Extent) -> [usize; 2] {
        [extent.chunk * Self::WORDS * WORD, extent.sequences * Self::ANSWER * WORD]
    }

    /// The same for all steps on their way.
    pub fn host(extent: Extent) -> Bytes {
        Bytes((Self::STEPS * Self::of_step(extent).into_iter().sum::<usize>()) as u64)
    }
}

buffers! {
    /// The buffers that a GPU computes a step in, each aligned. Normalized states, queries to up, and the inputs of
    /// experts are f16, shares, rows and tables 32 bits wide, all others f32.
    CudaBuffers(config, extent) {
        let (hidden, queries, keys, tokens) = (config.hidden_size, config.queries(), config.keys(), extent.chunk);
        let (feed_forward, experts) = feed_forward(config);
        let mixed = experts.map_or(0, |_| hidden);
        let roles = || config.family.block().map(|(role, _)| role);
        let norms_outputs = roles().any(|role| matches!(role, Role::AttentionOutputNorm | Role::FeedForwardOutputNorm));
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let [parts, arrivals] = CudaAttention::scratch(heads, kv_heads, config.head_dim, tokens, extent.context);
        let choice = CudaChoice::new(config.vocab_size);
        let rotated: usize = config.ropes.iter().map(|rope| rope.rotary_dim / 2).sum();
        let bytes = |len: usize| aligned(len as u64);
        let (halves, words) = (|width: usize| bytes(tokens * width * HALF), |width: usize| bytes(tokens * width * WORD));
    }
    /// The hidden state.
    hidden: words(hidden),
    /// The normalized hidden state.
    normed: halves(hidden),
    query: halves(queries),
    key: halves(keys),
    value: halves(keys),
    /// What attention gives.
    attended: halves(queries),
    /// The gate's output.
    gate: halves(feed_forward),
    /// Up's output.
    up: halves(feed_forward),
    /// What a half of a block gives where that is not added at once.
    branch: words(if norms_outputs { hidden } else { mixed }),
    /// The experts' scores.
    routes: words(experts.map_or(0, |experts| experts.count)),
    /// The inputs of an expert.
    gathered: halves(mixed),
    /// The outputs of an expert.
    expert: words(mixed),
    /// The tokens of experts, and their weights.
    shares: words(experts.map_or(0, |experts| 2 * experts.per_token)),
    logits: bytes(extent.logit_rows() * config.vocab_size * WORD),
    /// What is told of rows; see [`CudaRows`].
    rows: words(CudaRows::WORDS),
    /// The numbers of the pages that each sequence has.
    tables: bytes(extent.sequences * Extent::pages_of(extent.context) * WORD),
    /// The frequencies of all ropes for each sequence, which follow its length.
    frequencies: bytes(extent.sequences * rotated * WORD),
    /// What those leave that share attention or a product.
    parts: bytes(parts.max(CUDA_FEW_BLOCKS * CUDA_FEW_PARTS * WORD)),
    /// How many of them are done; zeros between launches.
    arrivals: bytes(arrivals.max(CUDA_FEW_BLOCKS * WORD)),
    /// What launches that choose a token leave each other.
    choice: bytes(choice.scratch),
    /// A bit for each token that occurred, of each sequence.
    seen: bytes(extent.sequences * choice.seen),
}

/// What steps that are repeated in one launch take of a GPU, those of each size; an estimate.
pub fn cuda_graphs(extent: Extent) -> Bytes {
    const FIRST: u64 = 32 * MIB;
    const NEXT: u64 = 8 * MIB;
    Bytes(FIRST + NEXT * (extent.step_sizes().count() as u64 - 1))
}

/// What the driver takes of a GPU by itself, with a context of so many bytes; an estimate but for the last, which is
/// what an arena may be rounded up by.
pub fn cuda_driver(context: Bytes, extent: Extent) -> [(&'static str, Bytes); 4] {
    [("context", context), ("code", CODE), ("graphs", cuda_graphs(extent)), ("granule", CUDA_GRANULE)]
}

/// What the driver takes of host memory where it drives so many GPUs; an estimate.
pub fn cuda_host(gpus: usize) -> Bytes {
    let each = (64 * MIB).saturating_mul(gpus as u64);
    if gpus == 0 { Bytes::ZERO } else { Bytes((256 * MIB).saturating_add(each)) }
}

/// The regions of a GPU's staging ring: as many slabs as the host's has, and a word for each that
/// says whether packing it failed.
pub fn cuda_staging(slab: usize) -> [(&'static str, Bytes); 2] {
    let slabs = Bytes(aligned(slab as u64).0.saturating_mul(STAGING_SLABS as u64));
    [("slabs", slabs), ("failed", aligned((STAGING_SLABS * WORD) as u64))]
}
