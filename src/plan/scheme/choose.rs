//! The scheme of a whole model, where it is to be chosen.

use super::mixed;
use crate::error::Result;
use crate::plan::subject::Subject;
use crate::plan::{Outline, Plan, PlanOptions, Quantize};
use crate::quant::Scheme;

/// Options in which the scheme is decided: where it is to be chosen, that of
/// the most bits with which the plan fits and no more modules leave the GPUs
/// than with any other; with the outline of each. What is packed already stays so.
pub fn decide_scheme(subject: &Subject, options: &PlanOptions) -> Result<(PlanOptions, Vec<Outline>)> {
    if options.quantize != Some(Quantize::Auto) {
        return Ok((options.clone(), Vec::new()));
    }
    if subject.checkpoint.config.packed.is_some() {
        return Ok((PlanOptions { quantize: None, ..options.clone() }, Vec::new()));
    }
    let with = |scheme: Scheme| PlanOptions { quantize: Some(scheme.into()), ..options.clone() };
    let outline = |scheme| subject.plan(&with(scheme)).map(|plan| Outline::of(&plan, options.strategy));
    let outlines = Scheme::AUTOMATIC.into_iter().map(outline).collect::<Result<Vec<_>>>()?;
    // Of equals `min_by_key` takes the first, which has the most bits; where nothing fits, the fewest.
    let best = outlines.iter().filter(|outline| outline.fits).min_by_key(|outline| outline.off_gpus);
    let scheme = best.or(outlines.last()).map_or(Scheme::None, |outline| outline.scheme);
    Ok((with(scheme), outlines))
}

/// Options in which the schemes are decided, and their plan. Where the fewest bits were decided on,
/// the rest of the room goes to the projections that lose the most by them.
pub fn with_scheme(subject: &Subject, options: &PlanOptions) -> Result<(PlanOptions, Plan)> {
    let (mut decided, mut schemes) = decide_scheme(subject, options)?;
    let mut plan = subject.plan(&decided)?;
    let has_fewest_bits =
        schemes.last().is_some_and(|outline| outline.fits && decided.quantize == Some(outline.scheme.into()));
    if has_fewest_bits && let Some(mixed) = mixed::refine(subject, &decided, &plan)? {
        (decided, plan) = mixed;
        schemes.push(Outline { is_mixed: true, ..Outline::of(&plan, options.strategy) });
    }
    plan.is_unmeasured = has_fewest_bits && subject.checkpoint.directory.is_none();
    plan.schemes = schemes;
    Ok((decided, plan))
}
