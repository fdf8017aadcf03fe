//! The command line: arguments in, text out, an exit code.
//!
//! Nothing outside this room prints, exits or reads the environment.

mod args;
mod batch;
mod chat;
mod command_line;
mod devices;
mod env;
mod flags;
mod generate;
mod model;
mod perplexity;
mod plan;
mod printer;
mod progress;
mod quantize;
mod sandbox;
#[cfg(feature = "serve")]
mod serve;
mod signal;
mod turn;

use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, FromArgMatches};
use evenkeel::{DeviceError, DoesNotFit, Error, ErrorKind, Pool};

use args::{Arguments, Command};
use command_line::CommandLine;
use env::Environment;
use printer::Printer;

/// Whoever reads standard output has closed it, which ends a command and is not shown as an error.
#[derive(Debug, thiserror::Error)]
#[error("standard output is closed")]
pub struct PipeClosed;

/// How a command that did not fail ends, with its exit code.
pub enum Exit {
    Done = 0,
    /// Some of the input was not as it must be.
    BadInput = 1,
    /// The plan that it shows does not fit.
    DoesNotFit = 3,
    /// The user stopped it.
    Interrupted = 130,
}

fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Usage => 2,
        ErrorKind::DoesNotFit | ErrorKind::Device | ErrorKind::Shortfall => Exit::DoesNotFit as u8,
        ErrorKind::Interrupted => Exit::Interrupted as u8,
        // Input, and kinds that a later version may add.
        _ => 1,
    }
}

/// Whether a GPU failed, is missing, or has too little memory.
fn is_about_gpus(error: &Error) -> bool {
    let device = error.cause().is_some_and(|error: &DeviceError| error.devices().iter().any(|device| device.is_gpu()));
    let plan = error.cause().is_some_and(|plan: &DoesNotFit| plan.devices.iter().any(|device| device.id.is_gpu()));
    device || plan
}

/// What a command has beside its arguments.
pub struct Process {
    pub command_line: CommandLine,
    pub environment: Environment,
    pub printer: Printer,
    pub pool: Arc<Pool>,
}

pub fn run() -> ExitCode {
    let parsed = Arguments::command().try_get_matches().and_then(|matches| {
        let arguments = Arguments::from_arg_matches(&matches)?;
        Ok((matches, arguments))
    });
    let (matches, arguments) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return printer::usage(&error),
    };
    let environment = Environment::of_process();
    let printer = Printer::new(&arguments.output, &environment);
    let pool = Arc::new(arguments.command.threads().map_or_else(Pool::default, Pool::new));
    let process = Process { command_line: CommandLine::new(&matches), environment, printer, pool };
    signal::survive_size_limits();
    let outcome = match arguments.command {
        Command::Batch(arguments) => batch::run(&arguments, &process),
        Command::Chat(arguments) => chat::run(&arguments, &process),
        Command::Devices(arguments) => devices::run(&arguments, &process),
        Command::Generate(arguments) => generate::run(&arguments, &process),
        Command::Perplexity(arguments) => perplexity::run(&arguments, &process),
        Command::Plan(arguments) => plan::run(&arguments, &process),
        Command::Quantize(arguments) => quantize::run(&arguments, &process),
        Command::Sandbox => sandbox::run(),
        #[cfg(feature = "serve")]
        Command::Serve(arguments) => serve::run(&arguments, &process),
    };
    let code = match outcome {
        Ok(exit) => exit as u8,
        Err(error) if error.cause::<PipeClosed>().is_some() => Exit::Done as u8,
        Err(error) => {
            let error = match process.environment.visible_gpus() {
                Some(mask) if is_about_gpus(&error) => {
                    error.hint(format!("`CUDA_VISIBLE_DEVICES={mask}` says which GPUs there are, and in which order"))
                }
                _ => error,
            };
            process.printer.error(&error);
            exit_code(error.kind())
        }
    };
    ExitCode::from(code)
}
