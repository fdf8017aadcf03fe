//! tokenizer.json: text to token ids and back.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::bytes::{Bytes, MIB};
use crate::error::{Error, Result};
use crate::fs;

/// The tokenizer's file name.
pub const FILE: &str = "tokenizer.json";
const CAP: Bytes = Bytes(256 * MIB);

/// A tokenizer whose ids are those of a model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads the tokenizer in `directory` for a model of `vocab_size` ids.
    pub fn open(directory: &Path, vocab_size: usize) -> Result<Self> {
        let path = fs::confined(directory, FILE)?;
        let bytes = fs::read_capped(&path, CAP)?;
        let broken = || Error::input(format!("`{}` is no tokenizer that can be read", path.display()));
        // The parser can panic on a file that was made to; that is the file's fault.
        let inner = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(&bytes)))
            .map_err(|_| broken())?
            .map_err(|e| broken().caused_by(e))?;
        Ok(Self { inner, vocab_size })
    }

    /// The ids of `text`; with `special`, what the tokenizer puts around a text (such as a start token) too.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, special)
            .map_err(|e| Error::input("the prompt cannot be tokenized").caused_by(e))?;
        let ids = encoding.get_ids().to_vec();
        match ids.iter().find(|id| **id as usize >= self.vocab_size) {
            Some(id) => Err(Error::input(format!(
                "the tokenizer gives token {id}, and the model has only {} tokens",
                self.vocab_size
            ))
            .hint("tokenizer.json is not this checkpoint's")),
            None => Ok(ids),
        }
    }

    /// The text of `ids`, special tokens left out; broken characters are U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::input("the tokens cannot be decoded").caused_by(e))
    }
}
