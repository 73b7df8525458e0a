//! Taking CPUs away from a process: by taking a CPU offline, or by shrinking the process's cpuset.
//! The change is undone when the value is dropped, or when a signal ends this process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cleanup::{self, Action, Entry};
use crate::paths::PREFIX;

/// The mount point of the cpuset controller of cgroup version 1.
const CPUSET_V1: &str = "/sys/fs/cgroup/cpuset";
/// The mount point of cgroup version 2.
const CGROUP_V2: &str = "/sys/fs/cgroup";

/// A CPU that stays offline until this value is dropped.
#[derive(Debug)]
pub struct OfflineCpu {
    cpu: u64,
    _entry: Entry,
}

impl OfflineCpu {
    /// Checks that this process can take `cpu` offline and bring it back completely.
    ///
    /// # Errors
    /// When it cannot: the error says why.
    pub fn check_possible(cpu: usize) -> Result<()> {
        let file = online_file(u64::try_from(cpu)?);
        ensure!(
            file.exists(),
            "CPU {cpu} cannot be taken offline: {} does not exist",
            file.display()
        );
        let open = fs::OpenOptions::new().write(true).open(&file);
        open.with_context(|| format!("{} cannot be written", file.display()))?;
        // Cgroup version 1 removes an offline CPU from every cpuset except the root, and does not
        // add it again. A container sees its own cpuset as the root, but only the real root has the
        // file `release_agent`.
        let v1 = Path::new(CPUSET_V1);
        ensure!(
            !v1.join("cpuset.cpus").exists() || v1.join("release_agent").exists(),
            "the cpuset of this container would lose CPU {cpu} permanently"
        );
        let sets = fs::read_dir(v1).into_iter().flatten().flatten();
        for set in sets.filter(|entry| entry.path().is_dir()) {
            let path = set.path();
            ensure!(
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)),
                "the cpuset {} would lose CPU {cpu} permanently",
                path.display()
            );
        }
        Ok(())
    }

    /// Takes `cpu` offline.
    ///
    /// # Errors
    /// When the kernel refuses the change.
    pub fn set_offline(cpu: usize) -> Result<Self> {
        let cpu = u64::try_from(cpu)?;
        let entry = cleanup::register(Action::CallWithNumber(set_online, cpu));
        let offline = Self { cpu, _entry: entry };
        fs::write(online_file(cpu), "0")
            .with_context(|| format!("CPU {cpu} cannot be taken offline"))?;
        Ok(offline)
    }
}

impl Drop for OfflineCpu {
    fn drop(&mut self) {
        set_online(self.cpu);
    }
}

/// Brings `cpu` back online. Prints a message if that fails.
fn set_online(cpu: u64) {
    if let Err(error) = fs::write(online_file(cpu), "1") {
        eprintln!(
            "CPU {cpu} cannot be brought back online: {error}; write 1 to {}",
            online_file(cpu).display()
        );
    }
}

fn online_file(cpu: u64) -> PathBuf {
    format!("/sys/devices/system/cpu/cpu{cpu}/online").into()
}

/// A cpuset for one process. When this value is dropped, the process moves to the parent cpuset and
/// the cpuset is removed.
#[derive(Debug)]
pub struct Cpuset {
    dir: PathBuf,
    _entry: Entry,
}

impl Cpuset {
    /// Moves process `pid`, with all its threads, into a new cpuset of `cpus`, which is a list such
    /// as `0-1,3`.
    ///
    /// # Errors
    /// When this process cannot create a cpuset, or the kernel refuses the CPUs or the process.
    pub fn for_process(pid: u32, cpus: &str) -> Result<Self> {
        let root = cpuset_root()?;
        let dir = root.join(format!("{PREFIX}{}", process::id()));
        fs::create_dir(&dir)
            .with_context(|| format!("the cpuset {} cannot be created", dir.display()))?;
        let entry = cleanup::register(Action::CallWithPath(remove_cpuset, dir.clone()));
        let set = Self { dir, _entry: entry };
        if root == Path::new(CPUSET_V1) {
            let mems = fs::read_to_string(root.join("cpuset.mems"))?;
            fs::write(set.dir.join("cpuset.mems"), mems.trim())?;
        }
        set.set_cpus(cpus)?;
        fs::write(set.dir.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("process {pid} cannot move to {}", set.dir.display()))?;
        Ok(set)
    }

    /// Replaces the CPUs of the cpuset by `cpus`, which is a list such as `0-1,3`.
    ///
    /// # Errors
    /// When the kernel refuses the CPUs.
    pub fn set_cpus(&self, cpus: &str) -> Result<()> {
        fs::write(self.dir.join("cpuset.cpus"), cpus)
            .with_context(|| format!("{} cannot have CPUs {cpus}", self.dir.display()))
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        remove_cpuset(&self.dir);
    }
}

/// Moves the processes of the cpuset `dir` to its parent, and removes it. Prints a message if that
/// fails.
fn remove_cpuset(dir: &Path) {
    let parent = dir.with_file_name("cgroup.procs");
    for _ in 0..50 {
        let members = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines() {
            _ = fs::write(&parent, pid);
        }
        if fs::remove_dir(dir).is_ok() || !dir.exists() {
            return;
        }
        sleep(Duration::from_millis(20));
    }
    eprintln!(
        "the cpuset {0} could not be removed: run rmdir {0}",
        dir.display()
    );
}

/// Returns the directory in which cpusets are created, and enables cpusets there if necessary.
fn cpuset_root() -> Result<&'static Path> {
    let (v1, v2) = (Path::new(CPUSET_V1), Path::new(CGROUP_V2));
    if v1.join("cpuset.cpus").exists() {
        return Ok(v1);
    }
    let control = v2.join("cgroup.subtree_control");
    let controllers = fs::read_to_string(v2.join("cgroup.controllers"))
        .context("no cpuset file system is mounted on this machine")?;
    ensure!(
        controllers.contains("cpuset"),
        "the cpuset controller is not available in {}",
        v2.display()
    );
    fs::write(&control, "+cpuset")
        .with_context(|| format!("{} cannot be written", control.display()))?;
    Ok(v2)
}
