//! The paths of the checkout, the guest image and the programs, and a directory for the files of
//! one run.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;

use crate::cleanup::{self, Action, Entry};

/// The beginning of the names of namespaces and directories, which are `virtionet-PID-NUMBER`.
pub(crate) const PREFIX: &str = "virtionet-";

/// The root directory of the checkout.
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// The directory `ci/cache`, which contains the guest image.
pub fn cache_dir() -> PathBuf {
    root().join("ci/cache")
}

/// The guest's kernel and initramfs, which `ci/guest-image` has built with the kernel of this
/// machine or, if `$GUEST` is set, with that of the Debian suite that it names.
///
/// # Errors
/// When one of the files does not exist.
pub fn guest_image() -> Result<(PathBuf, PathBuf)> {
    let suite = env::var("GUEST").ok().filter(|suite| !suite.is_empty());
    let suite = suite.as_deref().unwrap_or("own");
    let dir = cache_dir().join(format!("guest-{suite}"));
    let pair = (dir.join("vmlinuz"), dir.join("initramfs.cpio.gz"));
    for path in [&pair.0, &pair.1] {
        ensure!(
            path.exists(),
            "the guest image {} is missing: run ci/setup and ci/guest-image, with the same GUEST",
            path.display()
        );
    }
    Ok(pair)
}

/// The virtionetd under test: `$VIRTIONETD`, or the one in the target directory of this program.
///
/// # Errors
/// When the program does not exist.
pub fn virtionetd() -> Result<PathBuf> {
    if let Some(path) = from_environment("VIRTIONETD")? {
        return Ok(path);
    }
    let this_program = env::current_exe().context("the path of this program is unknown")?;
    // A test is in target/PROFILE/deps, and a binary is in target/PROFILE.
    this_program
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("virtionetd"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "there is no virtionetd beside {}: build it with 'cargo build -p virtionetd -p virtionetctl' (add --release for a release run), or set VIRTIONETD",
                this_program.display()
            )
        })
}

/// The virtionetctl under test: `$VIRTIONETCTL`, or the one in the directory of [`virtionetd`].
///
/// # Errors
/// When the program does not exist.
pub fn virtionetctl() -> Result<PathBuf> {
    if let Some(path) = from_environment("VIRTIONETCTL")? {
        return Ok(path);
    }
    let daemon = virtionetd()?;
    let path = daemon.with_file_name("virtionetctl");
    ensure!(
        path.is_file(),
        "there is no virtionetctl beside {}: build it with 'cargo build -p virtionetctl' (add --release for a release run), or set VIRTIONETCTL",
        daemon.display()
    );
    Ok(path)
}

/// Returns the path in the environment variable `name`, if it is set.
fn from_environment(name: &str) -> Result<Option<PathBuf>> {
    let Some(path) = env::var_os(name).map(PathBuf::from) else {
        return Ok(None);
    };
    ensure!(
        path.exists(),
        "{name} names {}, which does not exist: build it or unset {name}",
        path.display()
    );
    Ok(Some(path))
}

/// Checks that this process runs as root, which is needed to create namespaces and TAPs.
///
/// # Errors
/// When this process runs as another user.
pub fn require_root() -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "uid {} may not create network namespaces and TAPs: run this as root (CAP_NET_ADMIN, CAP_SYS_ADMIN and /dev/net/tun are used)",
        Uid::effective()
    );
    Ok(())
}

/// A directory for the sockets and logs of one run. It is removed when this value is dropped,
/// except during a panic, so that the logs of a failed test remain.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _entry: Entry,
}

impl RunDir {
    /// Creates a directory in the system's temporary directory. Its path is short enough for Unix
    /// sockets.
    ///
    /// # Errors
    /// When the directory cannot be created.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static CLEAN_UP: Once = Once::new();
        CLEAN_UP.call_once(delete_orphans);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("{PREFIX}{}-{n}", process::id()));
        // The kernel reuses process ids, so a process that has ended may have left this directory.
        _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path)
            .with_context(|| format!("{} cannot be created", path.display()))?;
        let entry = cleanup::register(Action::Remove(path.clone()));
        Ok(Self {
            path,
            _entry: entry,
        })
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the file `name` in the directory.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Returns whether `name` is a name that a process gave which has ended.
pub(crate) fn is_orphan(name: &str) -> bool {
    owner_pid(name).is_some_and(|pid| !Path::new("/proc").join(pid).exists())
}

/// Returns the process id in a name of the form `virtionet-PID-NUMBER`.
fn owner_pid(name: &str) -> Option<&str> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.bytes().all(|b| b.is_ascii_digit()).then_some(pid)
}

/// Removes the directories of processes that have ended.
fn delete_orphans() {
    let Ok(entries) = fs::read_dir(env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(is_orphan) {
            _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_name_has_an_owner_pid() {
        assert_eq!(owner_pid("virtionet-17-0"), Some("17"));
        for other in ["virtionet-", "virtionet-x-0", "blue", "virtionet-17"] {
            assert_eq!(owner_pid(other), None, "{other}");
        }
    }

    #[test]
    fn name_is_an_orphan_only_after_its_process_has_ended() {
        assert!(!is_orphan(&format!("{PREFIX}{}-0", process::id())));
        // This process id is above the kernel's maximum.
        assert!(is_orphan(&format!("{PREFIX}4194305-0")));
    }
}
