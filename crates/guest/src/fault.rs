//! What can fail on the driver side of a virtqueue, and what a device can do wrong.

use crate::memory::RamError;

/// Why the driver could not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum DriverVirtqueueError {
    /// The format does not allow the size.
    #[error(
        "a virtqueue of {0} descriptors cannot be made; choose 1 to 32768, and a power of two from 2 for a split virtqueue"
    )]
    Size(u16),
    /// There are not enough unused descriptors.
    #[error("a chain needs {needed} descriptors and {free} are free; collect used ones first")]
    Full {
        /// The number of descriptors that the chain needs.
        needed: usize,
        /// The number of unused descriptors.
        free: u16,
    },
    /// A chain has no buffer.
    #[error("a chain without buffers cannot be added; give it at least one")]
    Empty,
    /// Guest memory is too small for the virtqueue or an indirect table.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The device wrote something invalid into the virtqueue.
    #[error(transparent)]
    Device(#[from] DeviceFault),
}

/// How a device breaks the rules of virtio. The virtqueue cannot be used any more after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFault {
    /// The used index passed the last chain that the driver made available, or moved backwards.
    #[error("the device's used index went from {from} to {to} with {in_flight} chains in flight")]
    UsedIndex {
        /// The index up to which chains were collected.
        from: u16,
        /// The index in the used ring.
        to: u16,
        /// The number of chains in flight.
        in_flight: u16,
    },
    /// The head or buffer id of a used element or used descriptor is not that of a chain in flight.
    #[error("the device used {0}, which is not the id of a chain in flight")]
    UsedId(u32),
    /// The used length is larger than the buffer.
    #[error("the device reports {len} bytes written to a buffer of {capacity}")]
    UsedLength {
        /// The number of bytes that the device reports.
        len: u32,
        /// The size of the buffer in bytes.
        capacity: u32,
    },
    /// A frame is shorter than its virtio-net header.
    #[error("the device used an RX buffer with {0} bytes, less than a header")]
    NoHeader(u32),
    /// `num_buffers` is 0 although mergeable RX buffers are negotiated.
    #[error("the device wrote num_buffers 0 with mergeable buffers")]
    NoBuffers,
    /// The buffers of a merged frame were not published together.
    #[error("the device published {got} of the {wanted} buffers of a frame")]
    TornFrame {
        /// `num_buffers` of the frame.
        wanted: u16,
        /// The number of used buffers.
        got: u16,
    },
}
