//! The one error type that leaves a room of the library.
//!
//! An [`Error`] says what went wrong and where, carries its causes as a
//! [`std::error::Error::source`] chain, and its hints: each a command, a flag
//! or a sentence that helps. Rooms keep typed causes of their own (for example
//! [`crate::quant::QuantizeError`]) and wrap them.

use std::error::Error as StdError;
use std::fmt;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A device that was there failed.
    Device,
    /// The model does not fit, or a device or the disk ran out.
    DoesNotFit,
    /// A model, a map, the Hub or a prompt is not as it must be.
    Input,
    /// The caller asked to stop.
    Interrupted,
    /// A device has less free than when the plan was made; planning again may help.
    Shortfall,
    /// An option is out of its range, or options contradict each other.
    Usage,
}

/// What went wrong, why, and what helps.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    what: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
    hints: Vec<String>,
}

impl Error {
    fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), source: None, hints: Vec::new() }))
    }

    /// Something read from outside is not as it must be.
    pub fn input(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Input, what)
    }

    /// A device failed.
    pub fn device(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Device, what)
    }

    /// Memory or disk does not suffice.
    pub fn does_not_fit(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::DoesNotFit, what)
    }

    /// A device has less free than when the plan was made.
    pub fn shortfall(what: impl Into<String>) -> Self {
        let hint = "another process has taken memory; `--on-shortfall replan` plans again with what is left";
        Self::new(ErrorKind::Shortfall, what).hint(hint)
    }

    /// An option is wrong.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, what)
    }

    /// The caller asked to stop.
    pub fn interrupted() -> Self {
        Self::new(ErrorKind::Interrupted, "interrupted")
    }

    /// An input or output error on `path`; a full disk is [`ErrorKind::DoesNotFit`].
    pub fn io(doing: &str, path: &std::path::Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let what = format!("cannot {doing} `{}`", path.display());
        let full = matches!(source.kind(), Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge);
        let error = if full { Self::does_not_fit(what) } else { Self::input(what) };
        error.caused_by(source)
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Adds a hint: a command that can be run, a flag, or a fact that helps.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hints.push(hint.into());
        self
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The hints, most useful first.
    pub fn hints(&self) -> &[String] {
        &self.0.hints
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// A text that does not stand for what it should.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(String);

impl ParseError {
    /// `text` is `problem`, such as `not a size`.
    pub(crate) fn new(text: &str, problem: &str) -> Self {
        Self(format!("`{}` is {problem}", printable(text)))
    }
}

/// The first five of `items`, quoted, and how many more there are.
pub fn first_five<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 5;
    let mut items = items.into_iter();
    let shown: Vec<_> = items.by_ref().take(SHOWN).map(|item| format!("`{item}`")).collect();
    match items.count() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// `name` with control characters escaped and cut at 80 characters: safe to show.
pub fn printable(name: &str) -> String {
    const LONGEST: usize = 80;
    let mut escaped: String = name.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if name.chars().nth(LONGEST).is_some() {
        escaped.push('…');
    }
    escaped
}

/// The candidate nearest to `word` by edit distance, if it is near enough to be meant.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(2);
    candidates
        .into_iter()
        .map(|candidate| (strsim::levenshtein(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_five_counts_the_rest() {
        assert_eq!(first_five(["a"]), "`a`");
        assert_eq!(first_five(1..=7), "`1`, `2`, `3`, `4`, `5` and 2 more");
    }

    #[test]
    fn printable_escapes_and_cuts() {
        assert_eq!(printable("a\0b\n"), "a\\0b\\n");
        assert_eq!(printable(&"x".repeat(100)).chars().count(), 81);
    }

    #[test]
    fn did_you_mean_finds_the_near_and_only_the_near() {
        let known = ["model.layers.3", "model.norm", "lm_head"];
        assert_eq!(did_you_mean("model.layer.3", known), Some("model.layers.3"));
        assert_eq!(did_you_mean("transformer.wte", known), None);
    }
}
