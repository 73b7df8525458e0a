//! A switch between the devices of this process. A frame is copied once: from the sending guest's
//! buffers to the receiving guest's.
//!
//! ```text
//!  device a                                                       device b
//!  transmitq k ─ worker k ─► burst ─┬ decide:  which port (MACs)  ─► receiveq j, locked for the
//!                                   ├ steer:   which pair (flows)    burst: one copy a frame,
//!                                   └ convert: missing offloads      one interrupt a burst
//!  receiveq j ◄────────────────────────────────────────────────── worker of b, likewise
//!                                         ▲
//!  host's TAP ─ thread sw-NAME ───────────┘   (frames to the TAP: a writev by the worker)
//! ```
//!
//! The switch has no thread of its own between devices: the sender's worker does the work. So a
//! switch costs nothing while no guest transmits, and a guest that transmits much uses its own CPU
//! time. No worker waits for a receiver: a frame for which the receiving ring has no buffer is
//! dropped and counted there.
//!
//! **Decide.** A burst is split where the pair of MAC addresses changes. Each run of frames costs
//! one lookup in the table of addresses, which also learns the source address. Frames to group
//! addresses and to unknown addresses go to all other ports. No frame goes back to the port from
//! which it came. (mac_table.rs)
//!
//! **Steer.** Where the receiver has several queue pairs attached, a flow goes to the pair on which
//! the receiver's guest last transmitted that flow. A new flow goes to the pair of the same index
//! as the sender's. (flow.rs, flow_table.rs)
//!
//! **Convert.** A frame must not request an offload from its receiver that the receiver's driver
//! did not negotiate. The switch performs such offloads itself, on a copy.
//! ([`virtionet_virtio_net::offload`])
//!
//! **Trust.** As on any plain switch, a guest can use another guest's address as a source and so
//! receive its frames. It cannot fill the tables at the expense of others: the tables have a fixed
//! size, a port that floods the table of addresses mostly displaces its own entries, and each port
//! has its own table of flows.
//!
//! **Order.** Frames of a burst for one receiveq are pushed together, in order. So the frames of a
//! flow stay in order as long as the flow is steered to the same pair.
//!
//! **Locks.** A worker holds the lock of its own transmitq and takes the lock of one receiveq at a
//! time. No thread takes a transmitq's lock while it holds a receiveq's, so no deadlock is
//! possible. The tables have no locks: each entry is one atomic word.

mod address_moves;
mod delivery;
mod flow;
mod flow_table;
mod forward;
mod host_forwarder;
mod host_port;
mod image;
mod mac_addr;
mod mac_table;
mod masks;
mod port;

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{
    AddressConflict, Received, RxSink, TxFrame, Uplink, UplinkChange, UplinkError, UplinkQueue,
};
use virtionet_virtqueue::memory::GuestSlice;

use self::delivery::IngressPort;
use self::flow_table::MAX_PAIRS;
pub use self::host_forwarder::HostPortForwarder;
use self::host_port::HostPort;
pub use self::image::{AddressImage, SwitchImage};
use self::mac_table::MacTable;
use self::port::DevicePort;
use crate::tap::{Tap, TapConfig};

/// The most ports that a switch can have.
const MAX_PORTS: usize = 1024;

/// A learning Ethernet switch whose ports are devices and at most one TAP of the host.
#[derive(Debug)]
pub struct Switch {
    name: String,
    macs: MacTable,
    /// The seed of the flow hash, unknown to guests.
    seed: u64,
    /// The ports. The first `count` are set. One whose device was removed becomes that of the next
    /// device.
    ports: Box<[OnceLock<Port>]>,
    count: AtomicUsize,
    /// Whether frames to reserved group addresses are forwarded.
    forwards_reserved_groups: AtomicBool,
    /// The numbers of the ports whose devices were removed. Held while a port is added or removed.
    free: Mutex<Vec<u16>>,
}

#[derive(Debug)]
enum Port {
    Device(Arc<DevicePort>),
    Host(HostPort),
}

impl Switch {
    /// Creates a switch without ports.
    #[must_use]
    pub fn new(name: &str) -> Arc<Self> {
        Self::with_seed(name, RandomState::new().hash_one(1))
    }

    /// Creates a switch without ports that continues the one of this seed.
    #[must_use]
    pub fn with_seed(name: &str, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            macs: MacTable::new(RandomState::new().hash_one(0)),
            seed,
            ports: (0..MAX_PORTS).map(|_| OnceLock::new()).collect(),
            count: AtomicUsize::new(0),
            forwards_reserved_groups: AtomicBool::new(false),
            free: Mutex::default(),
        })
    }

    /// Adds a port for one more device, which `device` names.
    ///
    /// # Errors
    /// When the switch is full.
    pub fn add_device_port(self: &Arc<Self>, device: &str) -> Result<SwitchPort, UplinkError> {
        let (number, port) = match self.reuse_port(device) {
            Some(reused) => reused,
            None => {
                let port = Arc::new(DevicePort::new(device));
                (self.add(Port::Device(Arc::clone(&port)))?, port)
            }
        };
        Ok(SwitchPort(Arc::new(PortLease {
            number,
            switch: Arc::clone(self),
            port,
        })))
    }

    /// A port whose device was removed, if there is one. It is `device`'s from now on.
    fn reuse_port(&self, device: &str) -> Option<(u16, Arc<DevicePort>)> {
        let number = self.free.lock().pop()?;
        match self.ports.get(usize::from(number))?.get()? {
            Port::Device(port) => {
                port.set_device(device);
                Some((number, Arc::clone(port)))
            }
            Port::Host(_) => None,
        }
    }

    /// Forgets the device of a port, which transmits nothing any more, and its addresses.
    fn remove_port(&self, number: u16, port: &DevicePort) {
        port.clear();
        self.macs.forget_port(number);
        self.free.lock().push(number);
    }

    /// Whether no device has a port.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        !self.ports().any(|(_, port)| match port {
            Port::Device(port) => !port.device().is_empty(),
            Port::Host(_) => true,
        })
    }

    /// The names of the devices, in the order of their ports.
    #[must_use]
    pub fn devices(&self) -> Vec<String> {
        let devices = self.ports().filter_map(|(_, port)| match port {
            Port::Device(port) => Some(port.device()),
            Port::Host(_) => None,
        });
        devices.filter(|device| !device.is_empty()).collect()
    }

    /// The switch's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The configured name of the host's TAP, if that is a port.
    #[must_use]
    pub fn host_tap(&self) -> Option<&str> {
        self.host_port().map(|(_, host)| host.config.name.as_str())
    }

    /// Makes the TAP of `config` a port, unless it is one already. Frames from the TAP need a
    /// [`HostPortForwarder`].
    ///
    /// # Errors
    /// When another TAP is a port already, this TAP cannot be opened, or the switch is full.
    pub fn add_host_port(&self, config: &TapConfig) -> Result<(), UplinkError> {
        self.add_host_tap(config, || Tap::open(config).map(Arc::new))
    }

    /// Does so with the TAP that `open` returns.
    ///
    /// # Errors
    /// When another TAP is a port already, `open` fails, or the switch is full.
    pub fn add_host_tap(
        &self,
        config: &TapConfig,
        open: impl FnOnce() -> Result<Arc<Tap>, UplinkError>,
    ) -> Result<(), UplinkError> {
        match self.host_port() {
            Some((_, host)) if host.config == *config => Ok(()),
            Some((_, host)) => Err(UplinkError::SwitchHostPortExists {
                switch: self.name.clone(),
                existing: host.config.to_string(),
                requested: config.to_string(),
            }),
            None => self
                .add(Port::Host(HostPort::new(config, open()?)?))
                .map(|_number| ()),
        }
    }

    /// From now on forwards frames to reserved group addresses (01:80:C2:00:00:00 to -0F), as to
    /// any other group. They are link-local protocols, such as spanning tree, by which a guest
    /// could reconfigure the host's bridge.
    pub fn forward_reserved_groups(&self) {
        self.forwards_reserved_groups.store(true, Ordering::Relaxed);
    }

    fn forwards_reserved_groups(&self) -> bool {
        self.forwards_reserved_groups.load(Ordering::Relaxed)
    }

    /// The largest MTU that a device's front-end has set; 0 where none has.
    fn largest_mtu(&self) -> u16 {
        let mtus = self.ports().filter_map(|(_, port)| match port {
            Port::Device(port) => Some(port.mtu()),
            Port::Host(_) => None,
        });
        mtus.max().unwrap_or(0)
    }

    /// What is behind a port, for a message.
    fn describe_port(&self, number: u16) -> String {
        let port = self.ports.get(usize::from(number)).and_then(OnceLock::get);
        match port {
            Some(Port::Device(port)) => format!("device {}", port.device()),
            Some(Port::Host(port)) => format!("the host behind TAP {}", port.config.name),
            None => format!("port {number}"),
        }
    }

    /// Creates the forwarder of the frames from the TAP, where a TAP is a port.
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
        let _one_at_a_time = self.free.lock();
        let count = self.count.load(Ordering::Relaxed);
        let number = u16::try_from(count).ok();
        let (Some(number), Some(slot)) = (number, self.ports.get(count)) else {
            return Err(UplinkError::SwitchFull {
                switch: self.name.clone(),
                ports: MAX_PORTS,
            });
        };
        // The slot is empty: only the first `count` are set, and the lock is held.
        let _ = slot.set(port);
        self.count.store(count + 1, Ordering::Release);
        Ok(number)
    }

    /// All ports with their numbers.
    fn ports(&self) -> impl Iterator<Item = (u16, &Port)> {
        let count = self.count.load(Ordering::Acquire);
        (0..)
            .zip(&self.ports[..count])
            .filter_map(|(number, slot)| Some((number, slot.get()?)))
    }
}

/// The state of the switch in one line, for the log.
impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "switch {}: {} ports, {} addresses known, {} moved, {} evicted",
            self.name,
            self.count.load(Ordering::Relaxed) - self.free.lock().len(),
            self.macs.len(coarse_now_secs()),
            self.macs.moves(),
            self.macs.evictions(),
        )
    }
}

/// The time of the tables' entries in seconds; cheap enough to be read once for each burst.
// syscalls: clock_gettime, where the vDSO does not do it
fn coarse_now_secs() -> u32 {
    let now = clock_gettime(ClockId::MonotonicCoarse).tv_sec;
    u32::try_from(now & 0xffff_ffff).unwrap_or(0)
}

/// The port of a device on a switch.
#[derive(Debug)]
pub struct SwitchPort(Arc<PortLease>);

/// A port as long as its device, or a queue of it, is there. Then it can be another device's.
#[derive(Debug)]
struct PortLease {
    number: u16,
    switch: Arc<Switch>,
    port: Arc<DevicePort>,
}

impl Drop for PortLease {
    fn drop(&mut self) {
        self.switch.remove_port(self.number, &self.port);
    }
}

impl Uplink for SwitchPort {
    fn open_queue(
        &self,
        pair: u16,
        rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        let PortLease {
            number,
            switch,
            port,
        } = &*self.0;
        if !port.add_pair(pair, rx) {
            return Err(UplinkError::SwitchPairOutOfRange {
                pair,
                max_pairs: MAX_PAIRS,
            });
        }
        Ok(Arc::new(SwitchQueue {
            ingress: IngressPort::device(*number, Arc::clone(port), pair),
            switch: Arc::clone(switch),
            pair,
            port: Arc::clone(port),
            _lease: Arc::clone(&self.0),
        }))
    }

    fn set_format(&self, format: FrameFormat) -> Result<(), UplinkError> {
        self.0.port.set_format(format);
        Ok(())
    }

    /// A switch carries frames of any length, and a frame that is too long for a guest is dropped
    /// at its receiveq. The host's TAP, where there is one, gets the largest MTU of all devices.
    fn set_mtu(&self, mtu: u16) -> Result<(), UplinkError> {
        self.0.port.set_mtu(mtu);
        match self.0.switch.host_port() {
            Some((_, host)) => host.follow_mtu(mtu, || self.0.switch.largest_mtu()),
            None => Ok(()),
        }
    }

    /// Refreshes the host's TAP, where there is one. All devices of the switch do that.
    fn refresh(&self) -> Result<UplinkChange, UplinkError> {
        match self.0.switch.host_port() {
            Some((_, host)) => host.refresh(),
            None => Ok(UplinkChange::Unchanged),
        }
    }

    fn address_conflict(&self) -> Option<AddressConflict> {
        let moves = self.0.switch.macs.recent_moves();
        let (mac, ports) = moves.conflict_of(self.0.number, coarse_now_secs())?;
        Some(AddressConflict {
            mac: mac.to_bytes(),
            users: ports.map(|port| self.0.switch.describe_port(port)),
            switch: self.0.switch.name.clone(),
        })
    }

    fn kind(&self) -> &'static str {
        "switch"
    }

    fn name(&self) -> String {
        self.0.switch.name.clone()
    }
}

/// The queue of one queue pair on a device's port.
#[derive(Debug)]
struct SwitchQueue {
    ingress: IngressPort,
    switch: Arc<Switch>,
    pair: u16,
    port: Arc<DevicePort>,
    _lease: Arc<PortLease>,
}

impl UplinkQueue for SwitchQueue {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        self.transmit_releasing(frames, stats, &mut || ());
    }

    fn transmit_releasing(
        &self,
        frames: &[TxFrame<'_>],
        stats: &VringStats,
        release: &mut dyn FnMut(),
    ) {
        self.switch.forward(&self.ingress, frames, stats, release);
    }

    fn receive(&self, _buffers: &[GuestSlice<'_>], _bounce: &mut [u8]) -> Received {
        // Frames from the switch are pushed to the receiveq.
        Received::Empty
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, attached: bool) -> Result<(), UplinkError> {
        self.port.set_attached(self.pair, attached);
        Ok(())
    }
}
