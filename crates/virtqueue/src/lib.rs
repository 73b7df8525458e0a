//! Guest memory and virtqueues.
//!
//! No I/O, no threads, no sockets: a ring here is memory, indices and rules. Everything the guest
//! can write is read once, checked, and answered with a [`ChainFault`] or a [`VirtqueueFault`] where it
//! breaks the rules.
//!
//! A queue's life in three calls: [`Virtqueue::dequeue`] moves chains from the ring into a [`Burst`],
//! [`Virtqueue::complete`] gives each back with the bytes written to it, [`Virtqueue::publish`] shows all of
//! that to the driver at once and says whether it wants an interrupt. Nothing above [`Virtqueue`] knows
//! which format the ring has.

mod burst;
mod fault;
pub mod memory;
mod packed;
mod split;
#[cfg(test)]
mod testing;
mod walk;

pub use burst::{Burst, Chain};
pub use fault::{ChainFault, VirtqueueFault};

use std::sync::Arc;

use memory::GuestMemory;
use packed::PackedVirtqueue;
use split::SplitVirtqueue;

/// Most descriptors, and most segments of memory, in one chain.
pub const MAX_CHAIN_SEGMENTS: usize = 1024;
/// Largest ring (virtio 1.3 §2.7).
pub const MAX_QUEUE_SIZE: u16 = 32_768;

/// Which way the buffers of a ring are meant to be used; a chain of the other kind is a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads them (TX).
    Readable,
    /// The device writes them (RX).
    Writable,
}

/// Where a ring lies: its size in descriptors and its three areas, as addresses of the front-end
/// (SET_VRING_NUM, SET_VRING_ADDR). In a packed ring the second and third are the driver's and the
/// device's event suppression areas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VirtqueueLayout {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table (split) or descriptor ring (packed).
    pub desc: u64,
    /// Available ring, or driver event suppression.
    pub avail: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
}

/// All that a ring needs to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtqueueConfig {
    /// Where it lies.
    pub layout: VirtqueueLayout,
    /// Where it goes on, as SET_VRING_BASE says: for a split ring the next available index, for a
    /// packed one the next descriptor and its wrap counter (bit 15), and the same of the next used
    /// one in the upper half.
    pub base: u32,
    /// Which way its buffers are used.
    pub direction: Direction,
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// Fewest bytes that a chain of this ring is good for.
    pub min_len: u32,
}

/// Why a ring cannot start (the front-end's fault).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VirtqueueError {
    /// 0, too large, or (split) not a power of two.
    #[error(
        "ring size {0} is not allowed; it must be at most {MAX_QUEUE_SIZE}, and a power of two in a split ring"
    )]
    Size(u16),
    /// A base that the format does not have.
    #[error("ring base {0:#x} is outside the ring")]
    Base(u32),
    /// An area that is misaligned or does not lie in one region of memory.
    #[error("the ring's {what} at {addr:#x} is misaligned or not in the guest's shared memory")]
    Unmapped {
        /// Which area.
        what: &'static str,
        /// Its front-end address.
        addr: u64,
    },
}

impl VirtqueueError {
    fn unmapped(what: &'static str, addr: u64) -> Self {
        Self::Unmapped { what, addr }
    }
}

/// The device's half of a virtqueue, whatever its format.
#[derive(Debug)]
pub struct Virtqueue {
    format: Format,
    config: VirtqueueConfig,
    /// The driver may have been asked for kicks. Asking for none again and again would take a cache
    /// line from it each time.
    kicks_enabled: bool,
}

#[derive(Debug)]
enum Format {
    Split(SplitVirtqueue),
    Packed(PackedVirtqueue),
}

/// Calls the same method on whichever format the ring has.
macro_rules! dispatch {
    ($ring:expr, $inner:ident => $call:expr) => {
        match $ring.format {
            Format::Split(ref $inner) => $call,
            Format::Packed(ref $inner) => $call,
        }
    };
    (mut $ring:expr, $inner:ident => $call:expr) => {
        match $ring.format {
            Format::Split(ref mut $inner) => $call,
            Format::Packed(ref mut $inner) => $call,
        }
    };
}

impl Virtqueue {
    /// A ring in `memory`, going on where `config.base` and the ring's own used index say.
    ///
    /// # Errors
    /// When the configuration cannot be a ring.
    pub fn new(config: VirtqueueConfig, memory: &GuestMemory) -> Result<Self, VirtqueueError> {
        let format = match config.packed {
            false => Format::Split(SplitVirtqueue::new(&config, memory)?),
            true => Format::Packed(PackedVirtqueue::new(&config, memory)?),
        };
        Ok(Self {
            format,
            config,
            kicks_enabled: true,
        })
    }

    /// The same ring, at the same place in its life, in another snapshot of memory.
    ///
    /// # Errors
    /// When its areas are not all in the new snapshot.
    pub fn rebind(&self, memory: &Arc<GuestMemory>) -> Result<Self, VirtqueueError> {
        let base = self.base();
        Self::new(
            VirtqueueConfig {
                base,
                ..self.config
            },
            memory,
        )
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        dispatch!(self, ring => ring.size())
    }

    /// Where the ring would go on if it stopped now, for GET_VRING_BASE. Chains in a burst count as
    /// taken: give back what is not used first ([`Virtqueue::rewind`]).
    #[must_use]
    pub fn base(&self) -> u32 {
        dispatch!(self, ring => ring.base())
    }

    /// Moves up to `max` chains (64 at most at once) to the back of `burst` and says how many:
    /// 0 when none is available. The work of one call is bounded whatever the guest wrote.
    ///
    /// # Errors
    /// When the ring can no longer be believed. Chains that were whole have been taken before.
    #[inline(always)]
    pub fn dequeue(&mut self, burst: &mut Burst, max: usize) -> Result<usize, VirtqueueFault> {
        dispatch!(mut self, ring => ring.dequeue(burst, max))
    }

    /// Gives every chain of `burst` back as if it had never been taken.
    pub fn rewind(&mut self, burst: &mut Burst) {
        let slots = burst
            .chains()
            .iter()
            .fold(0u16, |sum, chain| sum.wrapping_add(chain.slots));
        dispatch!(mut self, ring => ring.rewind(slots));
        burst.clear();
    }

    /// Gives a chain back with the number of bytes written to it. The driver does not see that
    /// before [`Virtqueue::publish`]. Chains are to be completed in the order in which they were taken:
    /// what a restart relies on.
    #[inline(always)]
    pub fn complete(&mut self, chain: &Chain, written: u32) {
        self.complete_each(std::iter::once((chain, written)));
    }

    /// Gives many chains back to which nothing was written, in their order.
    #[inline(always)]
    pub fn complete_all(&mut self, chains: &[Chain]) {
        self.complete_each(chains.iter().map(|chain| (chain, 0)));
    }

    /// Gives many chains back, each with the number of bytes written to it.
    #[inline(always)]
    pub fn complete_each<'c>(&mut self, completions: impl Iterator<Item = (&'c Chain, u32)>) {
        let completions = completions.map(|(chain, written)| (chain.id, chain.slots, written));
        dispatch!(mut self, ring => ring.complete_each(completions));
    }

    /// Gives back the chains that `len` bytes fill, one after the other from the first on, each with
    /// its part of them; says how many chains those are.
    #[inline(always)]
    pub fn complete_filled(&mut self, chains: &[Chain], len: usize) -> usize {
        dispatch!(mut self, ring => ring.complete_filled(chains, len))
    }

    /// Shows the driver all completed chains at once; true when it wants to be interrupted.
    #[inline(always)]
    #[must_use = "the driver may wait for the interrupt"]
    pub fn publish(&mut self) -> bool {
        dispatch!(mut self, ring => ring.publish())
    }

    /// Whether chains have been completed that the driver has not been shown.
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        dispatch!(self, ring => ring.has_unpublished())
    }

    /// Asks the driver for kicks. True when chains came in the meantime: look again before
    /// sleeping, no kick may come for them.
    #[must_use = "chains may have come for which no kick will"]
    pub fn enable_kicks(&mut self) -> bool {
        self.kicks_enabled = true;
        dispatch!(mut self, ring => ring.enable_kicks())
    }

    /// Tells the driver that kicks are not needed.
    #[inline(always)]
    pub fn disable_kicks(&mut self) {
        if std::mem::take(&mut self.kicks_enabled) {
            dispatch!(mut self, ring => ring.disable_kicks());
        }
    }

    /// Whether chains are available, or the index says so.
    #[inline(always)]
    #[must_use]
    pub fn has_more(&self) -> bool {
        dispatch!(self, ring => ring.has_more())
    }
}

/// Whether moving an index from `old` to `new` passes `event` (virtio 1.3 §2.7.7.2 and §2.8.10).
#[inline(always)]
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Bytes written to one chain: at most its length, which is 32 bits.
#[inline(always)]
fn to_used_len(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
