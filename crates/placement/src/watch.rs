//! Telling cheaply whether a front-end's vCPU threads are still what they were.
//!
//! A look costs one system call a vCPU and one for the process; nothing is
//! parsed. It tells that something changed, never what: that is read anew.

use std::path::PathBuf;

use crate::procfs::{self, ProcFs};
use crate::sys::{self, AffinityMask};
use crate::vcpus::VcpuMap;

/// See the module.
#[derive(Debug)]
pub struct VcpuWatch {
    /// The front-end's threads, where they can be listed.
    tasks: Option<PathBuf>,
    /// Their number.
    count: Option<u64>,
    /// The vCPU threads' affinity.
    masks: Vec<(i32, Option<AffinityMask>)>,
}

/// What a look at a front-end's threads tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuChange {
    /// Nothing changed.
    Unchanged,
    /// A vCPU thread may run on other CPUs than before.
    AffinityChanged,
    /// A vCPU thread is gone, or the process has more or fewer threads.
    ThreadsChanged,
}

impl VcpuWatch {
    pub(crate) fn new(proc: &ProcFs, pid: Option<i32>, map: &VcpuMap) -> Self {
        let tasks = pid.filter(|pid| *pid > 0).map(|pid| proc.tasks(pid));
        // Threads of which no CPUs could be read may be strangers.
        let known = map.vcpus.iter().filter(|vcpu| vcpu.cpus.is_some());
        Self {
            count: count(tasks.as_ref()),
            tasks,
            masks: known.map(|vcpu| (vcpu.tid, mask(vcpu.tid))).collect(),
        }
    }

    /// Looks, and takes what it sees for the state that the next look compares with.
    pub fn poll(&mut self) -> VcpuChange {
        let count = count(self.tasks.as_ref());
        let (mut gone, mut moved) = (false, false);
        for (tid, previous) in &mut self.masks {
            let now = mask(*tid);
            gone |= now.is_none() && previous.is_some();
            moved |= now != *previous;
            *previous = now;
        }
        let threads = count != self.count;
        self.count = count;
        match (gone || threads, moved) {
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

    /// A thread that does nothing, until the sender is dropped.
    fn thread() -> (i32, mpsc::Sender<()>, std::thread::JoinHandle<()>) {
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let link = std::fs::read_link("/proc/thread-self").unwrap();
            let tid: i32 = link.file_name().unwrap().to_str().unwrap().parse().unwrap();
            tell.send(tid).unwrap();
            ended.recv().unwrap_err();
        });
        (told.recv().unwrap(), end, thread)
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
    fn a_move_and_an_end_are_seen_once_each() {
        let (tid, end, thread) = thread();
        // Without a process id: other tests start and end threads of this process.
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
        // The kernel may take a moment to forget a thread that was joined.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while watch.poll() != VcpuChange::ThreadsChanged {
            assert!(std::time::Instant::now() < until);
        }
        assert_eq!(watch.poll(), VcpuChange::Unchanged);
    }

    #[test]
    fn more_threads_of_the_process_are_seen() {
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
