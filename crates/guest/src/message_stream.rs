//! vhost-user messages on the socket: their framing, file descriptors and replies, and any other
//! bytes that a test sends.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::Error;

/// The size of a message header in bytes: request, flags and size of 32 bits each.
pub const VHOST_USER_HDR_SIZE: usize = 12;
/// `flags` of a message: protocol version 1.
pub const VHOST_USER_VERSION: u32 = 1;
/// `flags` of a message: it is a reply.
pub const VHOST_USER_REPLY_MASK: u32 = 4;
/// `flags` of a message: the front-end wants an acknowledgement (needs REPLY_ACK).
pub const VHOST_USER_NEED_REPLY_MASK: u32 = 8;
/// The size of the longest acceptable reply in bytes.
const MAX_REPLY_SIZE: usize = 4096;

/// The front-end's end of a vhost-user connection.
#[derive(Debug)]
pub struct MessageStream {
    socket: UnixStream,
}

impl MessageStream {
    /// A stream on a connected socket, with a time limit of 10 s for replies.
    ///
    /// # Errors
    /// When the socket does not accept a time limit.
    pub fn from_socket(socket: UnixStream) -> Result<Self, Error> {
        let mut stream = Self { socket };
        stream.set_timeout(Duration::from_secs(10))?;
        Ok(stream)
    }

    /// Connects to a listening back-end, with attempts for up to `connect_timeout`.
    ///
    /// # Errors
    /// When nothing listens within that time.
    pub fn connect(path: &Path, connect_timeout: Duration) -> Result<Self, Error> {
        let end = Instant::now() + connect_timeout;
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => return Self::from_socket(socket),
                Err(source) if Instant::now() >= end => {
                    return Err(Error::Connect {
                        path: path.to_owned(),
                        source,
                    });
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Sets the time limit for replies, which must not be 0.
    ///
    /// # Errors
    /// When the socket does not accept the time limit.
    pub fn set_timeout(&mut self, limit: Duration) -> Result<(), Error> {
        self.socket
            .set_read_timeout(Some(limit))
            .map_err(Error::io("cannot set the socket's time limit"))
    }

    /// The underlying socket.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a message with any request code and flags.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn send(
        &mut self,
        request: u32,
        flags: u32,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<(), Error> {
        let too_long = |_| Error::Config("a message is longer than 4 GiB");
        let size = u32::try_from(body.len()).map_err(too_long)?;
        let header = [request, flags, size].map(u32::to_ne_bytes).concat();
        self.send_bytes(&[&header, body].concat(), fds)
    }

    /// Sends any bytes, and the file descriptors with the first of them.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn send_bytes(&mut self, bytes: &[u8], fds: &[RawFd]) -> Result<(), Error> {
        let mut sent = 0;
        while sent < bytes.len() {
            let fds = if sent == 0 { fds } else { &[] };
            match self.socket.send_with_fds(&[&bytes[sent..]], fds) {
                Ok(n) => sent += n,
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => {
                    let source = std::io::Error::from_raw_os_error(error.errno());
                    return Err(Error::io("cannot send to the back-end")(source));
                }
            }
        }
        Ok(())
    }

    /// Reads the body of the reply to `request`.
    ///
    /// # Errors
    /// When no reply comes in time, or it is the reply to another request.
    pub fn reply(&mut self, request: u32) -> Result<Vec<u8>, Error> {
        let mut header = [0; VHOST_USER_HDR_SIZE];
        self.read(request, &mut header)?;
        let (fields, _) = header.as_chunks();
        let [code, flags, size] = [0, 1, 2].map(|at| u32::from_ne_bytes(fields[at]));
        let wrong = |what| Error::Reply { request, what };
        if code != request {
            return Err(wrong(format!("it is of request {code}")));
        }
        if flags != VHOST_USER_VERSION | VHOST_USER_REPLY_MASK {
            return Err(wrong(format!("flags {flags:#x}")));
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_REPLY_SIZE {
            return Err(wrong(format!("{size} bytes")));
        }
        let mut body = vec![0; size];
        self.read(request, &mut body)?;
        Ok(body)
    }

    /// Reads the reply to `request`, which must have no body and come with a descriptor.
    ///
    /// # Errors
    /// When no such reply comes in time.
    pub fn reply_with_fd(&mut self, request: u32) -> Result<File, Error> {
        let mut header = [0; VHOST_USER_HDR_SIZE];
        let wrong = |what: &str| Error::Reply {
            request,
            what: what.into(),
        };
        let received = self.socket.recv_with_fd(&mut header);
        let (len, fd) = received.map_err(|error| {
            let source = std::io::Error::from_raw_os_error(error.errno());
            Error::io("cannot receive from the back-end")(source)
        })?;
        if len == 0 {
            return Err(Error::HungUp(request));
        }
        let wanted = [request, VHOST_USER_VERSION | VHOST_USER_REPLY_MASK, 0];
        if len != header.len() || header[..] != wanted.map(u32::to_ne_bytes).concat()[..] {
            return Err(wrong("it is no empty reply"));
        }
        fd.ok_or_else(|| wrong("it has no descriptor"))
    }

    /// Waits until the back-end closes the connection.
    ///
    /// # Errors
    /// When it does not do so within the time limit for replies, or sends something instead.
    pub fn wait_hang_up(&mut self) -> Result<(), Error> {
        match self.read(0, &mut [0]) {
            Err(Error::HungUp(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(Error::Reply {
                request: 0,
                what: "it is not the reply to any request".into(),
            }),
        }
    }

    fn read(&mut self, request: u32, out: &mut [u8]) -> Result<(), Error> {
        self.socket
            .read_exact(out)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => Error::HungUp(request),
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::TimedOut(request),
                _ => Error::io("cannot receive from the back-end")(error),
            })
    }

    /// Reads the reply to `request`, which must have `N` bytes.
    pub(crate) fn reply_of<const N: usize>(&mut self, request: u32) -> Result<[u8; N], Error> {
        let reply = self.reply(request)?;
        let len = reply.len();
        reply.try_into().map_err(|_| Error::Reply {
            request,
            what: format!("{len} bytes, not {N}"),
        })
    }
}
