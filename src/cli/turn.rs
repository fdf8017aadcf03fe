//! Whose turn it is to take memory of GPUs: two loads that begin at once would plan with the same bytes.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::thread;
use std::time::Duration;

use evenkeel::{Cancel, Error, Result, gpu_uuids};

use super::Process;

/// How often the lock that another holds is tried again.
const PAUSE: Duration = Duration::from_millis(50);

/// Waits until no other load of this user is taking memory of the GPUs that are shown. What is given is held until it
/// is dropped; where there is no place for locks nobody waits.
pub fn wait(cancel: &Cancel, process: &Process) -> Result<Vec<File>> {
    let Some(directory) = process.environment.cache_directory().map(|directory| directory.join("locks")) else {
        return Ok(Vec::new());
    };
    let mut uuids = gpu_uuids();
    // All take them in one order.
    uuids.sort();
    let mut held = Vec::new();
    let mut has_said = false;
    for uuid in uuids {
        let Some(file) = open(&directory, &uuid) else { continue };
        while let Err(TryLockError::WouldBlock) = file.try_lock() {
            if !has_said {
                process.printer.note(&format!("waiting for another evenkeel that takes memory of {uuid}"));
                has_said = true;
            }
            if cancel.is_cancelled() {
                return Err(Error::interrupted());
            }
            thread::sleep(PAUSE);
        }
        held.push(file);
    }
    Ok(held)
}

fn open(directory: &Path, uuid: &str) -> Option<File> {
    std::fs::create_dir_all(directory).ok()?;
    File::options().create(true).append(true).open(directory.join(uuid)).ok()
}
