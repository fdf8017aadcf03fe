//! Tokens to text as they come: whole characters, and nothing that may yet
//! turn out to be a stop text.

use super::tokenizer::Tokenizer;
use crate::error::Result;

/// Tokens that are decoded together at most while a character stays incomplete.
const LONGEST_CHARACTER: usize = 16;
/// Tokens of one byte each that are waited for at most.
const MOST_BYTES: usize = 1024;

/// The text of a sequence of tokens, given out piece by piece.
pub struct TextStream {
    tokens: Vec<u32>,
    /// Tokens before this one are only decoded as the context of those behind.
    prefix: usize,
    /// Tokens before this one have been given to `held`.
    read: usize,
    /// Text that may be the beginning of a stop text.
    held: String,
    stop: Vec<String>,
    stopped: bool,
}

impl TextStream {
    /// An empty stream behind `prompt`, which ends before any of the texts in `stop`.
    pub fn new(prompt: &[u32], stop: Vec<String>) -> Self {
        // What a word begins with depends on whether one stands before it.
        let tokens = prompt[prompt.len().saturating_sub(LONGEST_CHARACTER)..].to_vec();
        Self {
            prefix: 0,
            read: tokens.len(),
            tokens,
            held: String::new(),
            stop: stop.into_iter().filter(|text| !text.is_empty()).collect(),
            stopped: false,
        }
    }

    /// Adds a token. Gives the text that is complete by now, and whether a stop text was met.
    pub fn push(&mut self, token: u32, tokenizer: &Tokenizer) -> Result<(String, bool)> {
        self.tokens.push(token);
        self.advance(tokenizer, false)?;
        Ok((self.release(false), self.stopped))
    }

    /// The text that was held back; the stream is then empty.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        self.advance(tokenizer, true)?;
        Ok(self.release(true))
    }

    /// Decodes what is new and takes it over if its characters are whole, or if it is `all`.
    fn advance(&mut self, tokenizer: &Tokenizer, all: bool) -> Result<()> {
        let new = self.tokens.len() - self.read;
        // Bytes are characters or broken all together, which the next token decides.
        let is_open = self.tokens.last().is_some_and(|token| tokenizer.is_byte(*token)) && new <= MOST_BYTES;
        if self.stopped || new == 0 || is_open && !all {
            return Ok(());
        }
        // A token's text can depend on those before it, so it is what a few more tokens add to a few.
        let parts = [&self.tokens[self.prefix..self.read], &self.tokens[self.prefix..]];
        let [before, with] = tokenizer.decode_each(parts)?;
        if all || !with.ends_with('\u{fffd}') || new > LONGEST_CHARACTER {
            let same = before.chars().zip(with.chars()).take_while(|(before, with)| before == with);
            self.held.push_str(&with[same.map(|(both, _)| both.len_utf8()).sum()..]);
            (self.prefix, self.read) = (self.read, self.tokens.len());
        }
        Ok(())
    }

    /// What of the held text can be given out.
    fn release(&mut self, all: bool) -> String {
        if self.stopped {
            return String::new();
        }
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begins_stop = |tail: &str| self.stop.iter().any(|stop| stop.starts_with(tail));
        let tail = self.held.char_indices().map(|(at, _)| at).find(|at| !all && begins_stop(&self.held[*at..]));
        let rest = self.held.split_off(tail.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ferris-7m"), 4096).unwrap()
    }

    fn pieces(text: &str, stop: &[&str]) -> (Vec<String>, bool) {
        let tokenizer = tokenizer();
        let mut stream = TextStream::new(&[], stop.iter().map(|s| (*s).to_owned()).collect());
        let mut pieces = Vec::new();
        for token in tokenizer.encode(text, false).unwrap() {
            let (piece, stopped) = stream.push(token, &tokenizer).unwrap();
            pieces.push(piece);
            if stopped {
                return (pieces, true);
            }
        }
        pieces.push(stream.finish(&tokenizer).unwrap());
        (pieces, false)
    }

    #[test]
    fn pieces_make_up_the_text() {
        for text in ["Ownership is a set of rules.", " grüße, 世界 🦀🦀!", "a\n\n\tb", "naïve café 👩‍👩‍👧"]
        {
            let (pieces, stopped) = pieces(text, &[]);
            assert_eq!(pieces.concat(), text);
            assert!(!stopped);
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
            assert!(pieces.len() > 3, "it streams: {pieces:?}");
        }
    }

    #[test]
    fn a_stop_text_ends_the_stream_and_is_not_given_out() {
        for (text, stop, shown) in [
            ("one two three four", &["three"][..], "one two "),
            ("one two three four", &["four", "two"], "one "),
            ("one two three", &["twelve"], "one two three"),
            ("one two th", &["three"], "one two th"),
            ("🦀 and 🦀🦀", &["🦀🦀"], "🦀 and "),
            ("abc", &[""], "abc"),
        ] {
            let (pieces, _) = pieces(text, stop);
            assert_eq!(pieces.concat(), shown, "{text} until {stop:?}");
        }
    }

    #[test]
    fn an_incomplete_character_comes_out_at_the_end() {
        let tokenizer = tokenizer();
        let mut stream = TextStream::new(&[], Vec::new());
        let crab = tokenizer.encode("🦀", false).unwrap();
        assert!(crab.len() > 1);
        assert_eq!(stream.push(crab[0], &tokenizer).unwrap().0, "");
        assert_eq!(stream.finish(&tokenizer).unwrap(), "\u{fffd}");
        assert_eq!(stream.finish(&tokenizer).unwrap(), "");
    }
}
