//! Plain Rust for any processor.

use super::{Codes, NIBBLES, PARTS, Quantized, ROWS, Row, TILE, Token};
use crate::quant::GROUP_SIZE;

pub fn few(codes: Codes, rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
    rows.map(|row| total(codes, row, x))
}

pub fn many(codes: Codes, rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
    for (token, totals) in totals[..x.tokens()].iter_mut().enumerate() {
        *totals = rows.map(|row| total(codes, row, x.token(token)));
    }
}

fn total(codes: Codes, row: Row, x: Token) -> f32 {
    let levels = codes.levels();
    let mut parts = [0.0f32; PARTS];
    let groups = row.codes.chunks_exact(codes.group_bytes()).zip(x.codes);
    for (g, (group, x_group)) in groups.enumerate() {
        let mut unpacked = [0i8; GROUP_SIZE];
        if codes == Codes::Int8 {
            for (level, code) in unpacked.iter_mut().zip(group) {
                *level = code.cast_signed();
            }
        } else {
            let (low, high) = unpacked.split_at_mut(NIBBLES);
            for ((code, low), high) in group.iter().zip(low).zip(high) {
                *low = levels[usize::from(code & 0x0f)];
                *high = levels[usize::from(code >> 4)];
            }
        }
        let dot: i32 =
            unpacked.iter().zip(x_group.as_flattened()).map(|(level, x)| i32::from(*level) * i32::from(*x)).sum();
        let scale = row.sub_scales.get(g).map_or(1.0, |sub_scale| f32::from(*sub_scale)) * x.scales[g];
        parts[g % PARTS] = (dot as f32).mul_add(scale, parts[g % PARTS]);
    }
    ((parts[0] + parts[1]) + parts[2]) + parts[3]
}
