//! `evenkeel quantize`.

use std::sync::Arc;

use evenkeel::{Quantize, Result, SaveFormat, SaveOptions, save_quantized};

use super::args::{PackedFormat, QuantizeArguments};
use super::model::{self, Need};
use super::{Exit, Process, signal};

pub fn run(arguments: &QuantizeArguments, process: &Process) -> Result<Exit> {
    let printer = &process.printer;
    let cancel = signal::cancel_by_interrupt()?;
    let checkpoint = model::open(&arguments.model, Need::Weights, &cancel, process)?;
    let options = SaveOptions {
        scheme: arguments.quantize,
        format: match arguments.format {
            PackedFormat::Evenkeel => SaveFormat::Evenkeel,
            PackedFormat::CompressedTensors => SaveFormat::CompressedTensors,
        },
        output: arguments.output.clone(),
        shard_size: arguments.max_shard_size,
        pool: Arc::clone(&process.pool),
        cancel,
    };
    let mut bar = None;
    let saved = save_quantized(&checkpoint, &options, |event| model::show(&event, "quantizing", &mut bar, printer))?;
    drop(bar);
    let bits = saved.written.0 as f64 * 8.0 / saved.parameters as f64;
    let (read, written, seconds) = (saved.read, saved.written, saved.seconds);
    printer.result(&format!(
        "wrote `{}`: {written} for {read}, {bits:.2} bits a weight, {}\n",
        arguments.output.display(),
        Quantize::Rules(saved.quantize)
    ))?;
    printer.note(&format!("{seconds:.2} s, {:.3} GB/s read", read.0 as f64 / 1e9 / seconds));
    Ok(Exit::Done)
}
