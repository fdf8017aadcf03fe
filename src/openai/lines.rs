//! Lines of a batch: what each asks for, and what is written of its answer.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::failure::{BadField, Failure};
use super::{Form, fresh};
use crate::error::{Error, Result};

/// The longest name that a line may have, in bytes.
const MAX_NAME: usize = 1024;

/// What a line of a batch asks for.
#[derive(Debug)]
pub struct Line {
    /// What it is called: as it says itself, or its number.
    pub custom_id: String,
    /// What the body is.
    pub form: Form,
    /// As it would be sent to a server.
    pub body: Vec<u8>,
}

/// A line in the form of OpenAI's batches, or a body with or without a name.
#[derive(Deserialize)]
struct Members<'a> {
    custom_id: Option<Value>,
    method: Option<Value>,
    url: Option<Value>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
}

impl Line {
    /// Reads the line with a number, counted from 1: in the form of OpenAI's batches, or a body by itself.
    ///
    /// # Errors
    /// It is not as it must be, which comes with what the line is called.
    pub fn parse(number: u64, line: &[u8]) -> Result<Self, (String, Error)> {
        let members: Members = serde_json::from_slice(line).map_err(|error| (number.to_string(), not_json(&error)))?;
        let custom_id = match &members.custom_id {
            None | Some(Value::Null) => number.to_string(),
            Some(Value::String(name)) if !name.is_empty() && name.len() <= MAX_NAME => name.clone(),
            Some(_) => {
                let problem = format!("is not a text of 1 to {MAX_NAME} bytes");
                return Err((number.to_string(), BadField::error("custom_id", problem)));
            }
        };
        match members.wanted(line) {
            Ok((form, body)) => Ok(Self { custom_id, form, body }),
            Err(error) => Err((custom_id, error)),
        }
    }

    /// A line that is a prompt itself, to be gone on with or, in a conversation, to be answered.
    pub fn of_prompt(number: u64, prompt: &str, form: Form) -> Self {
        let body = match form {
            Form::Text => json!({"prompt": prompt}),
            Form::Chat => json!({"messages": [{"role": "user", "content": prompt}]}),
        };
        Self { custom_id: number.to_string(), form, body: body.to_string().into_bytes() }
    }
}

impl Members<'_> {
    fn wanted(&self, line: &[u8]) -> Result<(Form, Vec<u8>)> {
        if let Some(method) = self.method.as_ref().filter(|method| *method != "POST") {
            return Err(BadField::error("method", format!("is {method}, and only \"POST\" is done")));
        }
        let by_url = self.url.as_ref().map(form_of).transpose()?;
        if let Some(body) = self.body {
            let form = by_url.ok_or_else(|| BadField::error("url", "is missing, which says what `body` is"))?;
            return Ok((form, body.get().as_bytes().to_vec()));
        }
        let form = match (self.messages, self.prompt) {
            (Some(_), None) => Form::Chat,
            (None, Some(_)) => Form::Text,
            (Some(_), Some(_)) => return Err(BadField::error("", "the line has both `messages` and `prompt`")),
            (None, None) => return Err(BadField::error("", "the line has neither `body` nor `prompt` nor `messages`")),
        };
        Ok((by_url.unwrap_or(form), line.to_vec()))
    }
}

fn form_of(url: &Value) -> Result<Form> {
    match url.as_str() {
        Some("/v1/chat/completions") => Ok(Form::Chat),
        Some("/v1/completions") => Ok(Form::Text),
        _ => {
            Err(BadField::error("url", format!("is {url}, and only /v1/chat/completions and /v1/completions are done")))
        }
    }
}

fn not_json(error: &serde_json::Error) -> Error {
    BadField::error("", format!("the line is no JSON object of a request: {error}"))
}

/// What is written of a line that was answered.
pub fn answered(custom_id: &str, body: &Value) -> Value {
    record(custom_id, 200, body)
}

/// What is written of a line that failed.
pub fn failed(custom_id: &str, failure: &Failure) -> Value {
    record(custom_id, failure.status, &failure.to_json())
}

fn record(custom_id: &str, status: u16, body: &Value) -> Value {
    let id = format!("{:016x}", fresh());
    let response = json!({"status_code": status, "request_id": format!("req_{id}"), "body": body});
    json!({"id": format!("batch_req_{id}"), "custom_id": custom_id, "response": response, "error": null})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_lines() {
        for (line, custom_id, form, body) in [
            (
                r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}"#,
                "a",
                Form::Text,
                r#"{"prompt":"x"}"#,
            ),
            (r#"{"url":"/v1/chat/completions","body":{"messages":[]}}"#, "7", Form::Chat, r#"{"messages":[]}"#),
            (r#"{"prompt": "x", "max_tokens": 3}"#, "7", Form::Text, r#"{"prompt": "x", "max_tokens": 3}"#),
            (r#"{"custom_id": "b", "messages": []}"#, "b", Form::Chat, r#"{"custom_id": "b", "messages": []}"#),
        ] {
            let read = Line::parse(7, line.as_bytes()).unwrap();
            assert_eq!((&*read.custom_id, read.form, &*read.body), (custom_id, form, body.as_bytes()), "{line}");
        }
    }

    #[test]
    fn what_is_no_line_is_named() {
        for (line, custom_id, problem) in [
            ("", "7", "no JSON object"),
            ("[1]", "7", "no JSON object"),
            (r#"{"prompt":"x""#, "7", "no JSON object"),
            (r#"{"custom_id":5,"prompt":"x"}"#, "7", "`custom_id` is not a text"),
            (r#"{"custom_id":"a"}"#, "a", "neither `body` nor `prompt`"),
            (r#"{"custom_id":"a","body":{}}"#, "a", "`url` is missing"),
            (r#"{"custom_id":"a","url":"/v1/embeddings","body":{}}"#, "a", "`url` is \"/v1/embeddings\""),
            (r#"{"custom_id":"a","method":"GET","prompt":"x"}"#, "a", "`method` is \"GET\""),
            (r#"{"messages":[],"prompt":"x"}"#, "7", "both `messages` and `prompt`"),
        ] {
            let (name, error) = Line::parse(7, line.as_bytes()).unwrap_err();
            assert!(name == custom_id && error.to_string().contains(problem), "{line}: {name}: {error}");
        }
    }
}
