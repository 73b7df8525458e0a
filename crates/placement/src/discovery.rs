//! Finding the front-end's vCPU threads: by their names, else over QMP.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cpuset::CpuSet;
use crate::procfs::{ProcFs, VcpuThreads};
use crate::qmp::{self, CpuInfo, QmpError};
use crate::vcpus::{Vcpu, VcpuMap, VcpuSource};

/// A QMP socket and how long to wait for its answers.
pub(crate) type Monitor<'a> = (&'a Path, Duration);

/// Why the vCPU threads could not be found in one of the two ways.
///
/// `advice` and `or_qmp` tell the user to give a QMP socket; they are empty where there is one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiscoveryError {
    #[error("the front-end's process is not known{advice}")]
    ProcessUnknown { advice: &'static str },
    #[error(
        "the front-end runs in a PID namespace that this daemon cannot see: share its PID namespace or give --placement=list:CPUS"
    )]
    ForeignPidNamespace,
    #[error(
        "no vCPU threads were found in process {pid}: start QEMU with -name NAME,debug-threads=on{or_qmp}"
    )]
    NoNames { pid: i32, or_qmp: &'static str },
    #[error("process {0} is not in /proc: check that the front-end still runs")]
    ProcessGone(i32),
    #[error(
        "the threads of process {pid} cannot be listed: {source}; run the daemon as its user{or_qmp}"
    )]
    ThreadsUnreadable {
        pid: i32,
        or_qmp: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("QEMU at {} lists no vCPU: wait until its machine is created", .0.display())]
    NoVcpus(PathBuf),
    #[error(
        "the threads that QEMU at {} lists are not in /proc: share its PID namespace or give --placement=list:CPUS", .0.display()
    )]
    ThreadsInvisible(PathBuf),
}

/// Finds the vCPU threads of process `pid`.
pub(crate) fn discover(proc: &ProcFs, pid: Option<i32>, monitor: Option<Monitor<'_>>) -> VcpuMap {
    let mut notes = Vec::new();
    let mut note = |error: DiscoveryError| notes.push(error.to_string());
    let named = find_by_names(proc, pid, monitor.is_some())
        .map_err(&mut note)
        .ok();
    // One thread for all vCPUs says nothing about their number, which QEMU reports.
    let has_each_vcpu = named
        .as_ref()
        .is_some_and(|map| map.source == VcpuSource::ThreadNames);
    let listed = monitor
        .filter(|_| !has_each_vcpu)
        .and_then(|(path, timeout)| {
            let (map, invisible) = query_qmp(proc, pid, path, timeout)
                .map_err(&mut note)
                .ok()?;
            if let Some(error) = invisible {
                note(error);
            }
            Some(map)
        });
    let mut map = listed.or(named).unwrap_or(VcpuMap {
        vcpus: Vec::new(),
        source: VcpuSource::Nowhere,
        notes: Vec::new(),
    });
    map.notes = notes;
    map
}

fn find_by_names(
    proc: &ProcFs,
    pid: Option<i32>,
    has_monitor: bool,
) -> Result<VcpuMap, DiscoveryError> {
    let or_qmp = if has_monitor {
        ""
    } else {
        " or give --qmp=PATH"
    };
    let pid = match pid {
        None => {
            let advice = if has_monitor {
                ""
            } else {
                ": give --qmp=PATH or --placement=list:CPUS"
            };
            return Err(DiscoveryError::ProcessUnknown { advice });
        }
        // SO_PEERCRED reports 0 for a peer that our PID namespace does not show.
        Some(..=0) => return Err(DiscoveryError::ForeignPidNamespace),
        Some(pid) => pid,
    };
    let threads = proc
        .named_vcpus(pid)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => DiscoveryError::ProcessGone(pid),
            _ => DiscoveryError::ThreadsUnreadable {
                pid,
                or_qmp,
                source,
            },
        })?;
    let (threads, source) = match threads {
        VcpuThreads::PerVcpu(threads) if threads.is_empty() => {
            return Err(DiscoveryError::NoNames { pid, or_qmp });
        }
        VcpuThreads::PerVcpu(threads) => (threads, VcpuSource::ThreadNames),
        VcpuThreads::Single(tid) => ([(0, tid)].into(), VcpuSource::SingleThread),
    };
    let vcpu = |(index, tid)| Vcpu {
        index,
        tid,
        cpus: proc.thread(pid, tid).map(|thread| thread.cpus),
    };
    Ok(VcpuMap {
        vcpus: threads.into_iter().map(vcpu).collect(),
        source,
        notes: Vec::new(),
    })
}

/// The vCPUs that QEMU lists; with an error where their threads are not visible in `proc`.
fn query_qmp(
    proc: &ProcFs,
    pid: Option<i32>,
    path: &Path,
    timeout: Duration,
) -> Result<(VcpuMap, Option<DiscoveryError>), DiscoveryError> {
    let listed = qmp::query_vcpus(path, timeout)?;
    if listed.is_empty() {
        return Err(DiscoveryError::NoVcpus(path.into()));
    }
    let found = cpus_in_process(proc, pid, &listed).or_else(|| cpus_in_any_process(proc, &listed));
    let invisible = match found {
        Some(_) => None,
        None => Some(DiscoveryError::ThreadsInvisible(path.into())),
    };
    let cpus = found.unwrap_or_else(|| vec![None; listed.len()]);
    let vcpus = listed
        .iter()
        .zip(cpus)
        .map(|(listed, cpus)| Vcpu {
            index: listed.index,
            tid: listed.tid,
            cpus,
        })
        .collect();
    let map = VcpuMap {
        vcpus,
        source: VcpuSource::Qmp,
        notes: Vec::new(),
    };
    Ok((map, invisible))
}

/// The CPUs of the threads that belong to process `pid`; `None` if none does.
fn cpus_in_process(
    proc: &ProcFs,
    pid: Option<i32>,
    listed: &[CpuInfo],
) -> Option<Vec<Option<CpuSet>>> {
    let pid = pid?;
    let cpus: Vec<_> = listed
        .iter()
        .map(|vcpu| proc.thread(pid, vcpu.tid).map(|thread| thread.cpus))
        .collect();
    cpus.iter().any(Option::is_some).then_some(cpus)
}

/// The CPUs of threads whose process is not known, as when a manager such as libvirt created the
/// socket for QEMU.
///
/// QEMU reports thread ids of its own PID namespace. In another namespace than ours they are the
/// ids of unrelated threads here, so they are accepted only if they can be QEMU's: all in one
/// process, and none the main thread, which never runs a vCPU.
fn cpus_in_any_process(proc: &ProcFs, listed: &[CpuInfo]) -> Option<Vec<Option<CpuSet>>> {
    let threads: Vec<_> = listed
        .iter()
        .map(|vcpu| proc.any_thread(vcpu.tid))
        .collect::<Option<_>>()?;
    let pid = threads.first()?.pid;
    let can_be_qemu =
        threads.iter().all(|thread| thread.pid == pid) && listed.iter().all(|vcpu| vcpu.tid != pid);
    can_be_qemu.then(|| {
        threads
            .into_iter()
            .map(|thread| Some(thread.cpus))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeQmp, GREETING, TempDir};

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn qmp_listing(dir: &TempDir, tids: &[i32]) -> FakeQmp {
        let cpus: Vec<_> = (0..)
            .zip(tids)
            .map(|(index, tid): (u32, _)| serde_json::json!({ "cpu-index": index, "thread-id": tid, "target": "x86_64" }))
            .collect();
        let answer = serde_json::json!({ "return": cpus, "id": "query-cpus-fast" });
        let capable = "{\"return\": {}, \"id\": \"qmp_capabilities\"}\r\n";
        FakeQmp::start(
            dir,
            vec![GREETING.into(), capable.into(), format!("{answer}\r\n")],
        )
    }

    fn found(map: &VcpuMap) -> Vec<(u32, i32, Option<String>)> {
        map.vcpus
            .iter()
            .map(|vcpu| {
                (
                    vcpu.index,
                    vcpu.tid,
                    vcpu.cpus.as_ref().map(CpuSet::to_string),
                )
            })
            .collect()
    }

    #[test]
    fn threads_are_found_by_name_without_asking_qmp() {
        let dir = TempDir::new("names");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        dir.thread(100, 103, "CPU 1/KVM", "3");
        dir.thread(100, 102, "CPU 0/KVM", "2");
        let absent = dir.path().join("absent.sock");
        let map = discover(
            &ProcFs::new(dir.path()),
            Some(100),
            Some((&absent, TIMEOUT)),
        );
        assert_eq!(map.source, VcpuSource::ThreadNames);
        assert_eq!(map.notes, [""; 0]);
        assert_eq!(
            found(&map),
            [(0, 102, Some("2".into())), (1, 103, Some("3".into()))]
        );
    }

    #[test]
    fn qmp_is_asked_where_no_thread_is_named_as_a_vcpu() {
        let dir = TempDir::new("unnamed");
        for (tid, cpus) in [(100, "0-3"), (102, "2"), (103, "3")] {
            dir.thread(100, tid, "qemu-system-x86", cpus);
        }
        let proc = ProcFs::new(dir.path());
        // Process 7 is not QEMU but the manager that created the socket.
        dir.thread(7, 7, "libvirtd", "0-3");
        for pid in [Some(100), Some(7), None, Some(0)] {
            let at = TempDir::new(&format!("unnamed-{}", pid.unwrap_or(-1)));
            let server = qmp_listing(&at, &[102, 103]);
            let map = discover(&proc, pid, Some((&server.path, TIMEOUT)));
            assert_eq!(map.source, VcpuSource::Qmp);
            assert_eq!(
                found(&map),
                [(0, 102, Some("2".into())), (1, 103, Some("3".into()))],
                "{pid:?}"
            );
            assert_eq!(
                map.notes.len(),
                1,
                "the reason why the names were not enough: {:?}",
                map.notes
            );
        }
    }

    #[test]
    fn qmp_lists_the_vcpus_that_share_one_thread() {
        let dir = TempDir::new("single");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        dir.thread(100, 102, "ALL CPUs/TCG", "2");
        let proc = ProcFs::new(dir.path());
        let map = discover(&proc, Some(100), None);
        assert_eq!(
            (map.source, found(&map)),
            (VcpuSource::SingleThread, vec![(0, 102, Some("2".into()))])
        );

        let server = qmp_listing(&dir, &[102, 102]);
        let map = discover(&proc, Some(100), Some((&server.path, TIMEOUT)));
        assert_eq!(map.source, VcpuSource::Qmp);
        assert_eq!(
            found(&map),
            [(0, 102, Some("2".into())), (1, 102, Some("2".into()))]
        );
    }

    #[test]
    fn unrelated_threads_with_the_listed_ids_are_not_accepted() {
        let dir = TempDir::new("unrelated");
        dir.thread(9, 9, "kthreadd", "0-3");
        dir.thread(8, 10, "worker", "0-3");
        dir.thread(8, 11, "worker", "0-3");
        dir.thread(12, 13, "worker", "0-3");
        let proc = ProcFs::new(dir.path());
        for tids in [&[9][..], &[10, 13], &[10, 99], &[-1]] {
            let at = TempDir::new(&format!("unrelated-{tids:?}"));
            let server = qmp_listing(&at, tids);
            let map = discover(&proc, None, Some((&server.path, TIMEOUT)));
            assert_eq!(map.source, VcpuSource::Qmp);
            assert!(
                map.vcpus.iter().all(|vcpu| vcpu.cpus.is_none()),
                "{tids:?}: {map}"
            );
            assert!(
                map.notes[1].contains("are not in /proc: share its PID namespace"),
                "{:?}",
                map.notes
            );
        }
    }

    #[test]
    fn each_failure_is_noted_with_what_to_do() {
        let dir = TempDir::new("failures");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        let proc = ProcFs::new(dir.path());
        for (pid, note) in [
            (
                Some(100),
                "no vCPU threads were found in process 100: start QEMU with -name NAME,debug-threads=on or give --qmp=PATH",
            ),
            (
                Some(101),
                "process 101 is not in /proc: check that the front-end still runs",
            ),
            (
                Some(0),
                "the front-end runs in a PID namespace that this daemon cannot see: share its PID namespace or give --placement=list:CPUS",
            ),
            (
                None,
                "the front-end's process is not known: give --qmp=PATH or --placement=list:CPUS",
            ),
        ] {
            let map = discover(&proc, pid, None);
            assert_eq!(
                (map.source, map.notes),
                (VcpuSource::Nowhere, vec![note.to_owned()])
            );
        }
        let absent = dir.path().join("absent.sock");
        let map = discover(&proc, Some(100), Some((&absent, TIMEOUT)));
        assert_eq!(map.source, VcpuSource::Nowhere);
        assert_eq!(
            map.notes[0],
            "no vCPU threads were found in process 100: start QEMU with -name NAME,debug-threads=on"
        );
        assert!(
            map.notes[1].contains("cannot be reached"),
            "{:?}",
            map.notes
        );
    }
}
