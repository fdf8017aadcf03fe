//! Which module goes on which device: pure functions of sizes and budgets.

use crate::bytes::Bytes;
use crate::device::DeviceId;

/// What a module takes of the device that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Packed weights.
    pub weights: Bytes,
    /// KV cache on a GPU.
    pub kv_cuda: Bytes,
    /// KV cache on the host, for a module on the CPU or on the disk.
    pub kv_host: Bytes,
}

/// What a device can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// The device.
    pub id: DeviceId,
    /// Bytes that modules may take, when the device is used at all.
    pub room: Bytes,
}

/// The device of every module, in runs that follow the order of `devices`.
///
/// If the GPUs hold all modules, the split is the one whose fullest GPU has
/// the least share of its room taken, found exactly by dynamic programming.
/// Else each GPU is filled in turn, then the CPU, then the disk; what no
/// device holds is left on the last one, whose overflow says what is missing.
///
/// # Panics
/// `devices` is empty.
pub fn balanced(modules: &[Cost], devices: &[Capacity]) -> Vec<DeviceId> {
    assert!(!devices.is_empty(), "a placement needs a device");
    let gpus = devices
        .iter()
        .take_while(|device| matches!(device.id, DeviceId::Cuda(_)))
        .count();
    min_max_share(modules, &devices[..gpus]).unwrap_or_else(|| in_turn(modules, devices))
}

/// Sums of the first n modules' bytes on a GPU.
fn prefix_sums(modules: &[Cost]) -> Vec<u64> {
    let mut sums = vec![0u64];
    for module in modules {
        let last = sums[sums.len() - 1];
        sums.push(last.saturating_add((module.weights + module.kv_cuda).0));
    }
    sums
}

/// The contiguous partition over `gpus` with the least largest share, or `None` where none fits.
fn min_max_share(modules: &[Cost], gpus: &[Capacity]) -> Option<Vec<DeviceId>> {
    let sums = prefix_sums(modules);
    let count = modules.len();
    // least[n]: the least largest share with the first n modules on the GPUs so far;
    // starts[g][n]: where the run of GPU g begins in that partition.
    let mut least = vec![f64::INFINITY; count + 1];
    least[0] = 0.0;
    let mut starts = Vec::with_capacity(gpus.len());
    for gpu in gpus {
        let mut next = vec![f64::INFINITY; count + 1];
        let mut start = vec![0; count + 1];
        for end in 0..=count {
            for begin in (0..=end).rev() {
                let taken = sums[end] - sums[begin];
                if taken > gpu.room.0 {
                    break;
                }
                let share = if taken == 0 {
                    0.0
                } else {
                    taken as f64 / gpu.room.0 as f64
                };
                let worst = least[begin].max(share);
                if worst < next[end] {
                    (next[end], start[end]) = (worst, begin);
                }
            }
        }
        least = next;
        starts.push(start);
    }
    if !least[count].is_finite() {
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

/// Each GPU filled in turn, then the CPU, then the disk.
fn in_turn(modules: &[Cost], devices: &[Capacity]) -> Vec<DeviceId> {
    let mut placement = Vec::with_capacity(modules.len());
    let (last, before) = devices
        .split_last()
        .unwrap_or_else(|| unreachable!("checked by the caller"));
    for device in before {
        let rest = &modules[placement.len()..];
        let count = match device.id {
            DeviceId::Cuda(_) => prefix_sums(rest)
                .iter()
                .rposition(|sum| *sum <= device.room.0)
                .unwrap_or(0),
            // Blocks on the disk keep their KV cache in host memory, so all of the rest counts here.
            DeviceId::Cpu | DeviceId::Disk => {
                let kv: Bytes = rest.iter().map(|module| module.kv_host).sum();
                let mut sum = kv;
                let mut fitting = 0;
                for (at, module) in rest.iter().enumerate() {
                    sum += module.weights;
                    if sum > device.room {
                        break;
                    }
                    fitting = at + 1;
                }
                fitting
            }
        };
        placement.extend(std::iter::repeat_n(device.id, count));
    }
    placement.resize(modules.len(), last.id);
    placement
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn modules(sizes: &[u64]) -> Vec<Cost> {
        let cost = |size: &u64| Cost {
            weights: Bytes(*size),
            kv_cuda: Bytes(1),
            kv_host: Bytes(2),
        };
        sizes.iter().map(cost).collect()
    }

    fn devices(rooms: &[(&str, u64)]) -> Vec<Capacity> {
        let capacity = |(id, room): &(&str, u64)| Capacity {
            id: id.parse().unwrap(),
            room: Bytes(*room),
        };
        rooms.iter().map(capacity).collect()
    }

    fn placed(sizes: &[u64], rooms: &[(&str, u64)]) -> String {
        balanced(&modules(sizes), &devices(rooms))
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
        for (sizes, rooms, placement) in [
            (&nine[..], &[("cuda:0", 100)][..], "00000000"),
            (&nine, &[("cuda:0", 100), ("cuda:1", 100)], "00001111"),
            (&nine, &[("cuda:0", 75), ("cuda:1", 25)], "00000011"),
            (&nine, &[("cuda:0", 0), ("cuda:1", 100)], "11111111"),
            (&nine, &[("cuda:0", 40), ("cuda:1", 20), ("cpu", 100)], "000011cc"),
            (&nine, &[("cpu", 61), ("disk", 100)], "cccccddd"),
            (&nine, &[("cuda:0", 20), ("cpu", 25)], "00cccccc"),
            (&[50, 9, 9], &[("cuda:0", 20), ("cuda:1", 100)], "111"),
            (&[50, 9, 9], &[("cuda:0", 20), ("cpu", 100)], "ccc"),
            (&[9], &[("cuda:0", 50), ("cuda:1", 50), ("cuda:2", 50)], "0"),
        ] {
            assert_eq!(placed(sizes, rooms), placement, "{sizes:?} on {rooms:?}");
        }
    }

    /// The largest share of a placement, or `None` where a GPU overflows.
    fn largest_share(modules: &[Cost], gpus: &[Capacity], placement: &[DeviceId]) -> Option<f64> {
        let shares = gpus.iter().map(|gpu| {
            let taken: Bytes = modules
                .iter()
                .zip(placement)
                .filter(|(_, d)| **d == gpu.id)
                .map(|(m, _)| m.weights + m.kv_cuda)
                .sum();
            (taken <= gpu.room).then(|| {
                if taken.0 == 0 {
                    0.0
                } else {
                    taken.0 as f64 / gpu.room.0 as f64
                }
            })
        });
        shares
            .collect::<Option<Vec<_>>>()
            .map(|shares| shares.into_iter().fold(0.0, f64::max))
    }

    fn contiguous(count: usize, gpus: &[Capacity]) -> Vec<Vec<DeviceId>> {
        match gpus {
            [] => vec![],
            [gpu] => vec![vec![gpu.id; count]],
            [gpu, rest @ ..] => (0..=count)
                .flat_map(|first| {
                    contiguous(count - first, rest)
                        .into_iter()
                        .map(move |tail| [vec![gpu.id; first], tail].concat())
                })
                .collect(),
        }
    }

    proptest! {
        #[test]
        fn no_split_over_gpus_is_better(sizes in prop::collection::vec(1u64..50, 1..8), rooms in prop::collection::vec(0u64..150, 1..4)) {
            let modules = modules(&sizes);
            let gpus: Vec<_> = rooms.iter().enumerate().map(|(i, room)| Capacity { id: DeviceId::Cuda(i as u32), room: Bytes(*room) }).collect();
            let best = contiguous(modules.len(), &gpus).iter().filter_map(|p| largest_share(&modules, &gpus, p)).min_by(f64::total_cmp);
            let ours = min_max_share(&modules, &gpus).map(|p| largest_share(&modules, &gpus, &p).expect("a GPU overflows"));
            prop_assert_eq!(ours, best);
        }
    }
}
