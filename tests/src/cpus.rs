//! Taking CPUs away from a process: one goes offline, or its cpuset shrinks.
//! What is taken is given back when the value is dropped, and by a signal.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cleanup::{self, Action, Entry};
use crate::paths::PREFIX;

/// A CPU that is offline until this is dropped.
#[derive(Debug)]
pub struct Offline {
    cpu: u64,
    _entry: Entry,
}

impl Offline {
    /// Whether this process may take `cpu` offline; else the reason.
    ///
    /// # Errors
    /// Why it may not.
    pub fn check_possible(cpu: usize) -> Result<()> {
        let file = switch(u64::try_from(cpu)?);
        ensure!(file.exists(), "CPU {cpu} cannot go offline here");
        let open = fs::OpenOptions::new().write(true).open(&file);
        open.with_context(|| format!("{} is not for us to write", file.display()))?;
        // The first version of cpusets takes an offline CPU out of every set for good. What looks
        // like the root from within a container is such a set: only the real one has this file.
        let v1 = Path::new(V1);
        ensure!(
            !v1.join("cpuset.cpus").exists() || v1.join("release_agent").exists(),
            "this container's cpuset would lose CPU {cpu} for good"
        );
        let sets = fs::read_dir(Path::new(V1)).into_iter().flatten().flatten();
        for set in sets.filter(|entry| entry.path().is_dir()) {
            let path = set.path();
            ensure!(
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)),
                "the cpuset {} would lose CPU {cpu} for good",
                path.display()
            );
        }
        Ok(())
    }

    /// Takes `cpu` offline.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_offline(cpu: usize) -> Result<Self> {
        let cpu = u64::try_from(cpu)?;
        let entry = cleanup::register(Action::CallWithNumber(online, cpu));
        let taken = Self { cpu, _entry: entry };
        fs::write(switch(cpu), "0").with_context(|| format!("CPU {cpu} does not go offline"))?;
        Ok(taken)
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        online(self.cpu);
    }
}

/// Brings `cpu` back; says so where that fails.
fn online(cpu: u64) {
    if let Err(error) = fs::write(switch(cpu), "1") {
        eprintln!(
            "CPU {cpu} does not come back online: {error}; echo 1 to {}",
            switch(cpu).display()
        );
    }
}

fn switch(cpu: u64) -> PathBuf {
    format!("/sys/devices/system/cpu/cpu{cpu}/online").into()
}

const V1: &str = "/sys/fs/cgroup/cpuset";
const V2: &str = "/sys/fs/cgroup";

/// A cpuset of its own for one process, which goes back to the root's when
/// this is dropped.
#[derive(Debug)]
pub struct Cpuset {
    dir: PathBuf,
    _entry: Entry,
}

impl Cpuset {
    /// Puts process `pid`, with all its threads, into a new cpuset of `cpus`.
    ///
    /// # Errors
    /// When there are no cpusets for this process to make.
    pub fn for_process(pid: u32, cpus: &str) -> Result<Self> {
        let root = root()?;
        let dir = root.join(format!("{PREFIX}{}", process::id()));
        fs::create_dir(&dir).with_context(|| format!("no cpuset {}", dir.display()))?;
        let entry = cleanup::register(Action::CallWithPath(remove_cpuset, dir.clone()));
        let set = Self { dir, _entry: entry };
        if root == Path::new(V1) {
            let mems = fs::read_to_string(root.join("cpuset.mems"))?;
            fs::write(set.dir.join("cpuset.mems"), mems.trim())?;
        }
        set.change(cpus)?;
        fs::write(set.dir.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("process {pid} does not go into {}", set.dir.display()))?;
        Ok(set)
    }

    /// Gives the set other CPUs.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn change(&self, cpus: &str) -> Result<()> {
        fs::write(self.dir.join("cpuset.cpus"), cpus)
            .with_context(|| format!("{} does not take CPUs {cpus}", self.dir.display()))
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        remove_cpuset(&self.dir);
    }
}

/// Sends the processes of the cpuset `dir` to the one above, and removes it; says so where that
/// fails.
fn remove_cpuset(dir: &Path) {
    let above = dir.with_file_name("cgroup.procs");
    for _ in 0..50 {
        let inside = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in inside.lines() {
            _ = fs::write(&above, pid);
        }
        if fs::remove_dir(dir).is_ok() || !dir.exists() {
            return;
        }
        sleep(Duration::from_millis(20));
    }
    eprintln!("the cpuset {} is left behind: rmdir it", dir.display());
}

/// Where cpusets are made.
fn root() -> Result<&'static Path> {
    let (first, second) = (Path::new(V1), Path::new(V2));
    if first.join("cpuset.cpus").exists() {
        return Ok(first);
    }
    let control = second.join("cgroup.subtree_control");
    let controllers = fs::read_to_string(second.join("cgroup.controllers"))
        .context("no cpusets are mounted here")?;
    ensure!(
        controllers.contains("cpuset"),
        "cgroups have no cpusets here"
    );
    fs::write(&control, "+cpuset")
        .with_context(|| format!("{} is not for us to write", control.display()))?;
    Ok(second)
}
