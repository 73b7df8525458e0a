//! The one call that needs `unsafe`: a setting of the C library's allocator.
#![allow(unsafe_code)]

/// Keeps the allocator to one arena. By default each thread that allocates gets one of its own, tens
/// of KiB a worker; workers allocate next to nothing once they run. To be called before any thread
/// is started.
pub fn use_one_arena() {
    // SAFETY: mallopt takes two integers and is called while the process has one thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
