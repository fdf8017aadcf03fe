//! `evenkeel plan`.

use evenkeel::fs;
use evenkeel::plan::{Inventory, Plan};

use super::args::{Format, PlanArguments};
use super::env::Environment;
use super::model::{self, Need};
use super::printer::Printer;
use super::{Exit, Outcome};

/// Plans, and shows or writes the plan.
pub fn run(arguments: &PlanArguments, environment: &Environment, printer: &Printer) -> Outcome {
    let mut options = arguments.placement.options(arguments.check.as_deref())?;
    options.batch = arguments.batch;
    let inventory = if arguments.device.is_empty() {
        Inventory::this_machine(&arguments.placement.offload_directory(environment))?
    } else {
        Inventory::described(&arguments.device.join(","))?
    };
    let checkpoint = model::open(&arguments.model, Need::Headers, environment, printer)?;
    let plan = Plan::new(&checkpoint, &inventory, &options)?;
    if let Some(file) = &arguments.output {
        if !plan.fits() {
            return Err(plan.does_not_fit().into());
        }
        fs::write_atomic(file, plan.device_map(&checkpoint).as_bytes(), arguments.force)?;
        printer.note(&format!("wrote `{}`", file.display()));
    }
    printer.result(&match arguments.format {
        Format::Text => plan.to_string(),
        Format::Json => plan.to_json(),
    })?;
    Ok(if plan.fits() { Exit::Done } else { Exit::DoesNotFit })
}
