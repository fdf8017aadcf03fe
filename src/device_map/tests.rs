use proptest::prelude::*;

use super::*;
use crate::architecture::ModuleTree;
use crate::model_config::ModelConfig;
use crate::quant::Scheme;

fn tree(tied: bool) -> ModuleTree {
    let config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
            "tie_word_embeddings": {tied}}}"#
    );
    ModuleTree::new(&ModelConfig::parse("config.json", config.into()).unwrap())
}

fn resolve(json: &str, tied: bool) -> Result<Vec<String>> {
    let devices = DeviceMap::parse("map.json", json.as_bytes().to_vec())?.resolve(&tree(tied))?;
    Ok(devices.iter().map(ToString::to_string).collect())
}

/// The whole chain of an error in a line.
fn refused(json: &str, tied: bool) -> String {
    let error = resolve(json, tied).expect_err(json);
    let cause = std::error::Error::source(&error).map(|cause| format!(" | {cause}")).unwrap_or_default();
    let hint = error.hints().first().map(|hint| format!(" | {hint}")).unwrap_or_default();
    format!("{error}{cause}{hint}")
}

#[test]
fn a_dictionary_of_hugging_face() {
    let devices = resolve(r#"{"model.embed_tokens": 0, "model.layers": "cuda:1", "model.layers.1": "cpu", "model.norm": "disk", "model.rotary_emb": 0, "lm_head": "cpu"}"#, false).unwrap();
    assert_eq!(devices[0], "cuda:0");
    assert_eq!(&devices[1..4], ["cuda:1", "cpu", "cuda:1"]);
    assert_eq!(devices[11], "cuda:1", "layers.1 does not catch layers.10");
    assert_eq!(&devices[13..], ["disk", "cpu"]);
    assert_eq!(resolve(r#"{"": 0}"#, false).unwrap(), vec!["cuda:0"; 15]);
}

#[test]
fn parts_of_a_block_may_be_named_if_they_stay_together() {
    let map = |device| format!(r#"{{"": "cpu", "model.layers.3.mlp": "{device}"}}"#);
    assert_eq!(resolve(&map("cpu"), false).unwrap(), vec!["cpu"; 15]);
    assert_eq!(
        refused(&map("disk"), false),
        "device map `map.json` splits `model.layers.3` between cpu and disk | line 1, column 13: a block is placed whole"
    );
}

#[test]
fn a_tied_head_goes_with_its_embedding() {
    assert_eq!(resolve(r#"{"model": "disk"}"#, true).unwrap()[14], "disk");
    assert_eq!(resolve(r#"{"model": "disk", "lm_head": "disk"}"#, true).unwrap()[14], "disk");
    assert_eq!(
        refused(r#"{"model": 0, "lm_head": "cpu"}"#, true),
        "device map `map.json` puts `lm_head` on cpu and `model.embed_tokens` on cuda:0 | line 1, column 14: the model ties them: they share one copy of their weights"
    );
}

#[test]
fn our_form_carries_its_conditions() {
    let json = r#"{
      "schema_version": 1, "model": "m", "quantize": {"": "int4", "lm_head": "int8"}, "context": 8192, "batch": 2,
      "max_memory": {"cuda:0": "10GiB", "cpu": 1024},
      "device_map": {"model.embed_tokens": "cuda:0", "model.layers.0-9": "cuda:0", "model.layers.10-11": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    }"#;
    let map = DeviceMap::parse("map.json", json.as_bytes().to_vec()).unwrap();
    assert_eq!((map.context, map.batch), (Some(8192), Some(2)));
    assert_eq!(map.max_memory.as_ref().unwrap()[&DeviceId::Cuda(0)], Bytes(10 << 30));
    assert_eq!(map.quantize.as_ref().unwrap().scheme("lm_head"), Scheme::Int8);
    let devices = map.resolve(&tree(false)).unwrap();
    assert_eq!(devices[10], DeviceId::Cuda(0));
    assert_eq!(devices[11], DeviceId::Cpu);
}

fn conditions(scheme: Scheme, context: usize) -> DeviceMap {
    let (model, quantize) = (Some("m".to_owned()), Some(QuantizeRules::whole_model(scheme)));
    DeviceMap { model, quantize, context: Some(context), batch: Some(1), ..DeviceMap::default() }
}

#[test]
fn what_is_written_reads_back_the_same() {
    let tree = tree(false);
    let mut devices = vec![DeviceId::Cuda(0); 15];
    devices[5..9].fill(DeviceId::Cpu);
    devices[9..].fill(DeviceId::Disk);
    let budgets: MaxMemory = [(DeviceId::Cpu, Bytes(3 << 30)), (DeviceId::Cuda(0), Bytes(1000))].into();
    for kv_cache in KvDtype::ALL {
        let (kv_cache, max_memory) = (Some(kv_cache), Some(budgets.clone()));
        let json = DeviceMap { kv_cache, max_memory, ..conditions(Scheme::Int4, 4096) }.to_json(&tree, &devices);
        let map = DeviceMap::parse("map.json", json.clone().into_bytes()).unwrap();
        assert_eq!(map.resolve(&tree).unwrap(), devices);
        assert_eq!(map.max_memory.as_ref(), Some(&budgets));
        assert_eq!(map.kv_cache.unwrap_or_default(), kv_cache.unwrap());
        assert_eq!(map.to_json(&tree, &devices), json);
        assert!(json.contains(r#""model.layers.4-7": "cpu""#), "{json}");
    }
}

#[test]
fn hugging_face_gets_every_module_by_itself() {
    let tree = tree(false);
    let mut devices = vec![DeviceId::Cuda(0); 15];
    devices[9..].fill(DeviceId::Disk);
    let json = to_hugging_face(&tree, &devices);
    let plain: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(plain.len(), 16);
    assert_eq!((&plain["model.layers.7"], &plain["model.layers.8"]), (&0.into(), &"disk".into()));
    assert_eq!(plain["model.rotary_emb"], 0);
    assert_eq!(DeviceMap::parse("map.json", json.into_bytes()).unwrap().resolve(&tree).unwrap(), devices);
}

#[test]
fn what_is_wrong_is_named_with_its_place() {
    for (json, message) in [
        (
            r#"{"model.layer.3": 0, "": "cpu"}"#,
            "device map `map.json` places unknown module `model.layer.3` | line 1, column 2: the model has no such module | did you mean `model.layers.3`?",
        ),
        (
            r#"{"transformer.h.0": 0}"#,
            "device map `map.json` places unknown module `transformer.h.0` | line 1, column 2: the model has no such module | saving a plan writes a map with this model's own names",
        ),
        (
            r#"{"model.layers.12": 0, "": 0}"#,
            "device map `map.json` places unknown module `model.layers.12` | line 1, column 2: the model has no such module | did you mean `model.layers.1`?",
        ),
        (
            r#"{"": 0, "model.layers.3-12": 1}"#,
            "device map `map.json` places unknown blocks `model.layers.3-12` | line 1, column 9: the model has the blocks 0 to 11",
        ),
        (
            r#"{"": 0, "model.layers.3-5": 1, "model.layers.5": 0}"#,
            "device map `map.json` places `model.layers.5` twice | line 1, column 32: an earlier entry places it already",
        ),
        (
            r#"{"model.layers": 0, "lm_head": 0, "model.norm": 1}"#,
            "device map `map.json` leaves out 1 module: `model.embed_tokens` | `\"\": \"cpu\"` catches all that no longer path places; saving a plan writes a whole map",
        ),
        (
            r#"{"": 0, "model": 0, "lm_head": 1}"#,
            "device map `map.json` has an entry `` that places nothing | line 1, column 2: longer paths take all of its modules",
        ),
        (r#"{"": 0, "": 1}"#, "`map.json`, line 1, column 9: `` stands twice in this object"),
        (
            r#"{"": "gpu0"}"#,
            "`map.json`, line 1, column 6: `gpu0` is not a device; devices are `cuda:0`, `cuda:1`, …, `cpu` and `disk`",
        ),
        (r#"{"": -1}"#, "`map.json`, line 1, column 6: a whole number, 0 or more, is wanted here, not -1"),
        (r#"{"": 1.5}"#, "`map.json`, line 1, column 6: a whole number, 0 or more, is wanted here, not 1.5"),
        (r#"{"": null}"#, "`map.json`, line 1, column 6: a whole number, 0 or more, is wanted here, not null"),
        ("{}", "`map.json`, line 1, column 1: the device map is empty"),
        (
            r#"{"schema_version": 2, "device_map": {"": 0}}"#,
            "`map.json`, line 1, column 20: schema_version 2 is not known; 1 is",
        ),
        (
            r#"{"schema_version": 1, "devicemap": {"": 0}}"#,
            "`map.json`, line 1, column 23: `devicemap` is no key of a device map | did you mean `device_map`?",
        ),
        (r#"{"schema_version": 1}"#, "`map.json`, line 1, column 1: `device_map` is missing"),
        (
            r#"{"context": 0, "device_map": {"": 0}}"#,
            "`map.json`, line 1, column 13: `context` is 0; it must be from 1 to 268435456",
        ),
        (
            r#"{"quantize": "int3", "device_map": {"": 0}}"#,
            "`map.json`, line 1, column 14: `int3` is not a scheme; there are `none`, `int8`, `int4` and `nl4`",
        ),
        (
            r#"{"max_memory": {"cpu": "7B"}, "device_map": {"": 0}}"#,
            "`map.json`, line 1, column 24: `7B` is not a size; write it like `10GiB`, `512MiB`, `10GB` or as a number of bytes",
        ),
    ] {
        assert_eq!(refused(json, false), message);
    }
}

#[test]
fn many_entries_are_held_against_many_modules_in_time() {
    let config = r#"{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "moe_intermediate_size": 64, "num_hidden_layers": 100, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 320, "num_experts": 1000, "num_experts_per_tok": 8, "norm_topk_prob": true}"#;
    let tree = ModuleTree::new(&ModelConfig::parse("config.json", config.into()).unwrap());
    let experts = (0..40_000).map(|at| format!("\n\"model.layers.{}.mlp.experts.{}\": \"cpu\"", at / 1000, at % 1000));
    let json = format!("{{\"\": 0, \"model.layers\": \"cpu\",{}}}", experts.collect::<Vec<_>>().join(","));
    let begun = std::time::Instant::now();
    let devices = DeviceMap::parse("map.json", json.into_bytes()).unwrap().resolve(&tree).unwrap();
    assert_eq!((devices[0], devices[50], devices[101]), (DeviceId::Cuda(0), DeviceId::Cpu, DeviceId::Cuda(0)));
    // Less than one; it was minutes where each entry was held against each module.
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
}

proptest! {
    #[test]
    fn any_placement_survives_being_written(devices in prop::collection::vec(0u32..5, 15), context in 1usize..9999) {
        let device = |index: u32| match index {
            3 => DeviceId::Cpu,
            4 => DeviceId::Disk,
            gpu => DeviceId::Cuda(gpu),
        };
        let devices: Vec<_> = devices.into_iter().map(device).collect();
        let (tree, conditions) = (tree(false), conditions(Scheme::Int8, context));
        let json = conditions.to_json(&tree, &devices);
        let map = DeviceMap::parse("map.json", json.into_bytes()).unwrap();
        prop_assert_eq!(map.resolve(&tree).unwrap(), devices);
        prop_assert_eq!((map.context, map.quantize), (conditions.context, conditions.quantize));
    }

    #[test]
    fn no_text_makes_the_reader_panic(json in "[{}\\[\\]\":,a-z0-9. -]{0,60}") {
        if let Ok(map) = DeviceMap::parse("map.json", json.into_bytes()) {
            let _ = map.resolve(&tree(true));
        }
    }
}
