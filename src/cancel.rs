//! A wish to stop, shared by those who ask and those who work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Stops a load, a save, a generation or a measurement. Clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// One that has not been cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks all that have a clone of it to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether that was asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error if that was asked.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::interrupted()) } else { Ok(()) }
    }
}

impl From<Arc<AtomicBool>> for Cancel {
    /// By a flag that something else sets, such as the handler of a signal.
    fn from(flag: Arc<AtomicBool>) -> Self {
        Self(flag)
    }
}
