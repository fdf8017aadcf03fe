//! Bars on standard error.

use evenkeel::escaped;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use super::printer::Printer;

/// Redraws a second at most.
const REDRAWS: u8 = 10;

/// How a bar shows bytes.
pub const BYTES: &str = "{binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}";
/// How a bar shows lines.
pub const LINES: &str = "{human_pos} of {human_len} lines";
/// How a bar shows tokens.
pub const TOKENS: &str = "{human_pos} of {human_len} tokens  {per_sec}";

/// A bar that counts up to `total`, or nothing where no bars are wanted. It goes when it is dropped.
pub fn bar(printer: &Printer, what: &'static str, total: u64, counts: &str) -> ProgressBar {
    if !printer.progress {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(REDRAWS));
    let template = format!("{{prefix}} [{{bar:30}}] {counts}  {{eta}}  {{msg}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.with_prefix(what).with_finish(ProgressFinish::AndClear)
}

/// Shows a text behind a bar.
pub fn say(bar: &ProgressBar, text: &str) {
    bar.set_message(escaped(text).into_owned());
}
