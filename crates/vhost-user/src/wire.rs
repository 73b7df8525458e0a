//! Messages on the socket: a 12-byte header, up to 4 KiB of payload, and up to 32 descriptors.
//!
//! A read never crosses the end of a message, so that descriptors stay with the message with which
//! they came, however the front-end splits or joins its writes. Only `poll` blocks, and it also
//! watches a stop descriptor.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
    sockopt,
};
use vhost::vhost_user::message::VhostUserHeaderFlag;

use crate::error::{ProtocolError, SessionError};
use crate::limits::MAX_FDS;
pub use crate::limits::MAX_PAYLOAD;

/// The size of a header in bytes.
pub const HEADER_SIZE: usize = 12;

/// The only version of the protocol.
const VERSION: u32 = 1;

/// The header of a request, after all checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The request's number.
    pub code: u32,
    /// Whether the front-end asks for an acknowledgement (valid once REPLY_ACK is negotiated).
    pub need_reply: bool,
    /// The size of the payload in bytes, at most [`MAX_PAYLOAD`].
    pub size: usize,
}

impl Header {
    /// Reads a header (host byte order). Flags that the protocol reserves are ignored.
    ///
    /// # Errors
    /// When the version is wrong, the message is a reply, or its payload is too long.
    pub fn parse(bytes: [u8; HEADER_SIZE]) -> Result<Self, ProtocolError> {
        let [code, flags, size] = words(bytes);
        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION {
            return Err(ProtocolError::Version(version));
        }
        if flags & VhostUserHeaderFlag::REPLY.bits() != 0 {
            return Err(ProtocolError::Reply(code));
        }
        let size = usize::try_from(size)
            .ok()
            .filter(|size| *size <= MAX_PAYLOAD)
            .ok_or(ProtocolError::TooLong { code, size })?;
        Ok(Self {
            code,
            need_reply: flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0,
            size,
        })
    }
}

fn words([a, b, c, d, e, f, g, h, i, j, k, l]: [u8; HEADER_SIZE]) -> [u32; 3] {
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}

/// A received message. Dropping it closes the descriptors that were not taken out of it.
#[derive(Debug)]
pub struct Message {
    /// The header.
    pub header: Header,
    /// The payload of `header.size` bytes.
    pub payload: Vec<u8>,
    /// The descriptors that came with the message, in order.
    pub fds: Vec<OwnedFd>,
}

/// The payload of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyPayload {
    /// A number. In an acknowledgement, 0 means success.
    U64(u64),
    /// A vring and its base (GET_VRING_BASE).
    VringState {
        /// The vring's index.
        index: u32,
        /// The base at which it would continue.
        num: u32,
    },
}

/// A reply to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// The request's number.
    pub code: u32,
    /// The payload of the reply.
    pub payload: ReplyPayload,
}

impl Reply {
    /// Converts the reply to a header and 8 bytes of payload, as all replies of a network device
    /// have.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_SIZE + 8] {
        let payload: [u8; 8] = match self.payload {
            ReplyPayload::U64(value) => value.to_ne_bytes(),
            ReplyPayload::VringState { index, num } => join([index, num]),
        };
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let mut bytes = [0; HEADER_SIZE + 8];
        bytes[..4].copy_from_slice(&self.code.to_ne_bytes());
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&8u32.to_ne_bytes());
        bytes[12..].copy_from_slice(&payload);
        bytes
    }
}

fn join(words: [u32; 2]) -> [u8; 8] {
    let mut bytes = [0; 8];
    let (low, high) = bytes.split_at_mut(4);
    low.copy_from_slice(&words[0].to_ne_bytes());
    high.copy_from_slice(&words[1].to_ne_bytes());
    bytes
}

/// The outcome of waiting for a message.
#[derive(Debug)]
pub(crate) enum Incoming {
    Message(Message),
    /// The front-end closed the connection between two messages.
    Closed,
    /// The stop descriptor is readable.
    Stopped,
}

/// The result of reading a number of bytes.
enum Filled {
    Complete,
    /// The front-end closed the connection after this many bytes.
    Closed(usize),
    Stopped,
}

/// A connected socket, and the descriptor that ends every wait on it.
#[derive(Debug)]
pub(crate) struct Channel<'s> {
    stream: UnixStream,
    stop: BorrowedFd<'s>,
}

impl<'s> Channel<'s> {
    pub(crate) fn new(stream: UnixStream, stop: BorrowedFd<'s>) -> io::Result<Self> {
        // Credentials would take space that descriptors need; an inherited socket may ask for them.
        // syscalls: setsockopt
        sockopt::set_socket_passcred(&stream, false)?;
        Ok(Self { stream, stop })
    }

    /// Waits for the next message.
    pub(crate) fn receive(&self) -> Result<Incoming, SessionError> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_SIZE];
        match self.fill(&mut header, &mut fds)? {
            Filled::Complete => {}
            Filled::Closed(0) => return Ok(Incoming::Closed),
            Filled::Closed(_) => return Err(ProtocolError::Truncated.into()),
            Filled::Stopped => return Ok(Incoming::Stopped),
        }
        let header = Header::parse(header)?;
        let mut payload = vec![0; header.size];
        match self.fill(&mut payload, &mut fds)? {
            Filled::Complete => Ok(Incoming::Message(Message {
                header,
                payload,
                fds,
            })),
            Filled::Closed(_) => Err(ProtocolError::Truncated.into()),
            Filled::Stopped => Ok(Incoming::Stopped),
        }
    }

    /// Sends a reply. Returns false when the session was stopped while the socket was full, or the
    /// front-end has disconnected.
    pub(crate) fn send(&self, reply: Reply) -> io::Result<bool> {
        let bytes = reply.to_bytes();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            if !self.wait(PollFlags::OUT)? {
                return Ok(false);
            }
            // syscalls: sendto
            match send(
                &self.stream,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Reads until `buffer` is full, and collects the descriptors that come with the bytes.
    fn fill(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<Filled, SessionError> {
        let mut filled = 0;
        while filled < buffer.len() {
            if !self.wait(PollFlags::IN)? {
                return Ok(Filled::Stopped);
            }
            match receive_some(&self.stream, &mut buffer[filled..], fds)? {
                Some(0) => return Ok(Filled::Closed(filled)),
                Some(n) => filled += n,
                None => {}
            }
        }
        Ok(Filled::Complete)
    }

    /// Sleeps until the socket is ready. Returns false when the session must stop.
    fn wait(&self, events: PollFlags) -> io::Result<bool> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.stop, PollFlags::IN),
            PollFd::new(&self.stream, events),
        ];
        loop {
            // syscalls: poll
            match poll(&mut fds, None) {
                Ok(_) => return Ok(fds[0].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Reads once. Returns 0 bytes at the end of the connection, and `None` when there was nothing to
/// read.
fn receive_some(
    stream: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, SessionError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    // syscalls: recvmsg
    let got = match recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
        Ok(got) => got,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(Errno::CONNRESET) => return Ok(Some(0)),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    let mut here = 0;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            let before = fds.len();
            fds.extend(received);
            here += fds.len() - before;
        }
    }
    if fds.len() > MAX_FDS {
        return Err(ProtocolError::TooManyFds.into());
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        // Either the space for descriptors was too small, or the process reached its limit of
        // descriptors.
        return Err(if here >= MAX_FDS {
            ProtocolError::TooManyFds.into()
        } else {
            SessionError::FdLimit
        });
    }
    Ok(Some(got.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RawFrontEnd, encode_message, eventfd, stop_pair};
    use std::os::fd::AsFd;
    use std::thread;
    use std::time::{Duration, Instant};

    fn header(code: u32, flags: u32, size: u32) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        for (chunk, word) in bytes.chunks_mut(4).zip([code, flags, size]) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn header_with_an_invalid_field_is_refused() {
        for (flags, size, want) in [
            (0, 0, "version 0"),
            (2, 0, "version 2"),
            (3, 0, "version 3"),
            (5, 0, "marked as a reply"),
            (1, 4097, "4097 bytes"),
            (1, u32::MAX, "4294967295 bytes"),
        ] {
            let text = Header::parse(header(1, flags, size))
                .unwrap_err()
                .to_string();
            assert!(text.contains(want), "{text}");
        }
        let parsed = Header::parse(header(7, 9, 4096)).unwrap();
        assert_eq!(
            (parsed.code, parsed.need_reply, parsed.size),
            (7, true, 4096)
        );
        assert!(!Header::parse(header(7, 1, 0)).unwrap().need_reply);
    }

    #[test]
    fn messages_are_equal_whether_bytes_come_one_by_one_or_together() {
        let (_stop, stopped) = stop_pair();
        let bytes = [
            encode_message(1, 1, &[]),
            encode_message(8, 9, &[7; 8]),
            encode_message(3, 1, &[]),
        ]
        .concat();
        for chunk_len in [1, 5, 12, 13, bytes.len()] {
            let (front_end, stream) = RawFrontEnd::pair();
            let sender = {
                let bytes = bytes.clone();
                thread::spawn(move || {
                    for chunk in bytes.chunks(chunk_len) {
                        front_end.send(chunk, &[]);
                        thread::yield_now();
                    }
                })
            };
            let channel = Channel::new(stream, stopped.as_fd()).unwrap();
            for want in [(1, vec![]), (8, vec![7; 8]), (3, vec![])] {
                let Incoming::Message(message) = channel.receive().unwrap() else {
                    panic!("no message");
                };
                assert_eq!((message.header.code, message.payload), want);
            }
            sender.join().unwrap();
            assert!(matches!(channel.receive().unwrap(), Incoming::Closed));
        }
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (_stop, stopped) = stop_pair();
        let (front_end, stream) = RawFrontEnd::pair();
        let fd = eventfd(0);
        let whole = encode_message(12, 1, &[0; 8]);
        front_end.send(&encode_message(1, 1, &[]), &[]);
        front_end.send(&whole[..1], &[fd.as_fd()]);
        front_end.send(&whole[1..], &[]);
        // Descriptors that come with the first byte of the payload belong to the message as well.
        front_end.send(&whole[..12], &[]);
        front_end.send(&whole[12..], &[fd.as_fd(), fd.as_fd()]);
        front_end.send(&encode_message(3, 1, &[]), &[]);
        let channel = Channel::new(stream, stopped.as_fd()).unwrap();
        for want in [0, 1, 2, 0] {
            let Incoming::Message(message) = channel.receive().unwrap() else {
                panic!("no message");
            };
            assert_eq!(message.fds.len(), want);
        }
    }

    #[test]
    fn message_with_more_than_32_descriptors_is_refused() {
        let (_stop, stopped) = stop_pair();
        let fd = eventfd(0);
        for (count, good) in [(32, true), (33, false), (200, false)] {
            let (front_end, stream) = RawFrontEnd::pair();
            front_end.send(&encode_message(3, 1, &[]), &vec![fd.as_fd(); count]);
            let channel = Channel::new(stream, stopped.as_fd()).unwrap();
            match channel.receive() {
                Ok(Incoming::Message(message)) => assert!(good && message.fds.len() == 32),
                Err(SessionError::Protocol(ProtocolError::TooManyFds)) => assert!(!good),
                other => panic!("{count}: {other:?}"),
            }
        }
    }

    #[test]
    fn connection_that_ends_within_a_message_is_an_error() {
        let (_stop, stopped) = stop_pair();
        let bytes = encode_message(8, 1, &[7; 8]);
        for len in 0..bytes.len() {
            let (front_end, stream) = RawFrontEnd::pair();
            front_end.send(&bytes[..len], &[]);
            drop(front_end);
            let channel = Channel::new(stream, stopped.as_fd()).unwrap();
            match channel.receive() {
                Ok(Incoming::Closed) => assert_eq!(len, 0),
                Err(SessionError::Protocol(ProtocolError::Truncated)) => assert_ne!(len, 0),
                other => panic!("{len}: {other:?}"),
            }
        }
    }

    #[test]
    fn every_wait_ends_when_stop_is_readable() {
        // A front-end that sends nothing, one that stops after a header, and one that reads no
        // reply.
        for start in [vec![], encode_message(8, 1, &[7; 8])[..12].to_vec()] {
            let (stop, stopped) = stop_pair();
            let (front_end, stream) = RawFrontEnd::pair();
            front_end.send(&start, &[]);
            let begin = Instant::now();
            let trigger = thread::spawn(move || {
                thread::sleep(Duration::from_millis(50));
                stop.write(1).unwrap();
            });
            let channel = Channel::new(stream, stopped.as_fd()).unwrap();
            assert!(matches!(channel.receive().unwrap(), Incoming::Stopped));
            assert!(begin.elapsed() < Duration::from_secs(5));
            trigger.join().unwrap();
        }
        let (stop, stopped) = stop_pair();
        let (_front_end, stream) = RawFrontEnd::pair();
        let trigger = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            stop.write(1).unwrap();
        });
        let channel = Channel::new(stream, stopped.as_fd()).unwrap();
        let reply = Reply {
            code: 1,
            payload: ReplyPayload::U64(0),
        };
        while channel.send(reply).unwrap() {}
        trigger.join().unwrap();
    }

    #[test]
    fn reply_has_the_layout_of_the_protocol() {
        let reply = Reply {
            code: 11,
            payload: ReplyPayload::VringState { index: 3, num: 9 },
        };
        let want: Vec<u8> = [11u32, 5, 8, 3, 9]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        assert_eq!(reply.to_bytes().as_slice(), want);
    }
}
