//! Numbers to the nearest whole ones, by the same bits on every processor.

/// 1.5 · 2^23. Adding it leaves a number of up to 2^22 no bits for a fraction, which rounds
/// it to the nearest whole number, ties to even, on every processor; its lowest bits are that number.
pub const ROUND: f32 = 12_582_912.0;

/// The low byte of the whole number nearest to `x`.
#[inline(always)]
pub fn low_byte(x: f32) -> u8 {
    (x + ROUND).to_bits().to_le_bytes()[0]
}

/// The whole number nearest to `x`, −127 to 127.
#[inline(always)]
pub fn round_i8(x: f32) -> i8 {
    low_byte(x.clamp(-127.0, 127.0)).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rounds_ties_to_even() {
        for x in (-1024..=1024).map(|x| x as f32 / 8.0) {
            assert_eq!((x + ROUND) - ROUND, x.round_ties_even(), "{x}");
            assert_eq!(low_byte(x), (x.round_ties_even() as i32).to_le_bytes()[0], "{x}");
        }
    }
}
