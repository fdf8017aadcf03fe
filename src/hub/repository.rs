//! One repository at one commit: what of it is in the cache, and the rest.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::cache::Home;
use super::explain::lock_held;
use super::link::{Files, Link, QUIET_WAIT, Remote};
use super::names::Commit;
use super::options::{HubEvent, HubOptions, LOCK_WAIT, RATE_LIMIT_WAIT, RepoId};
use super::wire::{Client, Failure, Note, TICK};
use crate::bytes::{Bytes, KIB, MIB};
use crate::checkpoint::{Index, SINGLE_FILE, index};
use crate::error::{Error, Result, printable};
use crate::source::{LocalDirectory, Origin, Source};
use crate::{fs, model_config, text};

/// How often a wait for the lock is announced.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Files downloaded at a time.
const WORKERS: usize = 4;
/// What is fetched of a shard at its first read: nearly every header is shorter.
const FIRST_READ: u64 = 128 * KIB;
/// What a load reads beside the configuration, the weights, and what texts need, where it exists.
const GENERATION_CONFIG: &str = "generation_config.json";

/// The Hub, or its cache alone.
#[derive(Debug)]
pub struct Hub {
    options: HubOptions,
    client: Option<Client>,
}

/// A repository at one commit. As a [`Source`] it reads from the cache what is
/// there; other small files it downloads whole, and shards by ranges.
#[derive(Debug)]
pub struct Repository {
    id: RepoId,
    revision: String,
    commit: Commit,
    /// The repository's directory in the cache.
    home: Home,
    /// The commit's directory in the cache; it may lack files, or be missing.
    snapshot: PathBuf,
    /// The files that matter, as the Hub has them; none offline.
    files: Files,
    link: Option<Link>,
    /// The first bytes of shards that are not in the cache.
    heads: Mutex<HashMap<String, Arc<Vec<u8>>>>,
}

impl Hub {
    /// The Hub as `options` say.
    pub fn new(mut options: HubOptions) -> Result<Self> {
        options.endpoint.truncate(options.endpoint.trim_end_matches('/').len());
        let client = if options.offline { None } else { Some(Client::new(&options)?) };
        Ok(Self { options, client })
    }

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
        let home = Home::new(&self.options, id);
        let cached = home.commit(revision);
        let (commit, files, link) = if let Some(client) = &self.client {
            let (options, revision) = (self.options.clone(), revision.to_owned());
            let link = Link { client: client.clone(), options, id: id.clone(), revision };
            let (commit, files) = link.open().map_err(|failure| {
                let unreachable = failure.is_unreachable();
                let error = link.explain(failure, None);
                match cached {
                    Some(commit) if unreachable => {
                        let commit = commit.as_str();
                        error.hint(format!("commit {commit} of `{id}` is in the cache: HF_HUB_OFFLINE=1 uses it"))
                    }
                    _ => error,
                }
            })?;
            (commit, files, Some(link))
        } else {
            let commit = cached.ok_or_else(|| not_cached("the commit", id, revision))?;
            (commit, Files::new(), None)
        };
        Ok(Repository {
            id: id.clone(),
            revision: revision.to_owned(),
            snapshot: home.snapshot(&commit),
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
        self.commit.as_str()
    }

    /// Downloads into the cache what a load needs: the configuration, the
    /// tokenizer's files, and the weights in safetensors format; pickles never.
    /// Returns the directory that holds them. What is there already in its full
    /// size is not downloaded again, and what has come of a file of known
    /// content is gone on with; offline, everything must be there.
    ///
    /// # Errors
    /// A file is missing or may not be read, the connection fails or is silent
    /// or slow for too long, a file arrives in another size or with other bytes
    /// than the Hub says, the disk has no room, another process holds the lock
    /// for longer than [`LOCK_WAIT`], or the options' `cancel` was asked to stop.
    pub fn download(&self, on_event: &mut dyn FnMut(HubEvent)) -> Result<PathBuf> {
        let wanted = self.wanted()?;
        if let Some(link) = &self.link
            && !self.missing(&wanted)?.is_empty()
        {
            let _lock = self.lock(link, on_event)?;
            let missing = self.missing(&wanted)?;
            let bytes = total(missing.iter().map(|(_, remote)| remote.size));
            on_event(HubEvent::Total { bytes, files: missing.len() });
            self.home.sweep();
            let there = |remote: &Remote| remote.oid.as_ref().map_or(0, |oid| self.home.arrived(oid, remote.size));
            let needed = total(missing.iter().map(|(_, remote)| remote.size - there(remote)));
            let free = fs::free_space(&link.options.cache)?;
            if needed > free {
                let cache = link.options.cache.display();
                return Err(Error::does_not_fit(format!(
                    "{needed} must be downloaded, and `{cache}` has room for {free}"
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
        let small = text::FILES.into_iter().chain([GENERATION_CONFIG]);
        wanted.extend(small.filter(|file| self.has(file)).map(str::to_owned));
        // Where both are there, the whole file is what a checkpoint is read from.
        if self.has(index::FILE) && !self.has(SINGLE_FILE) {
            wanted.push(index::FILE.to_owned());
            wanted.extend(Index::read(self)?.shards);
        } else {
            wanted.push(SINGLE_FILE.to_owned());
        }
        Ok(wanted)
    }

    /// Those of `wanted` that are not in the cache, as the Hub describes them.
    fn missing(&self, wanted: &[String]) -> Result<Vec<(String, Remote)>> {
        let described = |file: &String| Ok((file.clone(), self.remote(file)?.1));
        wanted.iter().filter(|file| !self.is_cached(file)).map(described).collect()
    }

    /// Whether the file is there in the size that the Hub gives, as far as that is known.
    fn is_cached(&self, file: &str) -> bool {
        let size = self.files.get(file).and_then(|file| file.get()).map(|remote| remote.size);
        let metadata = std::fs::metadata(self.snapshot.join(file));
        metadata.is_ok_and(|m| m.is_file() && size.is_none_or(|size| size == m.len()))
    }

    fn offline(&self, file: &str) -> Error {
        not_cached(&printable(file), &self.id, &self.revision)
    }

    /// The link to the Hub and what that says of a file that is not in the cache.
    fn remote(&self, file: &str) -> Result<(&Link, Remote)> {
        let link = self.link.as_ref().ok_or_else(|| self.offline(file))?;
        let known = self.files.get(file).ok_or_else(|| {
            Error::input(format!("`{}` is not in `{}@{}`", printable(file), self.id, self.revision))
                .hint("the repository must hold a checkpoint in safetensors format, as Transformers saves it")
        })?;
        if let Some(remote) = known.get() {
            return Ok((link, remote.clone()));
        }
        let remote = link.describe(&self.commit, file).map_err(|failure| link.explain(failure, Some(file)))?;
        Ok((link, known.get_or_init(|| remote).clone()))
    }

    fn local(&self) -> Result<LocalDirectory> {
        LocalDirectory::new(&self.snapshot)
    }

    fn remember(&self) -> Result<()> {
        if self.link.is_none() { Ok(()) } else { self.home.remember(&self.revision, &self.commit) }
    }

    /// Takes the repository's lock; it is free again when the file is closed.
    fn lock(&self, link: &Link, on_event: &mut dyn FnMut(HubEvent)) -> Result<File> {
        let locks = &self.home.locks;
        std::fs::create_dir_all(locks).map_err(|e| Error::io("create", locks, e))?;
        let path = locks.join("evenkeel.lock");
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
                    link.options.cancel.check()?;
                    thread::sleep(TICK);
                }
                Err(TryLockError::WouldBlock) => return Err(lock_held(&path)),
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path, e)),
            }
        }
    }

    fn fetch_all(&self, link: &Link, files: &[(String, Remote)], on_event: &mut dyn FnMut(HubEvent)) -> Result<()> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (sender, receiver) = mpsc::channel();
        // Files of the same content are one blob, which one worker fetches.
        let is_again = |at: usize| {
            let oid = files[at].1.oid.as_ref();
            oid.is_some() && files[..at].iter().any(|(_, before)| before.oid.as_ref() == oid)
        };
        let work = |sender: mpsc::Sender<(usize, Result<HubEvent, Failure>)>| {
            let is_stopped = || stop.load(Ordering::Relaxed) || link.options.cancel.is_cancelled();
            while let at = next.fetch_add(1, Ordering::Relaxed)
                && let Some((file, remote)) = files.get(at).filter(|_| !is_stopped())
            {
                if is_again(at) {
                    continue;
                }
                let mut note = |event| match sender.send((at, Ok(event))) {
                    Ok(()) if !is_stopped() => ControlFlow::Continue(()),
                    _ => ControlFlow::Break(()),
                };
                if let Err(failure) = self.fetch(link, file, remote, Some(RATE_LIMIT_WAIT), &mut note) {
                    // First the cause, then what others make of the stop. Only a
                    // caller that has panicked no longer listens.
                    let _ = sender.send((at, Err(failure)));
                    stop.store(true, Ordering::Relaxed);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..WORKERS.min(files.len()) {
                let (work, sender) = (&work, sender.clone());
                thread::Builder::new().spawn_scoped(scope, move || work(sender)).map_err(|e| {
                    stop.store(true, Ordering::Relaxed);
                    Error::input("cannot start a thread").caused_by(e)
                })?;
            }
            drop(sender);
            let mut arrived = vec![0; files.len()];
            let mut failed = None;
            for (at, note) in receiver {
                match note {
                    Ok(HubEvent::Downloaded(bytes)) => {
                        arrived[at] = bytes.0;
                        on_event(HubEvent::Downloaded(total(arrived.iter().copied())));
                    }
                    Ok(event) => on_event(event),
                    Err(failure) => failed = failed.or_else(|| Some(link.explain(failure, Some(&files[at].0)))),
                }
            }
            link.options.cancel.check()?;
            failed.map_or(Ok(()), Err)
        })?;
        for (file, remote) in files.iter().enumerate().filter(|(at, _)| is_again(*at)).map(|(_, file)| file) {
            let fetched = self.fetch(link, file, remote, Some(RATE_LIMIT_WAIT), &mut link.quiet());
            fetched.map_err(|failure| link.explain(failure, Some(file)))?;
        }
        Ok(())
    }

    /// Fetches one file into the cache. The lock is held where there is
    /// `patience` with rate limits; else nothing is kept of a try that fails.
    fn fetch(
        &self,
        link: &Link,
        file: &str,
        remote: &Remote,
        patience: Option<Duration>,
        note: Note,
    ) -> Result<(), Failure> {
        let mut remote = remote.clone();
        if remote.oid.as_ref().is_none_or(|oid| !self.home.has_blob(oid, remote.size)) {
            let known = remote.oid.clone().filter(|oid| oid.is_sha256() && patience.is_some());
            let mut partial = self.home.begin(known.as_ref(), note)?;
            let filled = link.retry(patience.unwrap_or(QUIET_WAIT), note, |note| {
                loop {
                    let before = partial.len;
                    match link.fill(&mut partial, &self.commit, file, &mut remote, note) {
                        // As long as it gets on, a broken connection is no failed attempt.
                        Err(failure) if failure.is_broken() && partial.len >= before.saturating_add(MIB) => {}
                        filled => return filled,
                    }
                }
            });
            if let Err(failure) = filled {
                partial.give_up();
                return Err(failure);
            }
            let oid = remote.oid.get_or_insert_with(|| partial.sha256());
            self.home.keep(partial, oid)?;
        }
        if let Some(oid) = &remote.oid {
            self.home.link(&self.commit, file, oid)?;
        }
        // Whether to go on is asked before the next file.
        let _ = note(HubEvent::Downloaded(Bytes(remote.size)));
        Ok(())
    }

    fn range(&self, link: &Link, file: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        link.range(&self.commit, file, offset, len).map_err(|failure| link.explain(failure, Some(file)))
    }

    /// The first bytes of a shard: its header, where that is within
    /// [`FIRST_READ`]; kept on the disk for the next time.
    fn head(&self, link: &Link, file: &str, size: u64) -> Result<Arc<Vec<u8>>> {
        let heads = || self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(head) = heads().get(file) {
            return Ok(head.clone());
        }
        let headers = self.home.headers(&self.commit);
        let kept = headers.join(file);
        let head = match fs::read_capped(&kept, Bytes(FIRST_READ)) {
            Ok(head) if head_end(&head) == Some(head.len()) => head,
            _ => {
                let mut head = self.range(link, file, 0, size.min(FIRST_READ))?;
                head.truncate(head_end(&head).unwrap_or(usize::MAX));
                head.shrink_to_fit();
                // What cannot be kept is fetched again.
                let _ = std::fs::create_dir_all(&headers).map(|()| fs::write_atomic(&kept, &head, true));
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
            let (link, remote) = self.remote(file)?;
            if remote.size > cap.0 {
                let (size, shown) = (Bytes(remote.size), self.display(file));
                return Err(Error::input(format!("`{shown}` is {size}, and at most {cap} is read of such a file")));
            }
            self.fetch(link, file, &remote, None, &mut link.quiet())
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
        self.remote(file).map(|(_, remote)| Bytes(remote.size))
    }

    fn read_range(&self, file: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        check_name(file)?;
        if self.is_cached(file) {
            return self.local()?.read_range(file, offset, len);
        }
        let (link, Remote { size, .. }) = self.remote(file)?;
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
        self.range(link, file, offset, len)
    }

    fn display(&self, file: &str) -> String {
        format!("{}@{}/{}", self.id, self.revision, printable(file))
    }

    fn directory(&self) -> Option<&Path> {
        None
    }

    fn origin(&self) -> Origin {
        Origin::Repository { repository: self.id.to_string(), commit: self.commit.as_str().to_owned() }
    }
}

fn not_cached(what: &str, id: &RepoId, revision: &str) -> Error {
    Error::input(format!("the Hub is not asked while offline, and {what} of {id}@{revision} is not cached"))
        .hint(format!("hf download {id} --revision {revision}"))
}

fn total(sizes: impl Iterator<Item = u64>) -> Bytes {
    Bytes(sizes.fold(0, u64::saturating_add))
}

/// Names come from the checkpoint, and become parts of paths and URLs.
fn check_name(file: &str) -> Result<()> {
    if fs::is_plain_name(file) {
        Ok(())
    } else {
        Err(Error::input(format!("`{}` is no file name inside a repository", printable(file))))
    }
}
