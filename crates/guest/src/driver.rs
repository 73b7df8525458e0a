//! The driver's side of a virtqueue, whatever its format.
//!
//! A round of work is: [`DriverVirtqueue::add`] some chains, [`DriverVirtqueue::publish`] them together, kick
//! when [`DriverVirtqueue::is_kick_needed`], later [`DriverVirtqueue::collect`] what the device is done with.
//! Sleeping is safe in this order: `collect`, then [`DriverVirtqueue::enable_calls`], and when that says
//! that more is there, collect again instead of sleeping.

use crate::memory::{GuestRam, RamError};
use crate::packed::PackedDriverVirtqueue;
use crate::split::SplitDriverVirtqueue;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes to it (or reads from it).
    pub writable: bool,
}

impl Buf {
    /// A buffer that the device reads.
    #[must_use]
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: true,
        }
    }
}

/// How a ring is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverVirtqueueConfig {
    /// Descriptors: a power of two from 2 to 32,768 in a split ring, any number from 1 to 32,768 in a
    /// packed one.
    pub size: u16,
    /// Whether VIRTIO_F_EVENT_IDX is negotiated.
    pub event_idx: bool,
    /// Whether VIRTIO_F_RING_PACKED is negotiated.
    pub packed: bool,
    /// The index that a split ring begins at, to start close to its wrap at 65,535; in a packed
    /// ring so many descriptors, round and round, from its beginning.
    pub start: u16,
}

impl DriverVirtqueueConfig {
    /// A ring of `size` descriptors under these feature bits, from index 0.
    #[must_use]
    pub fn new(size: u16, features: u64) -> Self {
        Self {
            size,
            event_idx: features >> virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX & 1 == 1,
            packed: features >> virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED & 1 == 1,
            start: 0,
        }
    }
}

/// Where a ring's three parts lie, as guest physical addresses (virtio 1.3 §2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtqueueAddresses {
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area: the available ring, or the driver's event suppression.
    pub driver: u64,
    /// Device area: the used ring, or the device's event suppression.
    pub device: u64,
}

/// Why the driver could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DriverVirtqueueError {
    /// A size that the format does not have.
    #[error(
        "a ring of {0} descriptors cannot be made; take 1 to 32768, and a power of two from 2 in a split ring"
    )]
    Size(u16),
    /// No room.
    #[error("a chain needs {needed} descriptors and {free} are free; collect used ones first")]
    Full {
        /// Descriptors that the chain needs.
        needed: usize,
        /// Free ones.
        free: u16,
    },
    /// A chain without a buffer.
    #[error("a chain of no buffers cannot be added; give it one")]
    Empty,
    /// Guest memory has no room for the ring or an indirect table.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// What the device put into the ring is wrong.
    #[error(transparent)]
    Device(#[from] DeviceFault),
}

/// What a device got wrong, as the driver sees it. The ring is of no use after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFault {
    /// The used index went past what the driver had made available.
    #[error("the device's used index went from {from} to {to} with {in_flight} chains in flight")]
    UsedIndex {
        /// The index up to which chains were collected.
        from: u16,
        /// The index found.
        to: u16,
        /// Chains in flight.
        in_flight: u16,
    },
    /// A used element or used descriptor names no chain in flight, by its head or buffer id.
    #[error("the device used {0}, which names no chain in flight")]
    UsedId(u32),
    /// A used length beyond what the chain can take.
    #[error("the device says that it wrote {len} bytes into a buffer of {capacity}")]
    UsedLength {
        /// Bytes the device claims.
        len: u32,
        /// Bytes the buffer has.
        capacity: u32,
    },
    /// A frame shorter than its virtio-net header.
    #[error("the device used an RX buffer with {0} bytes, less than a header")]
    NoHeader(u32),
    /// num_buffers is 0.
    #[error("the device wrote num_buffers 0 with mergeable buffers")]
    NoBuffers,
    /// The used index did not cover every buffer of a merged frame.
    #[error("the device published {got} of the {wanted} buffers of a frame")]
    TornFrame {
        /// num_buffers.
        wanted: u16,
        /// Buffers found.
        got: u16,
    },
}

/// A driver's ring.
#[derive(Debug)]
pub enum DriverVirtqueue {
    /// Virtio 1.3 §2.7.
    Split(SplitDriverVirtqueue),
    /// Virtio 1.3 §2.8.
    Packed(PackedDriverVirtqueue),
}

/// Calls the same on whichever format the ring has.
macro_rules! each {
    ($self:expr, $ring:ident => $call:expr) => {
        match $self {
            DriverVirtqueue::Split($ring) => $call,
            DriverVirtqueue::Packed($ring) => $call,
        }
    };
}

impl DriverVirtqueue {
    /// Allocates an empty ring in `ram`.
    ///
    /// # Errors
    /// When the format does not have that size or `ram` has no room.
    pub fn new(
        ram: &GuestRam,
        config: DriverVirtqueueConfig,
    ) -> Result<Self, DriverVirtqueueError> {
        Ok(match config.packed {
            false => Self::Split(SplitDriverVirtqueue::new(ram, config)?),
            true => Self::Packed(PackedDriverVirtqueue::new(ram, config)?),
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        each!(self, ring => ring.size())
    }

    /// Where the parts lie.
    #[must_use]
    pub fn addresses(&self) -> VirtqueueAddresses {
        each!(self, ring => ring.addresses())
    }

    /// What SET_VRING_BASE takes for a device that is to go on where the last one stopped: derived
    /// from what the device used, as QEMU does when a back-end has crashed.
    #[must_use]
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => u32::from(ring.used_index()),
            Self::Packed(ring) => {
                let place = u32::from(ring.used_up_to().word());
                place | place << 16
            }
        }
    }

    /// Descriptors that are free.
    #[inline(always)]
    #[must_use]
    pub fn free(&self) -> u16 {
        each!(self, ring => ring.free())
    }

    /// Chains that were published and not collected yet.
    #[inline(always)]
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        each!(self, ring => ring.in_flight())
    }

    /// Forgets every chain and starts over with zeroed memory, as a driver that is loaded anew.
    /// The device must not be running.
    pub fn reset(&mut self) {
        each!(self, ring => ring.reset())
    }

    /// Writes a chain, not yet visible to the device. With `indirect` it takes one descriptor and a
    /// table of its own. `token` comes back from [`DriverVirtqueue::collect`]. Returns the descriptor
    /// that heads the chain (split) or the buffer id (packed).
    ///
    /// # Errors
    /// When there is no room; nothing was added then.
    #[inline(always)]
    pub fn add(
        &mut self,
        chain: &[Buf],
        indirect: bool,
        token: u64,
    ) -> Result<u16, DriverVirtqueueError> {
        each!(self, ring => ring.add(chain, indirect, token))
    }

    /// Makes what was added visible to the device, all at once.
    #[inline(always)]
    pub fn publish(&mut self) {
        each!(self, ring => ring.publish())
    }

    /// Whether the device wants a kick for what was published since the last call of this.
    #[inline(always)]
    #[must_use]
    pub fn is_kick_needed(&mut self) -> bool {
        each!(self, ring => ring.is_kick_needed())
    }

    /// Reads the device's progress once; returns the chains that [`DriverVirtqueue::pop`] can now give.
    ///
    /// # Errors
    /// When the device's index is impossible.
    #[inline(always)]
    pub fn refresh(&mut self) -> Result<u16, DeviceFault> {
        each!(self, ring => ring.refresh())
    }

    /// The next chain, token and bytes written, of those that the last [`DriverVirtqueue::refresh`] saw.
    ///
    /// # Errors
    /// When the device names a chain that is not in flight.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<(u64, u32)>, DeviceFault> {
        each!(self, ring => ring.pop())
    }

    /// Hands every chain that the device is done with to `each`: its token and the bytes written.
    /// Returns how many there were.
    ///
    /// # Errors
    /// At the first thing that the device got wrong.
    #[inline(always)]
    pub fn collect(&mut self, mut each: impl FnMut(u64, u32)) -> Result<u16, DeviceFault> {
        let count = self.refresh()?;
        while let Some((token, len)) = self.pop()? {
            each(token, len);
        }
        Ok(count)
    }

    /// Asks the device for no calls. With EVENT_IDX one more may come.
    #[inline(always)]
    pub fn disable_calls(&mut self) {
        each!(self, ring => ring.disable_calls())
    }

    /// Asks the device for a call with the next chain that it uses. Returns whether there is more
    /// to collect already; a call for that may not come.
    #[inline(always)]
    #[must_use]
    pub fn enable_calls(&mut self) -> bool {
        each!(self, ring => ring.enable_calls())
    }

    /// The ring as a split ring, for its raw access; `None` for another format.
    pub fn as_split(&mut self) -> Option<&mut SplitDriverVirtqueue> {
        match self {
            Self::Split(ring) => Some(ring),
            Self::Packed(_) => None,
        }
    }

    /// The ring as a packed ring, for its raw access; `None` for another format.
    pub fn as_packed(&mut self) -> Option<&mut PackedDriverVirtqueue> {
        match self {
            Self::Packed(ring) => Some(ring),
            Self::Split(_) => None,
        }
    }
}

/// Descriptors that a chain takes from a ring with `free` ones.
#[inline(always)]
pub(crate) fn needed(
    chain: &[Buf],
    indirect: bool,
    free: u16,
) -> Result<u16, DriverVirtqueueError> {
    let needed = if indirect { 1 } else { chain.len() };
    match u16::try_from(needed) {
        _ if chain.is_empty() => Err(DriverVirtqueueError::Empty),
        Ok(count) if count <= free => Ok(count),
        _ => Err(DriverVirtqueueError::Full { needed, free }),
    }
}
