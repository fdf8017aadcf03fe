//! A checkpoint whose weights are packed already, so that loading it takes no search.
//!
//! Each packed matrix is one tensor of bytes, as [`crate::quant::MatrixLayout`]
//! has it; what is not packed is copied. config.json gets a
//! `quantization_config` that names the schemes. Or matrices are packed as
//! [`compressed_tensors`] has it. The directory appears whole or not at all.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Stored;
use super::compressed_tensors::{self, Rows};
use crate::architecture::ModuleTree;
use crate::bytes::{Bytes, MIB};
use crate::cancel::Cancel;
use crate::checkpoint::{Checkpoint, Note, SINGLE_FILE, index};
use crate::device::DeviceId;
use crate::error::{Error, Hint, Result, Setting};
use crate::footprint::{HostStaging, Placed, STAGING_SLABS, lay_out};
use crate::fs::{self, NewDirectory};
use crate::json::without_infinities;
use crate::loader::reader::{self, SlabBuffer};
use crate::loader::{LoadEvent, broken_weight};
use crate::model_config::{self, PACKED_METHOD, PACKED_VERSION};
use crate::pool::Pool;
use crate::quant::{PACKED_ROW, PackedRows, QuantizeRules, Scheme, Storage, quantize_rows};
use crate::text;

/// The largest shard, unless told otherwise; Transformers' own limit.
pub const DEFAULT_SHARD_SIZE: Bytes = Bytes(5_000_000_000);

/// Files that are copied beside the weights and what texts need, where there are any.
const COPIED: [&str; 4] = ["generation_config.json", "merges.txt", "tokenizer.model", "vocab.json"];
const COPY_CAP: Bytes = Bytes(256 * MIB);

/// How packed weights are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SaveFormat {
    /// As they are loaded.
    #[default]
    Evenkeel,
    /// In the form of compressed-tensors, for vLLM and Transformers.
    CompressedTensors,
}

/// What to write, and where.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// The scheme, applied as to a whole model.
    pub scheme: Scheme,
    /// How packed weights are written.
    pub format: SaveFormat,
    /// The directory to make.
    pub output: PathBuf,
    /// The most bytes of tensors in a shard, unless one is larger by itself.
    pub shard_size: Bytes,
    /// The threads that pack.
    pub pool: Arc<Pool>,
    /// Stops at the next slab.
    pub cancel: Cancel,
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
pub fn save_quantized(
    checkpoint: &Checkpoint,
    options: &SaveOptions,
    mut on_event: impl FnMut(LoadEvent),
) -> Result<SaveReport> {
    let start = Instant::now();
    let directory = checkpoint.local_directory()?;
    checkpoint.confirm_head()?;
    if checkpoint.config.packed.is_some() {
        return Err(Error::input(format!("`{}` is quantized already", checkpoint.name))
            .hint("name the checkpoint that it was made from"));
    }
    if options.scheme == Scheme::None {
        return Err(Error::usage("`none` leaves nothing to quantize")
            .hint(Hint::naming("{} takes the fewest bytes", [Setting::Quantize(Some("int4"))])));
    }
    let tree = ModuleTree::new(&checkpoint.config);
    let weights = tree.resolve(checkpoint)?;
    let rules = match options.format {
        SaveFormat::Evenkeel => QuantizeRules::whole_model(options.scheme).for_embedding(tree.embedding()),
        SaveFormat::CompressedTensors => compressed_tensors::rules(options.scheme, &tree, &weights)?,
    };
    let mut placed = lay_out(&weights, &vec![DeviceId::Disk; tree.modules.len()], &rules)?;
    let staging = HostStaging::new(&weights, &rules);
    placed.sort_by_key(|p| (p.weight.tensor.shard, p.weight.tensor.range.start));
    let read: Bytes = placed.iter().map(|p| p.weight.tensor.size()).sum();

    let output = NewDirectory::create(&options.output)?;
    let tensors: Vec<_> = placed.iter().map(|target| tensors(target, options.format)).collect();
    let shards = shards(&tensors, options.shard_size);
    let files = write_shards(&output, &tensors, &shards, options.format)?;
    let quantization = match options.format {
        SaveFormat::Evenkeel => json!({"quant_method": PACKED_METHOD, "version": PACKED_VERSION, "quantize": rules}),
        SaveFormat::CompressedTensors => compressed_tensors::config(options.scheme, &placed),
    };
    write_small_files(checkpoint, directory, &output, quantization)?;
    on_event(LoadEvent::Started { bytes: read });
    let (mut packed, mut compressed) = (PackedRows::default(), Rows::default());
    let buffers = (0..STAGING_SLABS).map(|_| SlabBuffer::heap(staging)).collect::<Result<_>>()?;
    reader::read(checkpoint, &placed, buffers, staging.transposed, |slab, back| {
        options.cancel.check()?;
        let target = &placed[slab.weight];
        let (layout, bytes) = (&target.layout, slab.bytes());
        let write = |tensor: usize, at: u64, bytes: &[u8]| {
            let (file, start) = &files[&(slab.weight, tensor)];
            file.write_all_at(bytes, start + at).map_err(|e| Error::io("write into", &options.output, e))
        };
        let broken = |e| broken_weight(target, slab.row, e);
        match (target.weight.data, options.format) {
            (data, _) if data == layout.storage => write(0, (slab.row * target.weight.row_bytes()) as u64, bytes)?,
            (Storage::Plain(dtype), SaveFormat::Evenkeel) => {
                quantize_rows(&options.pool, layout, dtype, bytes, &mut packed).map_err(broken)?;
                for (at, bytes) in packed.sections(layout, slab.row) {
                    write(0, at, bytes)?;
                }
            }
            (Storage::Plain(dtype), SaveFormat::CompressedTensors) => {
                let packed = compressed.pack(&options.pool, layout, dtype, slab.row, bytes).map_err(broken)?;
                for (tensor, (at, bytes)) in packed.into_iter().enumerate() {
                    write(tensor, at, bytes)?;
                }
            }
            _ => unreachable!("what is packed already is refused"),
        }
        on_event(LoadEvent::Placed {
            module: &target.weight.parameter.module,
            device: target.device,
            bytes: Bytes(slab.range.len() as u64),
        });
        // The reader is gone once all is read.
        let _ = back.send(slab.buffer);
        Ok(())
    })?;
    output.finish()?;
    Ok(SaveReport {
        parameters: weights.iter().map(|weight| (weight.parameter.rows * weight.parameter.cols) as u64).sum(),
        read,
        written: tensors.iter().flatten().map(|tensor| Bytes(tensor.size)).sum(),
        shards: shards.len(),
        seconds: start.elapsed().max(Duration::from_nanos(1)).as_secs_f64(),
        quantize: rules,
    })
}

/// A shard, and where the data of a tensor begins in it.
type Place = (Arc<File>, u64);

/// The tensors that a weight becomes: one of bytes where it is packed with all its padding.
fn tensors(target: &Placed, format: SaveFormat) -> Vec<Stored> {
    let (weight, name) = (&target.weight, target.weight.parameter.tensor());
    if target.layout.storage == weight.data {
        let dtype = if weight.is_narrowed() { Dtype::F32 } else { weight.tensor.dtype };
        return vec![Stored::new(name, dtype, weight.tensor.shape.clone())];
    }
    match format {
        SaveFormat::Evenkeel => vec![Stored::new(name, Dtype::U8, vec![target.layout.size().0])],
        SaveFormat::CompressedTensors => compressed_tensors::tensors(target).into(),
    }
}

/// Runs of weights, each for one shard.
fn shards(tensors: &[Vec<Stored>], limit: Bytes) -> Vec<Range<usize>> {
    let mut shards = Vec::new();
    let (mut first, mut size) = (0, Bytes::ZERO);
    for (at, tensors) in tensors.iter().enumerate() {
        let bytes = tensors.iter().map(|tensor| Bytes(tensor.size)).sum();
        if at > first && size + bytes > limit {
            shards.push(first..at);
            (first, size) = (at, Bytes::ZERO);
        }
        size += bytes;
    }
    shards.push(first..tensors.len());
    shards
}

/// Makes the shards with their headers, and the index where there are several.
/// Returns the place of each tensor of each weight.
fn write_shards(
    output: &NewDirectory,
    tensors: &[Vec<Stored>],
    shards: &[Range<usize>],
    format: SaveFormat,
) -> Result<BTreeMap<(usize, usize), Place>> {
    let mut files = BTreeMap::new();
    let mut weight_map = Map::new();
    for (at, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        };
        let method = if format == SaveFormat::Evenkeel { PACKED_METHOD } else { "pt" };
        let parts = |weight: usize| tensors[weight].iter().enumerate().map(move |(part, it)| ((weight, part), it));
        let mut order: Vec<_> = shard.clone().flat_map(parts).collect();
        if format == SaveFormat::CompressedTensors {
            // Each then stands on a multiple of its elements' size; what we pack is a multiple of all.
            order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype.bitsize()));
        }
        let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": method}))]);
        let mut end = 0u64;
        for (_, Stored { name: tensor, dtype, shape, size, .. }) in &order {
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]});
            header.insert(tensor.clone(), entry);
            weight_map.insert(tensor.clone(), name.clone().into());
            end += size;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        // Data begins on a multiple of the layout's alignment; JSON may end in spaces.
        let length = (size_of::<u64>() + header.len()).next_multiple_of(PACKED_ROW) - size_of::<u64>();
        header.resize(length, b' ');
        let data = (size_of::<u64>() + length) as u64;
        let file = Arc::new(output.file(&name, Bytes(data + end))?);
        let bytes = [&(length as u64).to_le_bytes()[..], &header].concat();
        let write = |at, bytes: &[u8]| file.write_all_at(bytes, at).map_err(|e| Error::io("write", name.as_ref(), e));
        write(0, &bytes)?;
        let mut start = data;
        for (at, tensor) in order {
            write(start, &tensor.content)?;
            files.insert(at, (Arc::clone(&file), start));
            start += tensor.size;
        }
    }
    if shards.len() > 1 {
        let total: Bytes = tensors.iter().flatten().map(|tensor| Bytes(tensor.size)).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        output.write(index::FILE, format!("{index:#}\n").as_bytes())?;
    }
    Ok(files)
}

fn write_small_files(
    checkpoint: &Checkpoint,
    directory: &Path,
    output: &NewDirectory,
    quantization: Value,
) -> Result<()> {
    let read = |name: &str| fs::read_capped(&fs::confined(directory, name)?, COPY_CAP);
    let changed = || Error::input(format!("config.json of `{}` has changed", checkpoint.name));
    let text = String::from_utf8(read(model_config::FILE)?).map_err(|e| changed().caused_by(e))?;
    let text = without_infinities(&text, |_| "null".to_owned());
    let config = serde_json::from_str(&text).map_err(|e| changed().caused_by(e))?;
    let Value::Object(mut config) = config else { return Err(changed()) };
    config.insert("quantization_config".to_owned(), quantization);
    if checkpoint.notes.contains(&Note::OwnHead) {
        config.insert("tie_word_embeddings".to_owned(), false.into());
    }
    output.write(model_config::FILE, format!("{:#}\n", Value::Object(config)).as_bytes())?;
    // Those in directories have other places beside the weights.
    let names = COPIED.into_iter().chain(text::FILES).filter(|name| !name.contains('/'));
    for name in names {
        if std::fs::symlink_metadata(directory.join(name)).is_ok() {
            output.write(name, &read(name)?)?;
        }
    }
    Ok(())
}
