//! A multiqueue TAP with virtio-net headers: one queue for each queue pair, one system call for
//! each frame.
//!
//! The kernel steers the received frames: the reply to a flow arrives at the queue to which the
//! flow was last written, so each queue pair has a queue of its own. A queue is opened *detached*:
//! it receives no frames until it is attached, but frames can be written to it.
//!
//! A TAP that this program creates is brought up at once and disappears with the program. A TAP
//! that existed before is used as it is: its state is not changed, nor its bridge unless one is
//! configured, and a user who owns the TAP needs no privilege.
//!
//! When the interface is deleted, all queues lose it, but their files stay open. `refresh` finds
//! that out. As soon as there is an interface of that name again (one that this program had created
//! is created again), it makes each file a queue of the new interface with the format, the MTU and
//! the attachment of before. So the descriptors and their epoll registrations stay valid,
//! and the data path needs no lock.

mod config;
mod error;
mod image;
mod kept;
mod queue;
mod rights;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_base::rights::LinkChange;
use virtionet_virtio_net::header::{FrameFormat, VNET_HEADER_LEN};
use virtionet_virtio_net::uplink::{
    HostInterface, RxSink, Uplink, UplinkChange, UplinkError, UplinkQueue,
};

pub use self::config::TapConfig;
pub use self::image::TapImage;
use self::queue::{TapQueue, TapShared};
pub use self::rights::{attach_own, change_own_link, find_index};
use crate::rtnetlink::{Link, LinkTable};
use crate::sys;

/// How long to wait for a TAP that is in use. The kernel closes a process's queues a moment after
/// the process has ended, so a TAP that was just released may still seem to be in use.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// The interval at which the table of interfaces is read meanwhile.
const RELEASE_INTERVAL: Duration = Duration::from_millis(10);

/// The format before a driver has negotiated anything.
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
    /// The interface's index, which stays the same when the interface is renamed, and changes when
    /// it is deleted and made again.
    index: AtomicU32,
    /// Whether this program created the interface.
    is_created_by_us: AtomicBool,
    /// The bridge that is configured.
    bridge: Option<String>,
    state: Mutex<TapState>,
}

#[derive(Debug)]
struct TapState {
    format: FrameFormat,
    /// The MTU that was last asked for.
    mtu: Option<u16>,
    /// Whether the interface was opened again, and its bridge and MTU are not set yet.
    needs_configuration: bool,
    /// The queue of pair 0. It is opened with the TAP, so that errors are found early, and stays
    /// open, because the kernel deletes an interface that this program created with its last queue.
    first: Arc<TapQueue>,
    /// The other queues by the index of their queue pair, as far as the device still has them.
    others: BTreeMap<u16, Weak<TapQueue>>,
    /// Queues of the process before this one that no device has opened yet.
    inherited: BTreeMap<u16, File>,
}

impl TapState {
    /// The queue of queue pair `pair`, if it is open.
    fn queue(&self, pair: u16) -> Option<Arc<TapQueue>> {
        match pair {
            0 => Some(Arc::clone(&self.first)),
            _ => self.others.get(&pair)?.upgrade(),
        }
    }

    /// All open queues.
    fn queues(&self) -> impl Iterator<Item = Arc<TapQueue>> {
        let others = self.others.values().filter_map(Weak::upgrade);
        std::iter::once(Arc::clone(&self.first)).chain(others)
    }

    /// Whether the interface of a queue was deleted.
    fn has_lost_queue(&self) -> bool {
        self.queues().any(|queue| queue.is_lost())
    }
}

impl Tap {
    /// Opens the TAP, or creates it, and opens its first queue.
    ///
    /// # Errors
    /// When the kernel or its state of the interface does not permit it.
    pub fn open(config: &TapConfig) -> Result<Self, UplinkError> {
        let links = LinkTable::open().map_err(error::link_table_unavailable)?;
        let before = wait_for_release(&links, &config.name, 0)?;
        let (file, name) = open_detached(&links, &config.name, before.as_ref())?;
        let link = find_link(&links, &name)?;
        check_not_shared(&link, 1)?;
        let tap = Self::with_detached_queue(config, links, &link, file, before.is_none())?;
        if !link.is_up && !tap.is_created_by_us() {
            tracing::warn!("{}", error::interface_down(&tap.shared.name));
        }
        Ok(tap)
    }

    /// The TAP of the interface of `link`, whose only queue is `file`, which is detached.
    fn with_detached_queue(
        config: &TapConfig,
        links: LinkTable,
        link: &Link,
        file: File,
        is_created_by_us: bool,
    ) -> Result<Self, UplinkError> {
        let name = link.name.clone();
        prepare(file.as_fd(), NO_OFFLOADS).map_err(|e| error::setup_failed(&name, e))?;
        let shared = Arc::new(TapShared::new(name, NO_OFFLOADS.header_len));
        let first = TapQueue::new(file, 0, Arc::clone(&shared));
        let tap = Self::with_first_queue(config, shared, links, link.index, first);
        tap.is_created_by_us
            .store(is_created_by_us, Ordering::Relaxed);
        tap.configure_interface(link)?;
        Ok(tap)
    }

    /// The TAP of the interface `index` with one queue, which this program has not created.
    fn with_first_queue(
        config: &TapConfig,
        shared: Arc<TapShared>,
        links: LinkTable,
        index: u32,
        first: TapQueue,
    ) -> Self {
        Self {
            shared,
            links,
            index: AtomicU32::new(index),
            is_created_by_us: AtomicBool::new(false),
            bridge: config.bridge.clone(),
            state: Mutex::new(TapState {
                format: NO_OFFLOADS,
                mtu: None,
                needs_configuration: false,
                first: Arc::new(first),
                others: BTreeMap::new(),
                inherited: BTreeMap::new(),
            }),
        }
    }

    /// Whether this program created the interface, which then disappears with the program.
    #[must_use]
    pub fn is_created_by_us(&self) -> bool {
        self.is_created_by_us.load(Ordering::Relaxed)
    }

    fn index(&self) -> u32 {
        self.index.load(Ordering::Relaxed)
    }

    /// The interface's entry in the table, if it is in this network namespace.
    fn find_own_link(&self) -> Result<Option<Link>, UplinkError> {
        self.links
            .find_by_index(self.index())
            .map_err(error::link_table_unavailable)
    }

    /// Opens one more queue of the interface under its present name, with `format`.
    fn open_additional_queue(&self, format: FrameFormat) -> Result<File, UplinkError> {
        let name = &self.shared.name;
        let before = self
            .find_own_link()?
            .ok_or_else(|| error::interface_moved(name))?;
        // The new queue is attached for a moment. If another one were detached meanwhile, the
        // kernel would give its number to the new queue.
        let opened = {
            let _order = self.shared.attached.lock();
            open_detached(&self.links, &before.name, Some(&before))
        };
        let (file, opened_name) = opened?;
        // The interface was deleted and another one of that name created: it lacks the other
        // queues.
        if find_link(&self.links, &opened_name)?.index != self.index() {
            return Err(error::interface_gone(name, None));
        }
        apply_format(file.as_fd(), format).map_err(|e| error::setup_failed(name, e))?;
        Ok(file)
    }

    /// Makes all lost queues of `state` queues of the interface that has the TAP's name now.
    fn reopen(&self, state: &mut TapState) -> Result<(), UplinkError> {
        let name = &self.shared.name;
        let before = self
            .links
            .find_by_name(name)
            .map_err(error::link_table_unavailable)?;
        if before.is_none() && !self.is_created_by_us() {
            return Err(error::interface_gone(name, None));
        }
        // A queue that nobody reads sets the interface up, so that no worker reads a frame in
        // another format. It is closed at the end.
        let opened = {
            let _order = self.shared.attached.lock();
            open_detached(&self.links, name, before.as_ref())
        };
        let (file, _) = opened?;
        let link = find_link(&self.links, name)?;
        let present = state.queues().filter(|queue| !queue.is_lost());
        let present = u32::try_from(present.count()).unwrap_or(u32::MAX);
        check_not_shared(&link, present.saturating_add(1))?;
        prepare(file.as_fd(), state.format).map_err(|e| error::setup_failed(name, e))?;
        if present == 0 {
            self.is_created_by_us
                .store(before.is_none(), Ordering::Relaxed);
        }
        self.index.store(link.index, Ordering::Relaxed);
        state.needs_configuration = true;
        for queue in state.queues().filter(|queue| queue.is_lost()) {
            queue
                .reopen(name)
                .map_err(|e| error::attach_refused(name, Some(&link), e))?;
        }
        Ok(())
    }

    /// Puts the interface into its bridge, and brings it up if this program created it.
    fn configure_interface(&self, link: &Link) -> Result<(), UplinkError> {
        if let Some(bridge) = &self.bridge {
            self.join_bridge(link, bridge)?;
        }
        if self.is_created_by_us() {
            rights::change_link(&self.links, link, &LinkChange::Up).map_err(|source| {
                UplinkError::TapBringUpFailed {
                    name: self.shared.name.clone(),
                    source,
                }
            })?;
        }
        Ok(())
    }

    /// Makes sure that the interface of `link` carries frames of `mtu` bytes.
    fn apply_mtu(&self, link: &Link, mtu: u16) -> Result<(), UplinkError> {
        let mtu = u32::from(mtu);
        if link.mtu == mtu || (link.mtu > mtu && !self.is_created_by_us()) {
            return Ok(());
        }
        match rights::change_link(&self.links, link, &LinkChange::Mtu(mtu)) {
            // The privilege was dropped after the interface was created, but its MTU is large
            // enough.
            Err(_) if link.mtu > mtu => Ok(()),
            Err(source) => Err(UplinkError::MtuRefused {
                name: self.shared.name.clone(),
                mtu: link.mtu,
                wanted: mtu,
                source,
            }),
            Ok(()) => Ok(()),
        }
    }

    fn join_bridge(&self, link: &Link, bridge: &str) -> Result<(), UplinkError> {
        let name = &self.shared.name;
        let master = self
            .links
            .find_by_name(bridge)
            .map_err(error::link_table_unavailable)?
            .ok_or_else(|| UplinkError::BridgeMissing {
                bridge: bridge.to_owned(),
            })?;
        if master.kind != "bridge" {
            return Err(UplinkError::NotABridge {
                bridge: bridge.to_owned(),
            });
        }
        match link.master {
            Some(index) if index == master.index => Ok(()),
            Some(_) => Err(UplinkError::TapInOtherBridge {
                name: name.clone(),
                bridge: bridge.to_owned(),
            }),
            None => rights::change_link(&self.links, link, &LinkChange::Port(bridge.to_owned()))
                .map_err(|source| UplinkError::BridgeJoinFailed {
                    name: name.clone(),
                    bridge: bridge.to_owned(),
                    source,
                }),
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
        if let Some(queue) = state.queue(pair) {
            return Ok(queue);
        }
        let shared = Arc::clone(&self.shared);
        let queue = match state.inherited.remove(&pair) {
            Some(file) => TapQueue::inherited(file, pair, shared),
            None => {
                let file = match self.open_additional_queue(state.format) {
                    // It becomes a queue of the interface with the others.
                    Err(_) if state.has_lost_queue() => {
                        sys::open_tun().map_err(error::tun_open_failed)?
                    }
                    opened => opened?,
                };
                TapQueue::new(file, pair, shared)
            }
        };
        let queue = Arc::new(queue);
        state.others.insert(pair, Arc::downgrade(&queue));
        Ok(queue)
    }

    fn set_format(&self, format: FrameFormat) -> Result<(), UplinkError> {
        let mut state = self.state.lock();
        // Both settings belong to the interface, so it is enough to set them on one queue.
        if let Err(source) = apply_format(state.first.fd(), format)
            && !state.first.is_lost()
        {
            return Err(error::format_refused(&self.shared.name, format, source));
        }
        self.shared
            .header_len
            .store(format.header_len, Ordering::Relaxed);
        state.format = format;
        Ok(())
    }

    /// An interface that this program created gets exactly this MTU. The MTU of another one is only
    /// ever raised.
    fn set_mtu(&self, mtu: u16) -> Result<(), UplinkError> {
        let mut state = self.state.lock();
        state.mtu = Some(mtu);
        match self.find_own_link()? {
            Some(link) => self.apply_mtu(&link, mtu),
            None if state.has_lost_queue() => Ok(()),
            None => Err(error::interface_moved(&self.shared.name)),
        }
    }

    fn refresh(&self) -> Result<UplinkChange, UplinkError> {
        let mut state = self.state.lock();
        if state.has_lost_queue() {
            self.reopen(&mut state)?;
        }
        let own_link = self.find_own_link();
        if !state.needs_configuration {
            return match own_link {
                Ok(Some(link)) if !link.is_up => Err(error::interface_down(&self.shared.name)),
                // In another network namespace its state is unknown, and it may carry frames.
                _ => Ok(UplinkChange::Unchanged),
            };
        }
        if let Some(link) = own_link? {
            self.configure_interface(&link)?;
            // The device asks for its MTU again and reports why it is not set.
            let _ = state.mtu.map(|mtu| self.apply_mtu(&link, mtu));
        }
        state.needs_configuration = false;
        Ok(UplinkChange::Reopened)
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
            index: self.index(),
            changes: attached.changes,
            queues: attached.pairs.clone(),
        })
    }
}

/// Checks that other processes have no queue of the interface, while this one has `own` queues.
fn check_not_shared(link: &Link, own: u32) -> Result<(), UplinkError> {
    match link.queues.map(|all| all.saturating_sub(own)) {
        None | Some(0) => Ok(()),
        Some(queues) => Err(UplinkError::TapShared {
            name: link.name.clone(),
            queues,
        }),
    }
}

/// Waits up to [`RELEASE_TIMEOUT`] until the TAP `name` has no more than `own` queues; returns the
/// entry of the table of interfaces after that. The TAP is not opened to find this out, because an
/// open queue would receive frames that belong to its owner.
fn wait_for_release(links: &LinkTable, name: &str, own: u32) -> Result<Option<Link>, UplinkError> {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    loop {
        let link = links
            .find_by_name(name)
            .map_err(error::link_table_unavailable)?;
        let queues = link.as_ref().and_then(|link| link.queues).unwrap_or(0);
        if queues <= own || Instant::now() >= deadline {
            return Ok(link);
        }
        thread::sleep(RELEASE_INTERVAL);
    }
}

/// Opens one more queue of the TAP `name`, detached. TUNSETIFF attaches the queue, so frames that
/// the kernel steers to it before it is detached are dropped.
fn open_detached(
    links: &LinkTable,
    name: &str,
    before: Option<&Link>,
) -> Result<(File, String), UplinkError> {
    let file = sys::open_tun().map_err(error::tun_open_failed)?;
    let name = rights::attach(file.as_fd(), name).map_err(|error| {
        // If another program created the interface meanwhile, its kind explains the error.
        let now = links.find_by_name(name).ok().flatten();
        error::attach_refused(name, now.as_ref().or(before), error)
    })?;
    sys::set_queue_attached(file.as_fd(), false).map_err(|e| error::setup_failed(&name, e))?;
    Ok((file, name))
}

fn find_link(links: &LinkTable, name: &str) -> Result<Link, UplinkError> {
    links
        .find_by_name(name)
        .map_err(error::link_table_unavailable)?
        .ok_or_else(|| error::interface_gone(name, None))
}

/// Sets up an interface that was opened just now.
fn prepare(tun: BorrowedFd<'_>, format: FrameFormat) -> io::Result<()> {
    sys::set_little_endian(tun)?;
    apply_format(tun, format)
}

/// Sets the header's length and the offloads that the guest accepts.
fn apply_format(tun: BorrowedFd<'_>, format: FrameFormat) -> io::Result<()> {
    sys::set_vnet_hdr_len(tun, format.header_len)?;
    sys::set_offload(tun, to_tun_flags(format))
}

/// The `TUN_F_*` flags of a format. The kernel refuses segmentation without checksums and ECN
/// without TCP segmentation, so an offload without the one that it needs is left out.
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
    fn no_offload_is_set_without_the_one_that_it_needs() {
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
