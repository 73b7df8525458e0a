//! Errors of a session: protocol errors, refused requests, and errors of the host.

use std::fmt;
use std::io;

use vhost::vhost_user::message::FrontendReq;
use virtionet_virtqueue::memory::MemoryError;

use crate::backend_error::BackendError;
use crate::limits::{MAX_FDS, MAX_PAYLOAD, MAX_TABLE_REGIONS};

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The front-end broke the protocol.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// QEMU was started without shared memory: no device can work. It sends no region and starts
    /// the vrings all the same.
    #[error(
        "the guest's memory is not shared with virtionetd (no region came with SET_MEM_TABLE); start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem (or -machine memory-backend=mem)"
    )]
    NotShared,
    /// The host refused a descriptor that the front-end sent.
    #[error(
        "virtionetd has reached its limit of open files while it received descriptors; raise it (ulimit -n, or LimitNOFILE= of its service)"
    )]
    FdLimit,
    /// The socket failed.
    #[error("the vhost-user socket failed: {0}; the front-end must connect anew")]
    Socket(#[from] io::Error),
}

/// How the front-end broke the protocol. Nothing that follows can be believed: the session ends.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The header's version is not 1.
    #[error(
        "a vhost-user message has version {0} where only version 1 exists; is the peer a vhost-user front-end?"
    )]
    Version(u32),
    /// The header marks the message as a reply.
    #[error("request {0} is marked as a reply, but virtionetd asked for nothing")]
    Reply(u32),
    /// The payload is longer than any request's.
    #[error("request {code} announces a payload of {size} bytes where {MAX_PAYLOAD} are the most")]
    TooLong {
        /// The request's number.
        code: u32,
        /// Bytes announced.
        size: u32,
    },
    /// The connection ended within a message.
    #[error("the front-end closed the connection in the middle of a message")]
    Truncated,
    /// More descriptors than a message may carry.
    #[error("a message carries more than {MAX_FDS} file descriptors")]
    TooManyFds,
    /// The payload's size is not the request's.
    #[error("{request:?} has a payload of {size} bytes instead of {wanted}")]
    Size {
        /// The request.
        request: FrontendReq,
        /// Bytes received.
        size: usize,
        /// Bytes that the protocol asks for.
        wanted: usize,
    },
    /// Descriptors are missing or surplus.
    #[error("{request:?} carries {got} file descriptors instead of {wanted}")]
    FdCount {
        /// The request.
        request: FrontendReq,
        /// Descriptors received.
        got: usize,
        /// Descriptors that the request asks for.
        wanted: usize,
    },
    /// More regions than one table may have.
    #[error(
        "SET_MEM_TABLE announces {0} memory regions where {MAX_TABLE_REGIONS} are the most; further ones come with ADD_MEM_REG"
    )]
    Regions(u32),
    /// A descriptor of the wrong kind.
    #[error("{request:?} for ring {ring} carries {found} where an eventfd is needed")]
    NotEventFd {
        /// The request.
        request: FrontendReq,
        /// The vring's index.
        ring: u16,
        /// What the descriptor is.
        found: String,
    },
    /// A request that must be answered cannot be.
    #[error("{request:?} cannot be answered: {refusal}")]
    Unanswerable {
        /// The request.
        request: FrontendReq,
        /// Why not.
        #[source]
        refusal: RequestError,
    },
}

/// Why a well-formed request is not done. The session goes on.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A vring index with more than 8 bits, or reserved bits set beside it.
    #[error("{0:#x} is no ring index; the protocol counts rings in 8 bits")]
    VringIndex(u64),
    /// A vring that this device does not have.
    #[error(
        "the front-end configures ring {ring}, but this device has {queue_pairs} queue pairs (rings 0 to {last}); raise virtionetd's --queues or lower queues= of QEMU's -netdev vhost-user",
        last = 2 * u32::from(*queue_pairs) - 1
    )]
    NoSuchVring {
        /// The vring's index.
        ring: u16,
        /// Queue pairs of this device.
        queue_pairs: u16,
    },
    /// A vring size that virtio does not allow.
    #[error(
        "ring size {0} is not allowed; it must be 1 to 32768, and a power of two unless the ring is packed"
    )]
    VringSize(u32),
    /// A base that a split vring's index cannot have.
    #[error("ring base {0} does not fit the 16-bit index of a split ring")]
    VringBase(u32),
    /// A vring's area is not aligned as virtio asks.
    #[error("the ring's {area} at {addr:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Which area.
        area: &'static str,
        /// Its front-end address.
        addr: u64,
        /// Alignment in bytes (virtio 1.3 §2.7, §2.8).
        align: u64,
    },
    /// Flags of SET_VRING_ADDR that were not offered (logging of the used vring).
    #[error("SET_VRING_ADDR has flags {0:#x}, which virtionetd does not offer")]
    VringAddrFlags(u32),
    /// Neither 0 nor 1.
    #[error("a ring cannot be enabled with {0}; 1 enables and 0 disables it")]
    Enable(u32),
    /// An MTU that IPv4 or virtio-net do not allow.
    #[error("an MTU of {0} bytes is not allowed; it must be 68 to 65535")]
    Mtu(u64),
    /// A device status with more than 8 bits.
    #[error("{0:#x} is no device status; it has 8 bits")]
    Status(u64),
    /// Virtio features that were not offered.
    #[error("the front-end takes feature bits {0:#x}, which virtionetd does not offer")]
    Features(u64),
    /// Protocol features that were not offered.
    #[error("the front-end takes protocol feature bits {0:#x}, which virtionetd does not offer")]
    ProtocolFeatures(u64),
    /// The format of the vrings would change under running ones.
    #[error("split and packed rings cannot be exchanged while rings run; stop them first")]
    FormatWhileRunning,
    /// The memory table cannot be used.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// The device cannot do it.
    #[error("{0}")]
    Backend(#[from] BackendError),
    /// A request of the protocol that belongs to a feature not offered.
    #[error("virtionetd does not offer it")]
    NotOffered,
    /// A request that this version of the protocol does not have.
    #[error("virtionetd does not know it")]
    Unknown,
}

/// A request of the front-end that was refused, and why.
#[derive(Debug)]
pub struct RefusedRequest {
    /// The request's name in the protocol, or its number where it has no name.
    pub request: String,
    /// Why it was refused.
    pub error: RequestError,
}

impl fmt::Display for RefusedRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} refused: {}", self.request, self.error)
    }
}

impl SessionError {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Protocol(error) => error.code(),
            Self::NotShared => "memory-not-shared",
            Self::FdLimit => "open-file-limit",
            Self::Socket(_) => "vhost-user-socket-failed",
        }
    }
}

impl ProtocolError {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Version(_) => "message-version",
            Self::Reply(_) => "unexpected-reply",
            Self::TooLong { .. } => "payload-too-long",
            Self::Truncated => "message-truncated",
            Self::TooManyFds => "too-many-descriptors",
            Self::Size { .. } => "payload-size",
            Self::FdCount { .. } => "descriptor-count",
            Self::Regions(_) => "too-many-memory-regions",
            Self::NotEventFd { .. } => "not-an-eventfd",
            Self::Unanswerable { .. } => "request-unanswerable",
        }
    }
}

impl RequestError {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::VringIndex(_) => "vring-index-invalid",
            Self::NoSuchVring { .. } => "no-such-vring",
            Self::VringSize(_) => "vring-size-invalid",
            Self::VringBase(_) => "vring-base-invalid",
            Self::Misaligned { .. } => "vring-area-misaligned",
            Self::VringAddrFlags(_) => "vring-address-flags",
            Self::Enable(_) => "vring-enable-invalid",
            Self::Mtu(_) => "mtu-invalid",
            Self::Status(_) => "device-status-invalid",
            Self::Features(_) => "features-not-offered",
            Self::ProtocolFeatures(_) => "protocol-features-not-offered",
            Self::FormatWhileRunning => "vring-format-while-running",
            Self::Memory(_) => "memory-table-invalid",
            Self::Backend(error) => error.code(),
            Self::NotOffered => "request-not-offered",
            Self::Unknown => "request-unknown",
        }
    }
}

/// Why a message is no request.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The session must end.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// The message is well formed, its values are not allowed.
    #[error("{0}")]
    Refused(#[from] RequestError),
}
