//! A multiqueue TAP with virtio-net headers: one queue a queue pair, one system call a frame.
//!
//! The kernel steers: the reply to a flow goes to the queue that the flow last wrote to, as long as
//! each queue pair keeps to a queue of its own. A queue is opened *detached* and gets no frames
//! until it is attached; it can be written to all the same.
//!
//! A TAP that this program makes goes up at once and disappears with it. One that was there before
//! is left as it was found: its state and bridge are not touched unless asked, and a user who owns
//! it needs no privilege.

mod config;
mod error;
mod queue;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_virtio_net::header::{FrameFormat, VNET_HEADER_LEN};
use virtionet_virtio_net::uplink::{HostInterface, RxSink, Uplink, UplinkError, UplinkQueue};

pub use self::config::TapConfig;
use self::queue::{TapQueue, TapShared};
use crate::rtnetlink::{Link, LinkTable};
use crate::sys;

/// The kernel closes the queues of a process that has ended a moment later, so a TAP that is in use
/// gets this long to become free before another process is said to hold it.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often the interface table is asked meanwhile.
const RELEASE_INTERVAL: Duration = Duration::from_millis(10);

/// What a guest takes before it has negotiated anything.
const NO_OFFLOADS: FrameFormat = FrameFormat {
    header_len: VNET_HEADER_LEN,
    csum: false,
    tso4: false,
    tso6: false,
    ecn: false,
    ufo: false,
};

/// A multiqueue TAP.
#[derive(Debug)]
pub struct Tap {
    shared: Arc<TapShared>,
    links: LinkTable,
    /// The interface's index.
    index: u32,
    /// Whether this program made the interface.
    is_created_by_us: bool,
    state: Mutex<TapState>,
}

#[derive(Debug)]
struct TapState {
    format: FrameFormat,
    /// By queue pair. Pair 0's is opened with the TAP, so that errors show early.
    queues: BTreeMap<u16, Arc<TapQueue>>,
}

impl Tap {
    /// Opens the TAP, or makes it, and its first queue.
    ///
    /// # Errors
    /// One sentence that says what is wrong and what to do.
    pub fn open(config: &TapConfig) -> Result<Self, UplinkError> {
        let links = LinkTable::open().map_err(|e| error::no_link_table(&e))?;
        let before = wait_for_release(&links, &config.name)?;
        let (file, name) = open_detached(&links, &config.name, before.as_ref())?;
        let link = find_link(&links, &name)?;
        if let Some(others) = link.queues.map(|all| all.saturating_sub(1))
            && others > 0
        {
            return Err(error::held_by_other(&name, others));
        }
        let tap = Self::new(links, file, name, link.index, before.is_none())?;
        tap.configure_interface(&link, config.bridge.as_deref())?;
        Ok(tap)
    }

    /// Whether this program made the interface (and takes it away with it).
    #[must_use]
    pub fn is_created_by_us(&self) -> bool {
        self.is_created_by_us
    }

    fn new(
        links: LinkTable,
        file: File,
        name: String,
        index: u32,
        is_created_by_us: bool,
    ) -> Result<Self, UplinkError> {
        sys::set_little_endian(file.as_fd()).map_err(|e| error::setup_failed(&name, &e))?;
        apply_format(file.as_fd(), NO_OFFLOADS).map_err(|e| error::setup_failed(&name, &e))?;
        let shared = Arc::new(TapShared::new(name, NO_OFFLOADS.header_len));
        let first = Arc::new(TapQueue::new(file, 0, Arc::clone(&shared)));
        Ok(Self {
            shared,
            links,
            index,
            is_created_by_us,
            state: Mutex::new(TapState {
                format: NO_OFFLOADS,
                queues: BTreeMap::from([(0, first)]),
            }),
        })
    }

    /// Opens one more queue of the interface, under the name that it bears now, and looks what
    /// interface that was.
    fn open_additional_queue(&self) -> Result<(File, Link), UplinkError> {
        let before = self
            .links
            .find_by_index(self.index)
            .map_err(|e| error::no_link_table(&e))?
            .ok_or_else(|| error::interface_gone(&self.shared.name))?;
        let (file, name) = open_detached(&self.links, &before.name, Some(&before))?;
        let after = find_link(&self.links, &name)?;
        Ok((file, after))
    }

    /// Puts the interface into its bridge and, when it is ours, up.
    fn configure_interface(&self, link: &Link, bridge: Option<&str>) -> Result<(), UplinkError> {
        if let Some(bridge) = bridge {
            self.join_bridge(link, bridge)?;
        }
        if self.is_created_by_us {
            self.links
                .bring_up(self.index)
                .map_err(|e| error::bring_up_failed(&self.shared.name, &e))?;
        } else if !link.is_up {
            tracing::warn!("{}", error::is_down(&self.shared.name));
        }
        Ok(())
    }

    fn join_bridge(&self, link: &Link, bridge: &str) -> Result<(), UplinkError> {
        let name = &self.shared.name;
        let master = self
            .links
            .find_by_name(bridge)
            .map_err(|e| error::no_link_table(&e))?
            .ok_or_else(|| error::no_bridge(bridge))?;
        if master.kind != "bridge" {
            return Err(error::not_a_bridge(bridge));
        }
        match link.master {
            Some(index) if index == master.index => Ok(()),
            Some(_) => Err(error::in_another_bridge(name, bridge)),
            None => self
                .links
                .set_master(self.index, master.index)
                .map_err(|e| error::join_refused(name, bridge, &e)),
        }
    }
}

impl Uplink for Tap {
    fn open_queue(
        &self,
        pair: u16,
        _rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        let mut state = self.state.lock();
        if let Some(queue) = state.queues.get(&pair) {
            return Ok(Arc::clone(queue) as Arc<dyn UplinkQueue>);
        }
        let name = &self.shared.name;
        // The new queue is attached for a moment: none may leave meanwhile, or this one would be
        // numbered in its place.
        let opened = {
            let _order = self.shared.attached.lock();
            self.open_additional_queue()
        };
        let (file, found) = opened?;
        // An interface of that name made just now is not ours: it lacks the other queues.
        if found.index != self.index {
            return Err(error::interface_gone(name));
        }
        apply_format(file.as_fd(), state.format).map_err(|e| error::setup_failed(name, &e))?;
        let queue = Arc::new(TapQueue::new(file, pair, Arc::clone(&self.shared)));
        state.queues.insert(pair, Arc::clone(&queue));
        Ok(queue)
    }

    fn set_format(&self, format: FrameFormat) -> io::Result<()> {
        let mut state = self.state.lock();
        // Both settings are the interface's, not the queue's: one queue stands for all.
        if let Some(queue) = state.queues.values().next() {
            apply_format(queue.fd(), format)
                .map_err(|e| error::format_refused(&self.shared.name, format, &e))?;
        }
        self.shared
            .header_len
            .store(format.header_len, Ordering::Relaxed);
        state.format = format;
        Ok(())
    }

    /// An interface of ours gets exactly this MTU; one that was there before is raised to it, and
    /// left alone when its MTU is as large already.
    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let (name, mtu) = (&self.shared.name, u32::from(mtu));
        let link = self
            .links
            .find_by_index(self.index)?
            .ok_or_else(|| io::Error::other(error::interface_gone(name)))?;
        if link.mtu == mtu || (link.mtu > mtu && !self.is_created_by_us) {
            return Ok(());
        }
        match self.links.set_mtu(self.index, mtu) {
            // Ours, but made before a privilege was given up: large enough is good enough.
            Err(_) if link.mtu > mtu => Ok(()),
            Err(error) => Err(error::mtu_refused(name, link.mtu, mtu, &error)),
            Ok(()) => Ok(()),
        }
    }

    fn kind(&self) -> &'static str {
        "tap"
    }

    fn name(&self) -> String {
        self.shared.name.clone()
    }

    fn host_interface(&self) -> Option<HostInterface> {
        let attached = self.shared.attached.lock();
        Some(HostInterface {
            name: self.shared.name.clone(),
            index: self.index,
            changes: attached.changes,
            queues: attached.pairs.clone(),
        })
    }
}

/// Waits up to [`RELEASE_TIMEOUT`] until no process has a queue of the TAP `name`; what the interface
/// table says then. The table is asked rather than the TAP opened, because an open queue takes frames
/// from its owner.
fn wait_for_release(links: &LinkTable, name: &str) -> Result<Option<Link>, UplinkError> {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    loop {
        let link = links
            .find_by_name(name)
            .map_err(|e| error::no_link_table(&e))?;
        let queues = link.as_ref().and_then(|link| link.queues).unwrap_or(0);
        if queues == 0 || Instant::now() >= deadline {
            return Ok(link);
        }
        thread::sleep(RELEASE_INTERVAL);
    }
}

/// Opens one more queue of the TAP `name`, detached. TUNSETIFF itself attaches: frames steered to
/// the queue in the instant before it is detached are dropped.
fn open_detached(
    links: &LinkTable,
    name: &str,
    before: Option<&Link>,
) -> Result<(File, String), UplinkError> {
    let file = sys::open_tun().map_err(|e| error::no_tun(&e))?;
    let name = sys::attach_device(file.as_fd(), name).map_err(|error| {
        // Where another program made the interface meanwhile, its kind explains the error.
        let now = links.find_by_name(name).ok().flatten();
        error::attach_refused(name, now.as_ref().or(before), &error)
    })?;
    sys::set_queue_attached(file.as_fd(), false).map_err(|e| error::setup_failed(&name, &e))?;
    Ok((file, name))
}

fn find_link(links: &LinkTable, name: &str) -> Result<Link, UplinkError> {
    links
        .find_by_name(name)
        .map_err(|e| error::no_link_table(&e))?
        .ok_or_else(|| error::interface_gone(name))
}

/// Tells the kernel what the guest takes.
fn apply_format(tun: BorrowedFd<'_>, format: FrameFormat) -> io::Result<()> {
    sys::set_vnet_hdr_len(tun, format.header_len)?;
    sys::set_offload(tun, to_tun_flags(format))
}

/// `TUN_F_*` of a format. The kernel refuses segmentation without checksums and ECN without TCP
/// segmentation: a guest that takes one without the other gets neither.
fn to_tun_flags(format: FrameFormat) -> u32 {
    if !format.csum {
        return 0;
    }
    let tso = format.tso4 || format.tso6;
    [
        (format.csum, libc::TUN_F_CSUM),
        (format.tso4, libc::TUN_F_TSO4),
        (format.tso6, libc::TUN_F_TSO6),
        (format.ecn && tso, libc::TUN_F_TSO_ECN),
        (format.ufo, libc::TUN_F_UFO),
    ]
    .iter()
    .filter(|(taken, _)| *taken)
    .fold(0, |all, (_, flag)| all | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_never_stand_without_what_they_need() {
        for bits in 0..32_u32 {
            let has = |bit: u32| bits >> bit & 1 == 1;
            let all = to_tun_flags(FrameFormat {
                header_len: VNET_HEADER_LEN,
                csum: has(0),
                tso4: has(1),
                tso6: has(2),
                ecn: has(3),
                ufo: has(4),
            });
            assert_eq!(all & !bits, 0, "{bits:#x} gave {all:#x}");
            let needs = |what: u32, of: u32| all & what == 0 || all & of != 0;
            assert!(needs(!1, 1), "{bits:#x} gave {all:#x}");
            assert!(needs(8, 6), "{bits:#x} gave {all:#x}");
            if bits & 1 == 1 && bits & 6 != 0 {
                assert_eq!(all, bits);
            }
        }
    }
}
