//! candle's own models, which share no code with ours, on the same checkpoints.

mod support;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3};
use evenkeel::quant::Scheme;
use serde_json::{Value, from_value};
use support::{expected, fixture, load, numbers};

/// Logits of a model that is made of a configuration and weights, behind the last of some tokens.
type Run = fn(Value, VarBuilder, &Tensor) -> Result<Tensor>;

fn weights(name: &str) -> Result<VarBuilder<'static>> {
    let mut tensors = std::collections::HashMap::new();
    for entry in std::fs::read_dir(fixture(name))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensors.extend(candle_core::safetensors::load(path, &Device::Cpu)?);
        }
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// A fixture's config.json with the keys that candle wants.
fn config(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    if config["rope_theta"].is_null() {
        config["rope_theta"] = config["rope_parameters"]["rope_theta"].clone();
    }
    if config["sliding_window"].is_null() {
        config["sliding_window"] = 4096.into();
    }
    config["use_flash_attn"] = false.into();
    config
}

const MODELS: [(&str, Run); 8] = [
    ("parity/llama", run_llama),
    ("parity/llama31", run_llama),
    ("parity/mistral", |config, weights, tokens| {
        mistral::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/mixtral", |config, weights, tokens| {
        mixtral::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/olmo2", |config, weights, tokens| {
        olmo2::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/phi3", |config, weights, tokens| {
        phi3::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/qwen2", |config, weights, tokens| {
        qwen2::ModelForCausalLM::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/qwen3", |config, weights, tokens| {
        qwen3::ModelForCausalLM::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
];

fn run_llama(config: Value, weights: VarBuilder, tokens: &Tensor) -> Result<Tensor> {
    let config = from_value::<llama::LlamaConfig>(config).unwrap().into_config(false);
    let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
    llama::Llama::load(weights, &config)?.forward(tokens, 0, &mut cache)
}

#[test]
fn candle_computes_the_same_logits() {
    for (name, run) in MODELS {
        let mut tokens: Vec<u32> = numbers(&expected(name)["input_ids"]);
        // As many as Mistral's window holds, in which candle counts one token more than Transformers.
        tokens.truncate(8);
        let input = Tensor::new(&tokens[..], &Device::Cpu).and_then(|tokens| tokens.unsqueeze(0)).unwrap();
        let theirs =
            run(config(name), weights(name).unwrap(), &input).and_then(|logits| logits.flatten_all()?.to_vec1());
        let theirs: Vec<f32> = theirs.unwrap();
        let mut ours = Vec::new();
        load(name, Scheme::None, None).score(&tokens, |_, logits| ours = logits.to_vec()).unwrap();
        let difference = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert_eq!(ours.len(), theirs.len(), "{name}");
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}
