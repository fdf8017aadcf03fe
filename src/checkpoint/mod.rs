//! A checkpoint's files: the configuration and the headers of its shards, read
//! without any weights, and checked against each other.

mod header;
pub mod index;
mod note;
mod others;
mod wrapped;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::Dtype;

pub use crate::source::{LocalDirectory, Origin, Source};
pub use index::Index;
pub use note::Note;

use crate::bytes::{Bytes, KIB, MIB};
use crate::error::{Error, Result, first_five, printable};
use crate::model_config::{HEAD_WEIGHT, ModelConfig};
use crate::pool::Pool;
use crate::text;

/// The file of a checkpoint that has no index.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Of a head and an embedding that may be the same: so many pieces of so many bytes are compared where not all are.
const COMPARED: u64 = 64;
const COMPARED_PIECE: u64 = 16 * KIB;

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
    /// Size of the tokenizer's file; none where there is no such file.
    pub tokenizer_size: Bytes,
    /// Every tensor that the shards hold, by its name without what wrappers put before it.
    pub catalog: Arc<BTreeMap<String, Tensor>>,
    /// Whether a stored head was taken for the embedding by samples of both.
    pub is_head_sampled: bool,
    /// What is not as it should be.
    pub notes: Vec<Note>,
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
        others::check_configuration(source)?;
        let config = ModelConfig::read(source)?;
        let has_index = source.has(index::FILE);
        // As in Transformers the whole file comes first, so that an index may be left of shards that are gone.
        let index = match (source.has(SINGLE_FILE), has_index) {
            (true, _) => None,
            (false, true) => Some(Index::read(source)?),
            (false, false) => return Err(others::no_weights(source)),
        };
        let read = config.family.architecture;
        let other = config.other_architectures.clone().map(|said| Note::OtherArchitecture { said, read });
        let mut notes: Vec<_> = other.into_iter().collect();
        notes.extend((index.is_none() && has_index).then_some(Note::SingleFile));
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
        let (catalog, displaced) = match index {
            Some(index) => catalog_by_index(&index, headers)?,
            None => (headers.into_iter().flatten().collect(), Vec::new()),
        };
        notes.extend((!displaced.is_empty()).then_some(Note::Displaced(displaced)));
        let (catalog, prefix) = wrapped::unwrap(catalog, &config);
        notes.extend(prefix.map(Note::Unwrapped));
        let mut checkpoint = Self {
            name: name.into(),
            config: Arc::new(config),
            origin: source.origin(),
            directory: source.directory().map(Path::to_path_buf),
            shards: shards.into(),
            shard_sizes: shard_sizes.into(),
            // Only an estimate follows from it.
            tokenizer_size: if source.has(text::FILE) {
                source.size(text::FILE).unwrap_or_default()
            } else {
                Bytes::ZERO
            },
            catalog: Arc::new(catalog),
            is_head_sampled: false,
            notes,
        };
        others::check_quantized(source, &checkpoint)?;
        checkpoint.tell_head_from_embedding(source, true)?;
        Ok(checkpoint)
    }

    /// Compares all of a stored head with the embedding, where only samples of them were.
    ///
    /// # Errors
    /// The checkpoint is not in a local directory, or a file cannot be read.
    pub fn compare_head(&mut self) -> Result<()> {
        if self.is_head_sampled {
            let source = LocalDirectory::new(self.local_directory()?)?;
            self.tell_head_from_embedding(&source, false)?;
        }
        Ok(())
    }

    /// As [`Checkpoint::compare_head`], where it is too late to go by what is found.
    ///
    /// # Errors
    /// The head is not the embedding, which it was taken for.
    pub(crate) fn confirm_head(&self) -> Result<()> {
        let mut compared = self.clone();
        compared.compare_head()?;
        if compared.config.tie_word_embeddings == self.config.tie_word_embeddings {
            return Ok(());
        }
        Err(Error::input(format!("`{}`: a few rows of `{HEAD_WEIGHT}` differ from the embedding", self.name))
            .hint("`tie_word_embeddings: false` in config.json says so before"))
    }

    /// Sees whether a head that is stored beside the embedding is the same, as the configuration says, and else
    /// goes by what is stored.
    fn tell_head_from_embedding(&mut self, source: &dyn Source, by_samples: bool) -> Result<()> {
        self.is_head_sampled = false;
        let embedding = self.config.family.embedding_weights().iter().find_map(|name| self.catalog.get(name));
        let (true, Some(embedding), Some(head)) =
            (self.config.tie_word_embeddings, embedding, self.catalog.get(HEAD_WEIGHT))
        else {
            return Ok(());
        };
        let is_alike = (&head.dtype, &head.shape) == (&embedding.dtype, &embedding.shape);
        if is_alike && source.directory().is_none() {
            self.notes.push(Note::HeadUnread);
            return Ok(());
        }
        let size = embedding.size().0;
        let (piece, step) =
            if by_samples { (COMPARED_PIECE, (size / COMPARED).max(COMPARED_PIECE)) } else { (MIB, MIB) };
        // The last rows are those of tokens that were added.
        let mut places =
            (0..size).step_by(usize::try_from(step).unwrap_or(usize::MAX)).chain([size.saturating_sub(piece)]);
        let differ = |at: u64| -> Result<bool> {
            #[expect(clippy::cast_possible_truncation, reason = "at most a piece")]
            let of = |tensor: &Tensor| {
                let len = piece.min(size - at) as usize;
                source.read_range(&self.shards[tensor.shard], tensor.range.start + at, len)
            };
            Ok(of(embedding)? != of(head)?)
        };
        if !is_alike || places.try_fold(false, |found, at| Ok::<_, Error>(found || differ(at)?))? {
            Arc::make_mut(&mut self.config).tie_word_embeddings = false;
            self.notes.push(Note::OwnHead);
        } else {
            self.is_head_sampled = step > piece;
        }
        Ok(())
    }

    /// The local directory that holds it.
    pub fn local_directory(&self) -> Result<&Path> {
        let nowhere = || Error::input(format!("`{}` is not in a local directory", self.name));
        self.directory.as_deref().ok_or_else(nowhere)
    }
}

/// Headers that are asked for at a time where they are not in a local directory.
const REQUESTS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(7);

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

/// The tensors of all shards, each where the index says if it is there, and the names of those that are elsewhere.
fn catalog_by_index(
    index: &Index,
    headers: Vec<Vec<(String, Tensor)>>,
) -> Result<(BTreeMap<String, Tensor>, Vec<String>)> {
    let (mut catalog, mut displaced) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in headers.into_iter().flatten() {
        if index.weight_map.get(&name) == Some(&tensor.shard) {
            catalog.insert(name, tensor);
        } else {
            displaced.entry(name).or_insert_with(Vec::new).push(tensor);
        }
    }
    displaced.retain(|name, _| !catalog.contains_key(name));
    for (name, tensors) in &displaced {
        if let [one, other, ..] = &tensors[..] {
            return Err(Error::input(format!(
                "tensor `{}` stands in `{}` and in `{}`, and the index names neither",
                printable(name),
                index.shards[one.shard],
                index.shards[other.shard]
            )));
        }
    }
    let names = displaced.keys().cloned().collect();
    catalog
        .extend(displaced.into_iter().flat_map(|(name, tensors)| tensors.into_iter().map(move |t| (name.clone(), t))));
    Ok((catalog, names))
}

impl Tensor {
    /// The bytes of its data.
    pub fn size(&self) -> Bytes {
        Bytes(self.range.end - self.range.start)
    }
}
