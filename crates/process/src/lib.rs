//! What every thread of the program has: the log, which never blocks it, what a panic in it costs,
//! and the sandbox in which it runs.

mod identity;
pub mod log_writer;
pub mod logging;
pub mod panic_policy;
pub mod sandbox;
