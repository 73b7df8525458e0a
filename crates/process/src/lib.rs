//! What every thread of the program has: the log, which never blocks it, what a panic in it costs,
//! the sandbox in which it runs, and how soon it runs once it is woken.

mod identity;
pub mod log_writer;
pub mod logging;
pub mod panic_policy;
pub mod sandbox;
pub mod scheduling;
