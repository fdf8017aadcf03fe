//! What is nearest among sixteen levels.

use super::round::{ROUND, low_byte};

/// The sixteen levels of a scheme.
pub trait Levels {
    /// How many divisors of a group's extreme element the search tries.
    const DIVISORS: usize;

    /// One of them.
    fn divisor(candidate: usize) -> f32;

    /// The level nearest to `x`.
    fn nearest(x: f32) -> f32;

    /// The code of that level, 0..16.
    fn code(x: f32) -> u8;
}

/// −8 to 7.
pub struct Int4;

impl Levels for Int4 {
    /// The extreme keeps its sign, so that it lands near −8 and the level that
    /// the minus side has more is used.
    const DIVISORS: usize = 20;

    #[inline(always)]
    fn divisor(candidate: usize) -> f32 {
        const FIRST: f32 = -10.47;
        const LAST: f32 = -6.2;
        FIRST + (LAST - FIRST) * candidate as f32 / (Self::DIVISORS - 1) as f32
    }

    #[inline(always)]
    fn nearest(x: f32) -> f32 {
        (x.clamp(-8.0, 7.0) + ROUND) - ROUND
    }

    #[inline(always)]
    fn code(x: f32) -> u8 {
        low_byte(x.clamp(-8.0, 7.0)).wrapping_add(8)
    }
}
