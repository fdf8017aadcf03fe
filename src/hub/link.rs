//! Requests to the Hub: guarded against silence and endless answers, repeated
//! where that helps.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use hf_hub::progress::{DownloadEvent, Progress, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFError, HFRepositorySync, HFResult, RepoTypeModel};

use super::{HubEvent, HubOptions, LOCK_WAIT, RepoId};
use crate::bytes::{Bytes, MIB};
use crate::error::Result;

/// The longest wait for a rate limit where nobody can be told of it.
pub(super) const QUIET_WAIT: Duration = Duration::from_secs(10);
/// The wait for a rate limit where the Hub does not say how long.
const UNSTATED_WAIT: Duration = Duration::from_mins(1);
/// Attempts at a request that fails for a reason that may pass.
const ATTEMPTS: u32 = 3;
/// The pause before the second attempt; it doubles.
const PAUSE: Duration = Duration::from_millis(250);
/// Paths in one question for sizes.
const PATHS: usize = 500;

/// Told of events; answers whether to go on.
pub(super) type Note<'a> = &'a mut dyn FnMut(HubEvent) -> ControlFlow<()>;

pub(super) fn quiet(_: HubEvent) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// hf-hub says so.
    Hub(HFError),
    /// hf-hub has panicked.
    Crashed,
    /// Nothing came for so long.
    Silent(Duration),
    /// Nobody wants it any more.
    Stopped,
    /// More came, or was announced, than the file or the range has.
    TooMuch(u64),
    WrongSize {
        got: u64,
        size: u64,
    },
    /// hf-hub has put the file in another commit's directory.
    OtherCommit,
    /// The answer lacks something.
    Lacks(&'static str),
}

impl Failure {
    /// Whether no Hub has answered, or one that has failed.
    pub(super) fn is_unreachable(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Hub(HFError::Request { .. }) => true,
            Self::Hub(HFError::Http { context }) => context.status.is_server_error(),
            _ => false,
        }
    }

    /// Whether the same request may well succeed a moment later.
    fn may_pass(&self) -> bool {
        match self {
            Self::WrongSize { .. } => true,
            Self::Hub(HFError::Request { source, .. }) => !is_json_error(source),
            Self::Hub(HFError::Http { context }) => matches!(context.status.as_u16(), 408 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }
}

/// What may come for one request.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// The size that the answer may announce.
    pub(super) declared: u64,
    /// The bytes that may arrive.
    pub(super) arriving: u64,
}

/// Counts the bytes of one request.
///
/// hf-hub has no way to stop a transfer. To unwind out of its progress callback
/// is one; the panic hook is not called, and [`Link::call`] catches it.
struct Meter {
    limits: Limits,
    sender: mpsc::Sender<Option<u64>>,
}

struct LimitPassed;

impl ProgressHandler for Meter {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let arrived = match event {
            DownloadEvent::Start { total_bytes, .. } if *total_bytes > self.limits.declared => {
                resume_unwind(Box::new(LimitPassed))
            }
            DownloadEvent::Progress { files } => files.iter().map(|file| file.bytes_completed).max().unwrap_or(0),
            DownloadEvent::AggregateProgress { bytes_completed, .. } => *bytes_completed,
            _ => 0,
        };
        if arrived > self.limits.arriving || self.sender.send(Some(arrived)).is_err() {
            resume_unwind(Box::new(LimitPassed));
        }
    }
}

/// The way to one repository at one revision, and the words for its failures.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) repository: HFRepositorySync<RepoTypeModel>,
    pub(super) options: HubOptions,
    pub(super) id: RepoId,
    pub(super) revision: String,
}

impl Link {
    /// The commit, and the sizes of the files that may matter.
    pub(super) fn open(&self) -> Result<(String, BTreeMap<String, u64>), Failure> {
        let none = Limits { declared: 0, arriving: 0 };
        let info = self.retry(QUIET_WAIT, &mut quiet, |note| {
            let revision = self.revision.clone();
            self.call(self.options.timeout, none, note, |repository, _| {
                let expand = vec!["sha".to_owned(), "siblings".to_owned()];
                repository.info().revision(revision).expand(expand).send()
            })
        })?;
        let commit = info.sha.filter(|sha| is_commit(sha)).ok_or(Failure::Lacks("the commit"))?;
        let names = info.siblings.ok_or(Failure::Lacks("the list of files"))?.into_iter().map(|file| file.rfilename);
        let names: Vec<String> = names.filter(|name| !name.contains('/') || name.ends_with(".safetensors")).collect();
        let mut sizes = BTreeMap::new();
        for names in names.chunks(PATHS) {
            let entries = self.retry(QUIET_WAIT, &mut quiet, |note| {
                let (names, commit) = (names.to_vec(), commit.clone());
                self.call(self.options.timeout, none, note, |repository, _| {
                    repository.get_paths_info().paths(names).revision(commit).send()
                })
            })?;
            sizes.extend(entries.into_iter().filter_map(|entry| match entry {
                RepoTreeEntry::File { path, size, .. } => Some((path, size)),
                RepoTreeEntry::Directory { .. } => None,
            }));
        }
        Ok((commit, sizes))
    }

    /// Makes one request on a thread of its own, so that neither silence nor a
    /// panic nor an answer without end is the caller's.
    pub(super) fn call<T: Send + 'static>(
        &self,
        silence: Duration,
        limits: Limits,
        note: Note,
        request: impl FnOnce(HFRepositorySync<RepoTypeModel>, Progress) -> HFResult<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (sender, receiver) = mpsc::channel();
        let repository = self.repository.clone();
        let worker = thread::spawn(move || {
            let meter = Progress::new(Meter { limits, sender: sender.clone() });
            let result = catch_unwind(AssertUnwindSafe(|| request(repository, meter)));
            // Only a caller that has given up no longer listens.
            let _ = sender.send(None);
            result
        });
        let mut told = 0u64;
        loop {
            match receiver.recv_timeout(silence) {
                Ok(Some(arrived)) if arrived.abs_diff(told) >= MIB => {
                    told = arrived;
                    if note(HubEvent::Downloaded(Bytes(arrived))).is_break() {
                        return Err(Failure::Stopped);
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => return Err(Failure::Silent(silence)),
            }
        }
        match worker.join() {
            Ok(Ok(result)) => result.map_err(Failure::Hub),
            Ok(Err(panic)) | Err(panic) if panic.is::<LimitPassed>() => Err(Failure::TooMuch(limits.arriving)),
            _ => Err(Failure::Crashed),
        }
    }

    /// Repeats what may pass, and waits where the Hub asks for it.
    #[expect(clippy::unused_self, reason = "requests and their retries go over a link")]
    pub(super) fn retry<T>(
        &self,
        patience: Duration,
        note: Note,
        mut request: impl FnMut(Note) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let begun = Instant::now();
        let mut attempt = 1;
        loop {
            let failure = match request(note) {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            match &failure {
                Failure::Hub(HFError::CacheLockTimeout { path }) if begun.elapsed() < LOCK_WAIT => {
                    if note(HubEvent::LockHeld(path.clone())).is_break() {
                        return Err(Failure::Stopped);
                    }
                    continue;
                }
                Failure::Hub(HFError::RateLimited { retry_after, .. })
                    if attempt < ATTEMPTS && retry_after.unwrap_or(UNSTATED_WAIT) <= patience =>
                {
                    let until = Instant::now() + retry_after.unwrap_or(UNSTATED_WAIT);
                    while let left = until.saturating_duration_since(Instant::now())
                        && !left.is_zero()
                    {
                        if note(HubEvent::RateLimited(left)).is_break() {
                            return Err(Failure::Stopped);
                        }
                        thread::sleep(left.min(Duration::from_secs(1)));
                    }
                }
                failure if attempt < ATTEMPTS && failure.may_pass() => thread::sleep(PAUSE * 2u32.pow(attempt - 1)),
                _ => return Err(failure),
            }
            attempt += 1;
        }
    }
}

pub(super) fn is_json_error(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| std::error::Error::source(*error))
        .any(<dyn std::error::Error>::is::<serde_json::Error>)
}

pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}
