//! A scheme for each projection: the least measured error that fits.

use super::group::{Group, groups};
use super::knapsack::{Frontier, Item};
use super::sample::{Loss, losses};
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::error::Result;
use crate::footprint;
use crate::plan::options::Conditions;
use crate::plan::subject::{Size, Subject, weight_size};
use crate::plan::{Plan, PlanOptions, Quantize, bisect};
use crate::quant::{QuantizeRules, Scheme};

/// Options of least measured error with which the plan fits and no more modules leave the GPUs
/// than in `plan`, which `options` give; with its plan. `None` where the error was not measured,
/// or where the options' own is the least.
///
/// Only what is on GPUs is chosen for, or all where there are none: what is not keeps its scheme.
pub fn refine(subject: &Subject, options: &PlanOptions, plan: &Plan) -> Result<Option<(PlanOptions, Plan)>> {
    let all = groups(subject.tree, &subject.weights);
    let Some(losses) = losses(subject.checkpoint, &all, options)? else {
        return Ok(None);
    };
    let has_gpus = plan.devices.iter().any(|device| device.id.is_gpu());
    let is_meant = |device: DeviceId| device.is_gpu() == has_gpus;
    let candidates: Vec<Candidate> = all
        .iter()
        .zip(losses)
        .filter(|(group, _)| is_meant(plan.modules[group.module].device))
        .map(|(group, loss)| Candidate::new(subject, group, loss, &plan.quantize))
        .collect();

    // What the modules take beside the groups' weights, and what there is for these.
    let mut rest: Vec<Size> = plan.modules.iter().map(|m| Size { packed: m.weights, read: m.read }).collect();
    for candidate in &candidates {
        let (size, of_group) = (&mut rest[candidate.group.module], candidate.sizes[candidate.own]);
        *size = Size { packed: size.packed - of_group.packed, read: size.read - of_group.read };
    }
    let room = plan.devices.iter().filter(|device| is_meant(device.id)).map(|d| d.budget - (d.total() - d.weights));
    let kept = plan.modules.iter().zip(&rest).filter(|(m, _)| is_meant(m.device)).map(|(_, size)| size.packed);
    let classes: Vec<Vec<Item>> = candidates.iter().map(Candidate::items).collect();
    let Some(frontier) = Frontier::new(&classes, (room.sum::<Bytes>() - kept.sum()).0) else {
        return Ok(None);
    };

    let conditions = Conditions::of(subject.checkpoint, subject.tree.embedding(), options)?;
    let fits = |steps| {
        let mut sizes = rest.clone();
        for (candidate, choice) in candidates.iter().zip(frontier.choices(steps)) {
            let (size, of_group) = (&mut sizes[candidate.group.module], candidate.sizes[choice]);
            *size = Size { packed: size.packed + of_group.packed, read: size.read + of_group.read };
        }
        let mixed = subject.place(options, &conditions, &sizes)?;
        Ok(mixed.fits() && mixed.off_gpus() <= plan.off_gpus())
    };
    let choices = frontier.choices(bisect(0, frontier.steps(), fits)?);
    let cost = |choices: &mut dyn Iterator<Item = usize>| -> f64 {
        classes.iter().zip(choices).map(|(class, choice)| class[choice].cost).sum()
    };
    if cost(&mut choices.iter().copied()) >= cost(&mut candidates.iter().map(|candidate| candidate.own)) {
        return Ok(None);
    }
    let mut schemes: Vec<(&str, Scheme)> =
        all.iter().map(|group| (group.path.as_str(), plan.quantize.scheme(&group.path))).collect();
    for (candidate, choice) in candidates.iter().zip(choices) {
        if let Some(known) = schemes.iter_mut().find(|(path, _)| *path == candidate.group.path) {
            known.1 = Scheme::AUTOMATIC[choice];
        }
    }
    let quantize = Some(Quantize::Rules(QuantizeRules::shortest(&schemes)));
    let options = PlanOptions { quantize, ..options.clone() };
    let mixed = subject.plan(&options)?;
    Ok((mixed.fits() && mixed.off_gpus() <= plan.off_gpus()).then_some((options, mixed)))
}

/// A group and what it would be in each of [`Scheme::AUTOMATIC`].
struct Candidate<'a> {
    group: &'a Group<'a>,
    sizes: [Size; Scheme::AUTOMATIC.len()],
    costs: [f64; Scheme::AUTOMATIC.len()],
    /// The scheme that it has in the plan that is to be bettered.
    own: usize,
}

impl<'a> Candidate<'a> {
    fn new(subject: &Subject, group: &'a Group<'a>, loss: Loss, rules: &QuantizeRules) -> Self {
        let mut sizes = [Size::default(); Scheme::AUTOMATIC.len()];
        for (sum, scheme) in sizes.iter_mut().zip(Scheme::AUTOMATIC) {
            let rules = QuantizeRules::new(vec![(String::new(), scheme)]);
            for weight in group.weights() {
                // It was laid out in the plan, where it may have taken more.
                let packed = footprint::weight_bytes(weight, &rules).unwrap_or_default();
                let Size { packed, read } = weight_size(&subject.checkpoint.config, weight, packed);
                *sum = Size { packed: sum.packed + packed, read: sum.read + read };
            }
        }
        let importance = group.importance(&subject.checkpoint.config);
        let scheme = rules.scheme(&group.path);
        Self {
            group,
            sizes,
            costs: Scheme::AUTOMATIC.map(|scheme| importance * loss.of(scheme)),
            own: Scheme::AUTOMATIC.iter().position(|known| *known == scheme).unwrap_or(0),
        }
    }

    fn items(&self) -> Vec<Item> {
        self.sizes.iter().zip(self.costs).map(|(size, cost)| Item { size: size.packed.0, cost }).collect()
    }
}
