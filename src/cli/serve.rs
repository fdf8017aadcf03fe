//! `evenkeel serve`.

use std::sync::atomic::Ordering;

use evenkeel::openai::Api;
use evenkeel::serve::{ServeOptions, Server};
use evenkeel::{Cancel, EngineOptions, Error, ErrorKind, Result};

use super::args::ServeArguments;
use super::model::{self, ForMany, Need};
use super::{Exit, Process, signal};

pub fn run(arguments: &ServeArguments, process: &Process) -> Result<Exit> {
    let cancel = signal::cancel_by_interrupt()?;
    let is_terminated = signal::is_terminated()?;
    let served = serve(arguments, &cancel, process);
    match served {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::Interrupted => {}
        Err(error) => return Err(error),
    }
    Ok(if is_terminated.load(Ordering::Relaxed) { Exit::Done } else { Exit::Interrupted })
}

fn serve(arguments: &ServeArguments, cancel: &Cancel, process: &Process) -> Result<()> {
    let key = arguments.api_key.as_deref().or(process.environment.api_key()).filter(|_| !arguments.no_api_key);
    if key.is_none() && !arguments.listen.ip().is_loopback() && !arguments.no_api_key {
        return Err(Error::usage(format!("whoever reaches `{}` could ask", arguments.listen))
            .hint("`--api-key KEY` or the variable EVENKEEL_API_KEY lets in only those who know the key")
            .hint("`--no-api-key` lets everybody in"));
    }
    let many = ForMany::new(&arguments.placement, &arguments.room, cancel, process)?;
    let server =
        Server::start(&ServeOptions { listen: arguments.listen, key: key.map(str::to_owned), stop: cancel.clone() })?;
    let checkpoint = model::open(&arguments.model, Need::Weights, cancel, process)?;
    model::note_undone(&checkpoint, process);
    let model = many.load(&checkpoint, process)?;
    let engine = model.engine(&EngineOptions { max_waiting: arguments.max_waiting })?;
    let sequences = engine.plan().batch;
    let api = Api::new(engine, &checkpoint, arguments.served_model_name.clone(), many.sandbox)?;
    let name = api.name().to_owned();
    server.open(api)?;
    let address = server.address();
    process.printer.result(&format!("{name} listens on http://{address}, {sequences} sequences at once\n"))?;
    server.wait()
}
