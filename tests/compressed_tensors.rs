//! `quantize --format compressed-tensors`, read back by its written specification.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes of small files")]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use evenkeel::architecture::ModuleTree;
use evenkeel::bytes::Bytes;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::export::{DEFAULT_SHARD_SIZE, SaveFormat, SaveOptions, save_quantized};
use evenkeel::pool::Pool;
use evenkeel::quant::{Scheme, Storage, WeightDtype, squared_error};
use evenkeel::{Cancel, ErrorKind};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use support::fixture;

fn save(name: &str, scheme: Scheme, shard_size: Bytes, output: &Path) -> evenkeel::Result<()> {
    let format = SaveFormat::CompressedTensors;
    let options = SaveOptions {
        scheme,
        format,
        output: output.to_owned(),
        shard_size,
        pool: Arc::default(),
        cancel: Cancel::new(),
    };
    save_quantized(&Checkpoint::open(fixture(name)).unwrap(), &options, |_| ()).map(|_| ())
}

/// The elements of a tensor as f32.
fn values(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let dtype = WeightDtype::of(dtype).unwrap();
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    dtype.decode(bytes, &mut values);
    values
}

/// A matrix from its codes, scales and shape: each word has the first code in its lowest bits, codes are
/// above the smallest one, and a scale is that of as many columns as there are for each.
fn dequantized(file: &SafeTensors, module: &str, bits: usize) -> Vec<f32> {
    let tensor = |part: &str| file.tensor(&format!("{module}.weight_{part}")).unwrap();
    let (packed, scale, shape) = (tensor("packed"), tensor("scale"), tensor("shape"));
    assert_eq!((packed.dtype(), shape.dtype(), shape.shape()), (Dtype::I32, Dtype::I64, &[2][..]));
    let [rows, cols] = [0, 1].map(|at| i64::from_le_bytes(shape.data()[8 * at..][..8].try_into().unwrap()) as usize);
    assert_eq!(packed.shape(), [rows, (cols * bits).div_ceil(32)]);
    let groups = if bits == 8 { 1 } else { cols / 32 };
    assert_eq!(scale.shape(), [rows, groups]);
    let scales = values(scale.dtype(), scale.data());
    let words: Vec<u32> = packed.data().as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let in_word = 32 / bits;
    let weight = |at: usize| {
        let (row, col) = (at / cols, at % cols);
        let word = words[row * packed.shape()[1] + col / in_word];
        let code = (word >> (col % in_word * bits)) & ((1 << bits) - 1);
        (code as f32 - (1 << (bits - 1)) as f32) * scales[row * groups + col * groups / cols]
    };
    (0..rows * cols).map(weight).collect()
}

#[test]
fn the_specification_gives_back_what_our_own_form_does() {
    for name in ["ferris-7m", "parity/llama_bf16", "parity/qwen3_moe", "parity/phi3"] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let tree = ModuleTree::new(&checkpoint.config);
        for (scheme, bits, storage) in [(Scheme::Int8, 8, Storage::Int8), (Scheme::Int4, 4, Storage::Int4)] {
            for shard_size in [DEFAULT_SHARD_SIZE, Bytes(1)] {
                let directory = tempfile::tempdir().unwrap();
                let output = directory.path().join("model");
                save(name, scheme, shard_size, &output).unwrap();
                let config: Value =
                    serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
                let quantization = &config["quantization_config"];
                assert_eq!(quantization["quant_method"], "compressed-tensors");
                assert_eq!(quantization["format"], "pack-quantized");
                let weights = &quantization["config_groups"]["group_0"]["weights"];
                let group_size = if bits == 4 { json!(32) } else { Value::Null };
                assert_eq!((&weights["num_bits"], &weights["group_size"]), (&json!(bits), &group_size));
                let ignored: BTreeSet<_> =
                    quantization["ignore"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect();
                assert!(ignored.contains("lm_head"));

                let shards: Vec<_> = std::fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().path()).collect();
                let shards = shards.iter().filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
                let (mut packed, mut kept) = (0, 0);
                for bytes in shards.map(|path| std::fs::read(path).unwrap()) {
                    let file = SafeTensors::deserialize(&bytes).unwrap();
                    for (_, parameter) in tree.parameters() {
                        let original = &checkpoint.catalog[&parameter.tensor()];
                        let shard = std::fs::read(fixture(name).join(&checkpoint.shards[original.shard])).unwrap();
                        let data = &shard[original.range.start as usize..original.range.end as usize];
                        if let Ok(tensor) = file.tensor(&parameter.tensor()) {
                            assert_eq!(
                                (tensor.data(), tensor.dtype()),
                                (data, original.dtype),
                                "{}",
                                parameter.tensor()
                            );
                            assert!(
                                parameter.is_vector() || ignored.contains(parameter.module.as_str()),
                                "{}",
                                parameter.module
                            );
                            kept += 1;
                        } else if file.tensor(&format!("{}.weight_packed", parameter.module)).is_ok() {
                            assert!(!ignored.contains(parameter.module.as_str()));
                            let exact = values(original.dtype, data);
                            let found = dequantized(&file, &parameter.module, bits);
                            let squares = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                                values.map(|v| f64::from(v).powi(2)).sum()
                            };
                            let error = squares(&mut exact.iter().zip(&found).map(|(a, b)| a - b));
                            let dtype = WeightDtype::of(original.dtype).unwrap();
                            let (ours, _) =
                                squared_error(&Pool::default(), storage, dtype, parameter.cols, data).unwrap();
                            // Scales are rounded to the dtype of the weights, and codes follow them.
                            assert!(
                                error <= ours * 1.1 && error >= ours * 0.9,
                                "{} {scheme}: {error} {ours}",
                                parameter.module
                            );
                            packed += 1;
                        }
                    }
                }
                assert_eq!(packed + kept, tree.parameters().count(), "{name} {scheme}");
                assert!(packed >= tree.modules.len(), "{name} {scheme}: {packed}");
                let refused = Checkpoint::open(&output).err().unwrap().to_string();
                assert!(refused.contains("compressed-tensors"), "{refused}");
            }
        }
    }
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("model");
    for (name, scheme, kind, text) in [
        ("ferris-7m", Scheme::Nl4, ErrorKind::Usage, "`compressed-tensors` has no `nl4`"),
        ("parity/gpt2", Scheme::Int4, ErrorKind::Input, "stored by columns"),
    ] {
        let error = save(name, scheme, DEFAULT_SHARD_SIZE, &output).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(text), "{error}");
        assert!(!output.exists());
    }
}
