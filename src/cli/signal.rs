//! Interrupts: the first asks to stop, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use evenkeel::{Cancel, Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// What the first interrupt cancels.
pub fn cancel_by_interrupt() -> Result<Cancel> {
    interrupts().map(Cancel::from)
}

/// A flag that an interrupt sets; one that finds it set ends the process.
pub fn interrupts() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    // Under `nohup` the end of a terminal is no reason to stop.
    let hangup = (!is_ignored(SIGHUP)).then_some((SIGHUP, 129));
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)].into_iter().chain(hangup) {
        // In this order, so that the first signal finds the flag unset.
        flag::register_conditional_shutdown(signal, code, Arc::clone(&interrupted))
            .and_then(|_| flag::register(signal, Arc::clone(&interrupted)))
            .map_err(not_handled)?;
    }
    Ok(interrupted)
}

/// Whether the process is asked to end, as a service is, rather than interrupted.
#[cfg(feature = "serve")]
pub fn is_terminated() -> Result<Arc<AtomicBool>> {
    let terminated = Arc::new(AtomicBool::new(false));
    let registered = flag::register(SIGTERM, Arc::clone(&terminated));
    registered.map_err(not_handled).map(|_| terminated)
}

fn not_handled(error: std::io::Error) -> Error {
    Error::input("interrupts cannot be handled").caused_by(error)
}

/// Makes a write beyond the limit of a file's size fail, where it would end the process.
pub fn survive_size_limits() {
    // Without it, the process ends as it did.
    let _ = flag::register(SIGXFSZ, Arc::default());
}

/// Whether this process was started with a signal ignored.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
