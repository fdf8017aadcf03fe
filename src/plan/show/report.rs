//! A plan as text and as JSON.

use std::fmt::{self, Write};

use serde::Serialize;
use serde_json::{Value, json};

use crate::architecture::ModuleKind;
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::device_map::SCHEMA_VERSION;
use crate::error::escaped;
use crate::footprint::Allocation;
use crate::machine;
use crate::plan::{DevicePlan, Plan, PlannedModule, Quantize, Speed, speed};
use crate::quant::KvDtype;

/// Rows of the table and the part of a device's plan that each shows.
type Row = (&'static str, fn(&DevicePlan) -> Bytes);
const ROWS: &[Row] = &[
    ("free", |device| device.free),
    ("reserve", |device| device.reserve),
    ("budget", |device| device.budget),
    ("weights", |device| device.weights),
    ("KV cache", |device| device.kv_cache),
    ("workspace", |device| device.workspace),
    ("staging", |device| device.staging),
    ("program", |device| device.program),
    ("driver", |device| device.driver),
    ("total", DevicePlan::total),
];

#[derive(Serialize)]
struct Json<'a> {
    schema_version: u64,
    fits: bool,
    #[serde(flatten)]
    plan: &'a Plan,
    totals: Vec<Value>,
}

impl Plan {
    /// The plan as JSON; sizes are bytes.
    pub fn to_json(&self) -> String {
        let totals = self.devices.iter().map(|device| {
            let (total, missing) = (device.total(), device.missing());
            json!({"id": device.id, "total": total, "headroom": device.budget - total, "missing": missing})
        });
        let json = Json { schema_version: SCHEMA_VERSION, fits: self.fits(), plan: self, totals: totals.collect() };
        // Every field is a number, a text, or a list or map with text keys.
        serde_json::to_string_pretty(&json).unwrap_or_default() + "\n"
    }

    /// Blocks of `device` as ranges, `0-11, 14`.
    fn blocks(&self, device: DeviceId) -> String {
        let runs = self.modules.chunk_by(|a, b| a.is_block() && b.is_block() && a.device == b.device);
        let text = |run: &[PlannedModule]| match (run[0].kind, run[run.len() - 1].kind) {
            (ModuleKind::Block(first), ModuleKind::Block(last)) if first < last => Some(format!("{first}-{last}")),
            (ModuleKind::Block(only), _) => Some(only.to_string()),
            _ => None,
        };
        runs.filter(|run| run[0].device == device).filter_map(text).collect::<Vec<_>>().join(", ")
    }

    /// What else than blocks is on `device`.
    fn others(&self, device: DeviceId) -> Vec<&str> {
        let other = |module: &&PlannedModule| module.device == device && !module.is_block();
        self.modules.iter().filter(other).filter_map(|module| module.path.rsplit('.').next()).collect()
    }

    /// As it prints, with the bars of [`Plan::bars`] under the table.
    pub fn with_bars(&self, color: bool) -> String {
        fmt::from_fn(|f| self.write(f, &self.bars(color))).to_string()
    }

    /// Schemes, context, batch and KV cache in a line.
    pub(super) fn conditions(&self) -> String {
        let rules = Quantize::Rules(self.quantize.clone());
        let kv_cache = match self.kv_cache {
            KvDtype::F16 => String::new(),
            other => format!("; KV cache {other}"),
        };
        format!("quantize {rules}; context {}; batch {}{kv_cache}", self.context, self.batch)
    }

    /// What is on `device`, in a line.
    pub(super) fn content(&self, device: DeviceId) -> String {
        let blocks = self.blocks(device);
        let blocks = (!blocks.is_empty()).then(|| format!("blocks {blocks}"));
        let parts: Vec<_> = blocks.into_iter().chain(self.others(device).into_iter().map(str::to_owned)).collect();
        if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, bars: &str) -> fmt::Result {
        let mut f = Escaped(f);
        let blocks = self.modules.iter().filter(|module| module.is_block()).count();
        write!(f, "{}: {}, {blocks} blocks, {} parameters", self.model, self.architecture, count(self.parameters))?;
        if let Some(dtype) = &self.dtype {
            write!(f, ", {dtype}")?;
        }
        writeln!(f, "\n{}\n", self.conditions())?;

        let row = |name: &str, cell: &dyn Fn(&DevicePlan) -> String| -> Vec<String> {
            std::iter::once(name.to_owned()).chain(self.devices.iter().map(cell)).collect()
        };
        let mut rows = vec![row("", &|device| device.id.to_string())];
        rows.extend(ROWS.iter().map(|(name, part)| {
            row(name, &|device| match part(device) {
                Bytes::ZERO => "-".to_owned(),
                bytes => bytes.to_string(),
            })
        }));
        rows.push(row("headroom", &|device| {
            if device.fits() { (device.budget - device.total()).to_string() } else { format!("-{}", device.missing()) }
        }));
        rows.push(row("blocks", &|device| {
            let blocks = self.blocks(device.id);
            if blocks.is_empty() { "-".to_owned() } else { blocks }
        }));
        let most = self.devices.iter().map(|device| self.others(device.id).len()).max().unwrap_or(0);
        rows.extend((0..most).map(|line| {
            let name = if line == 0 { "also" } else { "" };
            row(name, &|device| self.others(device.id).get(line).copied().unwrap_or_default().to_owned())
        }));
        f.write_str(&table(&rows))?;
        if !bars.is_empty() {
            write!(f.0, "\n{bars}")?;
        }
        for device in self.devices.iter().filter(|device| device.name.is_some()) {
            writeln!(f, "{}: {}", device.id, device.name.as_deref().unwrap_or_default())?;
        }
        for line in self.notes.iter().cloned().chain(machine::faults(self.driver.as_ref(), &self.idle)) {
            writeln!(f, "{line}")?;
        }
        let is_mixed = self.schemes.iter().any(|outline| outline.is_mixed);
        for (at, outline) in self.schemes.iter().enumerate() {
            let is_chosen = outline.is_mixed == is_mixed && outline.scheme == self.quantize.scheme("");
            let (chosen, total) = (if is_chosen { "*" } else { " " }, outline.total);
            let scheme = if outline.is_mixed { "mixed" } else { outline.scheme.name() };
            writeln!(f, "{}{chosen} {scheme:<5} {total:>9}  {outline}", label(at, "quantize"))?;
        }
        if self.is_unmeasured {
            writeln!(f, "            one scheme for all: only weights in a local directory are measured")?;
        }
        for (at, outline) in self.placements.iter().enumerate() {
            writeln!(f, "{}{:<17}  {outline}", label(at, "placed"), outline.placement)?;
        }
        f.write_str(&self.kinds_table())?;
        if let Some(Speed { at_first, at_last }) = self.speed.filter(|_| self.fits()) {
            writeln!(
                f,
                "\npredicted for one sequence: {} tok/s with the context empty, {} with it full",
                speed::digits(at_first),
                speed::digits(at_last)
            )?;
        }
        let used = self.devices.iter().filter(|device| device.modules > 0).count();
        if self.hops()
            > used.saturating_sub(1) + usize::from(self.modules.last().is_some_and(|head| head.weights == Bytes::ZERO))
        {
            writeln!(
                f,
                "\na token changes its device {} times on its way; with each device's modules in one run it would be {}",
                self.hops(),
                used - 1
            )?;
        }
        if self.fits() {
            return writeln!(f, "\nit fits");
        }
        writeln!(f, "\nit does not fit")?;
        for device in self.devices.iter().filter(|device| !device.fits()) {
            let (id, total, budget) = (device.id, device.total(), device.budget);
            writeln!(f, "  {id} lacks {}: {total} are needed, {budget} may be taken", device.missing())?;
        }
        Ok(())
    }

    /// [`Plan::kinds`] as a table, if there are any.
    fn kinds_table(&self) -> String {
        if self.kinds.is_empty() {
            return String::new();
        }
        let mut rows = vec![["module", "bits a weight", "error", "scheme"].map(str::to_owned).to_vec()];
        rows.extend(self.kinds.iter().map(|kind| {
            let error = kind.error.map_or("-".to_owned(), |error| format!("{:.2} %", 100.0 * error));
            let schemes = kind.schemes.iter().map(|(scheme, count)| match kind.schemes.len() {
                1 => scheme.to_string(),
                _ => format!("{count} {scheme}"),
            });
            vec![kind.kind.clone(), format!("{:.2}", kind.bits), error, schemes.collect::<Vec<_>>().join(", ")]
        }));
        let unmeasured = self.kinds.iter().any(|kind| kind.error.is_none());
        let note = "the error is not measured: the weights are packed already, or not in a local directory\n";
        format!("\n{}{}", table(&rows), if unmeasured { note } else { "" })
    }

    /// Every allocation of a load in a line: the device, what it is for, its name and its size.
    pub fn allocation_table(&self) -> String {
        let row = |Allocation { device, purpose, name, bytes }: &Allocation| {
            vec![device.to_string(), purpose.to_string(), name.clone(), bytes.to_string()]
        };
        let allocations = self.allocations.iter().filter(|allocation| allocation.bytes > Bytes::ZERO);
        format!("\n{}", table(&allocations.map(row).collect::<Vec<_>>()))
    }
}

impl fmt::Display for Plan {
    /// A column a device, then the alternatives and the verdict.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, "")
    }
}

/// Escapes all that is written: names are a stranger's.
struct Escaped<'a, W>(&'a mut W);

impl<W: Write> Write for Escaped<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_str(&escaped(text))
    }
}

/// The first of some lines has a label.
fn label(at: usize, text: &str) -> String {
    if at == 0 { format!("\n{text:<8}  ") } else { " ".repeat(10) }
}

/// `1234567` as `1.2 M`.
fn count(number: u64) -> String {
    let value = number as f64;
    match number {
        n if n >= 1_000_000_000 => format!("{:.1} B", value / 1e9),
        n if n >= 1_000_000 => format!("{:.1} M", value / 1e6),
        n => n.to_string(),
    }
}

/// Rows of cells: the first column to the left, the others to the right.
fn table(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Writing to a String cannot fail.
            let _ = if column == 0 { write!(line, "{cell:<width$}") } else { write!(line, "   {cell:>width$}") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
