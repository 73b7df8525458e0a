//! Guest memory and virtqueues.
//!
//! No I/O, no threads, no sockets: a ring here is memory, indices and rules. Everything the guest
//! can write is read once, checked, and answered with a [`Fault`] where it breaks the rules.

pub mod memory;
#[cfg(test)]
mod testing;
