//! Placement of one device's workers: what is known of the front-end's vCPUs, shared by them.
//!
//! The workers ask, never the session thread: QEMU serves no QMP while it waits for an answer on
//! the vhost-user socket.

use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use virtionet_placement::{Decision, Planner, VcpuMap};

/// See the module.
#[derive(Debug)]
pub struct Placer {
    planner: Planner,
    known: Mutex<Known>,
    /// Pairs that the driver uses.
    pairs: AtomicU32,
    /// Goes up when decisions may have changed.
    generation: AtomicU32,
}

#[derive(Debug, Default)]
struct Known {
    pid: Option<i32>,
    map: Option<VcpuMap>,
}

impl Placer {
    /// A placer that follows `planner`.
    #[must_use]
    pub fn new(planner: Planner) -> Self {
        Self {
            planner,
            known: Mutex::default(),
            pairs: AtomicU32::new(1),
            generation: AtomicU32::new(0),
        }
    }

    /// A front-end of this process id has connected.
    pub fn connected(&self, pid: Option<i32>) {
        *self.known.lock() = Known { pid, map: None };
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// The driver now uses `pairs` pairs; true when that is news.
    pub fn set_pairs(&self, pairs: u32) -> bool {
        let news = self.pairs.swap(pairs.max(1), Ordering::Relaxed) != pairs.max(1);
        if news {
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        news
    }

    /// Changes when a worker should ask again.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Where the worker of `pair` stands. The first to ask looks for the vCPUs, which takes
    /// milliseconds, or up to 2 s when a monitor has to be asked and does not answer.
    #[must_use]
    pub fn decide(&self, pair: u16) -> Decision {
        let mut known = self.known.lock();
        let pid = known.pid;
        let map = known.map.get_or_insert_with(|| {
            let map = self.planner.discover(pid);
            tracing::info!("{map}");
            map
        });
        let pairs = self.pairs.load(Ordering::Relaxed);
        self.planner.place(map, u32::from(pair), pairs)
    }
}
