//! Numbers of bytes: a checked type, its two spellings in text, and its printing.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ParseError;

/// 1 KiB in bytes.
pub const KIB: u64 = 1 << 10;
/// 1 MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// 1 GiB in bytes.
pub const GIB: u64 = 1 << 30;
/// Binary units, the largest first.
const UNITS: [(u64, &str); 3] = [(GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")];

/// A number of bytes.
///
/// Prints in binary units with one decimal (`23.6 GiB`). Adding and subtracting
/// saturate, so that no size wraps round to something that fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// The number of bytes as a `usize`, for lengths of memory.
    pub fn as_usize(self) -> Option<usize> {
        usize::try_from(self.0).ok()
    }

    /// The spelling that a device map carries: the largest binary unit that
    /// divides the number, or a plain integer as text.
    pub fn exact(self) -> String {
        let divides = |(unit, _): &(u64, &str)| self.0 >= *unit && self.0.is_multiple_of(*unit);
        match UNITS.into_iter().find(divides) {
            Some((unit, name)) => format!("{}{name}", self.0 / unit),
            None => self.0.to_string(),
        }
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Bytes {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&match UNITS.into_iter().find(|(unit, _)| self.0 >= *unit) {
            Some((unit, name)) => format!("{:.1} {name}", self.0 as f64 / unit as f64),
            None => format!("{} B", self.0),
        })
    }
}

impl FromStr for Bytes {
    type Err = ParseError;

    /// Reads `24GiB`, `1.5GB`, `512 MiB`, `100KB`, `1TiB` or a plain number of
    /// bytes. Case does not matter; a lowercase final `b` after `KB`, `MB` or
    /// `GB` means bits to Accelerate and is refused here as ambiguous.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const PROBLEM: &str = "not a size; write it like `10GiB`, `512MiB`, `10GB` or as a number of bytes";
        let error = || ParseError::new(text, PROBLEM);
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let unit = unit.trim_start();
        if unit.is_empty() {
            return number.parse().map(Self).map_err(|_| error());
        }
        if unit.ends_with('b') && unit.len() == 2 {
            return Err(error());
        }
        let factor: u64 = match unit.to_ascii_uppercase().as_str() {
            "KIB" => KIB,
            "MIB" => MIB,
            "GIB" => GIB,
            "TIB" => GIB * KIB,
            "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(error()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Self).ok_or_else(error);
        }
        let fraction: f64 = number.parse().map_err(|_| error())?;
        let bytes = fraction * factor as f64;
        if !(0.0..u64::MAX as f64).contains(&bytes) {
            return Err(error());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range is checked above")]
        Ok(Self(bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("0MB", 0),
            ("100MB", 100_000_000),
            ("2GiB", 2 * GIB),
            ("512KiB", 512 * KIB),
            ("1.5GB", 1_500_000_000),
            ("100KB", 100_000),
            ("500", 500),
            ("10GiB", 10_737_418_240),
            ("46GIB", 49_392_123_904),
            ("10gib", 10 * GIB),
            (" 10 GB", 10_000_000_000),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "GiB", "7B", "-1GB", "5MBB", "5k0MB", "1.2.3GB", "10Gb", "nan", "99999999999999TiB", "1e3"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_in_binary_units() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (13 * MIB, "13.0 MiB"), (25_340_000_000, "23.6 GiB")]
        {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn the_exact_spelling_reads_back() {
        for bytes in [0, 1, 1024, 1500, 10 * GIB, 10 * GIB + 1, 24_576 * MIB] {
            assert_eq!(Bytes(bytes).exact().parse(), Ok(Bytes(bytes)));
        }
    }
}
