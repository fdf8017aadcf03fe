//! tokenizer.json, read and run in this process.

use std::borrow::Cow;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokenizers::models::bpe::BPE;
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};

use super::special::Special;
use crate::bytes::{Bytes, MIB};
use crate::error::{Error, Result, printable};
use crate::fs;

/// The tokenizer's file name.
pub const FILE: &str = "tokenizer.json";
const CAP: Bytes = Bytes(256 * MIB);
/// What people have in place of a tokenizer.json.
const OTHER_FILES: [&str; 4] = ["tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"];

/// The path of the tokenizer's file; where there is none, an error that says how it is made.
pub fn file(directory: &Path) -> Result<PathBuf> {
    let there = OTHER_FILES.into_iter().find(|file| directory.join(file).exists());
    if let Some(other) = there
        && !directory.join(FILE).exists()
    {
        let name = directory.display().to_string();
        // Python reads a text as JSON writes it, and only a NUL cannot be quoted for a shell.
        let literal = serde_json::to_string(&name).unwrap_or_default();
        let program = format!(
            "from transformers import AutoTokenizer as T; T.from_pretrained({literal}).save_pretrained({literal})"
        );
        let command = shlex::try_join(["python", "-c", &program]).unwrap_or_default();
        return Err(Error::input(format!("`{name}` has `{other}`, and no {FILE}, which is what is read"))
            .hint(format!("Transformers makes it: `{command}`")));
    }
    fs::confined(directory, FILE)
}

/// tokenizer.json, but for truncation and padding: a text is taken whole, and nothing is added to it.
#[derive(Deserialize)]
struct File<'a> {
    version: Option<Cow<'a, str>>,
    #[serde(borrow)]
    model: &'a RawValue,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
}

impl File<'_> {
    fn tokenizer(self, special: Special) -> tokenizers::Result<tokenizers::Tokenizer> {
        if self.version.as_ref().is_some_and(|version| version != "1.0") {
            return Err("its version is not 1.0".into());
        }
        let mut tokenizer = tokenizers::Tokenizer::new(model(self.model)?);
        tokenizer
            .with_normalizer(self.normalizer)?
            .with_pre_tokenizer(self.pre_tokenizer)
            .with_post_processor(self.post_processor)
            .with_decoder(self.decoder);
        let added = [self.added_tokens, special.added].concat();
        let is_new = |token: &AddedToken| added.iter().all(|added| added.content != token.content);
        let mentioned: Vec<_> = special.mentioned.into_iter().filter(is_new).collect();
        tokenizer.add_tokens(added)?;
        tokenizer.add_tokens(mentioned)?;
        Ok(tokenizer)
    }
}

/// Each model as its own type at once: by way of the crate's choice among them all, a vocabulary is held thrice.
fn model(raw: &RawValue) -> serde_json::Result<ModelWrapper> {
    #[derive(Deserialize)]
    struct Tag<'a> {
        #[serde(borrow, rename = "type")]
        name: Option<Cow<'a, str>>,
    }
    let text = raw.get();
    match serde_json::from_str::<Tag>(text)?.name.as_deref() {
        Some("BPE") => serde_json::from_str::<BPE>(text).map(Into::into),
        Some("Unigram") => serde_json::from_str::<Unigram>(text).map(Into::into),
        Some("WordLevel") => serde_json::from_str::<WordLevel>(text).map(Into::into),
        Some("WordPiece") => serde_json::from_str::<WordPiece>(text).map(Into::into),
        Some(other) => Err(serde_json::Error::custom(format!("`{}` is no model", printable(other)))),
        None => serde_json::from_str(text),
    }
}

/// What each token of a vocabulary stands for.
#[derive(Deserialize, Serialize)]
pub struct TokenBytes {
    bytes: Vec<Vec<u8>>,
    /// In order.
    special: Vec<u32>,
}

impl TokenBytes {
    /// The bytes of a token; of a special one its name, of one that is not there none.
    pub fn of(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// Whether a token is no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// Number of ids.
    pub fn count(&self) -> usize {
        self.bytes.len()
    }
}

/// A tokenizer in this process.
pub struct Parsed(pub tokenizers::Tokenizer);

impl Parsed {
    pub fn open(directory: &Path) -> Result<Self> {
        let path = file(directory)?;
        let bytes = fs::read_capped(&path, CAP)?;
        let special = Special::read(directory)?;
        let parse = || {
            let text = std::str::from_utf8(&bytes)?;
            serde_json::from_str::<File>(text)?.tokenizer(special)
        };
        caught(parse, || Error::input(format!("`{}` is no tokenizer that can be read", path.display()))).map(Self)
    }

    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encode = || self.0.encode_fast(text, special).map(|encoding| encoding.get_ids().to_vec());
        caught(encode, || Error::input("the text cannot be tokenized"))
    }

    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        caught(|| self.0.decode(ids, true), || Error::input("the tokens cannot be decoded"))
    }

    /// What the tokens before `count` stand for, as the decoder has it inside of a text.
    pub fn bytes(&self, count: usize) -> TokenBytes {
        let [is_fallback, is_level, has_spaces] = ["ByteFallback", "ByteLevel", "▁"].map(|name| self.decodes(name));
        let has_spaces = has_spaces || self.decodes("Metaspace");
        let levels = is_level.then(byte_level);
        let added = self.0.get_added_tokens_decoder();
        let mut special: Vec<_> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        special.sort_unstable();
        let bytes = |id: u32| -> Vec<u8> {
            let Some(token) = self.0.id_to_token(id) else { return Vec::new() };
            if special.binary_search(&id).is_ok() {
                return token.into_bytes();
            }
            if let Some(byte) = Some(&token).filter(|_| is_fallback).and_then(|token| fallback_byte(token)) {
                return vec![byte];
            }
            let leveled = levels.as_ref().and_then(|levels| token.chars().map(|c| levels.get(&c).copied()).collect());
            leveled.unwrap_or_else(|| if has_spaces { token.replace('▁', " ") } else { token }.into_bytes())
        };
        let bytes = (0..u32::try_from(count).unwrap_or(u32::MAX)).map(bytes).collect();
        TokenBytes { bytes, special }
    }

    /// Whether the decoder has a part of this name.
    fn decodes(&self, name: &str) -> bool {
        serde_json::to_string(&self.0.get_decoder()).is_ok_and(|json| json.contains(name))
    }

    /// The tokens `<0x00>` to `<0xFF>`, where the decoder takes them for bytes.
    pub fn byte_ids(&self) -> Vec<u32> {
        let is_fallback = self.decodes("ByteFallback");
        let tokens =
            (0..=255).filter(|_| is_fallback).filter_map(|byte| self.0.token_to_id(&format!("<0x{byte:02X}>")));
        let mut ids: Vec<_> = tokens.collect();
        ids.sort_unstable();
        ids
    }
}

/// The byte of a token such as `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

/// The characters that byte-level tokenizers write bytes as: bytes that are printed stand for themselves, others for
/// what follows Latin-1, in order.
fn byte_level() -> HashMap<char, u8> {
    let is_printed = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=u8::MAX).filter(|byte| !is_printed(byte));
    let printed = (0..=u8::MAX).filter(is_printed).map(|byte| (char::from(byte), byte));
    printed.chain(('\u{100}'..).zip(others)).collect()
}

/// What `run` gives. It can fail, and on what was made to, panic: both are the fault of a file.
pub fn caught<T, E>(run: impl FnOnce() -> std::result::Result<T, E>, failed: impl Fn() -> Error) -> Result<T>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let result = catch_unwind(AssertUnwindSafe(run)).map_err(|_| failed())?;
    result.map_err(|e| failed().caused_by(e))
}
