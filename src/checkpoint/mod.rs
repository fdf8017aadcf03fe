//! A checkpoint's files: the configuration and the headers of its shards, read
//! without any weights, and checked against each other.

mod header;
pub mod index;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::Dtype;

pub use crate::source::{LocalDirectory, Origin, Source};
pub use index::Index;

use crate::bytes::Bytes;
use crate::error::{Error, Result, first_five, printable};
use crate::model_config::ModelConfig;
use crate::pool::Pool;

/// The file of a checkpoint that has no index.
pub const SINGLE_FILE: &str = "model.safetensors";

/// A checkpoint whose configuration and headers have been read and checked. Its clones share them.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// What the model is called in messages and maps: the last part of its
    /// directory's path, or the repository id.
    pub name: String,
    /// config.json, checked.
    pub config: Arc<ModelConfig>,
    /// Where it can be found again.
    pub origin: Origin,
    /// The local directory that holds it, if one does.
    pub directory: Option<PathBuf>,
    /// File names of the shards.
    pub shards: Arc<[String]>,
    /// Size of each shard.
    pub shard_sizes: Arc<[Bytes]>,
    /// Every tensor that the index names, or that the single file holds.
    pub catalog: Arc<BTreeMap<String, Tensor>>,
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
        Self::open_on(path, &Pool::default())
    }

    /// Opens the checkpoint in a local directory on the threads of `pool`.
    pub fn open_on(path: impl AsRef<Path>, pool: &Pool) -> Result<Self> {
        let path = path.as_ref();
        let name = path
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_else(|| path.display().to_string());
        Self::read(name, &LocalDirectory::new(path)?, pool)
    }

    /// Reads the configuration and all headers from `source`: those of a local directory on the
    /// threads of `pool`, distant ones by a few requests at a time.
    ///
    /// # Errors
    /// A file is missing, is not as its format has it, or contradicts another.
    pub fn read(name: impl Into<String>, source: &dyn Source, pool: &Pool) -> Result<Self> {
        let config = ModelConfig::read(source)?;
        let index = if source.has(index::FILE) {
            Some(Index::read(source)?)
        } else if source.has(SINGLE_FILE) {
            None
        } else {
            return Err(no_weights(source));
        };
        let shards = index.as_ref().map_or_else(|| vec![SINGLE_FILE.to_owned()], |index| index.shards.clone());
        check_presence(source, &shards)?;
        // Reading a distant file is waiting, for which there need not be cores.
        let requests = Pool::new(REQUESTS);
        let pool = if source.directory().is_some() { pool } else { &requests };
        let total = AtomicUsize::new(0);
        let read = pool.try_map(shards.len(), |at| {
            let read = header::read(source, &shards[at], at)?;
            let before = total.fetch_add(read.1.len(), Ordering::Relaxed);
            if before + read.1.len() > header::MAX_TENSORS {
                let most = header::MAX_TENSORS;
                return Err(Error::input(format!("the shards name more than {most} tensors, the most that are read")));
            }
            Ok(read)
        })?;
        let (shard_sizes, headers): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        let (catalog, unlisted) = match index {
            Some(index) => catalog_by_index(source, &index, headers)?,
            None => (headers.into_iter().flatten().collect(), 0),
        };
        Ok(Self {
            name: name.into(),
            config: Arc::new(config),
            origin: source.origin(),
            directory: source.directory().map(Path::to_path_buf),
            shards: shards.into(),
            shard_sizes: shard_sizes.into(),
            catalog: Arc::new(catalog),
            unlisted,
        })
    }

    /// The local directory that holds it.
    pub fn local_directory(&self) -> Result<&Path> {
        let nowhere = || Error::input(format!("`{}` is not in a local directory", self.name));
        self.directory.as_deref().ok_or_else(nowhere)
    }
}

/// Headers that are asked for at a time where they are not in a local directory.
const REQUESTS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(7);

fn no_weights(source: &dyn Source) -> Error {
    let error = Error::input(format!("`{}` is missing, and so is `{}`", source.display(SINGLE_FILE), index::FILE));
    let pickles = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
    match pickles.iter().find(|file| source.has(file)) {
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
    let missing: Vec<_> = shards.iter().filter(|shard| !source.has(shard)).collect();
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

/// The tensors that the index names, each in the shard that it names, and the
/// number of those that only shards know.
fn catalog_by_index(
    source: &dyn Source,
    index: &Index,
    headers: Vec<Vec<(String, Tensor)>>,
) -> Result<(BTreeMap<String, Tensor>, usize)> {
    let mut catalog = BTreeMap::new();
    let mut unlisted: BTreeMap<String, usize> = BTreeMap::new();
    for (name, tensor) in headers.into_iter().flatten() {
        let shard = tensor.shard;
        if index.weight_map.get(&name) == Some(&shard) {
            catalog.insert(name, tensor);
        } else if !index.weight_map.contains_key(&name)
            && let Some(other) = unlisted.insert(name.clone(), shard)
        {
            return Err(Error::input(format!(
                "tensor `{}` stands in `{}` and in `{}`, and the index names neither",
                printable(&name),
                index.shards[other],
                index.shards[shard]
            )));
        }
    }
    let mut lacking = index.weight_map.iter().filter(|(name, _)| !catalog.contains_key(*name)).peekable();
    if let Some((_, shard)) = lacking.peek().copied() {
        let names = lacking.filter(|(_, at)| *at == shard).map(|(name, _)| printable(name));
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
