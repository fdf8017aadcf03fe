//! The placement with the least predicted time for a token.

use super::runs::{Capacity, sequential};
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::plan::{Pace, PlannedModule};

/// With more ways to use the GPUs than this, they are used in the order of their speed.
const MAX_SETS: usize = 1 << 9;

/// GPUs that cannot be told apart.
struct Group {
    ids: Vec<DeviceId>,
    room: u64,
    pace: Pace,
}

/// The device of every module: contiguous runs over the GPUs in whatever
/// order, and before them or behind them one over the CPU and the disk, so
/// that a token with the context full takes the least time. Exact by dynamic
/// programming over sets of GPUs for up to nine different ones; equal ones
/// count as one.
///
/// Where nothing fits, as [`sequential`]. `paces` has one for each device.
pub fn fastest(modules: &[PlannedModule], devices: &[Capacity], paces: &[Pace]) -> Vec<DeviceId> {
    let count = modules.len();
    let gpus = devices.iter().take_while(|device| device.id.is_gpu()).count();
    let off = |modules: &[PlannedModule]| off_gpus(modules, &devices[gpus..], &paces[gpus..]);
    let time = |modules: &[PlannedModule]| off(modules).map_or(f64::INFINITY, |(_, time)| time);
    let host_hop = |at: usize| if at == 0 || at == count { 0.0 } else { paces.get(gpus).map_or(0.0, |pace| pace.hop) };
    let first: Vec<f64> = (0..=count).map(|end| time(&modules[..end])).collect();
    let last: Vec<f64> = (0..=count).map(|begin| time(&modules[begin..]) + host_hop(begin)).collect();
    let nothing = |at| (0..=count).map(|index| if index == at { 0.0 } else { f64::INFINITY }).collect::<Vec<_>>();

    let (on, paces) = (&devices[..gpus], &paces[..gpus]);
    let candidates = [runs(modules, on, paces, first, &nothing(count)), runs(modules, on, paces, nothing(0), &last)];
    let best = candidates.into_iter().flatten().min_by(|a, b| a.time.total_cmp(&b.time));
    let Some(Runs { begin, end, on_gpus, .. }) = best else {
        return sequential(modules, devices);
    };
    let off = |modules| off(modules).map_or_else(Vec::new, |(run, _)| run);
    [off(&modules[..begin]), on_gpus, off(&modules[end..])].concat()
}

/// The modules from `begin` to `end` on GPUs, and the time of all.
struct Runs {
    begin: usize,
    end: usize,
    on_gpus: Vec<DeviceId>,
    time: f64,
}

/// The fastest runs over the GPUs, where the modules before the first of them
/// take `before`, and those behind the last take `behind`, an infinite time for what cannot be.
fn runs(
    modules: &[PlannedModule],
    gpus: &[Capacity],
    paces: &[Pace],
    before: Vec<f64>,
    behind: &[f64],
) -> Option<Runs> {
    let count = modules.len();
    let mut groups = groups(gpus, paces);
    let sets = groups.iter().fold(1usize, |sets, group| sets.saturating_mul(group.ids.len() + 1));
    let in_order = sets > MAX_SETS;
    if in_order {
        groups = one_by_one(gpus, paces);
    }
    // A state is how many GPUs of each group hold a run; with too many of them, up to which one.
    let next_stride = |stride: &mut usize, group: &Group| {
        let next = stride.saturating_mul(group.ids.len() + 1);
        Some(std::mem::replace(stride, next))
    };
    let strides: Vec<usize> = groups.iter().scan(1, next_stride).collect();
    let states = if in_order { groups.len() + 1 } else { sets };
    let used = |state: usize, group: usize| state / strides[group] % (groups[group].ids.len() + 1);

    let mut time = vec![vec![f64::INFINITY; count + 1]; states];
    let mut from = vec![vec![None; count + 1]; states];
    time[0] = before;
    // The state in which one more GPU of a group holds a run, if one is free.
    let next = |state: usize, group: usize| {
        if in_order {
            (group >= state).then_some(group + 1)
        } else {
            (used(state, group) < groups[group].ids.len()).then(|| state + strides[group])
        }
    };
    for state in 0..states {
        for (at, group) in groups.iter().enumerate() {
            let Some(next) = next(state, at) else { continue };
            for begin in 0..count {
                let mut taken = 0u64;
                let mut sum = time[state][begin] + if begin == 0 { 0.0 } else { group.pace.hop };
                if !sum.is_finite() {
                    continue;
                }
                for (end, module) in modules.iter().enumerate().skip(begin) {
                    taken = taken.saturating_add((module.weights + module.kv_cache).0);
                    if taken > group.room {
                        break;
                    }
                    sum += seconds(module, group.pace);
                    if sum < time[next][end + 1] {
                        time[next][end + 1] = sum;
                        from[next][end + 1] = Some((state, begin, at));
                    }
                }
            }
        }
    }

    let ends = (0..states).flat_map(|state| (0..=count).map(move |end| (state, end)));
    let total = |(state, end): (usize, usize)| time[state][end] + behind[end];
    let best = ends.min_by(|a, b| total(*a).total_cmp(&total(*b))).filter(|best| total(*best).is_finite())?;
    let (mut state, end) = best;
    let mut on_gpus = vec![DeviceId::Cpu; end];
    let mut begin = end;
    while let Some((before, run, group)) = from[state][begin] {
        let nth = if in_order { 0 } else { used(before, group) };
        on_gpus[run..begin].fill(groups[group].ids[nth]);
        (state, begin) = (before, run);
    }
    Some(Runs { begin, end, on_gpus: on_gpus.split_off(begin), time: total(best) })
}

fn seconds(module: &PlannedModule, pace: Pace) -> f64 {
    (module.read + module.kv_cache).0 as f64 * pace.byte + if module.is_block() { pace.block } else { 0.0 }
}

fn groups(gpus: &[Capacity], paces: &[Pace]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (gpu, pace) in gpus.iter().zip(paces) {
        match groups.iter_mut().find(|group| group.room == gpu.room.0 && group.pace == *pace) {
            Some(group) => group.ids.push(gpu.id),
            None => groups.push(Group { ids: vec![gpu.id], room: gpu.room.0, pace: *pace }),
        }
    }
    groups
}

/// Each GPU as a group of its own, the fastest first.
fn one_by_one(gpus: &[Capacity], paces: &[Pace]) -> Vec<Group> {
    let group = |(gpu, pace): (&Capacity, &Pace)| Group { ids: vec![gpu.id], room: gpu.room.0, pace: *pace };
    let mut groups: Vec<Group> = gpus.iter().zip(paces).map(group).collect();
    groups.sort_by(|a, b| a.pace.byte.total_cmp(&b.pace.byte));
    groups
}

/// The devices of modules off the GPUs, and their time; `None` where they do not fit.
fn off_gpus(modules: &[PlannedModule], devices: &[Capacity], paces: &[Pace]) -> Option<(Vec<DeviceId>, f64)> {
    if modules.is_empty() {
        return Some((Vec::new(), 0.0));
    }
    if devices.is_empty() {
        return None;
    }
    let placement = sequential(modules, devices);
    let mut time = 0.0;
    for (device, pace) in devices.iter().zip(paces) {
        let here = || modules.iter().zip(&placement).filter(|(_, id)| **id == device.id).map(|(module, _)| module);
        let kv = match device.id {
            DeviceId::Disk => Bytes::ZERO,
            _ => modules.iter().map(|module| module.kv_cache).sum(),
        };
        if here().map(|module| module.weights).sum::<Bytes>() + kv > device.room {
            return None;
        }
        time += here().map(|module| seconds(module, *pace)).sum::<f64>();
    }
    Some((placement, time))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACE: Pace = Pace { byte: 1.0, block: 2.0, hop: 5.0 };

    /// Devices from (id, room, seconds a byte), and modules that read what they weigh.
    fn case(sizes: &[u64], devices: &[(&str, u64, f64)]) -> (Vec<PlannedModule>, Vec<Capacity>, Vec<Pace>) {
        let capacity = |device: &(&str, u64, f64)| Capacity { id: device.0.parse().unwrap(), room: Bytes(device.1) };
        let pace = |device: &(&str, u64, f64)| Pace { byte: device.2, ..PACE };
        (
            sizes.iter().map(|size| PlannedModule::block(*size)).collect(),
            devices.iter().map(capacity).collect(),
            devices.iter().map(pace).collect(),
        )
    }

    fn placed(sizes: &[u64], devices: &[(&str, u64, f64)]) -> String {
        let (modules, capacities, paces) = case(sizes, devices);
        let name = |id: &DeviceId| match id {
            DeviceId::Cuda(index) => index.to_string(),
            other => other.to_string()[..1].to_owned(),
        };
        fastest(&modules, &capacities, &paces).iter().map(name).collect()
    }

    #[test]
    fn cases_by_hand() {
        let nine = [9; 8];
        for (sizes, devices, placement) in [
            (&nine[..], &[("cuda:0", 100, 1.0)][..], "00000000"),
            // The faster one holds all of it.
            (&nine, &[("cuda:0", 100, 2.0), ("cuda:1", 100, 1.0)], "11111111"),
            // Not all: the faster one is filled, and first or last is the same.
            (&nine, &[("cuda:0", 100, 2.0), ("cuda:1", 50, 1.0)], "00011111"),
            // A hop costs more than it saves.
            (&[9, 1], &[("cuda:0", 12, 2.0), ("cuda:1", 10, 1.9)], "00"),
            // What is left goes to the CPU, then to the disk.
            (&nine, &[("cuda:0", 45, 1.0), ("cpu", 200, 9.0)], "cccc0000"),
            (&nine, &[("cuda:0", 45, 1.0), ("cpu", 24, 9.0), ("disk", 99, 99.0)], "ccdd0000"),
            (&[30, 9, 9, 9], &[("cuda:0", 45, 1.0), ("cpu", 200, 9.0)], "00cc"),
            (&[9, 9, 9, 30], &[("cuda:0", 45, 1.0), ("cpu", 200, 9.0)], "cc00"),
            (&nine, &[("cpu", 200, 9.0)], "cccccccc"),
            (&[], &[("cuda:0", 45, 1.0)], ""),
            // Nothing fits: as sequential.
            (&nine, &[("cuda:0", 25, 1.0), ("cuda:1", 25, 0.5)], "00111111"),
        ] {
            assert_eq!(placed(sizes, devices), placement, "{sizes:?} on {devices:?}");
        }
    }

    #[test]
    fn many_different_gpus_are_used_in_the_order_of_their_speed() {
        let names: Vec<String> = (0..12).map(|index| format!("cuda:{index}")).collect();
        let gpus: Vec<_> =
            (0..12).map(|index| (names[index].as_str(), 25 + index as u64, 30.0 - index as f64)).collect();
        let (modules, capacities, paces) = case(&[9; 6], &gpus);
        let placement = fastest(&modules, &capacities, &paces);
        let expected = [11, 11, 11, 10, 10, 10].map(DeviceId::Cuda);
        assert_eq!(placement, expected);
    }

    /// The time of a placement in runs, or `None` where a device overflows or the CPU stands between GPUs.
    fn time(modules: &[PlannedModule], devices: &[Capacity], paces: &[Pace], placement: &[DeviceId]) -> Option<f64> {
        let mut sum = 0.0;
        for (device, pace) in devices.iter().zip(paces) {
            let here = modules.iter().zip(placement).filter(|(_, id)| **id == device.id).map(|(module, _)| module);
            let taken: Bytes = here.clone().map(|module| module.weights + module.kv_cache).sum();
            if taken > device.room {
                return None;
            }
            sum += here.map(|module| seconds(module, *pace)).sum::<f64>();
        }
        let mut runs = placement.to_vec();
        runs.dedup();
        let is_at_an_end =
            runs.iter().position(|id| *id == DeviceId::Cpu).is_none_or(|at| at == 0 || at + 1 == runs.len());
        let hops = placement.windows(2).filter(|pair| pair[0] != pair[1]).count();
        is_at_an_end.then_some(sum + hops as f64 * PACE.hop)
    }

    proptest! {
        #[test]
        fn no_order_of_runs_is_faster(
            sizes in prop::collection::vec(1u64..30, 1..6),
            gpus in prop::collection::vec((5u64..60, 1u32..4), 0..4),
            cpu in 0u64..150,
        ) {
            let names: Vec<String> = (0..gpus.len()).map(|index| format!("cuda:{index}")).collect();
            let mut devices: Vec<_> =
                gpus.iter().zip(&names).map(|((room, pace), name)| (name.as_str(), *room, f64::from(*pace))).collect();
            devices.push(("cpu", cpu, 7.0));
            let (modules, capacities, paces) = case(&sizes, &devices);
            let mut best: Option<f64> = None;
            // Every assignment whose devices come in runs.
            let mut all = vec![Vec::new()];
            for _ in &modules {
                let longer = |run: Vec<DeviceId>| {
                    let next = |capacity: &Capacity| {
                        let fits = run.last() == Some(&capacity.id) || !run.contains(&capacity.id);
                        fits.then(|| [&run[..], &[capacity.id]].concat())
                    };
                    capacities.iter().filter_map(next).collect::<Vec<_>>()
                };
                all = all.into_iter().flat_map(longer).collect();
            }
            for placement in &all {
                if let Some(time) = time(&modules, &capacities, &paces, placement) {
                    best = Some(best.map_or(time, |best: f64| best.min(time)));
                }
            }
            let ours = time(&modules, &capacities, &paces, &fastest(&modules, &capacities, &paces));
            match (ours, best) {
                (Some(ours), Some(best)) => prop_assert!((ours - best).abs() < 1e-9, "{ours} {best}"),
                (ours, best) => prop_assert_eq!(ours, best),
            }
        }
    }
}
