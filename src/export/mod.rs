//! Checkpoints out: packed once, so that loading them takes no search.

mod compressed_tensors;
mod save;

use safetensors::Dtype;

pub use save::{DEFAULT_SHARD_SIZE, SaveFormat, SaveOptions, SaveReport, save_quantized};

/// A tensor as it is written.
#[derive(Clone, Debug)]
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    size: u64,
    /// What it holds, where that is known before any weight is read.
    content: Vec<u8>,
}

impl Stored {
    /// Sizes were planned, and are far below 2^63.
    fn new(name: String, dtype: Dtype, shape: Vec<u64>) -> Self {
        let size = shape.iter().product::<u64>() * dtype.bitsize() as u64 / 8;
        Self { name, dtype, shape, size, content: Vec::new() }
    }
}
