//! The inventory of the machine that this runs on.

use std::path::Path;
use std::time::Instant;

use super::cpu::{Affine, GROUP_WORDS, matmul};
use super::cuda;
use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::error::Result;
use crate::fs;
use crate::machine::{self, Bandwidth, Device, Fault, Inventory};
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
        Self::of(cuda::Installation::find(), offload_directory)
    }

    /// As [`Inventory::of_machine`], with the GPUs that were found.
    pub fn of(found: Result<Option<cuda::Installation>, Fault>, offload_directory: &Path) -> Result<Self> {
        let mut inventory = Self::default();
        match found {
            Ok(installation) => installation.into_iter().for_each(|found| found.list(&mut inventory)),
            Err(fault) => inventory.driver = Some(fault),
        }
        // What the driver takes of host memory is taken now.
        inventory.devices.extend(Self::of_host(offload_directory)?.devices);
        inventory.share_memory();
        if machine::is_wsl() {
            inventory.count_less_on_windows();
        }
        Ok(inventory)
    }

    /// The devices of this machine without its GPUs, which are not looked for.
    pub fn of_host(offload_directory: &Path) -> Result<Self> {
        let (free, total) = machine::host_memory()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory_and_a_disk() {
        let inventory = Inventory::of_machine(Path::new("/")).unwrap();
        let cpu = inventory.device(DeviceId::Cpu).unwrap();
        assert!(cpu.free > Bytes::ZERO && cpu.free <= cpu.total);
        assert!(inventory.device(DeviceId::Disk).is_some());
    }
}
