//! Requests on the wire: redirects followed, the token kept at home, every wait bounded.

use std::io::Read;
use std::ops::ControlFlow;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SendError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LOCATION, RETRY_AFTER};
use ureq::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::names::Oid;
use super::options::{HubEvent, HubOptions};
use crate::bytes::{Bytes, KIB};
use crate::error::{Error, Result, printable};

/// How often a wait asks whether to go on.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// The most redirects of one request.
const REDIRECTS: usize = 5;
/// Bytes a second. What is slower for [`SLOW_WINDOW`] is as good as silent.
const SLOWEST: f64 = KIB as f64;
/// In silences that are allowed: a minute where that is half of one.
const SLOW_WINDOW: u32 = 2;
/// The most bytes that are read at a time, and how many such pieces wait to be taken.
const PIECE: usize = 64 << 10;
const AHEAD: usize = 16;

/// Told of events, and at every tick of what is there; answers whether to go on.
pub(super) type Note<'a> = &'a mut dyn FnMut(HubEvent) -> ControlFlow<()>;

/// What the Hub answered instead of what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the Hub answered {shown}")]
pub struct Refusal {
    /// The status of the answer, such as 404.
    pub status: u16,
    /// The Hub's own word for the reason, such as `GatedRepo`.
    pub code: Option<String>,
    /// Status and message.
    shown: String,
}

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer came.
    Unreachable(ureq::Error),
    /// The connection broke behind the answer's head.
    Broken(std::io::Error),
    /// Another answer, and how long the Hub asks to wait.
    Refused(Refusal, Option<Duration>),
    /// Nothing came for so long.
    Silent(Duration),
    /// Next to nothing came for so long.
    Slow(Duration),
    /// Nobody wants it any more.
    Stopped,
    /// A redirect that is not followed, and why.
    Redirect(&'static str),
    /// More came than the file or the range has.
    TooMuch(u64),
    WrongSize {
        got: u64,
        size: u64,
    },
    /// Another part of the file came than was asked for.
    WrongRange,
    /// The bytes are not those of the SHA-256 that the Hub gives.
    WrongContent,
    OtherCommit,
    /// The answer lacks something.
    Lacks(&'static str),
    NotJson(serde_json::Error),
    /// The fault is on this side.
    Local(Error),
}

impl Failure {
    /// Whether no Hub has answered, or one that has failed.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Slow(_) | Self::Unreachable(_) | Self::Broken(_) => true,
            Self::Refused(refusal, _) => refusal.status >= 500,
            _ => false,
        }
    }

    /// Whether the connection broke, so that the rest may come over another one.
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Silent(_) | Self::Slow(_) | Self::Broken(_))
    }

    /// How often a request that fails so is made.
    pub fn attempts(&self) -> u32 {
        match self {
            Self::Silent(_) | Self::Slow(_) | Self::Unreachable(_) | Self::Broken(_) | Self::WrongSize { .. } => 3,
            Self::Refused(refusal, _) if matches!(refusal.status, 408 | 416 | 429 | 500 | 502 | 503 | 504) => 3,
            Self::WrongContent | Self::WrongRange => 2,
            _ => 1,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Local(error)
    }
}

/// What stands before an answer's body. Of the file it tells what the Hub
/// itself says, and not what a server says that the Hub sends us to.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// Content-Length.
    pub length: Option<u64>,
    /// First byte, last byte and size, where a part of the file comes.
    pub range: Option<(u64, u64, u64)>,
    /// The ETag of the server that sends the body, where it is a strong one.
    pub validator: Option<HeaderValue>,
    /// X-Repo-Commit, as it came.
    pub commit: Option<HeaderValue>,
    pub oid: Option<Oid>,
    /// The size of the file behind a redirect.
    pub linked_size: Option<u64>,
    pub is_page: bool,
}

impl Head {
    /// Adds what the answer of one hop says.
    fn add(&mut self, headers: &HeaderMap, is_home: bool) {
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let number = |name: &str| text(name)?.parse().ok();
        self.length = number(CONTENT_LENGTH.as_str());
        self.range = text(CONTENT_RANGE.as_str()).and_then(|range| {
            let (part, size) = range.strip_prefix("bytes ")?.split_once('/')?;
            let (first, last) = part.split_once('-')?;
            Some((first.parse().ok()?, last.parse().ok()?, size.parse().ok()?))
        });
        self.validator = headers.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\"")).cloned();
        self.is_page = text(CONTENT_TYPE.as_str()).is_some_and(|kind| kind.starts_with("text/html"));
        if is_home {
            self.commit = headers.get("x-repo-commit").cloned().or(self.commit.take());
            let oid = text("x-linked-etag").or(text(ETAG.as_str())).and_then(Oid::parse);
            self.oid = oid.or(self.oid.take());
            self.linked_size = number("x-linked-size").or(self.linked_size);
        }
    }
}

/// The way to one Hub.
#[derive(Clone, Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: Uri,
    token: Option<HeaderValue>,
    silence: Duration,
}

impl Client {
    pub fn new(options: &HubOptions) -> Result<Self> {
        let text = &options.endpoint;
        if text.contains('@') {
            return Err(
                Error::usage("the Hub's address holds a login").hint("HF_TOKEN authorizes, and HF_ENDPOINT is printed")
            );
        }
        let failed = || Error::usage(format!("`{}` is no address of a Hub", printable(text))).hint("check HF_ENDPOINT");
        let endpoint: Uri = text.parse().map_err(|e| failed().caused_by(e))?;
        if text.contains(['?', '#']) || !matches!(endpoint.scheme_str(), Some("https" | "http")) {
            return Err(failed());
        }
        let token = options.token.as_ref().map(|token| {
            let mut value = HeaderValue::try_from(format!("Bearer {}", token.0)).map_err(|e| failed().caused_by(e))?;
            value.set_sensitive(true);
            Ok(value)
        });
        let silence = options.timeout;
        // The waiting side gives up first; this ends what it has given up.
        let abandoned = Some(silence.saturating_mul(2));
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("evenkeel/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(abandoned)
            .timeout_connect(abandoned)
            .timeout_per_read(abandoned)
            .timeout_per_write(abandoned)
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .build();
        Ok(Self { agent: agent.into(), endpoint, token: token.transpose()?, silence })
    }

    /// Makes a request on a thread of its own, so that nothing that it waits for is
    /// the caller's wait. Of the file that it reads `at` bytes are there already.
    pub fn ask(&self, request: Request<Vec<u8>>, at: u64, note: Note) -> Result<(Head, Transfer), Failure> {
        let (sender, receiver) = mpsc::sync_channel(AHEAD);
        let client = self.clone();
        // Where nobody listens any more, it ends at its next message.
        let carry = move || drop(client.carry(request, &sender));
        thread::Builder::new()
            .name("hub".to_owned())
            .spawn(carry)
            .map_err(|e| Error::input("cannot start a thread").caused_by(e))?;
        let pace = Pace { window: self.silence.saturating_mul(SLOW_WINDOW), waited: Duration::ZERO, bytes: 0 };
        let mut transfer = Transfer { receiver, silence: self.silence, pace, at, told: Instant::now() };
        match transfer.next(note)? {
            Message::Head(head) => Ok((*head, transfer)),
            Message::Piece(_) => Err(Failure::Lacks("the head")),
        }
    }

    fn carry(&self, request: Request<Vec<u8>>, to: &SyncSender<Sent>) -> Result<(), SendError<Sent>> {
        let mut body = match self.follow(request) {
            Err(failure) => return to.send(Err(failure)),
            Ok((head, response)) => {
                to.send(Ok(Message::Head(Box::new(head))))?;
                response.into_body().into_reader()
            }
        };
        loop {
            let mut piece = vec![0; PIECE];
            let read = body.read(&mut piece);
            piece.truncate(*read.as_ref().unwrap_or(&0));
            let ended = piece.is_empty();
            to.send(read.map(|_| Message::Piece(piece)).map_err(Failure::Broken))?;
            if ended {
                return Ok(());
            }
        }
    }

    /// The answer behind all redirects. The token goes where the endpoint is, and nowhere else.
    fn follow(&self, request: Request<Vec<u8>>) -> Result<(Head, Response<Body>), Failure> {
        let (mut parts, body) = request.into_parts();
        let mut head = Head::default();
        for _ in 0..=REDIRECTS {
            let is_home = is_same_origin(&parts.uri, &self.endpoint);
            parts.headers.remove(AUTHORIZATION);
            if let Some(token) = self.token.as_ref().filter(|_| is_home) {
                parts.headers.insert(AUTHORIZATION, token.clone());
            }
            let answer = if body.is_empty() {
                self.agent.run(Request::from_parts(parts.clone(), ()))
            } else {
                self.agent.run(Request::from_parts(parts.clone(), body.clone()))
            };
            let answer = answer.map_err(Failure::Unreachable)?;
            head.add(answer.headers(), is_home);
            match (answer.status().as_u16(), answer.headers().get(LOCATION)) {
                (200..=299, _) => return Ok((head, answer)),
                (301 | 302 | 303 | 307 | 308, Some(location)) => parts.uri = join(&parts.uri, location)?,
                _ => return Err(refused(answer.status(), answer.headers())),
            }
        }
        Err(Failure::Redirect("there are too many of them"))
    }
}

fn refused(status: StatusCode, headers: &HeaderMap) -> Failure {
    let text = |name: &str| headers.get(name)?.to_str().ok().filter(|text| !text.is_empty());
    let message = text("x-error-message").map_or(String::new(), |message| format!(": {}", printable(message)));
    let code = text("x-error-code").map(str::to_owned);
    let wait = text(RETRY_AFTER.as_str()).and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    Failure::Refused(Refusal { status: status.as_u16(), code, shown: format!("{status}{message}") }, wait)
}

/// Where `location` leads from `base`. What is compared later is what is connected to.
fn join(base: &Uri, location: &HeaderValue) -> Result<Uri, Failure> {
    const UNREADABLE: Failure = Failure::Redirect("its address cannot be read");
    let (Ok(location), Some(scheme), Some(authority)) = (location.to_str(), base.scheme_str(), base.authority()) else {
        return Err(UNREADABLE);
    };
    let lower = location.to_ascii_lowercase();
    let target = if lower.starts_with("https://") || lower.starts_with("http://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let directory = base.path().rsplit_once('/').map_or("", |(directory, _)| directory);
        format!("{scheme}://{authority}{directory}/{location}")
    };
    let target: Uri = target.parse().map_err(|_| UNREADABLE)?;
    if target.authority().is_none_or(|authority| authority.as_str().contains('@')) {
        return Err(Failure::Redirect("its address holds a login"));
    }
    if base.scheme_str() == Some("https") && target.scheme_str() != Some("https") {
        return Err(Failure::Redirect("it leads from https to http"));
    }
    Ok(target)
}

fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    one.scheme() == other.scheme() && host(one) == host(other) && port(one) == port(other)
}

enum Message {
    Head(Box<Head>),
    /// A part of the body; an empty one is its end.
    Piece(Vec<u8>),
}

type Sent = Result<Message, Failure>;

/// An answer that comes in.
pub(super) struct Transfer {
    receiver: Receiver<Sent>,
    silence: Duration,
    pace: Pace,
    /// The bytes of the file that are there.
    at: u64,
    told: Instant,
}

impl Transfer {
    /// The next piece of the body; `None` at its end.
    pub fn piece(&mut self, note: Note) -> Result<Option<Vec<u8>>, Failure> {
        match self.next(note)? {
            Message::Piece(piece) if !piece.is_empty() => Ok(Some(piece)),
            _ => Ok(None),
        }
    }

    /// All of a body that has at most `cap` bytes.
    pub fn whole(&mut self, cap: u64, note: Note) -> Result<Vec<u8>, Failure> {
        let mut whole = Vec::new();
        while let Some(piece) = self.piece(note)? {
            whole.extend(piece);
            if whole.len() as u64 > cap {
                return Err(Failure::TooMuch(cap));
            }
        }
        Ok(whole)
    }

    /// Starts to count again: the file is sent from its beginning.
    pub fn begin_anew(&mut self) {
        self.at = 0;
    }

    fn next(&mut self, note: Note) -> Sent {
        let mut silent = Duration::ZERO;
        loop {
            if self.told.elapsed() >= TICK {
                self.told = Instant::now();
                if note(HubEvent::Downloaded(Bytes(self.at))).is_break() {
                    return Err(Failure::Stopped);
                }
            }
            let begun = Instant::now();
            let sent = self.receiver.recv_timeout(TICK.min(self.silence));
            let waited = begun.elapsed();
            silent += waited;
            let arrived = if let Ok(Ok(Message::Piece(piece))) = &sent { piece.len() as u64 } else { 0 };
            self.at += arrived;
            let is_slow = self.pace.is_slow(waited, arrived);
            match sent {
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Lacks("the rest")),
                Err(RecvTimeoutError::Timeout) if silent >= self.silence => return Err(Failure::Silent(silent)),
                Ok(Err(failure)) => return Err(failure),
                _ if is_slow => return Err(Failure::Slow(self.pace.window)),
                Ok(sent) => return sent,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// How fast bytes come while they are waited for.
struct Pace {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Whether less came than [`SLOWEST`] in the window that ends now.
    fn is_slow(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.window {
            return false;
        }
        let is_slow = (self.bytes as f64) < SLOWEST * self.waited.as_secs_f64();
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        is_slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_leads_where_its_address_is_joined_to() {
        let base: Uri = "https://hub.co:444/org/name/resolve/x".parse().unwrap();
        for (location, target, is_home) in [
            ("/a?b", "https://hub.co:444/a?b", true),
            ("c", "https://hub.co:444/org/name/resolve/c", true),
            ("HTTPS://Hub.co:444/a", "https://Hub.co:444/a", true),
            ("//evil/a", "https://evil/a", false),
            ("https://hub.co/a", "https://hub.co/a", false),
            ("https://hub.co.evil:444/a", "https://hub.co.evil:444/a", false),
            // To the Hub itself, whatever a browser makes of it.
            ("/\\evil/a", "https://hub.co:444/\\evil/a", true),
            ("\\\\evil/a", "https://hub.co:444/org/name/resolve/\\\\evil/a", true),
            ("https:/evil", "https://hub.co:444/org/name/resolve/https:/evil", true),
        ] {
            let joined = join(&base, &HeaderValue::from_static(location)).unwrap();
            assert_eq!((joined.to_string().as_str(), is_same_origin(&joined, &base)), (target, is_home), "{location}");
        }
        for bad in ["http://hub.co:444/a", "https://x:y@hub.co:444/a", "//hub.co@evil/", "https://", "//", "a b"] {
            assert!(join(&base, &HeaderValue::from_static(bad)).is_err(), "{bad}");
        }
        let plain: Uri = "http://hub.co/x".parse().unwrap();
        let secure = join(&plain, &HeaderValue::from_static("https://hub.co/x")).unwrap();
        assert!(!is_same_origin(&plain, &secure) && is_same_origin(&plain, &"http://hub.co:80".parse().unwrap()));
    }

    #[test]
    fn a_trickle_is_slow_and_a_stall_of_ours_is_not() {
        let second = Duration::from_secs(1);
        let pace = || Pace { window: second * 60, waited: Duration::ZERO, bytes: 0 };
        let mut trickle = pace();
        assert_eq!((0..60).filter(|_| trickle.is_slow(second, 1000)).count(), 1);
        let mut steady = pace();
        assert!((0..200).all(|_| !steady.is_slow(second, 1100)));
        let mut waiting_for_the_disk = pace();
        assert!((0..200).all(|_| !waiting_for_the_disk.is_slow(Duration::ZERO, 1)));
    }
}
