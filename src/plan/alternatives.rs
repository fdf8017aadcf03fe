//! What the other ways to place a model would have given.

use std::fmt;

use serde::Serialize;

use super::{DevicePlan, Inventory, Plan, PlanOptions, Strategy};
use crate::checkpoint::Checkpoint;
use crate::device::DeviceId;

/// A placement in a line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outline {
    /// How the modules are placed.
    pub placement: Strategy,
    /// Whether every device has room.
    pub fits: bool,
    /// GPUs that hold modules.
    pub gpus: usize,
    /// The largest share of a GPU's budget that is taken; 0 where no GPU is used.
    pub fullest: f64,
    /// Modules that are in host memory or on the disk.
    pub off_gpus: usize,
}

impl Outline {
    fn of(plan: &Plan, placement: Strategy) -> Self {
        let gpus = || plan.devices.iter().filter(|device| matches!(device.id, DeviceId::Cuda(_)) && device.modules > 0);
        let share = |device: &DevicePlan| device.total().0 as f64 / device.budget.0.max(1) as f64;
        Self {
            placement,
            fits: plan.fits(),
            gpus: gpus().count(),
            fullest: gpus().map(share).fold(0.0, f64::max),
            off_gpus: plan.modules.len() - gpus().map(|device| device.modules).sum::<usize>(),
        }
    }
}

impl fmt::Display for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpus = if self.gpus == 1 { "GPU" } else { "GPUs" };
        write!(f, "{:<17}  {} {gpus}", self.placement, self.gpus)?;
        if self.gpus > 0 {
            write!(f, ", the fullest at {:.0} % of its budget", 100.0 * self.fullest)?;
        }
        if self.off_gpus > 0 {
            write!(f, ", {} modules elsewhere", self.off_gpus)?;
        }
        if self.fits { Ok(()) } else { f.write_str(", does not fit") }
    }
}

/// The outline of every strategy for the same model and machine, that of the
/// options first; none where there are no GPUs to choose from or a map decides.
pub fn outlines(checkpoint: &Checkpoint, inventory: &Inventory, options: &PlanOptions, plan: &Plan) -> Vec<Outline> {
    let gpus = inventory.devices.iter().filter(|device| matches!(device.id, DeviceId::Cuda(_))).count();
    if gpus == 0 || options.device_map.is_some() {
        return Vec::new();
    }
    let others = Strategy::ALL.into_iter().filter(|strategy| *strategy != options.strategy);
    let outline = |strategy| {
        let options = PlanOptions { strategy, ..options.clone() };
        // Transformers cannot place every model on every machine.
        let plan = Plan::without_remedies(checkpoint, inventory, &options).ok()?;
        Some(Outline::of(&plan, strategy))
    };
    [Outline::of(plan, options.strategy)].into_iter().chain(others.filter_map(outline)).collect()
}
