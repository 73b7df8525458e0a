//! What stops a session from outside.

use std::os::fd::BorrowedFd;

/// What a session is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopDemand {
    /// Continue.
    GoOn,
    /// Stop so that it can continue later, perhaps in another process.
    Suspend,
    /// End.
    End,
}

/// A request to stop, which other threads make.
pub trait StopSignal: Sync {
    /// The descriptor that is readable while the session must not continue. A session never reads
    /// it.
    fn poll_fd(&self) -> BorrowedFd<'_>;

    /// What the session is to do. Asked when the descriptor is readable.
    fn demand(&self) -> StopDemand;
}

/// A descriptor that ends sessions.
impl StopSignal for BorrowedFd<'_> {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        *self
    }

    fn demand(&self) -> StopDemand {
        StopDemand::End
    }
}
