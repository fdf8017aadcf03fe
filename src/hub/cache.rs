//! One repository's part of the cache that all Hugging Face tools share:
//! `blobs`, `refs` and `snapshots`, and what has come of a blob so far.

use std::fs::{File, OpenOptions, create_dir_all, metadata, remove_file, rename};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo};
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};
use ureq::http::HeaderValue;

use super::names::{Commit, Oid};
use super::options::{HubEvent, HubOptions, RepoId};
use super::wire::{Failure, Note};
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::fs;

/// How long the first part of a file waits for a run that fetches the rest.
const PARTIAL_KEPT: Duration = Duration::from_hours(7 * 24);
/// The ending of files in `blobs` that are not whole.
const PARTIAL: &str = ".evenkeel";

/// A repository's directory in the cache.
#[derive(Debug)]
pub(super) struct Home {
    directory: PathBuf,
    pub locks: PathBuf,
    /// Where headers of shards are kept, by commit.
    headers: PathBuf,
    repository: CacheRepo,
}

impl Home {
    pub fn new(options: &HubOptions, id: &RepoId) -> Self {
        let (cache, repository) = (&options.cache, Repo::model(id.0.clone()));
        let folder = repository.folder_name();
        Self {
            directory: cache.join(&folder),
            locks: cache.join(".locks").join(&folder),
            headers: cache.join(".evenkeel").join(folder),
            repository: Cache::new(cache.clone()).repo(repository),
        }
    }

    /// The commit's directory; it may lack files, or be missing.
    pub fn snapshot(&self, commit: &Commit) -> PathBuf {
        self.repository.pointer_path(commit.as_str())
    }

    pub fn headers(&self, commit: &Commit) -> PathBuf {
        self.headers.join(commit.as_str())
    }

    fn blob(&self, oid: &Oid) -> PathBuf {
        self.directory.join("blobs").join(oid.as_str())
    }

    fn partial(&self, oid: &Oid) -> PathBuf {
        self.blob(oid).with_extension(&PARTIAL[1..])
    }

    /// The commit that a revision is, where its directory is there.
    pub fn commit(&self, revision: &str) -> Option<Commit> {
        const CAP: Bytes = Bytes(100);
        let commit = Commit::parse(revision).or_else(|| {
            let text = fs::read_capped(&self.directory.join("refs").join(revision), CAP).ok()?;
            Commit::parse(str::from_utf8(&text).ok()?.trim())
        })?;
        self.snapshot(&commit).is_dir().then_some(commit)
    }

    /// Writes down which commit the revision is, for offline use.
    pub fn remember(&self, revision: &str, commit: &Commit) -> Result<()> {
        if Commit::parse(revision).is_some() || self.commit(revision).as_ref() == Some(commit) {
            return Ok(());
        }
        let path = self.directory.join("refs").join(revision);
        create_directory(path.parent().unwrap_or(&self.directory))?;
        fs::write_atomic(&path, commit.as_str().as_bytes(), true)
    }

    /// Whether the whole blob is there.
    pub fn has_blob(&self, oid: &Oid, size: u64) -> bool {
        self.blob(oid).symlink_metadata().is_ok_and(|m| m.is_file() && m.len() == size)
    }

    /// How much of the blob is there.
    pub fn arrived(&self, oid: &Oid, size: u64) -> u64 {
        let partial = || metadata(self.partial(oid)).map_or(0, |m| m.len().min(size));
        if self.has_blob(oid, size) { size } else { partial() }
    }

    /// Removes what killed runs have left, and no run came back for. The caller holds the lock.
    pub fn sweep(&self) {
        let entries = self.directory.join("blobs").read_dir().into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().as_encoded_bytes().ends_with(PARTIAL.as_bytes())) {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            if modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > PARTIAL_KEPT)) {
                // What cannot be removed is no harm.
                let _ = remove_file(entry.path());
            }
        }
    }

    /// Puts the blob under the file's name into the commit's directory, by a
    /// link where the file system has links.
    pub fn link(&self, commit: &Commit, file: &str, oid: &Oid) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        let directory = path.parent().unwrap_or(&self.directory);
        create_directory(directory)?;
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{}", oid.as_str()));
        let failed = |e| Error::io("write", &path, e);
        match tempfile::Builder::new().prefix(PARTIAL).make_in(directory, |link| symlink(&target, link)) {
            Ok(link) => link.into_temp_path().persist(&path).map_err(|e| failed(e.error)),
            Err(_) => rename(self.blob(oid), &path).map_err(failed),
        }
    }

    /// Begins to fetch a blob. Under the lock what has come of known content is
    /// kept for a later run, and what an earlier one has kept is gone on with.
    pub fn begin(&self, known: Option<&Oid>, note: Note) -> Result<Partial, Failure> {
        let blobs = self.directory.join("blobs");
        create_directory(&blobs)?;
        let file = match known {
            Some(oid) => {
                let path = self.partial(oid);
                let failed = |e| Error::io("open", &path, e);
                let mut open = OpenOptions::new();
                let open = open.read(true).append(true).create(true);
                // A link in its place is not followed.
                let no_link = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
                let file = open.custom_flags(no_link).open(&path).map_err(failed)?;
                let mut file = NamedTempFile::from_parts(file, TempPath::try_from_path(&path).map_err(failed)?);
                file.disable_cleanup(true);
                file
            }
            None => tempfile::Builder::new()
                .prefix(".")
                .suffix(PARTIAL)
                .permissions(PermissionsExt::from_mode(0o666))
                .tempfile_in(&blobs)
                .map_err(|e| Error::io("write to", &blobs, e))?,
        };
        let mut partial = Partial { file, len: 0, hasher: Sha256::new(), validator: None };
        partial.read(note)?;
        Ok(partial)
    }

    /// Makes a blob of what is whole.
    pub fn keep(&self, partial: Partial, oid: &Oid) -> Result<()> {
        let path = self.blob(oid);
        let failed = |e| Error::io("write", &path, e);
        partial.file.as_file().sync_data().map_err(failed)?;
        partial.file.persist(&path).map(drop).map_err(|e| failed(e.error))
    }
}

/// The first part of a file.
pub(super) struct Partial {
    file: NamedTempFile,
    pub len: u64,
    hasher: Sha256,
    /// The ETag of the server that sent it, in this run.
    pub validator: Option<HeaderValue>,
}

impl Partial {
    fn failed(&self, e: std::io::Error) -> Failure {
        Error::io("write", self.file.path(), e).into()
    }

    fn read(&mut self, note: Note) -> Result<(), Failure> {
        let mut piece = vec![0; 1 << 20];
        loop {
            let count = File::read(self.file.as_file_mut(), &mut piece).map_err(|e| self.failed(e))?;
            if count == 0 {
                return Ok(());
            }
            self.hasher.update(&piece[..count]);
            self.len += count as u64;
            if note(HubEvent::Downloaded(Bytes(self.len))).is_break() {
                return Err(Failure::Stopped);
            }
        }
    }

    pub fn write(&mut self, piece: &[u8]) -> Result<(), Failure> {
        self.file.write_all(piece).map_err(|e| self.failed(e))?;
        self.hasher.update(piece);
        self.len += piece.len() as u64;
        Ok(())
    }

    /// Forgets all that has come.
    pub fn restart(&mut self) -> Result<(), Failure> {
        let file = self.file.as_file_mut();
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(|e| self.failed(e))?;
        (self.len, self.hasher) = (0, Sha256::new());
        Ok(())
    }

    /// The failure of what has come and is not to be built on.
    pub fn spoiled(&mut self, failure: Failure) -> Failure {
        self.restart().err().unwrap_or(failure)
    }

    /// Ends a try that failed; nothing is kept of what was spoiled.
    pub fn give_up(mut self) {
        if self.len == 0 {
            self.file.disable_cleanup(false);
        }
    }

    pub fn sha256(&self) -> Oid {
        Oid::of_sha256(&self.hasher.clone().finalize())
    }
}

fn create_directory(path: &Path) -> Result<()> {
    create_dir_all(path).map_err(|e| Error::io("create", path, e))
}
