//! candle's own Llama, which shares no code with ours, on the same checkpoint.

mod support;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use evenkeel::quant::Scheme;
use support::{expected, fixture, load, numbers};

/// The logits behind the last of `tokens`.
fn candle_logits(name: &str, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
    let device = Device::Cpu;
    let mut tensors = std::collections::HashMap::new();
    for entry in std::fs::read_dir(fixture(name))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensors.extend(candle_core::safetensors::load(path, &device)?);
        }
    }
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &device);
    let config: LlamaConfig =
        serde_json::from_str(&std::fs::read_to_string(fixture(name).join("config.json"))?).unwrap();
    let config = config.into_config(false);
    let mut cache = Cache::new(true, DType::F32, &config, &device)?;
    let input = Tensor::new(tokens, &device)?.unsqueeze(0)?;
    Llama::load(weights, &config)?.forward(&input, 0, &mut cache)?.squeeze(0)?.to_vec1()
}

#[test]
fn candle_computes_the_same_logits() {
    for name in ["parity/llama", "parity/llama31"] {
        let tokens: Vec<u32> = numbers(&expected(name)["input_ids"]);
        let theirs = candle_logits(name, &tokens).unwrap();
        let mut ours = Vec::new();
        load(name, Scheme::None, None).score(&tokens, |_, logits| ours = logits.to_vec()).unwrap();
        let difference = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert_eq!(ours.len(), theirs.len());
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}
