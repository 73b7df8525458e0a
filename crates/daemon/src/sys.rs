//! The functions that need `unsafe`: a setting of the C library's allocator, and the CPU's
//! time-stamp counter.
#![allow(unsafe_code)]

/// Reads the CPU's time-stamp counter, by which work is measured. A read costs a few dozen cycles.
/// The counter runs at a constant rate on every CPU that can run guests.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[must_use]
pub fn read_cycles() -> u64 {
    // SAFETY: every x86_64 CPU has this instruction, and Linux lets user space run it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Reads the time in nanoseconds, on CPUs without such a counter.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
pub fn read_cycles() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Limits the allocator to one arena. By default each thread that allocates gets an arena of its
/// own, which costs tens of KiB for each worker, although a running worker allocates hardly any
/// memory. Call this before any thread is started.
pub fn limit_malloc_arenas() {
    // SAFETY: mallopt takes two integers and is called while the process has one thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
