//! What the daemon holds: descriptors, threads and memory.

use std::fs;
use std::time::{Duration, Instant};

use virtionet_tests::procfs::open_fds;
use virtionet_tests::sched::threads;

/// The time after which a descriptor or a thread that is still there counts as leaked. The daemon
/// closes what a front-end sent in a thread of its own, so it is not gone at once.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(15);
/// How much resident memory may grow from the first sample, in KiB. The allocator keeps freed
/// memory, and its peak depends on how many devices were under load at the same time; a leak in an
/// action passes this bound after some thousands of them.
const MEMORY_TOLERANCE_KIB: u64 = 4096;

/// The resources of a process at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    pub descriptors: usize,
    pub threads: usize,
    /// Resident memory that is not shared with a guest (RssAnon), in KiB.
    pub private_kib: u64,
    /// All resident memory (VmRSS), in KiB.
    pub resident_kib: u64,
}

impl Usage {
    /// Reads the resources of process `pid`.
    pub fn read(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let words = line.and_then(|rest| rest.split_whitespace().nth(0));
            words.and_then(|word| word.parse().ok()).unwrap()
        };
        Self {
            descriptors: open_fds(pid).unwrap(),
            threads: threads(pid).unwrap().len(),
            private_kib: kib("RssAnon:"),
            resident_kib: kib("VmRSS:"),
        }
    }

    /// Reads the resources until they have been the same for a second.
    pub fn read_settled(pid: u32) -> Self {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut usage = Self::read(pid);
        let mut unchanged_since = Instant::now();
        while unchanged_since.elapsed() < Duration::from_secs(1) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
            let now = Self::read(pid);
            if now.held() != usage.held() {
                unchanged_since = Instant::now();
            }
            usage = now;
        }
        usage
    }

    /// What must be exactly the same whenever the same front-ends are connected.
    fn held(self) -> (usize, usize) {
        (self.descriptors, self.threads)
    }

    /// Waits until the process holds exactly the descriptors and threads of `self` again, and
    /// checks its private memory.
    pub fn assert_returned(self, pid: u32) -> Self {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut now = Self::read(pid);
        while now.held() != self.held() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            now = Self::read(pid);
        }
        let names: Vec<String> = threads(pid)
            .unwrap()
            .into_iter()
            .map(|(_, name)| name)
            .collect();
        assert_eq!(
            now.held(),
            self.held(),
            "leaked descriptors or threads: {now:?}, {names:?}"
        );
        let limit = self.private_kib + MEMORY_TOLERANCE_KIB;
        assert!(
            now.private_kib <= limit,
            "memory grew from {self:?} to {now:?}"
        );
        now
    }

    /// The same when no front-end is connected, so that all resident memory must be back.
    pub fn assert_all_returned(self, pid: u32) -> Self {
        let now = self.assert_returned(pid);
        let limit = self.resident_kib + MEMORY_TOLERANCE_KIB;
        assert!(
            now.resident_kib <= limit,
            "memory grew from {self:?} to {now:?}"
        );
        now
    }
}
