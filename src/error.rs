//! The one error type that leaves a room of the library.
//!
//! An [`Error`] says what went wrong and where. Its kind says what a caller can do about it, its
//! hints what helps. What a program may have to tell apart has a type, which [`Error::cause`] finds:
//!
//! | cause | when |
//! | --- | --- |
//! | [`DeviceError`](crate::device::DeviceError) | a device failed, lacks memory, or is not there |
//! | [`DoesNotFit`](crate::plan::DoesNotFit) | a plan does not fit, with what each device lacks |
//! | [`WeightError`](crate::loader::WeightError) | a weight that cannot be packed, with its place |
//! | [`TooLong`](crate::generate::TooLong) | a prompt and its answer are longer than the context |
//! | `hub::Refusal` | the Hub's answer where it did not give what was asked for |
//! | [`ParseError`] | a text that does not stand for what it should |
//! | [`std::io::Error`] | what the system said of a file |

use std::borrow::Cow;
use std::error::Error as StdError;
use std::{fmt, iter};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Others are served first, and no more can wait.
    Busy,
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

/// A text, or an error with a type.
type Cause = Box<dyn StdError + Send + Sync>;

/// What went wrong, why, and what helps.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    what: Cause,
    source: Option<Cause>,
    hints: Vec<Hint>,
}

impl Error {
    /// An error of `kind`: a text, or an error with a type.
    pub fn new(kind: ErrorKind, what: impl Into<Cause>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), source: None, hints: Vec::new() }))
    }

    /// Something read from outside is not as it must be.
    pub fn input(what: impl Into<Cause>) -> Self {
        Self::new(ErrorKind::Input, what)
    }

    /// A device failed.
    pub fn device(what: impl Into<Cause>) -> Self {
        Self::new(ErrorKind::Device, what)
    }

    /// Memory or disk does not suffice.
    pub fn does_not_fit(what: impl Into<Cause>) -> Self {
        Self::new(ErrorKind::DoesNotFit, what)
    }

    /// An option is wrong.
    pub fn usage(what: impl Into<Cause>) -> Self {
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

    /// The system refuses a thread.
    pub fn no_thread(source: std::io::Error) -> Self {
        Self::device("no thread can be started").caused_by(source)
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Cause>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Adds a hint: what to change, or a fact that helps.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<Hint>) -> Self {
        self.0.hints.push(hint.into());
        self
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The cause of type `T`: what the error itself is, or what it comes from.
    pub fn cause<T: StdError + 'static>(&self) -> Option<&T> {
        let behind = || iter::successors(self.source(), |&error| error.source()).find_map(|error| error.downcast_ref());
        self.0.what.downcast_ref().or_else(behind)
    }

    /// The hints, most useful first.
    pub fn hints(&self) -> &[Hint] {
        &self.0.hints
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.what.fmt(f)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static)).or_else(|| self.0.what.source())
    }
}

/// What helps: a sentence, and the settings that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// With `{}` in place of each setting.
    sentence: String,
    settings: Vec<Setting>,
}

/// What a caller can set, or do, that a hint names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting {
    /// To use a device map that was made for another model.
    AnyModel,
    /// To place the modules automatically.
    AutomaticPlacement,
    /// To put the prompt into the chat template.
    ChatTemplate,
    /// The longest context, in tokens.
    Context(usize),
    /// To place all modules on the CPU.
    Cpu,
    /// A device's description.
    Device(String),
    /// The dtype of the KV cache by its name.
    KvCache(&'static str),
    /// The most tokens to generate.
    MaxNewTokens(usize),
    /// The directory for weights on the disk.
    OffloadDirectory,
    /// To replace a file that is there.
    Overwrite,
    /// The scheme of the weights by its name, or any.
    Quantize(Option<&'static str>),
    /// To plan again where a device has less free than when the plan was made.
    Replan,
    /// To save a checkpoint whose weights are quantized.
    SaveQuantized,
    /// To write a plan as a device map.
    WriteMap,
}

impl Hint {
    /// A sentence that has `{}` where it names each of `settings`.
    pub fn naming(sentence: impl Into<String>, settings: impl IntoIterator<Item = Setting>) -> Self {
        Self { sentence: sentence.into(), settings: settings.into_iter().collect() }
    }

    /// What the hint says to set or to do.
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// The sentence with every setting as `spell` has it, a flag for example.
    pub fn spelled(&self, spell: impl Fn(&Setting) -> String) -> String {
        let fill = |text: String, setting| text.replacen("{}", &spell(setting), 1);
        self.settings.iter().fold(self.sentence.clone(), fill)
    }
}

impl<T: Into<String>> From<T> for Hint {
    fn from(sentence: T) -> Self {
        Self::naming(sentence, [])
    }
}

impl fmt::Display for Hint {
    /// With settings in words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.spelled(ToString::to_string))
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AnyModel => "allowing any model",
            Self::AutomaticPlacement => "automatic placement",
            Self::ChatTemplate => "the chat template",
            Self::Context(tokens) => return write!(f, "a context of {tokens} tokens"),
            Self::Cpu => "placement on the CPU",
            Self::Device(description) => return write!(f, "`{description}`"),
            Self::KvCache(dtype) => return write!(f, "a KV cache of {dtype}"),
            Self::MaxNewTokens(tokens) => return write!(f, "a limit of {tokens} new tokens"),
            Self::OffloadDirectory => "the offload directory",
            Self::Overwrite => "overwriting",
            Self::Quantize(Some(scheme)) => return write!(f, "the scheme `{scheme}`"),
            Self::Quantize(None) => "the scheme",
            Self::Replan => "another try",
            Self::SaveQuantized => "saving quantized weights",
            Self::WriteMap => "saving a plan",
        })
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

/// Whether a character is not to be seen itself and acts on a terminal or on the text around it: controls but
/// the end of a line, what turns the direction of writing, what has no width, and what is no character.
pub fn is_unseen(c: char) -> bool {
    c.is_control() && c != '\n'
        || matches!(
            c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// `text` with what [`is_unseen`] escaped, so that a stranger's words in it are safe to show; lines stay lines.
pub fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unseen) {
        return text.into();
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_unseen(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    safe.into()
}

/// A hint at the candidate nearest to `word` by edit distance, if it is near enough to be meant; else `otherwise`.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>, otherwise: impl Into<Hint>) -> Hint {
    let limit = (word.chars().count() / 3).max(2);
    let distances = candidates.into_iter().map(|candidate| (strsim::levenshtein(word, candidate), candidate));
    let near = distances.filter(|(distance, _)| *distance <= limit).min_by_key(|(distance, _)| *distance);
    near.map_or_else(|| otherwise.into(), |(_, near)| format!("did you mean `{near}`?").into())
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
    fn a_cause_is_found_by_its_type() {
        let parse = || ParseError::new("x", "no number");
        let itself = Error::usage(parse());
        assert_eq!((itself.to_string(), itself.cause()), ("`x` is no number".to_owned(), Some(&parse())));
        assert!(itself.source().is_none());
        let wrapped = Error::input("the file is broken").caused_by(parse());
        assert_eq!((wrapped.to_string(), wrapped.cause()), ("the file is broken".to_owned(), Some(&parse())));
        assert!(wrapped.cause::<std::io::Error>().is_none());
    }

    #[test]
    fn a_hint_says_in_words_what_to_set() {
        let hint = Hint::naming("{} makes room", [Setting::Context(9)]);
        assert_eq!(hint.to_string(), "a context of 9 tokens makes room");
        assert_eq!(hint.spelled(|_| "`{}`".to_owned()), "`{}` makes room");
        assert_eq!(Hint::from("a map of `{}`").to_string(), "a map of `{}`");
    }

    #[test]
    fn printable_escapes_and_cuts() {
        assert_eq!(printable("a\0b\n"), "a\\0b\\n");
        assert_eq!(printable(&"x".repeat(100)).chars().count(), 81);
    }

    #[test]
    fn what_is_not_seen_is_escaped() {
        for (text, safe) in [
            ("plain, é, 你, 👍\nand a line", "plain, é, 你, 👍\nand a line"),
            ("\x1b]0;title\x07", "\\u{1b}]0;title\\u{7}"),
            ("a\rb\tc\x08\x7f\0", "a\\rb\\tc\\u{8}\\u{7f}\\u{0}"),
            ("\u{9b}2J\u{85}", "\\u{9b}2J\\u{85}"),
            ("\u{202e}txt\u{2066}\u{200b}\u{feff}", "\\u{202e}txt\\u{2066}\\u{200b}\\u{feff}"),
            ("\u{fffe}\u{2028}", "\\u{fffe}\\u{2028}"),
        ] {
            assert_eq!(escaped(text), safe);
            assert_eq!(escaped(safe), safe);
        }
    }

    #[test]
    fn did_you_mean_finds_the_near_and_only_the_near() {
        let known = ["model.layers.3", "model.norm", "lm_head"];
        assert_eq!(did_you_mean("model.layer.3", known, "none").to_string(), "did you mean `model.layers.3`?");
        assert_eq!(did_you_mean("transformer.wte", known, "none").to_string(), "none");
    }
}
