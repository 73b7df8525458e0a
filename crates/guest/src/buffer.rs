//! The buffers of which a driver makes a chain.

use crate::fault::DriverVirtqueueError;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf {
    /// The guest physical address.
    pub addr: u64,
    /// The length in bytes.
    pub len: u32,
    /// Whether the device writes the buffer; otherwise the device reads it.
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

/// The number of descriptors that a chain takes from a virtqueue with `free` unused ones.
///
/// # Errors
/// When the chain is empty or needs more descriptors than `free`.
#[inline(always)]
pub(crate) fn descriptors_needed(
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
