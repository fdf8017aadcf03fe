//! A plan as bars: for a terminal, as SVG, and as a page.
//!
//! A device's bar is its free memory, or what the plan takes where that is
//! more; its parts stand in it by their share.

use std::fmt::Write;

use super::{DevicePlan, Plan};
use crate::bytes::Bytes;

/// A part of a bar.
struct Part {
    name: &'static str,
    /// What stands for it without colour.
    glyph: char,
    /// Its colour on a terminal.
    ansi: u8,
    /// Its colour in a picture.
    fill: &'static str,
    bytes: fn(&DevicePlan) -> Bytes,
}

const PARTS: [Part; 5] = [
    Part { name: "weights", glyph: '█', ansi: 34, fill: "#3b6ea8", bytes: |device| device.weights },
    Part { name: "KV cache", glyph: '▓', ansi: 32, fill: "#4f9d69", bytes: |device| device.kv_cache },
    Part {
        name: "workspace, staging, driver",
        glyph: '▒',
        ansi: 33,
        fill: "#c9a227",
        bytes: |device| device.workspace + device.staging + device.driver_context,
    },
    Part { name: "reserve", glyph: '░', ansi: 90, fill: "#b8b8b8", bytes: |device| device.reserve },
    Part { name: "free", glyph: '·', ansi: 90, fill: "#eeeeee", bytes: |device| device.budget - device.total() },
];

/// Characters of a bar on a terminal.
const WIDTH: usize = 60;

impl DevicePlan {
    /// The bytes that the whole bar stands for.
    fn extent(&self) -> Bytes {
        PARTS.iter().map(|part| (part.bytes)(self)).sum()
    }

    /// `4.0 GiB of 5.5 GiB`.
    fn taken(&self) -> String {
        let over = if self.fits() { String::new() } else { format!(", {} too much", self.missing()) };
        format!("{} of {}{over}", self.total(), self.budget)
    }
}

impl Plan {
    /// A line for each device with its bar, then what the parts are.
    pub fn bars(&self, color: bool) -> String {
        let paint = |part: &Part, text: &str| {
            if color { format!("\x1b[{}m{text}\x1b[0m", part.ansi) } else { text.to_owned() }
        };
        let name_width = self.devices.iter().map(|device| device.id.to_string().len()).max().unwrap_or(0);
        let mut text = String::new();
        for device in &self.devices {
            text += &format!("{:<name_width$}  ", device.id);
            let mut edges = Edges::new(device, WIDTH as f64);
            for part in &PARTS {
                let (start, end) = edges.next((part.bytes)(device));
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to WIDTH")]
                let characters = (end.round() - start.round()) as usize;
                text += &paint(part, &part.glyph.to_string().repeat(characters));
            }
            text += &format!("  {}\n", device.taken());
        }
        let legend = PARTS.iter().map(|part| format!("{} {}", paint(part, &part.glyph.to_string()), part.name));
        format!("{text}{:name_width$}  {}\n", "", legend.collect::<Vec<_>>().join("  "))
    }

    /// The plan as an SVG picture.
    pub fn to_svg(&self) -> String {
        const LEFT: usize = 20;
        const BAR: usize = 720;
        const ROW: usize = 78;
        let height = 92 + ROW * self.devices.len();
        let verdict = if self.fits() { "it fits" } else { "it does not fit" };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <text x=\"{LEFT}\" y=\"28\" font-size=\"16\" font-weight=\"bold\">{}: {verdict}</text>\n\
             <text x=\"{LEFT}\" y=\"48\" fill=\"#555555\">{}</text>\n",
            escape(&self.model),
            escape(&self.conditions()),
            width = BAR + 2 * LEFT,
        );
        for (row, device) in self.devices.iter().enumerate() {
            let top = 64 + ROW * row;
            let color = if device.fits() { "#222222" } else { "#b00020" };
            let name = device.name.as_ref().map_or(String::new(), |name| format!(" ({name})"));
            let title = format!("{}{name}: {}", device.id, device.taken());
            // Writing to a String cannot fail.
            let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{}\" fill=\"{color}\">{}</text>", top + 14, escape(&title));
            let mut edges = Edges::new(device, BAR as f64);
            for part in &PARTS {
                let bytes = (part.bytes)(device);
                let (start, end) = edges.next(bytes);
                if end > start {
                    let _ = writeln!(
                        svg,
                        "<rect x=\"{:.1}\" y=\"{}\" width=\"{:.1}\" height=\"26\" fill=\"{}\"><title>{}: {bytes}</title></rect>",
                        LEFT as f64 + start,
                        top + 20,
                        end - start,
                        part.fill,
                        part.name
                    );
                }
            }
            self.draw_modules(&mut svg, device, LEFT as f64, top + 20, BAR as f64);
            let _ = writeln!(
                svg,
                "<text x=\"{LEFT}\" y=\"{}\" fill=\"#555555\">{}</text>",
                top + 60,
                escape(&self.content(device.id))
            );
        }
        let mut x = LEFT;
        for part in &PARTS {
            let y = height - 24;
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{}\"/>\
                 <text x=\"{}\" y=\"{}\" fill=\"#555555\">{}</text>",
                part.fill,
                x + 17,
                y + 11,
                part.name
            );
            x += 36 + 7 * part.name.len();
        }
        svg + "</svg>\n"
    }

    /// Lines between the modules in the weights' part of a bar.
    fn draw_modules(&self, svg: &mut String, device: &DevicePlan, left: f64, top: usize, width: f64) {
        let mut edges = Edges::new(device, width);
        for module in self.modules.iter().filter(|module| module.device == device.id) {
            let (start, end) = edges.next(module.weights);
            if end > start {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"26\" fill=\"none\" stroke=\"#ffffff\" \
                     stroke-width=\"0.6\" pointer-events=\"all\"><title>{}: {}</title></rect>",
                    left + start,
                    end - start,
                    escape(&module.path),
                    module.weights
                );
            }
        }
    }

    /// The plan as a page that needs no other file: the picture and the table.
    pub fn to_html(&self) -> String {
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{}</title>\n\
             <style>body {{ font-family: sans-serif; margin: 2em }}</style>\n{}<pre>{}</pre>\n</html>\n",
            escape(&self.model),
            self.to_svg(),
            escape(&self.to_string())
        )
    }
}

/// Where the parts of a bar begin and end.
struct Edges {
    scale: f64,
    before: Bytes,
}

impl Edges {
    fn new(device: &DevicePlan, width: f64) -> Self {
        Self { scale: width / device.extent().0.max(1) as f64, before: Bytes::ZERO }
    }

    fn next(&mut self, bytes: Bytes) -> (f64, f64) {
        let start = self.before;
        self.before += bytes;
        (start.0 as f64 * self.scale, self.before.0 as f64 * self.scale)
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
