//! The configurations of published models, as the Hub has them, down to what
//! decides their shapes and their computation; and their numbers of parameters.

#![allow(dead_code, reason = "each test binary uses a part")]

use serde_json::{Value, json};

/// A model, its config.json, and the number of its parameters that the Hub gives.
pub struct Published {
    pub name: &'static str,
    pub config: Value,
    pub parameters: u64,
}

fn model(name: &'static str, parameters: u64, config: Value) -> Published {
    Published { name, config, parameters }
}

/// One large model of each family.
#[expect(clippy::too_many_lines, reason = "a table")]
pub fn all() -> Vec<Published> {
    vec![
        model(
            "Mistral-7B-v0.1",
            7_241_732_096,
            json!({
                "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14_336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
                "max_position_embeddings": 32_768, "sliding_window": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            }),
        ),
        model(
            "Mixtral-8x7B-v0.1",
            46_702_792_704,
            json!({
                "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14_336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
                "max_position_embeddings": 32_768, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6,
                "sliding_window": null,
            }),
        ),
        model(
            "Qwen2.5-7B",
            7_615_616_512,
            json!({
                "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18_944,
                "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
                "max_position_embeddings": 131_072, "max_window_layers": 28, "sliding_window": 131_072,
                "use_sliding_window": false, "use_mrope": false, "rope_theta": 1e6,
            }),
        ),
        model(
            "Qwen3-8B",
            8_190_735_360,
            json!({
                "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12_288,
                "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "vocab_size": 151_936, "max_position_embeddings": 40_960, "attention_bias": false, "rope_theta": 1e6,
            }),
        ),
        model(
            "Qwen3-30B-A3B",
            30_532_122_624,
            json!({
                "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
                "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
                "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
                "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true, "decoder_sparse_step": 1,
                "mlp_only_layers": [], "rope_theta": 1e6,
            }),
        ),
        model(
            "Qwen3-235B-A22B",
            235_093_634_560,
            json!({
                "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4096, "intermediate_size": 12_288,
                "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
                "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
                "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true, "decoder_sparse_step": 1,
                "mlp_only_layers": [], "rope_theta": 1e6,
            }),
        ),
        model(
            "gemma-2-27b",
            27_227_128_320,
            json!({
                "architectures": ["Gemma2ForCausalLM"], "hidden_size": 4608, "intermediate_size": 36_864,
                "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
                "vocab_size": 256_000, "max_position_embeddings": 8192, "query_pre_attn_scalar": 144,
                "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0, "sliding_window": 4096,
            }),
        ),
        model(
            "gemma-3-27b (text)",
            27_009_346_304,
            json!({
                "architectures": ["Gemma3ForCausalLM"], "hidden_size": 5376, "intermediate_size": 21_504,
                "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
                "vocab_size": 262_208, "max_position_embeddings": 131_072, "query_pre_attn_scalar": 168,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
                "sliding_window_pattern": 6,
            }),
        ),
        model(
            "Phi-3-mini-4k-instruct",
            3_821_079_552,
            json!({
                "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_064,
                "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rope_scaling": null,
                "sliding_window": 2047, "attention_bias": false,
            }),
        ),
        model(
            "gpt2-xl",
            1_557_611_200,
            json!({
                "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024,
                "n_ctx": 1024, "vocab_size": 50_257, "activation_function": "gelu_new",
            }),
        ),
        model(
            "OLMo-2-1124-7B",
            7_298_617_344,
            json!({
                "architectures": ["Olmo2ForCausalLM"], "hidden_size": 4096, "intermediate_size": 11_008,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100_352,
                "max_position_embeddings": 4096, "rope_theta": 500_000, "rms_norm_eps": 1e-6,
            }),
        ),
        model(
            "granite-3.0-8b-base",
            8_170_848_256,
            json!({
                "architectures": ["GraniteForCausalLM"], "hidden_size": 4096, "intermediate_size": 12_800,
                "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49_155,
                "max_position_embeddings": 4096, "tie_word_embeddings": true, "attention_multiplier": 0.007_812_5,
                "embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22,
            }),
        ),
        model(
            "SmolLM3-3B",
            3_075_098_624,
            json!({
                "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11_008,
                "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128_256,
                "max_position_embeddings": 65_536, "no_rope_layer_interval": 4, "rope_theta": 5e6,
                "use_sliding_window": false, "sliding_window": null,
            }),
        ),
    ]
}
