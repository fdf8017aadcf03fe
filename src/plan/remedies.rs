//! What would fit where a plan does not: each remedy is found by planning it.

use std::fmt;

use serde::Serialize;

use super::{Plan, PlanOptions, Strategy};
use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::plan::Inventory;
use crate::quant::{QuantizeRules, Scheme};

/// A change that makes a model fit, or what is missing.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Remedy {
    /// Our own placement in place of the one that was asked for.
    Balanced,
    /// A shorter context.
    Context {
        /// The longest context that fits, in tokens.
        tokens: usize,
    },
    /// More memory on the devices that compute.
    Memory {
        /// Bytes that are missing over all devices.
        missing: Bytes,
    },
    /// Automatic placement in place of the map.
    Placement,
    /// Fewer bits.
    Quantize {
        /// The scheme that fits.
        scheme: Scheme,
        /// Bytes over all devices.
        total: Bytes,
    },
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Balanced => write!(f, "`--placement {}` fits", Strategy::Balanced),
            Self::Context { tokens } => write!(f, "`--context {tokens}` is the longest context that fits"),
            Self::Memory { missing } => write!(f, "nothing else fits; {missing} of memory are missing"),
            Self::Placement => write!(f, "`--device-map auto` fits"),
            Self::Quantize { scheme, total } => write!(f, "`--quantize {scheme}` fits and takes {total}"),
        }
    }
}

/// Contexts are rounded down to a multiple of this.
const ROUND: usize = 64;

/// Plans what might fit instead of `plan`.
pub fn find(checkpoint: &Checkpoint, inventory: &Inventory, options: &PlanOptions, plan: &Plan) -> Result<Vec<Remedy>> {
    let attempt = |change: &dyn Fn(&mut PlanOptions)| {
        let mut options = options.clone();
        change(&mut options);
        Plan::without_remedies(checkpoint, inventory, &options)
    };
    let mut remedies = Vec::new();
    if options.device_map.is_some() && attempt(&|options| fix_conditions(options, plan))?.fits() {
        remedies.push(Remedy::Placement);
    }
    if options.strategy != Strategy::Balanced && attempt(&|options| options.strategy = Strategy::Balanced)?.fits() {
        remedies.push(Remedy::Balanced);
    }
    for scheme in Scheme::ALL {
        let other = attempt(&|options| options.quantize = Some(QuantizeRules::whole_model(scheme)))?;
        if other.weights() < plan.weights() && other.fits() {
            let total = other.devices.iter().filter(|device| device.modules > 0).map(super::DevicePlan::total).sum();
            remedies.push(Remedy::Quantize { scheme, total });
        }
    }
    let fits_with = |tokens: usize| -> Result<bool> { Ok(attempt(&|options| options.context = Some(tokens))?.fits()) };
    if fits_with(1)? {
        // The bytes grow with the context, so the longest that fits is found by halving.
        let (mut fitting, mut too_long) = (1, plan.context);
        while too_long - fitting > 1 {
            let middle = usize::midpoint(fitting, too_long);
            if fits_with(middle)? {
                fitting = middle;
            } else {
                too_long = middle;
            }
        }
        remedies.push(Remedy::Context { tokens: if fitting > ROUND { fitting / ROUND * ROUND } else { fitting } });
    }
    if remedies.is_empty() {
        let missing = plan.devices.iter().map(super::DevicePlan::missing).sum();
        remedies.push(Remedy::Memory { missing });
    }
    Ok(remedies)
}

/// The map's conditions without its placement.
fn fix_conditions(options: &mut PlanOptions, plan: &Plan) {
    options.device_map = None;
    options.quantize = Some(plan.quantize.clone());
    (options.context, options.batch) = (Some(plan.context), Some(plan.batch));
    options.max_memory = Some(plan.max_memory.clone());
}

impl Plan {
    fn weights(&self) -> Bytes {
        self.modules.iter().map(|module| module.weights).sum()
    }
}
