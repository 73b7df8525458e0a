//! Threads as procfs shows them: their names, and the CPUs that they may run on.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::cpuset::{CpuSet, parse_decimal};
use crate::kernel_files::{list_dir, read_text};

/// A mounted procfs.
#[derive(Debug, Clone)]
pub(crate) struct ProcFs {
    root: PathBuf,
}

/// The vCPU threads of a process, found by their names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum VcpuThreads {
    /// One thread for each vCPU, from vCPU index to thread id. Empty when no thread is named as a
    /// vCPU.
    PerVcpu(BTreeMap<u32, i32>),
    /// One thread runs all vCPUs.
    Single(i32),
}

/// The fields of `/proc/TID/status` that placement needs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ThreadStatus {
    /// The process that the thread belongs to.
    pub(crate) pid: i32,
    /// The CPUs that the thread may run on.
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
                // A new thread has the name of its parent until it is renamed, so of two threads
                // with one name the older is the vCPU.
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

    /// The status of thread `tid` of any process.
    pub(crate) fn any_thread(&self, tid: i32) -> Option<ThreadStatus> {
        self.status(&self.root.join(tid.to_string()))
    }

    /// The status of this process's main thread, if it can be read. The process's own number is not
    /// used, because in a PID namespace whose /proc is that of the host another process has it.
    pub(crate) fn main_thread(&self) -> Option<ThreadStatus> {
        self.status(&self.root.join("self"))
    }

    /// The folder of the threads of `pid`.
    pub(crate) fn tasks(&self, pid: i32) -> PathBuf {
        self.root.join(pid.to_string()).join("task")
    }

    /// Whether a process named `name` runs.
    pub(crate) fn has_process(&self, name: &str) -> bool {
        list_dir(&self.root).iter().any(|entry| {
            entry.parse::<u32>().is_ok()
                && read_text(&self.root.join(entry).join("comm")).is_ok_and(|comm| comm == name)
        })
    }

    /// The names of the threads of `pid`, in the order of their ids. A thread that ends meanwhile
    /// is left out.
    fn thread_names(&self, pid: i32) -> io::Result<BTreeMap<i32, String>> {
        let mut names = BTreeMap::new();
        for entry in fs::read_dir(self.tasks(pid))? {
            let entry = entry?;
            let Some(tid) = entry.file_name().to_str().and_then(|tid| tid.parse().ok()) else {
                continue;
            };
            if let Ok(comm) = read_text(&entry.path().join("comm")) {
                names.insert(tid, comm);
            }
        }
        Ok(names)
    }

    fn status(&self, thread: &Path) -> Option<ThreadStatus> {
        parse_status(&read_text(&thread.join("status")).ok()?)
    }
}

/// A number that changes with the number of threads in folder `tasks`, without listing them: the
/// folder's link count, which procfs sets to the number of threads plus two.
pub(crate) fn task_count(tasks: &Path) -> Option<u64> {
    Some(fs::metadata(tasks).ok()?.nlink())
}

/// The vCPUs that a thread runs, by its name.
#[derive(Debug, PartialEq, Eq)]
enum VcpuName {
    /// The vCPU of this index.
    One(u32),
    /// All vCPUs.
    All,
}

/// Parses a thread's name: QEMU's `CPU 0/KVM`, `CPU 0/TCG` and the like (only with
/// `-name NAME,debug-threads=on`) or `ALL CPUs/TCG` (`-accel tcg,thread=single`),
/// cloud-hypervisor's `vcpu0`, crosvm's `crosvm_vcpu0`.
fn parse_comm(comm: &str) -> Option<VcpuName> {
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
    parse_decimal(index).map(VcpuName::One)
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
    fn thread_names_of_vcpus_are_parsed_and_others_are_ignored() {
        for (comm, name) in [
            ("CPU 0/KVM", Some(VcpuName::One(0))),
            ("CPU 12/TCG", Some(VcpuName::One(12))),
            ("CPU 1023/KVM", Some(VcpuName::One(1023))),
            ("ALL CPUs/TCG", Some(VcpuName::All)),
            ("vcpu3", Some(VcpuName::One(3))),
            ("crosvm_vcpu11", Some(VcpuName::One(11))),
            ("qemu-system-x86", None),
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
    fn status_gives_process_and_cpus_or_nothing() {
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
    fn real_thread_is_found_by_its_name() {
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
            panic!("one thread runs all vCPUs")
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
    fn main_thread_is_found_where_the_own_number_is_that_of_another_process() {
        let root = crate::testing::TempDir::new("other-number");
        let own = i32::try_from(std::process::id()).unwrap();
        root.thread(own, own, "another", "7");
        root.thread(4_000_000, 4_000_000, "virtionetd", "0-1");
        std::os::unix::fs::symlink("4000000", root.path().join("self")).unwrap();
        let main = ProcFs::new(root.path()).main_thread().unwrap();
        let expected = ThreadStatus {
            pid: 4_000_000,
            cpus: "0-1".parse().unwrap(),
        };
        assert_eq!(main, expected);
    }

    #[test]
    fn of_two_threads_with_one_name_the_older_is_the_vcpu() {
        let root = crate::testing::TempDir::new("same-name");
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
    fn threads_of_a_missing_process_are_an_error() {
        let error = ProcFs::new("/proc").named_vcpus(i32::MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn process_is_found_by_its_name_among_the_numbered_folders() {
        let root = crate::testing::TempDir::new("process-name");
        let proc = ProcFs::new(root.path());
        assert!(!proc.has_process("irqbalance"));
        root.thread(7, 7, "bash", "0");
        fs::create_dir(root.path().join("version")).unwrap();
        fs::write(root.path().join("version/comm"), "irqbalance\n").unwrap();
        assert!(!proc.has_process("irqbalance"));
        root.thread(812, 812, "irqbalance", "0");
        assert!(proc.has_process("irqbalance"));
    }
}
