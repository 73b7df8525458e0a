//! The signals that the main thread handles, and no other one.

use std::io;

use nix::sys::signal::{SigSet, Signal};

use crate::handover::SUCCESSOR_SIGNAL;

/// What they are: the end, a reload, the end of the helper, and a successor.
pub const HANDLED: [Signal; 5] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGCHLD,
    SUCCESSOR_SIGNAL,
];

/// Leaves the signals to the main thread, which takes them once it has started all others. No other
/// thread may wake it: see the lists of [`virtionet_sandbox`].
///
/// # Errors
/// When the kernel refuses it.
pub fn reserve() -> io::Result<()> {
    Ok(handled().thread_block()?)
}

/// Takes them in the calling thread, those that came meanwhile included.
///
/// # Errors
/// When the kernel refuses it.
pub fn take() -> io::Result<()> {
    Ok(handled().thread_unblock()?)
}

fn handled() -> SigSet {
    HANDLED.into_iter().collect()
}
