//! A checkpoint whose weights are packed already, so that loading it takes no search.
//!
//! Each packed matrix is one tensor of bytes, as [`crate::quant::MatrixLayout`]
//! has it; what is not packed is copied. config.json gets a
//! `quantization_config` that names the schemes. The directory appears whole or
//! not at all.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::LoadEvent;
use super::fill::broken_weight;
use super::reader::{self, SlabBuffer};
use crate::architecture::ModuleTree;
use crate::bytes::{Bytes, MIB};
use crate::checkpoint::{Checkpoint, SINGLE_FILE, index};
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::fs::{self, NewDirectory};
use crate::model_config::{self, PACKED_METHOD, PACKED_VERSION};
use crate::plan::memory::{self, HostStaging, Placed, STAGING_SLABS};
use crate::quant::{PACKED_ROW, PackedRows, QuantizeRules, Scheme, Storage, quantize_rows};

/// The largest shard, unless told otherwise; Transformers' own limit.
pub const DEFAULT_SHARD_SIZE: Bytes = Bytes(5_000_000_000);

/// Files that are copied beside the weights, where there are any.
const COPIED: [&str; 9] = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];
const COPY_CAP: Bytes = Bytes(256 * MIB);

/// What to write, and where.
#[derive(Clone, Debug)]
pub struct SaveOptions<'a> {
    /// The scheme, applied as to a whole model.
    pub scheme: Scheme,
    /// The directory to make.
    pub output: &'a Path,
    /// The most bytes of tensors in a shard, unless one is larger by itself.
    pub shard_size: Bytes,
    /// Set to stop at the next slab.
    pub cancel: &'a AtomicBool,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct SaveReport {
    /// The schemes.
    pub quantize: QuantizeRules,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes read from shards.
    pub read: Bytes,
    /// Bytes of all tensors that were written.
    pub written: Bytes,
    /// Number of shards that were written.
    pub shards: usize,
    /// Wall time.
    pub seconds: f64,
}

/// Packs the weights of `checkpoint` and writes them as a checkpoint.
///
/// # Errors
/// The checkpoint is packed already or not in a directory, a file of it is
/// broken, a weight is not finite, `output` is there already, the disk is full,
/// or the caller stopped it. Nothing stands under `output` then.
pub fn save_quantized(
    checkpoint: &Checkpoint,
    options: &SaveOptions,
    mut on_event: impl FnMut(LoadEvent),
) -> Result<SaveReport> {
    let start = Instant::now();
    let directory = checkpoint.local_directory()?;
    if checkpoint.config.packed.is_some() {
        return Err(Error::input(format!("`{}` is quantized already", checkpoint.name))
            .hint("name the checkpoint that it was made from"));
    }
    if options.scheme == Scheme::None {
        return Err(Error::usage("`none` leaves nothing to quantize").hint("`--quantize int4` takes the fewest bytes"));
    }
    let tree = ModuleTree::new(&checkpoint.config);
    let weights = tree.resolve(checkpoint)?;
    let rules = QuantizeRules::whole_model(options.scheme).for_embedding(tree.embedding());
    let mut placed = memory::lay_out(&weights, &vec![DeviceId::Disk; tree.modules.len()], &rules)?;
    let staging = HostStaging::new(&weights, &rules);
    placed.sort_by_key(|p| (p.weight.tensor.shard, p.weight.tensor.range.start));
    let read: Bytes = placed.iter().map(|p| p.weight.tensor.size()).sum();

    let output = NewDirectory::create(options.output)?;
    let shards = shards(&placed, options.shard_size);
    let files = write_headers(&output, &placed, &shards)?;
    write_small_files(checkpoint, directory, &output, &rules)?;
    on_event(LoadEvent::Started { bytes: read });
    let mut packed = PackedRows::default();
    let buffers = (0..STAGING_SLABS).map(|_| SlabBuffer::Heap(vec![0; staging.slab])).collect();
    reader::read(checkpoint, directory, &placed, buffers, staging.transposed, |slab, back| {
        if options.cancel.load(Ordering::Relaxed) {
            return Err(Error::interrupted());
        }
        let target = &placed[slab.weight];
        let (layout, bytes) = (&target.layout, &slab.buffer[..slab.len]);
        let (file, start) = &files[slab.weight];
        let write = |at: u64, bytes: &[u8]| {
            file.write_all_at(bytes, start + at).map_err(|e| Error::io("write into", options.output, e))
        };
        match target.weight.data {
            Storage::Plain(dtype) if target.weight.data != layout.storage => {
                quantize_rows(layout, dtype, bytes, &mut packed).map_err(|e| broken_weight(target, slab.row, e))?;
                for (at, bytes) in packed.sections(layout, slab.row) {
                    write(at, bytes)?;
                }
            }
            _ => write((slab.row * target.weight.row_bytes()) as u64, bytes)?,
        }
        on_event(LoadEvent::Placed {
            module: &target.weight.parameter.module,
            device: target.device,
            bytes: Bytes(slab.len as u64),
        });
        // The reader is gone once all is read.
        let _ = back.send(slab.buffer);
        Ok(())
    })?;
    output.finish()?;
    Ok(SaveReport {
        parameters: weights.iter().map(|weight| (weight.parameter.rows * weight.parameter.cols) as u64).sum(),
        read,
        written: placed.iter().map(stored_size).sum(),
        shards: shards.len(),
        seconds: start.elapsed().max(Duration::from_nanos(1)).as_secs_f64(),
        quantize: rules,
    })
}

/// Bytes of a weight's tensor: packed with all its padding, elements without any.
fn stored_size(target: &Placed) -> Bytes {
    if target.layout.storage == target.weight.data { target.weight.tensor.size() } else { target.layout.size() }
}

/// Runs of weights, each for one shard.
fn shards<'p, 'w>(placed: &'p [Placed<'w>], limit: Bytes) -> Vec<&'p [Placed<'w>]> {
    let mut shards = Vec::new();
    let (mut first, mut size) = (0, Bytes::ZERO);
    for (at, target) in placed.iter().enumerate() {
        let bytes = stored_size(target);
        if at > first && size + bytes > limit {
            shards.push(&placed[first..at]);
            (first, size) = (at, Bytes::ZERO);
        }
        size += bytes;
    }
    shards.push(&placed[first..]);
    shards
}

/// Makes the shards with their headers, and the index where there are several.
/// Returns the file of each weight and where its data begins there.
fn write_headers(output: &NewDirectory, placed: &[Placed], shards: &[&[Placed]]) -> Result<Vec<(Arc<File>, u64)>> {
    let mut files = Vec::with_capacity(placed.len());
    let mut weight_map = Map::new();
    for (at, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        };
        let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": PACKED_METHOD}))]);
        let (mut end, mut starts) = (0u64, Vec::with_capacity(shard.len()));
        for target in *shard {
            let weight = &target.weight;
            let (start, size) = (end, stored_size(target).0);
            // Sizes were planned, and their sum is far below 2^63.
            end += size;
            let (dtype, shape) = match target.layout.storage {
                Storage::Plain(_) => (weight.tensor.dtype, weight.tensor.shape.clone()),
                Storage::Int8 | Storage::Int4 | Storage::Nl4 => (Dtype::U8, vec![size]),
            };
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            header.insert(weight.parameter.tensor(), entry);
            weight_map.insert(weight.parameter.tensor(), name.clone().into());
            starts.push(start);
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        // Data begins on a multiple of the layout's alignment; JSON may end in spaces.
        let length = (size_of::<u64>() + header.len()).next_multiple_of(PACKED_ROW) - size_of::<u64>();
        header.resize(length, b' ');
        let data = (size_of::<u64>() + length) as u64;
        let file = Arc::new(output.file(&name, Bytes(data + end))?);
        let bytes = [&(length as u64).to_le_bytes()[..], &header].concat();
        file.write_all_at(&bytes, 0).map_err(|e| Error::io("write", name.as_ref(), e))?;
        files.extend(starts.into_iter().map(|start| (Arc::clone(&file), data + start)));
    }
    if shards.len() > 1 {
        let total: Bytes = placed.iter().map(stored_size).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        output.write(index::FILE, format!("{index:#}\n").as_bytes())?;
    }
    Ok(files)
}

fn write_small_files(
    checkpoint: &Checkpoint,
    directory: &Path,
    output: &NewDirectory,
    rules: &QuantizeRules,
) -> Result<()> {
    let read = |name: &str| fs::read_capped(&fs::confined(directory, name)?, COPY_CAP);
    let changed = || Error::input(format!("config.json of `{}` has changed", checkpoint.name));
    let config = serde_json::from_slice(&read(model_config::FILE)?).map_err(|e| changed().caused_by(e))?;
    let Value::Object(mut config) = config else { return Err(changed()) };
    let quantization = json!({"quant_method": PACKED_METHOD, "version": PACKED_VERSION, "quantize": rules});
    config.insert("quantization_config".to_owned(), quantization);
    output.write(model_config::FILE, format!("{:#}\n", Value::Object(config)).as_bytes())?;
    for name in COPIED {
        if std::fs::symlink_metadata(directory.join(name)).is_ok() {
            output.write(name, &read(name)?)?;
        }
    }
    Ok(())
}
