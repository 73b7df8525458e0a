//! The function that needs `unsafe`: opening the file of a bound unix socket.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Opens the file of a bound unix socket (O_PATH) by the socket (Linux 4.10; the C library does not
/// define it).
const SIOCUNIXFILE: libc::Ioctl = 0x89e0;

/// Opens the file that binding `socket` created, as a path descriptor. The kernel takes it from the
/// socket, so no other file can be in its place.
///
/// # Errors
/// When this process does not have CAP_NET_ADMIN, or the kernel does not have this operation.
// syscalls: ioctl
pub(crate) fn open_file_of(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the operation takes no argument and only returns a new descriptor.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
