//! Plans in a line, and the other ways to place a model.

use std::fmt;

use serde::Serialize;

use super::subject::Subject;
use super::{DevicePlan, Plan, PlanOptions, Speed, Strategy};
use crate::bytes::Bytes;
use crate::quant::Scheme;

/// A plan in a line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outline {
    /// How the modules are placed.
    pub placement: Strategy,
    /// The scheme of most modules.
    pub scheme: Scheme,
    /// Whether each projection has its own.
    pub is_mixed: bool,
    /// Whether every device has room.
    pub fits: bool,
    /// All that it takes, over all devices.
    pub total: Bytes,
    /// GPUs that hold modules.
    pub gpus: usize,
    /// The largest share of a GPU's budget that is taken; 0 where no GPU is used.
    pub fullest: f64,
    /// Modules that are in host memory or on the disk.
    pub off_gpus: usize,
    /// How fast it would be, where the bandwidths are known.
    pub speed: Option<Speed>,
}

impl Outline {
    pub(super) fn of(plan: &Plan, placement: Strategy) -> Self {
        let gpus = || plan.devices.iter().filter(|device| device.id.is_gpu() && device.modules > 0);
        let share = |device: &DevicePlan| device.total().0 as f64 / device.budget.0.max(1) as f64;
        Self {
            placement,
            scheme: plan.quantize.scheme(""),
            is_mixed: false,
            fits: plan.fits(),
            total: plan.total(),
            gpus: gpus().count(),
            fullest: gpus().map(share).fold(0.0, f64::max),
            off_gpus: plan.off_gpus(),
            speed: plan.speed,
        }
    }
}

impl fmt::Display for Outline {
    /// What came of it, without what it was made under.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpus = if self.gpus == 1 { "GPU" } else { "GPUs" };
        write!(f, "{} {gpus}", self.gpus)?;
        if self.gpus > 0 {
            write!(f, ", the fullest at {:.0} % of its budget", 100.0 * self.fullest)?;
        }
        if self.off_gpus > 0 {
            let modules = if self.off_gpus == 1 { "module" } else { "modules" };
            write!(f, ", {} {modules} elsewhere", self.off_gpus)?;
        }
        match self.speed {
            _ if !self.fits => f.write_str(", does not fit"),
            Some(speed) => write!(f, ", {speed}"),
            None => Ok(()),
        }
    }
}

/// The outline of every strategy for the same model and machine, that of the
/// options first; none where there are no GPUs to choose from or a map decides.
pub fn placements(subject: &Subject, options: &PlanOptions, plan: &Plan) -> Vec<Outline> {
    let has_gpus = subject.inventory.devices.iter().any(|device| device.id.is_gpu());
    if !has_gpus || options.device_map.is_some() {
        return Vec::new();
    }
    let others = Strategy::ALL.into_iter().filter(|strategy| *strategy != options.strategy);
    let outline = |strategy| {
        // Transformers cannot place every model on every machine, and the fastest takes bandwidths.
        let plan = subject.plan(&PlanOptions { strategy, ..options.clone() }).ok()?;
        Some(Outline::of(&plan, strategy))
    };
    [Outline::of(plan, options.strategy)].into_iter().chain(others.filter_map(outline)).collect()
}
