//! Telling cheaply whether a front-end's vCPU threads are still what they were.
//!
//! A look costs one system call a vCPU and one for the process; nothing is
//! parsed. It tells that something changed, never what: that is read anew.

use std::path::PathBuf;

use crate::procfs::{self, ProcFs};
use crate::sys::{self, Mask};
use crate::vcpus::VcpuMap;

/// See the module.
#[derive(Debug)]
pub struct Watch {
    /// The front-end's threads, where they can be listed.
    tasks: Option<PathBuf>,
    /// Their number.
    count: Option<u64>,
    /// The vCPU threads' affinity.
    masks: Vec<(i32, Option<Mask>)>,
}

/// What a look at a front-end's threads tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Nothing changed.
    Same,
    /// A vCPU thread may run on other CPUs than before.
    Moved,
    /// A vCPU thread is gone, or the process has more or fewer threads.
    Threads,
}

impl Watch {
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
    pub fn look(&mut self) -> Seen {
        let count = count(self.tasks.as_ref());
        let (mut gone, mut moved) = (false, false);
        for (tid, seen) in &mut self.masks {
            let now = mask(*tid);
            gone |= now.is_none() && seen.is_some();
            moved |= now != *seen;
            *seen = now;
        }
        let threads = count != self.count;
        self.count = count;
        match (gone || threads, moved) {
            (true, _) => Seen::Threads,
            (_, true) => Seen::Moved,
            _ => Seen::Same,
        }
    }
}

fn mask(tid: i32) -> Option<Mask> {
    sys::get_mask(tid).ok()
}

fn count(tasks: Option<&PathBuf>) -> Option<u64> {
    procfs::task_count(tasks?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuSet, Source, Vcpu};
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
            source: Source::ThreadNames,
            notes: vec![],
        }
    }

    #[test]
    fn a_move_and_an_end_are_seen_once_each() {
        let (tid, end, thread) = thread();
        // Without a process id: other tests start and end threads of this process.
        let mut watch = Watch::new(&ProcFs::new("/proc"), None, &map(tid));
        assert_eq!(watch.look(), Seen::Same);
        let allowed = crate::allowed_cpus().unwrap();
        if allowed.len() > 1 {
            crate::apply(Some(tid), &allowed.turn(1)).unwrap();
            assert_eq!(watch.look(), Seen::Moved);
            assert_eq!(watch.look(), Seen::Same);
        }
        drop(end);
        thread.join().unwrap();
        // The kernel may take a moment to forget a thread that was joined.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while watch.look() != Seen::Threads {
            assert!(std::time::Instant::now() < until);
        }
        assert_eq!(watch.look(), Seen::Same);
    }

    #[test]
    fn more_threads_of_the_process_are_seen() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut watch = Watch::new(&ProcFs::new("/proc"), Some(pid), &map(pid));
        assert_eq!(watch.look(), Seen::Same);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(watch.look(), Seen::Threads);
        assert_eq!(watch.look(), Seen::Same);
    }
}
