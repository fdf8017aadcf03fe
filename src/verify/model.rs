//! Small models whose weights are made up: what a GPU says of them beside what the CPU says, and the memory.

use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::{Value, json};

use super::numbers::{encode, mismatch, random};
use crate::architecture::ModuleTree;
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;
use crate::device_map::DeviceMap;
use crate::error::{Error, Result};
use crate::footprint::CUDA_GRANULE;
use crate::generate::GenerateOptions;
use crate::loader::{LoadOptions, MeasuredDevice, Model};
use crate::machine::Inventory;
use crate::model_config::ModelConfig;
use crate::plan::{Plan, PlanOptions};
use crate::quant::{Scheme, WeightDtype};
use crate::source::LocalDirectory;

/// The largest difference of a logit, as a share of the largest logit. The CPU rounds what packed weights are
/// multiplied by, and GPUs do not.
fn tolerance(scheme: Scheme) -> f32 {
    if scheme == Scheme::None { 2e-2 } else { 5e-2 }
}

const CONTEXT: usize = 64;
const NEW: usize = 6;

/// The models: a Llama, and one with experts and norms of heads.
pub fn configurations() -> [(&'static str, Value); 2] {
    let config = |architecture: &str| {
        json!({
            "architectures": [architecture], "torch_dtype": "bfloat16", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 320, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
            "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true, "moe_intermediate_size": 48, "head_dim": 16,
        })
    };
    [("a Llama", config("LlamaForCausalLM")), ("a Qwen3-MoE", config("Qwen3MoeForCausalLM"))]
}

/// Writes a checkpoint with weights of a size that keeps states as large as they are.
pub fn write(directory: &Path, config: &Value) -> Result<()> {
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"},
    });
    for (name, json) in [("config.json", config), ("tokenizer.json", &tokenizer)] {
        let path = directory.join(name);
        std::fs::write(&path, json.to_string()).map_err(|e| Error::io("write", &path, e))?;
    }
    let config = ModelConfig::read(&LocalDirectory::new(directory)?)?;
    let tree = ModuleTree::new(&config);
    let bytes: Vec<_> = tree
        .parameters()
        .zip(1..)
        .map(|((_, parameter), seed)| {
            let size = if parameter.rows == 1 { 0.1 } else { (3.0 / parameter.cols as f32).sqrt() };
            let offset = if parameter.rows == 1 { 1.0 } else { 0.0 };
            let weights = random(parameter.rows * parameter.cols, seed);
            encode(WeightDtype::Bf16, &weights.iter().map(|w| offset + w * size).collect::<Vec<_>>())
        })
        .collect();
    let broken = |e: safetensors::SafeTensorError| Error::input("weights cannot be written").caused_by(e);
    let tensors = tree.parameters().zip(&bytes).map(|((_, parameter), bytes)| {
        let shape = parameter.shape().into_iter().map(|size| usize::try_from(size).unwrap_or(usize::MAX)).collect();
        Ok((parameter.tensor(), TensorView::new(Dtype::BF16, shape, bytes)?))
    });
    let tensors = tensors.collect::<Result<Vec<_>, _>>().map_err(broken)?;
    serialize_to_file(tensors, None, &directory.join("model.safetensors")).map_err(broken)
}

fn load(checkpoint: &Checkpoint, scheme: Scheme, device: DeviceId, options: &LoadOptions) -> Result<Model> {
    let plan = PlanOptions {
        quantize: Some(scheme.into()),
        context: Some(CONTEXT),
        reserve: Some(Bytes::ZERO),
        device_map: Some(DeviceMap::whole(device)),
        ..PlanOptions::default()
    };
    let inventory = Inventory::of_machine(&options.offload_directory)?;
    Plan::new(checkpoint, &inventory, &plan)?.load(options, |_| ())
}

/// Runs each model on a GPU and on the CPU.
pub fn models(device: DeviceId, options: &LoadOptions) -> Result<Vec<MeasuredDevice>> {
    let mut measured = Vec::new();
    for (name, config) in configurations() {
        let directory = tempfile::tempdir_in(&options.offload_directory)
            .map_err(|e| Error::io("write into", &options.offload_directory, e))?;
        write(directory.path(), &config)?;
        let checkpoint = Checkpoint::open(directory.path())?;
        for scheme in Scheme::ALL {
            let mut ours = load(&checkpoint, scheme, device, options)?;
            let mut exact = load(&checkpoint, scheme, DeviceId::Cpu, options)?;
            let may_be_off = usize::from(checkpoint.config.experts.is_some());
            let what = format!("{name} in {scheme}");
            compare(&what, &mut ours, &mut exact, tolerance(scheme), may_be_off)?;
            let memory = ours.report.devices.iter().find(|measured| measured.id == device);
            let Some(memory) = memory else { continue };
            let (planned, taken) = (memory.planned, memory.measured);
            if planned.0.abs_diff(taken.0) > CUDA_GRANULE.0.max(planned.0 / 100) {
                return Err(mismatch(format!("{what}: {planned} were planned, and {taken} are gone")));
            }
            measured.push(memory.clone());
        }
    }
    Ok(measured)
}

/// Holds the logits of a prompt, and the tokens that are generated behind it by steps that are repeated, against
/// those of the other. Where two experts score a token nearly the same, rounding decides between them.
fn compare(what: &str, ours: &mut Model, exact: &mut Model, tolerance: f32, may_be_off: usize) -> Result<()> {
    let prompt: Vec<u32> = (0..12).map(|at| 3 + at * 61 % 300).collect();
    let options = GenerateOptions { max_new_tokens: Some(NEW), ignore_eos: true, ..GenerateOptions::default() };
    let mut new = Vec::new();
    for piece in ours.generate_from(&prompt, options)? {
        new.extend(piece?.token);
    }
    let all = [&prompt[..], &new].concat();
    let rows = |model: &mut Model, tokens: &[u32]| {
        let mut rows = Vec::new();
        model.score(tokens, |_, logits| rows.push(logits.to_vec())).map(|()| rows)
    };
    let (ours, exact) = (rows(ours, &prompt)?, rows(exact, &all)?);
    let largest = |row: &[f32]| row.iter().fold(0.0f32, |largest, logit| largest.max(logit.abs()));
    let of_row = |(ours, exact): (&Vec<f32>, &Vec<f32>)| {
        let off = ours.iter().zip(exact).map(|(a, b)| (a - b).abs());
        // The larger of a number and of none is the number.
        off.map(|off| if off.is_nan() { f32::INFINITY } else { off }).fold(0.0, f32::max) / largest(exact)
    };
    // A token that was chosen is the best, or as good as that.
    let of_choice = |(row, token): (&Vec<f32>, &u32)| {
        (row.iter().copied().fold(f32::MIN, f32::max) - row[*token as usize]) / largest(row)
    };
    let mut off: Vec<f32> = ours.iter().zip(&exact).map(of_row).collect();
    off.extend(exact[prompt.len() - 1..].iter().zip(&new).map(of_choice));
    off.sort_by(f32::total_cmp);
    let worst = off[off.len() - 1 - may_be_off];
    if new.len() == NEW && worst <= tolerance {
        return Ok(());
    }
    Err(mismatch(format!("{what}: logits are off by {worst:.3} of the largest; {} of {NEW} tokens came", new.len())))
}
