//! The service manager that started this process, such as systemd, and the notifications for it
//! (sd_notify(3)).
//!
//! systemd also keeps open files for the next start of the service, in its file descriptor store.
//!
//! The socket is connected before the process is confined, because its main thread may not make
//! sockets later. Where there is no service manager, nothing is sent.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::process;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};

/// The environment variable that names the service manager's socket.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";
/// The environment variable with the number of descriptors that the service manager keeps. systemd sets
/// it since version 254; a unit for an older one sets it itself.
const STORE_VARIABLE: &str = "FDSTORE";
/// How long a message may take. The service manager reads them while it does nothing else.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// The connection with the service manager, if there is one.
#[derive(Debug, Default)]
pub struct ServiceManager {
    socket: Option<OwnedFd>,
    /// Whether it keeps descriptors for the next start.
    keeps_descriptors: bool,
}

impl ServiceManager {
    /// Connects to the service manager that started this process. If it cannot be reached, a line in
    /// the log says so.
    #[must_use]
    pub fn from_environment() -> Self {
        let Some(name) = std::env::var_os(SOCKET_VARIABLE) else {
            return Self::default();
        };
        let stored = std::env::var(STORE_VARIABLE).unwrap_or_default();
        let keeps_descriptors = stored.parse().unwrap_or(0_u32) > 0;
        let connected = Self::connect(&name).map(|manager| Self {
            keeps_descriptors,
            ..manager
        });
        connected.unwrap_or_else(|error| {
            tracing::warn!(
                "the service manager cannot be reached at {} ({error}), and does not learn that virtionetd is ready; check {SOCKET_VARIABLE}",
                name.display()
            );
            Self::default()
        })
    }

    /// Connects to the socket `name`: an absolute path, or an abstract name behind an `@`.
    // syscalls: socket setsockopt connect
    fn connect(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', abstract_name @ ..] => SocketAddrUnix::new_abstract_name(abstract_name)?,
            [b'/', ..] => SocketAddrUnix::new(name)?,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        let kind = (AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC);
        let socket = socket_with(kind.0, kind.1, kind.2, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(SEND_TIMEOUT))?;
        connect(&socket, &address)?;
        Ok(Self {
            socket: Some(socket),
            keeps_descriptors: false,
        })
    }

    /// This process serves its devices.
    pub fn ready(&self) {
        self.send("READY=1", None);
    }

    /// This process serves the devices of the daemon before it, and is the main process of the service
    /// from now on.
    pub fn ready_as_successor(&self) {
        self.send(&format!("MAINPID={}\nREADY=1", process::id()), None);
    }

    /// This process is going to end.
    pub fn stopping(&self) {
        self.send("STOPPING=1", None);
    }

    /// Whether it keeps descriptors for the next start of the service.
    #[must_use]
    pub fn keeps_descriptors(&self) -> bool {
        self.keeps_descriptors
    }

    /// Lets it keep `fd` for the next start of the service, which gets it under this name: up to 255
    /// ASCII characters without a colon. It keeps the same open file once only.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), Some(fd));
    }

    /// Lets it close what it keeps under this name.
    pub fn discard(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
    }

    // syscalls: sendmsg
    fn send(&self, message: &str, fd: Option<BorrowedFd<'_>>) {
        let Some(socket) = &self.socket else { return };
        let fds = fd.as_slice();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let text = [IoSlice::new(message.as_bytes())];
        if let Err(error) = sendmsg(socket, &text, &mut ancillary, SendFlags::NOSIGNAL) {
            let message = message.replace('\n', " ");
            tracing::warn!(
                "the service manager does not take the message {message} ({error}); check the service that listens on {SOCKET_VARIABLE}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::IoSliceMut;
    use std::os::fd::AsFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 100];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    fn check(name: &str, socket: &UnixDatagram) {
        let manager = ServiceManager::connect(OsStr::new(name)).unwrap();
        manager.ready();
        assert_eq!(received(socket), "READY=1");
        manager.ready_as_successor();
        let expected = format!("MAINPID={}\nREADY=1", process::id());
        assert_eq!(received(socket), expected);
        manager.stopping();
        assert_eq!(received(socket), "STOPPING=1");
        manager.discard("tap=t0");
        assert_eq!(received(socket), "FDSTOREREMOVE=1\nFDNAME=tap=t0");
    }

    #[test]
    fn descriptor_arrives_with_its_name() {
        let path = std::env::temp_dir().join(format!("virtionetd-store-{}", process::id()));
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = ServiceManager::connect(path.as_os_str()).unwrap();
        let own = File::open(std::env::current_exe().unwrap()).unwrap();
        manager.keep("tap=t0", own.as_fd());
        let mut text = [0; 100];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut text)],
            &mut ancillary,
            RecvFlags::empty(),
        )
        .unwrap();
        assert_eq!(&text[..received.bytes], b"FDSTORE=1\nFDNAME=tap=t0");
        let message = ancillary.drain().next().unwrap();
        let RecvAncillaryMessage::ScmRights(mut fds) = message else {
            panic!("it has no descriptor");
        };
        let kept = File::from(fds.next().unwrap());
        assert_eq!(
            kept.metadata().unwrap().ino(),
            own.metadata().unwrap().ino()
        );
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn messages_arrive_at_a_path_and_at_an_abstract_name() {
        let path = std::env::temp_dir().join(format!("virtionetd-notify-{}", process::id()));
        let socket = UnixDatagram::bind(&path).unwrap();
        check(path.to_str().unwrap(), &socket);
        std::fs::remove_file(path).unwrap();
        let name = format!("virtionetd-notify-{}", process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        check(&format!("@{name}"), &socket);
    }

    #[test]
    fn nothing_is_sent_without_a_service_manager_and_another_address_is_refused() {
        ServiceManager::default().ready();
        for name in ["", "relative", "vsock:2:1", "/nowhere/notify"] {
            assert!(ServiceManager::connect(OsStr::new(name)).is_err(), "{name}");
        }
    }

    /// A service manager that is gone, or does not read, costs one line in the log and no more.
    #[test]
    fn message_that_is_not_taken_is_logged() {
        let path = std::env::temp_dir().join(format!("virtionetd-gone-{}", process::id()));
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = ServiceManager::connect(path.as_os_str()).unwrap();
        std::fs::remove_file(path).unwrap();
        drop(socket);
        let ((), log) = virtionet_guest::log_lines::with_log(|| manager.ready());
        assert!(log.contains("does not take the message READY=1"), "{log}");
    }
}
