//! Loads a Hugging Face checkpoint onto the devices that are there, after an
//! exact plan, and generates text.
//!
//! ```no_run
//! use evenkeel::{Checkpoint, Inventory, LoadOptions, Plan, PlanOptions, Sampling, Scheme};
//!
//! # fn main() -> evenkeel::Result<()> {
//! # let path = "Llama-3.1-8B";
//! let checkpoint = Checkpoint::open(path)?;                          // config and headers, no weights
//! let inventory = Inventory::this_machine()?;                        // or Inventory::described("cuda:0=24GiB,cpu=64GiB")
//! let plan = Plan::new(&checkpoint, &inventory, PlanOptions { quantize: Scheme::Int4.into(), ..Default::default() })?;
//! let mut model = plan.load(LoadOptions::default(), |_event| ())?;   // the plan knows its checkpoint
//! for piece in model.generate("Ownership is", Sampling::greedy())? {
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
//! | 7 | `serve` |
//! | 6 | `openai` |
//! | 5 | `export`, `generate`, `hub`, `verify` |
//! | 4 | `backend`, `engine`, `loader` |
//! | 3 | `device_map`, `plan` |
//! | 2 | `quant`, `architecture`, `footprint` |
//! | 1 | `machine`, `model_config`, `text`, `checkpoint` |
//! | 0 | `error`, `cancel`, `bytes`, `device`, `module_path`, `name`, `random`, `json`, `fs`, `source`, `simd`, `pool` |

#![warn(clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, clippy::float_cmp, reason = "tests know their numbers"))]

/// The rooms, which only tests and benches see as such.
macro_rules! rooms {
    ($($room:ident)*) => {
        $(
            #[cfg(feature = "testing")]
            pub mod $room;
            #[cfg(not(feature = "testing"))]
            #[allow(dead_code, unused_imports, reason = "some of it is for tests and benches")]
            mod $room;
        )*
    };
}

rooms! {
    architecture backend bytes cancel checkpoint device device_map engine error export footprint fs generate json
    loader machine model_config module_path name plan pool quant random simd source text verify
}
#[cfg(feature = "hub")]
pub mod hub;
pub mod openai;
#[cfg(feature = "serve")]
pub mod serve;

pub use backend::cuda::{GpuInfo, Installation, Mode, Occupant, uuids as gpu_uuids};
pub use bytes::{Bytes, GIB, KIB, MIB};
pub use cancel::Cancel;
pub use checkpoint::{Checkpoint, Note, Origin, Source, Tensor};
pub use device::{DeviceError, DeviceId};
pub use device_map::{DeviceMap, MAX_BATCH, MaxMemory};
pub use error::{Error, ErrorKind, Hint, ParseError, Result, Setting, escaped, is_unseen};
pub use export::{DEFAULT_SHARD_SIZE, SaveFormat, SaveOptions, SaveReport, save_quantized};
pub use footprint::{Allocation, Placed, Purpose};
pub use fs::{SCRATCH_DIRECTORY, read_capped, write_atomic};
pub use generate::{
    Answer, Comparison, Constraint, DEFAULT_WINDOW, Divergence, Engine, EngineOptions, EngineState, Event, Finish,
    GenerateOptions, GenerateReport, Generation, Logprobs, Perplexity, Piece, Predictions, Request, Sampling, TooLong,
    Windows, start_tokens,
};
pub use loader::{LoadEvent, LoadOptions, LoadReport, LoadTimes, MeasuredDevice, MeasuredGpu, Model, WeightError};
pub use machine::{Bandwidth, Device, Fault, Idle, Inventory};
pub use model_config::{GenerationDefaults, ModelConfig};
pub use plan::{
    Change, DEFAULT_CHUNK, DEFAULT_CONTEXT, DEFAULT_RESERVE, DevicePlan, DoesNotFit, KindReport, Outline, Plan,
    PlanOptions, PlannedModule, Quantize, Remedy, Speed, Strategy,
};
pub use pool::Pool;
pub use quant::{KvDtype, QuantizeError, QuantizeRules, Scheme};
pub use text::{ChatTemplate, Message, Sandbox, Tokenizer, serve as serve_sandbox};
pub use verify::{Verification, VerifiedGpu, VerifiedHop, verify, verify_once};
