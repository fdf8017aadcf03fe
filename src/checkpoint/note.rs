//! What a user should know of a checkpoint that loads all the same.

use std::fmt;

use super::{SINGLE_FILE, index};
use crate::error::{first_five, printable};
use crate::model_config::HEAD_WEIGHT;

/// Something in a checkpoint's files that is not as it should be, and what was made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// Tensors are in other shards than the index says, or the index leaves them out.
    Displaced(Vec<String>),
    /// Whether the head that is stored is the embedding is not known, as no weights are at hand.
    HeadUnread,
    /// The model is read by its `model_type`, which `architectures` contradicts.
    OtherArchitecture {
        /// What `architectures` says.
        said: String,
        /// The architecture that it is read as.
        read: &'static str,
    },
    /// The configuration says that the head is the embedding; another one is stored.
    OwnHead,
    /// The single file is read, with an index beside it.
    SingleFile,
    /// The names of all tensors had this more.
    Unwrapped(String),
    /// Tensors that no part of the model takes.
    Unused(Vec<String>),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |names: &[String]| first_five(names.iter().map(|name| printable(name)));
        let tensors = |names: &[String]| match names.len() {
            1 => "1 tensor".to_owned(),
            count => format!("{count} tensors"),
        };
        match self {
            Self::Displaced(names) => {
                let what = "not in the shard that the index names, taken where they are";
                write!(f, "{} {what}: {}", tensors(names), shown(names))
            }
            Self::HeadUnread => write!(f, "`{HEAD_WEIGHT}` is stored beside the embedding, and taken for the same"),
            Self::OtherArchitecture { said, read } => {
                write!(f, "read as `{read}`, as its `model_type` says; `architectures` has {said}")
            }
            Self::OwnHead => write!(
                f,
                "`{HEAD_WEIGHT}` differs from the embedding and is used, though config.json has \
                 `tie_word_embeddings: true`"
            ),
            Self::SingleFile => write!(f, "`{SINGLE_FILE}` is read, and `{}` beside it is not", index::FILE),
            Self::Unwrapped(prefix) => {
                write!(f, "the names of the tensors are taken without their `{}`", printable(prefix))
            }
            Self::Unused(names) => {
                write!(f, "{} not read, for which the model has no place: {}", tensors(names), shown(names))
            }
        }
    }
}
