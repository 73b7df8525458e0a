//! The service manager that started this process, such as systemd, and what it is told
//! (sd_notify(3)).
//!
//! The socket is connected before the process is confined, because its main thread may not make
//! sockets later. Where there is no service manager, nothing is sent.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::process;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};

/// The environment variable that names the service manager's socket.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";
/// How long a message may take. The service manager reads them while it does nothing else.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// The connection with the service manager, if there is one.
#[derive(Debug, Default)]
pub struct ServiceManager {
    socket: Option<OwnedFd>,
}

impl ServiceManager {
    /// Connects to the service manager that started this process. If it cannot be reached, a line in
    /// the log says so.
    #[must_use]
    pub fn from_environment() -> Self {
        let Some(name) = std::env::var_os(SOCKET_VARIABLE) else {
            return Self::default();
        };
        Self::connect(&name).unwrap_or_else(|error| {
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
        })
    }

    /// This process serves its devices.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// This process serves the devices of the daemon before it, and is the main process of the service
    /// from now on.
    pub fn ready_as_successor(&self) {
        self.send(&format!("MAINPID={}\nREADY=1", process::id()));
    }

    /// This process is going to end.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    // syscalls: sendto
    fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = send(socket, message.as_bytes(), SendFlags::NOSIGNAL) {
            let message = message.replace('\n', " ");
            tracing::warn!(
                "the service manager does not take the message {message} ({error}); check the service that listens on {SOCKET_VARIABLE}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

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
