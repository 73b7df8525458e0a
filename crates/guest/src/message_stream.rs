//! vhost-user messages on the socket: framing, descriptors, replies, and whatever else a test
//! wants to put there.

use std::io::{ErrorKind, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::Error;

/// Bytes of a message header: request, flags, size, 32 bits each.
pub const VHOST_USER_HDR_SIZE: usize = 12;
/// Message flag: protocol version 1.
pub const VHOST_USER_VERSION: u32 = 1;
/// Message flag: this is a reply.
pub const VHOST_USER_REPLY_MASK: u32 = 4;
/// Message flag: an acknowledgement is wanted (needs REPLY_ACK).
pub const VHOST_USER_NEED_REPLY_MASK: u32 = 8;
/// The longest reply that is believed.
const MAX_REPLY: usize = 4096;

/// One end of a vhost-user connection.
#[derive(Debug)]
pub struct MessageStream {
    socket: UnixStream,
}

impl MessageStream {
    /// Over a connected socket; replies are awaited for 10 s.
    ///
    /// # Errors
    /// When the socket takes no time limit.
    pub fn from_socket(socket: UnixStream) -> Result<Self, Error> {
        let mut wire = Self { socket };
        wire.set_timeout(Duration::from_secs(10))?;
        Ok(wire)
    }

    /// Connects to a listening back-end, trying for up to `patience`.
    ///
    /// # Errors
    /// When nobody listens in that time.
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

    /// How long a reply is awaited (not 0).
    ///
    /// # Errors
    /// When the socket takes no time limit.
    pub fn set_timeout(&mut self, limit: Duration) -> Result<(), Error> {
        self.socket
            .set_read_timeout(Some(limit))
            .map_err(Error::io("cannot set the socket's time limit"))
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a message of any request code and flags.
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

    /// Sends any bytes, descriptors with the first of them.
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

    /// Reads the body of a reply to `request`.
    ///
    /// # Errors
    /// When none comes, or it is a reply to something else.
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
        if size > MAX_REPLY {
            return Err(wrong(format!("{size} bytes")));
        }
        let mut body = vec![0; size];
        self.read(request, &mut body)?;
        Ok(body)
    }

    /// Waits for the back-end to hang up.
    ///
    /// # Errors
    /// When it does not in the time that replies have, or sends something instead.
    pub fn wait_hang_up(&mut self) -> Result<(), Error> {
        match self.read(0, &mut [0]) {
            Err(Error::HungUp(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(Error::Reply {
                request: 0,
                what: "it was not asked for".into(),
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

    pub(crate) fn reply_of<const N: usize>(&mut self, request: u32) -> Result<[u8; N], Error> {
        let reply = self.reply(request)?;
        let len = reply.len();
        reply.try_into().map_err(|_| Error::Reply {
            request,
            what: format!("{len} bytes, not {N}"),
        })
    }
}
