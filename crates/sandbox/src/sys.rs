//! The function that needs `unsafe`: installing a seccomp filter.
#![allow(unsafe_code)]

use std::io;

use seccompiler::sock_filter;

/// The program of a filter, as seccomp(2) takes it (linux/filter.h).
#[repr(C)]
struct SockFprog {
    len: u16,
    filter: *const sock_filter,
}

/// Restricts the calling thread by `filter`, in addition to the filters that it has. With `logs`
/// the kernel logs what the filter refuses.
///
/// Before Linux 5.16 a filter also makes the CPU forgo speculative store bypass, which slows down
/// the whole thread and protects programs that run foreign code. virtionetd runs none, so
/// SPEC_ALLOW declines it.
// syscalls: seccomp
pub(crate) fn install(filter: &[sock_filter], logs: bool) -> io::Result<()> {
    let program = SockFprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr(),
    };
    let log = if logs {
        libc::SECCOMP_FILTER_FLAG_LOG
    } else {
        0
    };
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW | log;
    // SAFETY: `program` describes `filter`, and both outlive the call, which only reads them and
    // checks the program.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    match rc {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
