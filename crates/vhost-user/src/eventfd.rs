//! Checks of the eventfds with which driver and device notify each other.

use std::fs::read_link;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::foreign_fd::ForeignFd;

/// The name of an eventfd in /proc.
const EVENTFD: &str = "anon_inode:[eventfd]";

/// Accepts `fd` if it is an eventfd, and makes it non-blocking, so that neither a write to a full
/// eventfd nor a read of an empty one can block a thread.
///
/// The error names what `fd` is instead. No other kind of file is accepted, because reading it
/// could block (a pipe, a terminal), never end (/dev/zero) or have another meaning (a socket).
pub(crate) fn from_fd(foreign: ForeignFd) -> Result<Arc<OwnedFd>, String> {
    let fd = foreign.as_fd().ok_or("no descriptor")?;
    // syscalls: readlink
    match read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(target) if target.as_os_str() == EVENTFD => {}
        Ok(target) => return Err(target.display().to_string()),
        Err(error) => return Err(format!("a descriptor that /proc does not show ({error})")),
    }
    // syscalls: fcntl
    fcntl_getfl(fd)
        .and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK))
        .map_err(|error| format!("a descriptor that cannot be made non-blocking ({error})"))?;
    // Closing an eventfd never blocks.
    let fd = foreign.into_known().ok_or("no descriptor")?;
    Ok(Arc::new(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::eventfd;
    use std::fs::File;

    #[test]
    fn blocking_eventfd_becomes_non_blocking() {
        let fd = from_fd(ForeignFd::new(eventfd(0))).unwrap();
        assert!(fcntl_getfl(&fd).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn descriptor_that_is_not_an_eventfd_is_refused_with_its_name() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        for (fd, want) in [
            (OwnedFd::from(File::open("/dev/zero").unwrap()), "/dev/zero"),
            (OwnedFd::from(File::open("/").unwrap()), "/"),
            (OwnedFd::from(reader), "pipe:"),
            (OwnedFd::from(socket), "socket:"),
        ] {
            let found = from_fd(ForeignFd::new(fd)).unwrap_err();
            assert!(found.starts_with(want), "{found}");
        }
    }
}
