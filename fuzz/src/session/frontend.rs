//! The front-end's end of a session, and the thread that serves it.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtionet_net_device::net_device::NetDevice;
use virtionet_vhost_user::{SessionLog, serve};

use super::files::Files;
use super::message::{Framing, Message};
use crate::requests::{GET_FEATURES, SET_LOG_BASE};

/// The longest time that the session may take for one message, or to end. On a loaded machine it
/// may have to wait for a CPU, so this is more than any limit of the session itself.
const LIMIT: Duration = Duration::from_secs(8);
/// The most descriptors of a message.
const MAX_FDS: usize = 64;

/// Never signalled.
static NEVER: LazyLock<OwnedFd> = LazyLock::new(|| eventfd(0, EventfdFlags::CLOEXEC).unwrap());

/// A connected front-end.
pub struct Frontend {
    socket: UnixStream,
    session: JoinHandle<()>,
    /// Whether the session has not ended as far as is known.
    is_connected: bool,
    /// Number of requests GET_FEATURES without a reply so far.
    expected: usize,
}

impl Frontend {
    /// Connects to the device.
    pub fn connect(device: &Arc<NetDevice>) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.set_write_timeout(Some(LIMIT)).unwrap();
        let device = Arc::clone(device);
        let session = thread::spawn(move || {
            // Every error is a legitimate end.
            let _end = serve(
                theirs,
                &*device,
                NEVER.as_fd(),
                None,
                &SessionLog::default(),
            );
        });
        Self {
            socket,
            session,
            is_connected: true,
            expected: 0,
        }
    }

    /// Whether the session has not ended as far as is known.
    pub fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// Sends a message without waiting for the session.
    pub fn send(&mut self, message: &Message, files: &Files) {
        let bytes = message.to_bytes();
        let kinds = message.fds.iter();
        let fds: Vec<_> = kinds
            .map(|kind| files.fd(*kind, message.suitable))
            .collect();
        self.send_bytes(&bytes, &fds, message.framing == Framing::InTwoParts);
        if message.code == GET_FEATURES {
            self.expected += 1;
        }
        if message.ends_stream() {
            // The session would wait for the rest of the message.
            let _ended = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Sends a message with one descriptor of the front-end's own.
    pub fn send_fd(&mut self, message: &Message, fd: BorrowedFd<'_>) {
        self.send_bytes(&message.to_bytes(), &[fd], false);
    }

    fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>], in_two_parts: bool) {
        if !self.is_connected {
            return;
        }
        let cut = match in_two_parts {
            true => bytes.len() / 2,
            false => 0,
        };
        let (first, second) = bytes.split_at(cut);
        let sent = match first {
            [] => self.try_send(second, fds),
            _ => self
                .try_send(first, &[])
                .and_then(|()| self.try_send(second, fds)),
        };
        match sent {
            Ok(()) => {}
            Err(error) if is_end(&error) => self.is_connected = false,
            Err(error) => panic!("the session does not read: {error}"),
        }
    }

    fn try_send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let mut left = bytes;
        while !left.is_empty() {
            let parts = [IoSlice::new(left)];
            let sent = sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
            left = &left[sent..];
            control.clear();
        }
        Ok(())
    }

    /// Waits until the session has handled all messages, or has ended.
    ///
    /// # Panics
    /// When it does neither within [`LIMIT`].
    pub fn wait_until_handled(&mut self) {
        self.send_bytes(&Message::new(GET_FEATURES, &[]).to_bytes(), &[], false);
        self.expected += 1;
        while self.is_connected && self.expected > 0 {
            let (mut header, mut payload) = ([0; 12], [0; 16]);
            let read = self.socket.read_exact(&mut header).and_then(|()| {
                let [code, flags, size] = [0, 4, 8].map(|at| word(&header, at));
                let wanted = if code == SET_LOG_BASE { 16 } else { 8 };
                assert_eq!((flags, size), (5, wanted), "a reply has another form");
                let payload = &mut payload[..usize::try_from(wanted).unwrap()];
                self.socket.read_exact(payload).map(|()| code)
            });
            match read {
                Ok(code) => {
                    self.expected -= usize::from(code == GET_FEATURES);
                }
                Err(error) if is_end(&error) => self.is_connected = false,
                Err(error) => panic!("the session neither answers nor ends: {error}"),
            }
        }
    }

    /// Disconnects, and waits until the session has ended.
    ///
    /// # Panics
    /// When it does not end within [`LIMIT`], or has panicked.
    pub fn disconnect(self) {
        let _ended = self.socket.shutdown(Shutdown::Both);
        drop(self.socket);
        let deadline = Instant::now() + LIMIT;
        while !self.session.is_finished() {
            assert!(Instant::now() < deadline, "the session does not end");
            thread::sleep(Duration::from_micros(50));
        }
        self.session.join().expect("the session panicked");
    }
}

/// Whether the session has closed the connection.
fn is_end(error: &io::Error) -> bool {
    use ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::UnexpectedEof | Kind::BrokenPipe | Kind::ConnectionReset | Kind::NotConnected
    )
}

fn word(bytes: &[u8; 12], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
