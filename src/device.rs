//! Names of the places that weights can be put: `cuda:0`, `cpu`, `disk`.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::bytes::Bytes;
use crate::error::{ParseError, first_five};

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

    /// Reads `cuda:1`, `cpu`, `disk`, and an index alone (`1`) or `cuda` for the first GPU, as Hugging Face has them.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // No sign and no leading zeros.
        let index = |digits: &str| digits.parse().ok().filter(|index: &u32| index.to_string() == digits);
        let device = match text {
            "cpu" => Some(Self::Cpu),
            "disk" => Some(Self::Disk),
            "cuda" => Some(Self::Cuda(0)),
            _ => index(text.strip_prefix("cuda:").unwrap_or(text)).map(Self::Cuda),
        };
        device.ok_or_else(|| ParseError::new(text, "not a device; devices are `cuda:0`, `cuda:1`, …, `cpu` and `disk`"))
    }
}

/// What is wrong with a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver does not show it.
    #[error("no NVIDIA driver was found, or it shows no {0}")]
    Absent(DeviceId),
    /// It failed: what it cannot do, and what its driver says.
    #[error("{0} {1}")]
    Failed(DeviceId, String),
    /// It refused memory.
    #[error("{device} cannot give {needed} for {what}, {} free: {why}", .free.map_or("an unknown number of bytes are".to_owned(), |free| format!("{free} are")))]
    Refused {
        /// The device.
        device: DeviceId,
        /// What was asked for.
        needed: Bytes,
        /// What was free; `None` where the device does not tell.
        free: Option<Bytes>,
        /// What it was for.
        what: String,
        /// What its driver says.
        why: String,
    },
    /// It has less free than was planned.
    #[error("{device} has {free} free, {} less than the {planned} that were planned", *.planned - *.free)]
    Shortfall {
        /// The device.
        device: DeviceId,
        /// What the plan takes of it.
        planned: Bytes,
        /// What is free.
        free: Bytes,
    },
    /// A budget is set for a device that is not among those that can be used.
    #[error("a budget is set for {device}, which cannot be used; what can be is {}", listed(usable))]
    Budget {
        /// The device.
        device: DeviceId,
        /// The devices that can be used.
        usable: Vec<DeviceId>,
    },
    /// A placement needs devices that are not among those that can be used.
    #[error("the placement needs {}; what can be used is {}", first_five(devices), listed(usable))]
    Unusable {
        /// The devices that it needs.
        devices: Vec<DeviceId>,
        /// The devices that can be used.
        usable: Vec<DeviceId>,
    },
}

fn listed(devices: &[DeviceId]) -> String {
    devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl DeviceError {
    /// The devices that it is about.
    pub fn devices(&self) -> &[DeviceId] {
        match self {
            Self::Absent(device)
            | Self::Budget { device, .. }
            | Self::Failed(device, _)
            | Self::Refused { device, .. }
            | Self::Shortfall { device, .. } => std::slice::from_ref(device),
            Self::Unusable { devices, .. } => devices,
        }
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
        assert_eq!("cuda".parse(), Ok(DeviceId::Cuda(0)));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for text in ["", "gpu0", "-1", "1.5", "cuda:", "cuda:-1", "cuda:01", "CPU", "cuda:99999999999", "mps"] {
            assert!(text.parse::<DeviceId>().is_err(), "{text}");
        }
    }
}
