//! Answers of a JSON schema.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::panic_utils::catch_unwind;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::Value;

use super::BadField;
use crate::error::{Error, Result};
use crate::generate::Constraint;
use crate::text::TokenBytes;

/// The longest schema, as JSON.
const MAX_SCHEMA_BYTES: usize = 64 << 10;
/// Symbols of a grammar.
const MAX_GRAMMAR_SIZE: usize = 200_000;
/// States of the automaton that finds its words, of 1 to 2 kB each.
const MAX_LEXER_STATES: usize = 50_000;
/// Steps for the first states.
const INITIAL_FUEL: u64 = 500_000;
/// Steps for a token's mask.
const STEP_FUEL: u64 = 200_000;
/// What may stand between the parts of a JSON text; without an end to it some models write nothing else.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,32}";
/// Begins the name of a token that is no text.
const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
/// The longest token that can be part of a grammar.
const MAX_TOKEN_BYTES: usize = 255;

/// Makes grammars for the tokens of a model.
pub struct Grammars {
    factory: ParserFactory,
    /// End-of-text tokens.
    ends: Arc<[u32]>,
}

impl Grammars {
    pub fn new(bytes: &TokenBytes, eos_token_ids: &[u32]) -> Result<Self> {
        let count = u32::try_from(bytes.count()).unwrap_or(u32::MAX);
        let ends: Vec<_> = eos_token_ids.iter().copied().filter(|id| *id < count).collect();
        let first = *ends.first().ok_or_else(|| Error::input("the model has no token that would end a JSON text"))?;
        let word = |id: u32| match bytes.of(id) {
            of if of.is_empty() || of.len() > MAX_TOKEN_BYTES => Vec::new(),
            name if bytes.is_special(id) || ends.contains(&id) => [&[MARK], name].concat(),
            text => text.to_vec(),
        };
        let words: Vec<_> = (0..count).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(count, first), &words).with_eos_tokens(&ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new_simple(&environment);
        let mut factory =
            factory.map_err(|e| Error::input("the tokenizer is none for grammars").caused_by(e.to_string()))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_grammar_size = MAX_GRAMMAR_SIZE;
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.initial_lexer_fuel = INITIAL_FUEL;
        limits.step_lexer_fuel = STEP_FUEL;
        limits.verbose_errors = false;
        Ok(Self { factory, ends: ends.into() })
    }

    /// The grammar of a JSON schema.
    pub fn compile(&self, schema: &Value) -> Result<Grammar> {
        let wrong =
            |why: String| BadField::error("response_format", format!("has a schema that cannot be kept to: {why}"));
        if !schema.is_object() {
            return Err(wrong("it is no object".to_owned()));
        }
        if schema.to_string().len() > MAX_SCHEMA_BYTES {
            return Err(wrong(format!("it is longer than {MAX_SCHEMA_BYTES} bytes")));
        }
        let mut schema = schema.clone();
        let options = JsonCompileOptions { whitespace_pattern: Some(WHITESPACE.to_owned()), ..Default::default() };
        options.apply_to(&mut schema);
        let make = || self.factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let parser = catch_unwind(AssertUnwindSafe(make));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(why) => Err(wrong(why)),
            None => Ok(Grammar { matcher, ends: Arc::clone(&self.ends) }),
        }
    }
}

/// What an answer may be, and where in it one is.
pub struct Grammar {
    matcher: Matcher,
    ends: Arc<[u32]>,
}

impl Grammar {
    /// The same for another answer.
    pub fn start(&self) -> Box<dyn Constraint> {
        Box::new(Self { matcher: self.matcher.deep_clone(), ends: Arc::clone(&self.ends) })
    }
}

impl Constraint for Grammar {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| broken(&e))?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= allowed.len() || !allowed.get(token) {
                *logit = f32::MIN;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        // Nothing stands behind the end.
        if self.ends.contains(&token) { Ok(()) } else { self.matcher.consume_token(token).map_err(|e| broken(&e)) }
    }
}

fn broken(why: &impl ToString) -> Error {
    Error::input("the schema of the answer cannot be kept to").caused_by(why.to_string())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::text::Tokenizer;

    fn ferris() -> (Tokenizer, Grammars) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ferris-7m");
        let tokenizer = Tokenizer::open(&directory, 4096).unwrap();
        let grammars = Grammars::new(&tokenizer.token_bytes().unwrap(), &[0]).unwrap();
        (tokenizer, grammars)
    }

    #[test]
    fn what_is_of_a_schema_may_come_and_nothing_else() {
        let (tokenizer, grammars) = ferris();
        let schema = json!({
            "type": "object",
            "properties": {"crab": {"type": "string"}, "legs": {"type": "integer"}},
            "required": ["crab", "legs"],
            "additionalProperties": false,
        });
        for (schema, text, is_right) in [
            (&schema, r#"{"crab": "Ferris 🦀", "legs": 10}"#, true),
            (&schema, "{\n  \"crab\": \"\", \"legs\": 0 }", true),
            (&schema, r#"{"crab": 1}"#, false),
            (&schema, r#"{"crab": "a"}"#, false),
            (&schema, r#"["crab"]"#, false),
            (&json!({"type": "object"}), r#"{"a": [1, null, {"b": "\"é"}]}"#, true),
            (&json!({"type": "object"}), "[]", false),
            (&json!({"enum": ["a", "b"]}), r#""b""#, true),
            (&json!({"enum": ["a", "b"]}), r#""c""#, false),
        ] {
            let mut constraint = grammars.compile(schema).unwrap().start();
            let mut ids = tokenizer.encode(text, false).unwrap();
            ids.push(0);
            let may_come = ids.into_iter().all(|id| {
                let mut logits = vec![0.0; 4096];
                constraint.mask(&mut logits).unwrap();
                logits[id as usize] == 0.0 && constraint.accept(id).is_ok()
            });
            assert_eq!(may_come, is_right, "{text}");
        }
    }

    #[test]
    fn schemas_that_cannot_be_kept_to_are_refused() {
        let (_, grammars) = ferris();
        let nested = (0..100).fold(json!({}), |inner, _| json!({"type": "array", "items": inner, "minItems": 1}));
        let parentheses = format!("{}a{}", "(".repeat(10_000), ")".repeat(10_000));
        for schema in [
            json!(true),
            json!({"type": "crab"}),
            json!({"$ref": "https://example.com/schema.json"}),
            json!({"$ref": "#/nowhere"}),
            json!({"type": "string", "pattern": "("}),
            json!({"type": "string", "pattern": parentheses}),
            json!({"enum": ["a".repeat(MAX_SCHEMA_BYTES)]}),
        ] {
            let error = grammars.compile(&schema).err().map(|error| error.to_string());
            let error = error.unwrap_or_else(|| panic!("{:.80} is taken", schema.to_string()));
            assert!(error.starts_with("`response_format` has a schema"), "{error}");
        }
        // Taken or refused, and no more than that.
        for schema in [nested, json!({"type": "string", "pattern": "(a{1,1000}){1,1000}b(c|d){1,100000}"})] {
            let _ = grammars.compile(&schema);
        }
    }
}
