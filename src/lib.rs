#![doc = "evenkeel"]

pub mod architecture;
pub mod backend;
pub mod bytes;
pub mod checkpoint;
pub mod device;
pub mod device_map;
pub mod error;
pub mod fs;
pub mod generate;
pub mod json;
pub mod loader;
pub mod model_config;
pub mod module_path;
pub mod plan;
pub mod quant;
pub mod source;
pub mod tokenizer;
pub use error::{Error, ErrorKind, Result};
