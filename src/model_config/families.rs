//! The families of models that are read: one row each, all that tells them apart.

use super::family::{Activation, BlockPart, ExpertDefaults, Family, NormKind, Role, Windowed, Windows};

const INPUT_NORM: BlockPart = (Role::InputNorm, "input_layernorm");
const QUERY: BlockPart = (Role::Query, "self_attn.q_proj");
const KEY: BlockPart = (Role::Key, "self_attn.k_proj");
const VALUE: BlockPart = (Role::Value, "self_attn.v_proj");
const QUERY_NORM: BlockPart = (Role::QueryNorm, "self_attn.q_norm");
const KEY_NORM: BlockPart = (Role::KeyNorm, "self_attn.k_norm");
const OUTPUT: BlockPart = (Role::Output, "self_attn.o_proj");
const FEED_FORWARD_NORM: BlockPart = (Role::FeedForwardNorm, "post_attention_layernorm");
const PRE_FEED_FORWARD_NORM: BlockPart = (Role::FeedForwardNorm, "pre_feedforward_layernorm");
const GATE: BlockPart = (Role::Gate, "mlp.gate_proj");
const UP: BlockPart = (Role::Up, "mlp.up_proj");
const DOWN: BlockPart = (Role::Down, "mlp.down_proj");
const ATTENTION_OUTPUT_NORM: BlockPart = (Role::AttentionOutputNorm, "post_attention_layernorm");
const FEED_FORWARD_OUTPUT_NORM: BlockPart = (Role::FeedForwardOutputNorm, "post_feedforward_layernorm");

const ATTENTION: &[BlockPart] = &[QUERY, KEY, VALUE, OUTPUT];
const NORMED_ATTENTION: &[BlockPart] = &[QUERY, KEY, VALUE, QUERY_NORM, KEY_NORM, OUTPUT];
const FEED_FORWARD: &[BlockPart] = &[GATE, UP, DOWN];

const LLAMA: Family = Family {
    models: "Llama 2, 3, 3.1 and later",
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    features: "RMSNorm before attention and feed-forward layer, grouped queries, RoPE, SwiGLU",
    base: "model",
    embedding: "embed_tokens",
    positions: None,
    blocks: "layers",
    norm: "norm",
    weightless: &["rotary_emb"],
    unread: &[".rotary_emb.inv_freq"],
    block: &[&[INPUT_NORM], ATTENTION, &[FEED_FORWARD_NORM], FEED_FORWARD],
    is_transposed: false,
    norms_whole_projections: false,
    renamed: &[],
    norm_kind: NormKind::Rms,
    norm_eps: 1e-6,
    activation: Activation::Silu,
    biases: None,
    windows: None,
    rope_theta: 10_000.0,
    local_rope_theta: None,
    has_longrope: false,
    is_partly_rotated: false,
    no_rope_interval: None,
    head_dim: None,
    is_tied: false,
    scales_embedding: false,
    query_pre_attn_scalar: None,
    softcaps: None,
    has_multipliers: false,
    experts: None,
};

const MISTRAL: Family = Family {
    models: "Mistral",
    architecture: "MistralForCausalLM",
    model_type: "mistral",
    features: "sliding window",
    windows: Some(Windows { is_switched: false, usual: Some(4096), blocks: Windowed::All }),
    ..LLAMA
};

const MINISTRAL: Family = Family {
    models: "Ministral",
    architecture: "MinistralForCausalLM",
    model_type: "ministral",
    features: "sliding window in the blocks that `layer_types` names",
    windows: Some(Windows { is_switched: false, usual: Some(4096), blocks: Windowed::AllOrTypes }),
    ..LLAMA
};

const MIXTRAL: Family = Family {
    models: "Mixtral",
    architecture: "MixtralForCausalLM",
    model_type: "mixtral",
    features: "experts, whose weights sum up to 1",
    block: &[
        &[INPUT_NORM],
        ATTENTION,
        &[
            FEED_FORWARD_NORM,
            (Role::Router, "block_sparse_moe.gate"),
            (Role::ExpertGate(0), "block_sparse_moe.experts.{}.w1"),
            (Role::ExpertUp(0), "block_sparse_moe.experts.{}.w3"),
            (Role::ExpertDown(0), "block_sparse_moe.experts.{}.w2"),
        ],
    ],
    norm_eps: 1e-5,
    windows: Some(Windows { is_switched: false, usual: None, blocks: Windowed::All }),
    rope_theta: 1e6,
    experts: Some(ExpertDefaults { intermediate_size: "intermediate_size", per_token: 2, is_norm_configured: false }),
    ..LLAMA
};

const QWEN2: Family = Family {
    models: "Qwen2, Qwen2.5",
    architecture: "Qwen2ForCausalLM",
    model_type: "qwen2",
    features: "bias on queries, keys and values, sliding window in upper blocks",
    biases: Some([true, false, false]),
    windows: Some(Windows { is_switched: true, usual: Some(4096), blocks: Windowed::Upper }),
    ..LLAMA
};

const QWEN3: Family = Family {
    models: "Qwen3",
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    features: "norm on each head of queries and keys",
    block: &[&[INPUT_NORM], NORMED_ATTENTION, &[FEED_FORWARD_NORM], FEED_FORWARD],
    windows: Some(Windows { is_switched: true, usual: Some(4096), blocks: Windowed::Upper }),
    head_dim: Some(128),
    ..LLAMA
};

const QWEN3_MOE: Family = Family {
    models: "Qwen3-MoE",
    architecture: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    features: "as Qwen3, with experts in all or some blocks",
    block: &[
        &[INPUT_NORM],
        NORMED_ATTENTION,
        &[FEED_FORWARD_NORM],
        FEED_FORWARD,
        &[
            (Role::Router, "mlp.gate"),
            (Role::ExpertGate(0), "mlp.experts.{}.gate_proj"),
            (Role::ExpertUp(0), "mlp.experts.{}.up_proj"),
            (Role::ExpertDown(0), "mlp.experts.{}.down_proj"),
        ],
    ],
    windows: Some(Windows { is_switched: true, usual: Some(4096), blocks: Windowed::All }),
    experts: Some(ExpertDefaults {
        intermediate_size: "moe_intermediate_size",
        per_token: 8,
        is_norm_configured: true,
    }),
    ..LLAMA
};

const GEMMA2: Family = Family {
    models: "Gemma 2",
    architecture: "Gemma2ForCausalLM",
    model_type: "gemma2",
    features: "norms (1 + w) before and after, soft caps on scores and logits, sliding window in every other block, \
               scaled embedding, GeGLU",
    block: &[
        &[INPUT_NORM],
        ATTENTION,
        &[ATTENTION_OUTPUT_NORM, PRE_FEED_FORWARD_NORM],
        FEED_FORWARD,
        &[FEED_FORWARD_OUTPUT_NORM],
    ],
    renamed: &[("hidden_act", "hidden_activation")],
    norm_kind: NormKind::RmsPlusOne,
    activation: Activation::GeluTanh,
    windows: Some(Windows { is_switched: false, usual: Some(4096), blocks: Windowed::AllButEvery(2) }),
    head_dim: Some(256),
    is_tied: true,
    scales_embedding: true,
    query_pre_attn_scalar: Some(256.0),
    softcaps: Some((Some(50.0), Some(30.0))),
    ..LLAMA
};

const GEMMA3: Family = Family {
    models: "Gemma 3 (text)",
    architecture: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    features: "as Gemma 2 with a norm on each head of queries and keys, two RoPE bases, five blocks in six with a \
               window, no soft caps",
    block: &[
        &[INPUT_NORM],
        NORMED_ATTENTION,
        &[ATTENTION_OUTPUT_NORM, PRE_FEED_FORWARD_NORM],
        FEED_FORWARD,
        &[FEED_FORWARD_OUTPUT_NORM],
    ],
    weightless: &["rotary_emb", "rotary_emb_local"],
    windows: Some(Windows { is_switched: false, usual: Some(4096), blocks: Windowed::AllButEvery(6) }),
    rope_theta: 1e6,
    local_rope_theta: Some(10_000.0),
    softcaps: Some((None, None)),
    ..GEMMA2
};

const PHI3: Family = Family {
    models: "Phi-3, Phi-3.5, Phi-4",
    architecture: "Phi3ForCausalLM",
    model_type: "phi3",
    features: "fused projections, sliding window, LongRoPE, RoPE on a part of a head",
    block: &[&[
        INPUT_NORM,
        (Role::QueryKeyValue, "self_attn.qkv_proj"),
        OUTPUT,
        FEED_FORWARD_NORM,
        (Role::GateUp, "mlp.gate_up_proj"),
        DOWN,
    ]],
    weightless: &["rotary_emb", "embed_dropout"],
    norm_eps: 1e-5,
    windows: Some(Windows { is_switched: false, usual: None, blocks: Windowed::All }),
    has_longrope: true,
    is_partly_rotated: true,
    ..LLAMA
};

const GPT2: Family = Family {
    models: "GPT-2",
    architecture: "GPT2LMHeadModel",
    model_type: "gpt2",
    features: "LayerNorm, learned positions, bias everywhere, fused and transposed projections, GELU",
    base: "transformer",
    embedding: "wte",
    positions: Some("wpe"),
    blocks: "h",
    norm: "ln_f",
    weightless: &["drop"],
    unread: &[".attn.bias", ".attn.masked_bias"],
    block: &[&[
        (Role::InputNorm, "ln_1"),
        (Role::QueryKeyValue, "attn.c_attn"),
        (Role::Output, "attn.c_proj"),
        (Role::FeedForwardNorm, "ln_2"),
        (Role::Up, "mlp.c_fc"),
        (Role::Down, "mlp.c_proj"),
    ]],
    is_transposed: true,
    renamed: &[
        ("hidden_size", "n_embd"),
        ("intermediate_size", "n_inner"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("max_position_embeddings", "n_positions"),
        ("rms_norm_eps", "layer_norm_epsilon"),
        ("hidden_act", "activation_function"),
    ],
    norm_kind: NormKind::Layer,
    norm_eps: 1e-5,
    activation: Activation::GeluTanh,
    biases: Some([true; 3]),
    is_tied: true,
    ..LLAMA
};

const OLMO2: Family = Family {
    models: "OLMo 2",
    architecture: "Olmo2ForCausalLM",
    model_type: "olmo2",
    features: "norms after attention and feed-forward layer only, norm on whole queries and keys",
    block: &[NORMED_ATTENTION, &[ATTENTION_OUTPUT_NORM], FEED_FORWARD, &[FEED_FORWARD_OUTPUT_NORM]],
    norms_whole_projections: true,
    norm_eps: 1e-5,
    ..LLAMA
};

const GRANITE: Family = Family {
    models: "Granite 3",
    architecture: "GraniteForCausalLM",
    model_type: "granite",
    features: "multipliers of embedding, residual, attention and logits",
    has_multipliers: true,
    ..LLAMA
};

const SMOLLM3: Family = Family {
    models: "SmolLM3",
    architecture: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    features: "every fourth block without RoPE",
    windows: Some(Windows { is_switched: true, usual: None, blocks: Windowed::WithoutRope }),
    rope_theta: 2e6,
    no_rope_interval: Some(4),
    is_tied: true,
    ..LLAMA
};

/// All families.
pub static FAMILIES: &[Family] =
    &[LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, GPT2, OLMO2, GRANITE, SMOLLM3, MINISTRAL];

/// The names of all architectures, as a list in a message.
pub(super) fn supported() -> String {
    FAMILIES.iter().map(|family| family.architecture).collect::<Vec<_>>().join(", ")
}

/// The table of families as README.md shows it.
pub fn table() -> String {
    let rows = FAMILIES
        .iter()
        .map(|family| format!("| {} | `{}` | {} |\n", family.models, family.architecture, family.features));
    format!("| models | architecture | what it has |\n| --- | --- | --- |\n{}", rows.collect::<String>())
}
