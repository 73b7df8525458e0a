//! What a hostile front-end does with descriptors that it has handed over, for tests and fuzzing.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::eventfd::WaitableEventFd;

/// The largest value of an eventfd's counter: a write that adds to it blocks or fails.
const MAX_COUNT: u64 = u64::MAX - 1;

/// Makes `fd` blocking for every process that shares it.
///
/// # Errors
/// When it is not an open descriptor.
pub fn make_blocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFL takes an integer.
    match unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Fills the counter of `event` and makes it blocking, so that the next write of the device to it
/// blocks until a process reads it.
///
/// # Errors
/// When the kernel refuses.
pub fn block_writes(event: &WaitableEventFd) -> io::Result<()> {
    let _ = event.try_read();
    event.add(MAX_COUNT)?;
    make_blocking(event.as_raw_fd())
}

/// Forbids further seals on a memfd, so that a device cannot seal it against shrinking.
///
/// # Errors
/// When it is not a memfd that takes seals.
pub fn forbid_seals(file: &File) -> io::Result<()> {
    // SAFETY: F_ADD_SEALS takes an integer.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SEAL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A TCP connection to this process whose close waits for `linger`, because its peer does not read
/// what was written. The result is the socket, and what must live as long as it.
///
/// # Errors
/// When there is no loopback interface.
pub fn slow_closing_socket(linger: Duration) -> io::Result<(OwnedFd, impl Sized)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut socket = TcpStream::connect(listener.local_addr()?)?;
    let (peer, _) = listener.accept()?;
    socket.set_nonblocking(true)?;
    let data = vec![0; 1 << 20];
    while socket.write(&data).is_ok() {}
    socket.set_nonblocking(false)?;
    let option = libc::linger {
        l_onoff: 1,
        l_linger: i32::try_from(linger.as_secs()).unwrap_or(i32::MAX),
    };
    let len = libc::socklen_t::try_from(size_of_val(&option)).unwrap_or(0);
    // SAFETY: `option` is `len` bytes and outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const option).cast(),
            len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((socket.into(), (listener, peer)))
}
