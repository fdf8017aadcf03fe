//! candle's own models, which share no code with ours, on the same checkpoints.

mod support;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma2, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3};
use evenkeel::quant::Scheme;
use serde_json::{Value, from_value};
use support::{expected, fixture, load, numbers};

/// A fixture, changes to its config.json, and what candle computes.
type Opinion = (&'static str, &'static str, Run);

/// Logits of a model that is made of a configuration and weights, behind the last of some tokens.
type Run = fn(Value, VarBuilder, &Tensor) -> Result<Tensor>;

/// A copy of a fixture with the members of `changes` in its config.json.
fn changed(name: &str, changes: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let changes: serde_json::Map<String, Value> = serde_json::from_str(changes).unwrap();
    config.as_object_mut().unwrap().extend(changes);
    std::fs::write(path, config.to_string()).unwrap();
    directory
}

fn weights(checkpoint: &Path) -> Result<VarBuilder<'static>> {
    let mut tensors = std::collections::HashMap::new();
    for entry in std::fs::read_dir(checkpoint)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensors.extend(candle_core::safetensors::load(path, &Device::Cpu)?);
        }
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// A checkpoint's config.json with the keys that candle wants.
fn config(checkpoint: &Path) -> Value {
    let text = std::fs::read_to_string(checkpoint.join("config.json")).unwrap();
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

const OPINIONS: [Opinion; 10] = [
    ("parity/llama", "{}", run_llama),
    ("parity/llama31", "{}", run_llama),
    ("parity/mistral", "{}", |config, weights, tokens| {
        mistral::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/mixtral", "{}", |config, weights, tokens| {
        mixtral::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/olmo2", "{}", |config, weights, tokens| {
        olmo2::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/phi3", "{}", |config, weights, tokens| {
        phi3::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/phi3", r#"{"partial_rotary_factor": 0.5}"#, |config, weights, tokens| {
        phi3::Model::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/gemma2", "{}", |config, weights, tokens| {
        gemma2::Model::new(false, &from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/qwen2", "{}", |config, weights, tokens| {
        qwen2::ModelForCausalLM::new(&from_value(config).unwrap(), weights)?.forward(tokens, 0)
    }),
    ("parity/qwen3", "{}", |config, weights, tokens| {
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
    for (name, changes, run) in OPINIONS {
        let checkpoint = changed(name, changes);
        let mut tokens: Vec<u32> = numbers(&expected(name)["input_ids"]);
        // As many as the windows hold, of which candle has another notion than Transformers.
        tokens.truncate(8);
        let input = Tensor::new(&tokens[..], &Device::Cpu).and_then(|tokens| tokens.unsqueeze(0)).unwrap();
        let weights = weights(checkpoint.path()).unwrap();
        let theirs = run(config(checkpoint.path()), weights, &input);
        let theirs: Vec<f32> = theirs.and_then(|logits| logits.flatten_all()?.to_vec1()).unwrap();
        let mut ours = Vec::new();
        let mut model = load(checkpoint.path().to_str().unwrap(), Scheme::None, None);
        model.score(&tokens, |_, logits| ours = logits.to_vec()).unwrap();
        let difference = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert_eq!(ours.len(), theirs.len(), "{name}");
        assert!(difference < 1e-4, "{name} {changes}: {difference}");
    }
}
