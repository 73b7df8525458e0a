//! Finding the front-end's vCPU threads: by their names, else over QMP.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::cpuset::CpuSet;
use crate::procfs::{ProcFs, VcpuThreads};
use crate::qmp::{self, CpuInfo};
use crate::vcpus::{Vcpu, VcpuMap, VcpuSource};

/// A QMP socket to ask, and how long.
pub(crate) type Monitor<'a> = (&'a Path, Duration);

/// Looks for the vCPU threads of process `pid`.
pub(crate) fn discover(proc: &ProcFs, pid: Option<i32>, monitor: Option<Monitor<'_>>) -> VcpuMap {
    let mut notes = Vec::new();
    let by_names = match by_names(proc, pid, monitor.is_some()) {
        Ok(map) => Some(map),
        Err(note) => {
            notes.push(note);
            None
        }
    };
    if let (Some((path, timeout)), None | Some(VcpuSource::SingleThread)) =
        (monitor, by_names.as_ref().map(|map| map.source))
    {
        match by_qmp(proc, pid, path, timeout) {
            Ok(mut map) => {
                map.notes.splice(0..0, notes);
                return map;
            }
            Err(note) => notes.push(note),
        }
    }
    let mut map = by_names.unwrap_or(VcpuMap {
        vcpus: Vec::new(),
        source: VcpuSource::Nowhere,
        notes: Vec::new(),
    });
    map.notes.extend(notes);
    map
}

fn by_names(proc: &ProcFs, pid: Option<i32>, has_monitor: bool) -> Result<VcpuMap, String> {
    let or_qmp = if has_monitor {
        ""
    } else {
        " or give --qmp=PATH"
    };
    let pid =
        match pid {
            None if has_monitor => return Err("the front-end's process is not known".into()),
            None => return Err(
                "the front-end's process is not known: give --qmp=PATH or --placement=list:CPUS"
                    .into(),
            ),
            // What SO_PEERCRED says of a peer that our PID namespace does not show.
            Some(..=0) => {
                return Err(
                    "the front-end runs in a PID namespace that this daemon cannot see: \
                        share its PID namespace or give --placement=list:CPUS"
                        .into(),
                );
            }
            Some(pid) => pid,
        };
    let threads = match proc.named_vcpus(pid) {
        Ok(VcpuThreads::PerVcpu(threads)) if threads.is_empty() => {
            return Err(format!(
                "no vCPU threads found for process {pid}: start QEMU with -name NAME,debug-threads=on{or_qmp}"
            ));
        }
        Ok(VcpuThreads::PerVcpu(threads)) => (threads, VcpuSource::ThreadNames),
        Ok(VcpuThreads::Single(tid)) => ([(0, tid)].into(), VcpuSource::SingleThread),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(format!(
                "process {pid} is not in /proc: check that the front-end still runs"
            ));
        }
        Err(error) => {
            return Err(format!(
                "the threads of process {pid} cannot be listed: {error}; run the daemon as its user{or_qmp}"
            ));
        }
    };
    let (threads, source) = threads;
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

fn by_qmp(
    proc: &ProcFs,
    pid: Option<i32>,
    path: &Path,
    timeout: Duration,
) -> Result<VcpuMap, String> {
    let listed = qmp::query_vcpus(path, timeout).map_err(|error| error.to_string())?;
    if listed.is_empty() {
        return Err(format!(
            "QEMU at {} lists no vCPU: look again once its machine is made",
            path.display()
        ));
    }
    let found = cpus_under(proc, pid, &listed).or_else(|| cpus_anywhere(proc, &listed));
    let notes = match found {
        Some(_) => Vec::new(),
        None => vec![format!(
            "the threads that QEMU at {} lists are not in /proc: share its PID namespace or give --placement=list:CPUS",
            path.display()
        )],
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
    Ok(VcpuMap {
        vcpus,
        source: VcpuSource::Qmp,
        notes,
    })
}

/// The CPUs of threads that belong to process `pid`; `None` if none does.
fn cpus_under(proc: &ProcFs, pid: Option<i32>, listed: &[CpuInfo]) -> Option<Vec<Option<CpuSet>>> {
    let pid = pid?;
    let cpus: Vec<_> = listed
        .iter()
        .map(|vcpu| proc.thread(pid, vcpu.tid).map(|thread| thread.cpus))
        .collect();
    cpus.iter().any(Option::is_some).then_some(cpus)
}

/// The CPUs of threads whose process is not known, as when a manager such as
/// libvirt made the socket in QEMU's stead.
///
/// QEMU counts threads in its own PID namespace. Where that is not ours the
/// numbers name strangers here, so they are believed only if they fit a QEMU:
/// all in one process, and none its main thread, which never runs a vCPU.
fn cpus_anywhere(proc: &ProcFs, listed: &[CpuInfo]) -> Option<Vec<Option<CpuSet>>> {
    let threads: Vec<_> = listed
        .iter()
        .map(|vcpu| proc.any_thread(vcpu.tid))
        .collect::<Option<_>>()?;
    let pid = threads.first()?.pid;
    let fits =
        threads.iter().all(|thread| thread.pid == pid) && listed.iter().all(|vcpu| vcpu.tid != pid);
    fits.then(|| {
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
    fn names_come_first() {
        let dir = TempDir::new("names");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        dir.thread(100, 103, "CPU 1/KVM", "3");
        dir.thread(100, 102, "CPU 0/KVM", "2");
        let nobody = dir.path().join("absent.sock");
        let map = discover(
            &ProcFs::new(dir.path()),
            Some(100),
            Some((&nobody, TIMEOUT)),
        );
        assert_eq!(map.source, VcpuSource::ThreadNames);
        assert_eq!(map.notes, [""; 0]);
        assert_eq!(
            found(&map),
            [(0, 102, Some("2".into())), (1, 103, Some("3".into()))]
        );
    }

    #[test]
    fn qmp_is_asked_where_names_say_nothing() {
        let dir = TempDir::new("unnamed");
        for (tid, cpus) in [(100, "0-3"), (102, "2"), (103, "3")] {
            dir.thread(100, tid, "qemu-system-x86", cpus);
        }
        let proc = ProcFs::new(dir.path());
        // 7: a process that is not QEMU, such as the manager that made the socket.
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
                "why the names did not serve: {:?}",
                map.notes
            );
        }
    }

    #[test]
    fn qmp_tells_apart_the_vcpus_of_one_thread() {
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
    fn strangers_with_the_same_numbers_are_not_believed() {
        let dir = TempDir::new("strangers");
        dir.thread(9, 9, "kthreadd", "0-3");
        dir.thread(8, 10, "worker", "0-3");
        dir.thread(8, 11, "worker", "0-3");
        dir.thread(12, 13, "worker", "0-3");
        let proc = ProcFs::new(dir.path());
        for tids in [&[9][..], &[10, 13], &[10, 99], &[-1]] {
            let at = TempDir::new(&format!("strangers-{tids:?}"));
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
    fn what_failed_is_told_with_its_remedy() {
        let dir = TempDir::new("failures");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        let proc = ProcFs::new(dir.path());
        for (pid, note) in [
            (
                Some(100),
                "no vCPU threads found for process 100: start QEMU with -name NAME,debug-threads=on or give --qmp=PATH",
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
            "no vCPU threads found for process 100: start QEMU with -name NAME,debug-threads=on"
        );
        assert!(
            map.notes[1].contains("cannot be reached"),
            "{:?}",
            map.notes
        );
    }
}
