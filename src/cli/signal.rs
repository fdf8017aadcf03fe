//! Interrupts: the first asks to stop, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use evenkeel::{Cancel, Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

pub fn cancel_by_interrupt() -> Result<Cancel> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
        // In this order, so that the first signal finds the flag unset.
        flag::register_conditional_shutdown(signal, code, Arc::clone(&interrupted))
            .and_then(|_| flag::register(signal, Arc::clone(&interrupted)))
            .map_err(|e| Error::input("interrupts cannot be handled").caused_by(e))?;
    }
    Ok(interrupted.into())
}
