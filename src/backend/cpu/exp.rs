//! The exponential function and its kin, in steps that a compiler turns into vector instructions.

use std::f32::consts::LOG2_E;

use crate::quant::ROUND;

/// Below this, `exp` is less than half of the least number there is.
const LEAST: f32 = -104.0;
/// Above this, it is beyond the largest.
const MOST: f32 = 89.0;
/// ln 2 in two parts, the first of which has so few bits that products with small integers are exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Coefficients of x² to x⁷ in a polynomial near e^x within ±ln 2 / 2, highest first.
const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5];

/// e^x within two units in the last place; 0 and infinity beyond what there is.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Comparisons, not `clamp`, in a form that keeps what is not a number.
    let x = if x < LEAST { LEAST } else { x };
    let x = if x > MOST { MOST } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND);
    let twos = shifted - ROUND;
    let rest = twos.mul_add(-LN_2[1], twos.mul_add(-LN_2[0], x));
    let polynomial = POLYNOMIAL.iter().fold(0.0f32, |sum, coefficient| sum.mul_add(rest, *coefficient));
    let near_one = polynomial.mul_add(rest * rest, rest) + 1.0;
    // In two steps, as 2^128 and 2^-150 are no numbers.
    let exponent = shifted.to_bits().cast_signed().wrapping_sub(ROUND.to_bits().cast_signed());
    let half = exponent >> 1;
    near_one * power_of_two(half) * power_of_two(exponent.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits((exponent.wrapping_add(127) << 23).cast_unsigned())
}

/// The hyperbolic tangent within ten units in the last place.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let square = x * x;
    let near_zero =
        [62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0].iter().fold(0.0f32, |sum, c| sum.mul_add(square, *c));
    let small = (near_zero * square).mul_add(x, x);
    let large = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if square < 0.04 { small } else { large }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, vectorized};

    vectorized! {
        fn map<F: Fn(f32) -> f32>(function: F, x: &mut [f32]) {
            for x in x {
                *x = function(*x);
            }
        }
    }

    /// The error in units in the last place of `exact`, or of the least normal number.
    fn units(ours: f32, exact: f64) -> f64 {
        let unit = (exact.abs().max(f64::from(f32::MIN_POSITIVE))).log2().floor().exp2() * f64::from(f32::EPSILON);
        (f64::from(ours) - exact).abs() / unit
    }

    #[test]
    fn exp_is_that_of_f64() {
        let inputs: Vec<f32> = (-1_040_000..=887_000).map(|i| i as f32 * 1e-4).chain([1e-30, -0.0]).collect();
        let portable = {
            let mut values = inputs.clone();
            map(Isa::PORTABLE, exp, &mut values);
            values
        };
        for isa in Isa::available() {
            let mut values = inputs.clone();
            map(isa, exp, &mut values);
            assert!(values == portable, "{isa:?}");
        }
        for (x, ours) in inputs.iter().zip(portable) {
            let exact = f64::from(*x).exp();
            assert!(units(ours, exact) < 2.0, "exp({x}): {ours} for {exact}");
        }
    }

    #[test]
    fn what_has_no_exponential_in_f32() {
        for (x, wanted) in
            [(f32::NEG_INFINITY, 0.0), (-1e30, 0.0), (1e30, f32::INFINITY), (f32::INFINITY, f32::INFINITY)]
        {
            assert_eq!(exp(x), wanted, "{x}");
        }
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
        assert_eq!((exp(0.0), tanh(0.0), tanh(1e30), tanh(-1e30)), (1.0, 0.0, 1.0, -1.0));
    }

    #[test]
    fn tanh_is_that_of_f64() {
        let inputs: Vec<f32> = (-120_000..=120_000).map(|i| i as f32 * 1e-4).chain([1e-30, 1e-5]).collect();
        let mut values = inputs.clone();
        map(Isa::best(), tanh, &mut values);
        for (x, ours) in inputs.iter().zip(values) {
            assert!(units(ours, f64::from(*x).tanh()) < 10.0, "tanh({x}): {ours}");
        }
    }
}
