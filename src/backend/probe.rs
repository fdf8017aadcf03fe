//! The inventory of the machine that this runs on.

use std::path::Path;
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
    /// those that cannot be used are listed as idle.
    pub fn of_machine(offload_directory: &Path) -> Result<Self> {
        let mut inventory = Self::default();
        match cuda::Installation::find() {
            Ok(installation) => installation.into_iter().for_each(|found| found.list(&mut inventory)),
            Err(fault) => inventory.driver = Some(fault),
        }
        // What the driver takes of host memory is taken now.
        inventory.devices.extend(Self::of_host(offload_directory)?.devices);
        Ok(inventory)
    }

    /// The devices of this machine without its GPUs, which are not looked for.
    pub fn of_host(offload_directory: &Path) -> Result<Self> {
        let path = Path::new("/proc/meminfo");
        let meminfo = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let memory = |key| field(&meminfo, key).ok_or_else(|| Error::input(format!("`/proc/meminfo` has no `{key}`")));
        let (mut free, mut total) = (memory("MemAvailable")?, memory("MemTotal")?);
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        for (limit, used) in control_group_limits(Path::new("/sys/fs/cgroup"), &groups) {
            total = total.min(limit);
            free = free.min(limit - used);
        }
        let disk = fs::free_space(offload_directory)?;
        let cpu = Device { total, ..Device::new(DeviceId::Cpu, free) };
        let devices = vec![cpu, Device::new(DeviceId::Disk, disk)];
        Ok(Self { devices, ..Self::default() })
    }

    /// Measures how fast the threads of `pool` multiply with what they read, where there is room for it. That of
    /// GPUs is what their clocks give: nothing is taken of memory that others may want.
    pub fn measure_bandwidth(&mut self, pool: &Pool) {
        let cpu = self.devices.iter_mut().find(|device| device.id == DeviceId::Cpu);
        if let Some(cpu) = cpu.filter(|cpu| cpu.free > Bytes(2 * (PROBE.0 * PROBE.1) as u64)) {
            cpu.bandwidth = host_bandwidth(pool).or(cpu.bandwidth);
        }
    }
}

/// Rows and columns of the int8 matrix that is read to measure a bandwidth: 64 MiB, more than most caches hold.
const PROBE: (usize, usize) = (4096, 16_384);

/// How fast one token's product with an int8 matrix reads the matrix; the best of three.
fn host_bandwidth(pool: &Pool) -> Option<Bandwidth> {
    let layout = MatrixLayout::new(Storage::Int8, PROBE.0, PROBE.1)?;
    let bytes = layout.size().as_usize()?;
    let mut packed = Vec::new();
    // Without the room there is no measurement.
    packed.try_reserve_exact(bytes).ok()?;
    packed.resize(bytes, 1);
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

/// What a version of control groups calls the limit, the use, and the page cache that can be reclaimed.
struct Names {
    limit: &'static str,
    used: &'static str,
    cache: &'static str,
}

const VERSION_2: Names = Names { limit: "memory.max", used: "memory.current", cache: "inactive_file " };
const VERSION_1: Names =
    Names { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", cache: "total_inactive_file " };

/// The limit and the use of this process's control groups under `root`, which `own` lists, and of all above
/// them. Reclaimable page cache counts as free.
fn control_group_limits(root: &Path, own: &str) -> Vec<(Bytes, Bytes)> {
    let mut limits = Vec::new();
    for line in own.lines() {
        let Some((controllers, path)) = line.split_once(':').and_then(|(_, rest)| rest.split_once(":/")) else {
            continue;
        };
        let (root, names) = match controllers {
            "" => (root.to_owned(), VERSION_2),
            some if some.split(',').any(|name| name == "memory") => (root.join("memory"), VERSION_1),
            _ => continue,
        };
        let group = root.join(path);
        let groups = group.ancestors().take_while(|group| group.starts_with(&root));
        limits.extend(groups.filter_map(|group| limit(group, &names)));
    }
    limits
}

fn limit(group: &Path, names: &Names) -> Option<(Bytes, Bytes)> {
    let read = |file: &str| std::fs::read_to_string(group.join(file)).ok();
    let number = |text: String| text.trim().parse().ok().map(Bytes);
    let limit = number(read(names.limit)?)?;
    let used = number(read(names.used)?)?;
    let stat = read("memory.stat").unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix(names.cache)).and_then(|n| n.parse().ok());
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
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let limits = |own: &str| control_group_limits(root.path(), own);
        write("a/memory.max", "1000\n");
        write("a/memory.current", "700\n");
        assert_eq!(limits("0::/a\n"), [(Bytes(1000), Bytes(700))]);
        write("a/memory.stat", "anon 5\ninactive_file 200\n");
        assert_eq!(limits("0::/a/b\n"), [(Bytes(1000), Bytes(500))]);
        write("a/memory.max", "max\n");
        assert_eq!(limits("0::/a\n"), []);
        write("memory/docker/x/memory.limit_in_bytes", "4096\n");
        write("memory/docker/x/memory.usage_in_bytes", "2048\n");
        write("memory/docker/x/memory.stat", "inactive_file 1\ntotal_inactive_file 1024\n");
        let own = "12:cpuset:/docker/x\n5:cpu,memory:/docker/x\n1:name=systemd:/docker/x\n0::/system.slice\n";
        assert_eq!(limits(own), [(Bytes(4096), Bytes(1024))]);
        // A container's own view has its group at the root.
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/memory.usage_in_bytes", "1\n");
        assert_eq!(limits("5:memory:/elsewhere\n"), [(Bytes(9_223_372_036_854_771_712), Bytes(1))]);
    }

    #[test]
    fn this_machine_has_memory_and_a_disk() {
        let inventory = Inventory::of_machine(Path::new("/")).unwrap();
        let cpu = inventory.device(DeviceId::Cpu).unwrap();
        assert!(cpu.free > Bytes::ZERO && cpu.free <= cpu.total);
        assert!(inventory.device(DeviceId::Disk).is_some());
    }
}
