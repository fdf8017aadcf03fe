use super::*;

const LLAMA: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
  "rms_norm_eps": 1e-05, "max_position_embeddings": 256, "eos_token_id": [2, 7]
}"#;

/// LLAMA with `key` set to `value`, or removed where `value` is empty.
fn with(key: &str, value: &str) -> Result<ModelConfig> {
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(LLAMA).unwrap();
    config.remove(key);
    if !value.is_empty() {
        config.insert(key.to_owned(), serde_json::from_str(value).unwrap());
    }
    ModelConfig::parse("config.json", serde_json::to_vec(&config).unwrap())
}

/// The frequency of pair 4, of a head of 16: the base to the power of −1/2, scaled.
fn fourth(rope: &Rope) -> String {
    format!("{:.4e}", rope.frequencies(256)[4])
}

#[test]
fn both_dialects_of_rope_read_alike() {
    let llama3 = r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64"#;
    let newer = with("rope_parameters", &format!("{llama3}, \"rope_theta\": 500000.0}}")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(LLAMA).unwrap();
    config["rope_scaling"] = serde_json::from_str(&format!("{llama3}}}")).unwrap();
    config["rope_theta"] = 500_000.0.into();
    let older = ModelConfig::parse("config.json", config.to_string().into()).unwrap();
    assert_eq!(newer.ropes, older.ropes);
    // The root of the base, and all of the factor.
    assert_eq!(fourth(&newer.ropes[0]), "1.7678e-4");
    assert_eq!(with("rope_scaling", "null").unwrap().ropes, with("rope_scaling", "").unwrap().ropes);
    assert_eq!(with("dtype", "\"bfloat16\"").unwrap().dtype, with("torch_dtype", "\"bfloat16\"").unwrap().dtype);
}

#[test]
fn defaults_are_those_of_transformers() {
    let config = with("num_key_value_heads", "").unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
    assert!(!config.tie_word_embeddings);
    assert_eq!(config.eos_token_ids, [2, 7]);
    assert_eq!(
        with("architectures", "").err().unwrap().to_string(),
        "`config.json`, line 1, column 1: `model_type` is missing"
    );
}

#[test]
fn what_is_out_of_range_is_refused_by_name() {
    for (key, value, message) in [
        ("hidden_size", "0", "`hidden_size` is 0; it must be from 1 to 1048576"),
        ("hidden_size", "-1", "a whole number, 0 or more, is wanted here, not -1"),
        ("hidden_size", "64.5", "a whole number, 0 or more, is wanted here, not 64.5"),
        ("hidden_size", "\"64\"", "a whole number, 0 or more, is wanted here, not a text"),
        ("hidden_size", "", "`hidden_size` is missing"),
        ("hidden_size", "65", "a hidden size of 65 does not divide over 4 attention heads"),
        ("num_attention_heads", "0", "`num_attention_heads` is 0; it must be from 1 to 65536"),
        ("num_key_value_heads", "3", "4 attention heads do not divide over 3 key-value heads"),
        ("num_key_value_heads", "8", "4 attention heads do not divide over 8 key-value heads"),
        ("num_hidden_layers", "1000000000", "`num_hidden_layers` is 1000000000; it must be from 1 to 10000"),
        ("head_dim", "15", "a head of width 15 cannot be rotated: it is odd"),
        ("rms_norm_eps", "-1e-5", "`rms_norm_eps` is -1e-5; it must be from 1e-30 to 1"),
        ("rms_norm_eps", "0", "`rms_norm_eps` is 0.0; it must be from 1e-30 to 1"),
        (
            "hidden_act",
            "\"relu2\"",
            "activation `relu2` is not supported; `silu`, `swish`, `gelu`, `gelu_python`, `gelu_new`, `gelu_fast`, \
             `gelu_accurate`, `gelu_pytorch_tanh`, `gelu_python_tanh`, `quick_gelu`, `relu` are",
        ),
        ("use_bidirectional_attention", "true", "`use_bidirectional_attention` is not supported"),
        (
            "architectures",
            "[\"WarpForCausalLM\"]",
            "architecture `WarpForCausalLM` is not supported; supported: SUPPORTED",
        ),
        ("architectures", "\"LlamaForCausalLM\"", "a list is wanted here, not a text"),
        (
            "rope_scaling",
            "{\"type\": \"warped\", \"factor\": 2}",
            "RoPE of type `warped` is not supported; `default`, `dynamic`, `linear`, `llama3`, `longrope` and `yarn` are",
        ),
        ("rope_scaling", "{\"type\": \"linear\"}", "`factor` is missing"),
        ("rope_theta", "-1", "`rope_theta` is -1.0; it must be from 1e-30 to 1000000000000"),
        ("eos_token_id", "99999999999", "99999999999 is no token id"),
        (
            "quantization_config",
            "{\"quant_method\": \"gptq\"}",
            "the checkpoint is already quantized (`gptq`), which is not supported",
        ),
    ] {
        let error = with(key, value).err().unwrap_or_else(|| panic!("{key} = {value} passed")).to_string();
        assert!(
            error.starts_with("`config.json`, line 1, column ")
                && error.ends_with(&message.replace("SUPPORTED", &families::supported())),
            "{key} = {value}: {error}"
        );
    }
}

#[test]
fn an_epsilon_that_is_no_number_is_refused() {
    let error = ModelConfig::parse("config.json", LLAMA.replace("1e-05", "NaN").into()).unwrap_err();
    assert!(error.to_string().ends_with(": a number is wanted here, not NaN"), "{error}");
}

#[test]
fn code_that_a_configuration_names_has_no_effect() {
    assert_eq!(with("auto_map", "{\"AutoModel\": \"evil.Model\"}").unwrap(), with("trust", "true").unwrap());
}

/// The smallest configuration of an architecture, with `more` in it.
fn small(architecture: &str, more: &str) -> ModelConfig {
    let config = format!(
        r#"{{"architectures": ["{architecture}"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
            "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 512, "head_dim": 16,
            "num_local_experts": 8, "moe_intermediate_size": 32, "n_embd": 64, "n_head": 4, "n_layer": 6, "n_positions": 512 {more}}}"#
    );
    ModelConfig::parse("config.json", config.into()).unwrap()
}

#[test]
fn windows_are_where_transformers_has_them() {
    let types = r#", "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention",
        "full_attention", "sliding_attention"]"#;
    let used = r#", "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 4"#;
    for (architecture, more, windows) in [
        ("LlamaForCausalLM", r#", "sliding_window": 9"#, "------"),
        ("MistralForCausalLM", "", "444444"),
        ("MistralForCausalLM", r#", "sliding_window": null"#, "------"),
        ("MistralForCausalLM", r#", "sliding_window": 9"#, "999999"),
        ("MixtralForCausalLM", "", "------"),
        ("Phi3ForCausalLM", r#", "sliding_window": 9"#, "999999"),
        ("Qwen2ForCausalLM", r#", "sliding_window": 9, "max_window_layers": 4"#, "------"),
        ("Qwen2ForCausalLM", used, "----99"),
        ("Qwen3ForCausalLM", &format!("{used}{types}"), "-9---9"),
        ("Qwen3MoeForCausalLM", used, "999999"),
        ("Gemma2ForCausalLM", "", "4-4-4-"),
        ("Gemma2ForCausalLM", r#", "sliding_window": 9"#, "9-9-9-"),
        ("Gemma3ForCausalLM", r#", "sliding_window": 9"#, "99999-"),
        ("Gemma3ForCausalLM", r#", "sliding_window": 9, "sliding_window_pattern": 3"#, "99-99-"),
        ("Gemma3ForCausalLM", &format!(r#", "sliding_window": 9{types}"#), "-9---9"),
        ("SmolLM3ForCausalLM", used, "---9--"),
        ("SmolLM3ForCausalLM", "", "------"),
    ] {
        let config = small(architecture, more);
        let shown: String = config
            .layers
            .iter()
            .map(|layer| layer.window.map_or("-", |window| if window == 4096 { "4" } else { "9" }))
            .collect();
        assert_eq!(shown, windows, "{architecture}{more}");
    }
}

#[test]
fn ropes_are_where_transformers_has_them() {
    let ropes = |config: &ModelConfig| -> String {
        config.layers.iter().map(|layer| layer.rope.map_or("-".to_owned(), |rope| rope.to_string())).collect()
    };
    for (architecture, more, wanted) in [
        ("LlamaForCausalLM", "", "000000"),
        ("GPT2LMHeadModel", "", "------"),
        ("SmolLM3ForCausalLM", "", "000-00"),
        ("SmolLM3ForCausalLM", r#", "no_rope_layers": [0, 1, 0, 1, 1, 1]"#, "-0-000"),
        ("Gemma3ForCausalLM", "", "111110"),
    ] {
        assert_eq!(ropes(&small(architecture, more)), wanted, "{architecture}{more}");
    }
    let fourths = |config: &ModelConfig| config.ropes.iter().map(fourth).collect::<Vec<_>>();
    assert_eq!(fourths(&small("MixtralForCausalLM", "")), ["1.0000e-3"]);
    assert_eq!(fourths(&small("Gemma3ForCausalLM", "")), ["1.0000e-3", "1.0000e-2"]);
    let older = small(
        "Gemma3ForCausalLM",
        r#", "rope_theta": 5e5, "rope_local_base_freq": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 8}"#,
    );
    let newer = small(
        "Gemma3ForCausalLM",
        r#", "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}"#,
    );
    assert_eq!(older.ropes, newer.ropes);
    assert_eq!(fourths(&older), ["1.7678e-4", "5.7735e-3"]);
}

/// Values that Transformers' formulas give in f64.
#[test]
fn frequencies_of_every_kind_of_rope() {
    let eight = |value: f64| vec![value.to_string(); 8].join(", ");
    let longrope = format!(r#""type": "longrope", "short_factor": [{}], "long_factor": [{}]"#, eight(2.0), eight(5.0));
    for (architecture, more, context, at, frequency, factor) in [
        ("LlamaForCausalLM", r#""type": "default""#.to_owned(), 512, 3, 0.031_622_776_6, 1.0),
        ("LlamaForCausalLM", r#""type": "linear", "factor": 4"#.to_owned(), 512, 3, 0.007_905_694_15, 1.0),
        ("LlamaForCausalLM", r#""partial_rotary_factor": 0.5"#.to_owned(), 512, 3, 0.031_622_776_6, 1.0),
        ("Phi3ForCausalLM", r#""partial_rotary_factor": 0.5"#.to_owned(), 512, 3, 0.001, 1.0),
        // Up to 512 tokens as they are; of 1024, θ is 1e4 · 3^(16/14).
        ("LlamaForCausalLM", r#""type": "dynamic", "factor": 2"#.to_owned(), 512, 3, 0.031_622_776_6, 1.0),
        ("LlamaForCausalLM", r#""type": "dynamic", "factor": 2"#.to_owned(), 1024, 3, 0.019_747_833_7, 1.0),
        ("Phi3ForCausalLM", longrope.clone(), 128, 3, 0.015_811_388_3, 1.133_893_419_027_682),
        ("Phi3ForCausalLM", longrope.replace("longrope", "su"), 129, 3, 0.006_324_555_32, 1.133_893_419_027_682),
        // With 128 tokens originally, the ramp goes from 0 to 3: index 1 keeps two thirds.
        ("LlamaForCausalLM", r#""type": "yarn", "factor": 4"#.to_owned(), 512, 1, 0.237_170_825, 1.138_629_436_111_989),
        (
            "LlamaForCausalLM",
            r#""type": "yarn", "factor": 4"#.to_owned(),
            512,
            3,
            0.007_905_694_15,
            1.138_629_436_111_989,
        ),
    ] {
        let more =
            format!(r#", "rope_scaling": {{{more}}}, "rope_theta": 1e4, "original_max_position_embeddings": 128"#);
        let config = small(architecture, &more);
        let rope = &config.ropes[0];
        let ours = f64::from(rope.frequencies(context)[at]);
        assert!((ours / frequency - 1.0).abs() < 1e-6, "{more}: {ours}");
        assert!((rope.attention_factor - factor).abs() < 1e-12, "{more}: {}", rope.attention_factor);
    }
}

#[test]
fn scales_caps_and_experts() {
    let gemma = small("Gemma2ForCausalLM", "");
    assert_eq!((gemma.attention_softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma.embedding_scale, gemma.attention_scale), (8.0, 1.0 / 16.0));
    let uncapped = small("Gemma2ForCausalLM", r#", "attn_logit_softcapping": null, "final_logit_softcapping": 20"#);
    assert_eq!((uncapped.attention_softcap, uncapped.logit_softcap), (None, Some(20.0)));
    let granite = small("GraniteForCausalLM", r#", "logits_scaling": 8, "residual_multiplier": 0.5"#);
    assert_eq!((granite.logit_scale, granite.residual_scale, granite.attention_scale), (0.125, 0.5, 1.0));
    assert_eq!(small("GPT2LMHeadModel", r#", "scale_attn_weights": false"#).attention_scale, 1.0);
    assert_eq!(small("GPT2LMHeadModel", "").intermediate_size, 256);
    let sparse = r#", "num_experts_per_tok": 3, "mlp_only_layers": [5],
        "decoder_sparse_step": 2"#;
    let moe = small("Qwen3MoeForCausalLM", sparse);
    let experts = Experts { count: 8, per_token: 3, intermediate_size: 32, is_normalized: false };
    assert_eq!(moe.experts, Some(experts));
    let has: Vec<bool> = moe.layers.iter().map(|layer| layer.has_experts).collect();
    assert_eq!(has, [false, true, false, true, false, false]);
}

#[test]
fn what_would_change_the_computation_is_refused() {
    for (architecture, key, value, message) in [
        ("Gemma3ForCausalLM", "use_bidirectional_attention", "true", "`use_bidirectional_attention` is not supported"),
        ("Gemma2ForCausalLM", "layer_types", "[\"full_attention\"]", "the list has 1 elements for 5 blocks"),
        (
            "Gemma2ForCausalLM",
            "layer_types",
            "[\"full_attention\", \"chunked_attention\", \"\", \"\", \"\"]",
            "attention of type `chunked_attention` is not supported; `full_attention` and `sliding_attention` are",
        ),
        (
            "Gemma2ForCausalLM",
            "attn_logit_softcapping",
            "0",
            "`attn_logit_softcapping` is 0.0; it must be from 1e-30 to 1000000",
        ),
        ("MixtralForCausalLM", "num_local_experts", "65536", "65536 experts in each of 5 blocks are more than 262144"),
        ("MixtralForCausalLM", "num_local_experts", "1", "a token cannot use 2 of 1 experts"),
        ("GraniteForCausalLM", "logits_scaling", "-2", "`logits_scaling` is -2.0; it must be from 1e-30 to 1000000"),
        (
            "Phi3ForCausalLM",
            "rope_scaling",
            "{\"type\": \"su\", \"short_factor\": [1], \"long_factor\": [1]}",
            "`short_factor` has 1 numbers, not 8",
        ),
    ] {
        let mut config: serde_json::Value = serde_json::from_str(LLAMA).unwrap();
        config["architectures"] = vec![architecture].into();
        config["num_hidden_layers"] = 5.into();
        config[key] = serde_json::from_str(value).unwrap();
        let error = ModelConfig::parse("config.json", config.to_string().into()).unwrap_err().to_string();
        assert!(error.ends_with(message), "{architecture} {key}: {error}");
    }
}
