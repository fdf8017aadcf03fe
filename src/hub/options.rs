//! What the caller decides, and what it is told.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::bytes::Bytes;
use crate::cancel::Cancel;
use crate::error::{Error, Result, printable};

/// The Hub itself.
pub const ENDPOINT: &str = "https://huggingface.co";
/// The longest wait for another process that downloads the same repository.
pub const LOCK_WAIT: Duration = Duration::from_mins(30);
/// The longest wait for a rate limit while downloading.
pub const RATE_LIMIT_WAIT: Duration = Duration::from_mins(5);

/// A repository's name: `org/name`, or `name` for the few that have no owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RepoId(pub(super) String);

impl FromStr for RepoId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        const LONGEST: usize = 96;
        let plain = |part: &str| {
            (1..=LONGEST).contains(&part.len())
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
                && !part.contains("--")
                && !part.contains("..")
        };
        if text.split('/').count() <= 2
            && text.split('/').all(plain)
            && text.rsplit_once('.').is_none_or(|(_, ending)| ending != "git")
        {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::usage(format!("`{}` is not a repository on the Hub", printable(text)))
                .hint("name it like `org/name`"))
        }
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An access token; it is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(pub(super) String);

impl Token {
    /// The token in `text`, of visible ASCII characters.
    pub fn new(text: &str) -> Result<Self> {
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::usage("the Hub token is empty or has characters that no token has").hint("check HF_TOKEN"))
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// All that the environment and the command line decide.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Where the Hub is.
    pub endpoint: String,
    /// Sent to the endpoint's scheme, host and port, and to no other place; none is looked for elsewhere.
    pub token: Option<Token>,
    /// The directory of Hugging Face's cache, `~/.cache/huggingface/hub` by custom.
    pub cache: PathBuf,
    /// Only the cache is used, and no connection is made.
    pub offline: bool,
    /// How long the Hub may be silent; for twice as long it may be slower than 1 KiB a second.
    pub timeout: Duration,
    /// Stops whatever is being waited for, connections too.
    pub cancel: Cancel,
}

impl HubOptions {
    /// The Hub itself, without a token, online.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: ENDPOINT.to_owned(),
            token: None,
            cache: cache.into(),
            offline: false,
            timeout: Duration::from_secs(30),
            cancel: Cancel::new(),
        }
    }
}

/// What [`Repository::download`](super::Repository::download) tells while it works.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HubEvent {
    /// What is not in the cache yet. Said once, before the first byte.
    Total {
        /// The files' sizes added up.
        bytes: Bytes,
        /// The number of files.
        files: usize,
    },
    /// How much of the total is there, what was left of an earlier download too. May fall when a file is begun again.
    Downloaded(Bytes),
    /// Another process is downloading the same files, holds the lock of this path, and is waited for.
    LockHeld(PathBuf),
    /// The Hub has had too many requests, and is given so much more time. Said again and again.
    RateLimited(Duration),
}
