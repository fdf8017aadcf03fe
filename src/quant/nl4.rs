//! The levels of `nl4`: those of `int4` bent by a cubic, so that they are finer near zero.
//!
//! With t = q − 7.5, level q is `t · (11.431 + 0.08096 t²) − 4.72`, rounded to
//! a whole number of sixteenths. A sixteenth of whole numbers lets a processor
//! multiply them as integers and leaves scales of the size that `int4` has.

use super::groups::Levels;

/// The levels in sixteenths.
pub const NL4_LEVELS: [i8; 16] = [-125, -101, -81, -64, -48, -35, -22, -10, 1, 13, 25, 39, 54, 72, 92, 115];
/// What a level of 1 stands for.
pub const NL4_UNIT: f32 = 1.0 / 16.0;

/// Steps of half a sixteenth: between two of them the nearest level is the same.
const STEPS: usize = 512;
/// The code of the nearest level for every step from −128 sixteenths on.
const CODES: [u8; STEPS] = codes();
/// The same as levels.
const NEAREST: [f32; STEPS] = {
    let (mut nearest, mut step) = ([0.0; STEPS], 0);
    while step < STEPS {
        nearest[step] = NL4_LEVELS[CODES[step] as usize] as f32 * NL4_UNIT;
        step += 1;
    }
    nearest
};

#[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "numbers up to 512")]
const fn codes() -> [u8; STEPS] {
    let (mut codes, mut step) = ([0; STEPS], 0);
    while step < STEPS {
        // The middle of the step in quarters of a sixteenth: an odd number, so it is as near to no two levels.
        let middle = 2 * (step as i32 - STEPS as i32 / 2) + 1;
        let mut code = 0;
        while code < 15 && middle > 2 * (NL4_LEVELS[code as usize] as i32 + NL4_LEVELS[code as usize + 1] as i32) {
            code += 1;
        }
        codes[step] = code;
        step += 1;
    }
    codes
}

/// The step that `x`, a multiple of a group's scale, lies in.
fn step(x: f32) -> usize {
    const LAST: f32 = (STEPS - 1) as f32;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 511")]
    let step = (x * 32.0 + 256.0).clamp(0.0, LAST) as usize;
    step
}

/// The levels of `nl4`.
pub struct Nl4;

impl Levels for Nl4 {
    /// Of either sign, for the levels are not symmetric, from 6.25 to 9.77 in size.
    const DIVISORS: usize = 24;

    fn divisor(candidate: usize) -> f32 {
        const SMALLEST: f32 = 6.25;
        const LARGEST: f32 = 9.766;
        let size = SMALLEST + (LARGEST - SMALLEST) * (candidate / 2) as f32 / (Self::DIVISORS / 2 - 1) as f32;
        if candidate.is_multiple_of(2) { -size } else { size }
    }

    fn nearest(x: f32) -> f32 {
        NEAREST[step(x)]
    }

    fn code(x: f32) -> u8 {
        CODES[step(x)]
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
