//! What stands before an answer: texts or tokens, and what was said.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::BadField;
use crate::error::Result;
use crate::text::Message;

/// A prompt that a template has no part in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A prompt, or a list of such.
#[derive(Debug, PartialEq, Eq)]
pub struct Prompts(pub Vec<Prompt>);

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Prompting)
    }
}

struct Prompting;

impl<'de> Visitor<'de> for Prompting {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a list of tokens, or a list of these")
    }

    fn visit_str<E>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Prompts, A::Error> {
        match elements.next_element()? {
            None => Err(A::Error::custom("an empty list, where a prompt is expected")),
            Some(Element::Token(first)) => {
                let mut tokens = vec![first];
                while let Some(token) = elements.next_element()? {
                    tokens.push(token);
                }
                Ok(Prompts(vec![Prompt::Tokens(tokens)]))
            }
            Some(Element::Prompt(first)) => {
                let mut prompts = vec![first];
                while let Some(element) = elements.next_element()? {
                    match element {
                        Element::Prompt(prompt) => prompts.push(prompt),
                        Element::Token(_) => return Err(A::Error::custom("a token, where a prompt is expected")),
                    }
                }
                Ok(Prompts(prompts))
            }
        }
    }
}

/// An element of a list that is a prompt, or a list of such.
enum Element {
    Token(u32),
    Prompt(Prompt),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements;
        impl<'de> Visitor<'de> for Elements {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a token, or a list of tokens")
            }

            fn visit_u64<E: serde::de::Error>(self, token: u64) -> Result<Element, E> {
                u32::try_from(token).map(Element::Token).map_err(E::custom)
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Prompt(Prompt::Text(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = elements.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Prompt(Prompt::Tokens(tokens)))
            }
        }
        deserializer.deserialize_any(Elements)
    }
}

/// Who speaks.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Role {
    Assistant,
    Developer,
    System,
    Tool,
    User,
}

/// A message as a body has it.
#[derive(Deserialize)]
pub struct Said {
    role: Role,
    content: Option<Content>,
    name: Option<String>,
    reasoning_content: Option<String>,
    tool_call_id: Option<String>,
    tool_calls: Option<Vec<Map<String, Value>>>,
    audio: Option<IgnoredAny>,
    function_call: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "is neither a text nor a list of parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl Said {
    /// As a template takes it; `at` is its place among the messages.
    pub fn message(self, at: usize) -> Result<Message> {
        let field = |name: &str| format!("messages[{at}].{name}");
        for (name, is_there) in [("audio", self.audio.is_some()), ("function_call", self.function_call.is_some())] {
            if is_there {
                return Err(BadField::error(field(name), "is not supported"));
            }
        }
        let content = self.content.map(|content| content.text(at)).transpose()?;
        if content.is_none() && self.role != Role::Assistant {
            return Err(BadField::error(field("content"), "is missing"));
        }
        let mut more = Map::new();
        let texts =
            [("name", self.name), ("reasoning_content", self.reasoning_content), ("tool_call_id", self.tool_call_id)];
        more.extend(texts.into_iter().filter_map(|(name, text)| Some((name.to_owned(), Value::String(text?)))));
        if let Some(calls) = self.tool_calls.filter(|calls| !calls.is_empty()) {
            more.insert("tool_calls".to_owned(), calls.into_iter().map(with_arguments).collect());
        }
        let role = match self.role {
            Role::Assistant => "assistant",
            // The name that templates know.
            Role::Developer | Role::System => "system",
            Role::Tool => "tool",
            Role::User => "user",
        };
        Ok(Message { role: role.to_owned(), content, more })
    }
}

impl Content {
    fn text(self, at: usize) -> Result<String> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let text = |(part, Part { kind, text }): (usize, Part)| {
            let field = |name: &str| format!("messages[{at}].content[{part}].{name}");
            if kind != "text" {
                return Err(BadField::error(field("type"), "is not `text`, which is all that is supported"));
            }
            text.ok_or_else(|| BadField::error(field("text"), "is missing"))
        };
        Ok(parts.into_iter().enumerate().map(text).collect::<Result<Vec<_>>>()?.join("\n"))
    }
}

/// A call whose arguments are an object, as templates take them, where they are the text of one.
fn with_arguments(mut call: Map<String, Value>) -> Value {
    if let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments"))
        && let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str::<Map<_, _>>(text).ok())
    {
        *arguments = Value::Object(object);
    }
    Value::Object(call)
}
