//! Functions that several groups use.

use std::fs;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, unshare};
use virtionet_tests::paths::require_root;
use virtionet_tests::process::output;
use virtionet_tests::sched;

/// Says on stderr how far a long run is.
pub fn progress(text: &str) {
    eprintln!("bench: {text}");
}

/// Runs `work` in a thread with a network namespace of its own, which is gone with the thread and
/// what it started.
///
/// # Errors
/// When this process is not root, or as `work`.
pub fn run_in_netns<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    require_root()?;
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace cannot be made")?;
        ip("link set lo up")?;
        disable_ipv6()?;
        work()
    };
    run_in_thread(inside)
}

/// Runs `work` in a thread of its own: what it does to its thread (CPU, namespace) ends with it.
///
/// # Errors
/// As `work`.
pub fn run_in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .map_err(|_| anyhow!("the thread of the measurement panicked"))?
}

/// The kernel's own neighbour discovery would send frames that the measurement does not expect.
fn disable_ipv6() -> Result<()> {
    for which in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        if fs::exists(&path)? {
            fs::write(&path, "1").with_context(|| format!("{path} cannot be written"))?;
        }
    }
    Ok(())
}

/// `ip ARGS`, split at spaces, in the namespace of this thread.
///
/// # Errors
/// When `ip` fails: with its words.
pub fn ip(args: &str) -> Result<()> {
    output("ip", args.split(' ')).map(drop)
}

/// Keeps this thread on the last CPU that it may use: the first ones take most interrupts.
///
/// # Errors
/// When the kernel refuses.
pub fn pin_to_last_cpu() -> Result<()> {
    let cpus = sched::allowed_cpus()?;
    let last = cpus.last().context("this process has no CPU")?;
    sched::pin(0, *last)
}

/// Nanoseconds that `work` takes.
///
/// # Errors
/// As `work`.
#[inline(always)]
pub fn time_ns(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started_at = Instant::now();
    work()?;
    Ok(started_at.elapsed().as_secs_f64() * 1e9)
}
