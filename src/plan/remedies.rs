//! What would fit where a plan does not: each remedy is found by planning it.

use std::fmt;

use serde::Serialize;

use super::{DevicePlan, Plan, PlanOptions, Speed, Strategy, Subject, bisect};
use crate::bytes::{Bytes, GIB, MIB};
use crate::device::DeviceId;
use crate::error::Result;
use crate::machine::{Bandwidth, Device};
use crate::quant::{KvDtype, QuantizeRules, Scheme};

/// Changes with which a model fits, and what it takes then.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Remedy {
    /// What is to be changed, all of it.
    pub changes: Vec<Change>,
    /// All that is taken then, over all devices.
    pub total: Bytes,
    /// Modules that are in host memory or on the disk then.
    pub off_gpus: usize,
    /// How fast it would be, where the bandwidths are known.
    pub speed: Option<Speed>,
}

/// A change to the options or the machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Change {
    /// Automatic placement in place of the map.
    Automatic,
    /// A larger budget.
    Budget {
        /// The device.
        device: DeviceId,
        /// What may be taken of it.
        max_memory: Bytes,
    },
    /// Fewer sequences at once.
    Batch {
        /// The most that fit.
        sequences: usize,
    },
    /// A shorter context.
    Context {
        /// The longest that fits, in tokens.
        tokens: usize,
    },
    /// Fewer bits for the KV cache.
    KvCache {
        /// The type of its elements.
        dtype: KvDtype,
    },
    /// More memory of a device, or a device that is not there.
    Memory {
        /// The device.
        device: DeviceId,
        /// The memory that it is to have free.
        free: Bytes,
        /// What it lacks of that.
        missing: Bytes,
        /// The bandwidth that is assumed where it is a new device.
        bandwidth: Option<Bandwidth>,
    },
    /// Another placement.
    Placement {
        /// How the modules are to be placed.
        placement: Strategy,
    },
    /// Fewer bits for the weights.
    Quantize {
        /// The scheme.
        scheme: Scheme,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Automatic => f.write_str("automatic placement"),
            Self::Batch { sequences } => write!(f, "a batch of {sequences}"),
            Self::Budget { device, max_memory } => write!(f, "a budget of {max_memory} on {device}"),
            Self::Context { tokens } => write!(f, "a context of {tokens} tokens, the longest that fits"),
            Self::KvCache { dtype } => write!(f, "an {dtype} KV cache"),
            Self::Memory { device: DeviceId::Cpu, free, missing, .. } if free == missing => {
                write!(f, "{free} of host memory")
            }
            Self::Memory { device, missing, .. } => write!(f, "{missing} more on {device}"),
            Self::Placement { placement } => write!(f, "{placement} placement"),
            Self::Quantize { scheme } => write!(f, "{scheme} weights"),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let changes: Vec<_> = self.changes.iter().map(ToString::to_string).collect();
        write!(f, "{}: {} in all", changes.join(" and "), self.total)?;
        let is_new = |change: &Change| matches!(change, Change::Memory { device: DeviceId::Cpu, free, missing, .. } if free == missing);
        if self.changes.iter().any(is_new) {
            let modules = if self.off_gpus == 1 { "module" } else { "modules" };
            write!(f, ", {} {modules} off the GPUs", self.off_gpus)?;
        }
        self.speed.map_or(Ok(()), |speed| write!(f, ", {speed}"))
    }
}

/// Contexts are rounded down to a multiple of this.
const ROUND: usize = 64;
/// What host memory is assumed to do that nothing is said of: two channels of DDR4-3200.
const HOST: Bandwidth = Bandwidth { bytes_per_second: 51_000_000_000, measured: false };

/// Plans what might fit instead of `plan`: the least loss of quality first, then what has to be bought.
pub fn find(subject: &Subject, options: &PlanOptions, plan: &Plan) -> Vec<Remedy> {
    let search = Search { subject, options, plan };
    let mut remedies = Vec::new();
    if options.device_map.is_some() {
        // A scheme that the map names has to be named without it.
        let is_meant = |scheme: &Scheme| {
            options.quantize.is_none()
                && QuantizeRules::whole_model(*scheme).for_embedding(subject.tree.embedding()) == plan.quantize
        };
        let scheme = Scheme::ALL.into_iter().find(is_meant).map(|scheme| Change::Quantize { scheme });
        remedies.extend(search.fitting([Change::Automatic].into_iter().chain(scheme).collect()));
    }
    let ours = Change::Placement { placement: Strategy::Balanced };
    if options.device_map.is_none() && options.strategy != Strategy::Balanced {
        remedies.extend(search.fitting(vec![ours]));
    }
    let before = remedies.len();
    let is_packed = subject.checkpoint.config.packed.is_some();
    let fewer = |scheme: &Scheme| !is_packed && plan.quantize.scheme("") < *scheme;
    let schemes: Vec<_> =
        Scheme::AUTOMATIC.into_iter().filter(fewer).map(|scheme| Change::Quantize { scheme }).collect();
    let kv_cache = (plan.kv_cache != KvDtype::Int8).then_some(Change::KvCache { dtype: KvDtype::Int8 });
    for change in schemes.iter().chain(&kv_cache) {
        remedies.extend(search.fitting(vec![change.clone()]));
    }
    remedies.extend(search.longest_context(Vec::new()));
    remedies.extend(search.largest_batch());
    if remedies.len() == before {
        // Nothing alone fits; all that costs bits, and if need be the context too.
        let all: Vec<_> = schemes.last().into_iter().chain(&kv_cache).cloned().collect();
        let together = search.fitting(all.clone());
        remedies.extend(if together.is_some() { together } else { search.longest_context(all) });
    }
    remedies.extend(search.with_host_memory());
    remedies.extend(search.with_more_memory());
    remedies
}

struct Search<'a> {
    subject: &'a Subject<'a>,
    options: &'a PlanOptions,
    plan: &'a Plan,
}

impl Search<'_> {
    fn plan(&self, changes: &[Change]) -> Result<Plan> {
        let mut options = self.options.clone();
        let mut inventory = self.subject.inventory.clone();
        for change in changes {
            match change {
                Change::Automatic => options.device_map = None,
                Change::Batch { sequences } => options.batch = Some(*sequences),
                Change::Budget { device, max_memory } => {
                    let limits = options.max_memory.get_or_insert_with(|| self.plan.max_memory.clone());
                    limits.insert(*device, *max_memory);
                }
                Change::Context { tokens } => options.context = Some(*tokens),
                Change::KvCache { dtype } => options.kv_cache = Some(*dtype),
                Change::Memory { device, free, bandwidth, .. } => {
                    let devices = &mut inventory.devices;
                    if let Some(device) = devices.iter_mut().find(|known| known.id == *device) {
                        device.free = *free;
                    } else {
                        devices.push(Device { bandwidth: *bandwidth, ..Device::new(*device, *free) });
                        devices.sort_by_key(|device| device.id);
                    }
                }
                Change::Placement { placement } => options.strategy = *placement,
                Change::Quantize { scheme } => options.quantize = Some((*scheme).into()),
            }
        }
        self.subject.plan_on(&inventory, &options)
    }

    /// The remedy of `changes`, if it is one. What cannot be planned is none.
    fn fitting(&self, changes: Vec<Change>) -> Option<Remedy> {
        let plan = self.plan(&changes).ok()?;
        let remedy = Remedy { total: plan.total(), off_gpus: plan.off_gpus(), speed: plan.speed, changes };
        (plan.fits() && !remedy.changes.is_empty()).then_some(remedy)
    }

    /// The longest context that fits after `changes`.
    fn longest_context(&self, mut changes: Vec<Change>) -> Option<Remedy> {
        let longest = self.largest(&changes, self.plan.context, |tokens| Change::Context { tokens })?;
        let tokens = if longest > ROUND { longest / ROUND * ROUND } else { longest };
        changes.push(Change::Context { tokens });
        self.fitting(changes)
    }

    fn largest_batch(&self) -> Option<Remedy> {
        let change = |sequences| Change::Batch { sequences };
        self.fitting(vec![change(self.largest(&[], self.plan.batch, change)?)])
    }

    /// The largest size below that of the plan which fits after `changes`.
    fn largest(&self, changes: &[Change], now: usize, change: impl Fn(usize) -> Change) -> Option<usize> {
        let fits = |size| self.plan(&[changes, &[change(size)]].concat()).is_ok_and(|plan| plan.fits());
        if now > 1 && fits(1) { bisect(1, now - 1, |size| Ok(fits(size))).ok() } else { None }
    }

    /// Blocks in host memory, where no host was described.
    fn with_host_memory(&self) -> Option<Remedy> {
        let devices = &self.subject.inventory.devices;
        if self.options.device_map.is_some() || devices.iter().any(|device| device.id == DeviceId::Cpu) {
            return None;
        }
        let bandwidth = devices.iter().all(|device| device.bandwidth.is_some()).then_some(HOST);
        let memory = |free| Change::Memory { device: DeviceId::Cpu, free, missing: free, bandwidth };
        let roomy = self.plan(&[memory(Bytes(1 << 60))]).ok()?;
        let host = roomy.devices.iter().find(|device| device.id == DeviceId::Cpu)?;
        let needed = (host.total() + host.reserve).0.checked_next_multiple_of(GIB)?;
        self.fitting(vec![memory(Bytes(needed))])
    }

    /// What the devices that overflow lack.
    fn with_more_memory(&self) -> Option<Remedy> {
        let short = self.plan.devices.iter().filter(|device| !device.fits());
        let change = |device: &DevicePlan| {
            let needed = Bytes(device.total().0.checked_next_multiple_of(MIB)?);
            let free = Bytes(needed.0.checked_add(device.reserve.0)?);
            if free <= device.free {
                return Some(Change::Budget { device: device.id, max_memory: needed });
            }
            Some(Change::Memory { device: device.id, free, missing: free - device.free, bandwidth: None })
        };
        self.fitting(short.map(change).collect::<Option<_>>()?)
    }
}
