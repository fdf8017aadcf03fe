//! Bars on standard error.

use evenkeel::bytes::Bytes;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::printer::Printer;

/// Redraws a second at most.
const REDRAWS: u8 = 10;

/// A bar that counts bytes, or nothing where no bars are wanted.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar for `total` bytes of `what`.
    pub fn new(printer: &Printer, what: &'static str, total: Bytes) -> Self {
        if !printer.progress {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(Some(total.0), ProgressDrawTarget::stderr_with_hz(REDRAWS));
        let template =
            "{prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta}  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar.with_prefix(what))
    }

    /// `bytes` more are done.
    pub fn advance(&self, bytes: Bytes) {
        self.0.inc(bytes.0);
    }

    /// `bytes` are done in all.
    #[cfg(feature = "hub")]
    pub fn set(&self, bytes: Bytes) {
        self.0.set_position(bytes.0);
    }

    /// What is being done now.
    pub fn say(&self, message: String) {
        self.0.set_message(message);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
