//! Where things are: the checkout, the guest image, the binaries, a directory
//! for the files of one run.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;

use crate::cleanup::{self, Action, Entry};

/// Namespaces and directories are called `virtionet-PID-NUMBER`.
pub(crate) const PREFIX: &str = "virtionet-";

/// The root of the checkout.
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// `ci/cache`, where the guest image is kept.
pub fn cache() -> PathBuf {
    root().join("ci/cache")
}

/// The guest's kernel and initramfs, as `ci/guest-image` built them: with this machine's kernel,
/// or with that of the Debian suite that `$GUEST` names.
///
/// # Errors
/// When one is not there yet.
pub fn guest_image() -> Result<(PathBuf, PathBuf)> {
    let suite = env::var("GUEST").ok().filter(|suite| !suite.is_empty());
    let suite = suite.as_deref().unwrap_or("own");
    let dir = cache().join(format!("guest-{suite}"));
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

/// The virtionetd to test: `$VIRTIONETD`, or the one beside this program.
///
/// # Errors
/// When it does not exist.
pub fn virtionetd() -> Result<PathBuf> {
    if let Some(path) = from_environment("VIRTIONETD")? {
        return Ok(path);
    }
    let own = env::current_exe().context("this program's own path is unknown")?;
    // A test is in target/PROFILE/deps, a binary in target/PROFILE.
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("virtionetd"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "there is no virtionetd beside {}: build it with 'cargo build -p virtionetd -p virtionetctl' (add --release for a release run), or set VIRTIONETD",
                own.display()
            )
        })
}

/// The virtionetctl to test: `$VIRTIONETCTL`, or the one beside [`virtionetd`].
///
/// # Errors
/// When it does not exist.
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

/// The program that the environment variable `name` names, if it is set.
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

/// Checks for root, which namespaces and TAP devices need.
///
/// # Errors
/// When this process is another user's.
pub fn require_root() -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "uid {} may not make network namespaces and TAP devices: run this as root (CAP_NET_ADMIN, CAP_SYS_ADMIN and /dev/net/tun are used)",
        Uid::effective()
    );
    Ok(())
}

/// A directory of its own for sockets and logs, removed at the end. After a
/// panic it stays, for the logs in it.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _entry: Entry,
}

impl RunDir {
    /// Makes one below the system's temporary directory; its path is short
    /// enough for unix sockets.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("{PREFIX}{}-{n}", process::id()));
        // A number that came round again: what is there is a dead run's.
        _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        let entry = cleanup::register(Action::Remove(path.clone()));
        Ok(Self {
            path,
            _entry: entry,
        })
    }

    /// The path of `name` in it.
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

/// Whether `name` is one that a process made which is gone.
pub(crate) fn is_orphan(name: &str) -> bool {
    owner(name).is_some_and(|pid| !Path::new("/proc").join(pid).exists())
}

/// The process id in one of our names.
fn owner(name: &str) -> Option<&str> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.bytes().all(|b| b.is_ascii_digit()).then_some(pid)
}

/// Removes the directories of processes that are gone.
fn sweep() {
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
    fn only_our_own_names_have_an_owner() {
        assert_eq!(owner("virtionet-17-0"), Some("17"));
        for other in ["virtionet-", "virtionet-x-0", "blue", "virtionet-17"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }

    #[test]
    fn a_living_process_has_no_orphans() {
        assert!(!is_orphan(&format!("{PREFIX}{}-0", process::id())));
        // Beyond the kernel's highest process id.
        assert!(is_orphan(&format!("{PREFIX}4194305-0")));
    }
}
