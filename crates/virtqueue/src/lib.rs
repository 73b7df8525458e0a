//! Guest memory and the device side of virtqueues.
//!
//! The crate does no I/O and starts no threads: a virtqueue here is memory, indices and rules.
//! Everything that the guest can write is read once and checked. A violation of the rules is
//! reported as a [`ChainFault`], which affects one chain, or as a [`VirtqueueFault`], after which
//! the whole virtqueue must be configured again.
//!
//! Reading order: [`Virtqueue`] is the interface. `split` and `packed` implement it for the two
//! formats of virtio 1.3; both follow a chain with `walk`. A [`Burst`] holds the dequeued
//! [`Chain`]s, and [`memory`] translates their addresses.

mod burst;
mod chain;
mod config;
pub mod constants;
mod crash_record;
mod event;
mod fault;
pub mod memory;
mod packed;
mod ring_log;
mod singles;
mod split;
#[cfg(test)]
mod testing;
mod virtqueue;
mod walk;

pub use burst::Burst;
pub use chain::Chain;
pub use config::{
    Direction, MAX_CHAIN_SEGMENTS, MAX_QUEUE_SIZE, VirtqueueConfig, VirtqueueError, VirtqueueLayout,
};
pub use crash_record::CrashRecord;
pub use fault::{ChainFault, VirtqueueFault};
pub use singles::{FoundSingles, SingleIds};
pub use virtqueue::Virtqueue;
