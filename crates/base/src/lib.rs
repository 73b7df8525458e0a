//! The lowest crate, which every other crate may use and which depends on none of them:
//!
//! | item | subject |
//! |---|---|
//! | [`MAX_QUEUE_PAIRS`] | the limit that vhost-user sets for queue pairs |
//! | [`RateLimiter`] | at most one log line a second for each cause |
//! | [`ReportOnce`] | reports of conditions, repeated only when they change |
//! | [`key_value`] | `KEY=VALUE` lists |
//! | [`Pattern`] | patterns of names and paths |
//! | [`rights`] | operations that need rights, and the helper that has them |
//! | [`unix_socket`] | unix sockets in the file system |

pub mod key_value;
mod pattern;
mod rate_limiter;
mod report_once;
pub mod rights;
mod sys;
pub mod unix_socket;

pub use pattern::{Pattern, PatternError};
pub use rate_limiter::RateLimiter;
pub use report_once::ReportOnce;

/// The largest number of queue pairs of a network device. A vring index has 8 bits in
/// SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR, and a queue pair has two vrings (QEMU's
/// docs/interop/vhost-user.rst).
pub const MAX_QUEUE_PAIRS: u16 = 128;
