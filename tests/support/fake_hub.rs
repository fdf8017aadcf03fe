//! A Hub for tests: one repository, served on 127.0.0.1 as the Hub serves it,
//! with faults on demand and a record of what was asked.
//!
//! Knows the four requests that a load makes: a revision's commit and files, the
//! sizes of paths, and `HEAD` and `GET` (with ranges) of a file. Weights are in
//! LFS, so that their SHA-256 is told.

#![allow(dead_code, reason = "each test crate uses its part")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};

/// A repository's files by name.
pub type Files = HashMap<String, Vec<u8>>;

/// The requests that a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What the Hub answers in JSON.
    Api,
    /// `HEAD` of a file.
    Head,
    /// `GET` of a file.
    Get,
    /// `GET` of weights.
    Weights,
}

impl Part {
    fn has(self, request: &Request) -> bool {
        let is_file = !request.path.starts_with("/api/");
        match self {
            Self::Api => !is_file,
            Self::Head => is_file && request.method == "HEAD",
            Self::Get => is_file && request.method == "GET",
            Self::Weights => Self::Get.has(request) && is_lfs(&request.path),
        }
    }
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This status, with the header X-Error-Code.
    Status(u16, &'static str),
    /// 429, with the header Retry-After if there is a number.
    RateLimit(Option<u64>),
    /// A login page, with status 200.
    Page,
    /// Half the body; then the connection is closed.
    Cut,
    /// Half the body, as if it were the whole.
    Short,
    /// The whole file, whatever range is asked for.
    NoRanges,
    /// A file of this size announced, whatever its size is.
    Announce(u64),
    /// No answer for so long.
    Silence(Duration),
    /// Half the body, then nothing for so long, and the connection is closed.
    Stall(Duration),
    /// A byte of the body after each such pause.
    Trickle(Duration),
    /// A body without an end.
    Endless(u16),
    /// The body with one byte changed.
    WrongByte,
    /// This header instead of the usual one.
    Header(&'static str, String),
    /// 404, of a file of this commit.
    Missing(String),
    /// This status, with the header Location.
    Redirect(u16, String),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET`, `HEAD` or `POST`.
    pub method: String,
    /// Without the query.
    pub path: String,
    /// The header Authorization.
    pub authorization: Option<String>,
    /// The header Range: first and last byte.
    pub range: Option<(usize, usize)>,
    /// The header If-Range.
    pub if_range: Option<String>,
    body: Vec<u8>,
}

/// The server; it stops when it is dropped.
pub struct FakeHub {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    repository: String,
    commits: Mutex<HashMap<String, Files>>,
    /// The commit that `main` is.
    main: Mutex<String>,
    /// A fault, and how many requests it still strikes.
    fault: Mutex<Option<(Part, Fault, usize)>>,
    /// Sizes of files that go on in zeros behind what is there of them.
    sizes: Mutex<HashMap<String, usize>>,
    /// Where requests for weights are sent, as the Hub sends them to its CDN.
    cdn: Mutex<Option<String>>,
    /// The status that answers a question for sizes, of a mirror that does not know it.
    no_paths_info: AtomicU16,
    requests: Mutex<Vec<Request>>,
    sent: AtomicU64,
    stopped: AtomicBool,
}

impl FakeHub {
    /// Serves `repository`, with `files` in `commit` on branch `main`.
    pub fn start(repository: &str, commit: &str, files: Files) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State { repository: repository.to_owned(), ..State::default() });
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if shared.stopped.load(Ordering::SeqCst) {
                    break;
                }
                let shared = shared.clone();
                // A client that hangs up in the middle is part of the tests.
                thread::spawn(move || shared.serve(stream).ok());
            }
        });
        let hub = Self { address, state };
        hub.commit(commit, files);
        hub
    }

    /// Adds a commit; `main` is then this one.
    pub fn commit(&self, commit: &str, files: Files) {
        self.state.commits.lock().unwrap().insert(commit.to_owned(), files);
        commit.clone_into(&mut self.state.main.lock().unwrap());
    }

    /// The URL to use as endpoint.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on the next `times` requests of `part` go wrong.
    pub fn fail(&self, part: Part, fault: Fault, times: usize) {
        *self.state.fault.lock().unwrap() = Some((part, fault, times));
    }

    /// Makes a file go on in zeros up to `size`.
    pub fn extend(&self, file: &str, size: usize) {
        self.state.sizes.lock().unwrap().insert(file.to_owned(), size);
    }

    /// Sends requests for weights to another server.
    pub fn redirect_weights(&self, endpoint: &str) {
        *self.state.cdn.lock().unwrap() = Some(endpoint.to_owned());
    }

    /// Answers questions for sizes with `status`, as a mirror that does not know them.
    pub fn forget_paths_info(&self, status: u16) {
        self.state.no_paths_info.store(status, Ordering::SeqCst);
    }

    /// The requests that no load has to make.
    pub fn strange_requests(&self) -> Vec<Request> {
        let usual = |request: &Request| match request.method.as_str() {
            "GET" | "HEAD" => true,
            "POST" => request.path.contains("/paths-info/"),
            _ => false,
        };
        self.requests().into_iter().filter(|request| !usual(request)).collect()
    }

    /// The requests since the start or since [`FakeHub::forget`].
    pub fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().unwrap().clone()
    }

    /// The number of `GET` requests for files whose name ends in `suffix`.
    pub fn gets(&self, suffix: &str) -> usize {
        let asked = |r: &&Request| r.method == "GET" && r.path.contains("/resolve/") && r.path.ends_with(suffix);
        self.requests().iter().filter(asked).count()
    }

    /// The bytes of bodies sent so far.
    pub fn sent(&self) -> u64 {
        self.state.sent.load(Ordering::SeqCst)
    }

    /// Forgets requests and bytes.
    pub fn forget(&self) {
        self.state.requests.lock().unwrap().clear();
        self.state.sent.store(0, Ordering::SeqCst);
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener, so that it sees the flag.
        TcpStream::connect(self.address).ok();
    }
}

/// An answer before it is sent.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The Content-Length, where it is not the body's.
    length: Option<usize>,
    manner: Manner,
}

/// How a body is sent.
#[derive(Clone, Copy, Default)]
enum Manner {
    #[default]
    Whole,
    Trickle(Duration),
    Endless,
    /// The connection is closed so long after the body's last byte.
    Stall(Duration),
}

impl Answer {
    fn status(status: u16, code: &str) -> Self {
        let headers = vec![("X-Error-Code", code.to_owned()), ("X-Error-Message", "the fake Hub says no".to_owned())];
        Self { status, headers, body: Vec::new(), length: None, manner: Manner::Whole }
    }

    /// Half the body of what this long is announced of.
    fn cut(mut self) -> Self {
        self.length = Some(self.body.len());
        self.body.truncate(self.body.len() / 2);
        self
    }

    fn json(value: &serde_json::Value) -> Self {
        let (headers, body) = (Vec::new(), value.to_string().into_bytes());
        Self { status: 200, headers, body, length: None, manner: Manner::Whole }
    }
}

impl State {
    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let Some(request) = read_request(&stream)? else {
            return Ok(());
        };
        self.requests.lock().unwrap().push(request.clone());
        let answer = self.answer(&request);
        let mut head = format!("HTTP/1.1 {} Fake\r\nConnection: close\r\n", answer.status);
        for (name, value) in &answer.headers {
            head += &[name, ": ", value, "\r\n"].concat();
        }
        let length = answer.length.unwrap_or(answer.body.len());
        if !matches!(answer.manner, Manner::Endless) {
            head += &["Content-Length: ", &length.to_string(), "\r\n"].concat();
        }
        let mut stream = stream;
        stream.write_all((head + "\r\n").as_bytes())?;
        if request.method == "HEAD" {
            return Ok(());
        }
        let (size, pause) = match answer.manner {
            Manner::Trickle(pause) => (1, pause),
            _ => (1 << 16, Duration::ZERO),
        };
        for piece in answer.body.chunks(size) {
            stream.write_all(piece)?;
            self.sent.fetch_add(piece.len() as u64, Ordering::SeqCst);
            thread::sleep(pause);
        }
        match answer.manner {
            Manner::Endless => loop {
                stream.write_all(&[b' '; 1 << 12])?;
                self.sent.fetch_add(1 << 12, Ordering::SeqCst);
            },
            Manner::Stall(long) => thread::sleep(long),
            Manner::Whole | Manner::Trickle(_) => {}
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> Answer {
        match self.fault(request) {
            Some(Fault::Status(status, code)) => Answer::status(status, code),
            Some(Fault::RateLimit(seconds)) => {
                let mut answer = Answer::status(429, "");
                answer.headers.extend(seconds.map(|seconds| ("Retry-After", seconds.to_string())));
                answer
            }
            Some(Fault::Page) => Answer {
                status: 200,
                headers: vec![("Content-Type", "text/html".to_owned())],
                body: b"<html>Welcome to the airport's network</html>".to_vec(),
                length: None,
                manner: Manner::Whole,
            },
            Some(Fault::Cut) => self.good_answer(request, true).cut(),
            Some(Fault::Stall(long)) => Answer { manner: Manner::Stall(long), ..self.good_answer(request, true).cut() },
            Some(Fault::Trickle(pause)) => Answer { manner: Manner::Trickle(pause), ..self.good_answer(request, true) },
            Some(Fault::Endless(status)) => {
                Answer { status, manner: Manner::Endless, ..self.good_answer(request, true) }
            }
            Some(Fault::WrongByte) => {
                let mut answer = self.good_answer(request, true);
                if let Some(byte) = answer.body.last_mut() {
                    *byte ^= 1;
                }
                answer
            }
            Some(Fault::Header(name, value)) => {
                let mut answer = self.good_answer(request, true);
                answer.headers.retain(|(usual, _)| *usual != name);
                answer.headers.push((name, value));
                answer
            }
            Some(Fault::Missing(commit)) => {
                let mut answer = Answer::status(404, "EntryNotFound");
                answer.headers.push(("X-Repo-Commit", commit));
                answer
            }
            Some(Fault::Redirect(status, location)) => {
                let mut answer = Answer::status(status, "");
                answer.headers.push(("Location", location));
                answer
            }
            Some(Fault::Short) => {
                let mut answer = self.good_answer(request, true);
                answer.headers.retain(|(name, _)| *name != "X-Linked-Size");
                answer.body.truncate(answer.body.len() / 2);
                answer
            }
            Some(Fault::Announce(size)) => {
                let mut answer = self.good_answer(request, true);
                answer.headers.push(("X-Linked-Size", size.to_string()));
                answer
            }
            Some(Fault::NoRanges) => self.good_answer(request, false),
            Some(Fault::Silence(long)) => {
                thread::sleep(long);
                Answer::status(504, "")
            }
            None => self.good_answer(request, true),
        }
    }

    fn fault(&self, request: &Request) -> Option<Fault> {
        let mut fault = self.fault.lock().unwrap();
        let (struck, what, times) = fault.as_mut()?;
        if !struck.has(request) || *times == 0 {
            return None;
        }
        *times -= 1;
        Some(what.clone())
    }

    fn good_answer(&self, request: &Request, ranges: bool) -> Answer {
        let api = format!("/api/models/{}", self.repository);
        let files = format!("/{}/resolve/", self.repository);
        if let Some(revision) = request.path.strip_prefix(&format!("{api}/revision/")) {
            return self.revision(revision);
        }
        if let Some(revision) = request.path.strip_prefix(&format!("{api}/paths-info/")) {
            return self.paths_info(revision, &request.body);
        }
        match request.path.strip_prefix(&files).and_then(|rest| rest.split_once('/')) {
            Some((revision, file)) => {
                self.file(revision, file, request.range.filter(|_| ranges), request.if_range.as_deref())
            }
            None => Answer::status(404, "RepoNotFound"),
        }
    }

    fn find(&self, revision: &str) -> Option<(String, Files)> {
        let commit = if revision == "main" { self.main.lock().unwrap().clone() } else { revision.to_owned() };
        let files = self.commits.lock().unwrap().get(&commit)?.clone();
        Some((commit, files))
    }

    fn revision(&self, revision: &str) -> Answer {
        let Some((commit, files)) = self.find(revision) else {
            return Answer::status(404, "RevisionNotFound");
        };
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        Answer::json(&serde_json::json!({ "_id": "1", "id": self.repository, "sha": commit, "siblings": siblings }))
    }

    fn paths_info(&self, revision: &str, body: &[u8]) -> Answer {
        let Some((_, files)) = self.find(revision) else {
            return Answer::status(404, "RevisionNotFound");
        };
        match self.no_paths_info.load(Ordering::SeqCst) {
            0 => {}
            status => return Answer::status(status, ""),
        }
        let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
        let asked = body["paths"].as_array().cloned().unwrap_or_default();
        let entries = asked.iter().filter_map(|path| {
            let path = path.as_str()?;
            let (oid, size) = (oid(path, files.get(path)?), self.size(path, files.get(path)?));
            let mut entry = serde_json::json!({ "type": "file", "oid": oid, "size": size, "path": path });
            if is_lfs(path) {
                entry["oid"] = serde_json::json!("0".repeat(40));
                entry["lfs"] = serde_json::json!({ "oid": oid, "size": size, "pointerSize": 132 });
            }
            Some(entry)
        });
        Answer::json(&entries.collect())
    }

    fn size(&self, file: &str, body: &[u8]) -> usize {
        self.sizes.lock().unwrap().get(file).copied().unwrap_or(body.len())
    }

    fn file(&self, revision: &str, file: &str, range: Option<(usize, usize)>, if_range: Option<&str>) -> Answer {
        let Some((commit, files)) = self.find(revision) else {
            return Answer::status(404, "RevisionNotFound");
        };
        let Some(body) = files.get(file) else {
            let mut answer = Answer::status(404, "EntryNotFound");
            answer.headers.push(("X-Repo-Commit", commit));
            return answer;
        };
        let etag = format!("\"{}\"", oid(file, body));
        let mut headers = vec![("X-Repo-Commit", commit)];
        if let Some(cdn) = self.cdn.lock().unwrap().as_ref().filter(|_| file.ends_with(".safetensors")) {
            headers.push(("Location", format!("{cdn}/{}/resolve/{revision}/{file}", self.repository)));
            headers.push(("X-Linked-Size", self.size(file, body).to_string()));
            headers.push(("X-Linked-ETag", etag));
            return Answer { headers, ..Answer::status(302, "") };
        }
        let is_same = if_range.is_none_or(|wanted| wanted == etag);
        headers.push(("ETag", etag));
        let size = self.size(file, body);
        match range.filter(|_| is_same) {
            Some((first, last)) if first < size => {
                let last = last.min(size - 1);
                headers.push(("Content-Range", format!("bytes {first}-{last}/{size}")));
                let mut part = body[first.min(body.len())..(last + 1).min(body.len())].to_vec();
                part.resize(last + 1 - first, 0);
                Answer { status: 206, headers, body: part, length: None, manner: Manner::Whole }
            }
            Some(_) => Answer::status(416, ""),
            None => Answer { status: 200, headers, body: body.clone(), length: None, manner: Manner::Whole },
        }
    }
}

fn is_lfs(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// The SHA-256 of a file in LFS; for others something that looks like git's SHA-1.
pub fn oid(file: &str, body: &[u8]) -> String {
    let digest = Sha256::digest(body);
    let digits = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let mut oid: String = digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect();
    oid.truncate(if is_lfs(file) { 64 } else { 40 });
    oid
}

fn read_request(stream: &TcpStream) -> std::io::Result<Option<Request>> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut request = Request {
        method: method.to_owned(),
        path: target.split('?').next().unwrap_or_default().to_owned(),
        authorization: None,
        range: None,
        if_range: None,
        body: Vec::new(),
    };
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value.to_owned()),
            "if-range" => request.if_range = Some(value.to_owned()),
            "content-length" => length = value.parse().unwrap_or(0),
            "range" => {
                let range = value.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
                request.range =
                    range.and_then(|(first, last)| Some((first.parse().ok()?, last.parse().unwrap_or(usize::MAX))));
            }
            _ => {}
        }
    }
    reader.take(length).read_to_end(&mut request.body)?;
    Ok(Some(request))
}
