//! The command that was given, with some of its flags changed: what a user can run next.

use std::collections::BTreeMap;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory};
use evenkeel::{Change, Error, Plan, Remedy};

use super::args::Arguments;
use super::flags;

/// A command, and the values that its arguments were given, in their order.
pub struct CommandLine {
    command: Command,
    given: Vec<(Arg, String)>,
}

impl CommandLine {
    pub fn new(matches: &ArgMatches) -> Self {
        let mut all = Arguments::command();
        // From here on a command has the global flags too.
        all.build();
        let (command, matches) = matches.subcommand().unwrap_or(("", matches));
        let command = all.find_subcommand(command).unwrap_or(&all).clone();
        let mut given = BTreeMap::new();
        for arg in command.get_arguments() {
            let id = arg.get_id().as_str();
            if matches.value_source(id) == Some(ValueSource::CommandLine) {
                let places = matches.indices_of(id).into_iter().flatten();
                let values = matches.get_raw(id).into_iter().flatten();
                let values = values.map(|value| (arg.clone(), value.to_string_lossy().into_owned()));
                given.extend(places.zip(values));
            }
        }
        let given = given.into_values().collect();
        Self { command, given }
    }

    /// The command that a remedy asks for, quoted for a shell; `None` where no
    /// flag of this command makes its changes.
    pub fn with(&self, remedy: &Remedy) -> Option<String> {
        let mut given = self.given.clone();
        for change in &remedy.changes {
            let (flag, value) = flags::of_change(change);
            let arg = self.command.get_arguments().find(|arg| arg.get_long() == Some(flag))?;
            if matches!(change, Change::Memory { .. }) && given.iter().all(|(other, _)| other != arg) {
                // The devices are the machine's own.
                return None;
            }
            self.set(&mut given, arg, value);
        }
        let mut words = vec!["evenkeel".to_owned(), self.command.get_name().to_owned()];
        for (arg, value) in given {
            match arg.get_long() {
                None => words.push(value),
                Some(flag) if !arg.get_action().takes_values() => words.push(format!("--{flag}")),
                Some(flag) if value.starts_with('-') => words.push(format!("--{flag}={value}")),
                Some(flag) => words.extend([format!("--{flag}"), value]),
            }
        }
        shlex::try_join(words.iter().map(String::as_str)).ok()
    }

    /// Gives an argument a value, where it stands or at the end, and takes away what cannot stand beside it. Of
    /// values such as `DEVICE=…`, only that of the same device is replaced, and a bandwidth kept.
    fn set(&self, given: &mut Vec<(Arg, String)>, arg: &Arg, value: String) {
        let excludes = |one: &Arg, other: &Arg| self.command.get_arg_conflicts_with(one).contains(&other);
        given.retain(|(other, _)| !excludes(arg, other) && !excludes(other, arg));
        let of_devices = matches!(arg.get_action(), ArgAction::Append);
        let device = |value: &str| of_devices.then(|| value.split('=').next().map(|id| id.trim().to_owned()));
        match given.iter_mut().find(|(other, old)| other == arg && device(old) == device(&value)) {
            Some((_, old)) => {
                let bandwidth = old.find('@').filter(|_| of_devices).map(|at| old.split_off(at));
                *old = value + &bandwidth.unwrap_or_default();
            }
            None => given.push((arg.clone(), value)),
        }
    }

    /// The error of a plan that does not fit, with commands that would as its hints.
    pub fn does_not_fit(&self, plan: &Plan) -> Error {
        plan.remedies.iter().fold(plan.does_not_fit(), |error, remedy| {
            let command = self.with(remedy).map_or(String::new(), |command| format!("\n      {command}"));
            error.hint(format!("{remedy}{command}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use evenkeel::DeviceId;
    use evenkeel::Scheme;
    use evenkeel::bytes::{Bytes, GIB};

    use super::*;

    #[test]
    fn a_flag_is_set_where_it_stands() {
        let int4 = Change::Quantize { scheme: Scheme::Int4 };
        let context = Change::Context { tokens: 9 };
        let memory = |device| {
            let free = Bytes(3 * GIB);
            Change::Memory {
                device,
                free,
                missing: free,
                bandwidth: "51GB/s".parse().ok().filter(|_| device == DeviceId::Cpu),
            }
        };
        let budget = Change::Budget { device: DeviceId::Cpu, max_memory: Bytes(GIB) };
        for (words, change, changed) in [
            ("plan m", &int4, Some("plan m --quantize int4")),
            ("plan m --quantize none --context 8", &int4, Some("plan m --quantize int4 --context 8")),
            ("-q plan --quantize=none m -v", &int4, Some("plan --quiet --quantize int4 m --verbose")),
            ("perplexity m --text t --compare int8", &int4, Some("perplexity m --text t --quantize int4")),
            ("plan m --max-context --batch 2", &context, Some("plan m --batch 2 --context 9")),
            ("plan m --check map.json -q", &Change::Automatic, Some("plan m --quiet --device-map auto")),
            ("plan m --device-map a@b=c.json", &Change::Automatic, Some("plan m --device-map auto")),
            ("generate --prompt --context m", &context, Some("generate '--prompt=--context' m --context 9")),
            ("generate m --prompt x", &Change::Batch { sequences: 2 }, None),
            ("plan m", &memory(DeviceId::Cpu), None),
            (
                "plan m --device cuda:0=1GiB@936GB/s --device=cuda:1=2GiB",
                &memory(DeviceId::Cuda(0)),
                Some("plan m --device 'cuda:0=3GiB@936GB/s' --device 'cuda:1=2GiB'"),
            ),
            (
                "plan m --device=cuda:1=2GiB,disk=9GiB",
                &memory(DeviceId::Cpu),
                Some("plan m --device 'cuda:1=2GiB' --device 'disk=9GiB' --device 'cpu=3GiB@51GB/s'"),
            ),
            (
                "plan m --max-memory disk=2GiB,cpu=9GiB -q",
                &budget,
                Some("plan m --max-memory 'disk=2GiB' --max-memory 'cpu=1GiB' --quiet"),
            ),
        ] {
            let matches = Arguments::command().get_matches_from(format!("evenkeel {words}").split(' '));
            let remedy = Remedy { changes: vec![change.clone()], total: Bytes::ZERO, off_gpus: 0, speed: None };
            let command = CommandLine::new(&matches).with(&remedy);
            assert_eq!(command, changed.map(|changed| format!("evenkeel {changed}")), "{words}");
        }
    }
}
