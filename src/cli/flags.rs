//! How a command line spells what the library says to change.

use evenkeel::error::Setting;
use evenkeel::plan::Change;

/// A setting that a hint names, as one types it.
pub fn spelled(setting: &Setting) -> String {
    let typed = match setting {
        Setting::AnyModel => "--any-model".to_owned(),
        Setting::AutomaticPlacement => "--device-map auto".to_owned(),
        Setting::ChatTemplate => "--chat".to_owned(),
        Setting::Context(tokens) => format!("--context {tokens}"),
        Setting::Device(description) if description.contains(' ') => format!("--device \"{description}\""),
        Setting::Device(description) => format!("--device {description}"),
        Setting::MaxNewTokens(tokens) => format!("--max-new-tokens {tokens}"),
        Setting::OffloadDirectory => "--offload-dir".to_owned(),
        Setting::Overwrite => "--force".to_owned(),
        Setting::Quantize(None) => "--quantize".to_owned(),
        Setting::Quantize(Some(scheme)) => format!("--quantize {scheme}"),
        Setting::Replan => "--on-shortfall replan".to_owned(),
        Setting::SaveQuantized => "evenkeel quantize".to_owned(),
        Setting::WriteMap => "evenkeel plan --output FILE".to_owned(),
    };
    format!("`{typed}`")
}

/// The flag that makes a change, without its dashes, and its value. That of memory describes a device, which
/// `plan` can.
pub fn of_change(change: &Change) -> (&'static str, String) {
    match change {
        Change::Automatic => ("device-map", "auto".to_owned()),
        Change::Batch { sequences } => ("batch", sequences.to_string()),
        Change::Budget { device, max_memory } => ("max-memory", format!("{device}={}", max_memory.exact())),
        Change::Context { tokens } => ("context", tokens.to_string()),
        Change::KvCache { dtype } => ("kv-cache", dtype.to_string()),
        Change::Memory { device, free, bandwidth, .. } => {
            let bandwidth = bandwidth.map(|bandwidth| format!("@{bandwidth}"));
            ("device", format!("{device}={}{}", free.exact(), bandwidth.unwrap_or_default()))
        }
        Change::Placement { placement } => ("placement", placement.to_string()),
        Change::Quantize { scheme } => ("quantize", scheme.to_string()),
    }
}
