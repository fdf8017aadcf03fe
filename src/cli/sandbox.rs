//! This program again, as the process that runs a stranger's tokenizer or template.

use std::io::{stdin, stdout};

use evenkeel::{Cancel, Error, Result, Sandbox, serve_sandbox};

use super::Exit;

/// A sandbox whose waits `cancel` ends.
pub fn of_this_program(cancel: Cancel) -> Result<Sandbox> {
    let program = std::env::current_exe();
    let program = program.map_err(|e| Error::input("the path of this program is not to be found").caused_by(e))?;
    Ok(Sandbox::new(program, ["sandbox".into()], cancel))
}

pub fn run() -> Result<Exit> {
    serve_sandbox(stdin().lock(), stdout().lock())
        .map_err(|e| Error::input("`evenkeel sandbox` is for evenkeel itself").caused_by(e))?;
    Ok(Exit::Done)
}
