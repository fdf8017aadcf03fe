//! Products of packed rows with quantized activations, for each kind of vector instructions.
//!
//! All of them compute the same bits, so that neither the processor nor the number of tokens nor
//! the way that work is shared changes a result. For a row and a token:
//!
//! - `dot[g] = Σ_k level[k] · x[k]` over each group of 32, in integers;
//! - `part[i] = Σ_g dot[g] · (sub_scale[g] · x_scale[g])` over the groups with `g mod 4 = i`, each
//!   term added by a fused multiplication; int8 rows have sub-scales of one;
//! - the total is `((part[0] + part[1]) + part[2]) + part[3]`.
//!
//! Many tokens are multiplied with [`TILE`] rows at once, which are unpacked first into the order
//! that the instructions want; the few take rows as they are packed, four at a time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod packed;
pub mod plain;
mod portable;

use crate::footprint::ACTIVATION_GROUP;
use crate::pool::Pool;
use crate::quant::{GROUP_SIZE, NL4_LEVELS, quantize_activations};
use crate::simd::{Isa, Level, vectorized};

/// Rows that are multiplied with one token at once.
pub const ROWS: usize = 4;
/// Rows that are multiplied with many tokens at once.
pub const TILE: usize = 32;
/// Tokens of which the unpacked rows make one pass.
pub const TOKENS: usize = 256;
/// Tokens from which on unpacking pays.
pub const MANY: usize = 4;

/// Parts that a total is added up from.
const PARTS: usize = 4;
/// Activations that a thread quantizes at once.
const AT_ONCE: usize = 8192;
/// Groups that stand unpacked at once.
const SPAN: usize = 16;
/// Bytes of a group of four-bit codes.
const NIBBLES: usize = GROUP_SIZE / 2;

/// What the codes of a row stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// A byte each, −127 to 127; a file that others wrote may hold −128 too.
    Int8,
    /// Four bits each, −8 to 7 with 8 added.
    Int4,
    /// Four bits each, the place of one of [`NL4_LEVELS`].
    Nl4,
}

impl Codes {
    const fn group_bytes(self) -> usize {
        match self {
            Self::Int8 => GROUP_SIZE,
            Self::Int4 | Self::Nl4 => NIBBLES,
        }
    }

    /// The level of each four-bit code.
    const fn levels(self) -> [i8; 16] {
        match self {
            Self::Nl4 => NL4_LEVELS,
            Self::Int8 | Self::Int4 => [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7],
        }
    }
}

/// A row as it is stored: its codes or elements, and its sub-scales if it has any.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Whole groups of codes, or elements.
    pub codes: &'a [u8],
    /// One a group; none but for four-bit codes.
    pub sub_scales: &'a [i8],
}

/// Words of 32 bits that a group of quantized activations takes: its codes, its scale and their sum.
pub const GROUP_WORDS: usize = ACTIVATION_GROUP / size_of::<i32>();

/// Quantized activations of some tokens; of each its codes, then its scales, then its sums.
#[derive(Clone, Copy, Debug)]
pub struct Quantized<'a> {
    words: &'a [i32],
    groups: usize,
}

/// Quantized activations of a token.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// Groups of codes, four of which make a word.
    codes: &'a [[[i8; 4]; GROUP_SIZE / 4]],
    /// One a group.
    scales: &'a [f32],
    /// The sum of each group's codes.
    sums: &'a [i32],
}

impl<'a> Quantized<'a> {
    /// Quantizes `x`, `[tokens][cols]`, into `words`, of which it takes what it needs.
    pub fn new(pool: &Pool, x: &[f32], cols: usize, words: &'a mut [i32]) -> Self {
        let groups = cols.div_ceil(GROUP_SIZE);
        let token = groups * GROUP_WORDS;
        let words = &mut words[..x.len() / cols * token];
        // A token is not worth another thread.
        let at_once = AT_ONCE.div_ceil(cols);
        pool.chunks(words, at_once * token, |index, words| {
            for (words, x) in words.chunks_mut(token).zip(x[index * at_once * cols..].chunks(cols)) {
                quantize(pool.isa(), x, words);
            }
        });
        Self { words, groups }
    }

    pub fn tokens(&self) -> usize {
        self.words.len() / (self.groups * GROUP_WORDS)
    }

    /// `count` tokens from `first` on.
    pub fn slice(&self, first: usize, count: usize) -> Self {
        let token = self.groups * GROUP_WORDS;
        Self { words: &self.words[first * token..(first + count) * token], groups: self.groups }
    }

    pub fn token(&self, at: usize) -> Token<'a> {
        let token = self.groups * GROUP_WORDS;
        let (codes, others) = self.words[at * token..(at + 1) * token].split_at(self.groups * (GROUP_SIZE / 4));
        let (scales, sums) = others.split_at(self.groups);
        let codes: &[i8] = bytemuck::must_cast_slice(codes);
        Token { codes: codes.as_chunks().0.as_chunks().0, scales: bytemuck::must_cast_slice(scales), sums }
    }
}

vectorized! {
    /// The activations `x` of a token as [`Quantized`] has them.
    fn quantize(x: &[f32], words: &mut [i32]) {
        let groups = words.len() / GROUP_WORDS;
        let (codes, others) = words.split_at_mut(groups * (GROUP_SIZE / 4));
        let (scales, sums) = others.split_at_mut(groups);
        let codes: &mut [i8] = bytemuck::must_cast_slice_mut(codes);
        quantize_activations(x, codes, bytemuck::must_cast_slice_mut(scales));
        for (codes, sum) in codes.as_chunks::<GROUP_SIZE>().0.iter().zip(sums) {
            *sum = codes.iter().map(|code| i32::from(*code)).sum();
        }
    }
}

/// The totals of four rows with one token.
pub fn few(isa: Isa, codes: Codes, rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
    match isa.level() {
        Level::Portable => portable::few(codes, rows, x),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::plain::few(isa, codes, rows, x),
        #[cfg(target_arch = "x86_64")]
        Level::AvxVnni => avx2::vnni::few(isa, codes, rows, x),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => avx512::few(isa, codes, rows, x),
    }
}

/// The totals of a tile of rows with each of at most [`TOKENS`] tokens.
pub fn many(isa: Isa, codes: Codes, rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
    match isa.level() {
        Level::Portable => portable::many(codes, rows, x, totals),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::plain::many(isa, codes, rows, x, totals),
        #[cfg(target_arch = "x86_64")]
        Level::AvxVnni => avx2::vnni::many(isa, codes, rows, x, totals),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => avx512::many(isa, codes, rows, x, totals),
    }
}
