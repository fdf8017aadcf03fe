//! The placement with the least predicted time for a token.

use super::runs::{Capacity, sequential};
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::plan::PlannedModule;
use crate::plan::speed::{BLOCK, HOP};

/// More GPUs than this are used in the order of their speed.
const MAX_IN_ANY_ORDER: usize = 9;

/// The device of every module: contiguous runs over the GPUs in whatever
/// order, and before them or behind them one over the CPU and the disk, so
/// that a token with the context full takes the least time. Exact by dynamic
/// programming over sets of GPUs for up to nine, or where all are equal.
///
/// Where nothing fits, as [`sequential`]. `paces` has the seconds a byte of each device.
pub fn fastest(modules: &[PlannedModule], devices: &[Capacity], paces: &[f64]) -> Vec<DeviceId> {
    let found = [true, false].into_iter().filter_map(|host_first| runs(modules, devices, paces, host_first));
    let best = found.min_by(|(a, _), (b, _)| a.total_cmp(b));
    best.map_or_else(|| sequential(modules, devices), |(_, placement)| placement)
}

/// The time of the fastest runs with the host's before those of the GPUs or behind them, and the device of every module.
fn runs(
    modules: &[PlannedModule],
    devices: &[Capacity],
    paces: &[f64],
    host_first: bool,
) -> Option<(f64, Vec<DeviceId>)> {
    let count = modules.len();
    let (gpus, host) = devices.split_at(devices.partition_point(|device| device.id.is_gpu()));
    let (gpu_paces, host_paces) = paces.split_at(gpus.len());
    let off = |is_here, modules: &[PlannedModule]| match modules {
        [] => Some((0.0, Vec::new())),
        _ if is_here => on_host(modules, host, host_paces),
        _ => None,
    };
    let off_time = |is_here, modules| off(is_here, modules).map_or(f64::INFINITY, |(time, _)| time);
    let before: Vec<_> = (0..=count).map(|end| off_time(host_first, &modules[..end])).collect();
    let hop = |begin: usize| if begin == 0 || begin == count { 0.0 } else { HOP };
    let behind: Vec<_> = (0..=count).map(|begin| off_time(!host_first, &modules[begin..]) + hop(begin)).collect();

    let mut gpus: Vec<_> = gpus.iter().zip(gpu_paces.iter().copied()).collect();
    let in_order = gpus.len() > MAX_IN_ANY_ORDER;
    if in_order {
        gpus.sort_by(|a, b| a.1.total_cmp(&b.1));
    }
    // A state is the set of GPUs that hold a run; with too many of them, the number up to the last that does.
    let states = if in_order { gpus.len() + 1 } else { 1 << gpus.len() };
    // Of equal GPUs the first that is free stands for all.
    let kind = |gpu: usize| (gpus[gpu].0.room, gpus[gpu].1.to_bits());
    let is_free = |state: usize, gpu: usize| state & 1 << gpu == 0;
    let next = |state: usize, gpu: usize| {
        if in_order {
            (gpu >= state).then_some(gpu + 1)
        } else {
            let stands =
                is_free(state, gpu) && !(0..gpu).any(|other| kind(gpu) == kind(other) && is_free(state, other));
            stands.then_some(state | 1 << gpu)
        }
    };

    // Empty for a state that is not reached.
    let (mut time, mut from) = (vec![Vec::new(); states], vec![Vec::new(); states]);
    (time[0], from[0]) = (before, vec![None; count + 1]);
    for state in 0..states {
        if time[state].is_empty() {
            continue;
        }
        for (gpu, (capacity, pace)) in gpus.iter().enumerate() {
            let Some(next) = next(state, gpu) else { continue };
            if time[next].is_empty() {
                (time[next], from[next]) = (vec![f64::INFINITY; count + 1], vec![None; count + 1]);
            }
            for begin in 0..count {
                let mut taken = Bytes::ZERO;
                let mut sum = time[state][begin] + if begin == 0 { 0.0 } else { HOP };
                if !sum.is_finite() {
                    continue;
                }
                for (end, module) in modules.iter().enumerate().skip(begin) {
                    taken += module.weights + module.kv_cache;
                    if taken > capacity.room {
                        break;
                    }
                    sum += seconds(module, *pace);
                    if sum < time[next][end + 1] {
                        time[next][end + 1] = sum;
                        from[next][end + 1] = Some((state, begin, capacity.id));
                    }
                }
            }
        }
    }

    let reached = (0..states).filter(|state| !time[*state].is_empty());
    let ends = reached.flat_map(|state| (0..=count).map(move |end| (state, end)));
    let total = |(state, end): (usize, usize)| time[state][end] + behind[end];
    let best = ends.min_by(|a, b| total(*a).total_cmp(&total(*b))).filter(|best| total(*best).is_finite())?;
    let (mut state, end) = best;
    let mut placement = vec![DeviceId::Cpu; end];
    let mut begin = end;
    while let Some((before, run, id)) = from[state][begin] {
        placement[run..begin].fill(id);
        (state, begin) = (before, run);
    }
    placement.splice(..begin, off(host_first, &modules[..begin])?.1);
    placement.extend(off(!host_first, &modules[end..])?.1);
    Some((total(best), placement))
}

fn seconds(module: &PlannedModule, pace: f64) -> f64 {
    (module.read + module.kv_cache).0 as f64 * pace + if module.is_block() { BLOCK } else { 0.0 }
}

/// The time of modules off the GPUs, and their devices; `None` where they do not fit.
fn on_host(modules: &[PlannedModule], devices: &[Capacity], paces: &[f64]) -> Option<(f64, Vec<DeviceId>)> {
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
    Some((time, placement))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The unit of time: a hop takes five.
    const UNIT: f64 = HOP / 5.0;

    /// Devices from (id, room, units of time a byte), and modules that read what they weigh.
    fn case(sizes: &[u64], devices: &[(&str, u64, f64)]) -> (Vec<PlannedModule>, Vec<Capacity>, Vec<f64>) {
        let capacity = |device: &(&str, u64, f64)| Capacity { id: device.0.parse().unwrap(), room: Bytes(device.1) };
        (
            sizes.iter().map(|size| PlannedModule::block(*size)).collect(),
            devices.iter().map(capacity).collect(),
            devices.iter().map(|device| device.2 * UNIT).collect(),
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
        // Where several take the same time, by rounding one or the other.
        for (sizes, devices, placements) in [
            (&nine[..], &[("cuda:0", 100, 1.0)][..], "00000000"),
            // The faster one holds all of it.
            (&nine, &[("cuda:0", 100, 2.0), ("cuda:1", 100, 1.0)], "11111111"),
            // Not all: the faster one is filled, and first or last is the same.
            (&nine, &[("cuda:0", 100, 2.0), ("cuda:1", 50, 1.0)], "00011111 11111000"),
            // A hop costs more than it saves.
            (&[9, 1], &[("cuda:0", 12, 2.0), ("cuda:1", 10, 1.9)], "00"),
            // What is left goes to the CPU, then to the disk.
            (&nine, &[("cuda:0", 45, 1.0), ("cpu", 200, 9.0)], "cccc0000 0000cccc"),
            (&nine, &[("cuda:0", 45, 1.0), ("cpu", 24, 9.0), ("disk", 99, 99.0)], "ccdd0000 0000ccdd"),
            (&[30, 9, 9, 9], &[("cuda:0", 45, 1.0), ("cpu", 200, 9.0)], "00cc"),
            (&[9, 9, 9, 30], &[("cuda:0", 45, 1.0), ("cpu", 200, 9.0)], "cc00"),
            (&nine, &[("cpu", 200, 9.0)], "cccccccc"),
            (&[], &[("cuda:0", 45, 1.0)], ""),
            // Nothing fits: as sequential.
            (&nine, &[("cuda:0", 25, 1.0), ("cuda:1", 25, 0.5)], "00111111"),
        ] {
            let placement = placed(sizes, devices);
            assert!(placements.split(' ').any(|one| one == placement), "{placement}: {sizes:?} on {devices:?}");
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
    fn time(modules: &[PlannedModule], devices: &[Capacity], paces: &[f64], placement: &[DeviceId]) -> Option<f64> {
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
        is_at_an_end.then_some(sum + hops as f64 * HOP)
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
                (Some(ours), Some(best)) => prop_assert!((ours - best).abs() < 1e-9 * UNIT, "{ours} {best}"),
                (ours, best) => prop_assert_eq!(ours, best),
            }
        }
    }
}
