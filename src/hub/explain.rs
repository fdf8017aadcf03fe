//! What went wrong between here and the Hub, in words that help.

use std::path::Path;

use hf_hub::HFError;

use super::HubOptions;
use super::link::{Failure, Link, is_json_error};
use crate::error::{Error, printable};

impl Link {
    /// The failure of a request for `file`, or about the repository.
    pub(super) fn explain(&self, failure: Failure, file: Option<&str>) -> Error {
        const NETWORK: &str = "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what is in the cache";
        const PORTAL: &str = "a login page of the network or a proxy may have answered; open the address in a browser";
        let Self { options: HubOptions { endpoint, cache, .. }, id, revision, .. } = self;
        let place = match file {
            Some(file) => format!("`{}` of `{id}@{revision}`", printable(file)),
            None => format!("`{id}@{revision}`"),
        };
        let broken = || Error::input(format!("{endpoint} did not send {place} as the Hub sends it")).hint(PORTAL);
        match failure {
            Failure::Hub(HFError::Request { source, .. }) => if is_json_error(&source) {
                broken()
            } else if source.is_connect() || source.is_timeout() {
                Error::input(format!("cannot reach {endpoint}")).hint(NETWORK)
            } else {
                Error::input(format!("the connection to {endpoint} broke while it sent {place}"))
                    .hint("run the command again; files that are whole are not downloaded again")
            }
            .caused_by(source.without_url()),
            Failure::Hub(HFError::MalformedResponse { what, .. }) => broken().caused_by(printable(&what)),
            Failure::Hub(HFError::Io(source)) => Error::io("write to the cache", cache, source),
            Failure::Hub(HFError::CacheLockTimeout { path }) => lock_held(&path),
            Failure::Hub(error) => match answer(&error) {
                Some(answer) => self.explain_answer(answer, &place, file, &error),
                None => Error::input(format!("cannot read {place}")).caused_by(printable(&error.to_string())),
            },
            Failure::Crashed => Error::input(format!("cannot read {place}")).caused_by("the Hub client failed"),
            Failure::Silent(silence) => {
                let seconds = silence.as_secs_f64();
                Error::input(format!("{endpoint} sent nothing for {seconds:.0} s, asked for {place}")).hint(NETWORK)
            }
            Failure::Stopped => Error::interrupted(),
            Failure::TooMuch(limit) => Error::input(format!(
                "{endpoint} sent more of {place} than the {limit} bytes asked for"
            ))
            .hint(format!(
                "a proxy or a mirror may have changed it, or not know range requests: hf download {id} --revision {revision}"
            )),
            Failure::WrongSize { got, size } => Error::input(format!("{place} came as {got} bytes instead of {size}"))
                .hint("a proxy or a mirror may have changed or cut it; run the command again"),
            Failure::OtherCommit => {
                Error::input(format!("{endpoint} sent {place} from another commit")).hint("run the command again")
            }
            Failure::Lacks(what) => broken().caused_by(format!("{what} is missing")),
        }
    }

    fn explain_answer(&self, answer: Refusal, place: &str, file: Option<&str>, error: &HFError) -> Error {
        const TOKEN: &str = "set HF_TOKEN to the token of an account that may read it";
        let Self { options: HubOptions { endpoint, token, .. }, id, revision, .. } = self;
        let page = format!("{endpoint}/{id}");
        let without_token = |error: Error, hint: &str| if token.is_some() { error } else { error.hint(hint) };
        let error = match (answer.status, answer.code.as_deref()) {
            (_, Some("GatedRepo")) => {
                let gated = Error::input(format!("`{id}` is gated, and access has not been granted"));
                without_token(gated.hint(format!("request access at {page}")), TOKEN)
            }
            (401 | 404, Some("RepoNotFound")) => {
                Error::input(format!("repository `{id}` is not at {endpoint}, or is private"))
                    .hint(format!("check the name at {page}"))
                    .hint(TOKEN)
            }
            (401, _) if token.is_some() => Error::input(format!("{endpoint} refused the token, asked for {place}"))
                .hint("`hf auth login` stores a valid token; HF_TOKEN, where it is set, comes before it"),
            (401, _) => Error::input(format!("{place} is not there, or may not be read without a token"))
                .hint(format!("check the name at {page}"))
                .hint(TOKEN),
            (403, _) => Error::input(format!("{endpoint} denies access to {place}")).hint(TOKEN),
            (404, Some("RevisionNotFound")) => Error::input(format!("repository `{id}` has no revision `{revision}`"))
                .hint(format!("its branches and tags: {page}/tree/main")),
            (404, _) if file.is_some() => {
                Error::input(format!("{place} is not there")).hint(format!("its files: {page}/tree/{revision}"))
            }
            (404, _) => Error::input(format!("{place} is not at {endpoint}")).hint(format!("check the name at {page}")),
            (429, _) => {
                let mut limited = Error::input(format!("{endpoint} has had too many requests, asked for {place}"));
                if let HFError::RateLimited { retry_after: Some(wait), .. } = error {
                    limited = limited.hint(format!("it takes the next one in {} s", wait.as_secs()));
                }
                without_token(limited, "set HF_TOKEN: an account may ask more often than a stranger")
            }
            (500.., _) => Error::input(format!("{endpoint} failed, asked for {place}"))
                .hint("try again later; https://status.huggingface.co says whether the Hub is up"),
            _ => Error::input(format!("{endpoint} did not give {place}")),
        };
        error.caused_by(answer)
    }
}

/// What the Hub answered instead of what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the Hub answered {shown}")]
pub struct Refusal {
    /// The status of the answer, such as 404.
    pub status: u16,
    /// The Hub's own word for the reason, such as `GatedRepo`.
    pub code: Option<String>,
    /// Status and message.
    shown: String,
}

fn answer(error: &HFError) -> Option<Refusal> {
    let context = match error {
        HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::Conflict { context }
        | HFError::RateLimited { context, .. }
        | HFError::Http { context } => Some(context),
        HFError::RepoNotFound { context, .. }
        | HFError::RevisionNotFound { context, .. }
        | HFError::EntryNotFound { context, .. } => context.as_ref(),
        _ => return None,
    };
    let Some(context) = context else {
        return Some(Refusal { status: 404, code: None, shown: "404 Not Found".to_owned() });
    };
    let message = context.server_message.as_ref().map_or(String::new(), |message| format!(": {}", printable(message)));
    let (status, code) = (context.status, context.error_code.clone());
    Some(Refusal { status: status.as_u16(), code, shown: format!("{status}{message}") })
}

pub(super) fn lock_held(path: &Path) -> Error {
    Error::input(format!("another process has held `{}` for too long", path.display()))
        .hint("wait until its download ends, or end it")
}
