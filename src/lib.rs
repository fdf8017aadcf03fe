#![doc = "evenkeel"]

pub mod architecture;
pub mod bytes;
pub mod checkpoint;
pub mod device;
pub mod device_map;
pub mod error;
pub mod fs;
#[cfg(feature = "hub")]
pub mod hub;
pub mod json;
pub mod model_config;
pub mod module_path;
pub mod plan;
pub mod quant;
pub mod source;
pub use error::{Error, ErrorKind, Result};
