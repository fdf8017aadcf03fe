//! A scheme for each projection: the least measured error that fits.

use super::group::{Group, groups};
use super::knapsack::{Frontier, Item};
use super::sample::{Loss, losses};
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::error::Result;
use crate::footprint;
use crate::model_config::ModelConfig;
use crate::plan::subject::Subject;
use crate::plan::{Plan, PlanOptions, Quantize, bisect};
use crate::quant::{QuantizeRules, Scheme};

/// Options of least measured error with which the plan fits and no more modules leave the GPUs
/// than in `plan`, which `options` give; with its plan. `None` where the error was not measured,
/// or where the options' own is the least.
///
/// Only what is on GPUs is chosen for, or all where there are none: what is not keeps its scheme.
pub fn refine(subject: &Subject, options: &PlanOptions, plan: &Plan) -> Result<Option<(PlanOptions, Plan)>> {
    let all = groups(&subject.tree, &subject.weights);
    let Some(losses) = losses(subject.checkpoint, &all, options)? else {
        return Ok(None);
    };
    let has_gpus = plan.devices.iter().any(|device| device.id.is_gpu());
    let is_meant = |device: DeviceId| device.is_gpu() == has_gpus;
    let mut schemes: Vec<(&str, Scheme)> =
        all.iter().map(|group| (group.path.as_str(), plan.quantize.scheme(&group.path))).collect();
    let meant: Vec<usize> = (0..all.len()).filter(|at| is_meant(plan.modules[all[*at].module].device)).collect();
    let classes: Vec<_> = meant.iter().map(|at| items(&subject.checkpoint.config, &all[*at], losses[*at])).collect();
    let position = |scheme| Scheme::AUTOMATIC.iter().position(|known| *known == scheme).unwrap_or(0);
    let own: Vec<usize> = meant.iter().map(|at| position(schemes[*at].1)).collect();
    let chosen = |choices: &[usize]| -> Vec<Item> {
        classes.iter().zip(choices).map(|(class, choice)| class[*choice]).collect()
    };

    // What the plan leaves, and what the groups take in it.
    let left = plan.devices.iter().filter(|device| is_meant(device.id)).map(|device| device.budget - device.total());
    let taken = chosen(&own).iter().map(|item| Bytes(item.size)).sum();
    let Some(frontier) = Frontier::new(&classes, (left.sum::<Bytes>() + taken).0) else {
        return Ok(None);
    };

    let mut with = |choices: &[usize]| {
        for (at, choice) in meant.iter().zip(choices) {
            schemes[*at].1 = Scheme::AUTOMATIC[*choice];
        }
        let quantize = Some(Quantize::Rules(QuantizeRules::shortest(&schemes)));
        let options = PlanOptions { quantize, ..options.clone() };
        let mixed = subject.plan(&options)?;
        Ok((mixed.fits() && mixed.off_gpus() <= plan.off_gpus()).then_some((options, mixed)))
    };
    let steps = bisect(0, frontier.steps, |steps| Ok(with(&frontier.choices(steps))?.is_some()))?;
    let choices = frontier.choices(steps);
    let cost = |choices: &[usize]| chosen(choices).iter().map(|item| item.cost).sum::<f64>();
    if cost(&choices) < cost(&own) { with(&choices) } else { Ok(None) }
}

/// What a group takes and loses in each of [`Scheme::AUTOMATIC`].
fn items(config: &ModelConfig, group: &Group, loss: Loss) -> Vec<Item> {
    let importance = group.importance(config);
    let item = |scheme| {
        let rules = QuantizeRules::new(vec![(String::new(), scheme)]);
        // It was laid out in the plan, where it may have taken more.
        let bytes = group.weights().map(|weight| footprint::weight_bytes(weight, &rules).unwrap_or_default());
        Item { size: bytes.sum::<Bytes>().0, cost: importance * loss.of(scheme) }
    };
    Scheme::AUTOMATIC.map(item).into()
}
