//! The command that was given, with some of its flags changed: what a user can run next.

use evenkeel::plan::{Change, Remedy};

use super::flags;

/// Flags whose value may look like a flag.
const FREE_TEXT: [&str; 3] = ["--prompt", "--stop", "--system"];

/// Flags that cannot stand beside another, and how many words they are.
const RIVALS: [(&str, &str, usize); 3] =
    [("--batch", "--max-batch", 1), ("--context", "--max-context", 1), ("--device-map", "--check", 2)];

/// The words of a command line.
pub struct CommandLine(Vec<String>);

impl CommandLine {
    /// That of this process.
    pub fn of_process() -> Self {
        let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
        Self(std::iter::once("evenkeel".to_owned()).chain(words).collect())
    }

    /// The command that a remedy asks for, quoted for a shell; `None` where no
    /// flag of this command makes its changes.
    pub fn with(&self, remedy: &Remedy) -> Option<String> {
        let describes = self.0.iter().any(|word| flag(word) == "--device");
        let commands = ["devices", "generate", "perplexity", "plan", "quantize"];
        let plans = self.0.iter().find(|word| commands.contains(&word.as_str())).is_some_and(|word| word == "plan");
        let mut words = self.0.clone();
        for change in &remedy.changes {
            let (flag, value) = flags::of_change(change);
            let flag = &format!("--{flag}");
            match change {
                Change::Memory { .. } if !describes => return None,
                Change::Batch { .. } if !plans => return None,
                _ => {}
            }
            set(&mut words, flag, &value);
        }
        shlex::try_join(words.iter().map(String::as_str)).ok()
    }
}

fn flag(word: &str) -> &str {
    word.split_once('=').map_or(word, |(flag, _)| flag)
}

/// Gives a flag a value, where it stands or at the end. Of flags that take
/// `DEVICE=…`, only that of the same device is replaced, and a bandwidth kept.
fn set(words: &mut Vec<String>, name: &str, value: &str) {
    let device = matches!(name, "--device" | "--max-memory").then(|| flag(value));
    for (_, rival, count) in RIVALS.iter().filter(|(flag, ..)| *flag == name) {
        if let Some(at) = words.iter().position(|word| flag(word) == *rival) {
            let count = if words[at].contains('=') { 1 } else { *count };
            words.drain(at..words.len().min(at + count));
        }
    }
    let mut at = 1;
    while at < words.len() {
        let is_here = flag(&words[at]) == name;
        let (old, words_taken) = match words[at].split_once('=') {
            Some((_, old)) => (old, 1),
            None => (words.get(at + 1).map_or("", String::as_str), 2),
        };
        if is_here && device.is_none_or(|device| flag(old) == device) {
            let bandwidth = old.split_once('@').map_or(String::new(), |(_, bandwidth)| format!("@{bandwidth}"));
            let end = words.len().min(at + words_taken);
            words.splice(at..end, [name.to_owned(), format!("{value}{bandwidth}")]);
            return;
        }
        at += if FREE_TEXT.contains(&words[at].as_str()) { 2 } else { 1 };
    }
    words.extend([name.to_owned(), value.to_owned()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_set_where_it_stands() {
        for (words, name, value, changed) in [
            ("plan m", "--quantize", "int4", "plan m --quantize int4"),
            ("plan m --quantize none --context 8", "--quantize", "int4", "plan m --quantize int4 --context 8"),
            ("plan m --max-context --batch 2", "--context", "9", "plan m --batch 2 --context 9"),
            ("plan m --check map.json -q", "--device-map", "auto", "plan m -q --device-map auto"),
            ("plan m --check=map.json -q", "--device-map", "auto", "plan m -q --device-map auto"),
            ("plan --quantize=none m", "--quantize", "int4", "plan --quantize int4 m"),
            ("generate --prompt --context m", "--context", "9", "generate --prompt --context m --context 9"),
            (
                "plan m --device cuda:0=1GiB@936GB/s --device=cuda:1=2GiB",
                "--device",
                "cuda:0=3GiB",
                "plan m --device cuda:0=3GiB@936GB/s --device=cuda:1=2GiB",
            ),
            (
                "plan m --device=cuda:1=2GiB",
                "--device",
                "cpu=3GiB@51GB/s",
                "plan m --device=cuda:1=2GiB --device cpu=3GiB@51GB/s",
            ),
        ] {
            let mut given: Vec<String> = format!("evenkeel {words}").split(' ').map(str::to_owned).collect();
            set(&mut given, name, value);
            assert_eq!(given.join(" "), format!("evenkeel {changed}"), "{words}");
        }
    }
}
