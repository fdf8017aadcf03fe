//! Where a checkpoint's files come from: a local directory, or the Hub by ranges.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::fs;

/// The files of one checkpoint, read in parts. File names come from the
/// checkpoint itself, so every implementation confines them to the checkpoint.
pub trait Source: Send + Sync {
    /// Whether the checkpoint has this file.
    fn has(&self, file: &str) -> bool;

    /// A whole file of at most `cap` bytes.
    fn read(&self, file: &str, cap: Bytes) -> Result<Vec<u8>>;

    /// The size of a file.
    fn size(&self, file: &str) -> Result<Bytes>;

    /// `len` bytes from `offset` on, or fewer where the file ends.
    fn read_range(&self, file: &str, offset: u64, len: usize) -> Result<Vec<u8>>;

    /// The file's name in messages.
    fn display(&self, file: &str) -> String;

    /// The local directory that holds the files, if one does.
    fn directory(&self) -> Option<&Path>;

    /// Where they can be found again.
    fn origin(&self) -> Origin;
}

/// Where a checkpoint can be found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Origin {
    /// A local directory.
    Directory {
        /// Its path, from the root.
        path: PathBuf,
    },
    /// A repository on the Hub.
    Repository {
        /// Its id, as `ORG/NAME`.
        repository: String,
        /// The commit.
        commit: String,
    },
}

/// A checkpoint in a local directory.
#[derive(Debug)]
pub struct LocalDirectory(PathBuf);

impl LocalDirectory {
    /// The checkpoint in the directory `path`.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let metadata = std::fs::metadata(&path).map_err(|e| Error::io("open", &path, e))?;
        if metadata.is_dir() {
            Ok(Self(path))
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            Err(Error::input(format!("`{}` is in GGUF, which is not read", path.display()))
                .hint("name the directory of the checkpoint in safetensors that it was made from"))
        } else {
            Err(Error::input(format!("`{}` is not a directory", path.display()))
                .hint("name the directory that holds the checkpoint's config.json"))
        }
    }

    /// A file with its path and its size.
    fn open(&self, file: &str) -> Result<(PathBuf, File, u64)> {
        let path = fs::confined(&self.0, file)?;
        let opened = fs::open_regular(&path)?;
        let size = opened.metadata().map_err(|e| Error::io("read", &path, e))?.len();
        Ok((path, opened, size))
    }
}

impl Source for LocalDirectory {
    fn has(&self, file: &str) -> bool {
        std::fs::symlink_metadata(self.0.join(file)).is_ok()
    }

    fn read(&self, file: &str, cap: Bytes) -> Result<Vec<u8>> {
        fs::read_capped(&fs::confined(&self.0, file)?, cap)
    }

    fn size(&self, file: &str) -> Result<Bytes> {
        self.open(file).map(|(_, _, size)| Bytes(size))
    }

    fn read_range(&self, file: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        let (path, file, size) = self.open(file)?;
        let len = len.min(usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX));
        let mut buffer = vec![0; len];
        file.read_exact_at(&mut buffer, offset).map_err(|e| Error::io("read", &path, e))?;
        Ok(buffer)
    }

    fn display(&self, file: &str) -> String {
        self.0.join(file).display().to_string()
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.0)
    }

    fn origin(&self) -> Origin {
        Origin::Directory { path: std::path::absolute(&self.0).unwrap_or_else(|_| self.0.clone()) }
    }
}
