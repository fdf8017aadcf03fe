//! Keys and values that a block keeps, and how they stand in memory.

use memmap2::MmapMut;

use super::arena::zeroed;
use crate::backend::Run;
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::footprint::{KvLayout, PAGE};
use crate::quant::KvDtype;

/// Keys whose elements stand side by side, dimension by dimension. A page has whole tiles of them.
pub const KEY_TILE: usize = 32;
const _: () = assert!(PAGE.is_multiple_of(KEY_TILE));

/// The keys and values of a block, of all sequences that there is room for.
pub struct KvCache {
    pub(super) layout: KvLayout,
    /// Bytes of the keys, or of the values.
    half: usize,
    memory: MmapMut,
}

impl KvCache {
    /// Room for what `layout` lays out, in `bytes`.
    pub fn new(layout: KvLayout, bytes: Bytes) -> Result<Self> {
        let too_large = || Error::does_not_fit("the KV cache is too large for this machine");
        let half = layout.bytes().as_usize().ok_or_else(too_large)?;
        let whole = half.checked_mul(2).filter(|whole| *whole as u64 <= bytes.0).ok_or_else(too_large)?;
        Ok(Self { layout, half, memory: zeroed("the KV cache", Bytes(whole as u64))? })
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.memory.len() as u64)
    }

    /// Codes and scales of the keys and of the values.
    pub fn halves(&mut self) -> [(&mut [u8], &mut [f32]); 2] {
        let KvLayout { codes, scales, .. } = self.layout;
        let (keys, values) = self.memory.split_at_mut(self.half);
        [keys, values].map(|half| {
            let (codes, scales) = half[..codes + scales].split_at_mut(codes);
            (codes, bytemuck::cast_slice_mut(scales))
        })
    }

    /// Where the sequence of a run is in it.
    pub fn pages<'a>(&self, run: &Run<'a>) -> Pages<'a> {
        let KvLayout { slots, is_ring, .. } = self.layout;
        if is_ring { Pages::Ring { first: run.slot * (slots / PAGE), slots } } else { Pages::Table(run.pages) }
    }
}

/// Where the tokens of a sequence stand.
#[derive(Clone, Copy, Debug)]
pub enum Pages<'a> {
    /// The page of each so many tokens.
    Table(&'a [u32]),
    /// Pages that follow on each other, of so many slots, which are used again.
    Ring { first: usize, slots: usize },
}

impl Pages<'_> {
    /// The place of the token at a position among all that there are: its page, and where in that.
    #[inline(always)]
    fn place(self, position: usize) -> (usize, usize) {
        match self {
            Self::Table(pages) => (pages[position / PAGE] as usize, position % PAGE),
            Self::Ring { first, slots } => (first + position % slots / PAGE, position % PAGE),
        }
    }
}

/// The shape of a block's cache and of its queries. Values stand as
/// `[pages][kv_heads][PAGE][head_dim]`; keys too, but of [`KEY_TILE`] keys in turn as `[head_dim][keys]`.
#[derive(Clone, Copy)]
pub struct Cache<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub pages: Pages<'a>,
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

impl Cache<'_> {
    /// Where the vector of a head stands for the token at a position, in vectors.
    #[inline(always)]
    pub fn vector(&self, kv_head: usize, position: usize) -> usize {
        let (page, at) = self.pages.place(position);
        (page * self.kv_heads + kv_head) * PAGE + at
    }

    /// Stores the values `rows`, `[tokens][kv_heads][head_dim]`, from `position` on.
    pub fn append_values(&self, rows: &[f32], (codes, scales): (&mut [u8], &mut [f32]), position: usize) {
        let width = self.dtype.code_bytes(self.head_dim);
        self.each_vector(rows, position, |at, vector| {
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
        self.each_vector(rows, position, |at, vector| {
            let scale = self.dtype.encode(vector, encoded);
            if let Some(stored) = scales.get_mut(at) {
                *stored = scale;
            }
            let lane = at % KEY_TILE;
            let first = (at - lane) * self.head_dim + lane;
            for (dimension, code) in encoded.chunks_exact(element).enumerate() {
                codes[(first + dimension * KEY_TILE) * element..][..element].copy_from_slice(code);
            }
        });
    }

    fn each_vector(&self, rows: &[f32], position: usize, mut store: impl FnMut(usize, &[f32])) {
        for (position, row) in (position..).zip(rows.chunks(self.kv_heads * self.head_dim)) {
            for (head, vector) in row.chunks(self.head_dim).enumerate() {
                store(self.vector(head, position), vector);
            }
        }
    }

    /// Queries that share a head of keys and values.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}
