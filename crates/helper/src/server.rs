//! The helper's side: checks each request, and carries it out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, fstat, major, minor};
use virtionet_base::RateLimiter;
use virtionet_base::rights::{FileIdentity, LinkChange};
use virtionet_base::unix_socket::{self, Access};
use virtionet_placement::interrupts;
use virtionet_uplink::tap;

use crate::protocol::{Hello, Reply, Request, receive, send};
use crate::raw_path::RawPath;
use crate::rules::Rules;

/// The device number of `/dev/net/tun` (Linux's devices.txt).
const TUN_DEVICE: (u32, u32) = (10, 200);

/// A helper that knows its rules.
#[derive(Debug)]
pub struct Server {
    socket: OwnedFd,
    rules: Rules,
    refused_log_limit: RateLimiter,
}

/// Receives the rules. `None` when the daemon ended before it had sent them all.
///
/// # Errors
/// When what arrives is no rule.
pub fn take_rules(socket: OwnedFd) -> io::Result<Option<Server>> {
    let mut rules = Rules::default();
    while let Some((hello, _)) = receive(&socket)? {
        match hello {
            Hello::Allow(rule) => rules.add(rule),
            Hello::Serve => {
                return Ok(Some(Server {
                    socket,
                    rules,
                    refused_log_limit: RateLimiter::new(),
                }));
            }
        }
    }
    Ok(None)
}

impl Server {
    /// Whether the rules allow writing CPU masks.
    #[must_use]
    pub fn writes_affinity(&self) -> bool {
        self.rules.allows_affinity()
    }

    /// The sockets whose files the rules allow to remove.
    pub fn own_sockets(&self) -> impl Iterator<Item = &Path> {
        self.rules.own_sockets()
    }

    /// The folders in which the rules allow to make sockets.
    #[must_use]
    pub fn socket_folders(&self) -> Vec<PathBuf> {
        self.rules.socket_folders()
    }

    /// Serves requests until the daemon closes its end of the socket.
    ///
    /// # Errors
    /// When the socket fails, or something arrives that is no request.
    // syscalls: recvmsg sendmsg fstat ioctl(TUNSETIFF) socket read write connect openat
    // syscalls: statx unlink fchmod bind chmod listen
    pub fn serve(mut self) -> io::Result<()> {
        while let Some((request, fd)) = receive(&self.socket)? {
            let (reply, connection) = self.answer(&request, fd);
            let connection = connection.as_ref().map(AsFd::as_fd);
            send(self.socket.as_fd(), &reply, connection)?;
        }
        Ok(())
    }

    fn answer(&mut self, request: &Request, fd: Option<OwnedFd>) -> (Reply, Option<OwnedFd>) {
        if !self.rules.allow(request, |name| tap::find_index(name).ok()) {
            if let Some(suppressed) = self.refused_log_limit.allow() {
                tracing::warn!(
                    suppressed,
                    "helper: refused to {request}, because the configuration does not name it; allow it by --helper-allow if it is meant"
                );
            }
            return (not_permitted(), None);
        }
        match self.carry_out(request, fd) {
            Ok(done) => {
                tracing::debug!("helper: {request}: done");
                done
            }
            Err(error) => {
                tracing::debug!("helper: {request}: {error}");
                (error.into(), None)
            }
        }
    }

    fn carry_out(
        &mut self,
        request: &Request,
        fd: Option<OwnedFd>,
    ) -> io::Result<(Reply, Option<OwnedFd>)> {
        let done = |()| (Reply::Done, None);
        match request {
            Request::AttachTap { name } => self.attach_tap(name, fd).map(|reply| (reply, None)),
            Request::BringUp { name } => tap::change_own_link(name, &LinkChange::Up).map(done),
            Request::SetMtu { name, mtu } => {
                tap::change_own_link(name, &LinkChange::Mtu(*mtu)).map(done)
            }
            Request::JoinBridge { name, bridge } => {
                tap::change_own_link(name, &LinkChange::Port(bridge.clone())).map(done)
            }
            Request::WriteAffinity { file, text } => {
                interrupts::write_own(file.as_path(), text).map(done)
            }
            Request::Connect { path } => {
                connect(path).map(|connection| (Reply::Done, Some(connection)))
            }
            Request::Listen { path, mode } => listen(path.as_path(), *mode),
            Request::RemoveSocket {
                path,
                device,
                inode,
            } => {
                let (device, inode) = (*device, *inode);
                let identity = FileIdentity { device, inode };
                unix_socket::remove_own(path.as_path(), identity).map(done)
            }
        }
    }

    fn attach_tap(&mut self, name: &str, tun: Option<OwnedFd>) -> io::Result<Reply> {
        let tun = tun.ok_or(io::ErrorKind::InvalidInput)?;
        if !is_tun(tun.as_fd())? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let name = tap::attach_own(tun.as_fd(), name)?;
        self.rules.remember_tap(tap::find_index(&name)?);
        Ok(Reply::Attached { name })
    }
}

fn not_permitted() -> Reply {
    Reply::from(io::Error::from(rustix::io::Errno::PERM))
}

fn connect(path: &RawPath) -> io::Result<OwnedFd> {
    unix_socket::connect_own(path.as_path()).map(OwnedFd::from)
}

fn listen(path: &Path, mode: u32) -> io::Result<(Reply, Option<OwnedFd>)> {
    let access = Access {
        mode: Some(mode),
        group: None,
    };
    let (socket, file) = unix_socket::listen_own(path, &access).map_err(io::Error::from)?;
    // The file is the daemon's, which lets it be removed.
    let FileIdentity { device, inode } = file.into_identity();
    Ok((Reply::Listening { device, inode }, Some(socket.into())))
}

/// Whether `fd` is an open `/dev/net/tun`.
fn is_tun(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = fstat(fd)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    Ok(is_device && (major(stat.st_rdev), minor(stat.st_rdev)) == TUN_DEVICE)
}
