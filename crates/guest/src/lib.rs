//! The driver's side of virtio-net: for tests, benches and fuzzing, never for the daemon itself.
//!
//! From below: [`memory`] is the guest's RAM, [`driver`] its rings in the formats of [`split`] and
//! [`packed`], [`net`], [`tx`] and [`rx`] the two queues of a pair, [`wire`] and [`frontend`] the
//! vhost-user socket as QEMU speaks it, and [`card`] all of them together: a network card that is connected, started, and sends and
//! receives. [`frame`] and [`header`] make what it sends and check what it gets.
//!
//! Rings can be driven without a socket: [`memory::GuestRam::guest_memory`] is the device's view of
//! the same memory in this process.

pub mod driver;
mod error;
pub mod eventfd;
pub mod frame;
pub mod frontend;
pub mod header;
mod indirect;
pub mod memory;
pub mod message_stream;
pub mod net;
pub mod packed;
pub mod rx;
pub mod split;
pub mod test_frontend;
pub mod tx;

pub use error::Error;
