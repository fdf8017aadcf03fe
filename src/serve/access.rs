//! Who may ask.

use std::net::{IpAddr, SocketAddr};

use hyper::Request;
use hyper::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN};
use hyper::http::uri::Authority;
use sha2::{Digest, Sha256};

use crate::openai::Failure;

/// Paths that tell nothing of the model, for which no key is needed.
const OPEN: [&str; 2] = ["/", "/health"];

/// What a request has to show.
pub enum Access {
    /// A key, by its SHA-256: how long it takes to compare that tells nothing of the key.
    Key([u8; 32]),
    /// Nothing, but from a page of this server if it is from a page; and to this machine by a name of its own, which
    /// no other site's name is, whatever address that is said to have.
    Site { is_loopback: bool },
}

impl Access {
    pub fn new(key: Option<&str>, address: SocketAddr) -> Self {
        let is_loopback = address.ip().is_loopback();
        key.map_or(Self::Site { is_loopback }, |key| Self::Key(Sha256::digest(key).into()))
    }

    pub fn check<B>(&self, request: &Request<B>) -> Result<(), Failure> {
        let header = |name: HeaderName| request.headers().get(name).map(|value| value.to_str().unwrap_or_default());
        match self {
            Self::Key(key) => {
                let shown = header(AUTHORIZATION).and_then(|value| value.split_once(' '));
                let shown = shown.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
                let is_right = shown.is_some_and(|(_, shown)| Sha256::digest(shown.trim()).as_slice() == key);
                if is_right || OPEN.contains(&request.uri().path()) {
                    return Ok(());
                }
                Err(Failure {
                    code: Some("invalid_api_key"),
                    ..Failure::new(401, "no API key that is right stands in `Authorization: Bearer …`")
                })
            }
            Self::Site { is_loopback } => {
                let host =
                    request.uri().authority().map(Authority::as_str).or_else(|| header(HOST)).unwrap_or_default();
                if *is_loopback && !is_of_this_machine(host) {
                    return Err(Failure::new(403, "the host is neither `localhost` nor a loopback address"));
                }
                let site = header(ORIGIN).map(|origin| origin.split_once("://").map_or(origin, |(_, site)| site));
                if site.is_some_and(|site| site != host) {
                    return Err(Failure::new(403, "pages of other sites may not ask without an API key"));
                }
                Ok(())
            }
        }
    }
}

fn is_of_this_machine(host: &str) -> bool {
    let Ok(host) = host.parse::<Authority>() else { return false };
    let name = host.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(access: &Access, path: &str, headers: &[(&str, &str)]) -> u16 {
        let request = headers.iter().fold(Request::get(path), |request, (name, value)| request.header(*name, *value));
        access.check(&request.body(()).unwrap()).err().map_or(200, |failure| failure.status)
    }

    #[test]
    fn a_key_is_asked_for_where_there_is_one() {
        let access = Access::new(Some("crab"), "0.0.0.0:1".parse().unwrap());
        for (path, headers, expected) in [
            ("/v1/models", &[("authorization", "Bearer crab")][..], 200),
            ("/v1/models", &[("authorization", "bearer crab"), ("origin", "https://a"), ("host", "b")], 200),
            ("/v1/models", &[("authorization", "Bearer crabs")], 401),
            ("/v1/models", &[("authorization", "Basic crab")], 401),
            ("/v1/models", &[("authorization", "crab")], 401),
            ("/v1/models", &[], 401),
            ("/metrics", &[], 401),
            ("/health", &[], 200),
            ("/", &[], 200),
        ] {
            assert_eq!(status(&access, path, headers), expected, "{path} {headers:?}");
        }
    }

    #[test]
    fn other_sites_are_kept_out_where_there_is_none() {
        for (address, headers, expected) in [
            ("127.0.0.1:1", &[("host", "127.0.0.1:1")][..], 200),
            ("127.0.0.1:1", &[("host", "localhost:1")], 200),
            ("[::1]:1", &[("host", "[::1]:1")], 200),
            ("127.0.0.1:1", &[("host", "example.com:1")], 403),
            ("127.0.0.1:1", &[("host", "127.0.0.1.example.com")], 403),
            ("127.0.0.1:1", &[("host", "localhost@example.com")], 403),
            ("127.0.0.1:1", &[], 403),
            ("127.0.0.1:1", &[("host", "localhost:1"), ("origin", "http://localhost:1")], 200),
            ("127.0.0.1:1", &[("host", "localhost:1"), ("origin", "https://example.com")], 403),
            ("127.0.0.1:1", &[("host", "localhost:1"), ("origin", "null")], 403),
            ("0.0.0.0:1", &[("host", "example.com:1")], 200),
            ("0.0.0.0:1", &[("host", "example.com:1"), ("origin", "http://example.net")], 403),
        ] {
            let access = Access::new(None, address.parse().unwrap());
            assert_eq!(status(&access, "/v1/models", headers), expected, "{address} {headers:?}");
        }
    }
}
