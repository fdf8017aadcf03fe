//! The families of models: their sizes, their names, and what the README says of them.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use evenkeel::architecture::{ModuleTree, Parameter, Part};
use evenkeel::checkpoint::Checkpoint;
use evenkeel::device_map::DeviceMap;
use evenkeel::footprint::{ALIGNMENT, CpuBuffers, CudaBuffers, Extent};
use evenkeel::model_config::{self, FAMILIES, ModelConfig};
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::{KvDtype, Scheme};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use support::{expected, fixture, load_plan, numbers, published, roomy, shapes};

const FIXTURES: [(&str, &str); 14] = [
    ("parity/llama", "LlamaForCausalLM"),
    ("parity/mistral", "MistralForCausalLM"),
    ("parity/mixtral", "MixtralForCausalLM"),
    ("parity/qwen2", "Qwen2ForCausalLM"),
    ("parity/qwen3", "Qwen3ForCausalLM"),
    ("parity/qwen3_moe", "Qwen3MoeForCausalLM"),
    ("parity/gemma2", "Gemma2ForCausalLM"),
    ("parity/gemma3", "Gemma3ForCausalLM"),
    ("parity/phi3", "Phi3ForCausalLM"),
    ("parity/gpt2", "GPT2LMHeadModel"),
    ("parity/olmo2", "Olmo2ForCausalLM"),
    ("parity/granite", "GraniteForCausalLM"),
    ("parity/smollm3", "SmolLM3ForCausalLM"),
    ("parity/ministral", "MinistralForCausalLM"),
];

#[test]
fn the_readme_has_the_table_of_families() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let table = model_config::table();
    assert!(readme.contains(&table), "README.md lacks:\n{table}");
}

#[test]
fn every_family_has_a_fixture() {
    let of_fixture = |name: &str| Checkpoint::open(fixture(name)).unwrap().config.family.architecture;
    for ((name, architecture), family) in FIXTURES.iter().zip(FAMILIES) {
        assert_eq!((of_fixture(name), family.architecture), (*architecture, *architecture), "{name}");
    }
    assert_eq!(FIXTURES.len(), FAMILIES.len());
}

#[test]
fn published_models_take_the_bytes_of_their_tensors() {
    for model in published::all() {
        let directory = tempfile::tempdir().unwrap();
        shapes::write(directory.path(), &model.config, 8);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let plan = Plan::new(&checkpoint, &roomy(), PlanOptions::default()).unwrap();
        assert_eq!(plan.parameters, model.parameters, "{}", model.name);
        let tensors: u64 = checkpoint.catalog.values().map(|tensor| tensor.size().0).sum();
        assert_eq!(tensors, 2 * model.parameters, "{}", model.name);
        let aligned: u64 = checkpoint.catalog.values().map(|tensor| tensor.size().0.next_multiple_of(ALIGNMENT)).sum();
        let planned: u64 = plan.modules.iter().map(|module| module.weights.0).sum();
        assert_eq!(planned, aligned, "{}", model.name);
    }
}

#[test]
fn measured_bytes_are_the_planned_ones_in_every_family() {
    for (name, _) in FIXTURES {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let block = format!("{}.1", ModuleTree::new(&checkpoint.config).blocks);
        for scheme in Scheme::ALL {
            for (map, context) in
                [(format!(r#"{{"": "cpu", "{block}": "disk"}}"#), 100), (r#"{"": "disk"}"#.to_owned(), 33)]
            {
                let options = PlanOptions {
                    quantize: Some(scheme.into()),
                    context: Some(context),
                    device_map: Some(DeviceMap::parse("map.json", map.clone().into()).unwrap()),
                    ..PlanOptions::default()
                };
                let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
                let model = load_plan(&plan).unwrap();
                for device in &model.report.devices {
                    assert_eq!(device.planned, device.measured, "{name} {scheme} {map}: {}", device.id);
                }
            }
        }
    }
}

#[test]
fn maps_use_the_names_of_their_family() {
    let on = |name: &str, map: &str| {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let device_map = Some(DeviceMap::parse("map.json", map.into()).unwrap());
        let quantize = Some(Scheme::Int4.into());
        let plan = Plan::new(&checkpoint, &roomy(), &PlanOptions { device_map, quantize, ..PlanOptions::default() });
        plan.map(|plan| plan.device_map()).map_err(|error| format!("{error} {:?}", error.hints()))
    };
    let gpt2 = r#"{"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu",
        "transformer.h.0": "cpu", "transformer.h.1": "cpu", "transformer.h.2": "disk", "transformer.ln_f": "disk",
        "lm_head": "cpu"}"#;
    let written = on("parity/gpt2", gpt2).unwrap();
    for line in [r#""transformer.wte": "int8","#, r#""transformer.h.0-1": "cpu","#, r#""transformer.wpe": "cpu","#] {
        assert!(written.contains(line), "{written}");
    }
    assert_eq!(on("parity/gpt2", &written).unwrap(), written);
    let llama = on("parity/gpt2", r#"{"": "cpu", "model.layers.0": "disk"}"#).unwrap_err();
    assert!(llama.contains("places unknown module `model.layers.0`"), "{llama}");
    let beyond = on("parity/gpt2", r#"{"": "cpu", "transformer.h.1-3": "disk"}"#).unwrap_err();
    assert!(beyond.contains("places unknown blocks `transformer.h.1-3`"), "{beyond}");
    let expert = r#"{"": "cpu", "model.layers.1.block_sparse_moe.experts.2": "disk"}"#;
    assert!(on("parity/mixtral", expert).unwrap_err().contains("splits `model.layers.1`"));
    let parted = r#"{"": "cpu", "transformer.wte": "disk", "lm_head": "cpu"}"#;
    let parted = on("parity/gpt2", parted).unwrap_err();
    assert!(parted.contains("puts `lm_head` on cpu and `transformer.wte` on disk"), "{parted}");
}

/// A fixture in one file, its tensors renamed by `rename`, and `extra` ones beside them.
fn rewritten(name: &str, rename: impl Fn(&str) -> String, extra: &[(&str, &[usize])]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut shards = Vec::new();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            shards.push(fs::read(path).unwrap());
        } else if path.extension().is_some_and(|extension| extension == "json")
            && !path.ends_with("model.safetensors.index.json")
        {
            fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let shards: Vec<_> = shards.iter().map(|shard| SafeTensors::deserialize(shard).unwrap()).collect();
    let mut tensors: BTreeMap<String, TensorView> =
        shards.iter().flat_map(SafeTensors::iter).map(|(name, view)| (rename(name), view)).collect();
    let zeros = vec![0; 4 * 128 * 128];
    for (name, shape) in extra {
        let len = 4 * shape.iter().product::<usize>();
        let view = TensorView::new(Dtype::F32, shape.to_vec(), &zeros[..len]).unwrap();
        tensors.insert((*name).to_owned(), view);
    }
    safetensors::serialize_to_file(tensors, None, &directory.path().join("model.safetensors")).unwrap();
    directory
}

#[test]
fn names_without_the_base_model_and_tensors_that_nobody_reads() {
    let bare = |base: &'static str| move |name: &str| name.strip_prefix(base).unwrap_or(name).to_owned();
    let masks: &[(&str, &[usize])] = &[("h.0.attn.bias", &[1, 1, 128, 128]), ("h.2.attn.masked_bias", &[])];
    for (name, directory) in [
        ("parity/gpt2", rewritten("parity/gpt2", bare("transformer."), masks)),
        (
            "parity/qwen2",
            rewritten("parity/qwen2", bare("model."), &[("layers.1.self_attn.rotary_emb.inv_freq", &[8])]),
        ),
    ] {
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let options = PlanOptions { kv_cache: Some(KvDtype::F32), ..PlanOptions::default() };
        let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
        let mut model = load_plan(&plan).unwrap();
        let expected = expected(name);
        let (tokens, wanted): (Vec<u32>, Vec<f32>) =
            (numbers(&expected["input_ids"]), numbers(&expected["prompt_logits_last"]));
        let mut last = Vec::new();
        model.score(&tokens, |_, logits| last = logits.to_vec()).unwrap();
        let difference = last.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-3, "{name}: {difference}");
    }
    let directory = rewritten("parity/gpt2", bare("transformer."), &[("h.0.crossattention.bias", &[4])]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    Plan::new(&checkpoint, &roomy(), PlanOptions::default()).unwrap();
    assert_eq!(checkpoint.unused_tensors(), ["h.0.crossattention.bias"]);
}

#[test]
fn biases_are_where_the_configuration_says() {
    let biases = |architecture: &str, more: &str| -> Vec<String> {
        let config = format!(
            r#"{{"architectures": ["{architecture}"], "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320,
                "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 128 {more}}}"#
        );
        let tree = ModuleTree::new(&ModelConfig::parse("config.json", config.into()).unwrap());
        let shape = |parameter: &Parameter| format!("{} {:?}", parameter.tensor(), parameter.shape());
        let biases = tree.parameters().filter(|(_, parameter)| parameter.part == Part::Bias);
        biases.map(|(_, parameter)| shape(parameter)).collect()
    };
    let none: [&str; 0] = [];
    assert_eq!(biases("LlamaForCausalLM", ""), none);
    assert_eq!(
        biases("LlamaForCausalLM", r#", "attention_bias": true, "mlp_bias": true, "num_key_value_heads": 2"#),
        [
            "model.layers.0.self_attn.q_proj.bias [64]",
            "model.layers.0.self_attn.k_proj.bias [32]",
            "model.layers.0.self_attn.v_proj.bias [32]",
            "model.layers.0.self_attn.o_proj.bias [64]",
            "model.layers.0.mlp.gate_proj.bias [128]",
            "model.layers.0.mlp.up_proj.bias [128]",
            "model.layers.0.mlp.down_proj.bias [64]",
        ]
    );
    assert_eq!(biases("Qwen2ForCausalLM", r#", "attention_bias": false"#).len(), 3);
    assert_eq!(
        biases("GPT2LMHeadModel", ""),
        [
            "transformer.h.0.ln_1.bias [64]",
            "transformer.h.0.attn.c_attn.bias [192]",
            "transformer.h.0.attn.c_proj.bias [64]",
            "transformer.h.0.ln_2.bias [64]",
            "transformer.h.0.mlp.c_fc.bias [256]",
            "transformer.h.0.mlp.c_proj.bias [64]",
            "transformer.ln_f.bias [64]",
        ]
    );
}

#[test]
fn no_value_of_a_configuration_is_too_odd_to_be_read_or_refused() {
    let odd = [
        json!(null),
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(-1),
        json!(0.3),
        json!(1e99),
        json!(1 << 20),
        json!(u64::MAX),
        json!(true),
        json!(false),
        json!(""),
        json!("gelu"),
        json!([]),
        json!([1, 2]),
        json!({}),
        json!({"rope_type": "yarn"}),
        json!({"type": "longrope", "short_factor": [], "long_factor": []}),
        json!({"full_attention": {}, "sliding_attention": {"rope_type": "llama3", "factor": 0.1}}),
    ];
    let (mut read, mut refused) = (0, 0);
    for (name, _) in FIXTURES {
        let config: Value = serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
        let more =
            ["rope_scaling", "rope_parameters", "partial_rotary_factor", "use_sliding_window"].map(str::to_owned);
        for key in config.as_object().unwrap().keys().chain(&more) {
            for value in &odd {
                let mut config = config.clone();
                config[key] = value.clone();
                match ModelConfig::parse("config.json", config.to_string().into()) {
                    Err(error) => {
                        assert!(error.to_string().starts_with("`config.json`, line "), "{name} {key} {value}: {error}");
                        refused += 1;
                    }
                    Ok(config) => {
                        let tree = ModuleTree::new(&config);
                        assert!(tree.parameters().all(|(_, parameter)| !parameter.shape().is_empty()));
                        let extent = Extent::new(512, 512, 3);
                        assert_eq!(CpuBuffers::sizes(&config, extent).each().count(), 13);
                        assert_eq!(CudaBuffers::sizes(&config, extent).each().count(), 21);
                        config.ropes.iter().for_each(|rope| assert_eq!(rope.frequencies(9).len(), rope.rotary_dim / 2));
                        read += 1;
                    }
                }
            }
        }
    }
    assert!(read > 1000 && refused > 1000, "{read} {refused}");
}
