//! Messages on the socket: a 12-byte header, up to 4 KiB of payload, and up to 32 descriptors.
//!
//! Exactly one message is read at a time, so that descriptors stay with the message they came with,
//! however the front-end cuts or joins its writes. Only `poll` blocks, and it also
//! watches a stop descriptor. It waits for an idle front-end without limit, and up to 5 s for one
//! that has begun a message or has a reply to read.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg, sockopt,
};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use virtionet_virtqueue::memory::RegionSpec;

use crate::error::{ProtocolError, SessionError};
use crate::foreign_fd::ForeignFd;
use crate::limits::MAX_FDS;
pub use crate::limits::MAX_PAYLOAD;

/// The size of a header in bytes.
pub const HEADER_SIZE: usize = 12;

/// The only version of the protocol.
const VERSION: u32 = 1;

/// The time that a front-end has to complete a message that it has begun, or to read a reply.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// The most descriptors that the kernel passes with one message (SCM_MAX_FD). There is space for
/// all of them, because the kernel would itself close those that do not fit, which may block.
const MAX_PASSED_FDS: usize = 253;

/// A request's header, checked.
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

/// A message as received. Its descriptors are closed with it, without blocking, unless they are
/// taken out.
#[derive(Debug)]
pub struct Message {
    /// The header.
    pub header: Header,
    /// The payload of `header.size` bytes.
    pub payload: Vec<u8>,
    /// The descriptors that came with it, in order.
    pub fds: Vec<ForeignFd>,
}

/// The payload of a reply.
#[derive(Debug)]
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
    /// The log that was set (SET_LOG_BASE); both numbers are 0 where it was refused.
    Log {
        /// Its size in bytes.
        size: u64,
        /// Its offset in its file in bytes.
        offset: u64,
    },
    /// No payload but a descriptor (POSTCOPY_ADVISE).
    Descriptor(OwnedFd),
    /// A memory table (SET_MEM_TABLE in a postcopy migration).
    Table(Vec<RegionSpec>),
    /// One region (ADD_MEM_REG in a postcopy migration).
    Region(RegionSpec),
}

/// A reply to a request.
#[derive(Debug)]
pub struct Reply {
    /// The request's number.
    pub code: u32,
    /// The payload of the reply.
    pub payload: ReplyPayload,
}

impl Reply {
    /// Converts the reply to a header and its payload.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let payload = match &self.payload {
            ReplyPayload::U64(value) => value.to_ne_bytes().to_vec(),
            ReplyPayload::VringState { index, num } => {
                [*index, *num].map(u32::to_ne_bytes).concat()
            }
            ReplyPayload::Log { size, offset } => [*size, *offset].map(u64::to_ne_bytes).concat(),
            ReplyPayload::Descriptor(_) => Vec::new(),
            ReplyPayload::Table(regions) => {
                // Their number has 32 bits, and 32 bits of padding follow it.
                let mut bytes = u32::try_from(regions.len())
                    .unwrap_or(0)
                    .to_ne_bytes()
                    .to_vec();
                bytes.extend([0; 4]);
                bytes.extend(regions.iter().flat_map(region_bytes));
                bytes
            }
            ReplyPayload::Region(region) => [&[0; 8], &region_bytes(region)[..]].concat(),
        };
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let size = u32::try_from(payload.len()).unwrap_or(0);
        let mut bytes = [self.code, flags, size].map(u32::to_ne_bytes).concat();
        bytes.extend(payload);
        bytes
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.payload {
            ReplyPayload::Descriptor(fd) => Some(fd.as_fd()),
            _ => None,
        }
    }
}

fn region_bytes(region: &RegionSpec) -> Vec<u8> {
    let words = [
        region.guest_addr,
        region.size,
        region.user_addr,
        region.file_offset,
    ];
    words.map(u64::to_ne_bytes).concat()
}

/// The outcome of waiting for a message.
#[derive(Debug)]
pub(crate) enum Incoming {
    Message(Message),
    /// The front-end closed the connection between two messages.
    Closed,
    /// The stop descriptor is readable.
    Stopped,
    /// The event is readable.
    Event,
}

/// The connections that have not been accepted yet. They are those of other front-ends.
pub trait PendingConnections: Sync {
    /// The descriptor that is readable while a connection waits.
    fn poll_fd(&self) -> BorrowedFd<'_>;

    /// Refuses the connection that has waited longest. Only that one is known to have waited when
    /// the front-end was last seen connected; a later one may be its successor.
    fn refuse(&self);
}

/// What ends the wait for a message before the first byte of one.
#[derive(Clone, Copy)]
pub(crate) struct IdleEvent<'e> {
    /// The descriptor that becomes readable.
    pub(crate) fd: BorrowedFd<'e>,
    /// The time after which the event happens in any case.
    pub(crate) interval: Option<Duration>,
}

/// The outcome of waiting for the socket.
enum Wait {
    Ready,
    Stopped,
    Event,
    TimedOut,
}

/// A connected socket and the descriptor that ends every wait on it.
pub(crate) struct Channel<'s> {
    /// Closing it also closes descriptors that the front-end sent and that were not received, which
    /// may block.
    stream: ForeignFd,
    stop: BorrowedFd<'s>,
    others: Option<&'s dyn PendingConnections>,
    partial: PartialMessage,
    /// Whether a reply was sent in part only, or not at all, because the session was stopped.
    is_reply_missing: bool,
}

/// A message that has not come completely.
#[derive(Debug, Default)]
struct PartialMessage {
    bytes: Vec<u8>,
    fds: Vec<ForeignFd>,
    /// The first byte of a message sets it.
    deadline: Option<Instant>,
}

impl PartialMessage {
    /// The header, once it has come.
    fn header(&self) -> Result<Option<Header>, ProtocolError> {
        self.bytes
            .first_chunk::<HEADER_SIZE>()
            .map(|bytes| Header::parse(*bytes))
            .transpose()
    }

    /// The number of bytes that are missing, as far as it is known.
    fn missing(&self) -> Result<usize, ProtocolError> {
        let payload = self.header()?.map_or(0, |header| header.size);
        Ok((HEADER_SIZE + payload).saturating_sub(self.bytes.len()))
    }

    fn take(&mut self) -> Result<Option<Message>, ProtocolError> {
        let Some(header) = self.header()? else {
            return Ok(None);
        };
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.drain(..HEADER_SIZE);
        self.deadline = None;
        Ok(Some(Message {
            header,
            payload: bytes,
            fds: std::mem::take(&mut self.fds),
        }))
    }
}

impl<'s> Channel<'s> {
    /// While the front-end is connected, `others` are refused.
    pub(crate) fn new(
        stream: UnixStream,
        stop: BorrowedFd<'s>,
        others: Option<&'s dyn PendingConnections>,
    ) -> io::Result<Self> {
        // Credentials would take the space of descriptors; an inherited socket may ask for them.
        // syscalls: setsockopt
        sockopt::set_socket_passcred(&stream, false)?;
        Ok(Self {
            stream: ForeignFd::new(stream.into()),
            stop,
            others,
            partial: PartialMessage::default(),
            is_reply_missing: false,
        })
    }

    /// Whether no part of a message or a reply is outstanding, so that another process can continue
    /// with the socket.
    pub(crate) fn is_between_messages(&self) -> bool {
        self.partial.bytes.is_empty() && !self.is_reply_missing
    }

    /// The socket.
    pub(crate) fn into_stream(self) -> Option<UnixStream> {
        self.stream.into_known().map(UnixStream::from)
    }

    /// A copy of the socket's descriptor, with which a thread can wait for the end of the connection.
    pub(crate) fn copy_of_stream(&self) -> io::Result<ForeignFd> {
        Ok(ForeignFd::new(self.stream()?.try_clone_to_owned()?))
    }

    fn stream(&self) -> io::Result<BorrowedFd<'_>> {
        self.stream.as_fd().ok_or_else(|| Errno::BADF.into())
    }

    /// Waits for the next message, or until `event` happens and no message has begun.
    pub(crate) fn receive(
        &mut self,
        event: Option<IdleEvent<'_>>,
    ) -> Result<Incoming, SessionError> {
        loop {
            let missing = self.partial.missing()?;
            if missing == 0
                && let Some(message) = self.partial.take()?
            {
                return Ok(Incoming::Message(message));
            }
            let deadline = self.partial.deadline;
            let event = event.filter(|_| deadline.is_none());
            match self.wait(PollFlags::IN, deadline, event)? {
                Wait::Ready => {}
                Wait::Event => return Ok(Incoming::Event),
                Wait::Stopped => return Ok(Incoming::Stopped),
                Wait::TimedOut => return Err(SessionError::MessageIncomplete(MESSAGE_TIMEOUT)),
            }
            if !self.receive_some(missing)? {
                return match self.partial.bytes.is_empty() {
                    true => Ok(Incoming::Closed),
                    false => Err(ProtocolError::Truncated.into()),
                };
            }
        }
    }

    /// Reads at most `missing` bytes of the message, and collects the descriptors that arrive with
    /// them. Returns false when the front-end has closed the connection.
    fn receive_some(&mut self, missing: usize) -> Result<bool, SessionError> {
        let mut buffer = [0; MAX_PAYLOAD];
        let buffer = &mut buffer[..missing.min(MAX_PAYLOAD)];
        let stream = self.stream.as_fd().ok_or(io::Error::from(Errno::BADF))?;
        match receive_some(stream, buffer, &mut self.partial.fds)? {
            Some(0) => return Ok(false),
            Some(n) => {
                self.partial.bytes.extend_from_slice(&buffer[..n]);
                let timeout = || Instant::now() + MESSAGE_TIMEOUT;
                self.partial.deadline.get_or_insert_with(timeout);
            }
            None => {}
        }
        Ok(true)
    }

    /// Sends a reply. Returns false when the session was stopped while the socket was full, or the
    /// front-end has disconnected.
    pub(crate) fn send(&mut self, reply: &Reply) -> Result<bool, SessionError> {
        let bytes = reply.to_bytes();
        // The descriptor comes with the first byte.
        let mut fd = reply.fd();
        self.is_reply_missing = true;
        let mut rest = bytes.as_slice();
        let deadline = Instant::now() + MESSAGE_TIMEOUT;
        while !rest.is_empty() {
            match self.wait(PollFlags::OUT, Some(deadline), None)? {
                Wait::Ready | Wait::Event => {}
                Wait::Stopped => return Ok(false),
                Wait::TimedOut => return Err(SessionError::ReplyNotTaken(MESSAGE_TIMEOUT)),
            }
            match send_some(self.stream()?, rest, fd) {
                Ok(sent) => (rest, fd) = (&rest[sent..], None),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        self.is_reply_missing = false;
        Ok(true)
    }

    /// Sleeps until the socket is ready, the session is to stop or `deadline` has passed. Other
    /// front-ends that connect meanwhile are refused, unless this one has hung up.
    fn wait(
        &self,
        events: PollFlags,
        deadline: Option<Instant>,
        event: Option<IdleEvent<'_>>,
    ) -> io::Result<Wait> {
        let stream = self.stream()?;
        let interval = event.and_then(|event| event.interval);
        loop {
            let mut fds = vec![
                PollFd::from_borrowed_fd(self.stop, PollFlags::IN),
                PollFd::from_borrowed_fd(stream, events),
            ];
            fds.extend(
                self.others
                    .map(|others| PollFd::from_borrowed_fd(others.poll_fd(), PollFlags::IN)),
            );
            let event_at = fds.len();
            fds.extend(event.map(|event| PollFd::from_borrowed_fd(event.fd, PollFlags::IN)));
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left
                .or(interval)
                .and_then(|left| Timespec::try_from(left).ok());
            // syscalls: ppoll
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) if left.is_none() => return Ok(Wait::Event),
                Ok(0) => return Ok(Wait::TimedOut),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            if is_ready(0) {
                return Ok(Wait::Stopped);
            }
            let has_hung_up = fds[1].revents().contains(PollFlags::HUP);
            if is_ready(event_at) {
                return Ok(Wait::Event);
            }
            if let Some(others) = self.others
                && is_ready(2)
                && !has_hung_up
            {
                others.refuse();
            }
            if is_ready(1) {
                return Ok(Wait::Ready);
            }
        }
    }
}

/// Writes once.
fn send_some(
    stream: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<usize, Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let Some(fd) = fd else {
        // syscalls: sendto
        return send(stream, bytes, flags);
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    // There is space for it.
    control.push(SendAncillaryMessage::ScmRights(&fds));
    // syscalls: sendmsg
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)
}

/// Reads once. Returns 0 bytes at the end of the connection, and `None` when there was nothing to
/// read.
fn receive_some(
    stream: impl AsFd + Copy,
    buffer: &mut [u8],
    fds: &mut Vec<ForeignFd>,
) -> Result<Option<usize>, SessionError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PASSED_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    // syscalls: recvmsg
    let got = match recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
        Ok(got) => got,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(Errno::CONNRESET) => return Ok(Some(0)),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received.map(ForeignFd::new));
        }
    }
    if fds.len() > MAX_FDS {
        return Err(ProtocolError::TooManyFds.into());
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        // The space was enough, so the kernel could not, or was not allowed to, hand one over.
        return Err(match rustix::io::fcntl_dupfd_cloexec(stream, 0) {
            Err(Errno::MFILE | Errno::NFILE) => SessionError::FdLimit,
            _ => SessionError::FdWithheld,
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
            let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
            for want in [(1, vec![]), (8, vec![7; 8]), (3, vec![])] {
                let Incoming::Message(message) = channel.receive(None).unwrap() else {
                    panic!("no message");
                };
                assert_eq!((message.header.code, message.payload), want);
            }
            sender.join().unwrap();
            assert!(matches!(channel.receive(None).unwrap(), Incoming::Closed));
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
        // Descriptors on the payload's first byte belong to the message as well.
        front_end.send(&whole[..12], &[]);
        front_end.send(&whole[12..], &[fd.as_fd(), fd.as_fd()]);
        front_end.send(&encode_message(3, 1, &[]), &[]);
        let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
        for want in [0, 1, 2, 0] {
            let Incoming::Message(message) = channel.receive(None).unwrap() else {
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
            let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
            match channel.receive(None) {
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
            let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
            match channel.receive(None) {
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
            let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
            assert!(matches!(channel.receive(None).unwrap(), Incoming::Stopped));
            assert!(begin.elapsed() < Duration::from_secs(5));
            trigger.join().unwrap();
        }
        let (stop, stopped) = stop_pair();
        let (_front_end, stream) = RawFrontEnd::pair();
        let trigger = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            stop.write(1).unwrap();
        });
        let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
        let reply = Reply {
            code: 1,
            payload: ReplyPayload::U64(0),
        };
        while channel.send(&reply).unwrap() {}
        trigger.join().unwrap();
    }

    #[test]
    fn message_that_is_begun_and_not_completed_times_out() {
        let (_stop, stopped) = stop_pair();
        let (front_end, stream) = RawFrontEnd::pair();
        front_end.send(&encode_message(8, 1, &[7; 8])[..12], &[]);
        let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
        let begin = Instant::now();
        let error = channel.receive(None).unwrap_err();
        assert!(
            matches!(error, SessionError::MessageIncomplete(_)),
            "{error}"
        );
        assert!(begin.elapsed() >= MESSAGE_TIMEOUT);
    }

    #[test]
    fn reply_that_is_not_taken_times_out() {
        let (_stop, stopped) = stop_pair();
        let (_front_end, stream) = RawFrontEnd::pair();
        let mut channel = Channel::new(stream, stopped.as_fd(), None).unwrap();
        let reply = Reply {
            code: 1,
            payload: ReplyPayload::U64(0),
        };
        let error = loop {
            if let Err(error) = channel.send(&reply) {
                break error;
            }
        };
        assert!(matches!(error, SessionError::ReplyNotTaken(_)), "{error}");
    }

    #[test]
    fn others_are_refused_while_a_front_end_is_connected_and_kept_once_it_has_hung_up() {
        #[derive(Debug)]
        struct Others(OwnedFd, std::sync::atomic::AtomicUsize);
        impl PendingConnections for Others {
            fn poll_fd(&self) -> BorrowedFd<'_> {
                self.0.as_fd()
            }
            fn refuse(&self) {
                rustix::io::read(&self.0, &mut [0; 8]).unwrap();
                self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let (_stop, stopped) = stop_pair();
        // One waits from the beginning.
        let others = Others(eventfd(0), Default::default());
        rustix::io::write(&others.0, &1u64.to_ne_bytes()).unwrap();
        let refused = |others: &Others| others.1.load(std::sync::atomic::Ordering::Relaxed);
        let (front_end, stream) = RawFrontEnd::pair();
        front_end.send(&encode_message(1, 1, &[]), &[]);
        let mut channel = Channel::new(stream, stopped.as_fd(), Some(&others)).unwrap();
        assert!(matches!(
            channel.receive(None).unwrap(),
            Incoming::Message(_)
        ));
        assert_eq!(refused(&others), 1);
        // Another comes after the first has gone.
        drop(front_end);
        rustix::io::write(&others.0, &1u64.to_ne_bytes()).unwrap();
        assert!(matches!(channel.receive(None).unwrap(), Incoming::Closed));
        assert_eq!(refused(&others), 1);
    }

    #[test]
    fn replies_have_the_protocol_s_layout() {
        let reply = Reply {
            code: 11,
            payload: ReplyPayload::VringState { index: 3, num: 9 },
        };
        let want: Vec<u8> = [11u32, 5, 8, 3, 9]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        assert_eq!(reply.to_bytes(), want);
        let (size, offset) = (32, 4096);
        let reply = Reply {
            code: 6,
            payload: ReplyPayload::Log { size, offset },
        };
        let header = [6u32, 5, 16].map(u32::to_ne_bytes).concat();
        let payload = [size, offset].map(u64::to_ne_bytes).concat();
        assert_eq!(reply.to_bytes(), [header, payload].concat());
    }
}
