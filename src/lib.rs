#![doc = "evenkeel"]
pub mod bytes;
pub mod checkpoint;
pub mod device;
pub mod error;
pub mod fs;
pub mod json;
pub mod module_path;
pub use error::{Error, ErrorKind, Result};
