//! What went wrong between here and the Hub, in words that help.

use std::path::Path;
use std::time::Duration;

use super::link::Link;
use super::options::HubOptions;
use super::wire::{Failure, Refusal};
use crate::error::{Error, printable};

impl Link {
    /// The failure of a request for `file`, or about the repository.
    pub(super) fn explain(&self, failure: Failure, file: Option<&str>) -> Error {
        const NETWORK: &str = "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what is in the cache";
        const PORTAL: &str = "a login page of the network or a proxy may have answered; open the address in a browser";
        let Self { options: HubOptions { endpoint, .. }, id, revision, .. } = self;
        let place = match file {
            Some(file) => format!("`{}` of `{id}@{revision}`", printable(file)),
            None => format!("`{id}@{revision}`"),
        };
        let broken = || Error::input(format!("{endpoint} did not send {place} as the Hub sends it")).hint(PORTAL);
        match failure {
            Failure::Unreachable(source) => {
                Error::input(format!("cannot reach {endpoint}")).hint(NETWORK).caused_by(printable(&source.to_string()))
            }
            Failure::Broken(source) => {
                Error::input(format!("the connection to {endpoint} broke while it sent {place}"))
                    .hint("run the command again; it goes on where this one ended")
                    .caused_by(printable(&source.to_string()))
            }
            Failure::Refused(refusal, wait) => self.explain_refusal(refusal, wait, &place, file),
            Failure::NotJson(source) => broken().caused_by(printable(&source.to_string())),
            Failure::Local(error) => error,
            Failure::Silent(silence) => {
                let seconds = silence.as_secs_f64();
                Error::input(format!("{endpoint} sent nothing for {seconds:.0} s, asked for {place}")).hint(NETWORK)
            }
            Failure::Slow(window) => {
                let seconds = window.as_secs_f64();
                Error::input(format!("{endpoint} sent {place} at less than 1 KiB/s for {seconds:.0} s")).hint(NETWORK)
            }
            Failure::Stopped => Error::interrupted(),
            Failure::Redirect(why) => Error::input(format!("{endpoint} sends us elsewhere for {place}, which is not followed"))
                .caused_by(why)
                .hint("check HF_ENDPOINT"),
            Failure::TooMuch(limit) => Error::input(format!(
                "{endpoint} sent more of {place} than the {limit} bytes asked for"
            ))
            .hint(format!(
                "a proxy or a mirror may have changed it, or not know range requests: hf download {id} --revision {revision}"
            )),
            Failure::WrongSize { got, size } => Error::input(format!("{place} came as {got} bytes instead of {size}"))
                .hint("a proxy or a mirror may have changed or cut it; run the command again"),
            Failure::WrongRange => Error::input(format!("{endpoint} sent another part of {place} than was asked for"))
                .hint("a proxy or a mirror may not know range requests"),
            Failure::WrongContent => {
                Error::input(format!("{place} came with other bytes than its SHA-256 says"))
                    .hint("a proxy or a mirror may have changed it; HF_ENDPOINT names another")
            }
            Failure::OtherCommit => {
                Error::input(format!("{endpoint} sent {place} from another commit")).hint("run the command again")
            }
            Failure::Lacks(what) => broken().caused_by(format!("{what} is missing")),
        }
    }

    fn explain_refusal(&self, answer: Refusal, wait: Option<Duration>, place: &str, file: Option<&str>) -> Error {
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
                if let Some(wait) = wait {
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

pub(super) fn lock_held(path: &Path) -> Error {
    Error::input(format!("another process has held `{}` for too long", path.display()))
        .hint("wait until its download ends, or end it")
}
