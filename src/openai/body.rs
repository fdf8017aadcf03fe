//! Bodies of requests, parsed and checked. Members that nobody here knows are left out, as far as they change no
//! answer.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Value, json};

use super::prompt::{Prompt, Prompts, Said};
use super::{BadField, Form};
use crate::error::Result;
use crate::generate::Sampling;
use crate::text::Message;

/// Choices of a body, all prompts together.
const MAX_CHOICES: usize = 256;
/// Stop texts, and the bytes of one.
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 1024;
/// The likeliest tokens of which a body has the log probabilities.
const MAX_LOGPROBS: usize = 20;
/// New tokens of a completion for which neither the body nor the model has a number.
const COMPLETION_TOKENS: usize = 16;

/// A body of either form.
pub struct Body {
    pub subject: Subject,
    pub stream: bool,
    pub include_usage: bool,
    pub n: usize,
    pub max_tokens: Option<usize>,
    /// Where neither the body nor the model says it; what the context leaves if this does not either.
    pub usual_tokens: Option<usize>,
    pub logprobs: Option<usize>,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    /// A JSON schema that the answer is to be of.
    pub schema: Option<Value>,
    common: Common,
}

/// What is to be answered.
pub enum Subject {
    Chat { messages: Vec<Message>, tools: Vec<Value> },
    Prompts(Vec<Prompt>),
}

/// What both forms have.
#[derive(Deserialize)]
struct Common {
    ignore_eos: Option<bool>,
    max_completion_tokens: Option<usize>,
    max_tokens: Option<usize>,
    min_p: Option<f64>,
    n: Option<usize>,
    repetition_penalty: Option<f32>,
    response_format: Option<Format>,
    seed: Option<i64>,
    stop: Option<Stops>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    temperature: Option<f64>,
    top_k: Option<i64>,
    top_p: Option<f64>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Said>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
}

#[derive(Deserialize)]
struct Completion {
    prompt: Prompts,
    logprobs: Option<usize>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "is neither a text nor a list of texts")]
enum Stops {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Format {
    Text,
    JsonObject,
    JsonSchema { json_schema: Schema },
}

#[derive(Deserialize)]
struct Schema {
    schema: Option<Value>,
}

impl Body {
    pub fn parse(form: Form, bytes: &[u8]) -> Result<Self> {
        if let Undone(Some(member)) = parse(bytes)? {
            return Err(BadField::error(member, "is not supported, and would change the answer"));
        }
        let common: Common = parse(bytes)?;
        let (subject, logprobs) = match form {
            Form::Chat => chat(parse(bytes)?)?,
            Form::Text => {
                let Completion { prompt, logprobs } = parse(bytes)?;
                (Subject::Prompts(prompt.0), logprobs)
            }
        };
        let max_tokens = common.max_completion_tokens.or(common.max_tokens);
        if max_tokens == Some(0) {
            return Err(BadField::error("max_tokens", "is 0; 1 is the least"));
        }
        let prompts = if let Subject::Prompts(prompts) = &subject { prompts.len() } else { 1 };
        let n = common.n.unwrap_or(1);
        if n == 0 || n.checked_mul(prompts).is_none_or(|choices| choices > MAX_CHOICES) {
            let problem = format!("is {n} for {prompts} prompts; from 1 to {MAX_CHOICES} choices are given in all");
            return Err(BadField::error("n", problem));
        }
        if logprobs.is_some_and(|count| count > MAX_LOGPROBS) {
            let name = if form == Form::Chat { "top_logprobs" } else { "logprobs" };
            return Err(BadField::error(name, format!("is more than {MAX_LOGPROBS}")));
        }
        let schema = match &common.response_format {
            None | Some(Format::Text) => None,
            Some(Format::JsonObject) => Some(json!({"type": "object"})),
            Some(Format::JsonSchema { json_schema }) => Some(json_schema.schema.clone().unwrap_or_else(|| json!({}))),
        };
        Ok(Self {
            subject,
            stream: common.stream.unwrap_or(false),
            include_usage: common.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false),
            n,
            max_tokens,
            usual_tokens: (form == Form::Text).then_some(COMPLETION_TOKENS),
            logprobs,
            seed: common.seed.map(i64::cast_unsigned),
            stop: stops(common.stop.as_ref())?,
            ignore_eos: common.ignore_eos.unwrap_or(false),
            schema,
            common,
        })
    }

    /// What the body says, and of the rest what `other` has.
    pub fn sampling(&self, other: &Sampling) -> Sampling {
        let Common { temperature, top_k, top_p, min_p, repetition_penalty, .. } = &self.common;
        Sampling {
            temperature: temperature.unwrap_or(other.temperature),
            // All tokens, as 0 and -1 say.
            top_k: top_k.map_or(other.top_k, |k| usize::try_from(k).ok().filter(|k| *k > 0)),
            top_p: top_p.or(other.top_p),
            min_p: min_p.or(other.min_p),
            repetition_penalty: repetition_penalty.unwrap_or(other.repetition_penalty),
            seed: 0,
        }
    }
}

fn chat(chat: Chat) -> Result<(Subject, Option<usize>)> {
    if chat.messages.is_empty() {
        return Err(BadField::error("messages", "is empty"));
    }
    let messages = chat.messages.into_iter().enumerate().map(|(at, said)| said.message(at));
    let messages = messages.collect::<Result<_>>()?;
    let is_none = match chat.tool_choice.as_ref().map(Value::as_str) {
        None | Some(Some("auto")) => false,
        Some(Some("none")) => true,
        _ if chat.tool_choice == Some(Value::Null) => false,
        _ => {
            return Err(BadField::error(
                "tool_choice",
                "is neither `auto` nor `none`, which are all that is supported",
            ));
        }
    };
    let tools = chat.tools.filter(|_| !is_none).unwrap_or_default();
    let logprobs = match (chat.logprobs.unwrap_or(false), chat.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(BadField::error("top_logprobs", "needs `logprobs` to be true")),
    };
    Ok((Subject::Chat { messages, tools }, logprobs))
}

fn stops(stops: Option<&Stops>) -> Result<Vec<String>> {
    let stops = match stops {
        None => &[][..],
        Some(Stops::One(stop)) => std::slice::from_ref(stop),
        Some(Stops::More(stops)) => stops,
    };
    if stops.len() > MAX_STOPS || stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        let problem = format!("has more than {MAX_STOPS} texts, or one of more than {MAX_STOP_BYTES} bytes");
        return Err(BadField::error("stop", problem));
    }
    Ok(stops.to_vec())
}

/// A part of the body; an error names the member that is wrong.
fn parse<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
        let (path, problem) = (e.path().to_string(), e.inner().to_string());
        match e.inner().classify() {
            Category::Data if path == "." => BadField::error("", format!("the body is wrong: {problem}")),
            Category::Data if problem.starts_with("is ") => BadField::error(path, problem),
            Category::Data => BadField::error(path, format!("is wrong: {problem}")),
            _ => BadField::error("", format!("the body is not JSON: {problem}")),
        }
    })?;
    deserializer.end().map_err(|e| BadField::error("", format!("the body is not JSON: {e}")))?;
    Ok(parsed)
}

/// The first member that would change the answer and is not done.
struct Undone(Option<&'static str>);

impl Undone {
    /// Members, and what they may be beside nothing at all.
    fn members() -> [(&'static str, Value); 31] {
        let nothing = Value::Null;
        [
            ("add_generation_prompt", json!(true)),
            ("allowed_token_ids", nothing.clone()),
            ("audio", nothing.clone()),
            ("bad_words", nothing.clone()),
            ("best_of", json!(1)),
            ("chat_template", nothing.clone()),
            ("chat_template_kwargs", nothing.clone()),
            ("continue_final_message", nothing.clone()),
            ("echo", nothing.clone()),
            ("frequency_penalty", nothing.clone()),
            ("function_call", json!("none")),
            ("functions", nothing.clone()),
            ("guided_choice", nothing.clone()),
            ("guided_grammar", nothing.clone()),
            ("guided_json", nothing.clone()),
            ("guided_regex", nothing.clone()),
            ("include_stop_str_in_output", nothing.clone()),
            ("length_penalty", json!(1)),
            ("logit_bias", nothing.clone()),
            ("min_tokens", nothing.clone()),
            ("modalities", json!(["text"])),
            ("presence_penalty", nothing.clone()),
            ("prompt_logprobs", nothing.clone()),
            ("reasoning_effort", nothing.clone()),
            ("skip_special_tokens", json!(true)),
            ("stop_token_ids", nothing.clone()),
            ("structured_outputs", nothing.clone()),
            ("suffix", nothing.clone()),
            ("truncate_prompt_tokens", nothing.clone()),
            ("use_beam_search", nothing.clone()),
            ("web_search_options", nothing),
        ]
    }

    fn asks(value: &Value, usual: &Value) -> bool {
        match value {
            Value::Null => false,
            Value::Bool(is) => *is != usual.as_bool().unwrap_or(false),
            Value::Number(number) => number.as_f64() != usual.as_f64().or(Some(0.0)),
            Value::String(text) => !text.is_empty() && value != usual,
            Value::Array(elements) => !elements.is_empty() && value != usual,
            Value::Object(members) => !members.is_empty(),
        }
    }
}

impl<'de> Deserialize<'de> for Undone {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Undone;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Undone, A::Error> {
                let members = Undone::members();
                let mut first = None;
                while let Some(name) = map.next_key::<String>()? {
                    if let Some((member, usual)) = members.iter().find(|(member, _)| *member == name) {
                        let is_asked = Undone::asks(&map.next_value()?, usual);
                        first = first.or(is_asked.then_some(*member));
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Undone(first))
            }
        }
        deserializer.deserialize_map(Members)
    }
}
