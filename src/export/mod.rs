//! Checkpoints out: packed once, so that loading them takes no search.

mod compressed_tensors;
mod save;
mod stored;

pub use save::{DEFAULT_SHARD_SIZE, SaveFormat, SaveOptions, SaveReport, save_quantized};
