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
    assert_eq!(newer.ropes[0].theta, 500_000.0);
    assert!(matches!(newer.ropes[0].scaling, RopeScaling::Llama3 { .. }));
    assert_eq!(with("rope_scaling", "null").unwrap().ropes[0].scaling, RopeScaling::Default);
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
            "activation `relu2` is not supported; `silu`, `gelu`, `gelu_new` and `gelu_pytorch_tanh` are",
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
            "{\"type\": \"dynamic\", \"factor\": 2}",
            "RoPE of type `dynamic` is not supported; `default`, `linear`, `llama3`, `longrope` and `yarn` are",
        ),
        ("rope_scaling", "{\"type\": \"linear\"}", "`factor` is missing"),
        ("partial_rotary_factor", "0.2", "3 of 16 elements of a head cannot be rotated in pairs"),
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
fn an_epsilon_that_is_no_number_is_no_json() {
    let error = ModelConfig::parse("config.json", LLAMA.replace("1e-05", "NaN").into()).unwrap_err();
    assert_eq!(error.to_string(), "`config.json` is not JSON");
}

#[test]
fn code_that_a_configuration_names_has_no_effect() {
    assert_eq!(with("auto_map", "{\"AutoModel\": \"evil.Model\"}").unwrap(), with("trust", "true").unwrap());
}
