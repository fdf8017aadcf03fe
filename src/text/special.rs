//! What the files beside tokenizer.json say of special tokens.
//!
//! As Transformers reads them: the tokens of tokenizer_config.json's `added_tokens_decoder`, or where it has none
//! those of added_tokens.json, and the named ones of tokenizer_config.json and special_tokens_map.json.

use std::collections::BTreeMap;
use std::path::Path;

use tokenizers::AddedToken;

use crate::bytes::{Bytes, MIB};
use crate::error::Result;
use crate::fs;
use crate::json::{Document, Node};

pub const CONFIG_FILE: &str = "tokenizer_config.json";
pub const MAP_FILE: &str = "special_tokens_map.json";
pub const ADDED_FILE: &str = "added_tokens.json";
const CAP: Bytes = Bytes(16 * MIB);
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Named tokens of classes of Transformers, where no file gives them.
const DEFAULTS: &[(&str, &[(&str, &str)])] = &[
    ("LlamaTokenizer", &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]),
    (
        "GemmaTokenizer",
        &[("bos_token", "<bos>"), ("eos_token", "<eos>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")],
    ),
    (
        "GPT2Tokenizer",
        &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")],
    ),
    (
        "Qwen2Tokenizer",
        &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")],
    ),
];

/// Special tokens by name, and the tokens that tokenizer.json may lack.
#[derive(Default)]
pub struct Special {
    pub named: BTreeMap<String, String>,
    pub added: Vec<AddedToken>,
    /// Tokens that are added where no other token has their text.
    pub mentioned: Vec<AddedToken>,
}

impl Special {
    /// Those of the files in `directory`.
    pub fn read(directory: &Path) -> Result<Self> {
        let config = document(directory, CONFIG_FILE)?;
        let mut special = Self::default();
        let mut added = BTreeMap::new();
        let mut has_decoder = false;
        if let Some(config) = &config {
            for member in config.root().members()? {
                match &*member.name {
                    "added_tokens_decoder" => {
                        has_decoder = true;
                        for token in member.value.members()? {
                            let id: u32 =
                                token.name.parse().map_err(|_| token.value.error("its key is no token's number"))?;
                            added.extend(token_of(token.value)?.map(|token| (id, token)));
                        }
                    }
                    name => special.name(name, member.value)?,
                }
            }
        }
        if !has_decoder {
            if let Some(map) = document(directory, MAP_FILE)? {
                for member in map.root().members()? {
                    special.name(&member.name, member.value)?;
                }
            }
            if let Some(file) = document(directory, ADDED_FILE)? {
                for member in file.root().members()? {
                    let id = u32::try_from(member.value.whole()?).map_err(|e| member.value.error(e))?;
                    added.insert(
                        id,
                        AddedToken::from(&*member.name, special.named.values().any(|s| *s == *member.name)),
                    );
                }
            }
        }
        special.added = added.into_values().collect();
        if let Some(config) = &config {
            special.name_defaults(config.root())?;
        }
        Ok(special)
    }

    /// Takes over `value` if `name` is that of a special token.
    fn name(&mut self, name: &str, value: Node) -> Result<()> {
        if NAMES.contains(&name)
            && let Some(token) = token_of(value)?
        {
            self.named.insert(name.to_owned(), token.content.clone());
            self.mentioned.push(AddedToken { special: true, ..token });
        } else if ["additional_special_tokens", "extra_special_tokens"].contains(&name) && value.is_list() {
            for token in value.elements()? {
                self.mentioned.extend(token_of(token)?.map(|token| AddedToken { special: true, ..token }));
            }
        }
        Ok(())
    }

    fn name_defaults(&mut self, config: Node) -> Result<()> {
        let members = config.members()?;
        let Some(class) = members.iter().find(|member| member.name == "tokenizer_class" && member.value.is_text())
        else {
            return Ok(());
        };
        let class = class.value.text()?;
        let tokens = DEFAULTS.iter().find(|(name, _)| *name == class.trim_end_matches("Fast"));
        for (name, text) in tokens.map_or(&[][..], |(_, tokens)| tokens) {
            // A file may say `null`: then there is none.
            if !members.iter().any(|member| member.name == *name) {
                self.named.entry((*name).to_owned()).or_insert_with(|| (*text).to_owned());
            }
        }
        Ok(())
    }
}

/// A JSON file of `directory`, if it is there.
pub fn document(directory: &Path, file: &str) -> Result<Option<Document>> {
    if !directory.join(file).exists() {
        return Ok(None);
    }
    let path = fs::confined(directory, file)?;
    Document::parse(path.display().to_string(), fs::read_capped(&path, CAP)?).map(Some)
}

/// A special token is a text, or an object whose `content` is, with how it is found in texts.
fn token_of(node: Node) -> Result<Option<AddedToken>> {
    if node.is_null() {
        return Ok(None);
    }
    if node.is_text() {
        return Ok(Some(AddedToken::from(node.text()?, true)));
    }
    let mut token = AddedToken::from("", false);
    let mut content = None;
    for member in node.members()? {
        match &*member.name {
            "content" => content = Some(member.value.text()?),
            "lstrip" => token.lstrip = member.value.truth()?,
            "normalized" => token.normalized = member.value.truth()?,
            "rstrip" => token.rstrip = member.value.truth()?,
            "single_word" => token.single_word = member.value.truth()?,
            "special" => token.special = member.value.truth()?,
            _ => {}
        }
    }
    Ok(content.map(|content| AddedToken { content, ..token }))
}
