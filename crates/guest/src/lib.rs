//! The driver side of virtio-net, for tests, benches and fuzzing. The daemon does not use it.
//!
//! From the lowest layer to the highest:
//!
//! | module | subject |
//! |---|---|
//! | [`memory`] | the guest's memory |
//! | [`split`], [`packed`] | the driver side of a virtqueue in each format |
//! | [`driver`] | the driver side of a virtqueue of either format |
//! | [`net`], [`tx`], [`rx`] | transmitq and receiveq of a queue pair |
//! | [`message_stream`], [`frontend`] | the vhost-user socket, used as QEMU does |
//! | [`test_frontend`] | a front-end with started queue pairs that send and receive |
//! | [`dirty_log`] | its part in a migration |
//! | [`iommu`] | its part in front of a device behind an IOMMU |
//!
//! [`hostile`] turns descriptors against the device that has them. [`frame`] and [`header`] build
//! frames to send and check received ones. [`log_lines`] is for tests of what the device logs.
//!
//! A virtqueue can also be driven without a socket: [`memory::GuestRam::guest_memory`] is the
//! device's view of the same memory in this process.

mod buffer;
mod config;
pub mod dirty_log;
pub mod driver;
mod error;
pub mod eventfd;
mod fault;
pub mod frame;
pub mod frontend;
pub mod header;
pub mod hostile;
mod indirect;
pub mod iommu;
pub mod log_lines;
pub mod memory;
pub mod message_stream;
pub mod net;
pub mod packed;
pub mod rx;
pub mod split;
pub mod test_frontend;
pub mod tx;

pub use error::Error;
