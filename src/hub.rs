//! Repositories on the Hub: read in parts for a plan, downloaded for a load.
//!
//! hf-hub speaks the protocol and keeps the cache that all Hugging Face tools
//! share. What it leaves open is settled here: one commit for all files, names
//! and sizes checked, silence and rate limits bounded, one process at a time.
//! Nothing is read from the environment, except what HTTP clients and hf-xet
//! read themselves (proxy variables, `HF_XET_*`).

mod explain;
mod link;
mod repository;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use hf_hub::{HFClient, HFClientSync};

pub use explain::Refusal;
pub use repository::Repository;

use crate::bytes::Bytes;
use crate::error::{Error, Result, printable};

/// The Hub itself.
pub const ENDPOINT: &str = "https://huggingface.co";
/// The longest wait for another process that downloads the same repository.
pub const LOCK_WAIT: Duration = Duration::from_mins(30);
/// The longest wait for a rate limit while downloading.
pub const RATE_LIMIT_WAIT: Duration = Duration::from_mins(5);
/// hf-hub looks for a token in the environment and in files when it is given
/// none. This one cannot be a header's value, so hf-hub sends no header.
const NO_TOKEN: &str = "\n";

/// A repository's name: `org/name`, or `name` for the few that have no owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RepoId(String);

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
pub struct Token(String);

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
    /// Sent to the endpoint's host and to no other; none is looked for elsewhere.
    pub token: Option<Token>,
    /// The directory of Hugging Face's cache, `~/.cache/huggingface/hub` by custom.
    pub cache: PathBuf,
    /// Only the cache is used, and no connection is made.
    pub offline: bool,
    /// How long the Hub may be silent.
    pub timeout: Duration,
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
        }
    }
}

/// What [`Repository::download`] tells while it works.
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
    /// How much of the total is there. May fall when a file is begun again.
    Downloaded(Bytes),
    /// Another process is downloading the same files, holds the lock of this path, and is waited for.
    LockHeld(PathBuf),
    /// The Hub has had too many requests, and is given so much more time. Said every second.
    RateLimited(Duration),
}

/// The Hub, or its cache alone.
#[derive(Debug)]
pub struct Hub {
    options: HubOptions,
    client: Option<HFClientSync>,
}

impl Hub {
    /// The Hub as `options` say.
    pub fn new(mut options: HubOptions) -> Result<Self> {
        options.endpoint.truncate(options.endpoint.trim_end_matches('/').len());
        let client = if options.offline {
            None
        } else {
            let endpoint = &options.endpoint;
            if endpoint.contains('@') {
                return Err(Error::usage("the Hub's address holds a login")
                    .hint("HF_TOKEN authorizes, and HF_ENDPOINT is printed"));
            }
            let failed =
                || Error::usage(format!("`{}` is no address of a Hub", printable(endpoint))).hint("check HF_ENDPOINT");
            if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
                return Err(failed());
            }
            let client = HFClient::builder()
                .endpoint(endpoint)
                .token(options.token.as_ref().map_or(NO_TOKEN, |token| &token.0))
                .cache_dir(&options.cache)
                .user_agent(concat!("evenkeel/", env!("CARGO_PKG_VERSION")))
                .retry_max_attempts(0)
                .build_sync();
            Some(client.map_err(|e| failed().caused_by(e))?)
        };
        Ok(Self { options, client })
    }
}
