//! What every other crate may use, and what knows nothing of them: the limit that vhost-user sets
//! for queue pairs, rate limiting of log lines, `KEY=VALUE` lists, and unix sockets in the file
//! system.

pub mod key_value;
mod rate_limiter;
mod report_once;
pub mod unix_socket;

pub use rate_limiter::RateLimiter;
pub use report_once::ReportOnce;

/// The largest number of queue pairs of a device: a vhost-user ring index has 8 bits, and a queue
/// pair has two rings (docs/interop/vhost-user.rst, "Vring state description").
pub const MAX_QUEUE_PAIRS: u16 = 128;
