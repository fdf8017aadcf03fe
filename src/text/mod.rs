//! Text to tokens and back: tokenizers, chat templates, and text as it comes.
//!
//! A tokenizer and a template are programs of strangers. A [`Sandbox`] runs them in a process of their
//! own, with limits on memory, time and output; without one they run here, where only their panics are caught.

mod chat;
mod jinja;
mod parsed;
mod sandbox;
mod special;
mod stream;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use parsed::{FILE, TokenBytes};
pub use sandbox::{Sandbox, serve};
pub use stream::TextStream;
pub use tokenizer::{Opening, Tokenizer};

/// The files of a checkpoint that a tokenizer or a chat template may be read from.
pub const FILES: [&str; 7] = [
    FILE,
    special::CONFIG_FILE,
    special::MAP_FILE,
    special::ADDED_FILE,
    chat::TEMPLATE_FILES[0],
    chat::TEMPLATE_FILES[1],
    chat::JSON_FILES[1],
];
