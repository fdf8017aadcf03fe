//! A device map held against the modules of a model.

use std::collections::{HashMap, HashSet};

use super::{DeviceMap, Entry};
use crate::architecture::{ModuleKind, ModuleTree, Paths};
use crate::device::DeviceId;
use crate::error::{Error, Hint, Result, Setting, did_you_mean, first_five, printable};
use crate::module_path::{and_above, block_range};

impl DeviceMap {
    /// The device of every module, in the order of `ModuleTree::modules`.
    ///
    /// A tied head that the map does not name goes where the embedding goes.
    ///
    /// # Errors
    /// The map names a module that the model does not have, leaves one out,
    /// has an entry to which longer ones leave nothing, splits a block, or
    /// parts a tied head from its embedding.
    pub fn resolve(&self, tree: &ModuleTree) -> Result<Vec<DeviceId>> {
        let paths = tree.paths();
        let entries = self.expand(tree, &paths)?;
        let by_path: HashMap<&str, usize> =
            entries.iter().enumerate().map(|(at, entry)| (entry.path.as_str(), at)).collect();
        let mut used = HashSet::new();
        let mut devices = Vec::with_capacity(tree.modules.len());
        let mut uncovered = Vec::new();
        for module in &tree.modules {
            let mut at: Option<usize> = None;
            for parameter in &module.parameters {
                let Some(entry) = and_above(&parameter.module).find_map(|path| by_path.get(path)).copied() else {
                    uncovered.push(parameter.module.as_str());
                    continue;
                };
                used.insert(entry);
                let (first, second) = (&entries[*at.get_or_insert(entry)], &entries[entry]);
                if first.device != second.device {
                    let what = format!("splits `{}` between {} and {}", module.path, first.device, second.device);
                    return Err(self.wrong(what, second, "a block is placed whole"));
                }
            }
            let device = match (at, module.kind) {
                (None, ModuleKind::Head) if tree.tied => self.tied_head(tree, &entries, devices.first().copied())?,
                _ => at.map(|entry| entries[entry].device),
            };
            // A module without a device is among the uncovered, which is an error below.
            devices.push(device.unwrap_or(DeviceId::Cpu));
        }
        if !uncovered.is_empty() {
            let (origin, count, plural) = (&self.origin, uncovered.len(), if uncovered.len() == 1 { "" } else { "s" });
            let names = first_five(uncovered);
            let what = "`\"\": \"cpu\"` catches all that no longer path places; {} writes a whole map";
            return Err(Error::input(format!("device map `{origin}` leaves out {count} module{plural}: {names}"))
                .hint(Hint::naming(what, [Setting::WriteMap])));
        }
        for (at, entry) in entries.iter().enumerate() {
            if paths.hold_weights(&entry.path) && !used.contains(&at) {
                let what = format!("has an entry `{}` that places nothing", entry.path);
                return Err(self.wrong(what, entry, "longer paths take all of its modules"));
            }
        }
        Ok(devices)
    }

    fn wrong(&self, what: impl std::fmt::Display, entry: &Entry, why: &str) -> Error {
        Error::input(format!("device map `{}` {what}", self.origin)).caused_by(format!("{}: {why}", entry.place))
    }

    fn tied_head(&self, tree: &ModuleTree, entries: &[Entry], embedding: Option<DeviceId>) -> Result<Option<DeviceId>> {
        let named = entries.iter().find(|entry| entry.path == "lm_head");
        match (named, embedding) {
            (Some(entry), Some(embedding)) if entry.device != embedding => Err(self.wrong(
                format!("puts `lm_head` on {} and `{}` on {embedding}", entry.device, tree.embedding()),
                entry,
                "the model ties them: they share one copy of their weights",
            )),
            _ => Ok(embedding),
        }
    }

    /// The entries with ranges of blocks written out, every path known to the model.
    fn expand(&self, tree: &ModuleTree, known: &Paths) -> Result<Vec<Entry>> {
        let mut expanded = Vec::new();
        let mut seen = HashSet::new();
        let blocks = tree.modules.iter().filter(|module| module.is_block()).count();
        for entry in &self.entries {
            let paths = match block_range(&entry.path) {
                Some((parent, first, last)) if parent == tree.blocks => {
                    if first > last || last >= blocks {
                        let what = format!("places unknown blocks `{}`", printable(&entry.path));
                        let why = format!("the model has the blocks 0 to {}", blocks.saturating_sub(1));
                        return Err(self.wrong(what, entry, &why));
                    }
                    (first..=last).map(|index| format!("{parent}.{index}")).collect()
                }
                _ => vec![entry.path.clone()],
            };
            for path in paths {
                if !known.have(&path) {
                    return Err(self.unknown(&path, entry, tree));
                }
                if !seen.insert(path.clone()) {
                    let what = format!("places `{path}` twice");
                    return Err(self.wrong(what, entry, "an earlier entry places it already"));
                }
                expanded.push(Entry { path, ..entry.clone() });
            }
        }
        Ok(expanded)
    }

    fn unknown(&self, path: &str, entry: &Entry, tree: &ModuleTree) -> Error {
        let error =
            self.wrong(format!("places unknown module `{}`", printable(path)), entry, "the model has no such module");
        let modules = tree.modules.iter().map(|module| module.path.as_str());
        let parameters = tree.parameters().map(|(_, parameter)| parameter.module.as_str());
        let groups = [tree.base, tree.blocks.as_str()];
        let own = Hint::naming("{} writes a map with this model's own names", [Setting::WriteMap]);
        error.hint(did_you_mean(path, groups.into_iter().chain(modules).chain(parameters), own))
    }
}
