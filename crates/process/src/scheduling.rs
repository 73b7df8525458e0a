//! How soon the threads of this process run once they are woken ([`virtionet_placement::slice`]).
//!
//! They sleep until something happens, and a front-end then waits for a reply, or the next daemon for the
//! devices. On a CPU that a vCPU or another process keeps busy they would wait for
//! the next tick of the clock.
//!
//! Workers that carry frames have the kernel's default. A worker with a short slice interrupts its vCPU for
//! each frame, where it otherwise finds several.

use std::io;
use std::time::Duration;

use virtionet_placement::slice::{SHORTEST_SLICE, SliceOutcome, set_slice};

/// What became of the request of [`request_short_slice`].
#[derive(Debug)]
#[must_use]
pub struct SliceRequest(io::Result<SliceOutcome>);

/// Asks for the shortest slice for the calling thread, and for those that it will start. This must
/// happen while the process has one thread, and before it is confined: most filters refuse the call.
/// Where the kernel cannot do that, everything works as well, but later on a busy CPU.
pub fn request_short_slice() -> SliceRequest {
    SliceRequest(set_slice(None, SHORTEST_SLICE))
}

/// Gives the calling thread the kernel's default slice again.
// syscalls: sched_getattr sched_setattr
pub fn use_default_slice() {
    // Where that fails, the thread works as well, with more context switches.
    if let Err(error) = set_slice(None, Duration::ZERO) {
        tracing::debug!("the kernel refuses a thread its default slice: {error}");
    }
}

impl SliceRequest {
    /// Logs what became of it.
    pub fn log(&self) {
        match &self.0 {
            Ok(SliceOutcome::Set) => {
                tracing::debug!("all threads but workers have a slice of {SHORTEST_SLICE:?}")
            }
            Ok(SliceOutcome::OtherPolicy) => tracing::debug!(
                "the scheduling policy is not SCHED_OTHER, so the slice of threads stays as it is"
            ),
            Ok(SliceOutcome::NotGranted) => tracing::debug!(
                "the kernel is older than 6.12 and does not know slices of threads, so they wait longer for a busy CPU"
            ),
            Err(error) => tracing::debug!("the kernel refuses a slice for the threads: {error}"),
        }
    }
}
