//! Names that the Hub gives, parsed before they become parts of paths.

/// A commit: 40 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Commit(String);

impl Commit {
    pub fn parse(text: &str) -> Option<Self> {
        is_hex(text, &[40]).then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a content is known by: its SHA-256, or the SHA-1 that git gives it.
/// It is a blob's name in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Oid(String);

impl Oid {
    /// The digest in `text`, which may be an ETag. Other ETags name no content,
    /// and two files could have the same one.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_start_matches("W/").trim_matches('"');
        is_hex(text, &[40, 64]).then(|| Self(text.to_ascii_lowercase()))
    }

    pub fn of_sha256(digest: &[u8]) -> Self {
        let digits = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        Self(digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect())
    }

    pub fn is_sha256(&self) -> bool {
        self.0.len() == 64
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_hex(text: &str, lengths: &[usize]) -> bool {
    lengths.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_are_names() {
        let (sha1, sha256) = ("0123456789abcdef0123456789abcdef01234567", "0f".repeat(32));
        assert_eq!(Oid::parse(&format!("W/\"{sha1}\"")).unwrap().as_str(), sha1);
        assert!(Oid::parse(&sha256).unwrap().is_sha256() && !Oid::parse(sha1).unwrap().is_sha256());
        for bad in
            ["", ".", "..", "a/b", "../../x", "/etc/passwd", "\"5f3c-2a\"", &"a".repeat(300), &sha1.replace('0', "/")]
        {
            assert_eq!(Oid::parse(bad), None, "{bad}");
            assert_eq!(Commit::parse(bad), None, "{bad}");
        }
        assert_eq!(Commit::parse(&sha256), None);
    }
}
