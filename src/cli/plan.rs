//! `evenkeel plan`.

use super::args::{PlanArguments, PlanFormat};
use super::command_line::CommandLine;
use super::model::{self, Need};
use super::{Exit, Process, signal};
use evenkeel::{Cancel, Inventory, MAX_BATCH, Plan, Result, write_atomic};

pub fn run(arguments: &PlanArguments, process: &Process) -> Result<Exit> {
    let printer = &process.printer;
    let mut options = arguments.placement.options(arguments.check.as_deref(), process)?;
    options.batch = arguments.batch;
    options.kv_memory = arguments.kv_memory;
    options.alternatives = true;
    options.kinds = arguments.verbose;
    let inventory = if arguments.device.is_empty() {
        let mut inventory =
            Inventory::of_machine(&process.environment.offload_directory(arguments.placement.offload_dir.as_deref()))?;
        inventory.measure_bandwidth(&process.pool);
        inventory
    } else {
        Inventory::described(&arguments.device.join(","))?
    };
    let checkpoint = model::open(&arguments.model, Need::Headers, &Cancel::new(), process)?;
    // Where no size fits the usual one stays, and the plan says what would.
    if arguments.max_context {
        options.context = Plan::longest_context(&checkpoint, &inventory, &options)?.or(options.context);
    }
    if arguments.max_batch {
        options.batch = Plan::largest_batch(&checkpoint, &inventory, &options, MAX_BATCH)?.or(options.batch);
    }
    let plan = Plan::new(&checkpoint, &inventory, &options)?;
    if let Some(file) = &arguments.output {
        if !plan.fits() {
            return Err(process.command_line.does_not_fit(&plan));
        }
        // Once the file is begun, it becomes whole.
        let cancel = signal::cancel_by_interrupt()?;
        write_atomic(file, plan.device_map().as_bytes(), arguments.force)?;
        if cancel.is_cancelled() {
            return Ok(Exit::Interrupted);
        }
        printer.note(&format!("wrote `{}`", file.display()));
    }
    match arguments.format {
        PlanFormat::Text => {
            let list = if arguments.verbose { plan.allocation_table() } else { String::new() };
            printer.plan(&plan, &(list + &remedies(&plan, &process.command_line)))?;
        }
        PlanFormat::Json => printer.json(&plan.to_json())?,
        PlanFormat::Hf => printer.json(&plan.hugging_face_map())?,
        PlanFormat::Svg => printer.result(&plan.to_svg())?,
        PlanFormat::Html => printer.result(&plan.to_html())?,
    }
    Ok(if plan.fits() { Exit::Done } else { Exit::DoesNotFit })
}

/// What would fit, as commands.
fn remedies(plan: &Plan, command_line: &CommandLine) -> String {
    if plan.remedies.is_empty() {
        return String::new();
    }
    let mut text = "\nwhat would fit, the least loss first:\n".to_owned();
    for remedy in &plan.remedies {
        text += &format!("  # {remedy}\n");
        if let Some(command) = command_line.with(remedy) {
            text += &format!("  {command}\n");
        }
    }
    text
}
