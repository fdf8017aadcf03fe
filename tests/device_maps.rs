//! The maps that are checked in, and their schema.

#[path = "support/command.rs"]
mod command;
#[path = "support/published.rs"]
mod published;
#[path = "support/shapes.rs"]
mod shapes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use boon::{Compiler, Schemas};
use command::{run, stderr};
use evenkeel::device_map::DeviceMap;
use serde_json::{Value, json};

/// Model, scheme, context, and the GiB of each GPU; the file is named after them.
const MAPS: &[(&str, &str, &str, &[u32])] = &[
    ("Llama-3.1-8B", "none", "8192", &[24]),
    ("Llama-3.1-8B", "int8", "32768", &[12, 12]),
    ("Llama-3.1-8B", "int4", "16384", &[8, 6]),
    ("Llama-3.3-70B-Instruct", "int4", "8192", &[24, 24]),
    ("Llama-3.3-70B-Instruct", "int8", "8192", &[24, 24, 24, 24]),
    ("Llama-3.3-70B-Instruct", "int8", "8192", &[80]),
    ("Mistral-7B-v0.1", "int8", "8192", &[12]),
    ("Mixtral-8x7B-v0.1", "int4", "16384", &[16, 16]),
    ("OLMo-2-1124-7B", "int8", "4096", &[8, 6]),
    ("Phi-3-mini-4k-instruct", "int4", "4096", &[6]),
    ("Qwen2.5-7B", "int8", "32768", &[12, 8]),
    ("Qwen3-235B-A22B", "int4", "16384", &[24, 24, 24, 24, 24, 24, 24, 24]),
    ("Qwen3-30B-A3B", "int4", "16384", &[24]),
    ("Qwen3-8B", "int4", "8192", &[8]),
    ("gemma-2-27b", "int4", "8192", &[24]),
    ("granite-3.0-8b-base", "int8", "4096", &[6, 6]),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("device_maps")
}

fn shape(model: &str) -> Value {
    let published = || published::all().into_iter().find(|published| published.name == model).unwrap().config;
    match model {
        "Llama-3.1-8B" => shapes::llama_8b(),
        "Llama-3.3-70B-Instruct" => shapes::llama_70b(),
        "Qwen3-235B-A22B" => shapes::qwen3_235b(),
        _ => published(),
    }
}

/// A map of the table.
struct Map {
    path: PathBuf,
    model: &'static str,
    conditions: [&'static str; 4],
    devices: Vec<String>,
}

fn maps() -> Vec<Map> {
    let map = |(model, scheme, context, gpus): &(&'static str, &'static str, &'static str, &[u32])| {
        let same = gpus.iter().all(|gpu| gpu == &gpus[0]);
        let gpus_text: Vec<_> = gpus.iter().map(u32::to_string).collect();
        let on = if same { format!("{}x{}GiB", gpus.len(), gpus[0]) } else { format!("{}GiB", gpus_text.join("+")) };
        let device = |(index, gib): (usize, &u32)| ["--device".to_owned(), format!("cuda:{index}={gib}GiB")];
        Map {
            path: folder().join(model).join(format!("{scheme}-{on}.json")),
            model,
            conditions: ["--quantize", scheme, "--context", context],
            devices: gpus.iter().enumerate().flat_map(device).collect(),
        }
    };
    MAPS.iter().map(map).collect()
}

/// Directories with the headers of every model of the table.
fn models(directory: &Path) -> BTreeMap<&'static str, String> {
    let names: BTreeSet<_> = MAPS.iter().map(|map| map.0).collect();
    let write = |name: &'static str| {
        let model = directory.join(name);
        fs::create_dir(&model).unwrap();
        shapes::write(&model, &shape(name), 8);
        (name, model.to_str().unwrap().to_owned())
    };
    names.into_iter().map(write).collect()
}

fn plan(model: &str, arguments: &[&str], devices: &[String]) -> std::process::Output {
    let devices: Vec<&str> = devices.iter().map(String::as_str).collect();
    run(&[&["plan", model], arguments, &devices].concat())
}

/// `cargo test --test device_maps -- --ignored` writes the maps afresh.
#[test]
#[ignore = "it writes the maps that the other tests check"]
fn write_the_maps() {
    let directory = tempfile::tempdir().unwrap();
    let models = models(directory.path());
    for map in maps() {
        fs::create_dir_all(map.path.parent().unwrap()).unwrap();
        let output = ["--output", map.path.to_str().unwrap(), "--force"];
        let written = plan(&models[map.model], &[&map.conditions[..], &output].concat(), &map.devices);
        assert_eq!(written.status.code(), Some(0), "{:?}: {}", map.path, stderr(&written));
    }
}

#[test]
fn maps_fit_their_models_and_devices_and_are_what_the_planner_writes() {
    let directory = tempfile::tempdir().unwrap();
    let models = models(directory.path());
    for map in maps() {
        let (model, path) = (&models[map.model], map.path.to_str().unwrap());
        let check = plan(model, &["--check", path], &map.devices);
        assert_eq!(check.status.code(), Some(0), "{path}: {}", stderr(&check));
        let tight: Vec<String> = map.devices.iter().map(|word| word.replace("GiB", "00MiB")).collect();
        assert_eq!(plan(model, &["--check", path], &tight).status.code(), Some(3), "{path} on a tenth");

        let again = directory.path().join("again.json");
        let output = ["--output", again.to_str().unwrap(), "--force"];
        plan(model, &[&map.conditions[..], &output].concat(), &map.devices);
        assert_eq!(fs::read_to_string(&map.path).unwrap(), fs::read_to_string(again).unwrap(), "{path}");
    }
}

#[test]
fn the_fixture_of_this_repository_has_a_map() {
    let map = folder().join("ferris-7m/int4-cpu-disk.json");
    let devices = ["cpu=1GiB", "disk=1GiB"].map(|device| ["--device".to_owned(), device.to_owned()]).concat();
    let check = plan("tests/fixtures/ferris-7m", &["--check", map.to_str().unwrap()], &devices);
    assert_eq!(check.status.code(), Some(0), "{}", stderr(&check));
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn every_map_is_in_the_table_and_in_the_readme() {
    let readme = fs::read_to_string(folder().join("README.md")).unwrap();
    let known: BTreeSet<_> = maps().into_iter().map(|map| map.path).collect();
    for path in files(&folder()) {
        let name = path.strip_prefix(folder()).unwrap().to_str().unwrap();
        if path.extension().is_some_and(|extension| extension == "svg") {
            continue;
        }
        let is_map = !matches!(name, "README.md" | "device-map.schema.json" | "ferris-7m/int4-cpu-disk.json");
        assert!(!is_map || known.contains(&path), "{name}");
        assert!(name == "README.md" || readme.contains(&format!("({name})")), "{name}");
    }
}

#[test]
fn the_schema_takes_what_the_reader_takes() {
    let schema = folder().join("device-map.schema.json");
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    let schema = compiler.compile(schema.to_str().unwrap(), &mut schemas).unwrap();
    let check = |name: &str, map: &Value, is_good: bool| {
        let read = DeviceMap::parse(name, map.to_string().into_bytes());
        assert_eq!(read.is_ok(), is_good, "{name}: the reader, {:?}", read.err().map(|e| e.to_string()));
        let valid = schemas.validate(map, schema);
        assert_eq!(valid.is_ok(), is_good, "{name}: the schema, {:?}", valid.err().map(|e| e.to_string()));
    };
    for path in files(&folder()) {
        if path.extension().is_some_and(|extension| extension == "json") && !path.ends_with("device-map.schema.json") {
            check(path.to_str().unwrap(), &serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap(), true);
        }
    }
    for good in [
        json!({"": 0}),
        json!({"model": 0, "lm_head": "cpu"}),
        json!({"transformer.h.0": "cuda:1", "transformer": "disk"}),
        json!({"device_map": {"": "cuda:0"}}),
        json!({"quantize": "int4", "kv_cache": "int8", "max_memory": {"0": 5, "cpu": "1.5 GB"}, "device_map": {"a.0-3": 1}}),
    ] {
        check(&good.to_string(), &good, true);
    }
    for bad in [
        json!([]),
        json!({}),
        json!({"": "gpu0"}),
        json!({"": -1}),
        json!({"": 1.5}),
        json!({"": null}),
        json!({"": "cuda:01"}),
        json!({"context": 4096}),
        json!({"contest": 4096, "device_map": {"": 0}}),
        json!({"schema_version": 2, "device_map": {"": 0}}),
        json!({"context": 0, "device_map": {"": 0}}),
        json!({"batch": "1", "device_map": {"": 0}}),
        json!({"quantize": "int3", "device_map": {"": 0}}),
        json!({"kv_cache": "int4", "device_map": {"": 0}}),
        json!({"max_memory": {"gpu": "1GiB"}, "device_map": {"": 0}}),
        json!({"max_memory": {"cpu": "1Gb"}, "device_map": {"": 0}}),
        json!({"device_map": {}}),
    ] {
        check(&bad.to_string(), &bad, false);
    }
}
