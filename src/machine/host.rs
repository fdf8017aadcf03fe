//! The host's memory, as the kernel tells of it.

use std::path::Path;

use crate::bytes::{Bytes, KIB};
use crate::error::{Error, Result};

/// What of the host's memory is free, under the limits of the process's control groups, and all that there is.
pub fn host_memory() -> Result<(Bytes, Bytes)> {
    let path = Path::new("/proc/meminfo");
    let meminfo = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let memory = |key| field(&meminfo, key).ok_or_else(|| Error::input(format!("`/proc/meminfo` has no `{key}`")));
    let (mut free, mut total) = (memory("MemAvailable")?, memory("MemTotal")?);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    for (limit, used) in control_group_limits(Path::new("/sys/fs/cgroup"), &groups) {
        total = total.min(limit);
        free = free.min(limit - used);
    }
    if let Some((of_processors, all)) = processors_memory(Path::new("/sys/devices/system/node")) {
        (free, total) = (free.min(of_processors), total.min(all));
    }
    Ok((free, total))
}

/// Whether Windows runs this Linux and lends it its GPUs.
pub fn is_wsl() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| release.contains("microsoft"))
}

/// What is free of the memory of processors, and all of that, where the kernel counts a GPU's memory as the host's
/// too: as a node that has no processors.
fn processors_memory(nodes: &Path) -> Option<(Bytes, Bytes)> {
    let (mut free, mut total, mut has_others) = (Bytes::ZERO, Bytes::ZERO, false);
    for node in nodes.read_dir().ok()?.flatten() {
        let read = |file: &str| std::fs::read_to_string(node.path().join(file)).ok();
        let (Some(processors), Some(meminfo)) = (read("cpulist"), read("meminfo")) else { continue };
        // Each line begins with the node: `Node 0 MemFree: 1 kB`.
        let lines: Vec<_> = meminfo.lines().filter_map(|line| line.splitn(3, ' ').nth(2)).collect();
        let memory = |key| field(&lines.join("\n"), key).unwrap_or_default();
        if processors.trim().is_empty() {
            has_others |= memory("MemTotal") > Bytes::ZERO;
        } else {
            free += ["MemFree", "Active(file)", "Inactive(file)", "SReclaimable"].map(memory).into_iter().sum();
            total += memory("MemTotal");
        }
    }
    has_others.then_some((free, total))
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
    fn memory_of_nodes_without_processors_is_a_gpus() {
        let root = tempfile::tempdir().unwrap();
        let node = |name: &str, processors: &str, total: u64| {
            let directory = root.path().join(name);
            std::fs::create_dir(&directory).unwrap();
            std::fs::write(directory.join("cpulist"), processors).unwrap();
            let meminfo = format!(
                "Node 0 MemTotal:       {total} kB\nNode 0 MemFree:  100 kB\nNode 0 Inactive(file):   20 kB\nNode 0 Shmem:  7 kB\n"
            );
            std::fs::write(directory.join("meminfo"), meminfo).unwrap();
        };
        node("node0", "0-71\n", 1000);
        assert_eq!(processors_memory(root.path()), None);
        node("node1", "\n", 0);
        assert_eq!(processors_memory(root.path()), None);
        node("node2", "\n", 96_000);
        assert_eq!(processors_memory(root.path()), Some((Bytes(120 * KIB), Bytes(1000 * KIB))));
    }
}
