//! Detecting at low cost that a front-end's vCPU threads have changed.
//!
//! One poll costs one system call for each vCPU and one for the process, and parses nothing. It
//! reports that something changed but not what; the caller reads the threads again.

use std::path::PathBuf;

use crate::procfs::{self, ProcFs};
use crate::sys::{self, AffinityMask};
use crate::vcpus::VcpuMap;

/// The state of a front-end's vCPU threads at the previous poll.
#[derive(Debug)]
pub struct VcpuWatch {
    /// The folder of the front-end's threads, where its process is known.
    tasks: Option<PathBuf>,
    /// The number of threads, as [`procfs::task_count`] gives it.
    count: Option<u64>,
    /// The affinity of each vCPU thread.
    masks: Vec<(i32, Option<AffinityMask>)>,
}

/// How a front-end's vCPU threads differ from the previous poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuChange {
    /// Nothing changed.
    Unchanged,
    /// A vCPU thread may run on other CPUs than before.
    AffinityChanged,
    /// A vCPU thread has ended, or the process has more or fewer threads than before.
    ThreadsChanged,
}

impl VcpuWatch {
    pub(crate) fn new(proc: &ProcFs, pid: Option<i32>, map: &VcpuMap) -> Self {
        let tasks = pid.filter(|pid| *pid > 0).map(|pid| proc.tasks(pid));
        // A thread whose CPUs could not be read may belong to another process.
        let known = map.vcpus.iter().filter(|vcpu| vcpu.cpus.is_some());
        Self {
            count: count(tasks.as_ref()),
            tasks,
            masks: known.map(|vcpu| (vcpu.tid, mask(vcpu.tid))).collect(),
        }
    }

    /// Compares the threads with the previous poll, and stores their state for the next one.
    pub fn poll(&mut self) -> VcpuChange {
        let count = count(self.tasks.as_ref());
        let (mut has_ended, mut has_moved) = (false, false);
        for (tid, previous) in &mut self.masks {
            let now = mask(*tid);
            has_ended |= now.is_none() && previous.is_some();
            has_moved |= now != *previous;
            *previous = now;
        }
        let threads_changed = has_ended || count != self.count;
        self.count = count;
        match (threads_changed, has_moved) {
            (true, _) => VcpuChange::ThreadsChanged,
            (_, true) => VcpuChange::AffinityChanged,
            _ => VcpuChange::Unchanged,
        }
    }
}

fn mask(tid: i32) -> Option<AffinityMask> {
    sys::get_mask(tid).ok()
}

fn count(tasks: Option<&PathBuf>) -> Option<u64> {
    procfs::task_count(tasks?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuSet, Vcpu, VcpuSource};
    use std::sync::mpsc;

    /// A thread that waits until the sender is dropped.
    fn thread() -> (i32, mpsc::Sender<()>, std::thread::JoinHandle<()>) {
        let (send_tid, receive_tid) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let link = std::fs::read_link("/proc/thread-self").unwrap();
            let tid: i32 = link.file_name().unwrap().to_str().unwrap().parse().unwrap();
            send_tid.send(tid).unwrap();
            ended.recv().unwrap_err();
        });
        (receive_tid.recv().unwrap(), end, thread)
    }

    fn map(tid: i32) -> VcpuMap {
        VcpuMap {
            vcpus: vec![Vcpu {
                index: 0,
                tid,
                cpus: Some(CpuSet::default()),
            }],
            source: VcpuSource::ThreadNames,
            notes: vec![],
        }
    }

    #[test]
    fn changed_affinity_and_ended_thread_are_reported_once_each() {
        let (tid, end, thread) = thread();
        // No process id, because other tests start and end threads of this process.
        let mut watch = VcpuWatch::new(&ProcFs::new("/proc"), None, &map(tid));
        assert_eq!(watch.poll(), VcpuChange::Unchanged);
        let allowed = crate::allowed_cpus().unwrap();
        if allowed.len() > 1 {
            crate::set_thread_affinity(Some(tid), &allowed.nth_cyclic(1)).unwrap();
            assert_eq!(watch.poll(), VcpuChange::AffinityChanged);
            assert_eq!(watch.poll(), VcpuChange::Unchanged);
        }
        drop(end);
        thread.join().unwrap();
        // A joined thread may still exist in the kernel for a moment.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while watch.poll() != VcpuChange::ThreadsChanged {
            assert!(std::time::Instant::now() < until);
        }
        assert_eq!(watch.poll(), VcpuChange::Unchanged);
    }

    #[test]
    fn changed_number_of_threads_is_reported_once() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut watch = VcpuWatch::new(&ProcFs::new("/proc"), Some(pid), &map(pid));
        assert_eq!(watch.poll(), VcpuChange::Unchanged);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(watch.poll(), VcpuChange::ThreadsChanged);
        assert_eq!(watch.poll(), VcpuChange::Unchanged);
    }
}
