//! What each scheme does to a checkpoint's weights, measured on rows that are drawn from them.
//!
//! The same rows are drawn each time. What is measured is kept in the caller's cache, if there is one.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::group::Group;
use crate::architecture::Weight;
use crate::bytes::{Bytes, MIB};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::fs;
use crate::plan::PlanOptions;
use crate::pool::Pool;
use crate::quant::{Scheme, Storage, narrow, squared_error};
use crate::random::{self, Draws};

/// What is read of a file that keeps what was measured.
const ERRORS_CAP: Bytes = Bytes(64 * MIB);
/// Goes up with every change to what is drawn or measured.
const VERSION: u32 = 1;

/// Rows that are drawn of every projection of a block, or of all of its experts.
const ROWS: usize = 4;
/// Rows that are drawn of the embedding and the head, which there is one of.
const ROWS_ELSEWHERE: usize = 64;

/// The squared error of a group over its squared weights, for `int8`, `int4` and `nl4`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    int8: f64,
    int4: f64,
    nl4: f64,
}

impl Loss {
    /// That of `scheme`.
    pub fn of(&self, scheme: Scheme) -> f64 {
        match scheme {
            Scheme::None => 0.0,
            Scheme::Int8 => self.int8,
            Scheme::Int4 => self.int4,
            Scheme::Nl4 => self.nl4,
        }
    }

    fn is_sound(&self) -> bool {
        [self.int8, self.int4, self.nl4].iter().all(|loss| loss.is_finite() && *loss >= 0.0)
    }
}

/// What was measured of a checkpoint, and which one that was.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Measured {
    version: u32,
    shards: Vec<ShardState>,
    losses: BTreeMap<String, Loss>,
}

/// A shard as it was read: another file under its name, or a change to it, has another state.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShardState {
    name: String,
    size: u64,
    inode: u64,
    /// When it or its attributes last changed, which no program can set: nanoseconds since 1970.
    changed: i64,
}

/// The loss of every group, in their order, measured on the options' pool and kept in their cache. `None`
/// where the weights are not in a local directory, are packed already, or are ones that no scheme can
/// pack: loading says which.
pub fn losses(checkpoint: &Checkpoint, groups: &[Group], options: &PlanOptions) -> Result<Option<Vec<Loss>>> {
    let Some(directory) = checkpoint.directory.as_deref().filter(|_| checkpoint.config.packed.is_none()) else {
        return Ok(None);
    };
    let shards = checkpoint.shards.iter().map(|name| open(directory, name)).collect::<Result<Vec<_>>>()?;
    let (files, states): (Vec<_>, Vec<_>) = shards.into_iter().unzip();
    let in_order = |losses: &BTreeMap<String, Loss>| {
        groups.iter().map(|group| losses.get(&group.path).copied().filter(Loss::is_sound)).collect()
    };
    let home = directory.canonicalize().map_err(|e| Error::io("open", directory, e))?;
    let name = format!("errors-{:016x}.json", random::seed(home.as_os_str().as_bytes()));
    let (cache, pool) = (options.cache.as_deref(), &*options.pool);
    let read = |cache: &Path| fs::read_capped(&cache.join(&name), ERRORS_CAP).ok();
    let known = cache.and_then(read).and_then(|json| serde_json::from_slice::<Measured>(&json).ok());
    if let Some(known) = known.filter(|known| known.version == VERSION && known.shards == states)
        && let Some(losses) = in_order(&known.losses)
    {
        return Ok(Some(losses));
    }
    let measured = pool.try_map(groups.len(), |at| measure(&files, &groups[at], pool))?;
    let paths = groups.iter().map(|group| group.path.clone());
    let Some(losses) = paths.zip(measured).map(|(path, loss)| Some((path, loss?))).collect::<Option<BTreeMap<_, _>>>()
    else {
        return Ok(None);
    };
    let measured = Measured { version: VERSION, shards: states, losses };
    if let Some(cache) = cache {
        // Numbers and texts serialize; a directory that cannot be made or written keeps nothing.
        let _ = DirBuilder::new().recursive(true).mode(0o700).create(cache);
        let _ = fs::write_atomic(&cache.join(name), &serde_json::to_vec_pretty(&measured).unwrap_or_default(), true);
    }
    Ok(in_order(&measured.losses))
}

fn open(directory: &Path, name: &str) -> Result<(File, ShardState)> {
    let path = fs::confined(directory, name)?;
    let file = fs::open_regular(&path)?;
    let metadata = file.metadata().map_err(|e| Error::io("read", &path, e))?;
    let changed = metadata.ctime().saturating_mul(1_000_000_000).saturating_add(metadata.ctime_nsec());
    Ok((file, ShardState { name: name.to_owned(), size: metadata.len(), inode: metadata.ino(), changed }))
}

/// The mean over the roles of a group.
fn measure(shards: &[File], group: &Group, pool: &Pool) -> Result<Option<Loss>> {
    let mut random = Draws::new(random::seed(group.path.as_bytes()));
    let mut sum = Loss { int8: 0.0, int4: 0.0, nl4: 0.0 };
    for weights in group.roles.values() {
        let rows = if group.is_in_block { ROWS } else { ROWS_ELSEWHERE };
        let Some((dtype, cols)) = weights.first().and_then(|weight| Some((weight.dtype()?, weight.parameter.cols)))
        else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        if let [weight] = &weights[..]
            && weight.is_transposed()
        {
            read_columns(shards, weight, rows.min(weight.parameter.rows), &mut random, &mut bytes)?;
        } else {
            for _ in 0..rows {
                let weight = &weights[random.below(weights.len())];
                let row = random.below(weight.parameter.rows);
                // Experts of another dtype are not compared.
                if weight.dtype() == Some(dtype) {
                    let start = bytes.len();
                    bytes.resize(start + weight.shard_row_bytes(), 0);
                    read(shards, weight, row * weight.shard_row_bytes(), &mut bytes[start..])?;
                    keep(weight, start, &mut bytes);
                }
            }
        }
        for (loss, storage) in
            [(&mut sum.int8, Storage::Int8), (&mut sum.int4, Storage::Int4), (&mut sum.nl4, Storage::Nl4)]
        {
            let Ok((error, norm)) = squared_error(pool, storage, dtype, cols, &bytes) else {
                return Ok(None);
            };
            *loss += if norm > 0.0 { error / norm } else { 0.0 } / group.roles.len() as f64;
        }
    }
    Ok(Some(sum))
}

/// Appends rows of a matrix that is stored as `[cols, rows]`: neighbours, so that a read of each column has all of them.
fn read_columns(shards: &[File], weight: &Weight, rows: usize, random: &mut Draws, bytes: &mut Vec<u8>) -> Result<()> {
    let cols = weight.parameter.cols;
    let element = weight.shard_row_bytes() / cols;
    let first = random.below(weight.parameter.rows - rows + 1);
    let mut column = vec![0; rows * element];
    bytes.resize(rows * cols * element, 0);
    for col in 0..cols {
        read(shards, weight, (col * weight.parameter.rows + first) * element, &mut column)?;
        for (row, value) in column.chunks(element).enumerate() {
            bytes[(row * cols + col) * element..][..element].copy_from_slice(value);
        }
    }
    keep(weight, 0, bytes);
    Ok(())
}

/// Keeps what was read from `start` on in the weight's own dtype.
fn keep(weight: &Weight, start: usize, bytes: &mut Vec<u8>) {
    if weight.is_narrowed() {
        let len = narrow(&mut bytes[start..]);
        bytes.truncate(start + len);
    }
}

fn read(shards: &[File], weight: &Weight, offset: usize, bytes: &mut [u8]) -> Result<()> {
    let tensor = &weight.tensor;
    shards[tensor.shard]
        .read_exact_at(bytes, tensor.range.start + offset as u64)
        .map_err(|e| Error::input(format!("tensor `{}` cannot be read", weight.parameter.tensor())).caused_by(e))
}
