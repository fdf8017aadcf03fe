//! What Transformers 5.23 chooses, case by case.

#[path = "support/published.rs"]
mod published;

use std::collections::BTreeMap;

use evenkeel::architecture::ModuleTree;
use evenkeel::bytes::{Bytes, GIB};
use evenkeel::device::DeviceId;
use evenkeel::device_map::MaxMemory;
use evenkeel::model_config::ModelConfig;
use evenkeel::plan::Strategy;
use evenkeel::plan::hf::{self, Model, Module, Placement, Tensor};
use evenkeel::quant::{Scheme, WeightDtype};
use indexmap::IndexMap;
use serde_json::{Value, json};

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/planner/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// The elements of a list; none where there is no list.
fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn device(value: &Value) -> DeviceId {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned).parse().unwrap()
}

fn memory(value: &Value) -> MaxMemory {
    let budgets = value.as_object().unwrap().iter();
    budgets.map(|(id, bytes)| (id.parse().unwrap(), Bytes(bytes.as_u64().unwrap()))).collect()
}

fn devices(value: &Value) -> BTreeMap<String, DeviceId> {
    value.as_object().unwrap().iter().map(|(path, id)| (path.clone(), device(id))).collect()
}

/// Planned bytes as the cases give them; those of 4 bits are floats.
fn planned(value: &Value) -> BTreeMap<DeviceId, Bytes> {
    let bytes = |value: &Value| Bytes(value.to_string().trim_end_matches(".0").parse().unwrap());
    value.as_object().unwrap().iter().map(|(id, value)| (id.parse().unwrap(), bytes(value))).collect()
}

fn mode(value: &Value) -> Strategy {
    match text(value) {
        "auto" => Strategy::HfAuto,
        "balanced_low_0" => Strategy::HfBalancedLowZero,
        "sequential" => Strategy::HfSequential,
        other => panic!("{other}"),
    }
}

fn quantization(value: &Value) -> Scheme {
    match text(value) {
        "none" => Scheme::None,
        "bnb int8" => Scheme::Int8,
        "bnb 4bit" => Scheme::Int4,
        other => panic!("{other}"),
    }
}

/// The model of a case: `tree`, `no_split` and `tied` in the fixtures' notation.
fn model(tree: &Value, no_split: &Value, tied: &Value, quantization: Scheme) -> Model {
    let whole: Vec<&str> = list(no_split).iter().map(text).collect();
    let pairs = tied.as_object().unwrap().iter().map(|(target, source)| (target.clone(), text(source).to_owned()));
    Model {
        root: module(tree, "", &whole, quantization),
        ties: pairs.collect(),
        is_quantized: quantization != Scheme::None,
    }
}

fn module(tree: &Value, path: &str, whole: &[&str], quantization: Scheme) -> Module {
    let tensor = |tensor: &Value| {
        let name = text(&tensor[0]);
        let elements: u64 = list(&tensor[1]).iter().map(|size| size.as_u64().unwrap()).product();
        let width = match text(&tensor[2]) {
            "bfloat16" => 2,
            "float32" => 4,
            "int64" => 8,
            other => panic!("{other}"),
        };
        let is_linear = path.contains(".layers.") && path.ends_with("_proj") && name == "weight";
        let bytes = match quantization {
            Scheme::Int4 if is_linear => elements / 2,
            Scheme::Int8 if is_linear => elements,
            _ => elements * width,
        };
        Tensor { name: name.to_owned(), bytes: Bytes(bytes) }
    };
    let mut children = IndexMap::new();
    for child in list(&tree["children"]) {
        let names: Vec<String> = match child["names"].as_str().map(|names| names.split_once("..").unwrap()) {
            Some((first, last)) => {
                (first.parse().unwrap()..=last.parse::<u32>().unwrap()).map(|n| n.to_string()).collect()
            }
            None => vec![text(&child["name"]).to_owned()],
        };
        for name in names {
            let tree = module(&child["module"], &format!("{path}.{name}"), whole, quantization);
            children.insert(name, tree);
        }
    }
    Module {
        is_whole: tree["class"].as_str().is_some_and(|class| whole.contains(&class)),
        parameters: list(&tree["params"]).iter().map(tensor).collect(),
        buffers: list(&tree["buffers"]).iter().map(tensor).collect(),
        children,
    }
}

fn free(gpus: &[u64], cpu: u64) -> MaxMemory {
    let gpus = (0..).zip(gpus).map(|(index, bytes)| (DeviceId::Cuda(index), Bytes(*bytes)));
    gpus.chain([(DeviceId::Cpu, Bytes(cpu))]).collect()
}

/// Runs a case of `_get_device_map` for `model`.
fn place(case: &Value, model: &Model) -> evenkeel::Result<Placement> {
    let gpus: Vec<u64> = list(&case["free_bytes"]).iter().map(|bytes| bytes.as_u64().unwrap()).collect();
    let user = &case["user_max_memory"];
    let user = (!user.is_null()).then(|| memory(user));
    hf::place(model, &free(&gpus, case["cpu_available"].as_u64().unwrap()), user.as_ref(), mode(&case["mode"]))
}

#[test]
fn maps_of_large_models() {
    let cases = fixture("hf_cases.json");
    for case in list(&cases["hf_auto"]) {
        let llm = &cases["llm_models"][text(&case["model_ref"])];
        let model = model(&llm["tree"], &llm["no_split"], &llm["tied"], quantization(&case["quant"]));
        let placement = place(case, &model).unwrap();
        assert_eq!(placement.device_map, devices(&case["expected"]), "{}", case["id"]);
        assert_eq!(placement.planned, planned(&case["planned_bytes"]), "{}", case["id"]);
    }
    assert_eq!(list(&cases["hf_auto"]).len(), 8);
}

/// Trees and memory by chance, run through the source of Transformers 5.23.
#[test]
fn generated_cases() {
    let cases = fixture("hf_generated.json");
    for case in list(&cases["cases"]) {
        let quantization = case.get("quant").map_or(Scheme::None, quantization);
        let model = model(&case["tree"], &case["no_split"], &case["tied"], quantization);
        let placement = match text(&case["fn"]) {
            "infer_auto_device_map" => hf::infer_auto_device_map(&model, &memory(&case["max_memory"])),
            _ => place(case, &model),
        };
        if case["expected"].is_string() {
            assert!(placement.is_err(), "{case}");
            continue;
        }
        let placement = placement.unwrap_or_else(|error| panic!("{error}: {case}"));
        assert_eq!(placement.device_map, devices(&case["expected"]), "{case}");
        assert_eq!(placement.planned, planned(&case["planned_bytes"]), "{case}");
    }
    assert!(list(&cases["cases"]).len() >= 150);
}

#[test]
fn maps_are_cleaned() {
    let cases = fixture("hf_cases.json");
    let mut count = 0;
    for case in list(&cases["cases"]).iter().filter(|case| case["fn"] == "clean_device_map") {
        let mut map = devices(&case["args"]["device_map"]);
        hf::clean_device_map(&mut map, "");
        assert_eq!(map, devices(&case["expected"]), "{}", case["id"]);
        count += 1;
    }
    assert_eq!(count, 3);
}

#[test]
fn a_key_ends_at_a_dot() {
    let cases = fixture("hf_cases.json");
    let case = list(&cases["cases"]).iter().find(|case| case["id"] == "load-unlisted").unwrap();
    let placement = Placement { device_map: devices(&case["args"]["device_map"]), planned: BTreeMap::new() };
    for (path, expected) in devices(&case["expected"]) {
        assert_eq!(placement.device_of(&path), Some(expected), "{path}");
    }
}

/// Sizes mean what they mean to Accelerate, except those that are refused
/// because `b` would mean bits, and those that only evenkeel knows.
#[test]
fn sizes_mean_the_same() {
    let cases = fixture("hf_cases.json");
    let mut count = 0;
    for case in list(&cases["cases"]).iter().filter(|case| case["fn"] == "convert_file_size_to_int") {
        let size = &case["args"]["size"];
        let ours = size.as_str().map_or_else(|| size.to_string(), str::to_owned).parse::<Bytes>();
        let expected = match size.as_str() {
            Some("10Gb" | "1.5gb") => None,
            Some("7") => Some(7),
            Some("1TB") => Some(1_000_000_000_000),
            Some("1TiB") => Some(1024 * GIB),
            _ => case["expected"].as_u64(),
        };
        assert_eq!(ours.ok(), expected.map(Bytes), "{size}");
        count += 1;
    }
    assert_eq!(count, 24);
}

/// Model, quantization, mode, free GiB of the GPUs, the user's budgets in GiB,
/// planned bytes and the last layer of every device that is used.
const LARGE_MODELS: &str = "
llama-2-13b  | bnb int8 | auto           | 24 6        |          | 0:6037544960 1:5709864960 cpu:1596549632                | 17 35 39
llama-2-13b  | bnb int8 | sequential     | 24 6        |          | 0:13343959552                                           | 39
llama-2-13b  | none     | auto           | 22 10       |          | 0:13015859200 1:10150543360 cpu:2865326592              | 19 35 39
llama-2-13b  | none     | sequential     | 22 10       |          | 0:22531993600 1:3499735552                              | 34 39
llama-3-8b   | none     | auto           | 80 80 80 80 |          | 0:4104241152 1:5234688000 2:5234688000 3:1486905856     | 6 18 30 31
llama-3-8b   | none     | balanced_low_0 | 11 11       |          | 0:2795569152 1:11778048000 cpu:1486905856               | 3 30 31
llama-3-70b  | bnb 4bit | auto           | 24 24       |          | 0:17504010240 1:20926841344                             | 35 79
llama-3-70b  | bnb 4bit | auto           | 24 24 12    |          | 0:11514085376 1:13691256832 2:11124163072 cpu:2101346304 | 21 53 79 79
llama-2-7b   | bnb int8 | auto           | 8           |          | 0:6536282112 cpu:464544256                              | 30 31
llama-3-8b   | bnb 4bit | auto           | 6           |          | 0:4104585216 cpu:1486955008                             | 27 31
llama-3-8b   | bnb 4bit | auto           | 8           |          | 0:5591540224                                            | 31
mixtral-8x7b | bnb 4bit | auto           | 48          |          | 0:37177278464 cpu:54215041536                           | 12 31
llama-2-7b   | bnb int8 | auto           | 24          | 0:6 cpu:30 | 0:5524324352 cpu:1476502016                            | 25 31
qwen2.5-0.5b | none     | auto           | 1           |          | 0:928414208 cpu:59651584                                | 21 23
";

#[test]
fn placements_of_large_models() {
    let mut models = fixture("hf_cases.json")["llm_models"].take();
    models["mixtral-8x7b"] = mixtral();
    let memory = |text: &str, unit: u64| -> MaxMemory {
        let pairs = text.split_whitespace().map(|pair| pair.split_once(':').unwrap());
        pairs.map(|(id, number)| (id.parse().unwrap(), Bytes(number.parse::<u64>().unwrap() * unit))).collect()
    };
    let numbers = |text: &str| -> Vec<u64> { text.split_whitespace().map(|number| number.parse().unwrap()).collect() };
    for row in LARGE_MODELS.trim().lines() {
        let fields: Vec<&str> = row.split('|').map(str::trim).collect();
        let [name, quantization, mode, gpus, user, planned, last_layers] = fields[..] else { panic!("{row}") };
        let llm = &models[name];
        let model = model(&llm["tree"], &llm["no_split"], &llm["tied"], self::quantization(&quantization.into()));
        let gpus: Vec<u64> = numbers(gpus).iter().map(|gibibytes| gibibytes * GIB).collect();
        let user = memory(user, GIB);
        let user = (!user.is_empty()).then_some(&user);
        let placement = hf::place(&model, &free(&gpus, 256 * GIB), user, self::mode(&mode.into())).unwrap();
        assert_eq!(placement.planned, memory(planned, 1), "{row}");
        let mut layer = 0;
        for (id, last) in placement.planned.keys().zip(numbers(last_layers)) {
            while layer <= last {
                assert_eq!(placement.device_of(&format!("model.layers.{layer}")), Some(*id), "{layer}: {row}");
                layer += 1;
            }
        }
        let is_beyond = |key: &&String| **key == format!("model.layers.{layer}");
        assert_eq!(placement.device_map.keys().find(is_beyond), None, "{row}");
    }
}

/// Mixtral-8x7B, whose experts are raw parameters that bitsandbytes leaves as they are.
fn mixtral() -> Value {
    let weight = |rows: u64, cols: u64| json!({"params": [["weight", [rows, cols], "bfloat16"]]});
    let norm = || json!({"params": [["weight", [4096], "bfloat16"]]});
    let experts = json!({"params": [["gate_up_proj", [8, 28_672, 4096], "bfloat16"], ["down_proj", [8, 4096, 14_336], "bfloat16"]]});
    let attention = [("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", 4096)]
        .map(|(name, rows)| json!({"name": name, "module": weight(rows, 4096)}));
    let layer = json!({"class": "MixtralDecoderLayer", "children": [
        {"name": "self_attn", "module": {"children": attention}},
        {"name": "mlp", "module": {"children": [{"name": "gate", "module": weight(8, 4096)}, {"name": "experts", "module": experts}]}},
        {"name": "input_layernorm", "module": norm()},
        {"name": "post_attention_layernorm", "module": norm()},
    ]});
    let frequencies = json!([["inv_freq", [64], "float32"], ["original_inv_freq", [64], "float32"]]);
    let base = json!({"children": [
        {"name": "embed_tokens", "module": weight(32_000, 4096)},
        {"name": "layers", "module": {"children": [{"names": "0..31", "module": layer}]}},
        {"name": "norm", "module": norm()},
        {"name": "rotary_emb", "module": {"buffers": frequencies}},
    ]});
    let tree =
        json!({"children": [{"name": "model", "module": base}, {"name": "lm_head", "module": weight(32_000, 4096)}]});
    json!({"tree": tree, "no_split": ["MixtralDecoderLayer"], "tied": {}})
}

fn parse(config: &Value) -> ModelConfig {
    ModelConfig::parse("config.json", config.to_string().into()).unwrap()
}

fn qwen2_half_billion() -> ModelConfig {
    parse(&json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": true,
    }))
}

fn mixtral_8x7b() -> ModelConfig {
    parse(&json!({
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
        "num_local_experts": 8,
    }))
}

/// The configuration of a Llama.
fn llama(
    hidden: u64,
    feed_forward: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    vocabulary: u64,
    is_tied: bool,
) -> ModelConfig {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": feed_forward,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary, "tie_word_embeddings": is_tied, "torch_dtype": "bfloat16",
    });
    parse(&config)
}

#[test]
fn an_architecture_is_counted_as_its_modules_are() {
    let models = &fixture("hf_cases.json")["llm_models"];
    for (name, config) in [
        ("llama-2-7b", llama(4096, 11_008, 32, 32, 32, 32_000, false)),
        ("llama-2-13b", llama(5120, 13_824, 40, 40, 40, 32_000, false)),
        ("llama-3-8b", llama(4096, 14_336, 32, 32, 8, 128_256, false)),
        ("llama-3-70b", llama(8192, 28_672, 80, 64, 8, 128_256, false)),
        ("qwen2.5-0.5b", qwen2_half_billion()),
        ("mixtral", mixtral_8x7b()),
    ] {
        let llm = if name == "mixtral" { &mixtral() } else { &models[name] };
        for quantization in [Scheme::None, Scheme::Int8, Scheme::Int4] {
            let expected = model(&llm["tree"], &llm["no_split"], &llm["tied"], quantization);
            let ours = hf::tree_of(&config, &ModuleTree::new(&config), WeightDtype::Bf16, quantization);
            for gpus in [&[8, 24][..], &[16], &[40, 12, 12], &[48; 4], &[]] {
                let gpus: Vec<u64> = gpus.iter().map(|gibibytes| gibibytes * GIB).collect();
                for mode in [Strategy::HfAuto, Strategy::HfBalancedLowZero, Strategy::HfSequential] {
                    let free = free(&gpus, 20 * GIB);
                    let place = |model| hf::place(model, &free, None, mode).unwrap();
                    assert_eq!(place(&ours), place(&expected), "{name} {quantization:?} {mode:?} on {gpus:?}");
                }
            }
        }
    }
}

#[test]
fn a_tied_head_goes_where_the_embedding_is() {
    let config = llama(64, 128, 4, 4, 2, 1000, true);
    let model = hf::tree_of(&config, &ModuleTree::new(&config), WeightDtype::F32, Scheme::None);
    let embedding = 1000 * 64 * 4;
    let layer = (64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64 + 2 * 64) * 4;
    let total = embedding + 4 * layer + 64 * 4 + 2 * 8 * 4;
    let place = |gpu: u64| hf::place(&model, &free(&[gpu], 1 << 30), None, Strategy::HfSequential).unwrap();
    assert_eq!(place(1 << 30).planned, [(DeviceId::Cuda(0), Bytes(total))].into());
    let split = place(embedding + 3 * layer);
    assert_eq!(
        split.planned,
        [(DeviceId::Cuda(0), Bytes(embedding + 2 * layer)), (DeviceId::Cpu, Bytes(total - embedding - 2 * layer))]
            .into()
    );
    assert_eq!(split.device_of("lm_head"), Some(DeviceId::Cuda(0)));
    assert_eq!(split.device_of("model.rotary_emb"), Some(DeviceId::Cpu));
}

/// The free memory, in hundredths of GiB, from which Transformers 5.23 keeps a
/// model whole on one GPU: unquantized, in 8 bits, in 4 bits.
const SMALLEST_GPU: [(&str, [u64; 3]); 6] = [
    ("gemma-2-2b", [541, 368, 252]),
    ("Mistral-7B-v0.1", [1499, 863, 462]),
    ("Mixtral-8x7B-v0.1", [9666, 10_585, 10_508]),
    ("Phi-3-mini-4k-instruct", [791, 462, 254]),
    ("Qwen2.5-0.5B", [102, 72, 52]),
    ("Qwen2.5-7B", [1576, 1001, 626]),
];

#[test]
fn models_of_all_families_need_the_gpu_that_transformers_wants_for_them() {
    let gemma = json!({
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256_000,
    });
    for (name, wanted) in SMALLEST_GPU {
        let config = match name {
            "gemma-2-2b" => parse(&gemma),
            "Qwen2.5-0.5B" => qwen2_half_billion(),
            _ => parse(&published::all().into_iter().find(|model| model.name == name).unwrap().config),
        };
        let tree = ModuleTree::new(&config);
        let quantizations = [Scheme::None, Scheme::Int8, Scheme::Int4];
        for (quantization, wanted) in quantizations.into_iter().zip(wanted) {
            let model = hf::tree_of(&config, &tree, WeightDtype::Bf16, quantization);
            let is_whole = |hundredths: u64| {
                let placement =
                    hf::place(&model, &free(&[hundredths * GIB / 100], 1 << 40), None, Strategy::HfAuto).unwrap();
                placement.device_map == [(String::new(), DeviceId::Cuda(0))].into()
            };
            assert!(!is_whole(wanted - 1) && is_whole(wanted + 1), "{name} {quantization:?}");
        }
    }
}
