//! Messages on a unix stream socket: a JSON document and the descriptors that it names.
//!
//! ```text
//! header    length of the document in bytes, number of descriptors   2 x u32, byte order of the host
//! carriers  one byte for each group of up to 250 descriptors, which come with it
//! document
//! ```
//!
//! A descriptor in the document is its position among those of the message.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The most descriptors in one message of a unix socket are 253 (SCM_MAX_FD).
const GROUP: usize = 250;
/// The longest document in bytes. Devices with all queue pairs take about 100 KiB each.
const MAX_DOCUMENT: u32 = 256 << 20;
/// The most descriptors: as many as a process can have by default with the hard limit of systemd.
const MAX_DESCRIPTORS: u32 = 512 << 10;

/// A descriptor of a message, by its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position(u32);

/// Why a message cannot be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The socket failed, or the other process takes too long.
    #[error("the other process does not answer: {0}")]
    Socket(#[from] io::Error),
    /// The other process is gone.
    #[error("the other process has closed the connection")]
    Closed,
    /// The document is not the expected one.
    #[error("the other process sent something unknown: {0}")]
    Document(#[from] serde_json::Error),
    /// The document or the number of descriptors is too large.
    #[error("a message with {bytes} bytes and {descriptors} descriptors is too large")]
    TooLarge {
        /// The length of the document.
        bytes: u32,
        /// The number of descriptors.
        descriptors: u32,
    },
    /// Descriptors are missing.
    #[error("descriptors are missing; raise the limit of open files")]
    Descriptors,
    /// The document names a descriptor that is not in the message, or names it twice.
    #[error("the other process names descriptor {0}, which is not in its message")]
    Position(u32),
}

/// The descriptors of a message that is to be sent.
#[derive(Debug, Default)]
pub struct OutgoingDescriptors(Vec<Arc<OwnedFd>>);

impl OutgoingDescriptors {
    /// Adds a descriptor, and returns what stands for it in the document.
    ///
    /// # Errors
    /// When there are too many.
    pub fn add(&mut self, fd: Arc<OwnedFd>) -> Result<Position, MessageError> {
        let count = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        if count >= MAX_DESCRIPTORS {
            return Err(MessageError::TooLarge {
                bytes: 0,
                descriptors: count,
            });
        }
        self.0.push(fd);
        Ok(Position(count))
    }
}

/// The descriptors of a message that was received. Those that are not taken are closed with it.
#[derive(Debug)]
pub struct ReceivedDescriptors(Vec<Option<OwnedFd>>);

impl ReceivedDescriptors {
    /// Takes the descriptor at `position`.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&mut self, position: Position) -> Result<OwnedFd, MessageError> {
        let missing = || MessageError::Position(position.0);
        let index = usize::try_from(position.0).map_err(|_| missing())?;
        let fd = self.0.get_mut(index).and_then(Option::take);
        fd.ok_or_else(missing)
    }
}

/// Sends `document` and the descriptors that it names.
///
/// # Errors
/// When the other end is gone, or takes nothing for as long as the socket waits.
// syscalls: sendto sendmsg
pub(crate) fn send(
    mut socket: &UnixStream,
    document: &impl Serialize,
    descriptors: &OutgoingDescriptors,
) -> Result<(), MessageError> {
    let document = serde_json::to_vec(document)?;
    let bytes = u32::try_from(document.len()).unwrap_or(u32::MAX);
    let count = u32::try_from(descriptors.0.len()).unwrap_or(u32::MAX);
    check_size(bytes, count)?;
    socket.write_all(&[bytes.to_ne_bytes(), count.to_ne_bytes()].concat())?;
    for group in descriptors.0.chunks(GROUP) {
        let fds: Vec<BorrowedFd<'_>> = group.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(GROUP))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(MessageError::Descriptors);
        }
        let carrier = [IoSlice::new(&[0])];
        retry(|| sendmsg(socket, &carrier, &mut ancillary, SendFlags::NOSIGNAL))?;
    }
    socket.write_all(&document)?;
    Ok(())
}

/// Receives a document and its descriptors.
///
/// # Errors
/// When nothing comes for as long as the socket waits, or what comes is no such message.
// syscalls: recvfrom recvmsg
pub(crate) fn receive<T: DeserializeOwned>(
    mut socket: &UnixStream,
) -> Result<(T, ReceivedDescriptors), MessageError> {
    let mut header = [0; 8];
    socket
        .read_exact(&mut header)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => MessageError::Closed,
            _ => error.into(),
        })?;
    let [a, b, c, d, e, f, g, h] = header;
    let bytes = u32::from_ne_bytes([a, b, c, d]);
    let count = u32::from_ne_bytes([e, f, g, h]);
    check_size(bytes, count)?;
    let count = usize::try_from(count).map_err(|_| MessageError::Descriptors)?;
    let mut descriptors = Vec::new();
    while descriptors.len() < count {
        let expected = (count - descriptors.len()).min(GROUP);
        let group = receive_group(socket)?;
        if group.len() != expected {
            return Err(MessageError::Descriptors);
        }
        descriptors.extend(group.into_iter().map(Some));
    }
    let mut document = vec![0; usize::try_from(bytes).map_err(|_| MessageError::Closed)?];
    socket.read_exact(&mut document)?;
    Ok((
        serde_json::from_slice(&document)?,
        ReceivedDescriptors(descriptors),
    ))
}

fn check_size(bytes: u32, descriptors: u32) -> Result<(), MessageError> {
    match bytes <= MAX_DOCUMENT && descriptors <= MAX_DESCRIPTORS {
        true => Ok(()),
        false => Err(MessageError::TooLarge { bytes, descriptors }),
    }
}

fn receive_group(socket: &UnixStream) -> Result<Vec<OwnedFd>, MessageError> {
    let mut carrier = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(GROUP))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = retry(|| {
        recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut carrier)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    if received.bytes == 0 {
        return Err(MessageError::Closed);
    }
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    match received.flags.contains(ReturnFlags::CTRUNC) {
        true => Err(MessageError::Descriptors),
        false => Ok(fds),
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, MessageError> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done.map_err(|error| io::Error::from(error).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn document_and_more_descriptors_than_one_message_carries_arrive() {
        let (ours, theirs) = pair();
        let mut descriptors = OutgoingDescriptors::default();
        let dev_null = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        let file = tempfile();
        let mut positions = Vec::new();
        for n in 0..601 {
            let fd = if n == 600 { &file } else { &dev_null };
            positions.push(descriptors.add(Arc::clone(fd)).unwrap());
        }
        let sender = std::thread::spawn(move || send(&ours, &positions, &descriptors));
        let (received, mut fds) = receive::<Vec<Position>>(&theirs).unwrap();
        sender.join().unwrap().unwrap();
        let last = File::from(fds.take(received[600]).unwrap());
        let expected = File::from(file.try_clone().unwrap());
        assert_eq!(
            last.metadata().unwrap().ino(),
            expected.metadata().unwrap().ino()
        );
        assert!(matches!(
            fds.take(received[600]),
            Err(MessageError::Position(600))
        ));
        assert!(matches!(
            fds.take(Position(601)),
            Err(MessageError::Position(601))
        ));
    }

    fn tempfile() -> Arc<OwnedFd> {
        let path = std::env::temp_dir().join(format!("handover-message-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        Arc::new(file.into())
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let refused = |bytes: &[u8]| {
            let (mut ours, theirs) = pair();
            ours.write_all(bytes).unwrap();
            drop(ours);
            receive::<u32>(&theirs).unwrap_err().to_string()
        };
        let header = |bytes: u32, count: u32| [bytes.to_ne_bytes(), count.to_ne_bytes()].concat();
        assert!(refused(&[]).contains("closed"));
        assert!(refused(&header(u32::MAX, 0)).contains("too large"));
        assert!(refused(&header(0, u32::MAX)).contains("too large"));
        let without_descriptors = [header(1, 1), vec![0, b'1']].concat();
        assert!(refused(&without_descriptors).contains("missing"));
        let no_number = [header(1, 0), b"x".to_vec()].concat();
        assert!(refused(&no_number).contains("unknown"));
    }
}
