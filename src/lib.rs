//! Loads a Hugging Face checkpoint onto the devices that are there, after an
//! exact plan, and generates text.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use evenkeel::checkpoint::Checkpoint;
//! use evenkeel::generate::GenerateOptions;
//! use evenkeel::loader::LoadOptions;
//! use evenkeel::machine::Inventory;
//! use evenkeel::plan::{Plan, PlanOptions};
//! use evenkeel::quant::Scheme;
//!
//! # fn main() -> evenkeel::Result<()> {
//! // Configuration and headers; no weights are read.
//! let checkpoint = Checkpoint::open("Llama-3.1-8B")?;
//! // Or Inventory::described("cuda:0=24GiB,cpu=64GiB").
//! let inventory = Inventory::this_machine(Path::new("/var/tmp"))?;
//! let options = PlanOptions {
//!     quantize: Some(Scheme::Int4.into()),
//!     context: Some(8192),
//!     ..PlanOptions::default()
//! };
//! let plan = Plan::new(&checkpoint, &inventory, &options)?;
//! // Exactly what the plan says.
//! let mut model = plan.load(&LoadOptions::default(), |_event| ())?;
//! for piece in model.generate("Ownership is", GenerateOptions::default())? {
//!     let text = piece?.text;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The library never prints, exits or reads the environment. Its rooms stand
//! on floors, and a room uses only those below it:
//!
//! | floor | rooms |
//! | --- | --- |
//! | 5 | [`export`], [`generate`], `hub` |
//! | 4 | [`backend`], [`loader`] |
//! | 3 | [`device_map`], [`plan`] |
//! | 2 | [`quant`], [`architecture`] |
//! | 1 | [`machine`], [`model_config`], [`tokenizer`], [`checkpoint`] |
//! | 0 | [`error`], [`mod@cancel`], [`bytes`], [`device`], [`mod@module_path`], [`name`], [`random`], [`json`], [`fs`], [`source`], [`simd`], [`pool`] |

#![warn(clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, clippy::float_cmp, reason = "tests know their numbers"))]

pub mod architecture;
pub mod backend;
pub mod bytes;
pub mod cancel;
pub mod checkpoint;
pub mod device;
pub mod device_map;
pub mod engine;
pub mod error;
pub mod export;
pub mod footprint;
pub mod fs;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
pub mod json;
pub mod loader;
pub mod machine;
pub mod model_config;
pub mod module_path;
pub mod name;
pub mod plan;
pub mod pool;
pub mod quant;
pub mod random;
pub mod simd;
pub mod source;
pub mod tokenizer;

pub use cancel::Cancel;
pub use error::{Error, ErrorKind, Result};
