//! A plan as text and as JSON.

use std::fmt::{self, Write};

use serde::Serialize;

use super::{DevicePlan, Plan, PlannedModule};
use crate::architecture::ModuleKind;
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::device_map::SCHEMA_VERSION;

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
    ("driver", |device| device.driver_context),
    ("total", DevicePlan::total),
];

#[derive(Serialize)]
struct Json<'a> {
    schema_version: u64,
    fits: bool,
    #[serde(flatten)]
    plan: &'a Plan,
    totals: Vec<DeviceTotal>,
}

#[derive(Serialize)]
struct DeviceTotal {
    id: DeviceId,
    total: Bytes,
    headroom: Bytes,
    missing: Bytes,
}

impl Plan {
    /// The plan as JSON; sizes are bytes.
    pub fn to_json(&self) -> String {
        let totals = self.devices.iter().map(|device| DeviceTotal {
            id: device.id,
            total: device.total(),
            headroom: device.budget - device.total(),
            missing: device.missing(),
        });
        let json = Json { schema_version: SCHEMA_VERSION, fits: self.fits(), plan: self, totals: totals.collect() };
        // Every field is a number, a text, or a list or map with text keys.
        serde_json::to_string_pretty(&json).unwrap_or_default() + "\n"
    }

    /// Blocks of `device` as ranges, `0-11, 14`.
    fn blocks(&self, device: DeviceId) -> String {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for module in self.modules.iter().filter(|module| module.device == device) {
            let ModuleKind::Block(index) = module.kind else {
                continue;
            };
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == index => *last = index,
                _ => ranges.push((index, index)),
            }
        }
        let texts = ranges.iter().map(
            |(first, last)| {
                if first == last { first.to_string() } else { format!("{first}-{last}") }
            },
        );
        texts.collect::<Vec<_>>().join(", ")
    }

    /// What else than blocks is on `device`.
    fn others(&self, device: DeviceId) -> Vec<&str> {
        let other = |module: &&PlannedModule| module.device == device && !matches!(module.kind, ModuleKind::Block(_));
        self.modules.iter().filter(other).filter_map(|module| module.path.rsplit('.').next()).collect()
    }
}

impl fmt::Display for Plan {
    /// A column a device, then the verdict.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blocks = self.modules.iter().filter(|module| matches!(module.kind, ModuleKind::Block(_))).count();
        write!(f, "{}: {}, {blocks} blocks, {} parameters", self.model, self.architecture, count(self.parameters))?;
        if let Some(dtype) = &self.dtype {
            write!(f, ", {dtype}")?;
        }
        let rules = self
            .quantize
            .iter()
            .map(|(path, scheme)| if path.is_empty() { scheme.to_string() } else { format!("{path} {scheme}") });
        writeln!(
            f,
            "\nquantize {}; context {}; batch {}\n",
            rules.collect::<Vec<_>>().join(", "),
            self.context,
            self.batch
        )?;

        let mut rows: Vec<Vec<String>> = vec![vec![String::new()]];
        rows[0].extend(self.devices.iter().map(|device| device.id.to_string()));
        for (name, part) in ROWS {
            let mut row = vec![(*name).to_owned()];
            row.extend(self.devices.iter().map(|device| match part(device) {
                Bytes::ZERO => "-".to_owned(),
                bytes => bytes.to_string(),
            }));
            rows.push(row);
        }
        let mut headroom = vec!["headroom".to_owned()];
        headroom.extend(self.devices.iter().map(|device| {
            if device.fits() { (device.budget - device.total()).to_string() } else { format!("-{}", device.missing()) }
        }));
        rows.push(headroom);
        let mut placed = vec!["blocks".to_owned()];
        placed.extend(self.devices.iter().map(|device| dash(self.blocks(device.id))));
        rows.push(placed);
        let others: Vec<_> = self.devices.iter().map(|device| self.others(device.id)).collect();
        for line in 0..others.iter().map(Vec::len).max().unwrap_or(0) {
            let mut row = vec![if line == 0 { "also" } else { "" }.to_owned()];
            row.extend(others.iter().map(|names| names.get(line).copied().unwrap_or_default().to_owned()));
            rows.push(row);
        }
        f.write_str(&table(&rows))?;

        for device in self.devices.iter().filter(|device| device.name.is_some()) {
            writeln!(f, "{}: {}", device.id, device.name.as_deref().unwrap_or_default())?;
        }
        for device in &self.idle {
            let name = device.name.as_deref().unwrap_or("a GPU");
            writeln!(
                f,
                "{} ({name}) is not used: evenkeel needs compute capability 7.5 and the NVIDIA driver 550",
                device.id
            )?;
        }
        for (at, outline) in self.placements.iter().enumerate() {
            writeln!(f, "{}{outline}", if at == 0 { "\nplaced  " } else { "        " })?;
        }
        if self.fits() {
            writeln!(f, "\nit fits")?;
        } else {
            writeln!(f, "\nit does not fit")?;
            for device in self.devices.iter().filter(|device| !device.fits()) {
                writeln!(
                    f,
                    "  {} lacks {}: {} are needed, {} may be taken",
                    device.id,
                    device.missing(),
                    device.total(),
                    device.budget
                )?;
            }
            for remedy in &self.remedies {
                writeln!(f, "  {remedy}")?;
            }
        }
        Ok(())
    }
}

fn dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
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
