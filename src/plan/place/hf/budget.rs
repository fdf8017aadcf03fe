//! What each device may take: `get_max_memory`, `get_balanced_memory` and the
//! reserve of bitsandbytes' `adjust_max_memory`.

use std::collections::BTreeMap;

use super::Model;
use super::flat::Flat;
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::device_map::MaxMemory;
use crate::error::{Error, Result};
use crate::plan::Strategy;

/// The part of free memory that is planned with.
const USED: f64 = 0.9;

/// The budgets of `strategy`, in whole bytes; the disk has no limit.
///
/// - `max_memory` holds as it is, also above what is free, and a device that
///   it does not name is not used; without it, `free` holds, the host's at 90 %;
/// - `auto` and `balanced_low_0` limit every GPU but the last to
///   `model / GPUs + 1.25 * largest`, of which the largest is a module that is
///   not split or one's own tensors; a single GPU has 90 % unless `max_memory`
///   says otherwise; `balanced_low_0` divides by one GPU less and leaves GPU 0
///   what the others cannot take;
/// - bitsandbytes keeps 10 % of every budget.
///
/// Products are rounded as Python's floats are, and compared with whole
/// numbers only, so that what is behind the point makes no difference.
///
/// # Errors
/// `balanced_low_0` and GPUs that are not numbered from 0 without a gap,
/// for which Transformers raises a `KeyError`.
pub fn budgets(
    model: &Model,
    free: &MaxMemory,
    max_memory: Option<&MaxMemory>,
    strategy: Strategy,
) -> Result<MaxMemory> {
    let mut budgets: BTreeMap<DeviceId, f64> =
        max_memory.unwrap_or(free).iter().map(|(id, bytes)| (*id, bytes.0 as f64)).collect();
    if max_memory.is_none() {
        budgets.remove(&DeviceId::Disk);
        budgets.entry(DeviceId::Cpu).and_modify(|budget| *budget *= USED);
    }
    if strategy != Strategy::HfSequential {
        balance(model, &mut budgets, max_memory.is_none(), strategy == Strategy::HfBalancedLowZero)?;
    }
    if model.is_quantized {
        for budget in budgets.values_mut() {
            *budget *= USED;
        }
    }
    // A budget is no less than zero, and one beyond u64 is no limit.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "truncated on purpose")]
    Ok(budgets.into_iter().map(|(id, budget)| (id, Bytes(budget as u64))).collect())
}

fn balance(model: &Model, budgets: &mut BTreeMap<DeviceId, f64>, is_default: bool, low_zero: bool) -> Result<()> {
    let is_gpu = |id: &DeviceId| id.is_gpu();
    let usable: Vec<DeviceId> =
        budgets.iter().filter(|(id, budget)| is_gpu(id) && **budget > 0.0).map(|(id, _)| *id).collect();
    let Some((_, all_but_last)) = usable.split_last() else {
        return Ok(());
    };
    if all_but_last.is_empty() {
        // The first GPU that is listed gives way, even where another is the one that is usable.
        if let Some((_, budget)) = budgets.iter_mut().find(|(id, _)| is_gpu(id) && is_default) {
            *budget *= USED;
        }
        return Ok(());
    }
    let flat = Flat::new(model);
    let sharing = if low_zero { all_but_last.len() } else { usable.len() };
    let largest = flat.largest_unit();
    let buffer = largest.saturating_add(largest / 4);
    let share = (flat.total() / sharing as u64).saturating_add(buffer) as f64;
    for id in all_but_last.iter().filter(|id| !(low_zero && **id == DeviceId::Cuda(0))) {
        budgets.entry(*id).and_modify(|budget| *budget = budget.min(share));
    }
    if low_zero {
        let gap = |index: u32| {
            Error::usage(format!(
                "`balanced_low_0` of Transformers needs GPUs that are numbered from 0 without a gap; there is no GPU {index}"
            ))
        };
        let mut others = 0.0;
        for index in (1..).take(all_but_last.len()) {
            others += budgets.get(&DeviceId::Cuda(index)).ok_or_else(|| gap(index))?;
        }
        let first = budgets.get_mut(&DeviceId::Cuda(0)).ok_or_else(|| gap(0))?;
        *first = first.min((flat.total() as f64 - others).max(0.0));
    }
    Ok(())
}
