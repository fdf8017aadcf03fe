//! checkpoint
pub mod source;
pub use source::{LocalDirectory, Source};
