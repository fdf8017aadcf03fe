//! Repositories on the Hub: read in parts for a plan, downloaded for a load.
//!
//! A Hub is a stranger. What it sends is bounded in bytes and time, and parsed
//! before it touches a path: one commit for all files, names checked, contents
//! held against their SHA-256 where the Hub gives it. The cache is the one that
//! all Hugging Face tools share. Requests are `GET` and `HEAD`, and one `POST`
//! that asks for sizes; nothing else is sent. Nothing is read from the
//! environment, except what ureq and TLS read: proxies, `SSL_CERT_FILE`, `SSL_CERT_DIR`.

mod cache;
mod explain;
mod link;
mod names;
mod options;
mod repository;
mod wire;

pub use options::{ENDPOINT, HubEvent, HubOptions, LOCK_WAIT, RATE_LIMIT_WAIT, RepoId, Token};
pub use repository::{Hub, Repository};
pub use wire::Refusal;
