//! All that is printed, and where: results on standard output, everything
//! else on standard error.
#![expect(clippy::print_stderr, reason = "this is the room that prints")]

use std::error::Error as _;
use std::io::{IsTerminal, Write, stderr, stdout};

use evenkeel::{Error, Plan, Result};

use super::args::{OutputArguments, When};
use super::env::Environment;
use super::{PipeClosed, flags};

pub struct Printer {
    quiet: bool,
    color: bool,
    /// Whether results are coloured; `None` where they are not for a terminal.
    result_color: Option<bool>,
    pub progress: bool,
}

impl Printer {
    pub fn new(arguments: &OutputArguments, environment: &Environment) -> Self {
        let terminal = stderr().is_terminal();
        let is_wanted = |when: When, auto: bool| when == When::Always || when == When::Auto && auto;
        let color = |terminal| is_wanted(arguments.color, environment.color(terminal));
        let has_result_color = arguments.color == When::Always || stdout().is_terminal();
        let progress = terminal && !arguments.quiet && environment.progress();
        Self {
            quiet: arguments.quiet,
            color: color(terminal),
            result_color: has_result_color.then(|| color(true)),
            progress: is_wanted(arguments.progress, progress),
        }
    }

    /// Writes a piece of the result and flushes it.
    #[expect(clippy::unused_self, reason = "all that is printed goes through a printer")]
    pub fn result(&self, text: &str) -> Result<()> {
        let mut out = stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| match e.kind() {
            std::io::ErrorKind::BrokenPipe => Error::input(PipeClosed),
            _ => Error::io("write", "standard output".as_ref(), e),
        })
    }

    /// Ends a result that is no line, so that a prompt does not stand behind it.
    pub fn end_of_text(&self) -> Result<()> {
        if stdout().is_terminal() { self.result("\n") } else { Ok(()) }
    }

    /// A plan as text; on a terminal with bars.
    pub fn plan(&self, plan: &Plan) -> String {
        self.result_color.map_or_else(|| plan.to_string(), |color| plan.with_bars(color))
    }

    /// A message that is left out when quiet.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    pub fn error(&self, error: &Error) {
        eprintln!("{} {error}", self.label("error:", "31"));
        for cause in std::iter::successors(error.source(), |&error| error.source()) {
            eprintln!("  Caused by: {cause}");
        }
        if !error.hints().is_empty() {
            eprintln!();
        }
        for hint in error.hints() {
            eprintln!("{} {}", self.label("hint:", "36"), hint.spelled(flags::spelled));
        }
    }

    fn label(&self, label: &str, code: &str) -> String {
        if self.color { format!("\x1b[1;{code}m{label}\x1b[0m") } else { label.to_owned() }
    }
}
