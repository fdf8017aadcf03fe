//! `infer_auto_device_map` as Transformers 5.23 has it, and `clean_device_map`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::flat::{Flat, Kind};
use super::{Model, Placement, join};
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::device_map::MaxMemory;
use crate::error::{Error, Result};

/// Places `model` within `budgets`: GPUs, then the CPU where it has a budget,
/// then the disk, which has no limit.
///
/// Modules are taken in order, each with what is tied to it. What does not fit
/// is split into its parts, or where it must not be, goes to the next device,
/// and no device is returned to. The first GPU and the CPU keep room for the
/// largest layer that was still to come when the largest was last looked for.
///
/// # Errors
/// A tie names a parameter that is not there or stands in no module of its
/// own, for which Transformers raises an `IndexError`.
pub fn infer_auto_device_map(model: &Model, budgets: &MaxMemory) -> Result<Placement> {
    let flat = Flat::new(model);
    let ties = tie_groups(model, &flat)?;
    let limited = budgets.keys().copied().filter(|id| *id != DeviceId::Disk);
    let mut devices = limited.chain([DeviceId::Disk]).peekable();
    let first = devices.peek().copied();
    let mut walk = Walk::new(&flat);
    let mut placed: Vec<(usize, DeviceId)> = Vec::new();
    let (mut device, mut used) = (devices.next().unwrap_or(DeviceId::Disk), 0u64);
    while let Some(node) = walk.next() {
        let partners = walk.tied_to(node, &ties)?;
        let bytes = flat.nodes[node].bytes;
        let with_ties = partners.iter().fold(bytes, |sum, other| sum.saturating_add(flat.nodes[*other].bytes));
        let keeps_room = Some(device) == first || device == DeviceId::Cpu;
        let room = match device {
            DeviceId::Disk => Some(u64::MAX),
            _ => budgets[&device].0.checked_sub(if keeps_room { walk.largest } else { 0 }),
        };
        let fits = |bytes: u64| room.is_some_and(|room| used.saturating_add(bytes) <= room);
        if fits(with_ties) {
            used = used.saturating_add(with_ties);
            walk.queue.retain(|other| !partners.contains(other));
            placed.extend([node].into_iter().chain(partners).map(|node| (node, device)));
            continue;
        }
        walk.queue.push_front(node);
        if fits(bytes)
            && let Some(other) = partners.iter().find(|other| flat.is_splittable(**other))
        {
            walk.split(*other);
        } else if flat.is_splittable(node) {
            walk.split(node);
        } else {
            (device, used) = (devices.next().unwrap_or(DeviceId::Disk), 0);
        }
    }
    let mut planned = BTreeMap::new();
    for (node, device) in &placed {
        *planned.entry(*device).or_insert(Bytes::ZERO) += Bytes(flat.nodes[*node].bytes);
    }
    let mut device_map = placed.into_iter().map(|(node, device)| (flat.nodes[node].path.clone(), device)).collect();
    clean_device_map(&mut device_map, "");
    Ok(Placement { device_map, planned })
}

/// The modules that are still to be placed, and the largest layer among them.
struct Walk<'a> {
    flat: &'a Flat,
    queue: VecDeque<usize>,
    /// Bytes of the largest layer.
    largest: u64,
    /// The layers that are as large and have not come yet.
    largest_layers: Vec<usize>,
}

impl<'a> Walk<'a> {
    fn new(flat: &'a Flat) -> Self {
        let buffers = flat.children(0).filter(|child| flat.nodes[*child].kind == Kind::Buffer);
        let queue = flat.parts(0).chain(buffers).collect();
        let mut walk = Self { flat, queue, largest: 0, largest_layers: Vec::new() };
        walk.find_largest(true);
        walk
    }

    /// Takes the next module, and looks for the largest layer again where none is left of those found.
    fn next(&mut self) -> Option<usize> {
        let node = self.queue.pop_front()?;
        let held = node..self.flat.nodes[node].end;
        self.largest_layers.retain(|layer| !held.contains(layer));
        if self.largest_layers.is_empty() {
            self.find_largest(false);
        }
        Some(node)
    }

    /// Looks for the largest layer of the queue: a module that is not split or
    /// has no children. Tensors in the queue count only at the start.
    fn find_largest(&mut self, with_tensors: bool) {
        (self.largest, self.largest_layers) = (0, Vec::new());
        let mut left: Vec<usize> = self.queue.iter().copied().collect();
        left.retain(|at| with_tensors || self.flat.nodes[*at].is_module());
        while let Some(at) = left.pop() {
            let node = &self.flat.nodes[at];
            if self.flat.is_splittable(at) {
                left.extend(self.flat.modules(at));
                continue;
            }
            if node.bytes > self.largest {
                (self.largest, self.largest_layers) = (node.bytes, Vec::new());
            }
            if node.bytes == self.largest {
                self.largest_layers.push(at);
            }
        }
    }

    /// Puts the parts of a module of the queue in its place.
    fn split(&mut self, node: usize) {
        let parts: Vec<usize> = self.flat.parts(node).collect();
        let replace = |at: usize| if at == node { parts.clone() } else { vec![at] };
        self.queue = self.queue.drain(..).flat_map(replace).collect();
        self.find_largest(false);
    }

    /// The modules of the queue that hold what is tied to a parameter of `node`, each once.
    fn tied_to(&self, node: usize, ties: &[Vec<usize>]) -> Result<Vec<usize>> {
        let is_inside = |tied: &usize| self.flat.nodes[node].is_named_in(&self.flat.nodes[*tied].path);
        let mut holders = Vec::new();
        for group in ties.iter().filter(|group| group.iter().any(is_inside)) {
            for tied in group.iter().filter(|tied| !is_inside(tied)) {
                let holds = |at: &usize| *at < *tied && *tied < self.flat.nodes[*at].end;
                let holder = self.queue.iter().copied().find(holds);
                let holder = holder.ok_or_else(|| cannot_tie(&self.flat.nodes[*tied].path))?;
                if !holders.contains(&holder) {
                    holders.push(holder);
                }
            }
        }
        Ok(holders)
    }
}

/// Parameters that are one and the same, each group in the order of their paths.
fn tie_groups(model: &Model, flat: &Flat) -> Result<Vec<Vec<usize>>> {
    let mut groups: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (target, source) in &model.ties {
        groups.entry(source).or_default().extend([target.as_str(), source]);
    }
    let node = |path: &str| flat.nodes.iter().position(|node| node.path == path).ok_or_else(|| cannot_tie(path));
    groups.into_values().map(|group| group.into_iter().map(node).collect()).collect()
}

fn cannot_tie(path: &str) -> Error {
    Error::input(format!("Transformers cannot place a model in which `{path}` is tied as it is here"))
}

/// Replaces all keys under a prefix by the prefix where there are several, all
/// with the same value: that of `module`, and of what is in it.
pub fn clean_device_map<D: Copy + PartialEq>(device_map: &mut BTreeMap<String, D>, module: &str) {
    let prefix = join(module, "");
    let keys: Vec<String> = device_map
        .range(prefix.clone()..)
        .map(|(key, _)| key)
        .take_while(|key| key.starts_with(&prefix))
        .cloned()
        .collect();
    let Some(value) = keys.first().map(|key| device_map[key]) else {
        return;
    };
    if keys.len() > 1 && keys.iter().all(|key| device_map[key] == value) {
        for key in &keys {
            device_map.remove(key);
        }
        device_map.insert(module.to_owned(), value);
        return;
    }
    let child = |key: &String| {
        let name = key[prefix.len()..].split('.').next().unwrap_or_default();
        format!("{prefix}{name}")
    };
    let children: BTreeSet<String> = keys.iter().filter(|key| key.len() > module.len()).map(child).collect();
    for child in children {
        clean_device_map(device_map, &child);
    }
}
