//! The inventory of the machine that this runs on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::cpu::{Affine, GROUP_WORDS, matmul};
use super::cuda;
use crate::bytes::{Bytes, KIB};
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::fs;
use crate::machine::{Bandwidth, Device, Inventory};
use crate::pool::Pool;
use crate::quant::{GROUP_SIZE, Matrix, MatrixLayout, Storage};

impl Inventory {
    /// The devices of this machine, with the space for weights on the disk that [`fs::SCRATCH_DIRECTORY`] has.
    pub fn this_machine() -> Result<Self> {
        Self::of_machine(Path::new(fs::SCRATCH_DIRECTORY))
    }

    /// The devices of this machine: free host memory under the limit of the
    /// process's control group, the space in `offload_directory`, and the GPUs;
    /// those that are too old, or whose driver is, are listed as idle.
    pub fn of_machine(offload_directory: &Path) -> Result<Self> {
        let path = Path::new("/proc/meminfo");
        let meminfo = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let memory = |key| field(&meminfo, key).ok_or_else(|| Error::input(format!("`/proc/meminfo` has no `{key}`")));
        let (mut free, mut total) = (memory("MemAvailable")?, memory("MemTotal")?);
        for (limit, used) in control_group_limits(Path::new("/sys/fs/cgroup")) {
            total = total.min(limit);
            free = free.min(limit - used);
        }
        let disk = fs::free_space(offload_directory)?;
        let device = |id, free, total| Device { id, name: None, free, total, bandwidth: None };
        let (mut devices, idle) = cuda::devices();
        devices.extend([device(DeviceId::Cpu, free, total), device(DeviceId::Disk, disk, disk)]);
        Ok(Self { devices, idle })
    }

    /// Measures how fast the threads of `pool` multiply with what they read, and how fast
    /// the GPUs read, with a short probe where there is room for one; else a GPU
    /// has its data sheet's figure.
    pub fn measure_bandwidth(&mut self, pool: &Pool) {
        for device in &mut self.devices {
            let measured = match device.id {
                DeviceId::Cuda(index) => cuda::measure_bandwidth(index).ok(),
                DeviceId::Cpu if device.free > Bytes(2 * (PROBE.0 * PROBE.1) as u64) => host_bandwidth(pool),
                DeviceId::Cpu | DeviceId::Disk => None,
            };
            device.bandwidth = measured.or(device.bandwidth);
        }
    }
}

/// Rows and columns of the int8 matrix that is read to measure a bandwidth: 64 MiB, more than most caches hold.
const PROBE: (usize, usize) = (4096, 16_384);

/// How fast one token's product with an int8 matrix reads the matrix; the best of three.
fn host_bandwidth(pool: &Pool) -> Option<Bandwidth> {
    let layout = MatrixLayout::new(Storage::Int8, PROBE.0, PROBE.1)?;
    let bytes = layout.size().as_usize()?;
    let packed = vec![1; bytes];
    let affine = Affine::new(Matrix::new(&layout, &packed), None);
    let (x, mut y) = (vec![1.0; PROBE.1], vec![0.0; PROBE.0]);
    let mut words = vec![0.0; PROBE.1 / GROUP_SIZE * GROUP_WORDS];
    let mut read = |_| {
        let start = Instant::now();
        matmul(pool, &x, &mut words, [(&affine, &mut y)]);
        start.elapsed().as_secs_f64()
    };
    Some(Bandwidth::measured(bytes, (0..3).map(&mut read).fold(f64::INFINITY, f64::min)))
}

/// A field of /proc/meminfo, which counts in KiB.
fn field(meminfo: &str, key: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(KIB).map(Bytes)
}

/// The limit and the use of this process's control group and of all above it,
/// where version 2 of control groups sets one. Reclaimable page cache counts as free.
fn control_group_limits(root: &Path) -> Vec<(Bytes, Bytes)> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let start = root.join(path);
    let groups = start.ancestors().take_while(|group| group.starts_with(root)).map(PathBuf::from);
    groups.filter_map(|group| limit(&group)).collect()
}

fn limit(group: &Path) -> Option<(Bytes, Bytes)> {
    let read = |file: &str| std::fs::read_to_string(group.join(file)).ok();
    let number = |text: String| text.trim().parse().ok().map(Bytes);
    let limit = number(read("memory.max")?)?;
    let used = number(read("memory.current")?)?;
    let stat = read("memory.stat").unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")).and_then(|n| n.parse().ok());
    Some((limit, used - Bytes(cache.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_meminfo() {
        let meminfo =
            "MemTotal:       24690000 kB\nMemFree:  1 kB\nMemAvailable:   20000000 kB\nHugePages_Total:       0\n";
        assert_eq!(field(meminfo, "MemAvailable"), Some(Bytes(20_000_000 * 1024)));
        assert_eq!(field(meminfo, "MemTotal"), Some(Bytes(24_690_000 * 1024)));
        assert_eq!(field(meminfo, "HugePages_Total"), None);
        assert_eq!(field(meminfo, "Mem"), None);
    }

    #[test]
    fn a_control_group_limits_what_is_free() {
        let group = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(group.path().join(file), text).unwrap();
        write("memory.max", "1000\n");
        write("memory.current", "700\n");
        assert_eq!(limit(group.path()), Some((Bytes(1000), Bytes(700))));
        write("memory.stat", "anon 5\ninactive_file 200\n");
        assert_eq!(limit(group.path()), Some((Bytes(1000), Bytes(500))));
        write("memory.max", "max\n");
        assert_eq!(limit(group.path()), None);
    }

    #[test]
    fn this_machine_has_memory_and_a_disk() {
        let inventory = Inventory::of_machine(Path::new("/")).unwrap();
        let cpu = inventory.device(DeviceId::Cpu).unwrap();
        assert!(cpu.free > Bytes::ZERO && cpu.free <= cpu.total);
        assert!(inventory.device(DeviceId::Disk).is_some());
    }
}
