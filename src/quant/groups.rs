//! Rows of weights in groups of 32, each with a scale that is searched for.
//!
//! Several groups are searched side by side, a group to a lane, so that the
//! compiler finds the same steps to do on all of them at once. What a group
//! gives does not depend on those beside it.

use half::f16;

use super::GROUP_SIZE;
use super::levels::Levels;
use super::round::round_i8;

/// Groups that are searched side by side.
const LANES: usize = 32;
/// Sums over a group: terms k, k + 8, k + 16 and k + 24 are added first, then these sums in order of k.
const PARTS: usize = 8;

/// A number for each of the groups.
type Lanes = [f32; LANES];
/// The elements of the groups, those of one column beside each other.
type Block = [Lanes; GROUP_SIZE];

/// Packs a row whose scales are [`search`]ed for. Returns the row's scale, or
/// the scale that f16 cannot hold.
#[inline(always)]
pub fn pack_row<L: Levels>(values: &[f32], codes: &mut [u8], sub_scales: &mut [u8]) -> Result<f16, f32> {
    let groups = values.as_chunks::<GROUP_SIZE>().0;
    let mut scales = vec![0.0; groups.len()];
    for (groups, scales) in groups.chunks(LANES).zip(scales.chunks_mut(LANES)) {
        scales.copy_from_slice(&search::<L>(&side_by_side(groups))[..groups.len()]);
    }
    let row_scale = row_scale(&scales)?;
    let factor = row_scale.to_f32();
    let parts = groups.chunks(LANES).zip(scales.chunks(LANES)).zip(sub_scales.chunks_mut(LANES));
    for (((groups, scales), sub_scales), codes) in parts.zip(codes.chunks_mut(LANES * GROUP_SIZE / 2)) {
        let found = sub_scales_of::<L>(&side_by_side(groups), scales, factor);
        let bytes = codes.chunks_exact_mut(GROUP_SIZE / 2);
        for (((group, bytes), sub_scale), found) in groups.iter().zip(bytes).zip(sub_scales).zip(found) {
            *sub_scale = found.cast_unsigned();
            let scale = factor * f32::from(found);
            let code = |value: f32| L::code(if scale == 0.0 { 0.0 } else { value / scale });
            for (j, byte) in bytes.iter_mut().enumerate() {
                *byte = code(group[j]) | code(group[j + GROUP_SIZE / 2]) << 4;
            }
        }
    }
    Ok(row_scale)
}

/// The scale of a row whose groups want `scales`, or what f16 cannot hold.
fn row_scale(scales: &[f32]) -> Result<f16, f32> {
    let largest = scales.iter().fold(0.0f32, |max, scale| max.max(scale.abs()));
    let wanted = largest / 127.0;
    let scale = f16::from_f32(wanted);
    if largest == 0.0 {
        Ok(f16::ONE)
    } else if scale.is_infinite() {
        Err(wanted)
    } else if scale == f16::ZERO {
        Ok(f16::from_bits(1))
    } else {
        Ok(scale)
    }
}

/// At most [`LANES`] groups; zeros where there are fewer.
#[inline(always)]
fn side_by_side(groups: &[[f32; GROUP_SIZE]]) -> Block {
    let mut block = [[0.0; LANES]; GROUP_SIZE];
    for (lane, group) in groups.iter().enumerate() {
        for (column, value) in block.iter_mut().zip(group) {
            column[lane] = *value;
        }
    }
    block
}

/// The scale of each group with the least squared error: a few divisors of the
/// extreme element, each refitted by least squares to the codes that it gives.
#[inline(always)]
fn search<L: Levels>(block: &Block) -> Lanes {
    let mut extreme = [0.0f32; LANES];
    for column in block {
        for (extreme, value) in extreme.iter_mut().zip(column) {
            *extreme = if value.abs() > extreme.abs() { *value } else { *extreme };
        }
    }
    let (mut best, mut least) = (lanes(|i| extreme[i] / -8.0), [f32::INFINITY; LANES]);
    for candidate in 0..L::DIVISORS {
        let divisor = L::divisor(candidate);
        let inverse = lanes(|i| divisor / extreme[i]);
        let [dot, norm] = sums(block, |i, value| {
            let level = L::nearest(value * inverse[i]);
            [value * level, level * level]
        });
        let scale = lanes(|i| dot[i] / norm[i].max(1e-9));
        let error = squared_error::<L>(block, &scale);
        for i in 0..LANES {
            let is_better = scale[i] != 0.0 && scale[i].is_finite() && error[i] < least[i];
            best[i] = if is_better { scale[i] } else { best[i] };
            least[i] = if is_better { error[i] } else { least[i] };
        }
    }
    lanes(|i| if extreme[i] == 0.0 { 0.0 } else { best[i] })
}

/// The sub-scale of each group: `scale / factor` rounded, or a neighbour of that which has a smaller error.
#[inline(always)]
fn sub_scales_of<L: Levels>(block: &Block, scales: &[f32], factor: f32) -> [i8; LANES] {
    let mut rounded = [0i8; LANES];
    for (rounded, scale) in rounded.iter_mut().zip(scales) {
        *rounded = round_i8(scale / factor);
    }
    let (mut best, mut least) = (rounded, [f32::INFINITY; LANES]);
    for candidates in
        [rounded, rounded.map(|code| code.saturating_sub(1).max(-127)), rounded.map(|code| code.saturating_add(1))]
    {
        let error = squared_error::<L>(block, &lanes(|i| factor * f32::from(candidates[i])));
        for i in 0..LANES {
            let is_better = error[i] < least[i];
            best[i] = if is_better { candidates[i] } else { best[i] };
            least[i] = if is_better { error[i] } else { least[i] };
        }
    }
    best
}

/// The squared error of each group at its scale; 0 makes every weight 0.
#[inline(always)]
fn squared_error<L: Levels>(block: &Block, scale: &Lanes) -> Lanes {
    let inverse = lanes(|i| if scale[i] == 0.0 { 0.0 } else { 1.0 / scale[i] });
    let [error] = sums(block, |i, value| {
        let difference = value - scale[i] * L::nearest(value * inverse[i]);
        [difference * difference]
    });
    error
}

/// `Σ terms(value)` over each group.
#[inline(always)]
fn sums<const N: usize>(block: &Block, terms: impl Fn(usize, f32) -> [f32; N]) -> [Lanes; N] {
    let mut totals = [[0.0; LANES]; N];
    for first in 0..PARTS {
        let columns: [&Lanes; GROUP_SIZE / PARTS] = std::array::from_fn(|k| &block[first + k * PARTS]);
        for i in 0..LANES {
            let mut part = [0.0; N];
            for column in columns {
                let terms = terms(i, column[i]);
                for n in 0..N {
                    part[n] += terms[n];
                }
            }
            for n in 0..N {
                totals[n][i] += part[n];
            }
        }
    }
    totals
}

#[inline(always)]
fn lanes(value: impl Fn(usize) -> f32) -> Lanes {
    std::array::from_fn(value)
}
