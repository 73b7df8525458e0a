//! What needs `unsafe`: a setting of the C library's allocator, the CPU's time-stamp counter, and
//! the signal that interrupts a blocked write.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

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

/// Closes all descriptors of this process above `last`, which it inherited and knows nothing of.
/// Before Linux 5.9 they stay open.
pub fn close_all_above(last: BorrowedFd<'_>) {
    let first = libc::c_long::from(last.as_raw_fd()) + 1;
    // SAFETY: takes three integers. The caller has opened none of these descriptors.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_long::from(u32::MAX),
            0,
        )
    };
}

/// The signal that interrupts a blocked write. Nothing else in this process uses it.
const INTERRUPT: libc::c_int = libc::SIGUSR2;

/// Installs a handler for [`interrupt_thread`]'s signal that does nothing, and after which system
/// calls are not restarted.
///
/// # Errors
/// When the kernel refuses it.
pub fn install_interrupt_handler() -> io::Result<()> {
    extern "C" fn ignore(_signal: libc::c_int) {}
    // SAFETY: a zeroed `sigaction` is valid: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: `action` outlives the call, and its handler only returns.
    match unsafe { libc::sigaction(INTERRUPT, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Interrupts the system call in which thread `tid` of this process sleeps, if it does.
pub fn interrupt_thread(tid: i32) {
    // SAFETY: takes three integers; a thread that is gone gives an error, which does not matter.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, INTERRUPT) };
}

/// Memory barriers that one thread issues on behalf of all threads of this process (membarrier(2)).
#[derive(Debug)]
pub struct ProcessBarrier(());

impl ProcessBarrier {
    // linux/membarrier.h
    const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

    /// Registers this process; `None` where the kernel does not have these barriers.
    #[must_use]
    pub fn new() -> Option<Self> {
        Self::call(Self::REGISTER_PRIVATE_EXPEDITED).then_some(Self(()))
    }

    /// Makes each thread that runs pass a full barrier before this returns. False when the kernel
    /// refuses.
    #[must_use]
    pub fn issue(&self) -> bool {
        Self::call(Self::PRIVATE_EXPEDITED)
    }

    fn call(command: libc::c_int) -> bool {
        // SAFETY: takes three integers.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }
}
