//! How fast memories are read: stated, known of a GPU by its name, or measured.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ParseError;

/// What is reached of a data sheet's bandwidth.
const REACHED: f64 = 0.85;

/// Data sheets' bandwidths in GB/s, by what a GPU's name contains.
const GPUS: &[(&str, u64)] = &[
    ("A10", 600),
    ("A100", 1555),
    ("A100-SXM4-80GB", 2039),
    ("A100 80GB", 1935),
    ("A30", 933),
    ("A40", 696),
    ("B200", 8000),
    ("GH200", 4000),
    ("H100", 3352),
    ("H100 NVL", 3938),
    ("H100 PCIe", 2039),
    ("H200", 4800),
    ("L4", 300),
    ("L40", 864),
    ("L40S", 864),
    ("P100", 732),
    ("P40", 347),
    ("RTX 2080 Ti", 616),
    ("RTX 3060", 360),
    ("RTX 3060 Ti", 448),
    ("RTX 3070", 448),
    ("RTX 3070 Ti", 608),
    ("RTX 3080", 760),
    ("RTX 3080 Ti", 912),
    ("RTX 3090", 936),
    ("RTX 3090 Ti", 1008),
    ("RTX 4060", 272),
    ("RTX 4060 Ti", 288),
    ("RTX 4070", 504),
    ("RTX 4070 Ti", 504),
    ("RTX 4070 Ti SUPER", 672),
    ("RTX 4080", 717),
    ("RTX 4080 SUPER", 736),
    ("RTX 4090", 1008),
    ("RTX 5060", 448),
    ("RTX 5060 Ti", 448),
    ("RTX 5070", 672),
    ("RTX 5070 Ti", 896),
    ("RTX 5080", 960),
    ("RTX 5090", 1792),
    ("RTX 6000 Ada", 960),
    ("RTX A4000", 448),
    ("RTX A5000", 768),
    ("RTX A6000", 768),
    ("T4", 320),
    ("V100", 900),
];

/// How fast a device reads its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Bytes a second: of a data sheet, or as measured.
    pub bytes_per_second: u64,
    /// Whether it was measured; of a data sheet's figure a part is counted.
    pub measured: bool,
}

impl Bandwidth {
    /// What the data sheet of a GPU says, where its name is a known one.
    pub fn of_gpu(name: &str) -> Option<Self> {
        let words = |text: &str| -> Vec<String> {
            text.split(|c: char| !c.is_ascii_alphanumeric()).map(str::to_ascii_lowercase).collect()
        };
        let name = words(name);
        let contains = |part: &&(&str, u64)| name.windows(words(part.0).len()).any(|window| window == words(part.0));
        let known = GPUS.iter().filter(contains).max_by_key(|part| part.0.len())?;
        Some(Self { bytes_per_second: known.1 * 1_000_000_000, measured: false })
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
            (1.0..=MAX).contains(&bytes).then_some(Self { bytes_per_second: bytes as u64, measured: false })
        };
        let problem = "no bandwidth; write it like `936GB/s`, or name a GPU like `RTX 3090`";
        stated().or_else(|| Self::of_gpu(text)).ok_or_else(|| ParseError::new(text, problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_parse() {
        for (text, gigabytes) in [
            ("936GB/s", 936),
            (" 1008 GB/s", 1008),
            ("RTX 3090", 936),
            ("NVIDIA GeForce RTX 3090 Ti", 1008),
            ("NVIDIA H200", 4800),
            ("NVIDIA A100-SXM4-80GB", 2039),
            ("NVIDIA A100-SXM4-40GB", 1555),
            ("NVIDIA L40S", 864),
            ("nvidia l4", 300),
        ] {
            assert_eq!(text.parse(), Ok(Bandwidth { bytes_per_second: gigabytes * 1_000_000_000, measured: false }));
        }
        for text in ["", "936", "0GB/s", "-1GB/s", "NaNGB/s", "infGB/s", "1e30GB/s", "RTX", "H100x", "fast"] {
            assert!(text.parse::<Bandwidth>().is_err(), "{text}");
        }
    }
}
