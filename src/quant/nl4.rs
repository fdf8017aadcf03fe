//! The levels of `nl4`: those of `int4` bent by a cubic, so that they are finer near zero.
//!
//! With t = q − 7.5, level q is `t · (11.431 + 0.08096 t²) − 4.72`, rounded to
//! a whole number of sixteenths. A sixteenth of whole numbers lets a processor
//! multiply them as integers and leaves scales of the size that `int4` has.

use super::levels::Levels;

/// The levels in sixteenths.
pub const NL4_LEVELS: [i8; 16] = [-125, -101, -81, -64, -48, -35, -22, -10, 1, 13, 25, 39, 54, 72, 92, 115];
/// What a level of 1 stands for.
pub const NL4_UNIT: f32 = 1.0 / 16.0;

/// Half sixteenths above −128 sixteenths from which on level q + 1 is nearer than level q.
const NEARER: [f32; 15] = {
    let (mut nearer, mut code) = ([0.0; 15], 0);
    while code < 15 {
        nearer[code] = (256 + NL4_LEVELS[code] as i16 + NL4_LEVELS[code + 1] as i16) as f32;
        code += 1;
    }
    nearer
};

/// `of(q)` of the level q that is nearest to `x`, a multiple of a group's scale. A choice for
/// every level: in a table, values would be looked up one at a time.
#[inline(always)]
fn nearest<T: Copy>(x: f32, of: impl Fn(usize) -> T) -> T {
    let (steps, mut nearest) = (x * 32.0 + 256.0, of(0));
    for (code, nearer) in NEARER.into_iter().enumerate() {
        nearest = if steps >= nearer { of(code + 1) } else { nearest };
    }
    nearest
}

/// The levels of `nl4`.
pub struct Nl4;

impl Levels for Nl4 {
    /// Of either sign, for the levels are not symmetric, from 6.25 to 9.77 in size.
    const DIVISORS: usize = 24;

    #[inline(always)]
    fn divisor(candidate: usize) -> f32 {
        const SMALLEST: f32 = 6.25;
        const LARGEST: f32 = 9.766;
        let size = SMALLEST + (LARGEST - SMALLEST) * (candidate / 2) as f32 / (Self::DIVISORS / 2 - 1) as f32;
        if candidate.is_multiple_of(2) { -size } else { size }
    }

    #[inline(always)]
    fn nearest(x: f32) -> f32 {
        nearest(x, |code| f32::from(NL4_LEVELS[code]) * NL4_UNIT)
    }

    #[inline(always)]
    fn code(x: f32) -> u8 {
        nearest(x, |code| code.to_le_bytes()[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_the_cubic() {
        for (code, level) in NL4_LEVELS.into_iter().enumerate() {
            let t = code as f64 - 7.5;
            assert_eq!(f64::from(level), (t * (11.431 + 0.08096 * t * t) - 4.72).round(), "code {code}");
        }
    }

    #[test]
    fn the_nearest_level_is_found_for_every_value() {
        for x in (-2200..2200).map(|x| x as f32 / 256.0 + 1e-4) {
            let distance = |level: f32| (level - x).abs();
            let least = NL4_LEVELS.iter().map(|level| distance(f32::from(*level) * NL4_UNIT)).fold(f32::MAX, f32::min);
            assert_eq!(distance(Nl4::nearest(x)), least, "{x}");
            assert_eq!(Nl4::nearest(x), f32::from(NL4_LEVELS[usize::from(Nl4::code(x))]) * NL4_UNIT, "{x}");
        }
    }
}
