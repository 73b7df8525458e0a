//! On what machine, with which versions and by which command something was measured.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;
use virtionet_tests::paths::root;
use virtionet_tests::process::output;
use virtionet_tests::{qemu, sched, testpmd};

use crate::groups::Group;
use crate::sampling::Effort;

/// What stands beside a group's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Meta {
    /// The group's name.
    pub group: &'static str,
    /// Its headline.
    pub title: &'static str,
    /// What to type for the same again.
    pub command: String,
    /// When, as year, month and day.
    pub date: String,
    /// The processor's model.
    pub cpu: String,
    /// CPUs that could be used.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The load average over the minute before: figures of a busy machine are unreliable.
    pub load_before: String,
    /// What was measured, by name.
    pub versions: BTreeMap<&'static str, String>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

impl Meta {
    /// Of this machine, now.
    ///
    /// # Errors
    /// When the machine does not tell.
    pub fn gather(group: Group, effort: Effort) -> Result<Self> {
        let load = fs::read_to_string("/proc/loadavg")?;
        Ok(Self {
            group: group.name(),
            title: group.title(),
            command: format!("ci/bench {}{}", group.name(), effort.choose("", " --quick")),
            date: output("date", ["-u", "+%Y-%m-%d"])?.trim().to_owned(),
            cpu: field("/proc/cpuinfo", "model name")?,
            cores: sched::allowed_cpus()?.len(),
            memory_mib: field("/proc/meminfo", "MemTotal")?
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

    /// With a group's notes.
    #[must_use]
    pub fn with_notes(mut self, notes: &[String]) -> Self {
        self.notes = notes.to_vec();
        self
    }

    /// For the head of a table or a chart.
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
        Group::Ring => _ = versions.insert("virtio-queue", locked("virtio-queue")?),
        Group::Peers => {
            versions.insert("DPDK", testpmd::version()?);
            for stock in ["vhost-user-backend", "virtio-queue"] {
                versions.insert(stock, locked(stock)?);
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
        Group::Tap | Group::Footprint => {}
    }
    Ok(versions)
}

/// The version and, in a git checkout, the commit; `+` where files differ from it.
fn own_version() -> String {
    let root = root();
    let git = |args: &[&str]| {
        let place = ["-C".as_ref(), root.as_os_str()];
        let args = args.iter().map(|arg| arg.as_ref());
        output("git", place.into_iter().chain(args)).ok()
    };
    let version = env!("CARGO_PKG_VERSION");
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else {
        return version.to_owned();
    };
    // Results are files too, but not what is measured.
    let changed = git(&["status", "--porcelain", "--", "crates", "Cargo.lock"]);
    let mark = match changed.is_some_and(|list| !list.trim().is_empty()) {
        true => "+",
        false => "",
    };
    format!("{version} ({}{mark})", commit.trim())
}

/// The compiler's version.
#[must_use]
pub fn rustc() -> String {
    let text = output("rustc", ["--version"]).unwrap_or_default();
    text.split_whitespace().nth(1).unwrap_or("unknown").into()
}

/// The version of a package as Cargo.lock has it.
fn locked(package: &str) -> Result<String> {
    let lock = fs::read_to_string(root().join("Cargo.lock"))?;
    let head = format!("name = \"{package}\"\nversion = \"");
    lock.split_once(&head)
        .and_then(|(_, rest)| rest.split_once('"'))
        .map(|(version, _)| version.to_owned())
        .with_context(|| format!("Cargo.lock has no package {package}"))
}

/// The first `NAME : VALUE` of a file in /proc.
fn field(path: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(path)?;
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
        .with_context(|| format!("{path} does not say '{name}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_told_and_no_path_of_it() {
        let meta = Meta::gather(Group::Ring, Effort::Quick).unwrap();
        assert_eq!(meta.command, "ci/bench ring --quick");
        assert!(meta.cores > 0 && meta.memory_mib > 0 && !meta.cpu.is_empty());
        assert!(meta.versions["virtio-queue"].starts_with("0."));
        let text = serde_json::to_string(&meta).unwrap();
        assert!(!text.contains(&*root().to_string_lossy()), "{text}");
    }
}
