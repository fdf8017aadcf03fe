//! Keys and values that a block keeps, and how they stand in memory.

use memmap2::MmapMut;

use super::arena::zeroed;
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::footprint::KvLayout;
use crate::quant::KvDtype;

/// Keys whose elements stand side by side, dimension by dimension. A ring has a multiple of them.
pub const KEY_TILE: usize = 32;

/// The keys and values of a block, for each sequence that there is room for.
pub struct KvCache {
    pub(super) layout: KvLayout,
    /// Bytes of the keys of a sequence, or of its values.
    half: usize,
    memory: MmapMut,
}

impl KvCache {
    /// Room for so many sequences, in `bytes`.
    pub fn new(layout: KvLayout, sequences: usize, bytes: Bytes) -> Result<Self> {
        let too_large = || Error::does_not_fit("the KV cache is too large for this machine");
        let half = layout.bytes().as_usize().ok_or_else(too_large)?;
        let whole = half.checked_mul(2 * sequences).filter(|whole| *whole as u64 <= bytes.0).ok_or_else(too_large)?;
        Ok(Self { layout, half, memory: zeroed("the KV cache", Bytes(whole as u64))? })
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.memory.len() as u64)
    }

    /// Codes and scales of the keys and of the values of a sequence.
    pub fn of(&mut self, sequence: usize) -> [(&mut [u8], &mut [f32]); 2] {
        let KvLayout { codes, scales, .. } = self.layout;
        let (keys, values) = self.memory[2 * self.half * sequence..][..2 * self.half].split_at_mut(self.half);
        [keys, values].map(|half| {
            let (codes, scales) = half[..codes + scales].split_at_mut(codes);
            (codes, bytemuck::cast_slice_mut(scales))
        })
    }
}

/// The shape of a block's cache and of its queries. Values stand as
/// `[kv_heads][slots][head_dim]`; keys too, but of [`KEY_TILE`] keys in turn, or those that are left
/// of the slots, as `[head_dim][keys]`.
#[derive(Clone, Copy)]
pub struct Cache {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The token at a position has the slot that is left of it over these.
    pub slots: usize,
    pub dtype: KvDtype,
    pub scores: Scores,
}

/// How queries score keys: `cap · tanh(scale · q·k / cap)`, or without the cap
/// `scale · q·k`, for the last `window` keys or for all.
#[derive(Clone, Copy)]
pub struct Scores {
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
}

/// The keys, or the values, of a block: codes, and the scale of each vector if the type has them.
pub type Stored<'a> = (&'a [u8], &'a [f32]);

impl Cache {
    /// Stores the values `rows`, `[tokens][kv_heads][head_dim]`, from `position` on.
    pub fn append_values(&self, rows: &[f32], (codes, scales): (&mut [u8], &mut [f32]), position: usize) {
        let width = self.dtype.code_bytes(self.head_dim);
        self.each_vector(rows, position, |head, slot, vector| {
            let at = head * self.slots + slot;
            let scale = self.dtype.encode(vector, &mut codes[at * width..][..width]);
            if let Some(stored) = scales.get_mut(at) {
                *stored = scale;
            }
        });
    }

    /// As [`Cache::append_values`] for keys.
    pub fn append_keys(&self, rows: &[f32], (codes, scales): (&mut [u8], &mut [f32]), position: usize) {
        let element = self.dtype.code_bytes(1);
        // Words, as elements of four bytes are to be aligned.
        let mut encoded = vec![0u32; self.dtype.code_bytes(self.head_dim).div_ceil(size_of::<u32>())];
        let encoded: &mut [u8] = bytemuck::must_cast_slice_mut(&mut encoded);
        let encoded = &mut encoded[..self.head_dim * element];
        self.each_vector(rows, position, |head, slot, vector| {
            let scale = self.dtype.encode(vector, encoded);
            if let Some(stored) = scales.get_mut(head * self.slots + slot) {
                *stored = scale;
            }
            let (lane, start) = (slot % KEY_TILE, slot - slot % KEY_TILE);
            let stride = KEY_TILE.min(self.slots - start);
            let first = (head * self.slots + start) * self.head_dim + lane;
            for (dimension, code) in encoded.chunks_exact(element).enumerate() {
                codes[(first + dimension * stride) * element..][..element].copy_from_slice(code);
            }
        });
    }

    fn each_vector(&self, rows: &[f32], position: usize, mut store: impl FnMut(usize, usize, &[f32])) {
        for (key, row) in (position..).zip(rows.chunks(self.kv_heads * self.head_dim)) {
            for (head, vector) in row.chunks(self.head_dim).enumerate() {
                store(head, key % self.slots, vector);
            }
        }
    }

    /// Queries that share a head of keys and values.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}
