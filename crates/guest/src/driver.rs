//! The driver side of a virtqueue of either format.
//!
//! A round of work consists of four steps: [`DriverVirtqueue::add`] some chains,
//! [`DriverVirtqueue::publish`] them together, kick the device if
//! [`DriverVirtqueue::is_kick_needed`], and later [`DriverVirtqueue::collect`] the used chains.
//!
//! No call is lost if the driver waits in this order: `collect`, then
//! [`DriverVirtqueue::enable_calls`], and only if that returns false wait for the call.

pub use crate::buffer::Buf;
pub use crate::config::{DriverVirtqueueConfig, VirtqueueAddresses};
pub use crate::fault::{DeviceFault, DriverVirtqueueError};
use crate::memory::GuestRam;
use crate::packed::PackedDriverVirtqueue;
use crate::split::SplitDriverVirtqueue;

/// The driver side of a virtqueue.
#[derive(Debug)]
pub enum DriverVirtqueue {
    /// A split virtqueue (virtio 1.3 §2.7).
    Split(SplitDriverVirtqueue),
    /// A packed virtqueue (virtio 1.3 §2.8).
    Packed(PackedDriverVirtqueue),
}

/// Evaluates the same expression for either format of the virtqueue.
macro_rules! dispatch {
    ($self:expr, $ring:ident => $call:expr) => {
        match $self {
            DriverVirtqueue::Split($ring) => $call,
            DriverVirtqueue::Packed($ring) => $call,
        }
    };
}

impl DriverVirtqueue {
    /// Allocates a virtqueue without chains in `ram`.
    ///
    /// # Errors
    /// When the format does not allow the size or `ram` has not enough free memory.
    pub fn new(
        ram: &GuestRam,
        config: DriverVirtqueueConfig,
    ) -> Result<Self, DriverVirtqueueError> {
        Ok(match config.packed {
            false => Self::Split(SplitDriverVirtqueue::new(ram, config)?),
            true => Self::Packed(PackedDriverVirtqueue::new(ram, config)?),
        })
    }

    /// The number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        dispatch!(self, ring => ring.size())
    }

    /// Guest physical addresses of the parts.
    #[must_use]
    pub fn addresses(&self) -> VirtqueueAddresses {
        dispatch!(self, ring => ring.addresses())
    }

    /// The base with which a device continues where the last one stopped, in the form of
    /// SET_VRING_BASE. It is derived from what the device has used, as QEMU does when a back-end
    /// has crashed.
    #[must_use]
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => u32::from(ring.used_index()),
            Self::Packed(ring) => {
                let position = u32::from(ring.used_up_to().word());
                position | position << 16
            }
        }
    }

    /// The number of unused descriptors.
    #[inline(always)]
    #[must_use]
    pub fn free(&self) -> u16 {
        dispatch!(self, ring => ring.free())
    }

    /// The number of chains that are published and not collected.
    #[inline(always)]
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        dispatch!(self, ring => ring.in_flight())
    }

    /// Discards every chain and starts again with zeroed memory, as a driver does that is loaded
    /// again. The device must be stopped.
    pub fn reset(&mut self) {
        dispatch!(self, ring => ring.reset())
    }

    /// Writes a chain that the device does not see before [`DriverVirtqueue::publish`]. With
    /// `indirect` the chain takes one descriptor and an indirect table.
    /// [`DriverVirtqueue::collect`] returns `token`. Returns the head of the chain (split) or its
    /// buffer id (packed).
    ///
    /// # Errors
    /// When the chain is empty, or there are not enough descriptors or guest memory. Nothing is
    /// added then.
    #[inline(always)]
    pub fn add(
        &mut self,
        chain: &[Buf],
        indirect: bool,
        token: u64,
    ) -> Result<u16, DriverVirtqueueError> {
        dispatch!(self, ring => ring.add(chain, indirect, token))
    }

    /// Makes all added chains visible to the device at once.
    #[inline(always)]
    pub fn publish(&mut self) {
        dispatch!(self, ring => ring.publish())
    }

    /// Whether the device wants a kick for the chains published since the last call of this method.
    #[inline(always)]
    #[must_use]
    pub fn is_kick_needed(&mut self) -> bool {
        dispatch!(self, ring => ring.is_kick_needed())
    }

    /// Reads the device's progress once. Returns the number of chains that [`DriverVirtqueue::pop`]
    /// can return now.
    ///
    /// # Errors
    /// When the device's index or id is invalid.
    #[inline(always)]
    pub fn refresh(&mut self) -> Result<u16, DeviceFault> {
        dispatch!(self, ring => ring.refresh())
    }

    /// Collects the next chain of those that the last [`DriverVirtqueue::refresh`] found: its token
    /// and the number of bytes written to it.
    ///
    /// # Errors
    /// When the device used a chain that is not in flight.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<(u64, u32)>, DeviceFault> {
        dispatch!(self, ring => ring.pop())
    }

    /// Collects every used chain: passes its token and the number of bytes written to `each`.
    /// Returns the number of chains.
    ///
    /// # Errors
    /// At the first fault of the device.
    #[inline(always)]
    pub fn collect(&mut self, mut each: impl FnMut(u64, u32)) -> Result<u16, DeviceFault> {
        let count = self.refresh()?;
        while let Some((token, len)) = self.pop()? {
            each(token, len);
        }
        Ok(count)
    }

    /// Tells the device that calls are not needed. The device may still send some.
    #[inline(always)]
    pub fn disable_calls(&mut self) {
        dispatch!(self, ring => ring.disable_calls())
    }

    /// Asks the device for a call for the next chain that it uses. Returns whether there are chains
    /// to collect already; no call may come for those.
    #[inline(always)]
    #[must_use]
    pub fn enable_calls(&mut self) -> bool {
        dispatch!(self, ring => ring.enable_calls())
    }

    /// The split virtqueue for raw access; `None` for a packed one.
    pub fn as_split(&mut self) -> Option<&mut SplitDriverVirtqueue> {
        match self {
            Self::Split(ring) => Some(ring),
            Self::Packed(_) => None,
        }
    }

    /// The packed virtqueue for raw access; `None` for a split one.
    pub fn as_packed(&mut self) -> Option<&mut PackedDriverVirtqueue> {
        match self {
            Self::Packed(ring) => Some(ring),
            Self::Split(_) => None,
        }
    }
}
