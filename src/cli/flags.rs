//! How a command line spells what the library says to change.

use evenkeel::{Change, Setting};

/// A setting that a hint names, as one types it.
pub fn spelled(setting: &Setting) -> String {
    let typed = match setting {
        Setting::AnyModel => "--any-model".to_owned(),
        Setting::AutomaticPlacement => "--device-map auto".to_owned(),
        Setting::ChatTemplate => "--chat".to_owned(),
        Setting::Context(tokens) => format!("--context {tokens}"),
        Setting::Cpu => "--device-map cpu".to_owned(),
        Setting::Device(description) if description.contains(' ') => format!("--device \"{description}\""),
        Setting::Device(description) => format!("--device {description}"),
        Setting::KvCache(dtype) => format!("--kv-cache {dtype}"),
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::args::Arguments;

    #[test]
    fn what_is_spelled_is_there() {
        let all = Arguments::command();
        for setting in [
            Setting::AnyModel,
            Setting::AutomaticPlacement,
            Setting::ChatTemplate,
            Setting::Context(1),
            Setting::Cpu,
            Setting::Device("cpu=1GiB".to_owned()),
            Setting::KvCache("bf16"),
            Setting::MaxNewTokens(1),
            Setting::OffloadDirectory,
            Setting::Overwrite,
            Setting::Quantize(None),
            Setting::Replan,
            Setting::SaveQuantized,
            Setting::WriteMap,
        ] {
            let text = spelled(&setting);
            let words = text.trim_matches('`').split(' ').collect::<Vec<_>>();
            let mut flags = words.iter().filter_map(|word| word.strip_prefix("--"));
            let is_flag = |flag| {
                let mut all = all.get_subcommands().flat_map(clap::Command::get_arguments);
                all.any(|arg| arg.get_long() == Some(flag))
            };
            assert!(flags.all(is_flag), "{text}");
            assert!(words[0] != "evenkeel" || all.find_subcommand(words[1]).is_some(), "{text}");
        }
    }
}
