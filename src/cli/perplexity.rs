//! `evenkeel perplexity`.

use evenkeel::{
    Bytes, Checkpoint, Comparison, DEFAULT_WINDOW, Error, LoadOptions, MIB, Perplexity, PlanOptions, Predictions,
    Quantize, QuantizeRules, Result, Scheme, Tokenizer, Windows, read_capped, start_tokens,
};
use serde::Serialize;

use super::args::{Format, PerplexityArguments};
use super::model::{self, Need};
use super::progress::{self, TOKENS};
use super::{Exit, Process, signal};

const TEXT_CAP: Bytes = Bytes(1024 * MIB);

#[derive(Serialize)]
struct Row {
    /// The scheme of most modules, or `auto`.
    scheme: &'static str,
    quantize: QuantizeRules,
    bits_per_weight: f64,
    weights: Bytes,
    #[serde(flatten)]
    measured: Perplexity,
    tokens_per_second: f64,
}

/// All figures, and what they were measured on.
#[derive(Serialize)]
struct Report {
    model: String,
    window: usize,
    stride: usize,
    /// What the tokenizer puts before a text.
    start_tokens: Vec<u32>,
    /// Whether it stands before every window.
    is_behind_start: bool,
    rows: Vec<Row>,
}

pub fn run(arguments: &PerplexityArguments, process: &Process) -> Result<Exit> {
    let printer = &process.printer;
    let cancel = signal::cancel_by_interrupt()?;
    let text = String::from_utf8(read_capped(&arguments.text, TEXT_CAP)?)
        .map_err(|e| Error::input(format!("`{}` is not UTF-8", arguments.text.display())).caused_by(e))?;
    let checkpoint = model::open(&arguments.model, Need::Weights, &cancel, process)?;
    let mut options = arguments.placement.options(None, process)?;
    let window = options.context.unwrap_or(DEFAULT_WINDOW.min(checkpoint.config.max_position_embeddings));
    options.context = Some(window);
    let stride = arguments.stride.unwrap_or(window);
    let mut windows = Windows::new(window, stride)?;
    let load = arguments.placement.load_options(cancel, process)?;
    let tokenizer =
        Tokenizer::begin(checkpoint.local_directory()?, checkpoint.config.vocab_size, load.sandbox.as_ref())?.wait()?;
    let start_tokens = start_tokens(&tokenizer)?;
    if !arguments.no_start_token {
        windows = windows.behind(start_tokens.clone())?;
    }
    let mut tokens = tokenizer.encode(&text, false)?;
    tokens.truncate(arguments.max_tokens.unwrap_or(usize::MAX));
    let scored = windows.scored(tokens.len());
    if scored == 0 {
        let text = arguments.text.display();
        let least = if windows.scored(1) == 1 { 1 } else { 2 };
        return Err(Error::input(format!("`{text}` has {} tokens; {least} is the least to score", tokens.len())));
    }

    let measurement = Measurement { checkpoint: &checkpoint, load, tokens, windows, process };
    let mut rows = Vec::new();
    let measured = if arguments.compare.is_empty() {
        measurement.row(&options, Comparison::Alone).map(|row| rows.push(row))
    } else {
        measurement.compare(&options, &arguments.compare, scored, &mut rows)
    };
    if rows.is_empty() {
        measured?;
        return Ok(Exit::Done);
    }
    // What was measured is shown, whatever came of the rest.
    let is_behind_start = !arguments.no_start_token && !start_tokens.is_empty();
    let report = Report { model: checkpoint.name.clone(), window, stride, start_tokens, is_behind_start, rows };
    match arguments.format {
        Format::Text => printer.result(&table(&report))?,
        // Numbers and texts cannot fail to serialize.
        Format::Json => printer.json(&(serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"))?,
    }
    measured.map(|()| Exit::Done)
}

/// What is scored, and how.
struct Measurement<'a> {
    checkpoint: &'a Checkpoint,
    load: LoadOptions,
    tokens: Vec<u32>,
    windows: Windows,
    process: &'a Process,
}

impl Measurement<'_> {
    fn compare(&self, options: &PlanOptions, schemes: &[Quantize], scored: usize, rows: &mut Vec<Row>) -> Result<()> {
        let vocab_size = self.checkpoint.config.vocab_size;
        let scratch = Predictions::bytes(scored, vocab_size);
        let directory = &self.load.offload_directory;
        self.process.printer.note(&format!("keeping predictions in `{}`, {scratch}", directory.display()));
        let mut predictions = Predictions::new(directory, scored, vocab_size)?;
        let with = |scheme: &Quantize| PlanOptions { quantize: Some(scheme.clone()), ..options.clone() };
        let none = Scheme::None.into();
        rows.push(self.row(&with(&none), Comparison::Keep(&mut predictions))?);
        for scheme in schemes.iter().filter(|scheme| **scheme != none) {
            rows.push(self.row(&with(scheme), Comparison::Against(&mut predictions))?);
        }
        Ok(())
    }

    fn row(&self, options: &PlanOptions, comparison: Comparison) -> Result<Row> {
        let Self { checkpoint, load, process, .. } = self;
        let printer = &process.printer;
        let mut model = model::load(checkpoint, options, None, load, process)?;
        let bar = progress::bar(printer, "scoring", self.tokens.len() as u64, TOKENS);
        let on_window = |tokens: usize| bar.set_position(tokens as u64);
        let measured = model.perplexity(&self.tokens, &self.windows, comparison, &load.cancel, on_window);
        drop(bar);
        let measured = measured?;
        let weights: Bytes = model.plan.devices.iter().map(|device| device.weights).sum();
        let is_auto = options.quantize == Some(Quantize::Auto);
        let row = Row {
            scheme: if is_auto { "auto" } else { model.plan.quantize.scheme("").name() },
            bits_per_weight: weights.0 as f64 * 8.0 / model.plan.parameters as f64,
            weights,
            measured,
            tokens_per_second: measured.tokens as f64 / measured.seconds,
            quantize: model.plan.quantize.clone(),
        };
        printer.note(&format!("{}: {:.1} s, {:.0} tok/s", row.scheme, measured.seconds, row.tokens_per_second));
        Ok(row)
    }
}

fn table(report: &Report) -> String {
    let Some(first) = report.rows.first().map(|row| &row.measured) else { return String::new() };
    let windows = if report.stride == report.window {
        format!("windows of {} tokens", report.window)
    } else {
        format!("windows of {} tokens, {} apart", report.window, report.stride)
    };
    let start = match (report.start_tokens.is_empty(), report.is_behind_start) {
        (true, _) => "",
        (false, true) => ", each behind the tokenizer's start token",
        (false, false) => ", without the tokenizer's start token",
    };
    let mut text = format!("{}: {} tokens scored in {windows}{start}\n\n", report.model, first.tokens);
    text += "scheme  bits a weight      weights  perplexity         difference    mean KL  same top token\n";
    for Row { scheme, bits_per_weight, weights, measured, .. } in &report.rows {
        let perplexity = format!("{:.4} ± {:.4}", measured.perplexity, measured.standard_error);
        let weights = weights.to_string();
        text += &format!("{scheme:<6}  {bits_per_weight:>13.3}  {weights:>11}  {perplexity:<17}");
        if let Some(divergence) = measured.divergence {
            let difference = 100.0 * (measured.perplexity / first.perplexity - 1.0);
            let (kl, same) = (divergence.mean_kl, 100.0 * divergence.same_top);
            text += &format!("  {difference:>+9.3} %  {kl:>9.6}  {same:>12.2} %");
        }
        text = text.trim_end().to_owned() + "\n";
    }
    text
}
