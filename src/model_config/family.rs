//! What a family of models is: the names of its modules and tensors, and what
//! its configuration means.

/// The module of the output head.
pub const HEAD: &str = "lm_head";
/// The head's tensor.
pub const HEAD_WEIGHT: &str = "lm_head.weight";

/// What a parameter is to its module; a backend asks for parameters by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Role {
    /// The norm of what attention gives, before it is added.
    AttentionOutputNorm,
    /// The second matrix of the feed-forward layer.
    Down,
    /// The embedding's rows.
    Embedding,
    /// As [`Role::Down`], of an expert.
    ExpertDown(usize),
    /// As [`Role::Gate`], of an expert.
    ExpertGate(usize),
    /// As [`Role::Up`], of an expert.
    ExpertUp(usize),
    /// The norm before the feed-forward layer.
    FeedForwardNorm,
    /// The norm of what the feed-forward layer gives, before it is added.
    FeedForwardOutputNorm,
    /// The matrix whose product goes through the activation and gates the other.
    Gate,
    /// [`Role::Gate`] and [`Role::Up`], one after the other.
    GateUp,
    /// The output head's rows.
    Head,
    /// The norm before attention.
    InputNorm,
    /// Keys.
    Key,
    /// The norm of keys, as wide as a head or as all of them.
    KeyNorm,
    /// What attention gives back to the hidden state.
    Output,
    /// The norm behind the last block.
    OutputNorm,
    /// Learned positions, a row for each.
    Positions,
    /// Queries.
    Query,
    /// Queries, keys and values, one after the other.
    QueryKeyValue,
    /// The norm of queries, as wide as a head or as all of them.
    QueryNorm,
    /// The scores of the experts.
    Router,
    /// The first matrix of the feed-forward layer, which is gated or goes through the activation itself.
    Up,
    /// Values.
    Value,
}

impl Role {
    /// Whether it is a norm, whose weight is a vector.
    pub fn is_norm(self) -> bool {
        matches!(
            self,
            Self::InputNorm
                | Self::QueryNorm
                | Self::KeyNorm
                | Self::AttentionOutputNorm
                | Self::FeedForwardNorm
                | Self::FeedForwardOutputNorm
                | Self::OutputNorm
        )
    }
}

/// What stands between the product of the gate and that of the feed-forward layer's other matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · Φ(x)`.
    Gelu,
    /// GELU with tanh in the place of the error function.
    GeluTanh,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
    /// `x · sigmoid(x)`.
    Silu,
}

impl Activation {
    /// What configurations call them.
    pub(super) const NAMES: &[(&'static str, Self)] = &[
        ("silu", Self::Silu),
        ("swish", Self::Silu),
        ("gelu", Self::Gelu),
        ("gelu_python", Self::Gelu),
        ("gelu_new", Self::GeluTanh),
        ("gelu_fast", Self::GeluTanh),
        ("gelu_accurate", Self::GeluTanh),
        ("gelu_pytorch_tanh", Self::GeluTanh),
        ("gelu_python_tanh", Self::GeluTanh),
        ("quick_gelu", Self::QuickGelu),
        ("relu", Self::Relu),
    ];
}

/// How a norm is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `(x − mean) / sqrt(var + ε) · w + b`.
    Layer,
    /// `x / sqrt(mean(x²) + ε) · w`.
    Rms,
    /// `x / sqrt(mean(x²) + ε) · (1 + w)`.
    RmsPlusOne,
}

/// A window of the last tokens, which some blocks see alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Windows {
    /// Whether there is one only where `use_sliding_window` is set.
    pub is_switched: bool,
    /// Its size where `sliding_window` is not there.
    pub usual: Option<usize>,
    pub blocks: Windowed,
}

/// Which blocks see a window; where these are not [`Windowed::All`], `layer_types` may name others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Windowed {
    /// All, whatever `layer_types` says.
    All,
    /// All unless `layer_types` says otherwise.
    AllOrTypes,
    /// All but every n-th.
    AllButEvery(usize),
    /// Those from `max_window_layers` on.
    Upper,
    WithoutRope,
}

/// A parameter of a block and its name; `{}` stands for the number of an expert.
pub type BlockPart = (Role, &'static str);

/// A row of the table of families.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each says whether a family has something")]
pub struct Family {
    /// The models that have this architecture.
    pub models: &'static str,
    /// The name in config.json's `architectures`.
    pub architecture: &'static str,
    /// The name in config.json's `model_type`.
    pub model_type: &'static str,
    /// What it has beyond Llama, in words.
    pub features: &'static str,

    /// The module that holds all but the head; older checkpoints leave it out of their tensors' names.
    pub base: &'static str,
    /// The embedding in `base`.
    pub embedding: &'static str,
    /// The learned positions in `base`.
    pub positions: Option<&'static str>,
    /// The list of blocks in `base`.
    pub blocks: &'static str,
    /// The last norm in `base`.
    pub norm: &'static str,
    /// Modules without weights that Hugging Face's maps name, in `base`.
    pub weightless: &'static [&'static str],
    /// Ends of the names of tensors that are not read.
    pub unread: &'static [&'static str],
    pub(super) block: &'static [&'static [BlockPart]],
    /// Whether a block's matrices are stored as `[in, out]`.
    pub is_transposed: bool,
    /// Whether norms of queries and keys are as wide as all heads, not as one.
    pub norms_whole_projections: bool,

    /// Keys of config.json that have another name than Llama's, behind Llama's.
    pub(super) renamed: &'static [(&'static str, &'static str)],
    /// How norms are computed.
    pub norm_kind: NormKind,
    pub(super) norm_eps: f64,
    pub(super) activation: Activation,
    /// Whether queries, keys and values, attention's output, and the feed-forward layer have biases; where it is
    /// `None`, `attention_bias` and `mlp_bias` say.
    pub(super) biases: Option<[bool; 3]>,
    pub(super) windows: Option<Windows>,
    /// The base of RoPE unless told otherwise, and that of blocks with a window where it is another.
    pub(super) rope_theta: f64,
    pub(super) local_rope_theta: Option<f64>,
    /// Whether LongRoPE is its own: `yarn` and `su` are older names of it, and a sequence that becomes long is run again.
    pub(super) has_longrope: bool,
    /// Whether `partial_rotary_factor` counts.
    pub(super) is_partly_rotated: bool,
    /// Every n-th block has no RoPE, unless `no_rope_layers` says otherwise.
    pub(super) no_rope_interval: Option<usize>,
    pub(super) head_dim: Option<usize>,
    pub(super) is_tied: bool,
    /// Whether the embedding is multiplied by the root of the hidden size, which Transformers keeps beside it.
    pub scales_embedding: bool,
    /// Queries are scaled by the root of `query_pre_attn_scalar`, whose default this is.
    pub(super) query_pre_attn_scalar: Option<f64>,
    /// Soft caps of attention's scores and of the logits unless told otherwise; `None` where there are no such keys.
    pub(super) softcaps: Option<(Option<f64>, Option<f64>)>,
    /// Whether there are Granite's four multipliers.
    pub(super) has_multipliers: bool,
    pub(super) experts: Option<ExpertDefaults>,
}

impl Family {
    /// The parameters of a block.
    pub fn block(&self) -> impl Iterator<Item = BlockPart> {
        self.block.iter().copied().flatten().copied()
    }

    /// The embedding's tensor: its name, and that without [`Family::base`].
    pub fn embedding_weights(&self) -> [String; 2] {
        let bare = format!("{}.weight", self.embedding);
        [format!("{}.{bare}", self.base), bare]
    }

    /// Its name for a key that Llama calls `key`.
    pub(super) fn key(&self, key: &'static str) -> &'static str {
        self.renamed.iter().find(|(usual, _)| *usual == key).map_or(key, |(_, own)| own)
    }
}

/// Where a family's experts are configured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ExpertDefaults {
    /// The key of an expert's width.
    pub intermediate_size: &'static str,
    pub per_token: usize,
    /// Whether `norm_topk_prob` decides, which is off by default; else the weights sum up to 1.
    pub is_norm_configured: bool,
}
