//! A switch inside this process: frames go from one device's guest to another's, copied once, from
//! where the sender's guest put them to where the receiver's wants them.
//!
//! ```text
//!  device a                                                       device b
//!  transmitq k ─ worker k ─► burst ─┬ decide: which port  (MACs) ─► receiveq j, locked for the
//!                                   ├ steer:  which pair (flows)     burst: one copy a frame,
//!                                   └ fit:    what the guest takes   one interrupt a burst
//!  receiveq j ◄────────────────────────────────────────────────── worker of b, likewise
//!                                         ▲
//!  host's TAP ─ thread sw-NAME ───────────┘   (frames to the TAP: a worker's own writev)
//! ```
//!
//! There is no thread in between: the sender's worker does the work, so a switch costs nothing when
//! nobody sends, and a sender that sends much pays for it itself. Nobody waits for a receiver: what
//! its ring has no buffer for is dropped and counted there.
//!
//! **Decide.** A burst is cut where the pair of MAC addresses changes; each piece costs one look at
//! the table of addresses, which also learns the source. Frames to groups and to addresses that
//! nobody has sent from go to all other ports; none goes back to its own. (mac_table.rs)
//!
//! **Steer.** Where the receiver has several pairs attached, a flow goes to the pair that the
//! receiver's guest last sent that flow on; one that is new goes to the pair with the number of the
//! sender's, so that pair k talks to pair k. (flow.rs, flow_table.rs)
//!
//! **Fit.** A frame asks its receiver for no more than the receiver's driver negotiated; what it does not take
//! is done here, on a copy. ([`virtionet_virtio_net::offload`])
//!
//! **Trust.** As on any plain switch, a guest can send in another's name and so draw its frames. What
//! it cannot do is to fill the tables at the cost of others: they are of fixed size, a port that
//! floods the table of addresses mostly displaces its own, and flows are kept by port.
//!
//! **Order.** Frames of a burst for one receiveq are pushed together, in order; so frames of a flow
//! stay in order for as long as its steering stays.
//!
//! **Locks.** A worker holds its own transmitq's lock and takes a receiveq's, one at a time. Nobody
//! takes a transmitq's lock while holding a receiveq's, so there is no circle. Beyond that there
//! are none: tables are words that are read and written at once.

mod delivery;
mod flow;
mod flow_table;
mod forward;
mod host;
mod mac_table;
mod masks;
mod port;

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{Received, RxSink, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtqueue::memory::GuestSlice;

use self::delivery::IngressPort;
use self::flow_table::MAX_PAIRS;
use self::host::HostPort;
pub use self::host::HostPortForwarder;
use self::mac_table::MacTable;
use self::port::DevicePort;
use crate::tap::TapConfig;

/// Ports of a switch at most.
const MAX_PORTS: usize = 1024;

/// A switch; see the module.
#[derive(Debug)]
pub struct Switch {
    name: String,
    macs: MacTable,
    /// Unknown to guests: what flows hash to.
    seed: u64,
    /// Filled from the front, never emptied.
    ports: Box<[OnceLock<Port>]>,
    count: AtomicUsize,
    /// Held while a port is added.
    add_lock: Mutex<()>,
}

#[derive(Debug)]
enum Port {
    Device(Arc<DevicePort>),
    Host(HostPort),
}

impl Switch {
    /// A switch without ports.
    #[must_use]
    pub fn new(name: &str) -> Arc<Self> {
        let random = RandomState::new();
        Arc::new(Self {
            name: name.to_owned(),
            macs: MacTable::new(random.hash_one(0)),
            seed: random.hash_one(1),
            ports: (0..MAX_PORTS).map(|_| OnceLock::new()).collect(),
            count: AtomicUsize::new(0),
            add_lock: Mutex::new(()),
        })
    }

    /// Adds the port of one more device.
    ///
    /// # Errors
    /// When the switch is full.
    pub fn add_device_port(self: &Arc<Self>) -> Result<SwitchPort, UplinkError> {
        let port = Arc::new(DevicePort::new());
        Ok(SwitchPort {
            number: self.add(Port::Device(Arc::clone(&port)))?,
            switch: Arc::clone(self),
            port,
        })
    }

    /// Makes the TAP of `config` a port, unless it is. What waits in it wants a [`HostPortForwarder`].
    ///
    /// # Errors
    /// When another TAP is a port already, this one cannot be opened, or the switch is full.
    pub fn add_host_port(&self, config: &TapConfig) -> Result<(), UplinkError> {
        match self.host_port() {
            Some((_, host)) if host.config == *config => Ok(()),
            Some((_, host)) => Err(UplinkError(format!(
                "switch {} has tap={} already, not tap={config}; name the same TAP at each of its devices, or at one of them only",
                self.name, host.config
            ))),
            None => self
                .add(Port::Host(HostPort::open(config)?))
                .map(|_number| ()),
        }
    }

    /// What carries the host's frames, where a TAP is a port.
    #[must_use]
    pub fn host_port_forwarder(self: &Arc<Self>) -> Option<HostPortForwarder> {
        let (number, port) = self.host_port()?;
        Some(HostPortForwarder::new(Arc::clone(self), number, port))
    }

    fn host_port(&self) -> Option<(u16, &HostPort)> {
        self.ports().find_map(|(number, port)| match port {
            Port::Host(port) => Some((number, port)),
            Port::Device(_) => None,
        })
    }

    fn add(&self, port: Port) -> Result<u16, UplinkError> {
        let _one_at_a_time = self.add_lock.lock();
        let count = self.count.load(Ordering::Relaxed);
        let number = u16::try_from(count).ok();
        let (Some(number), Some(slot)) = (number, self.ports.get(count)) else {
            return Err(UplinkError(format!(
                "switch {} has {MAX_PORTS} ports already; use another switch for further devices",
                self.name
            )));
        };
        // It was empty: what is below the count is filled, and nothing else.
        let _ = slot.set(port);
        self.count.store(count + 1, Ordering::Release);
        Ok(number)
    }

    /// All ports, with their numbers.
    fn ports(&self) -> impl Iterator<Item = (u16, &Port)> {
        let count = self.count.load(Ordering::Acquire);
        (0..)
            .zip(&self.ports[..count])
            .filter_map(|(number, slot)| Some((number, slot.get()?)))
    }
}

/// What it knows, in one line.
impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "switch {}: {} ports, {} addresses known, {} moved, {} evicted",
            self.name,
            self.count.load(Ordering::Relaxed),
            self.macs.len(coarse_now_secs()),
            self.macs.moves(),
            self.macs.evictions(),
        )
    }
}

/// The clock of tables, in seconds; cheap enough to read once a burst.
// syscalls: clock_gettime, where the vDSO does not do it
fn coarse_now_secs() -> u32 {
    let now = clock_gettime(ClockId::MonotonicCoarse).tv_sec;
    u32::try_from(now & 0xffff_ffff).unwrap_or(0)
}

/// A device's port of a switch.
#[derive(Debug)]
pub struct SwitchPort {
    number: u16,
    switch: Arc<Switch>,
    port: Arc<DevicePort>,
}

impl Uplink for SwitchPort {
    fn open_queue(
        &self,
        pair: u16,
        rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        if !self.port.add_pair(pair, rx) {
            return Err(UplinkError(format!(
                "a port of a switch has no queue pair {pair}; use at most {MAX_PAIRS}"
            )));
        }
        Ok(Arc::new(SwitchQueue {
            ingress: IngressPort::device(self.number, Arc::clone(&self.port), pair),
            switch: Arc::clone(&self.switch),
            pair,
            port: Arc::clone(&self.port),
        }))
    }

    fn set_format(&self, format: FrameFormat) -> io::Result<()> {
        self.port.set_format(format);
        Ok(())
    }

    /// A switch carries frames of any length; what is too long for a guest is dropped there.
    fn set_mtu(&self, _mtu: u16) -> io::Result<()> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "switch"
    }

    fn name(&self) -> String {
        self.switch.name.clone()
    }
}

/// A queue pair's way to the switch.
#[derive(Debug)]
struct SwitchQueue {
    ingress: IngressPort,
    switch: Arc<Switch>,
    pair: u16,
    port: Arc<DevicePort>,
}

impl UplinkQueue for SwitchQueue {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        self.switch.forward(&self.ingress, frames, stats);
    }

    fn receive(&self, _buffers: &[GuestSlice<'_>], _bounce: &mut [u8]) -> Received {
        // They are pushed.
        Received::Empty
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.port.set_attached(self.pair, attached);
        Ok(())
    }
}
