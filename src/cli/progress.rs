//! Bars on standard error.

use evenkeel::Bytes;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use super::printer::Printer;

/// Redraws a second at most.
const REDRAWS: u8 = 10;

/// A bar that counts bytes or tokens, or nothing where no bars are wanted. It goes when it is dropped.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(printer: &Printer, what: &'static str, total: Bytes) -> Self {
        let counts = "{binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}";
        Self::counting(printer, what, total.0, counts)
    }

    pub fn tokens(printer: &Printer, what: &'static str, total: usize) -> Self {
        Self::counting(printer, what, total as u64, "{human_pos} of {human_len} tokens  {per_sec}")
    }

    fn counting(printer: &Printer, what: &'static str, total: u64, counts: &str) -> Self {
        if !printer.progress {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(REDRAWS));
        let template = format!("{{prefix}} [{{bar:30}}] {counts}  {{eta}}  {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar.with_prefix(what).with_finish(ProgressFinish::AndClear))
    }

    pub fn advance(&self, bytes: Bytes) {
        self.0.inc(bytes.0);
    }

    /// `count` bytes or tokens are done in all.
    pub fn set(&self, count: u64) {
        self.0.set_position(count);
    }

    pub fn say(&self, message: String) {
        self.0.set_message(message);
    }
}
