//! Threads as /proc shows them: names, and the CPUs on which they may run.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::cpuset::CpuSet;

/// A mounted procfs.
#[derive(Debug, Clone)]
pub(crate) struct ProcFs {
    root: PathBuf,
}

/// The vCPU threads of a process, by their names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum VcpuThreads {
    /// A thread for each vCPU: index to thread id. Empty when none has a name
    /// that tells.
    PerVcpu(BTreeMap<u32, i32>),
    /// One thread for all vCPUs.
    Single(i32),
}

/// What is taken from a thread's status.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ThreadStatus {
    /// The process it belongs to.
    pub(crate) pid: i32,
    /// The CPUs on which it may run.
    pub(crate) cpus: CpuSet,
}

impl ProcFs {
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The threads of `pid` that are named as vCPUs.
    pub(crate) fn named_vcpus(&self, pid: i32) -> io::Result<VcpuThreads> {
        let mut each = BTreeMap::new();
        let mut single = None;
        for (tid, comm) in self.thread_names(pid)? {
            match parse_comm(&comm) {
                // A thread is born with its parent's name and renamed a moment
                // later: of two with one name the older is the vCPU.
                Some(VcpuName::One(index)) => _ = each.entry(index).or_insert(tid),
                Some(VcpuName::All) => _ = single.get_or_insert(tid),
                None => {}
            }
        }
        Ok(match single {
            Some(tid) if each.is_empty() => VcpuThreads::Single(tid),
            _ => VcpuThreads::PerVcpu(each),
        })
    }

    /// The status of thread `tid` of process `pid`, if it can be read.
    pub(crate) fn thread(&self, pid: i32, tid: i32) -> Option<ThreadStatus> {
        self.status(&self.tasks(pid).join(tid.to_string()))
    }

    /// The status of thread `tid`, whatever its process.
    pub(crate) fn any_thread(&self, tid: i32) -> Option<ThreadStatus> {
        self.status(&self.root.join(tid.to_string()))
    }

    /// Where the threads of `pid` are.
    pub(crate) fn tasks(&self, pid: i32) -> PathBuf {
        self.root.join(pid.to_string()).join("task")
    }

    /// The threads of `pid`, oldest first. One that ends meanwhile is left out.
    fn thread_names(&self, pid: i32) -> io::Result<BTreeMap<i32, String>> {
        let mut names = BTreeMap::new();
        for entry in fs::read_dir(self.tasks(pid))? {
            let entry = entry?;
            let Some(tid) = entry.file_name().to_str().and_then(|tid| tid.parse().ok()) else {
                continue;
            };
            let Ok(comm) = fs::read(entry.path().join("comm")) else {
                continue;
            };
            names.insert(tid, String::from_utf8_lossy(&comm).into_owned());
        }
        Ok(names)
    }

    fn status(&self, thread: &Path) -> Option<ThreadStatus> {
        let text = fs::read(thread.join("status")).ok()?;
        parse_status(&String::from_utf8_lossy(&text))
    }
}

/// The number of threads in `tasks`, without listing them: procfs keeps it in
/// the directory's count of links, with two for the directory itself.
pub(crate) fn task_count(tasks: &Path) -> Option<u64> {
    Some(fs::metadata(tasks).ok()?.nlink())
}

/// What a thread's name says of vCPUs.
#[derive(Debug, PartialEq, Eq)]
enum VcpuName {
    /// It runs this one.
    One(u32),
    /// It runs all of them.
    All,
}

/// Reads a `comm`: QEMU's `CPU 0/KVM`, `CPU 0/TCG` and the like (only with
/// `-name NAME,debug-threads=on`) or `ALL CPUs/TCG` (`-accel tcg,thread=single`),
/// cloud-hypervisor's `vcpu0`, crosvm's `crosvm_vcpu0`.
fn parse_comm(comm: &str) -> Option<VcpuName> {
    let comm = comm.trim_end_matches('\n');
    if comm == "ALL CPUs/TCG" {
        return Some(VcpuName::All);
    }
    let index = match comm.strip_prefix("CPU ") {
        Some(rest) => {
            rest.split_once('/')
                .filter(|(_, accelerator)| !accelerator.is_empty())?
                .0
        }
        None => comm
            .strip_prefix("crosvm_vcpu")
            .or_else(|| comm.strip_prefix("vcpu"))?,
    };
    let digits = !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .then(|| index.parse().ok())
        .flatten()
        .map(VcpuName::One)
}

fn parse_status(text: &str) -> Option<ThreadStatus> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    };
    Some(ThreadStatus {
        pid: field("Tgid")?.trim().parse().ok()?,
        cpus: field("Cpus_allowed_list")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn reads_vcpu_thread_names() {
        for (comm, name) in [
            ("CPU 0/KVM\n", Some(VcpuName::One(0))),
            ("CPU 12/TCG\n", Some(VcpuName::One(12))),
            ("CPU 1023/KVM", Some(VcpuName::One(1023))),
            ("ALL CPUs/TCG\n", Some(VcpuName::All)),
            ("vcpu3\n", Some(VcpuName::One(3))),
            ("crosvm_vcpu11\n", Some(VcpuName::One(11))),
            ("qemu-system-x86\n", None),
            ("CPU /KVM", None),
            ("CPU 0", None),
            ("CPU 0/", None),
            ("CPU +1/KVM", None),
            ("CPU x/KVM", None),
            ("CPU 4294967296/K", None),
            ("vcpu", None),
            ("vcpu-worker", None),
            ("IO iothread0", None),
            ("", None),
        ] {
            assert_eq!(parse_comm(comm), name, "{comm:?}");
        }
    }

    #[test]
    fn reads_a_status() {
        let text =
            "Name:\tCPU 0/KVM\nTgid:\t77\nPid:\t80\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,8\n";
        let status = ThreadStatus {
            pid: 77,
            cpus: "0-3,8".parse().unwrap(),
        };
        assert_eq!(parse_status(text), Some(status));
        assert_eq!(parse_status("Tgid:\t77\n"), None);
        assert_eq!(parse_status("Tgid:\tx\nCpus_allowed_list:\t0\n"), None);
    }

    /// A real thread of this process, named as QEMU names its vCPUs and pinned.
    #[test]
    fn finds_a_real_thread_by_its_name() {
        let proc = ProcFs::new("/proc");
        let pid = i32::try_from(std::process::id()).unwrap();
        let one = crate::allowed_cpus().unwrap().nth_cyclic(1);
        let (ready, is_ready) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let pinned = one.clone();
        let vcpu = std::thread::Builder::new()
            .name("CPU 5/TCG".into())
            .spawn(move || {
                crate::set_thread_affinity(None, &pinned).unwrap();
                ready.send(()).unwrap();
                ended.recv().unwrap_err();
            });
        is_ready.recv().unwrap();

        let VcpuThreads::PerVcpu(threads) = proc.named_vcpus(pid).unwrap() else {
            panic!("one thread for all")
        };
        let tid = threads[&5];
        assert_ne!(tid, pid);
        assert_eq!(
            proc.thread(pid, tid),
            Some(ThreadStatus {
                pid,
                cpus: one.clone()
            })
        );
        assert_eq!(proc.any_thread(tid), Some(ThreadStatus { pid, cpus: one }));

        drop(end);
        vcpu.unwrap().join().unwrap();
    }

    #[test]
    fn of_two_threads_with_one_name_the_older_counts() {
        let root = crate::testing::TempDir::new("twins");
        for (tid, comm) in [
            (104, "CPU 0/KVM"),
            (102, "CPU 0/KVM"),
            (100, "qemu"),
            (103, "CPU 1/KVM"),
        ] {
            root.thread(100, tid, comm, "0-1");
        }
        let named = ProcFs::new(root.path()).named_vcpus(100).unwrap();
        assert_eq!(
            named,
            VcpuThreads::PerVcpu(BTreeMap::from([(0, 102), (1, 103)]))
        );
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        let error = ProcFs::new("/proc").named_vcpus(i32::MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
