//! How fast a plan would be: a prediction from memory bandwidths.
//!
//! A token of one sequence reads every weight and the KV cache once, so its
//! time is the sum over devices of bytes over bandwidth, with a little for
//! each block's launches and each change of device.

use std::fmt;

use serde::Serialize;

use super::{DevicePlan, PlannedModule};
use crate::device::DeviceId;
use crate::machine::Bandwidth;

/// Seconds that a block takes beside its reading: some five launches, or the pool's barriers.
pub const BLOCK: f64 = 20e-6;
/// Seconds that the hidden state takes from one device to the next.
pub const HOP: f64 = 30e-6;
/// A disk of which nothing is said.
const DISK: Bandwidth = Bandwidth { bytes_per_second: 1_000_000_000, measured: true };

/// Seconds that a device takes for each byte; `None` where its bandwidth is not known.
pub fn pace(device: &DevicePlan) -> Option<f64> {
    let bandwidth = device.bandwidth.or_else(|| (device.id == DeviceId::Disk).then_some(DISK))?;
    Some(bandwidth.seconds_per_byte())
}

/// Predicted tokens a second of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// With the context empty.
    pub at_first: f64,
    /// With the context full.
    pub at_last: f64,
}

impl Speed {
    /// The speed of a plan; `None` where a bandwidth is not known.
    pub fn predict(devices: &[DevicePlan], modules: &[PlannedModule], batch: usize) -> Option<Self> {
        let (mut at_first, mut kv) = (0.0, 0.0);
        let mut current = None;
        for module in modules {
            let device = devices.iter().find(|device| device.id == module.device)?;
            at_first += module.read.0 as f64 * pace(device)?;
            if module.is_block() {
                at_first += BLOCK;
            }
            if current.is_some_and(|current| current != device.id) {
                at_first += HOP;
            }
            current = Some(device.id);
            // The KV cache of blocks on the disk is in host memory.
            let holder = devices.iter().find(|device| device.id == super::device_plan::memory_device(module.device))?;
            kv += module.kv_cache.0 as f64 / batch as f64 * pace(holder)?;
        }
        (at_first > 0.0).then(|| Self { at_first: 1.0 / at_first, at_last: 1.0 / (at_first + kv) })
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tok/s predicted", digits(self.at_last))
    }
}

/// Two digits, as no prediction has more.
pub(super) fn digits(value: f64) -> String {
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}
