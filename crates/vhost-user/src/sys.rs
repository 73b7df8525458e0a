//! The functions that need `unsafe`: finding process and user of a socket's peer, and taking
//! inherited descriptors.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

/// The process at the other end of `stream`, or `None` when it runs in a PID namespace that this
/// process cannot see.
#[must_use]
pub fn peer_pid(stream: &UnixStream) -> Option<u32> {
    let peer = peer_credentials(stream)?;
    u32::try_from(peer.pid).ok().filter(|pid| *pid != 0)
}

/// The user that the process at the other end of `stream` had when it connected; `None` when the
/// kernel does not report it. In another user namespace it is the number that this namespace sees.
#[must_use]
pub fn peer_uid(stream: &UnixStream) -> Option<u32> {
    peer_credentials(stream).map(|peer| peer.uid)
}

/// The credentials of the process at the other end of `stream` (SO_PEERCRED).
// syscalls: getsockopt
fn peer_credentials(stream: &UnixStream) -> Option<libc::ucred> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = libc::socklen_t::try_from(size_of_val(&peer)).ok()?;
    // SAFETY: `peer` is `len` bytes of plain integers, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(peer)
}

/// Why an inherited descriptor cannot be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TakeFdError {
    /// It is stdin, stdout or stderr.
    #[error("descriptor {0} cannot be a vhost-user socket; pass one above 2")]
    StandardStream(RawFd),
    /// Two devices name the same descriptor.
    #[error("descriptor {0} is given twice; each device needs its own")]
    Twice(RawFd),
    /// There is no such descriptor.
    #[error("descriptor {0} is not open; the parent process must pass it on")]
    NotOpen(RawFd),
}

/// Takes a descriptor that this process inherited (`--fd N`), and makes the kernel close it on
/// exec. Call this before anything else is opened: afterwards a number that was not inherited could
/// be that of another descriptor.
///
/// # Errors
/// When the number was taken before, is that of stdin, stdout or stderr, or is not open.
// syscalls: fcntl
pub fn take_fd(number: RawFd) -> Result<OwnedFd, TakeFdError> {
    static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
    if number <= libc::STDERR_FILENO {
        return Err(TakeFdError::StandardStream(number));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(|poison| poison.into_inner());
    if taken.contains(&number) {
        return Err(TakeFdError::Twice(number));
    }
    // SAFETY: F_SETFD takes an integer; on a number that is not open it only fails.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(TakeFdError::NotOpen(number));
    }
    taken.push(number);
    // SAFETY: the descriptor is open (checked above), inherited rather than opened by this process
    // (by contract), and taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn peer_of_a_socket_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(peer_pid(&one), Some(std::process::id()));
        assert_eq!(peer_uid(&one), Some(rustix::process::geteuid().as_raw()));
    }

    #[test]
    fn descriptor_is_taken_only_once() {
        let (one, _other) = UnixStream::pair().unwrap();
        let number = one.into_raw_fd();
        let taken = take_fd(number).unwrap();
        assert!(take_fd(number).unwrap_err().to_string().contains("twice"));
        drop(taken);
        assert!(take_fd(2).unwrap_err().to_string().contains("above 2"));
        assert!(
            take_fd(1_000_000)
                .unwrap_err()
                .to_string()
                .contains("is not open")
        );
    }
}
