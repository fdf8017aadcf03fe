//! Checkpoints that have a model's true shapes and no weights: configurations,
//! indexes and headers; the data behind them is a hole in the file.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use evenkeel::architecture::ModuleTree;
use evenkeel::model_config::ModelConfig;
use evenkeel::source::LocalDirectory;
use serde_json::{Map, Value, json};

/// Llama 3.1 with 8 billion parameters.
pub fn llama_8b() -> Value {
    llama(4096, 14_336, 32, 32)
}

/// Llama 3.3, which has 70 billion parameters.
pub fn llama_70b() -> Value {
    llama(8192, 28_672, 80, 64)
}

/// Qwen3 with 235 billion parameters: 94 blocks of 128 experts, some 37,000 tensors.
pub fn qwen3_235b() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4096, "intermediate_size": 12_288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": true, "rope_theta": 1e6, "torch_dtype": "bfloat16",
    })
}

/// Llama 3.1 with 405 billion parameters.
pub fn llama_405b() -> Value {
    llama(16_384, 53_248, 126, 128)
}

/// Llama 2 with 13 billion parameters.
pub fn llama2_13b() -> Value {
    let mut config = llama(5120, 13_824, 40, 40);
    for (key, value) in [("num_key_value_heads", 40), ("vocab_size", 32_000), ("max_position_embeddings", 4096)] {
        config[key] = value.into();
    }
    config["rope_scaling"] = Value::Null;
    config
}

fn llama(hidden: u64, feed_forward: u64, blocks: u64, heads: u64) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "max_position_embeddings": 131_072,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": blocks,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "vocab_size": 128_256,
    })
}

/// Writes `config` and bf16 headers over `shards` files into `directory`.
pub fn write(directory: &Path, config: &Value, shards: usize) {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::read(&LocalDirectory::new(directory).unwrap()).unwrap();
    let tree = ModuleTree::new(&config);
    let parameters: Vec<_> = tree.parameters().map(|(_, parameter)| parameter).collect();
    let mut weight_map = Map::new();
    for (at, part) in parameters.chunks(parameters.len().div_ceil(shards)).enumerate() {
        let shard = format!("model-{:05}-of-{shards:05}.safetensors", at + 1);
        let (mut header, mut end) = (Map::new(), 0u64);
        for parameter in part {
            let start = end;
            end += 2 * (parameter.rows * parameter.cols) as u64;
            let shape = parameter.shape();
            header.insert(parameter.tensor(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
            weight_map.insert(parameter.tensor(), shard.clone().into());
        }
        let header = Value::Object(header).to_string();
        let mut file = File::create(directory.join(&shard)).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len(8 + header.len() as u64 + end).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
