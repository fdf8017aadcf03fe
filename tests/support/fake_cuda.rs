//! The stand-in for NVIDIA's driver (tests/fake_cuda), built once and found again by the hash of
//! its sources. Where g++ is missing there is none, and the tests that need it are skipped, which the
//! first one of each file says; where `EVENKEEL_REQUIRE_FAKE_CUDA` is set, they fail.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unsafe_code, reason = "opening a library runs its code")]

use std::ffi::CString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::Library;

/// The variable that forbids to go without the stand-in.
pub const REQUIRED: &str = "EVENKEEL_REQUIRE_FAKE_CUDA";

/// The directory that holds the stand-in, as `libcuda.so` and `libcuda.so.1`; `None` without g++.
pub fn directory() -> Option<&'static Path> {
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    DIRECTORY.get_or_init(build).as_deref()
}

fn build() -> Option<PathBuf> {
    if Command::new("g++").arg("--version").output().is_err() {
        #[allow(clippy::disallowed_methods, reason = "a variable of the tests")]
        let is_required = std::env::var_os(REQUIRED).is_some();
        assert!(!is_required, "g++ is not there, and {REQUIRED} is set");
        // What is printed is only shown of tests that fail.
        std::io::stderr().write_all(b"skipped: g++ is not there\n").unwrap();
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut hasher = DefaultHasher::new();
    let mut files: Vec<_> =
        fs::read_dir(root.join("tests/fake_cuda")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| ["cpp", "h", "sh"].iter().any(|known| e == *known)));
    files.sort();
    for file in files {
        fs::read(file).unwrap().hash(&mut hasher);
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fake_cuda-{:016x}", hasher.finish()));
    if !target.is_dir() {
        let fresh = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let built = Command::new(root.join("tests/fake_cuda/build.sh")).arg(fresh.path()).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        // Another test binary may have built it meanwhile; then this one is dropped.
        let _ = fs::rename(fresh.path(), &target);
    }
    Some(target)
}

/// The stand-in in this process, for the tests of one file: they take turns.
pub struct FakeCuda {
    library: Library,
}

/// A test's turn. What the stand-in has found meanwhile in the kernels fails it.
pub struct Turn {
    fake: &'static FakeCuda,
    _turn: MutexGuard<'static, ()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let found = self.fake.findings();
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(found.as_bytes());
        } else {
            assert!(found.is_empty(), "{found}");
        }
    }
}

/// Puts the stand-in under this process, with GPUs of these sizes (`24GiB,8GiB`); the first call
/// says which. No other test of the file runs until the guard is dropped.
pub fn load(devices: &str) -> Option<(&'static FakeCuda, Turn)> {
    static FAKE: OnceLock<FakeCuda> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let path = directory()?.join("libcuda.so.1");
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let fake = FAKE.get_or_init(|| {
        // SAFETY: the library's initialization has no preconditions. The driver's library is opened by
        // the name `libcuda.so` afterwards, which this one has, so the loader gives this one.
        let fake = FakeCuda { library: unsafe { Library::new(path) }.unwrap() };
        fake.set("DEVICES", devices);
        fake.set("QUIET", "1");
        fake
    });
    for setting in [
        "FAIL_ALLOC",
        "FAIL_GRAPH_LAUNCH",
        "FAIL_INIT",
        "FAIL_INSTANTIATE",
        "FAIL_LAUNCH",
        "FAIL_LINK",
        "FAIL_MODULE",
        "FAIL_PINNED",
        "FAIL_UPLOAD",
        "USED",
        "CONTEXT_BYTES",
        "MODULE_BYTES",
        "GRAPH_BYTES",
        "CLOCK_KHZ",
        "BUS_BITS",
        "COMPUTE_MODE",
        "INTEGRATED",
        "MIG",
    ] {
        fake.set(setting, "0");
    }
    for setting in ["FAIL_CONTEXT", "FAIL_MEMINFO", "NAME", "SHARED"] {
        fake.set(setting, "");
    }
    for (setting, default) in [("STREAMS", "eager"), ("GRAPHS", "1"), ("CC", "8.6"), ("SMS", "8"), ("DRIVER", "12080")]
    {
        fake.set(setting, default);
    }
    Some((fake, Turn { fake, _turn: turn }))
}

impl FakeCuda {
    /// Nothing is left of what a model took.
    #[track_caller]
    pub fn assert_nothing_left(&self, what: &str) {
        for device in 0..2 {
            assert_eq!(self.stat("live_bytes", device), 0, "{what}");
        }
        for counter in ["contexts", "streams", "events", "graphs", "host_bytes"] {
            assert_eq!(self.stat(counter, 0), 0, "{what}: {counter}");
        }
    }

    /// Changes a setting; see tests/fake_cuda/README.md.
    pub fn set(&self, key: &str, value: &str) {
        let (key, value) = (CString::new(key).unwrap(), CString::new(value).unwrap());
        // SAFETY: the function has this signature and keeps neither pointer.
        let code = unsafe {
            let control = self.library.get::<unsafe extern "C" fn(*const i8, *const i8) -> i32>(b"fake_cuda_control");
            control.unwrap()(key.as_ptr(), value.as_ptr())
        };
        assert_eq!(code, 0, "unknown setting {key:?}");
    }

    /// A counter of a GPU, or of the process.
    pub fn stat(&self, name: &str, device: i32) -> u64 {
        let name = CString::new(name).unwrap();
        // SAFETY: the function has this signature and does not keep the pointer.
        let value = unsafe {
            let stat = self.library.get::<unsafe extern "C" fn(*const i8, i32) -> u64>(b"fake_cuda_stat");
            stat.unwrap()(name.as_ptr(), device)
        };
        assert_ne!(value, u64::MAX, "unknown counter {name:?}");
        value
    }

    /// What the stand-in has noticed last.
    pub fn last_error(&self) -> String {
        self.text(b"fake_cuda_last_error")
    }

    /// Races and the like that were found since the last call, a line each.
    pub fn findings(&self) -> String {
        self.text(b"fake_cuda_findings")
    }

    fn text(&self, function: &[u8]) -> String {
        let mut text = vec![0u8; 4096];
        // SAFETY: the functions have this signature and write at most as many bytes.
        unsafe {
            let function = self.library.get::<unsafe extern "C" fn(*mut u8, usize)>(function);
            function.unwrap()(text.as_mut_ptr(), text.len());
        }
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }
}
