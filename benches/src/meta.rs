//! The machine, the versions and the command of a measurement.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;
use virtionet_tests::paths::root;
use virtionet_tests::process::output;
use virtionet_tests::{qemu, sched, testpmd};

use crate::groups::Group;
use crate::sampling::Effort;

/// The conditions under which the figures of a group were measured.
#[derive(Debug, Clone, Serialize)]
pub struct Meta {
    /// The name of the group.
    pub group: &'static str,
    /// The title of the group.
    pub title: &'static str,
    /// The command that repeats the measurement.
    pub command: String,
    /// The date: year, month and day, in UTC.
    pub date: String,
    /// The model of the CPU.
    pub cpu: String,
    /// Number of CPUs that this process may use.
    pub cores: usize,
    /// Memory of the machine in MiB.
    pub memory_mib: u64,
    /// The release of the kernel.
    pub kernel: String,
    /// The load average of the minute before the measurement. Figures of a busy machine are
    /// unreliable.
    pub load_before: String,
    /// The versions of the measured programs and of the tools, by name.
    pub versions: BTreeMap<&'static str, String>,
    /// Further information, one sentence each.
    pub notes: Vec<String>,
}

impl Meta {
    /// Collects the data of this machine and of the installed programs.
    ///
    /// # Errors
    /// When a file of the kernel cannot be read, or a program cannot be run.
    pub fn gather(group: Group, effort: Effort) -> Result<Self> {
        let load = fs::read_to_string("/proc/loadavg")?;
        Ok(Self {
            group: group.name(),
            title: group.title(),
            command: format!("ci/bench {}{}", group.name(), effort.choose("", " --quick")),
            date: output("date", ["-u", "+%Y-%m-%d"])?.trim().to_owned(),
            cpu: read_field("/proc/cpuinfo", "model name")?,
            cores: sched::allowed_cpus()?.len(),
            memory_mib: read_field("/proc/meminfo", "MemTotal")?
                .trim_end_matches(" kB")
                .parse::<u64>()?
                / 1024,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            load_before: load.split(' ').next().unwrap_or("unknown").to_owned(),
            versions: versions(group)?,
            notes: Vec::new(),
        })
    }

    /// Returns the same data with the notes of a group.
    #[must_use]
    pub fn with_notes(mut self, notes: &[String]) -> Self {
        self.notes = notes.to_vec();
        self
    }

    /// Returns the lines for the head of a table or a chart.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let versions: Vec<String> = self
            .versions
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        vec![
            format!(
                "{}, {} CPUs, {} MiB, Linux {}; load before: {}",
                self.cpu, self.cores, self.memory_mib, self.kernel, self.load_before
            ),
            versions.join(", "),
            format!("{} ({})", self.command, self.date),
        ]
    }
}

fn versions(group: Group) -> Result<BTreeMap<&'static str, String>> {
    let mut versions = BTreeMap::from([("virtionetd", own_version()), ("rustc", rustc())]);
    match group {
        Group::Ring => _ = versions.insert("virtio-queue", locked_version("virtio-queue")?),
        Group::Builds | Group::Latency => _ = versions.insert("DPDK", testpmd::version()?),
        Group::Peers => {
            versions.insert("DPDK", testpmd::version()?);
            for package in ["vhost-user-backend", "virtio-queue"] {
                versions.insert(package, locked_version(package)?);
            }
        }
        Group::Iperf | Group::Guests | Group::Queues => {
            versions.insert("QEMU", qemu::version()?);
            let text = output("iperf3", ["--version"])?;
            let version = text.split_whitespace().nth(1).unwrap_or("unknown");
            versions.insert("iperf3", version.to_owned());
            if group == Group::Queues {
                let text = output("sockperf", ["--version"])?;
                let version = text.split_whitespace().nth(2).unwrap_or("unknown");
                versions.insert("sockperf", version.to_owned());
            }
        }
        Group::Tap | Group::Footprint | Group::Turn | Group::Isolation | Group::Sandbox => {}
    }
    Ok(versions)
}

/// Returns the version and, in a git checkout, the commit, with a `+` if files differ from it.
fn own_version() -> String {
    let root = root();
    let git = |args: &[&str]| {
        let directory = ["-C".as_ref(), root.as_os_str()];
        let args = args.iter().map(|arg| arg.as_ref());
        output("git", directory.into_iter().chain(args)).ok()
    };
    let version = env!("CARGO_PKG_VERSION");
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else {
        return version.to_owned();
    };
    // Only files that affect the measured program count. New results, for example, do not.
    let changed = git(&["status", "--porcelain", "--", "crates", "Cargo.lock"]);
    let mark = match changed.is_some_and(|list| !list.trim().is_empty()) {
        true => "+",
        false => "",
    };
    format!("{version} ({}{mark})", commit.trim())
}

/// Returns the version of the compiler.
#[must_use]
pub fn rustc() -> String {
    let text = output("rustc", ["--version"]).unwrap_or_default();
    text.split_whitespace().nth(1).unwrap_or("unknown").into()
}

/// Returns the version of a package in Cargo.lock.
fn locked_version(package: &str) -> Result<String> {
    let lock = fs::read_to_string(root().join("Cargo.lock"))?;
    let head = format!("name = \"{package}\"\nversion = \"");
    lock.split_once(&head)
        .and_then(|(_, rest)| rest.split_once('"'))
        .map(|(version, _)| version.to_owned())
        .with_context(|| format!("Cargo.lock has no package {package}"))
}

/// Returns the value of the first line `NAME : VALUE` of a file in /proc.
fn read_field(path: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(path)?;
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
        .with_context(|| format!("{path} has no field '{name}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_has_the_data_of_the_machine_and_no_path() {
        let meta = Meta::gather(Group::Ring, Effort::Quick).unwrap();
        assert_eq!(meta.command, "ci/bench ring --quick");
        assert!(meta.cores > 0 && meta.memory_mib > 0 && !meta.cpu.is_empty());
        assert!(meta.versions["virtio-queue"].starts_with("0."));
        let text = serde_json::to_string(&meta).unwrap();
        assert!(!text.contains(&*root().to_string_lossy()), "{text}");
    }
}
