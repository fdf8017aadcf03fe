//! tokenizer.json: text to token ids and back.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::parsed::{Parsed, TokenBytes, file};
use super::sandbox::{Answer, Cell, Request, Sandbox, unexpected};
use crate::error::{Error, Result};
use crate::pool::lock;

/// A tokenizer whose ids are those of a model.
pub struct Tokenizer {
    runs: Runs,
    vocab_size: usize,
    /// The tokens that stand for a byte each, in order; none where bytes are not decoded so.
    byte_ids: Vec<u32>,
    bytes: Mutex<Option<Arc<TokenBytes>>>,
    seconds: f64,
}

enum Runs {
    Here(Box<Parsed>),
    Apart(Box<Mutex<Apart>>),
}

/// A process that can be started again.
struct Apart {
    cell: Cell,
    sandbox: Sandbox,
    directory: PathBuf,
}

impl Apart {
    fn start(sandbox: Sandbox, directory: PathBuf) -> Result<Self> {
        let beyond = format!("the tokenizer in `{}` takes more than it may", directory.display());
        let mut cell = Cell::start(&sandbox, beyond)?;
        cell.send(&Request::Open { directory: Cow::Borrowed(&directory) })?;
        Ok(Self { cell, sandbox, directory })
    }

    /// The answer to `request`. A text that was too much for the process is the end of it, and of nothing else.
    fn ask(&mut self, request: &Request) -> Result<Answer> {
        if self.cell.has_ended() {
            *self = Self::start(self.sandbox.clone(), self.directory.clone())?;
            self.cell.receive()?;
        }
        self.cell.ask(request)
    }
}

/// A tokenizer that is being read.
pub struct Opening(Begun);

enum Begun {
    Here(JoinHandle<Result<Tokenizer>>),
    Apart(Apart, usize),
    Done(Result<Tokenizer>),
}

impl Tokenizer {
    /// Reads the tokenizer in `directory` for a model of `vocab_size` ids. It runs in this process:
    /// what it takes of memory and time is not limited.
    ///
    /// # Errors
    /// There is no tokenizer.json, or it is not as it must be.
    pub fn open(directory: &Path, vocab_size: usize) -> Result<Self> {
        let begun = Instant::now();
        let parsed = Parsed::open(directory)?;
        let seconds = begun.elapsed().as_secs_f64();
        let (byte_ids, runs) = (parsed.byte_ids(), Runs::Here(Box::new(parsed)));
        Ok(Self { runs, vocab_size, byte_ids, bytes: Mutex::default(), seconds })
    }

    /// Begins to read the tokenizer in `directory`, while the caller does something else; in the process of
    /// a `sandbox`, where there is one.
    ///
    /// # Errors
    /// There is no tokenizer.json, or no thread or process can be started.
    pub fn begin(directory: &Path, vocab_size: usize, sandbox: Option<&Sandbox>) -> Result<Opening> {
        file(directory)?;
        let directory = directory.to_owned();
        let Some(sandbox) = sandbox else {
            let open = move || Self::open(&directory, vocab_size);
            let thread = thread::Builder::new().name("evenkeel-tokenizer".to_owned()).spawn(open);
            let thread = thread.map_err(|e| Error::device("no thread can be started").caused_by(e))?;
            return Ok(Opening(Begun::Here(thread)));
        };
        Ok(Opening(Begun::Apart(Apart::start(sandbox.clone(), directory)?, vocab_size)))
    }

    /// The ids of `text`; with `special`, what the tokenizer puts around a text (such as a start token) too.
    ///
    /// # Errors
    /// The tokenizer fails, or gives what is no token of the model.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = match &self.runs {
            Runs::Here(parsed) => parsed.encode(text, special)?,
            Runs::Apart(apart) => match lock(apart).ask(&Request::Encode { text: text.into(), special })? {
                Answer::Ids(ids) => ids,
                _ => return Err(unexpected()),
            },
        };
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
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let [text] = self.decode_each([ids])?;
        Ok(text)
    }

    /// The text of each of some sequences.
    pub(super) fn decode_each<const N: usize>(&self, sequences: [&[u32]; N]) -> Result<[String; N]> {
        let texts = match &self.runs {
            Runs::Here(parsed) => sequences.iter().map(|ids| parsed.decode(ids)).collect::<Result<Vec<_>>>()?,
            Runs::Apart(apart) => {
                let request = Request::Decode { sequences: sequences.map(Cow::Borrowed).into() };
                match lock(apart).ask(&request)? {
                    Answer::Texts(texts) => texts,
                    _ => return Err(unexpected()),
                }
            }
        };
        texts.try_into().map_err(|_| unexpected())
    }

    /// What each token of the model stands for; found out when it is first asked for.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn token_bytes(&self) -> Result<Arc<TokenBytes>> {
        let mut known = lock(&self.bytes);
        if let Some(bytes) = &*known {
            return Ok(Arc::clone(bytes));
        }
        let count = self.vocab_size;
        let bytes = match &self.runs {
            Runs::Here(parsed) => parsed.bytes(count),
            Runs::Apart(apart) => match lock(apart).ask(&Request::Tokens { count })? {
                Answer::Tokens(bytes) => bytes,
                _ => return Err(unexpected()),
            },
        };
        Ok(Arc::clone(known.insert(Arc::new(bytes))))
    }

    /// Whether a token stands for a byte, whose character others may make whole.
    pub(super) fn is_byte(&self, id: u32) -> bool {
        self.byte_ids.binary_search(&id).is_ok()
    }

    /// How long it took to read it, in seconds.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }
}

impl Opening {
    /// Whether it is known by now that there will be no tokenizer; [`Opening::wait`] says why.
    pub fn has_failed(&mut self) -> bool {
        let is_over = match &mut self.0 {
            Begun::Here(thread) => thread.is_finished(),
            Begun::Apart(apart, _) => apart.cell.is_ready(),
            Begun::Done(_) => false,
        };
        if is_over {
            let begun = std::mem::replace(&mut self.0, Begun::Done(Err(unexpected())));
            self.0 = Begun::Done(Self(begun).wait());
        }
        matches!(self.0, Begun::Done(Err(_)))
    }

    /// The tokenizer, once it is read.
    ///
    /// # Errors
    /// The file is not as it must be.
    pub fn wait(self) -> Result<Tokenizer> {
        match self.0 {
            Begun::Here(thread) => thread.join().unwrap_or_else(|_| Err(Error::input("the tokenizer cannot be read"))),
            Begun::Apart(mut apart, vocab_size) => match apart.cell.receive()? {
                Answer::Opened { byte_ids, seconds } => {
                    let runs = Runs::Apart(Box::new(Mutex::new(apart)));
                    Ok(Tokenizer { runs, vocab_size, byte_ids, bytes: Mutex::default(), seconds })
                }
                _ => Err(unexpected()),
            },
            Begun::Done(result) => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::text::TextStream;
    use crate::text::parsed::FILE;

    /// A directory with a tokenizer of single characters and some more tokens, and other files.
    fn directory(tokens: &[&str], parts: &Value, files: &[(&str, Value)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let letters = ('a'..='z').chain("▁ <|>_".chars()).map(String::from);
        let tokens = letters.chain(tokens.iter().map(ToString::to_string));
        let vocab: serde_json::Map<_, _> = tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
        let mut tokenizer = json!({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        for (name, part) in parts.as_object().unwrap() {
            tokenizer[name] = part.clone();
        }
        for (name, content) in [(FILE, tokenizer)].iter().chain(files) {
            std::fs::write(directory.path().join(name), content.to_string()).unwrap();
        }
        directory
    }

    fn encoded(directory: &tempfile::TempDir, text: &str) -> Vec<u32> {
        Tokenizer::open(directory.path(), 64).unwrap().encode(text, false).unwrap()
    }

    #[test]
    fn a_text_is_neither_cut_nor_filled() {
        let truncation = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        let padding = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
        let directory = directory(&[], &json!({"truncation": truncation, "padding": padding}), &[]);
        assert_eq!(encoded(&directory, "abcd"), [0, 1, 2, 3]);
    }

    #[test]
    fn tokens_that_other_files_add_count() {
        let token = |content: &str| json!({"content": content, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false, "special": true});
        for files in [
            &[("tokenizer_config.json", json!({"added_tokens_decoder": {"33": token("<|b|>"), "32": token("<|a|>")}}))]
                [..],
            &[("added_tokens.json", json!({"<|b|>": 33, "<|a|>": 32}))],
            &[("special_tokens_map.json", json!({"bos_token": "<|a|>", "eos_token": token("<|b|>")}))],
            &[("special_tokens_map.json", json!({"additional_special_tokens": ["<|a|>", token("<|b|>")]}))],
            &[("tokenizer_config.json", json!({"bos_token": "<|a|>", "unk_token": null, "eos_token": "<|b|>"}))],
        ] {
            assert_eq!(encoded(&directory(&[], &json!({}), files), "<|a|>c<|b|>"), [32, 2, 33], "{files:?}");
        }
        // A name alone says nothing of the spaces around a token, which the token itself does.
        let strips = json!([{"id": 32, "content": "<|a|>", "lstrip": false, "rstrip": true, "normalized": false, "single_word": false, "special": true}]);
        let named = [("tokenizer_config.json", json!({"eos_token": "<|a|>"}))];
        assert_eq!(encoded(&directory(&[], &json!({"added_tokens": strips}), &named), "<|a|> b"), [32, 1]);
    }

    #[test]
    fn other_tokenizers_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = || Tokenizer::begin(directory.path(), 64, None).map(|_| ()).unwrap_err();
        assert!(error().to_string().starts_with("cannot open"), "{}", error());
        std::fs::write(directory.path().join("tokenizer.model"), "").unwrap();
        assert!(error().to_string().contains("has `tokenizer.model`, and no tokenizer.json"), "{}", error());
        assert!(error().hints()[0].to_string().contains("save_pretrained"));
    }

    #[test]
    fn nothing_is_lost_of_bytes_and_spaces() {
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        let bytes = ["<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0xC3>", "<0xA9>", "▁h"];
        let directory = directory(&bytes, &json!({"pre_tokenizer": metaspace, "decoder": decoder}), &[]);
        let tokenizer = Tokenizer::open(directory.path(), 64).unwrap();
        let id = |token: &str| match &tokenizer.runs {
            Runs::Here(parsed) => parsed.0.token_to_id(token).unwrap(),
            Runs::Apart(_) => unreachable!(),
        };
        for (prompt, tokens, text) in [
            (&["a"][..], &["<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "b", "c"][..], "����bc"),
            (&["a"], &["<0xE4>", "<0xBD>", "<0xA0>", "▁h", "i"], "你 hi"),
            (&["a"], &["<0xC3>", "<0xA9>", "<0xFF>", "▁h", "i"], "��� hi"),
            (&["a"], &["<0xC3>", "<0xA9>"], "é"),
            (&["a"], &["▁h", "i"], " hi"),
            (&[], &["▁h", "i"], "hi"),
        ] {
            let prompt: Vec<_> = prompt.iter().map(|token| id(token)).collect();
            let mut stream = TextStream::new(&prompt, Vec::new());
            let mut streamed = String::new();
            for token in tokens {
                streamed += &stream.push(id(token), &tokenizer).unwrap().0;
            }
            streamed += &stream.finish(&tokenizer).unwrap();
            assert_eq!(streamed, text, "{tokens:?}");
        }
        let bytes = tokenizer.token_bytes().unwrap();
        for (token, of) in [("<0xE4>", &b"\xe4"[..]), ("▁h", b" h"), ("i", b"i")] {
            assert_eq!(bytes.of(id(token)), of, "{token}");
        }
        assert_eq!((bytes.count(), bytes.of(63)), (64, &b""[..]));
    }

    #[test]
    fn bytes_of_tokens_are_those_of_texts() {
        let ferris = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ferris-7m");
        let tokenizer = Tokenizer::open(&ferris, 4096).unwrap();
        let bytes = tokenizer.token_bytes().unwrap();
        let text = "fn main() {\n\tlet crab = \"🦀 grüße\";\r\n}";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids.iter().flat_map(|id| bytes.of(*id)).copied().collect::<Vec<_>>(), text.as_bytes());
        assert!(bytes.is_special(0) && bytes.of(0) == b"<|endoftext|>" && !bytes.is_special(ids[0]));
    }
}
