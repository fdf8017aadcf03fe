//! Runs of modules over devices: pure functions of sizes and budgets.

use std::ops::Range;

use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::plan::PlannedModule;

/// What a device can give.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    pub id: DeviceId,
    /// Bytes that modules may take, when the device is used at all.
    pub room: Bytes,
}

/// The device of every module, in runs.
///
/// If the GPUs hold all modules, the split is the one whose fullest GPU has
/// the least share of its room taken, found exactly by dynamic programming.
/// Else as many modules leave the GPUs as must (`off_gpus`), and the rest is
/// split so; without other devices, as [`sequential`].
pub fn balanced(modules: &[PlannedModule], devices: &[Capacity]) -> Vec<DeviceId> {
    place(modules, devices, |modules, gpus| min_max_share(modules, gpus, false))
}

/// The device of every module, in runs.
///
/// If the GPUs hold all modules, as few of them as do are used; of the splits
/// over so few, it is the one whose fullest GPU has the least share of its
/// room taken, found exactly by dynamic programming. Else as [`balanced`].
pub fn packed(modules: &[PlannedModule], devices: &[Capacity]) -> Vec<DeviceId> {
    place(modules, devices, |modules, gpus| min_max_share(modules, gpus, true))
}

/// The device of every module, in runs: each GPU is filled in turn. If they do
/// not hold all modules, as many leave them as must (`off_gpus`); what no
/// device holds is left on the last one, whose overflow says what is missing.
pub fn sequential(modules: &[PlannedModule], devices: &[Capacity]) -> Vec<DeviceId> {
    place(modules, devices, |modules, gpus| Some(filled(modules, gpus)).filter(|filled| filled.len() == modules.len()))
}

/// Places all modules by `on_gpus`, or those that it can place, and the others on the host.
fn place(
    modules: &[PlannedModule],
    devices: &[Capacity],
    on_gpus: impl Fn(&[PlannedModule], &[Capacity]) -> Option<Vec<DeviceId>>,
) -> Vec<DeviceId> {
    assert!(!devices.is_empty(), "a placement needs a device");
    let (gpus, host) = devices.split_at(devices.partition_point(|device| device.id.is_gpu()));
    if let Some(placement) = on_gpus(modules, gpus) {
        return placement;
    }
    if gpus.is_empty() || host.is_empty() {
        return in_turn(modules, devices);
    }
    let off = off_gpus(modules, gpus);
    let (begin, end) = if off.start == 0 { (off.end, modules.len()) } else { (0, off.start) };
    let mut placement = in_turn(&modules[off.clone()], host);
    let on_gpus = on_gpus(&modules[begin..end], gpus).unwrap_or_else(|| unreachable!("{off:?} leaves what fits"));
    placement.splice(if begin == 0 { 0..0 } else { off.end..off.end }, on_gpus);
    placement
}

/// The modules that leave the GPUs where not all fit: the first ones or the
/// last ones, as few as it takes, whichever have fewer bytes for a token to
/// read. The first ones begin with the embedding, of which it reads a row.
fn off_gpus(modules: &[PlannedModule], gpus: &[Capacity]) -> Range<usize> {
    let count = modules.len();
    let first = 0..first_that(0..count, |end| filled(&modules[end..], gpus).len() == count - end);
    let last = filled(modules, gpus).len()..count;
    let read =
        |range: &Range<usize>| modules[range.clone()].iter().map(|module| module.read + module.kv_cache).sum::<Bytes>();
    if read(&last) < read(&first) { last } else { first }
}

/// The contiguous partition over `gpus` with the least largest share, or with `fewest` of those
/// over as few of them as hold all modules; `None` where none fits.
fn min_max_share(modules: &[PlannedModule], gpus: &[Capacity], fewest: bool) -> Option<Vec<DeviceId>> {
    let count = modules.len();
    // Sums of the first n modules' bytes.
    let mut sums = vec![Bytes::ZERO; count + 1];
    for (at, module) in modules.iter().enumerate() {
        sums[at + 1] = sums[at] + module.weights + module.kv_cache;
    }
    // least[n]: how many GPUs have a run, where that counts, and the least largest share with the first n
    // modules on the GPUs so far; starts[g][n]: where the run of GPU g begins in that partition, n if it has none.
    let mut least = vec![(usize::MAX, f64::INFINITY); count + 1];
    least[0] = (0, 0.0);
    let mut starts = Vec::with_capacity(gpus.len());
    for gpu in gpus {
        let mut next = least.clone();
        let mut start: Vec<_> = (0..=count).collect();
        let mut lowest = 0;
        for end in 1..=count {
            let taken = |begin: usize| sums[end] - sums[begin];
            while taken(lowest) > gpu.room {
                lowest += 1;
            }
            if lowest == end {
                continue;
            }
            let share =
                |begin| if taken(begin) == Bytes::ZERO { 0.0 } else { taken(begin).0 as f64 / gpu.room.0 as f64 };
            // Of a later begin the modules before it take more, and the run less: the best is where the one
            // overtakes the other, among those behind the fewest GPUs; of equals the last.
            let used = least[lowest].0;
            let begins = lowest..first_that(lowest..end, |begin| least[begin].0 > used);
            let overtaken = first_that(begins.clone(), |begin| least[begin].1 >= share(begin));
            let is_before =
                overtaken > lowest && (overtaken == begins.end || share(overtaken - 1) < least[overtaken].1);
            let begin = if is_before {
                overtaken - 1
            } else {
                first_that(overtaken..begins.end, |begin| least[begin].1 > least[overtaken].1) - 1
            };
            let with_run = (used.saturating_add(usize::from(fewest)), least[begin].1.max(share(begin)));
            if with_run < next[end] {
                (next[end], start[end]) = (with_run, begin);
            }
        }
        least = next;
        starts.push(start);
    }
    if least[count].1.is_infinite() {
        return None;
    }
    let mut placement = vec![DeviceId::Cpu; count];
    let mut end = count;
    for (gpu, start) in gpus.iter().zip(&starts).rev() {
        placement[start[end]..end].fill(gpu.id);
        end = start[end];
    }
    Some(placement)
}

/// The first of `range` that is meant, as all behind it are; its end where none is.
fn first_that(range: Range<usize>, is_meant: impl Fn(usize) -> bool) -> usize {
    let (mut first, mut end) = (range.start, range.end);
    while first < end {
        let middle = usize::midpoint(first, end);
        if is_meant(middle) { end = middle } else { first = middle + 1 }
    }
    first
}

/// Each device filled in turn, and what none holds on the last one.
fn in_turn(modules: &[PlannedModule], devices: &[Capacity]) -> Vec<DeviceId> {
    let mut placement = filled(modules, devices);
    placement.resize(modules.len(), devices.last().map_or(DeviceId::Cpu, |last| last.id));
    placement
}

/// The devices of as many of the first modules as they hold, each filled in turn.
fn filled(modules: &[PlannedModule], devices: &[Capacity]) -> Vec<DeviceId> {
    let mut placement = Vec::with_capacity(modules.len());
    for device in devices {
        let rest = &modules[placement.len()..];
        // Blocks on the disk keep their KV cache in host memory, so off the GPUs all of the rest counts.
        let is_gpu = device.id.is_gpu();
        let mut taken = if is_gpu { Bytes::ZERO } else { rest.iter().map(|module| module.kv_cache).sum() };
        let overflows = |module: &PlannedModule| {
            taken += module.weights + if is_gpu { module.kv_cache } else { Bytes::ZERO };
            taken > device.room
        };
        let count = rest.iter().position(overflows).unwrap_or(rest.len());
        placement.extend(std::iter::repeat_n(device.id, count));
    }
    placement
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn modules(sizes: &[u64]) -> Vec<PlannedModule> {
        sizes.iter().map(|size| PlannedModule::block(*size)).collect()
    }

    fn devices(rooms: &[(&str, u64)]) -> Vec<Capacity> {
        let capacity = |(id, room): &(&str, u64)| Capacity { id: id.parse().unwrap(), room: Bytes(*room) };
        rooms.iter().map(capacity).collect()
    }

    type Place = fn(&[PlannedModule], &[Capacity]) -> Vec<DeviceId>;

    fn placed(place: Place, sizes: &[u64], rooms: &[(&str, u64)]) -> String {
        place(&modules(sizes), &devices(rooms))
            .iter()
            .map(|d| match d {
                DeviceId::Cuda(index) => index.to_string(),
                DeviceId::Cpu => "c".to_owned(),
                DeviceId::Disk => "d".to_owned(),
            })
            .collect()
    }

    #[test]
    fn cases_by_hand() {
        let nine = [9; 8];
        // balanced, packed, sequential
        for (sizes, rooms, placements) in [
            (&nine[..], &[("cuda:0", 100)][..], ["00000000"; 3]),
            (&nine, &[("cuda:0", 100), ("cuda:1", 100)], ["00001111", "00000000", "00000000"]),
            (&nine, &[("cuda:0", 75), ("cuda:1", 25)], ["00000011", "00000011", "00000001"]),
            (&nine, &[("cuda:0", 0), ("cuda:1", 100)], ["11111111"; 3]),
            (
                &nine,
                &[("cuda:0", 40), ("cuda:1", 30), ("cuda:2", 90), ("cuda:3", 100)],
                ["01222333", "33333333", "00001112"],
            ),
            (&nine, &[("cuda:0", 40), ("cuda:1", 30), ("cuda:2", 60)], ["00112222", "00022222", "00001112"]),
            (&nine, &[("cuda:0", 40), ("cuda:1", 20), ("cpu", 100)], ["cc000011"; 3]),
            (&nine, &[("cpu", 61), ("disk", 100)], ["cccccddd"; 3]),
            (&nine, &[("cuda:0", 20), ("cpu", 25)], ["cccccc00"; 3]),
            (&nine, &[("cuda:0", 20), ("cpu", 25), ("disk", 99)], ["ccdddd00"; 3]),
            (&[50, 9, 9], &[("cuda:0", 20), ("cuda:1", 100)], ["111"; 3]),
            (&[50, 9, 9], &[("cuda:0", 20), ("cpu", 100)], ["c00"; 3]),
            (&[9, 9, 50], &[("cuda:0", 20), ("cpu", 100)], ["00c"; 3]),
            (&[50, 50], &[("cuda:0", 20), ("cpu", 200)], ["cc"; 3]),
            (&[9], &[("cuda:0", 50), ("cuda:1", 50), ("cuda:2", 50)], ["0"; 3]),
            (&[], &[("cuda:0", 50), ("cuda:1", 50)], [""; 3]),
        ] {
            let ours = [balanced as Place, packed, sequential].map(|place| placed(place, sizes, rooms));
            assert_eq!(ours, placements, "{sizes:?} on {rooms:?}");
        }
    }

    #[test]
    fn of_equally_few_gpus_those_with_more_room_are_used() {
        let rooms = [("cuda:0", 80), ("cuda:1", 120), ("cuda:2", 100)];
        assert_eq!(placed(packed, &[9; 8], &rooms), "11111111");
        let rooms = [("cuda:0", 40), ("cuda:1", 50), ("cuda:2", 70), ("cuda:3", 30)];
        assert_eq!(placed(packed, &[9; 8], &rooms), "11122222");
    }

    /// The largest share of a placement, or `None` where a GPU overflows.
    fn largest_share(modules: &[PlannedModule], gpus: &[Capacity], placement: &[DeviceId]) -> Option<f64> {
        let shares = gpus.iter().map(|gpu| {
            let taken: Bytes =
                modules.iter().zip(placement).filter(|(_, d)| **d == gpu.id).map(|(m, _)| m.weights + m.kv_cache).sum();
            (taken <= gpu.room).then(|| if taken.0 == 0 { 0.0 } else { taken.0 as f64 / gpu.room.0 as f64 })
        });
        shares.collect::<Option<Vec<_>>>().map(|shares| shares.into_iter().fold(0.0, f64::max))
    }

    fn contiguous(count: usize, gpus: &[Capacity]) -> Vec<Vec<DeviceId>> {
        match gpus {
            [] => vec![],
            [gpu] => vec![vec![gpu.id; count]],
            [gpu, rest @ ..] => (0..=count)
                .flat_map(|first| {
                    contiguous(count - first, rest).into_iter().map(move |tail| [vec![gpu.id; first], tail].concat())
                })
                .collect(),
        }
    }

    fn gpus_with(rooms: &[u64]) -> Vec<Capacity> {
        let id = |index: usize| DeviceId::Cuda(index as u32);
        let capacity = |(index, room): (usize, &u64)| Capacity { id: id(index), room: Bytes(*room) };
        rooms.iter().enumerate().map(capacity).collect()
    }

    fn used(placement: &[DeviceId]) -> usize {
        let mut devices = placement.to_vec();
        devices.dedup();
        devices.len()
    }

    proptest! {
        #[test]
        fn no_split_over_gpus_is_better(sizes in prop::collection::vec(1u64..50, 1..8), rooms in prop::collection::vec(0u64..150, 1..4)) {
            let (modules, gpus) = (modules(&sizes), gpus_with(&rooms));
            let best = contiguous(modules.len(), &gpus).iter().filter_map(|p| largest_share(&modules, &gpus, p)).min_by(f64::total_cmp);
            let ours = min_max_share(&modules, &gpus, false).map(|p| largest_share(&modules, &gpus, &p).expect("a GPU overflows"));
            prop_assert_eq!(ours, best);
        }

        #[test]
        fn no_split_over_fewer_gpus_fits(sizes in prop::collection::vec(0u64..50, 1..8), rooms in prop::collection::vec(0u64..150, 1..5)) {
            let (modules, gpus) = (modules(&sizes), gpus_with(&rooms));
            let rate = |p: &Vec<DeviceId>| Some((used(p), largest_share(&modules, &gpus, p)?));
            let all = contiguous(modules.len(), &gpus);
            let best = all.iter().filter_map(rate).min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
            let ours = min_max_share(&modules, &gpus, true).map(|p| rate(&p).expect("a GPU overflows"));
            prop_assert_eq!(ours, best);
        }

        #[test]
        fn modules_come_in_runs_and_only_the_last_device_overflows(
            sizes in prop::collection::vec(0u64..50, 0..12),
            rooms in prop::collection::vec(0u64..150, 0..4),
            cpu in 0u64..300,
        ) {
            let modules = modules(&sizes);
            let mut devices = gpus_with(&rooms);
            devices.push(Capacity { id: DeviceId::Cpu, room: Bytes(cpu) });
            devices.push(Capacity { id: DeviceId::Disk, room: Bytes(1) });
            for place in [balanced as Place, packed, sequential] {
                let placement = place(&modules, &devices);
                prop_assert_eq!(placement.len(), modules.len());
                let mut runs = placement.clone();
                runs.dedup();
                let off = runs.iter().position(|id| !id.is_gpu());
                let gpus: Vec<_> = runs.iter().filter(|id| id.is_gpu()).collect();
                prop_assert!(gpus.is_sorted() && runs.len() <= devices.len());
                prop_assert!(off.is_none_or(|at| at == 0 || at == gpus.len()));
                for device in &devices[..devices.len() - 1] {
                    let is_here = |id: DeviceId| id == device.id || (device.id == DeviceId::Cpu && id == DeviceId::Disk);
                    let taken = modules.iter().zip(&placement).filter(|(_, id)| is_here(**id)).map(|(module, id)| match id {
                        DeviceId::Cuda(_) | DeviceId::Cpu => module.weights + module.kv_cache,
                        DeviceId::Disk => module.kv_cache,
                    });
                    let taken: Bytes = taken.sum();
                    prop_assert!(taken <= device.room || !placement.contains(&device.id));
                }
            }
        }

        #[test]
        fn what_comes_next_would_not_fit_on_the_device_before(sizes in prop::collection::vec(0u64..50, 1..12), rooms in prop::collection::vec(0u64..150, 2..5)) {
            let (modules, gpus) = (modules(&sizes), gpus_with(&rooms));
            let placement = sequential(&modules, &gpus);
            let mut at = 0;
            for gpu in &gpus[..gpus.len() - 1] {
                let mut taken = Bytes::ZERO;
                while at < modules.len() && placement[at] == gpu.id {
                    taken += modules[at].weights + modules[at].kv_cache;
                    at += 1;
                }
                prop_assert!(at == modules.len() || taken + modules[at].weights + modules[at].kv_cache > gpu.room);
            }
        }
    }
}
