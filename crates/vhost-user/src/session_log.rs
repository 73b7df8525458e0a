//! The limits of the log lines that the sessions of one device cause.

use virtionet_base::RateLimiter;

/// The limits of the log lines that the sessions of one device cause. They outlive a session,
/// because a front-end may connect again and again.
#[derive(Debug, Default)]
pub struct SessionLog {
    /// Of requests that were refused.
    pub(crate) refusals: RateLimiter,
    /// Of vrings that do not start, or were stopped because their memory was removed.
    pub(crate) failed_starts: RateLimiter,
    /// Of guest memory or a dirty log in a file on a disk.
    pub(crate) memory_on_disk: RateLimiter,
}
