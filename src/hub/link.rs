//! The requests for one repository, repeated where that helps.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::http::header::{CONTENT_TYPE, IF_RANGE, RANGE};
use ureq::http::request::Builder;
use ureq::http::{HeaderValue, Method, Request};

use super::cache::Partial;
use super::names::{Commit, Oid};
use super::options::{HubEvent, HubOptions, RepoId};
use super::wire::{Client, Failure, Head, Note, Refusal, TICK, Transfer};
use crate::bytes::MIB;
use crate::error::Error;
use crate::{fs, text};

/// The longest wait for a rate limit where nobody can be told of it.
pub(super) const QUIET_WAIT: Duration = Duration::from_secs(10);
/// The wait for a rate limit where the Hub does not say how long.
const UNSTATED_WAIT: Duration = Duration::from_mins(1);
/// The pause before the second attempt; it doubles.
const PAUSE: Duration = Duration::from_millis(250);
/// Paths in one question for sizes.
const PATHS: usize = 500;
/// The most that is read of an answer in JSON.
const JSON_CAP: u64 = 64 * MIB;

/// A file as the Hub describes it.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    pub size: u64,
    /// What its content is known by.
    pub oid: Option<Oid>,
}

/// The files that may matter; of a mirror that does not tell sizes in one
/// answer each is asked for when it is needed.
pub(super) type Files = BTreeMap<String, OnceLock<Remote>>;

/// The way to one repository at one revision, and the words for its failures.
#[derive(Debug)]
pub(super) struct Link {
    pub client: Client,
    pub options: HubOptions,
    pub id: RepoId,
    pub revision: String,
}

#[derive(Deserialize)]
struct Info {
    sha: Option<String>,
    siblings: Option<Vec<Sibling>>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

#[derive(Deserialize)]
struct Entry {
    path: String,
    size: Option<u64>,
    oid: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
}

impl Link {
    /// Where only the caller's wish to stop ends a wait.
    pub fn quiet(&self) -> impl FnMut(HubEvent) -> ControlFlow<()> {
        let cancel = self.options.cancel.clone();
        move |_| if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// The commit, and the files that may matter.
    pub fn open(&self) -> Result<(Commit, Files), Failure> {
        let revision = encode(&self.revision).replace('/', "%2F");
        let info =
            Request::get(self.url(&format!("/api/models/{}/revision/{revision}?expand=sha&expand=siblings", self.id)));
        let info: Info = self.json(info, Vec::new())?;
        let commit = info.sha.and_then(|sha| Commit::parse(&sha)).ok_or(Failure::Lacks("the commit"))?;
        let names = info.siblings.ok_or(Failure::Lacks("the list of files"))?.into_iter().map(|file| file.rfilename);
        let matters =
            |name: &String| !name.contains('/') || name.ends_with(".safetensors") || text::FILES.contains(&&**name);
        let names: Vec<String> = names.filter(|name| matters(name) && fs::is_plain_name(name)).collect();
        let files: Files = names.iter().map(|name| (name.clone(), OnceLock::new())).collect();
        let url = self.url(&format!("/api/models/{}/paths-info/{}", self.id, commit.as_str()));
        for names in names.chunks(PATHS) {
            let question = serde_json::json!({ "paths": names }).to_string().into_bytes();
            let request = Request::post(&url).header(CONTENT_TYPE, "application/json");
            let entries: Vec<Entry> = match self.json(request, question) {
                // A mirror may not know the question.
                Err(Failure::Refused(refusal, _)) if matches!(refusal.status, 404 | 405 | 501) => break,
                entries => entries?,
            };
            for Entry { path, size, oid, lfs } in entries {
                if let (Some(file), Some(size)) = (files.get(&path), size) {
                    let oid = lfs.map(|lfs| lfs.oid).or(oid).and_then(|oid| Oid::parse(&oid));
                    file.get_or_init(|| Remote { size, oid });
                }
            }
        }
        Ok((commit, files))
    }

    /// What the head of a file tells of it.
    pub fn describe(&self, commit: &Commit, file: &str) -> Result<Remote, Failure> {
        self.retry(QUIET_WAIT, &mut self.quiet(), |note| {
            let (head, _) = self.ask(self.file(Method::HEAD, commit, file), 0, commit, note)?;
            let size = head.linked_size.or(head.length).ok_or(Failure::Lacks("the size"))?;
            Ok(Remote { size, oid: head.oid })
        })
    }

    /// Exactly the bytes from `offset` on.
    pub fn range(&self, commit: &Commit, file: &str, offset: u64, len: u64) -> Result<Vec<u8>, Failure> {
        self.retry(QUIET_WAIT, &mut self.quiet(), |note| {
            let last = offset.saturating_add(len).saturating_sub(1);
            let request = self.file(Method::GET, commit, file).header(RANGE, format!("bytes={offset}-{last}"));
            let (head, mut transfer) = self.ask(request, 0, commit, note)?;
            if head.range.is_some_and(|(first, ..)| first != offset) {
                return Err(Failure::WrongRange);
            }
            let bytes = transfer.whole(len, note)?;
            match bytes.len() as u64 {
                _ if head.range.is_none() && offset > 0 => Err(Failure::WrongRange),
                got if got == len => Ok(bytes),
                got => Err(Failure::WrongSize { got, size: len }),
            }
        })
    }

    /// Fetches what `partial` lacks of a file, and holds the whole against what the Hub says of it.
    pub fn fill(
        &self,
        partial: &mut Partial,
        commit: &Commit,
        file: &str,
        remote: &mut Remote,
        note: Note,
    ) -> Result<(), Failure> {
        let size = remote.size;
        let is_known = remote.oid.as_ref().is_some_and(Oid::is_sha256);
        if partial.len > size || !is_known && partial.validator.is_none() {
            partial.restart()?;
        }
        if partial.len < size || size == 0 {
            let mut request = self.file(Method::GET, commit, file);
            if partial.len > 0 {
                request = request.header(RANGE, format!("bytes={}-", partial.len));
                if let Some(validator) = &partial.validator {
                    request = request.header(IF_RANGE, validator);
                }
            }
            let (head, mut transfer) = match self.ask(request, partial.len, commit, note) {
                Err(failure @ Failure::Refused(Refusal { status: 416, .. }, _)) => return Err(partial.spoiled(failure)),
                answer => answer?,
            };
            let from = match head.range {
                None => 0,
                Some((first, last, all)) if (first, last.checked_add(1), all) == (partial.len, Some(size), size) => {
                    first
                }
                Some(_) => return Err(partial.spoiled(Failure::WrongRange)),
            };
            match head.length.map(|length| length.saturating_add(from)) {
                Some(got) if got < size => return Err(Failure::WrongSize { got, size }),
                Some(got) if got > size => return Err(Failure::TooMuch(size)),
                _ => {}
            }
            if from == 0 {
                partial.restart()?;
                transfer.begin_anew();
            }
            partial.validator = head.validator;
            remote.oid = remote.oid.take().or(head.oid);
            while let Some(piece) = transfer.piece(note)? {
                if piece.len() as u64 > size - partial.len {
                    return Err(partial.spoiled(Failure::TooMuch(size)));
                }
                partial.write(&piece)?;
            }
            if partial.len < size {
                let got = partial.len;
                return Err(partial.spoiled(Failure::WrongSize { got, size }));
            }
        }
        match &remote.oid {
            Some(oid) if oid.is_sha256() && *oid != partial.sha256() => Err(partial.spoiled(Failure::WrongContent)),
            _ => Ok(()),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.options.endpoint)
    }

    fn file(&self, method: Method, commit: &Commit, file: &str) -> Builder {
        let path = format!("/{}/resolve/{}/{}", self.id, commit.as_str(), encode(file));
        Request::builder().method(method).uri(self.url(&path))
    }

    /// Asks for a file, which must be of `commit`.
    fn ask(&self, request: Builder, at: u64, commit: &Commit, note: Note) -> Result<(Head, Transfer), Failure> {
        let (head, transfer) = self.client.ask(with_body(request, Vec::new())?, at, note)?;
        let is_other = |sent: &HeaderValue| sent.as_bytes() != commit.as_str().as_bytes();
        match &head.commit {
            Some(sent) if is_other(sent) => Err(Failure::OtherCommit),
            _ if head.is_page => Err(Failure::Lacks("the file")),
            _ => Ok((head, transfer)),
        }
    }

    fn json<T: DeserializeOwned>(&self, request: Builder, body: Vec<u8>) -> Result<T, Failure> {
        let request = with_body(request, body)?;
        self.retry(QUIET_WAIT, &mut self.quiet(), |note| {
            let (_, mut transfer) = self.client.ask(request.clone(), 0, note)?;
            serde_json::from_slice(&transfer.whole(JSON_CAP, note)?).map_err(Failure::NotJson)
        })
    }

    /// Repeats what may pass, and waits where the Hub asks for it.
    #[expect(clippy::unused_self, reason = "requests and their retries go over a link")]
    pub fn retry<T>(
        &self,
        patience: Duration,
        note: Note,
        mut request: impl FnMut(Note) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut attempt = 1;
        loop {
            let failure = match request(note) {
                Ok(value) => return Ok(value),
                Err(failure) if attempt >= failure.attempts() => return Err(failure),
                Err(failure) => failure,
            };
            match failure {
                Failure::Refused(ref refusal, wait) if refusal.status == 429 => {
                    let wait = wait.unwrap_or(UNSTATED_WAIT);
                    if wait > patience {
                        return Err(failure);
                    }
                    let begun = Instant::now();
                    while let left = wait.saturating_sub(begun.elapsed())
                        && !left.is_zero()
                    {
                        if note(HubEvent::RateLimited(left)).is_break() {
                            return Err(Failure::Stopped);
                        }
                        thread::sleep(left.min(TICK));
                    }
                }
                _ => thread::sleep(PAUSE * 2u32.pow(attempt - 1)),
            }
            attempt += 1;
        }
    }
}

fn with_body(request: Builder, body: Vec<u8>) -> Result<Request<Vec<u8>>, Failure> {
    request.body(body).map_err(|e| Error::input("a name makes no address").caused_by(e).into())
}

/// `name` as a part of a URL; slashes stay.
fn encode(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
