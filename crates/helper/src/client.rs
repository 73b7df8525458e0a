//! The daemon's side: sends requests, and waits for the replies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use virtionet_base::rights::{FileIdentity, Helper, LinkChange};

use crate::protocol::{Hello, Reply, Request, receive, send};
use crate::rule::Rule;

/// How long one message may take to be sent, and a reply to arrive. The kernel carries out a
/// request in less than a millisecond, unless it waits for another change of the network's
/// configuration.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The connection to the helper. Clones share it.
#[derive(Debug, Clone)]
pub struct Client(Arc<Mutex<Connection>>);

#[derive(Debug)]
enum Connection {
    /// The helper answers.
    Open(OwnedFd),
    /// It has ended, or did not answer in time.
    Lost,
}

impl Client {
    /// Sends `rules` to the helper at the other end of `socket`, which serves requests from then
    /// on.
    ///
    /// # Errors
    /// When the helper has ended.
    pub fn new(socket: OwnedFd, rules: impl IntoIterator<Item = Rule>) -> io::Result<Self> {
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, direction, Some(TIMEOUT))?;
        }
        let rules = rules.into_iter().map(Hello::Allow);
        for hello in rules.chain([Hello::Serve]) {
            send(socket.as_fd(), &hello, None)?;
        }
        Ok(Self(Arc::new(Mutex::new(Connection::Open(socket)))))
    }

    /// Whether the helper is there, as far as that is known.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(*self.0.lock(), Connection::Open(_))
    }

    /// Closes the connection, upon which a helper that is still there ends. Returns whether it was
    /// open.
    pub fn close(&self) -> bool {
        let before = std::mem::replace(&mut *self.0.lock(), Connection::Lost);
        matches!(before, Connection::Open(_))
    }

    /// Sends `request`, with `fd`, and waits for the reply; `None` when there is no helper any
    /// more.
    fn call(
        &self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Option<io::Result<(Reply, Option<OwnedFd>)>> {
        let mut connection = self.0.lock();
        let Connection::Open(socket) = &*connection else {
            return None;
        };
        let exchanged = send(socket.as_fd(), request, fd).and_then(|()| receive(socket.as_fd()));
        let failure = match exchanged {
            Ok(Some((Reply::Failed { errno }, _))) => {
                return Some(Err(io::Error::from_raw_os_error(errno)));
            }
            Ok(Some(reply)) => return Some(Ok(reply)),
            Ok(None) => "it has ended".into(),
            Err(error) => error.to_string(),
        };
        *connection = Connection::Lost;
        drop(connection);
        tracing::error!(
            "the helper does not answer any more ({failure}), so it cannot {request}; restart virtionetd when that suits its guests"
        );
        None
    }
}

fn unexpected() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

impl Helper for Client {
    fn attach_tap(&self, tun: BorrowedFd<'_>, name: &str) -> Option<io::Result<String>> {
        let request = Request::AttachTap { name: name.into() };
        let reply = self.call(&request, Some(tun))?;
        Some(reply.and_then(|(reply, _)| match reply {
            Reply::Attached { name } => Ok(name),
            _ => Err(unexpected()),
        }))
    }

    fn change_link(&self, name: &str, change: &LinkChange) -> Option<io::Result<()>> {
        let reply = self.call(&Request::change_link(name, change), None)?;
        Some(reply.map(drop))
    }

    fn write_affinity(&self, file: &Path, text: &str) -> Option<io::Result<()>> {
        let (file, text) = (file.into(), text.into());
        let reply = self.call(&Request::WriteAffinity { file, text }, None)?;
        Some(reply.map(drop))
    }

    fn connect(&self, path: &Path) -> Option<io::Result<UnixStream>> {
        let reply = self.call(&Request::Connect { path: path.into() }, None)?;
        Some(reply.and_then(|(_, fd)| fd.map(UnixStream::from).ok_or_else(unexpected)))
    }

    fn listen(&self, path: &Path, mode: u32) -> Option<io::Result<(UnixListener, FileIdentity)>> {
        let path = path.into();
        let reply = self.call(&Request::Listen { path, mode }, None)?;
        Some(reply.and_then(|reply| match reply {
            (Reply::Listening { device, inode }, Some(fd)) => {
                Ok((fd.into(), FileIdentity { device, inode }))
            }
            _ => Err(unexpected()),
        }))
    }

    fn remove_socket(&self, path: &Path, identity: FileIdentity) -> Option<io::Result<()>> {
        let FileIdentity { device, inode } = identity;
        let path = path.into();
        let request = Request::RemoveSocket {
            path,
            device,
            inode,
        };
        let reply = self.call(&request, None)?;
        Some(reply.map(drop))
    }
}
