//! One virtio-net device: what a vhost-user session drives, made of queue pairs and an uplink.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::port::Uplink;
use virtionet_virtio_net::{DeviceQueue, QueueConfig};
use virtionet_placement::Warning;
use virtionet_virtqueue::memory::GuestMemory;
use virtionet_vhost_user::{Backend, BackendError, RingStart};

use crate::advice::{Adviser, Use};
use crate::config::{MAX_PAIRS, Poll};
use crate::interrupts::{Interrupts, Seen};
use crate::pair::Pair;
use crate::placer::Placer;
use crate::poll::Polling;
use crate::slot::{RingFds, Slot};

/// See the module.
#[derive(Debug)]
pub struct Card {
    name: String,
    uplink: Arc<dyn Uplink>,
    placer: Arc<Placer>,
    poll: Poll,
    /// Made when their first ring starts: a front-end may use fewer than it might.
    pairs: Vec<OnceLock<Arc<Pair>>>,
    link: Mutex<Link>,
    told: Mutex<Told>,
    interrupts: Interrupts,
    adviser: Adviser,
}

/// A front-end that connects again and again must not flood the log.
const TELL_AGAIN: Duration = Duration::from_secs(1);

/// What the log says of connections.
#[derive(Debug, Default)]
struct Told {
    /// When it last told of one.
    last: Option<Instant>,
    /// Whether it told of the present one.
    present: bool,
}

/// What is known of the front-end.
#[derive(Debug, Clone, Default)]
pub struct Link {
    /// A front-end is connected.
    pub connected: bool,
    /// Its process id, where the kernel tells.
    pub pid: Option<u32>,
    /// Virtio features in force.
    pub features: Features,
    /// vhost-user protocol features in force.
    pub protocol_features: u64,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The MTU that the front-end told.
    pub mtu: Option<u16>,
    /// Queue pairs that the front-end has for the driver, as far as it has named them.
    pub pairs: u16,
}

/// Which ring of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Rx,
    Tx,
}

/// Calls `$body` with the slot of whichever half.
macro_rules! with_slot {
    ($pair:expr, $half:expr, $slot:ident => $body:expr) => {
        match $half {
            Half::Rx => {
                let $slot = $pair.rx();
                $body
            }
            Half::Tx => {
                let $slot = $pair.tx();
                $body
            }
        }
    };
}

impl Card {
    /// A device called `name` with up to `max_pairs` queue pairs.
    #[must_use]
    pub fn new(
        name: &str,
        max_pairs: u16,
        uplink: Arc<dyn Uplink>,
        placer: Placer,
        poll: Poll,
    ) -> Self {
        Self {
            name: name.to_owned(),
            uplink,
            placer: Arc::new(placer),
            poll,
            pairs: (0..max_pairs).map(|_| OnceLock::new()).collect(),
            link: Mutex::default(),
            told: Mutex::default(),
            interrupts: Interrupts::off(name),
            adviser: Adviser::new(name, None, None),
        }
    }

    /// The same with these to look after its interrupts and to advise its guest.
    #[must_use]
    pub fn with(mut self, interrupts: Interrupts, adviser: Adviser) -> Self {
        if self.uplink.host_interface().is_none() {
            interrupts.tell_useless(self.uplink.kind());
        }
        self.interrupts = interrupts;
        self.adviser = adviser;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its frames go.
    #[must_use]
    pub fn uplink(&self) -> &dyn Uplink {
        &*self.uplink
    }

    /// What is known of the front-end now.
    #[must_use]
    pub fn link(&self) -> Link {
        self.link.lock().clone()
    }

    /// The host's interrupts and steering masks that belong to it.
    #[must_use]
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// What its guest could do better.
    #[must_use]
    pub fn advice(&self) -> Vec<String> {
        self.adviser.current()
    }

    /// Brings in line what hangs on the workers' places and the guest's choice of pairs.
    fn tend(&self) {
        self.interrupts.follow(|| Seen::of(self));
        self.adviser.look(|| Use::of(self), Instant::now());
    }

    /// The queue pairs that have been used so far.
    pub fn pairs(&self) -> impl Iterator<Item = &Arc<Pair>> {
        self.pairs.iter().filter_map(OnceLock::get)
    }

    /// The pair and half that ring `index` is, if that pair has been used.
    fn ring(&self, index: u16) -> Option<(&Arc<Pair>, Half)> {
        let pair = self.pairs.get(usize::from(index / 2))?.get()?;
        Some((pair, half(index)))
    }

    /// The same, made now if it has not.
    fn ring_or_new(&self, index: u16) -> Result<(&Arc<Pair>, Half), BackendError> {
        let slot = self.pairs.get(usize::from(index / 2)).ok_or_else(|| {
            BackendError::new(format!(
                "ring {index} is beyond the {} queue pairs of {}; start virtionetd with more --queues",
                self.pairs.len(),
                self.name
            ))
        })?;
        if slot.get().is_none() {
            let pair = Pair::new(index / 2, &self.name, Arc::clone(&self.placer)).map_err(|e| {
                BackendError::new(format!(
                    "cannot make queue pair {}: {e}; raise the limit of open files",
                    index / 2
                ))
            })?;
            // Only the session thread makes pairs, so none was put there meanwhile.
            let _ = slot.set(Arc::new(pair));
        }
        self.ring(index)
            .ok_or_else(|| BackendError::new(format!("ring {index} does not exist")))
    }

    /// The number of pairs that the driver uses decides which vCPUs each of them serves.
    fn recount_pairs(&self) {
        let count = self.pairs().filter(|pair| is_live(pair)).count();
        if self
            .placer
            .set_pairs(u32::try_from(count).unwrap_or(u32::MAX))
        {
            self.pairs().for_each(|pair| pair.wake());
        }
    }

    /// Brings all that hangs on whether a ring is live in line with it.
    fn follow(&self, pair: &Pair, half: Half) {
        if half == Half::Rx {
            self.recount_pairs();
            pair.follow_rx_state();
        } else {
            pair.wake();
        }
    }

    /// The protocol has no message for "more pairs than you have": a front-end that wants more just
    /// hangs up, before the device has any use (QEMU then tries again at once).
    fn tell_of_end(&self, link: &Link) {
        let unused = link.protocol_features != 0 && link.features == Features::default();
        if unused && self.max_pairs() < MAX_PAIRS {
            tracing::warn!(
                "{0}: front-end gone before it used the device; if it asked for more than {1} queue pairs, raise --queues {1} or lower queues= of QEMU's -netdev vhost-user",
                self.name,
                self.pairs.len()
            );
        } else {
            tracing::info!("{}: front-end gone", self.name);
        }
    }

    /// Whether there is a front-end whose vCPUs and memory may move.
    pub(crate) fn is_followed(&self) -> bool {
        self.placer.is_connected()
    }

    /// Looks whether workers should stand elsewhere, and has them go there.
    pub(crate) fn look(&self) {
        if !self.is_followed() {
            return;
        }
        let mut news = self.placer.look();
        if self.placer.has_several_nodes() {
            let memory = Arc::clone(&self.link.lock().memory);
            self.pairs().for_each(|pair| news |= pair.locate(&memory));
        }
        if news {
            self.pairs().for_each(|pair| pair.wake());
        } else {
            self.pairs().for_each(|pair| pair.look());
        }
        self.placer.review();
        self.tend();
    }

    /// What is wrong with how vCPUs and workers stand.
    #[must_use]
    pub fn warnings(&self) -> Vec<Warning> {
        self.placer.warnings()
    }

    fn set_format(&self, features: Features) {
        if let Err(error) = self.uplink.set_format(features.format()) {
            tracing::error!(
                "{}: the uplink cannot be set to the offloads that the guest took: {error}",
                self.name
            );
        }
    }
}

/// Whether the driver uses the pair.
pub(crate) fn is_live(pair: &Pair) -> bool {
    pair.rx().enabled() && pair.rx().size() > 0
}

fn half(index: u16) -> Half {
    match index % 2 {
        0 => Half::Rx,
        _ => Half::Tx,
    }
}

impl Backend for Card {
    fn features(&self) -> u64 {
        Features::offered().0
    }

    fn max_pairs(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(u16::MAX)
    }

    fn connected(&self, pid: Option<u32>) {
        self.placer
            .connected(pid.and_then(|pid| i32::try_from(pid).ok()));
        *self.link.lock() = Link {
            connected: true,
            pid,
            ..Link::default()
        };
        let mut told = self.told.lock();
        told.present = told.last.is_none_or(|last| last.elapsed() >= TELL_AGAIN);
        if told.present {
            told.last = Some(Instant::now());
            tracing::info!(
                "{}: front-end connected{}; it may use up to {} queue pairs (--queues)",
                self.name,
                pid.map_or(String::new(), |pid| format!(" (process {pid})")),
                self.pairs.len()
            );
        }
    }

    fn negotiated(&self, protocol_features: u64) {
        self.link.lock().protocol_features = protocol_features;
    }

    fn set_features(&self, acked: u64) {
        let features = Features(acked);
        self.link.lock().features = features;
        self.set_format(features);
        tracing::debug!("{}: driver took {:?}", self.name, features.names());
    }

    fn set_memory(&self, memory: &Arc<GuestMemory>) {
        self.link.lock().memory = Arc::clone(memory);
        for pair in self.pairs() {
            for half in [Half::Rx, Half::Tx] {
                if let Err(error) = with_slot!(pair, half, slot => slot.rebind(memory)) {
                    tracing::error!(
                        "{pair}: the {half:?} ring is not in the new memory table and was stopped: {error}"
                    );
                    self.follow(pair, half);
                }
            }
        }
    }

    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), BackendError> {
        let (pair, half) = self.ring_or_new(index)?;
        pair.open_uplink(&*self.uplink)
            .map_err(|e| BackendError::new(e.to_string()))?;
        if half == Half::Rx {
            pair.set_ring_address(start.layout.desc);
            pair.locate(&start.memory);
        }
        let near = pair
            .memory_node()
            .filter(|_| self.placer.has_several_nodes());
        let started = on_node(
            near,
            || with_slot!(pair, half, slot => start_in(slot, start)),
        );
        started.map_err(|e| BackendError::new(format!("ring {index} cannot start: {e}")))?;
        pair.start_worker(Polling::new(self.poll)).map_err(|e| {
            BackendError::new(format!(
                "cannot start the worker of queue pair {}: {e}; raise the limit of threads",
                pair.index()
            ))
        })?;
        self.follow(pair, half);
        Ok(())
    }

    fn stop_ring(&self, index: u16) -> Option<u32> {
        let (pair, half) = self.ring(index)?;
        let base = with_slot!(pair, half, slot => slot.stop());
        self.follow(pair, half);
        base
    }

    fn set_enabled(&self, index: u16, enabled: bool) {
        if let Some((pair, half)) = self.ring(index) {
            with_slot!(pair, half, slot => slot.set_enabled(enabled));
            self.follow(pair, half);
        }
    }

    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError> {
        let Some((pair, half)) = self.ring(index) else {
            return Ok(());
        };
        with_slot!(pair, half, slot => slot.set_kick(kick)).map_err(|e| {
            BackendError::new(format!(
                "the kick descriptor of ring {index} cannot be polled: {e}"
            ))
        })?;
        pair.wake();
        Ok(())
    }

    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>) {
        if let Some((pair, half)) = self.ring(index) {
            with_slot!(pair, half, slot => slot.set_call(call));
        }
    }

    fn ring_named(&self, index: u16) {
        let mut link = self.link.lock();
        link.pairs = link.pairs.max(index / 2 + 1);
    }

    fn set_err(&self, index: u16, err: Option<Arc<OwnedFd>>) {
        if let Some((pair, half)) = self.ring(index) {
            with_slot!(pair, half, slot => slot.set_err(err));
        }
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError> {
        self.uplink
            .set_mtu(mtu)
            .map_err(|e| BackendError::new(e.to_string()))?;
        self.link.lock().mtu = Some(mtu);
        Ok(())
    }

    fn disconnected(&self) {
        self.placer.disconnected();
        self.pairs().for_each(|pair| pair.stop_worker());
        self.pairs().for_each(|pair| pair.join_worker());
        // A worker's last word about its uplink may have come after ours.
        self.pairs().for_each(|pair| pair.steer());
        self.pairs().for_each(|pair| pair.forget_ring());
        self.interrupts.release();
        self.adviser.forget();
        let link = std::mem::take(&mut *self.link.lock());
        if self.told.lock().present {
            self.tell_of_end(&link);
        }
    }
}

/// What `work` allocates anew comes from `node`, where that is known: a ring's bookkeeping is made
/// by the session thread, which may run anywhere.
fn on_node<T>(node: Option<u32>, work: impl FnOnce() -> T) -> T {
    if node.is_none() {
        return work();
    }
    virtionet_placement::prefer_node(node);
    let done = work();
    virtionet_placement::prefer_node(None);
    done
}

fn start_in<Q: DeviceQueue>(
    slot: &Slot<Q>,
    start: RingStart,
) -> Result<(), crate::slot::StartFault> {
    slot.set_enabled(start.enabled);
    let config = QueueConfig {
        layout: start.layout,
        base: start.base,
        features: Features(start.features),
        memory: start.memory,
        stats: Arc::clone(slot.stats()),
    };
    let fds = RingFds {
        kick: start.kick,
        call: start.call,
        err: start.err,
    };
    slot.start(config, fds)
}
