//! Files: opened, read and written in one way only.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::bytes::Bytes;
use crate::error::{Error, Hint, Result, Setting, printable};

/// Opens a regular file for reading; a pipe, a device or a directory is refused unopened.
pub fn open_regular(path: &Path) -> Result<File> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if !metadata.is_file() {
        return Err(Error::input(not_regular(path, &metadata)));
    }
    File::open(path).map_err(|e| Error::io("open", path, e))
}

fn not_regular(path: &Path, metadata: &Metadata) -> String {
    let kind = if metadata.is_dir() { "a directory" } else { "a pipe or a device" };
    format!("`{}` is {kind}, not a regular file", path.display())
}

/// `file` again, for reads past the page cache: whole blocks of it, into memory that begins on a block.
/// `None` where the system or the file system has no such reads; some refuse them one by one.
#[cfg(target_os = "linux")]
pub fn past_cache(file: &File) -> Option<File> {
    use std::os::fd::AsRawFd;
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).custom_flags(direct).open(path).ok()
}

/// Whether the page of `file` at `offset` is in the page cache, as far as the system tells.
#[cfg(target_os = "linux")]
pub fn is_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    let buffers = &mut [std::io::IoSliceMut::new(&mut byte)];
    rustix::io::preadv2(file, buffers, offset, rustix::io::ReadWriteFlags::NOWAIT) != Err(rustix::io::Errno::AGAIN)
}

#[cfg(not(target_os = "linux"))]
pub fn past_cache(_: &File) -> Option<File> {
    None
}

#[cfg(not(target_os = "linux"))]
pub fn is_cached(_: &File, _: u64) -> bool {
    true
}

/// Reads a whole regular file of at most `cap` bytes.
pub fn read_capped(path: &Path, cap: Bytes) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let failed = |e| Error::io("read", path, e);
    let mut bytes = Vec::new();
    (&file).take(cap.0.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > cap.0 {
        let size = Bytes(file.metadata().map_err(failed)?.len());
        let path = path.display();
        return Err(Error::input(format!("`{path}` is {size}, and at most {cap} is read of such a file")));
    }
    Ok(bytes)
}

/// Whether `name`, taken from a file, may be joined to a directory or a URL: a
/// plain file name, or a relative path of such.
pub fn is_plain_name(name: &str) -> bool {
    name.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !name.contains(|c: char| c.is_control() || "\\:".contains(c))
}

/// The path of `name`, a file name taken from a file, inside `directory`.
///
/// Only plain relative names pass. A directory is its user's own, who may have put links into it that lead
/// anywhere; but what lies in a snapshot of a Hugging Face cache came from a Hub, and may lead nowhere but into
/// the `blobs` folder of the same repository, wherever that lies.
pub fn confined(directory: &Path, name: &str) -> Result<PathBuf> {
    if !is_plain_name(name) {
        return Err(Error::input(format!("`{}` is no file name inside `{}`", printable(name), directory.display())));
    }
    let path = directory.join(name);
    let canonical = |path: &Path| path.canonicalize().map_err(|e| Error::io("open", path, e));
    let (real, home) = (canonical(&path)?, canonical(directory)?);
    let Some(repository) = repository(&home) else { return Ok(path) };
    let in_blobs = || repository.join("blobs").canonicalize().is_ok_and(|blobs| real.starts_with(blobs));
    if real.starts_with(&home) || in_blobs() {
        Ok(path)
    } else {
        Err(Error::input(format!("`{}` is a link to a file outside its repository", path.display()))
            .hint("a snapshot of a Hugging Face cache holds links into its own `blobs` only; download it again"))
    }
}

/// The directory of the repository in a Hugging Face cache that `snapshot` is one of.
fn repository(snapshot: &Path) -> Option<&Path> {
    let snapshots = snapshot.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))?;
    let repository = snapshots.parent()?;
    repository.file_name()?.to_string_lossy().starts_with("models--").then_some(repository)
}

/// What begins the name of an output that is not whole yet; [`SUFFIX`] letters and digits follow.
const TEMPORARY: &str = ".evenkeel-unfinished-";
const SUFFIX: usize = 12;
/// An output that nobody writes for so long was left by a run that was killed.
const LEFT: Duration = Duration::from_hours(24);

/// Says to [`sweep`] that an output is in use, on file systems that have locks.
fn lock(file: &File) {
    // Without one, its age says so.
    let _ = file.try_lock();
}

/// Removes from `directory` what killed runs of this user have left there. What cannot be removed stays.
fn sweep(directory: &Path) {
    for entry in directory.read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        if is_temporary(&entry.file_name()) && is_left(&path) == Some(true) {
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
}

fn is_temporary(name: &OsStr) -> bool {
    let suffix = name.to_str().and_then(|name| name.strip_prefix(TEMPORARY));
    suffix.is_some_and(|suffix| suffix.len() == SUFFIX && suffix.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// Whether an output is old, of this user, and not in use.
fn is_left(path: &Path) -> Option<bool> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    let is_ours = metadata.uid() == rustix::process::geteuid().as_raw();
    let age = metadata.modified().ok()?.elapsed().ok()?;
    Some((metadata.is_file() || metadata.is_dir()) && is_ours && age > LEFT && file.try_lock().is_ok())
}

/// Writes `bytes` to `path` whole or not at all: a temporary file beside it,
/// synced, then renamed. An existing file is replaced only with `overwrite`, and only where it is a regular one.
///
/// # Errors
/// Any failure; the file under the final name is then as it was.
pub fn write_atomic(path: &Path, bytes: &[u8], overwrite: bool) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |e| Error::io("write", path, e);
    let directory = parent(path);
    if let Some(metadata) = std::fs::metadata(path).ok().filter(|metadata| overwrite && !metadata.is_file()) {
        return Err(Error::usage(not_regular(path, &metadata)));
    }
    sweep(directory);
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .rand_bytes(SUFFIX)
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .map_err(failed)?;
    lock(file.as_file());
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    let persisted = if overwrite { file.persist(path) } else { file.persist_noclobber(path) };
    persisted.map_err(|e| match e.error.kind() {
        std::io::ErrorKind::AlreadyExists if !overwrite => {
            Error::usage(format!("`{}` is there already", path.display()))
                .hint(Hint::naming("{} replaces it", [Setting::Overwrite]))
        }
        _ => failed(e.error),
    })?;
    File::open(directory).and_then(|d| d.sync_all()).map_err(failed)
}

/// A directory that appears under its name whole or not at all: its files are
/// written into a temporary one beside it, which is synced and renamed.
pub struct NewDirectory {
    temporary: tempfile::TempDir,
    path: PathBuf,
    /// Held for as long as it is written.
    _lock: Option<File>,
}

impl NewDirectory {
    /// Begins the directory `path`.
    pub fn create(path: &Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(Error::usage(format!("`{}` is there already", path.display()))
                .hint("name a directory that is not there yet"));
        }
        sweep(parent(path));
        let temporary = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .rand_bytes(SUFFIX)
            .permissions(std::fs::Permissions::from_mode(0o777))
            .tempdir_in(parent(path))
            .map_err(|e| Error::io("write", path, e))?;
        let open = File::open(temporary.path()).ok();
        open.iter().for_each(lock);
        Ok(Self { temporary, path: path.to_owned(), _lock: open })
    }

    /// A new file in it of `len` zeros, whose space is reserved.
    pub fn file(&self, name: &str, len: Bytes) -> Result<File> {
        let failed = |e| Error::io("write", &self.path.join(name), e);
        let file = File::create_new(self.temporary.path().join(name)).map_err(failed)?;
        reserve(&file, len).map_err(failed)?;
        Ok(file)
    }

    /// Writes a whole file in it.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let written = std::fs::write(self.temporary.path().join(name), bytes);
        written.map_err(|e| Error::io("write", &self.path.join(name), e))
    }

    /// Gives the directory its name, with all that is in it on the disk.
    ///
    /// # Errors
    /// Any failure; there is no such directory then.
    pub fn finish(self) -> Result<()> {
        let Self { temporary, path, _lock } = self;
        let finish = || {
            for entry in temporary.path().read_dir()? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(temporary.path())?.sync_all()?;
            std::fs::rename(temporary.path(), &path)
        };
        finish().map_err(|e| Error::io("write", &path, e))?;
        // Its name is gone, so that there is nothing to remove.
        let _ = temporary.keep();
        File::open(parent(&path)).and_then(|d| d.sync_all()).map_err(|e| Error::io("write", &path, e))
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes `file` `len` bytes long, with space for them where the file system can reserve it.
fn reserve(file: &File, len: Bytes) -> std::io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len.0.max(1)) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(len.0),
        result => Ok(result?),
    }
}

/// Where large temporary files go, unless told otherwise: on the disk, where `/tmp` is in memory on many systems.
pub const SCRATCH_DIRECTORY: &str = "/var/tmp";

/// A nameless file of `len` bytes in `directory`, its space reserved; it is
/// gone when it is closed, however the process ends.
pub fn scratch_file(directory: &Path, len: Bytes) -> Result<File> {
    let file = tempfile::tempfile_in(directory).map_err(|e| Error::io("make a scratch file in", directory, e))?;
    let failed = |e| {
        let what = format!("{len} is needed there; {{}} names another place");
        Error::io("reserve space in", directory, e).hint(Hint::naming(what, [Setting::OffloadDirectory]))
    };
    reserve(&file, len).map_err(failed)?;
    Ok(file)
}

/// The bytes that an unprivileged user may still write in `directory`.
pub fn free_space(directory: &Path) -> Result<Bytes> {
    let stat = rustix::fs::statvfs(directory).map_err(|e| Error::io("read the free space of", directory, e.into()))?;
    Ok(Bytes(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let home = root.path().join("model");
        std::fs::create_dir(&home).unwrap();
        std::fs::write(root.path().join("secret.safetensors"), "x").unwrap();
        std::fs::write(home.join("own.safetensors"), "x").unwrap();
        std::os::unix::fs::symlink("../secret.safetensors", home.join("link.safetensors")).unwrap();
        // The second is a link that the directory's owner has made.
        for name in ["own.safetensors", "link.safetensors"] {
            assert!(confined(&home, name).is_ok(), "{name}");
        }
        for name in
            ["../secret.safetensors", "/etc/passwd", "C:\\x", "a\\..\\b", ".", "..", "", "x\0", "./own.safetensors/.."]
        {
            assert!(confined(&home, name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_link_may_lead_into_the_blobs_of_its_own_cache() {
        let root = tempfile::tempdir().unwrap();
        let snapshot = root.path().join("models--a--b/snapshots/abc");
        let blobs = root.path().join("models--a--b/blobs");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join("f00"), "x").unwrap();
        std::os::unix::fs::symlink("../../blobs/f00", snapshot.join("model.safetensors")).unwrap();
        assert!(confined(&snapshot, "model.safetensors").is_ok());
    }

    #[test]
    fn writing_replaces_only_when_told_to() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("map.json");
        write_atomic(&path, b"one", false).unwrap();
        assert!(write_atomic(&path, b"two", false).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        write_atomic(&path, b"two", true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn only_regular_files_are_replaced() {
        let root = tempfile::tempdir().unwrap();
        let (directory, fifo, link) = (root.path().join("a"), root.path().join("b"), root.path().join("c"));
        std::fs::create_dir(&directory).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        for (path, kind) in
            [(directory.as_path(), "a directory"), (&fifo, "a pipe or a device"), (&link, "a pipe or a device")]
        {
            let error = write_atomic(path, b"x", true).unwrap_err();
            assert_eq!(error.kind(), crate::error::ErrorKind::Usage, "{error}");
            assert_eq!(error.to_string(), format!("`{}` is {kind}, not a regular file", path.display()));
        }
        assert_eq!(root.path().read_dir().unwrap().count(), 3);
    }

    #[test]
    fn what_killed_runs_left_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let old = std::time::SystemTime::now() - 2 * LEFT;
        for (name, is_old, is_directory) in [
            (".evenkeel-unfinished-aB3xyzaB3xyz", true, false),
            (".evenkeel-unfinished-aB3xyzaB3xy0", true, true),
            (".evenkeel-unfinished-lockedlocked", true, true),
            (".evenkeel-unfinished-fresh1fresh1", false, false),
            (".evenkeel-backup", true, true),
            (".evenkeel-config.json", true, false),
            (".evenkeel-unfinished-a", true, false),
            ("evenkeel-aB3xyz", true, false),
        ] {
            let path = root.path().join(name);
            if is_directory {
                std::fs::create_dir(&path).unwrap();
                std::fs::write(path.join("model.safetensors"), "x").unwrap();
            } else {
                std::fs::write(&path, "x").unwrap();
            }
            if is_old {
                File::open(&path).unwrap().set_modified(old).unwrap();
            }
        }
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join(".evenkeel-unfinished-linkedlinked")).unwrap();
        let used = File::open(root.path().join(".evenkeel-unfinished-lockedlocked")).unwrap();
        used.try_lock().unwrap();
        write_atomic(&root.path().join("map.json"), b"x", false).unwrap();
        let mut left: Vec<_> =
            root.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        let kept = [
            ".evenkeel-backup",
            ".evenkeel-config.json",
            ".evenkeel-unfinished-a",
            ".evenkeel-unfinished-fresh1fresh1",
            ".evenkeel-unfinished-linkedlinked",
            ".evenkeel-unfinished-lockedlocked",
            "evenkeel-aB3xyz",
            "map.json",
        ];
        assert_eq!(left, kept);
        drop(used);
        drop(NewDirectory::create(&root.path().join("packed")).unwrap());
        assert!(!root.path().join(".evenkeel-unfinished-lockedlocked").exists());
        assert!(outside.path().exists());
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let error = write_atomic(Path::new("/proc/nowhere/map.json"), b"x", false).unwrap_err();
        assert!(error.to_string().contains("/proc/nowhere/map.json"));
    }

    #[test]
    fn reading_stops_at_the_cap() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 11]).unwrap();
        assert_eq!(read_capped(file.path(), Bytes(11)).unwrap().len(), 11);
        assert!(read_capped(file.path(), Bytes(10)).is_err());
        assert!(read_capped(Path::new("/dev/zero"), Bytes(10)).is_err());
    }
}
