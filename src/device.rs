//! Names of the places that weights can be put: `cuda:0`, `cpu`, `disk`.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::error::ParseError;

/// A place for weights, ordered as they are filled: GPUs, the CPU, the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceId {
    /// A GPU by its index after `CUDA_VISIBLE_DEVICES`.
    Cuda(u32),
    /// Host memory; the CPU computes.
    Cpu,
    /// A packed file on the disk, mapped; the CPU computes.
    Disk,
}

impl DeviceId {
    /// Whether it is a GPU.
    pub fn is_gpu(self) -> bool {
        matches!(self, Self::Cuda(_))
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cuda(index) => f.pad(&format!("cuda:{index}")),
            Self::Cpu => f.pad("cpu"),
            Self::Disk => f.pad("disk"),
        }
    }
}

impl FromStr for DeviceId {
    type Err = ParseError;

    /// Reads `cuda:1`, `cpu`, `disk`, and an index alone (`1`) as Hugging Face writes it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let index = |digits: &str| {
            let canonical = digits.chars().all(|c| c.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
            canonical.then(|| digits.parse().ok()).flatten()
        };
        let device = match text {
            "cpu" => Some(Self::Cpu),
            "disk" => Some(Self::Disk),
            _ => index(text.strip_prefix("cuda:").unwrap_or(text)).map(Self::Cuda),
        };
        device.ok_or_else(|| ParseError::new(text, "not a device; devices are `cuda:0`, `cuda:1`, …, `cpu` and `disk`"))
    }
}

impl Serialize for DeviceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_and_print() {
        for (text, device) in [
            ("cuda:0", DeviceId::Cuda(0)),
            ("cuda:17", DeviceId::Cuda(17)),
            ("cpu", DeviceId::Cpu),
            ("disk", DeviceId::Disk),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("3".parse(), Ok(DeviceId::Cuda(3)));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for text in ["", "gpu0", "-1", "1.5", "cuda", "cuda:", "cuda:-1", "cuda:01", "CPU", "cuda:99999999999", "mps"] {
            assert!(text.parse::<DeviceId>().is_err(), "{text}");
        }
    }
}
