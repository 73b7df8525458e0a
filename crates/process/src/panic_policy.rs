//! What a panic costs. Every panic is a bug of this program.
//!
//! In a session or a worker it costs that device at most: the thread calls [`contain_panics`] when
//! it starts and runs what may panic inside [`contain`]. In any other thread (`main`, `control`,
//! `placer`, a switch's) the process ends at once with status 101, so that its service manager can
//! start it again: without that thread it would look alive and be useless.
//!
//! The message goes through the log's writer, which never blocks.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use virtionet_base::RateLimiter;

use crate::logging;

/// The exit status of a process that a panic ended, as Rust's runtime has it.
const PANIC_STATUS: i32 = 101;

static CONTAINED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static IS_CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// A panic that was caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this code panicked; please report this as a bug")]
pub struct Panicked;

/// Makes panics follow this policy in the whole process.
pub fn install() {
    let lines = RateLimiter::new();
    set_hook(Box::new(move |info| report(info, &lines)));
}

fn report(info: &PanicHookInfo<'_>, lines: &RateLimiter) {
    let is_contained = IS_CONTAINED.get();
    if !is_contained || lines.allow().is_some() {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name");
        logging::print_error(&format!(
            "thread {name} panicked ({info}); please report this as a bug"
        ));
    }
    if !is_contained {
        process::exit(PANIC_STATUS);
    }
}

/// From now on, a panic of the calling thread does not end the process.
pub fn contain_panics() {
    IS_CONTAINED.set(true);
}

/// Calls `work`. A panic in it is caught and counted.
///
/// # Errors
/// When it panicked.
#[inline]
pub fn contain<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| {
        CONTAINED.fetch_add(1, Ordering::Relaxed);
        Panicked
    })
}

/// Number of panics that were caught so far.
#[must_use]
pub fn contained_panics() -> u64 {
    CONTAINED.load(Ordering::Relaxed)
}
