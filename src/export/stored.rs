//! A tensor as it is written.

use safetensors::Dtype;

/// A tensor of a shard.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub size: u64,
    /// What it holds, where that is known before any weight is read.
    pub content: Vec<u8>,
}

impl Stored {
    /// Sizes were planned, and are far below 2^63.
    pub fn new(name: String, dtype: Dtype, shape: Vec<u64>) -> Self {
        let size = shape.iter().product::<u64>() * dtype.bitsize() as u64 / 8;
        Self { name, dtype, shape, size, content: Vec::new() }
    }

    /// The same, holding `content`.
    pub fn holding(self, content: Vec<u8>) -> Self {
        Self { content, ..self }
    }
}
