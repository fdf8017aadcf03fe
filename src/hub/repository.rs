//! One repository at one commit: what of it is in the cache, and the rest.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hf_hub::{HFError, split_id};

use super::explain::lock_held;
use super::link::{Failure, Limits, Link, Note, QUIET_WAIT, is_commit, quiet};
use super::{Hub, HubEvent, LOCK_WAIT, RATE_LIMIT_WAIT, RepoId};
use crate::bytes::{Bytes, KIB};
use crate::checkpoint::{Index, SINGLE_FILE, index};
use crate::error::{Error, Result, printable};
use crate::source::{LocalDirectory, Origin, Source};
use crate::{fs, model_config};

/// How often a wait for the lock is announced.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long hf-hub waits for its own lock of a file, and is silent meanwhile.
const FILE_LOCK_WAIT: Duration = Duration::from_secs(10);
/// Files downloaded at a time.
const WORKERS: usize = 4;
/// What is fetched of a shard at its first read: nearly every header is shorter.
const FIRST_READ: u64 = 128 * KIB;
/// What a load reads besides the configuration and the weights, where it exists.
const SMALL_FILES: [&str; 5] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
];

/// A repository at one commit. As a [`Source`] it reads from the cache what is
/// there; other small files it downloads whole, and shards by ranges.
#[derive(Debug)]
pub struct Repository {
    id: RepoId,
    revision: String,
    commit: String,
    /// The repository's directory in the cache.
    home: PathBuf,
    /// The commit's directory in the cache; it may lack files, or be missing.
    snapshot: PathBuf,
    locks: PathBuf,
    /// Where the headers of this commit are kept.
    headers: PathBuf,
    /// Sizes of the files that matter, as the Hub has them; none offline.
    files: BTreeMap<String, u64>,
    link: Option<Link>,
    /// The first bytes of shards that are not in the cache.
    heads: Mutex<HashMap<String, Arc<Vec<u8>>>>,
}

impl Hub {
    /// Opens a repository at a branch, a tag or a commit. The commit is found
    /// out now, and all files are read from it.
    ///
    /// # Errors
    /// The repository or the revision does not exist or may not be read, or the
    /// Hub cannot be reached; offline: the revision is not in the cache.
    pub fn repository(&self, id: &RepoId, revision: &str) -> Result<Repository> {
        let part_is_plain = |part: &str| !matches!(part, "" | "." | "..");
        if !revision.split('/').all(part_is_plain)
            || revision.len() > 250
            || revision.contains(|c: char| c.is_control() || c.is_whitespace() || "\\:?*[^~".contains(c))
        {
            return Err(Error::usage(format!("`{}` is not a revision", printable(revision)))
                .hint("name a branch, a tag or a commit"));
        }
        let folder = format!("models--{}", id.0.replace('/', "--"));
        let home = self.options.cache.join(&folder);
        let cached = cached_commit(&home, revision);
        let (commit, files, link) = if let Some(client) = &self.client {
            let (owner, name) = split_id(&id.0);
            let link = Link {
                repository: client.model(owner, name),
                options: self.options.clone(),
                id: id.clone(),
                revision: revision.to_owned(),
            };
            let (commit, files) = link.open().map_err(|failure| {
                let unreachable = failure.is_unreachable();
                let error = link.explain(failure, None);
                match cached {
                    Some(commit) if unreachable => {
                        error.hint(format!("commit {commit} of `{id}` is in the cache: HF_HUB_OFFLINE=1 uses it"))
                    }
                    _ => error,
                }
            })?;
            (commit, files, Some(link))
        } else {
            let commit = cached.ok_or_else(|| not_cached("the commit", id, revision))?;
            (commit, BTreeMap::new(), None)
        };
        Ok(Repository {
            id: id.clone(),
            revision: revision.to_owned(),
            snapshot: home.join("snapshots").join(&commit),
            locks: self.options.cache.join(".locks").join(&folder),
            headers: self.options.cache.join(".evenkeel").join(folder).join(&commit),
            home,
            commit,
            files,
            link,
            heads: Mutex::default(),
        })
    }
}

impl Repository {
    /// The commit that all files are read from.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Downloads into the cache what a load needs: the configuration, the
    /// tokenizer's files, and the weights in safetensors format; pickles never.
    /// Returns the directory that holds them. What is there already in its full
    /// size is not downloaded again; offline, everything must be there.
    ///
    /// # Errors
    /// A file is missing or may not be read, the connection fails or is silent
    /// for too long, a file arrives in another size than the Hub gives, the
    /// disk has no room, or another process holds the lock for longer than
    /// [`LOCK_WAIT`].
    pub fn download(&self, on_event: &mut dyn FnMut(HubEvent)) -> Result<PathBuf> {
        let wanted = self.wanted()?;
        if let Some(link) = &self.link
            && !self.missing(&wanted)?.is_empty()
        {
            let _lock = self.lock(on_event)?;
            let missing = self.missing(&wanted)?;
            let bytes = missing.iter().map(|(_, size)| Bytes(*size)).sum();
            on_event(HubEvent::Total { bytes, files: missing.len() });
            let free = fs::free_space(&link.options.cache)?;
            if bytes > free {
                let cache = link.options.cache.display();
                return Err(Error::does_not_fit(format!(
                    "{bytes} must be downloaded, and `{cache}` has room for {free}"
                ))
                .hint("HF_HUB_CACHE names another directory for the cache"));
            }
            self.fetch_all(link, &missing, on_event)?;
        } else {
            if let Some(file) = wanted.iter().find(|file| !self.is_cached(file)) {
                return Err(self.offline(file));
            }
            on_event(HubEvent::Total { bytes: Bytes::ZERO, files: 0 });
        }
        self.remember()?;
        Ok(self.snapshot.clone())
    }

    fn wanted(&self) -> Result<Vec<String>> {
        let mut wanted = vec![model_config::FILE.to_owned()];
        wanted.extend(SMALL_FILES.into_iter().filter(|file| self.has(file)).map(str::to_owned));
        if self.has(index::FILE) {
            wanted.push(index::FILE.to_owned());
            wanted.extend(Index::read(self)?.shards);
        } else {
            wanted.push(SINGLE_FILE.to_owned());
        }
        Ok(wanted)
    }

    /// Those of `wanted` that are not in the cache, with their sizes.
    fn missing(&self, wanted: &[String]) -> Result<Vec<(String, u64)>> {
        let with_size = |file: &String| Ok((file.clone(), self.size_on_hub(file)?));
        wanted.iter().filter(|file| !self.is_cached(file)).map(with_size).collect()
    }

    fn is_cached(&self, file: &str) -> bool {
        let metadata = std::fs::metadata(self.snapshot.join(file));
        metadata.is_ok_and(|m| m.is_file() && self.files.get(file).is_none_or(|size| *size == m.len()))
    }

    fn size_on_hub(&self, file: &str) -> Result<u64> {
        let missing = || {
            Error::input(format!("`{}` is not in `{}@{}`", printable(file), self.id, self.revision))
                .hint("the repository must hold a checkpoint in safetensors format, as Transformers saves it")
        };
        self.files.get(file).copied().ok_or_else(missing)
    }

    fn offline(&self, file: &str) -> Error {
        not_cached(&printable(file), &self.id, &self.revision)
    }

    /// The link to the Hub and the size there of a file that is not in the cache.
    fn remote(&self, file: &str) -> Result<(&Link, u64)> {
        let link = self.link.as_ref().ok_or_else(|| self.offline(file))?;
        Ok((link, self.size_on_hub(file)?))
    }

    fn local(&self) -> Result<LocalDirectory> {
        LocalDirectory::new(&self.snapshot)
    }

    /// Writes down in the cache which commit the revision is, for offline use.
    fn remember(&self) -> Result<()> {
        if self.link.is_none()
            || is_commit(&self.revision)
            || cached_commit(&self.home, &self.revision).as_ref() == Some(&self.commit)
        {
            return Ok(());
        }
        let path = self.home.join("refs").join(&self.revision);
        let parent = path.parent().unwrap_or(&self.home);
        std::fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
        fs::write_atomic(&path, self.commit.as_bytes(), true)
    }

    /// Takes the repository's lock; it is free again when the file is closed.
    fn lock(&self, on_event: &mut dyn FnMut(HubEvent)) -> Result<File> {
        std::fs::create_dir_all(&self.locks).map_err(|e| Error::io("create", &self.locks, e))?;
        let path = self.locks.join("evenkeel.lock");
        let file = File::options().create(true).append(true).open(&path).map_err(|e| Error::io("open", &path, e))?;
        let begun = Instant::now();
        let mut announced = 0;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_WAIT => {
                    if begun.elapsed() >= HEARTBEAT * announced {
                        announced += 1;
                        on_event(HubEvent::LockHeld(path.clone()));
                    }
                    thread::sleep(Duration::from_millis(50));
                }
                Err(TryLockError::WouldBlock) => return Err(lock_held(&path)),
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path, e)),
            }
        }
    }

    fn fetch_all(&self, link: &Link, files: &[(String, u64)], on_event: &mut dyn FnMut(HubEvent)) -> Result<()> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..WORKERS.min(files.len()) {
                let (sender, next, stop) = (sender.clone(), &next, &stop);
                scope.spawn(move || {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some((file, size)) = files.get(at).filter(|_| !stop.load(Ordering::Relaxed)) else {
                            break;
                        };
                        let mut note = |event| match sender.send((at, Ok(event))) {
                            Ok(()) if !stop.load(Ordering::Relaxed) => ControlFlow::Continue(()),
                            _ => ControlFlow::Break(()),
                        };
                        if let Err(failure) = self.fetch(link, file, *size, RATE_LIMIT_WAIT, &mut note) {
                            // First the cause, then what others make of the stop. Only a
                            // caller that has panicked no longer listens.
                            let _ = sender.send((at, Err(failure)));
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
            drop(sender);
            let mut arrived = vec![Bytes::ZERO; files.len()];
            let mut failed = None;
            for (at, note) in receiver {
                match note {
                    Ok(HubEvent::Downloaded(bytes)) => {
                        arrived[at] = bytes;
                        on_event(HubEvent::Downloaded(arrived.iter().copied().sum()));
                    }
                    Ok(event) => on_event(event),
                    Err(failure) => failed = failed.or_else(|| Some(link.explain(failure, Some(&files[at].0)))),
                }
            }
            failed.map_or(Ok(()), Err)
        })
    }

    /// Downloads one file into the cache and checks its size.
    fn fetch(&self, link: &Link, file: &str, size: u64, patience: Duration, note: Note) -> Result<(), Failure> {
        let path = self.snapshot.join(file);
        link.retry(patience, note, |note| {
            // A link to nothing or to a file of another size is no download.
            let replace = path.symlink_metadata().is_ok();
            let (name, commit) = (file.to_owned(), self.commit.clone());
            let silence = link.options.timeout + FILE_LOCK_WAIT;
            let placed =
                link.call(silence, Limits { declared: size, arriving: size }, note, move |repository, progress| {
                    let download = repository.download_file().filename(name).revision(commit);
                    download.force_download(replace).progress(progress).send()
                })?;
            if placed != path {
                return Err(Failure::OtherCommit);
            }
            let got = std::fs::metadata(&path).map_err(|e| Failure::Hub(HFError::Io(e)))?.len();
            if got != size {
                // What cannot be removed is found again by its size.
                let _ = path.canonicalize().and_then(std::fs::remove_file);
                let _ = std::fs::remove_file(&path);
                return Err(Failure::WrongSize { got, size });
            }
            // Whether to go on is asked before the next file.
            let _ = note(HubEvent::Downloaded(Bytes(size)));
            Ok(())
        })
    }

    fn range(&self, link: &Link, file: &str, size: u64, offset: u64, len: u64) -> Result<Vec<u8>> {
        let bytes = link.retry(QUIET_WAIT, &mut quiet, |note| {
            let (name, commit) = (file.to_owned(), self.commit.clone());
            let limits = Limits { declared: size, arriving: len };
            let bytes = link.call(link.options.timeout, limits, note, move |repository, progress| {
                let download = repository.download_file_to_bytes().filename(name).revision(commit);
                download.range(offset..offset + len).progress(progress).send()
            })?;
            match bytes.len() as u64 {
                got if got == len => Ok(bytes),
                got => Err(Failure::WrongSize { got, size: len }),
            }
        });
        bytes.map(Vec::from).map_err(|failure| link.explain(failure, Some(file)))
    }

    /// The first bytes of a shard: its header, where that is within
    /// [`FIRST_READ`]; kept on the disk for the next time.
    fn head(&self, link: &Link, file: &str, size: u64) -> Result<Arc<Vec<u8>>> {
        let heads = || self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(head) = heads().get(file) {
            return Ok(head.clone());
        }
        let kept = self.headers.join(file);
        let head = match fs::read_capped(&kept, Bytes(FIRST_READ)) {
            Ok(head) if head_end(&head) == Some(head.len()) => head,
            _ => {
                let mut head = self.range(link, file, size, 0, size.min(FIRST_READ))?;
                head.truncate(head_end(&head).unwrap_or(usize::MAX));
                head.shrink_to_fit();
                // What cannot be kept is fetched again.
                let _ = std::fs::create_dir_all(&self.headers).map(|()| fs::write_atomic(&kept, &head, true));
                head
            }
        };
        let head = Arc::new(head);
        heads().insert(file.to_owned(), head.clone());
        Ok(head)
    }
}

/// Where the header ends that `head` begins with; behind its length field where it is not whole.
fn head_end(head: &[u8]) -> Option<usize> {
    let length = head.first_chunk()?;
    let end = u64::from_le_bytes(*length).saturating_add(length.len() as u64);
    Some(if end <= FIRST_READ { usize::try_from(end).ok()? } else { length.len() })
}

impl Source for Repository {
    fn has(&self, file: &str) -> bool {
        if self.link.is_some() { self.files.contains_key(file) } else { self.is_cached(file) }
    }

    fn read(&self, file: &str, cap: Bytes) -> Result<Vec<u8>> {
        check_name(file)?;
        if !self.is_cached(file) {
            let (link, size) = self.remote(file)?;
            if size > cap.0 {
                let (size, shown) = (Bytes(size), self.display(file));
                return Err(Error::input(format!("`{shown}` is {size}, and at most {cap} is read of such a file")));
            }
            self.fetch(link, file, size, QUIET_WAIT, &mut quiet)
                .map_err(|failure| link.explain(failure, Some(file)))?;
            self.remember()?;
        }
        self.local()?.read(file, cap)
    }

    fn size(&self, file: &str) -> Result<Bytes> {
        check_name(file)?;
        if self.is_cached(file) {
            return self.local()?.size(file);
        }
        self.remote(file).map(|(_, size)| Bytes(size))
    }

    fn read_range(&self, file: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        check_name(file)?;
        if self.is_cached(file) {
            return self.local()?.read_range(file, offset, len);
        }
        let (link, size) = self.remote(file)?;
        let len = size.saturating_sub(offset).min(len as u64);
        if len == 0 {
            return Ok(Vec::new());
        }
        if offset + len <= FIRST_READ {
            let head = self.head(link, file, size)?;
            // Both ends are within the first read.
            #[expect(clippy::cast_possible_truncation, reason = "at most FIRST_READ")]
            if let Some(part) = head.get(offset as usize..(offset + len) as usize) {
                return Ok(part.to_vec());
            }
        }
        self.range(link, file, size, offset, len)
    }

    fn display(&self, file: &str) -> String {
        format!("{}@{}/{}", self.id, self.revision, printable(file))
    }

    fn directory(&self) -> Option<&Path> {
        None
    }

    fn origin(&self) -> Origin {
        Origin::Repository { repository: self.id.to_string(), commit: self.commit.clone() }
    }
}

fn not_cached(what: &str, id: &RepoId, revision: &str) -> Error {
    Error::input(format!("HF_HUB_OFFLINE is set and {what} of {id}@{revision} is not cached"))
        .hint(format!("hf download {id} --revision {revision}"))
}

/// The commit that a revision is according to the cache, where its directory is there.
fn cached_commit(home: &Path, revision: &str) -> Option<String> {
    const CAP: Bytes = Bytes(100);
    let commit = if is_commit(revision) {
        revision.to_owned()
    } else {
        let text = fs::read_capped(&home.join("refs").join(revision), CAP).ok()?;
        String::from_utf8(text).ok()?.trim().to_owned()
    };
    (is_commit(&commit) && home.join("snapshots").join(&commit).is_dir()).then_some(commit)
}

/// Names come from the checkpoint, and become parts of paths and URLs.
fn check_name(file: &str) -> Result<()> {
    if fs::is_plain_name(file) {
        Ok(())
    } else {
        Err(Error::input(format!("`{}` is no file name inside a repository", printable(file))))
    }
}
