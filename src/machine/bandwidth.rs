//! How fast memories are read: stated, known of a GPU by its name, or measured.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Card;
use crate::error::ParseError;

/// What is reached of a data sheet's bandwidth.
const REACHED: f64 = 0.85;

/// How fast a device reads its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Bytes a second: of a data sheet, or as measured.
    pub bytes_per_second: u64,
    /// Whether it was measured; of a data sheet's figure a part is counted.
    pub measured: bool,
}

impl Bandwidth {
    /// What a data sheet says.
    pub fn stated(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, measured: false }
    }

    /// That of a device that read `bytes` within `seconds`.
    pub fn measured(bytes: usize, seconds: f64) -> Self {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a saturating cast")]
        let bytes_per_second = (bytes as f64 / seconds) as u64;
        Self { bytes_per_second: bytes_per_second.max(1), measured: true }
    }

    /// Seconds that a byte takes, where as much of a data sheet's figure is reached as usual.
    pub fn seconds_per_byte(self) -> f64 {
        let share = if self.measured { 1.0 } else { REACHED };
        1.0 / (self.bytes_per_second as f64 * share)
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}GB/s", self.bytes_per_second as f64 / 1e9)
    }
}

impl FromStr for Bandwidth {
    type Err = ParseError;

    /// Reads `936GB/s` or a GPU's name.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        /// 1 PB/s is beyond any device.
        const MAX: f64 = 1e15;
        let stated = || {
            let number: f64 = text.trim().strip_suffix("GB/s")?.trim().parse().ok()?;
            let bytes = number * 1e9;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and MAX")]
            (1.0..=MAX).contains(&bytes).then_some(Self::stated(bytes as u64))
        };
        let problem = "no bandwidth; write it like `936GB/s`, or name a GPU like `RTX 3090`";
        let known = || Card::of(text).map(|card| Self::stated(card.bytes_per_second));
        stated().or_else(known).ok_or_else(|| ParseError::new(text, problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_parse() {
        for (text, gigabytes) in [("936GB/s", 936), (" 1008 GB/s", 1008), ("RTX 3090", 936)] {
            assert_eq!(text.parse(), Ok(Bandwidth::stated(gigabytes * 1_000_000_000)));
        }
        for text in ["", "936", "0GB/s", "-1GB/s", "NaNGB/s", "infGB/s", "1e30GB/s", "RTX", "H100x", "fast"] {
            assert!(text.parse::<Bandwidth>().is_err(), "{text}");
        }
    }
}
