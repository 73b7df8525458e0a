//! Functions that several groups share.

use std::fs;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, unshare};
use virtionet_tests::paths::require_root;
use virtionet_tests::process::output;
use virtionet_tests::sched;

/// The name of another build of virtionetd in results.
pub const OTHER_BUILD: &str = "the other build";

/// Prints a line about the progress of a run to stderr.
pub fn progress(text: &str) {
    eprintln!("bench: {text}");
}

/// Runs `work` in a thread with a network namespace of its own. The namespace ends with the thread
/// and the processes that it started.
///
/// # Errors
/// When this process is not root, or when `work` fails.
pub fn run_in_netns<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    require_root()?;
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace cannot be created")?;
        run_ip("link set lo up")?;
        disable_ipv6()?;
        work()
    };
    run_in_thread(inside)
}

/// Runs `work` in a thread of its own, so that changes to the thread (CPU affinity, namespace) end
/// with it.
///
/// # Errors
/// When `work` fails.
pub fn run_in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .map_err(|_| anyhow!("the thread of the measurement panicked"))?
}

/// Disables IPv6, because the kernel's neighbour discovery sends frames that a measurement does not
/// expect.
fn disable_ipv6() -> Result<()> {
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        if fs::exists(&path)? {
            fs::write(&path, "1").with_context(|| format!("{path} cannot be written"))?;
        }
    }
    Ok(())
}

/// Runs `ip ARGS` in the network namespace of this thread. The arguments are split at spaces.
///
/// # Errors
/// When `ip` fails. The error contains its stderr.
pub fn run_ip(args: &str) -> Result<()> {
    output("ip", args.split(' ')).map(drop)
}

/// Pins this thread to the last CPU that it may use, because the first CPUs serve most interrupts.
///
/// # Errors
/// When the kernel refuses the affinity.
pub fn pin_to_last_cpu() -> Result<()> {
    let cpus = sched::allowed_cpus()?;
    let last = cpus.last().context("this process has no CPU")?;
    sched::pin(0, *last)
}

/// Returns how many nanoseconds `work` takes.
///
/// # Errors
/// When `work` fails.
#[inline(always)]
pub fn time_ns(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started_at = Instant::now();
    work()?;
    Ok(started_at.elapsed().as_secs_f64() * 1e9)
}
