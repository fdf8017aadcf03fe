//! A checkpoint's files: the configuration and the headers of its shards, read
//! without any weights, and checked against each other.

mod header;
pub mod index;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;

pub use crate::source::{LocalDirectory, Source};
pub use header::{HeaderError, MAX_HEADER, MAX_NAME, MAX_RANK, MAX_TENSORS, TensorInfo};
pub use index::Index;

use crate::bytes::Bytes;
use crate::error::{Error, Result, first_five, printable};
use crate::model_config::ModelConfig;

/// The file of a checkpoint that has no index.
pub const SINGLE_FILE: &str = "model.safetensors";

/// A checkpoint whose configuration and headers have been read and checked.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// What the model is called in messages and maps: the last part of its
    /// directory's path, or the repository id.
    pub name: String,
    /// config.json, checked.
    pub config: ModelConfig,
    /// The local directory that holds it, if one does.
    pub directory: Option<PathBuf>,
    /// File names of the shards.
    pub shards: Vec<String>,
    /// Size of each shard.
    pub shard_sizes: Vec<Bytes>,
    /// Every tensor that the index names, or that the single file holds.
    pub catalog: BTreeMap<String, Tensor>,
    /// Tensors that shards hold and the index does not name; nothing reads them.
    pub unlisted: usize,
}

/// Where a tensor's data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Position in [`Checkpoint::shards`].
    pub shard: usize,
    /// Type of an element.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// Its bytes in the shard.
    pub range: Range<u64>,
}

impl Checkpoint {
    /// Opens the checkpoint in a local directory.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_else(|| path.display().to_string());
        Self::read(name, &LocalDirectory::new(path)?)
    }

    /// Reads the configuration and all headers from `source`.
    ///
    /// # Errors
    /// A file is missing, is not as its format has it, or contradicts another.
    pub fn read(name: impl Into<String>, source: &dyn Source) -> Result<Self> {
        let config = ModelConfig::read(source)?;
        let index = if source.has(index::FILE)? {
            Some(Index::read(source)?)
        } else if source.has(SINGLE_FILE)? {
            None
        } else {
            return Err(no_weights(source));
        };
        let shards = index.as_ref().map_or_else(|| vec![SINGLE_FILE.to_owned()], |index| index.shards.clone());
        check_presence(source, &shards)?;
        let read = || shards.par_iter().map(|shard| read_header(source, shard)).collect::<Result<Vec<_>>>();
        // Reading a distant file is waiting, for which there need not be cores.
        let distant = || rayon::ThreadPoolBuilder::new().num_threads(REQUESTS).build().ok();
        let read = match source.directory().is_none().then(distant).flatten() {
            Some(pool) => pool.install(read)?,
            None => read()?,
        };
        let (shard_sizes, headers): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        let (catalog, unlisted) = match index {
            Some(index) => catalog_by_index(source, &index, headers)?,
            None => (headers.into_iter().flatten().map(|info| entry(0, info)).collect(), 0),
        };
        Ok(Self {
            name: name.into(),
            config,
            directory: source.directory().map(Path::to_path_buf),
            shards,
            shard_sizes,
            catalog,
            unlisted,
        })
    }
}

impl Checkpoint {
    /// The local directory that holds it.
    pub fn local_directory(&self) -> Result<&Path> {
        let nowhere = || Error::input(format!("`{}` is not in a local directory", self.name));
        self.directory.as_deref().ok_or_else(nowhere)
    }
}

/// Headers that are asked for at a time where they are not in a local directory.
const REQUESTS: usize = 8;

fn no_weights(source: &dyn Source) -> Error {
    let error = Error::input(format!("`{}` is missing, and so is `{}`", source.display(SINGLE_FILE), index::FILE));
    let pickles = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
    match pickles.iter().find(|file| source.has(file).unwrap_or(false)) {
        Some(file) => error.hint(format!(
            "`{file}` is a Python pickle, which can run code and is never read; convert the checkpoint to safetensors"
        )),
        None => error.hint("the directory must hold a checkpoint in safetensors format, as Transformers saves it"),
    }
}

/// Refuses a local directory that lacks shards; the Hub says so itself, of each file.
fn check_presence(source: &dyn Source, shards: &[String]) -> Result<()> {
    let Some(directory) = source.directory() else {
        return Ok(());
    };
    let mut missing = Vec::new();
    for shard in shards {
        if !source.has(shard)? {
            missing.push(shard);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::input(format!(
        "`{}` lacks {} of the {} shards that its index names: {}",
        directory.display(),
        missing.len(),
        shards.len(),
        first_five(missing)
    ))
    .hint("the download is incomplete; download the checkpoint again"))
}

/// The size of a shard and the tensors in it.
fn read_header(source: &dyn Source, shard: &str) -> Result<(Bytes, Vec<TensorInfo>)> {
    let wrap = |error: HeaderError| {
        let hint = match error {
            HeaderError::GitLfsPointer => Some("`git lfs pull` fetches the file itself"),
            HeaderError::Truncated { .. } => Some("download the file again"),
            _ => None,
        };
        let what = format!("`{}` {error}", source.display(shard));
        let error = match error {
            HeaderError::Json(cause) | HeaderError::Entry { cause, .. } => Error::input(what).caused_by(cause),
            HeaderError::SecondJudge(cause) => Error::input(what).caused_by(cause),
            _ => Error::input(what),
        };
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    };
    let file = source.size(shard)?;
    let start = source.read_range(shard, 0, header::LENGTH_FIELD)?;
    let length = header::length(&start, file).map_err(wrap)?;
    let json = source.read_range(shard, header::LENGTH_FIELD as u64, length)?;
    Ok((file, header::parse(json, file).map_err(wrap)?))
}

fn entry(shard: usize, info: TensorInfo) -> (String, Tensor) {
    let tensor = Tensor { shard, dtype: info.dtype, shape: info.shape, range: info.range };
    (info.name, tensor)
}

/// The tensors that the index names, each in the shard that it names, and the
/// number of those that only shards know.
fn catalog_by_index(
    source: &dyn Source,
    index: &Index,
    headers: Vec<Vec<TensorInfo>>,
) -> Result<(BTreeMap<String, Tensor>, usize)> {
    let mut catalog = BTreeMap::new();
    let mut unlisted: BTreeMap<String, usize> = BTreeMap::new();
    for (shard, infos) in headers.into_iter().enumerate() {
        for info in infos {
            if index.weight_map.get(&info.name) == Some(&shard) {
                let (name, tensor) = entry(shard, info);
                catalog.insert(name, tensor);
            } else if !index.weight_map.contains_key(&info.name)
                && let Some(other) = unlisted.insert(info.name.clone(), shard)
            {
                return Err(Error::input(format!(
                    "tensor `{}` stands in `{}` and in `{}`, and the index names neither",
                    printable(&info.name),
                    index.shards[other],
                    index.shards[shard]
                )));
            }
        }
    }
    let mut lacking = index.weight_map.iter().filter(|(name, _)| !catalog.contains_key(*name)).peekable();
    if let Some((_, shard)) = lacking.peek() {
        let shard = *shard;
        let names = lacking.filter(|(_, at)| **at == *shard).map(|(name, _)| printable(name));
        return Err(Error::input(format!(
            "`{}` lacks what the index says it holds: {}",
            source.display(&index.shards[*shard]),
            first_five(names)
        ))
        .hint("download the shard and the index again; they are from different revisions"));
    }
    Ok((catalog, unlisted.len()))
}

impl Tensor {
    /// The bytes of its data.
    pub fn size(&self) -> Bytes {
        Bytes(self.range.end - self.range.start)
    }
}
