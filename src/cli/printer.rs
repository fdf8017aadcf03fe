//! All that is printed, and where: results on standard output, everything
//! else on standard error.
//!
//! What strangers named or wrote is in most of it, so that all of it is escaped here. Whether standard
//! error can be written changes nothing: nobody is left to be told.

use std::borrow::Cow;
use std::error::Error as _;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::process::ExitCode;

use evenkeel::{Error, Plan, Result, escaped, is_unseen};

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

    /// Writes a piece of the result, a text of ours, and flushes it.
    pub fn result(&self, text: &str) -> Result<()> {
        self.write(&escaped(text))
    }

    /// Has a terminal show what is written next alone.
    pub fn clear_screen(&self) -> Result<()> {
        if stdout().is_terminal() { self.write("\x1b[H\x1b[2J") } else { Ok(()) }
    }

    /// Writes a result in JSON, which has escapes of its own.
    pub fn json(&self, json: &str) -> Result<()> {
        self.write(&escaped_json(json))
    }

    /// Writes text that the model generated: as it is, but for a terminal without what would control that.
    pub fn generated(&self, text: &str) -> Result<()> {
        let controls = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
        if !stdout().is_terminal() || !text.contains(controls) {
            return self.write(text);
        }
        let escape = |c: char| if controls(c) { c.escape_default().to_string() } else { c.to_string() };
        self.write(&text.chars().map(escape).collect::<String>())
    }

    /// Writes a plan as text, on a terminal with bars, and what stands behind it.
    pub fn plan(&self, plan: &Plan, behind: &str) -> Result<()> {
        // Bars have colours, and what is not a bar is escaped there.
        let text = self.result_color.map_or_else(|| plan.to_string(), |color| plan.with_bars(color));
        self.write(&(text + &escaped(behind)))
    }

    #[expect(clippy::unused_self, reason = "all that is printed goes through a printer")]
    fn write(&self, text: &str) -> Result<()> {
        let mut out = stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| match e.kind() {
            std::io::ErrorKind::BrokenPipe => Error::input(PipeClosed),
            _ => Error::io("write", "standard output".as_ref(), e),
        })
    }

    /// Ends a result that is no line, so that a prompt does not stand behind it.
    pub fn end_of_text(&self) -> Result<()> {
        if stdout().is_terminal() { self.write("\n") } else { Ok(()) }
    }

    /// A message that is left out when quiet.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            say(&format!("{}\n", escaped(text)));
        }
    }

    pub fn error(&self, error: &Error) {
        // No line of a stranger's begins where one of ours does.
        let inner = |text: String| escaped(&text).replace('\n', "\n    ");
        let mut text = format!("{} {}\n", self.label("error:", "31"), inner(error.to_string()));
        for cause in std::iter::successors(error.source(), |&error| error.source()) {
            text += &format!("  Caused by: {}\n", inner(cause.to_string()));
        }
        if !error.hints().is_empty() {
            text.push('\n');
        }
        for hint in error.hints() {
            text += &format!("{} {}\n", self.label("hint:", "36"), escaped(&hint.spelled(flags::spelled)));
        }
        say(&text);
    }

    fn label(&self, label: &str, code: &str) -> String {
        if self.color { format!("\x1b[1;{code}m{label}\x1b[0m") } else { label.to_owned() }
    }
}

/// Shows what is wrong with the arguments, or the help, and gives the exit code.
pub fn usage(error: &clap::Error) -> ExitCode {
    let plain = error.render().to_string();
    if plain.contains(is_unseen) {
        say(&escaped(&plain));
    } else {
        let _ = error.print();
    }
    u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Writes to standard error, if that can be written.
fn say(text: &str) {
    let _ = stderr().lock().write_all(text.as_bytes());
}

/// JSON with what cannot be seen as escapes: outside of texts it has only ends of lines.
fn escaped_json(json: &str) -> Cow<'_, str> {
    if !json.contains(is_unseen) {
        return json.into();
    }
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        if is_unseen(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                safe += &format!("\\u{unit:04x}");
            }
        } else {
            safe.push(c);
        }
    }
    safe.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_json_is_the_same_json() {
        for text in ["plain\n", "\x1b[2J\x7f\u{9b}2J", "\u{202e}\u{200b}\u{e0001}", "é 👍"] {
            let json = serde_json::json!({ text: [text] });
            for json in [json.to_string(), format!("{json:#}")] {
                let safe = escaped_json(&json);
                assert!(!safe.contains(is_unseen), "{safe}");
                assert_eq!(
                    serde_json::from_str::<serde_json::Value>(&safe).unwrap(),
                    json.parse::<serde_json::Value>().unwrap()
                );
            }
        }
    }
}
