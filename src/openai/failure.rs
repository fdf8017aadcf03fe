//! Errors in OpenAI's form.

use std::iter;

use serde_json::{Value, json};

use super::Lengthy;
use crate::error::{Error, ErrorKind};
use crate::generate::TooLong;

/// A member of a body that is not as it must be.
#[derive(Debug, thiserror::Error)]
#[error("{}{problem}", if param.is_empty() { String::new() } else { format!("`{param}` ") })]
pub struct BadField {
    /// Its path, such as `messages[0].role`; empty for the body itself.
    pub param: String,
    problem: String,
}

impl BadField {
    pub(super) fn error(param: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::input(Self { param: param.into(), problem: problem.into() })
    }
}

/// An error as a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The status of HTTP.
    pub status: u16,
    /// What went wrong, and what helps.
    pub message: String,
    /// The member of the body that it is about.
    pub param: Option<String>,
    /// What a program can tell it by.
    pub code: Option<&'static str>,
}

impl Failure {
    /// A status and what it is about.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// The object of an answer.
    pub fn to_json(&self) -> Value {
        let Self { status, message, param, code } = self;
        let kind = match status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let is_too_long = error.cause::<TooLong>().is_some() || error.cause::<Lengthy>().is_some();
        let param = error.cause::<BadField>().map(|field| field.param.clone()).filter(|param| !param.is_empty());
        let (status, code) = match error.kind() {
            ErrorKind::Busy => (429, Some("queue_full")),
            ErrorKind::Input | ErrorKind::Usage if is_too_long => (400, Some("context_length_exceeded")),
            ErrorKind::Input | ErrorKind::Usage => (400, None),
            ErrorKind::Interrupted => (503, None),
            _ => (500, None),
        };
        Self { status, message: told(error), param, code }
    }
}

/// An error, its causes and its hints in a line.
pub fn told(error: &Error) -> String {
    let causes = iter::successors(std::error::Error::source(error), |cause| cause.source()).map(ToString::to_string);
    let parts: Vec<_> = iter::once(error.to_string()).chain(causes).collect();
    let hints = error.hints().iter().map(ToString::to_string);
    iter::once(parts.join(": ")).chain(hints).collect::<Vec<_>>().join("; ")
}
