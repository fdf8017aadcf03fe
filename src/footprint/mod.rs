//! The bytes of everything that a load allocates. A plan lists them, the loader and the
//! backends take their sizes from here and from nowhere else.

mod cpu;
mod cuda;
mod staging;
mod state;
mod weights;

use serde::Serialize;

use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::name::named;

pub use cpu::{ACTIVATION_GROUP, CpuBuffers, host_state, program};
pub use cuda::{
    CUDA_FEW_BLOCKS, CUDA_FEW_PARTS, CUDA_GRANULE, CudaAttention, CudaBuffers, CudaChoice, CudaRows, HALF, WORD,
    cuda_driver, cuda_graphs, cuda_host, cuda_staging,
};
pub use staging::{DIRECT_BLOCK, HostStaging, SLAB_MARGIN, STAGING_SLABS};
pub use state::{KvLayout, State};
pub use weights::{Placed, lay_out, layout, weight_bytes};

/// Every region of an arena starts on a multiple of this many bytes.
pub const ALIGNMENT: u64 = 256;
/// No single allocation may be planned beyond this.
pub const MAX_BYTES: u64 = 1 << 60;

/// What a region of so many bytes takes of an arena.
pub fn aligned(bytes: u64) -> Bytes {
    Bytes(bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX))
}

/// Tokens of a page: what a sequence is given of the room for keys and values, and gives back.
pub const PAGE: usize = 64;

/// The most rows whose logits are computed at once.
pub const LOGIT_ROWS: usize = 16;

/// What there is to be room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The longest sequence, in tokens.
    pub context: usize,
    /// Tokens of a step, of all sequences together.
    pub chunk: usize,
    /// Sequences at once.
    pub sequences: usize,
    /// Pages that these share, of all blocks that keep the whole context.
    pub pages: usize,
}

impl Extent {
    /// Room for so many sequences, each of the whole context.
    pub fn new(context: usize, chunk: usize, sequences: usize) -> Self {
        let pages = sequences.saturating_mul(Self::pages_of(context));
        Self { context, chunk, sequences, pages }
    }

    /// Rows whose logits there is room for at once.
    pub fn logit_rows(&self) -> usize {
        self.sequences.min(LOGIT_ROWS)
    }

    /// Pages of so many tokens.
    pub fn pages_of(tokens: usize) -> usize {
        tokens.div_ceil(PAGE)
    }

    /// Rows of a step of a token each of so many sequences, with those that pad it: there are few such sizes.
    pub fn padded(&self, rows: usize) -> usize {
        rows.next_power_of_two().min(self.sequences)
    }

    /// The sizes of such steps.
    pub fn step_sizes(&self) -> impl Iterator<Item = usize> {
        let sequences = self.sequences;
        std::iter::successors(Some(1), move |rows| (*rows < sequences).then(|| (2 * rows).min(sequences)))
    }
}

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// The arena of packed weights.
    Weights,
    /// What blocks keep of the tokens that they have seen.
    State,
    /// Buffers of a step.
    Workspace,
    /// What weights pass through while they are loaded.
    Staging,
    /// What the program itself takes of host memory, its tokenizer first; an estimate.
    Program,
    /// What the driver takes by itself; an estimate.
    Driver,
}

named!(Purpose, "what an allocation is for", {
    Weights => "weights",
    State => "state",
    Workspace => "workspace",
    Staging => "staging",
    Program => "program",
    Driver => "driver",
});

/// An allocation, or a region of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Allocation {
    /// The device whose memory it takes.
    pub device: DeviceId,
    /// What it is for.
    pub purpose: Purpose,
    /// What it is called: a buffer, or the module whose state it is.
    pub name: String,
    /// Its size.
    pub bytes: Bytes,
}

/// Defines a struct of named buffers, which has a `T` for each: its size, or the buffer itself.
macro_rules! buffers {
    (
        $(#[$about:meta])* $name:ident($config:ident, $extent:ident) { $($known:tt)* }
        $($(#[$doc:meta])* $field:ident: $size:expr,)*
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "some names say it all")]
        pub struct $name<T> {
            $($(#[$doc])* pub $field: T,)*
        }

        impl $name<Bytes> {
            /// Their sizes.
            pub fn sizes($config: &ModelConfig, $extent: Extent) -> Self {
                $($known)*
                Self { $($field: $size,)* }
            }
        }

        impl<T> $name<T> {
            /// What `of` gives for each name.
            pub fn try_new<E>(mut of: impl FnMut(&'static str) -> Result<T, E>) -> Result<Self, E> {
                Ok(Self { $($field: of(stringify!($field))?,)* })
            }

            /// Each with its name.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, &T)> {
                [$((stringify!($field), &self.$field),)*].into_iter()
            }
        }
    };
}
use buffers;
