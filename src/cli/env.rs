//! Every environment variable that has an effect, but those of proxies and of
//! certificates, which the HTTP client reads.
//!
//! | variable | effect |
//! | --- | --- |
//! | `HF_HOME`, `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `XDG_CACHE_HOME` | where the Hub's cache is |
//! | `XDG_CACHE_HOME` | where measured errors, compiled kernels and which GPUs were verified are kept |
//! | `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_DISABLE_IMPLICIT_TOKEN` | the token for the Hub |
//! | `HF_ENDPOINT` | the Hub's address |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | only the cache is used |
//! | `HF_HUB_DISABLE_PROGRESS_BARS` | no bars |
//! | `CUDA_VISIBLE_DEVICES` | the GPUs that the driver shows; `devices` names it |
//! | `EVENKEEL_API_KEY` | what clients of `serve` have to know |
//! | `NO_COLOR`, `CLICOLOR_FORCE`, `TERM` | colour |
//! | `TMPDIR` | where weights on the disk go |
//! | `TZ` | the zone of a chat template's `strftime_now` |

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use evenkeel::SCRATCH_DIRECTORY;

/// The variables that are set, and not empty.
pub struct Environment(HashMap<String, String>);

impl Environment {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    pub fn of_process() -> Self {
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self(std::env::vars_os().filter_map(text).filter(|(_, value)| !value.is_empty()).collect())
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    /// Whether a switch is on, as Hugging Face reads it.
    fn is_on(&self, name: &str) -> bool {
        self.text(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
    }

    /// Where weights on the disk go: `flag`, else a directory for large temporary files.
    pub fn offload_directory(&self, flag: Option<&Path>) -> PathBuf {
        flag.map(Path::to_owned).or_else(|| self.path("TMPDIR")).unwrap_or_else(|| SCRATCH_DIRECTORY.into())
    }

    /// The directory of all caches.
    fn caches(&self) -> Option<PathBuf> {
        self.path("XDG_CACHE_HOME").or_else(|| Some(self.path("HOME")?.join(".cache")))
    }

    /// Where measured errors are kept; nowhere without a home.
    pub fn cache_directory(&self) -> Option<PathBuf> {
        Some(self.caches()?.join("evenkeel"))
    }

    /// Where compiled kernels are kept.
    pub fn kernel_cache(&self) -> Option<PathBuf> {
        Some(self.cache_directory()?.join("kernels"))
    }

    /// Where it is kept which GPUs were verified.
    pub fn verified(&self) -> Option<PathBuf> {
        Some(self.cache_directory()?.join("verified"))
    }

    /// The GPUs that the driver was told to show.
    pub fn visible_gpus(&self) -> Option<&str> {
        self.text("CUDA_VISIBLE_DEVICES")
    }

    /// What clients of a server have to know.
    #[cfg(feature = "serve")]
    pub fn api_key(&self) -> Option<&str> {
        self.text("EVENKEEL_API_KEY")
    }

    /// Whether messages are coloured: by the environment's wish, else on a terminal.
    pub fn color(&self, is_terminal: bool) -> bool {
        if self.text("NO_COLOR").is_some() || self.text("TERM") == Some("dumb") {
            return false;
        }
        self.text("CLICOLOR_FORCE").is_some_and(|value| value != "0") || is_terminal
    }

    pub fn progress(&self) -> bool {
        !self.is_on("HF_HUB_DISABLE_PROGRESS_BARS") && self.text("TERM") != Some("dumb")
    }
}

#[cfg(feature = "hub")]
mod hub {
    use evenkeel::Result;
    use evenkeel::hub::{ENDPOINT, HubOptions, Token};
    use evenkeel::{Bytes, KIB};

    use super::{Environment, Path};

    const TOKEN_CAP: Bytes = Bytes(64 * KIB);

    impl Environment {
        pub fn hub(&self) -> Result<HubOptions> {
            let home = self.path("HF_HOME");
            let home = home.unwrap_or_else(|| self.caches().unwrap_or_else(|| ".cache".into()).join("huggingface"));
            let cache = self.path("HF_HUB_CACHE").or_else(|| self.path("HUGGINGFACE_HUB_CACHE"));
            let endpoint = self.text("HF_ENDPOINT").unwrap_or(ENDPOINT).trim_end_matches('/');
            Ok(HubOptions {
                endpoint: endpoint.to_owned(),
                token: self.token(&home)?,
                offline: self.is_on("HF_HUB_OFFLINE") || self.is_on("TRANSFORMERS_OFFLINE"),
                ..HubOptions::new(cache.unwrap_or_else(|| home.join("hub")))
            })
        }

        fn token(&self, home: &Path) -> Result<Option<Token>> {
            if self.is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
                return Ok(None);
            }
            if let Some(token) = self.text("HF_TOKEN").or_else(|| self.text("HUGGING_FACE_HUB_TOKEN")) {
                return Token::new(token.trim()).map(Some);
            }
            let path = self.path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            if !path.exists() {
                return Ok(None);
            }
            let bytes = evenkeel::read_capped(&path, TOKEN_CAP)?;
            let token = String::from_utf8_lossy(&bytes).trim().to_owned();
            if token.is_empty() { Ok(None) } else { Token::new(&token).map(Some) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn colour_is_a_wish_then_a_terminal() {
        for (variables, terminal, color) in [
            (&[][..], true, true),
            (&[], false, false),
            (&[("NO_COLOR", "1")], true, false),
            (&[("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1")], true, false),
            (&[("CLICOLOR_FORCE", "1")], false, true),
            (&[("CLICOLOR_FORCE", "0")], false, false),
            (&[("TERM", "dumb")], true, false),
        ] {
            assert_eq!(environment(variables).color(terminal), color, "{variables:?}");
        }
    }

    #[test]
    fn errors_are_kept_with_other_caches() {
        for (variables, directory) in [
            (&[("HOME", "/h")][..], Some("/h/.cache/evenkeel")),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], Some("/x/evenkeel")),
            (&[], None),
        ] {
            assert_eq!(environment(variables).cache_directory(), directory.map(PathBuf::from), "{variables:?}");
        }
    }

    #[cfg(feature = "hub")]
    #[test]
    fn the_cache_is_where_hugging_face_has_it() {
        for (variables, cache) in [
            (&[("HOME", "/h")][..], "/h/.cache/huggingface/hub"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "/f"), ("XDG_CACHE_HOME", "/x")], "/f/hub"),
            (&[("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/l")], "/l"),
            (&[("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/l")], "/c"),
        ] {
            assert_eq!(environment(variables).hub().unwrap().cache, PathBuf::from(cache), "{variables:?}");
        }
    }

    #[cfg(feature = "hub")]
    #[test]
    fn switches_and_tokens() {
        use evenkeel::hub::Token;
        let hub = |variables: &[(&str, &str)]| environment(variables).hub().unwrap();
        assert!(hub(&[("HF_HUB_OFFLINE", "yes")]).offline);
        assert!(!hub(&[("HF_HUB_OFFLINE", "0")]).offline);
        assert_eq!(hub(&[("HF_ENDPOINT", "http://127.0.0.1:1/")]).endpoint, "http://127.0.0.1:1");
        assert!(hub(&[("TRANSFORMERS_OFFLINE", "1")]).offline);
        assert!(hub(&[("HF_TOKEN", "hf_x")]).token.is_some());
        let both = hub(&[("HF_TOKEN", "hf_x"), ("HUGGING_FACE_HUB_TOKEN", "hf_z")]);
        assert!(both.token == Token::new("hf_x").ok());
        assert!(hub(&[("HUGGING_FACE_HUB_TOKEN", "hf_z")]).token == Token::new("hf_z").ok());
        assert!(hub(&[("HF_TOKEN", "hf_x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token.is_none());
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("token"), "hf_y\n").unwrap();
        let home = directory.path().to_str().unwrap();
        assert!(hub(&[("HF_HOME", home)]).token.is_some());
        assert!(!format!("{:?}", hub(&[("HF_HOME", home)])).contains("hf_y"));
    }
}
