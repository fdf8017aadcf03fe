//! A plan as bars: for a terminal, as SVG, and as a page.
//!
//! A device's bar is its free memory, or what the plan takes where that is
//! more; its parts stand in it by their share.

use crate::bytes::Bytes;
use crate::error::escaped;
use crate::plan::{DevicePlan, Plan};

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
        bytes: |device| device.workspace + device.staging + device.program + device.driver,
    },
    Part { name: "reserve", glyph: '░', ansi: 90, fill: "#b8b8b8", bytes: |device| device.reserve },
    Part { name: "free", glyph: '·', ansi: 90, fill: "#eeeeee", bytes: |device| device.budget - device.total() },
];

/// Characters of a bar on a terminal.
const WIDTH: usize = 60;
/// Where a bar begins in a picture.
const LEFT: usize = 20;
/// Its width there.
const BAR: usize = 720;

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
            let edges = edges(device, WIDTH as f64, PARTS.iter().map(|part| (part.bytes)(device)));
            for (part, (start, end)) in PARTS.iter().zip(edges) {
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
            svg += &text(LEFT, top + 14, color, &title);
            let parts = PARTS.iter().map(|part| ((part.bytes)(device), format!("fill=\"{}\"", part.fill), part.name));
            svg += &rectangles(device, top + 20, parts.collect());
            // Lines between the modules, in the part of the weights.
            let line = "fill=\"none\" stroke=\"#ffffff\" stroke-width=\"0.6\" pointer-events=\"all\"";
            let modules = self.modules.iter().filter(|module| module.device == device.id);
            let modules = modules.map(|module| (module.weights, line.to_owned(), module.path.as_str()));
            svg += &rectangles(device, top + 20, modules.collect());
            svg += &text(LEFT, top + 60, "#555555", &self.content(device.id));
        }
        let mut x = LEFT;
        let y = height - 24;
        for Part { name, fill, .. } in &PARTS {
            svg += &format!("<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{fill}\"/>");
            svg += &text(x + 17, y + 11, "#555555", name);
            x += 36 + 7 * name.len();
        }
        svg + "</svg>\n"
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

/// Where parts of these bytes begin and end in a device's bar of `width`.
fn edges(device: &DevicePlan, width: f64, parts: impl Iterator<Item = Bytes>) -> impl Iterator<Item = (f64, f64)> {
    let scale = width / device.extent().0.max(1) as f64;
    parts.scan(Bytes::ZERO, move |end, bytes| {
        let start = *end;
        *end += bytes;
        Some((start.0 as f64 * scale, end.0 as f64 * scale))
    })
}

/// Parts of a device's bar in a picture: their bytes, how they look and what they are.
fn rectangles(device: &DevicePlan, top: usize, parts: Vec<(Bytes, String, &str)>) -> String {
    let edges: Vec<_> = edges(device, BAR as f64, parts.iter().map(|(bytes, ..)| *bytes)).collect();
    let parts = parts.into_iter().zip(edges).filter(|(_, (start, end))| end > start);
    let rectangle = |((bytes, style, name), (start, end)): ((Bytes, String, &str), (f64, f64))| {
        let (x, width, name) = (LEFT as f64 + start, end - start, escape(name));
        format!(
            "<rect x=\"{x:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"26\" {style}>\
             <title>{name}: {bytes}</title></rect>\n"
        )
    };
    parts.map(rectangle).collect()
}

/// A line of text in a picture.
fn text(x: usize, y: usize, color: &str, text: &str) -> String {
    format!("<text x=\"{x}\" y=\"{y}\" fill=\"{color}\">{}</text>\n", escape(text))
}

fn escape(text: &str) -> String {
    escaped(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
