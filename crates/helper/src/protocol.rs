//! The messages between the daemon and the helper: JSON in one packet of a SOCK_SEQPACKET socket,
//! with at most one descriptor. Both ends are the same program, so there are no versions.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use virtionet_base::rights::LinkChange;

use crate::raw_path::RawPath;
use crate::rule::Rule;

/// The longest message. A path has 4,096 bytes at most, and each is a number of up to 4 characters.
const MAX_MESSAGE_LEN: usize = 32 * 1024;

/// What the daemon sends before its first request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hello {
    /// Something is allowed.
    Allow(Rule),
    /// All rules were sent.
    Serve,
}

/// What the daemon asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// To make the descriptor in the message a queue of the TAP `name`.
    AttachTap { name: String },
    /// To bring the TAP `name` up.
    BringUp { name: String },
    /// To set the MTU of the TAP `name`.
    SetMtu { name: String, mtu: u32 },
    /// To make the TAP `name` a port of `bridge`.
    JoinBridge { name: String, bridge: String },
    /// To write `text` to `file`.
    WriteAffinity { file: RawPath, text: String },
    /// To connect to the unix socket at `path`.
    Connect { path: RawPath },
    /// To make a socket at `path` that listens, with this mode.
    Listen { path: RawPath, mode: u32 },
    /// To remove the socket file at `path`, if it is the one with these numbers.
    RemoveSocket {
        path: RawPath,
        device: u64,
        inode: u64,
    },
}

impl Request {
    pub(crate) fn change_link(name: &str, change: &LinkChange) -> Self {
        let name = name.to_owned();
        match change {
            LinkChange::Up => Self::BringUp { name },
            LinkChange::Mtu(mtu) => Self::SetMtu { name, mtu: *mtu },
            LinkChange::Port(bridge) => Self::JoinBridge {
                name,
                bridge: bridge.clone(),
            },
        }
    }
}

/// For the log.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AttachTap { name } => write!(f, "open a queue of TAP {name}"),
            Self::BringUp { name } => write!(f, "bring up TAP {name}"),
            Self::SetMtu { name, mtu } => write!(f, "set the MTU of TAP {name} to {mtu}"),
            Self::JoinBridge { name, bridge } => write!(f, "make TAP {name} a port of {bridge}"),
            Self::WriteAffinity { file, text } => write!(f, "write {text:?} to {file}"),
            Self::Connect { path } => write!(f, "connect to {path}"),
            Self::Listen { path, .. } => write!(f, "listen on {path}"),
            Self::RemoveSocket { path, .. } => write!(f, "remove socket {path}"),
        }
    }
}

/// What the helper answers. The socket of [`Request::Connect`] is a descriptor in the message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// It is done.
    Done,
    /// It is done, and the interface has this name.
    Attached { name: String },
    /// It is done, and the file has these numbers. The socket is a descriptor in the message.
    Listening { device: u64, inode: u64 },
    /// The kernel's error, or EPERM where no rule allows it.
    Failed { errno: i32 },
}

impl From<io::Error> for Reply {
    fn from(error: io::Error) -> Self {
        let other = match error.kind() {
            io::ErrorKind::InvalidInput => Errno::INVAL,
            _ => Errno::IO,
        };
        let errno = error.raw_os_error().unwrap_or(other.raw_os_error());
        Self::Failed { errno }
    }
}

/// Sends `message`, and `fd` with it.
///
/// # Errors
/// When the other end is gone, or takes nothing in time.
// syscalls: sendmsg
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE_LEN {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = [IoSlice::new(&bytes)];
    retry(|| sendmsg(socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives a message, and the descriptor that came with it; `None` when the other end was closed.
///
/// # Errors
/// When nothing comes in time, or what comes is no such message.
// syscalls: recvmsg
pub(crate) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = retry(|| {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.flatten().last();
    let is_cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
    if received.flags.intersects(is_cut) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let message = serde_json::from_slice(&buffer[..received.bytes])?;
    Ok(Some((message, fd)))
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}
