//! Seeded matrices that are distributed as weights are, and what a scheme makes of them.

use evenkeel::pool::Pool;
use evenkeel::quant::{Storage, WeightDtype, squared_error};

/// Distributions, with the bars of the relative squared error in thousandths for int4 and nl4.
pub const DISTRIBUTIONS: [(&str, f64, f64); 3] = [("gauss", 7.3, 5.9), ("t5", 11.3, 7.8), ("laplace", 11.2, 7.7)];

/// A generator of uniform numbers in (0, 1).
pub struct Random(pub u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 + f64::EPSILON / 4.0
    }

    fn gauss(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn draw(&mut self, distribution: &str) -> f64 {
        match distribution {
            "gauss" => self.gauss(),
            "t5" => {
                let chi: f64 = (0..5).map(|_| self.gauss().powi(2)).sum();
                self.gauss() / (chi / 5.0).sqrt()
            }
            "laplace" => (self.uniform() / self.uniform()).ln(),
            _ => unreachable!("{distribution}"),
        }
    }
}

/// `rows` × `cols` weights in f32, little-endian; rows and columns differ in size as those of a layer do.
pub fn matrix(distribution: &str, rows: usize, cols: usize) -> Vec<u8> {
    let mut random = Random(7);
    let columns: Vec<f64> = (0..cols).map(|_| (0.15 * random.gauss()).exp()).collect();
    let mut bytes = Vec::with_capacity(rows * cols * 4);
    for _ in 0..rows {
        let row = 0.02 * (0.25 * random.gauss()).exp();
        for column in &columns {
            #[allow(clippy::cast_possible_truncation)]
            let weight = (row * column * random.draw(distribution)) as f32;
            bytes.extend_from_slice(&weight.to_le_bytes());
        }
    }
    bytes
}

/// The squared error of `storage` over the squared weights, in thousandths.
pub fn relative_error(storage: Storage, cols: usize, weights: &[u8]) -> f64 {
    let (error, norm) = squared_error(&Pool::default(), storage, WeightDtype::F32, cols, weights).unwrap();
    1000.0 * error / norm
}
