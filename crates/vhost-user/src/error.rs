//! Errors of a session: protocol errors, refused requests, and errors of the host.

use std::fmt;
use std::io;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;
use virtionet_virtqueue::memory::{LogError, MemoryError, PostcopyError};

use crate::backend_error::BackendError;
use crate::limits::{MAX_FDS, MAX_PAYLOAD, MAX_TABLE_REGIONS};

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The front-end broke the protocol.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// QEMU was started without shared memory, so no device can work. It then sends no region, but
    /// starts the vrings nevertheless.
    #[error(
        "the guest's memory is not shared with virtionetd (no region came with SET_MEM_TABLE); start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem (or -machine memory-backend=mem)"
    )]
    NotShared,
    /// The host could not accept a descriptor that the front-end sent.
    #[error(
        "virtionetd has reached its limit of open files while it received descriptors; raise it (ulimit -n, or LimitNOFILE= of its service)"
    )]
    FdLimit,
    /// The kernel did not hand over a descriptor that the front-end sent, for another reason.
    #[error(
        "the kernel withheld a descriptor that the front-end sent, though virtionetd may open more; a security module (SELinux, AppArmor) may have refused it: look at its audit log"
    )]
    FdWithheld,
    /// The front-end began a message and did not complete it in time.
    #[error("the front-end began a message and did not complete it within {0:?}; restart it")]
    MessageIncomplete(Duration),
    /// The front-end did not read a reply in time.
    #[error("the front-end did not take a reply within {0:?}; restart it")]
    ReplyNotTaken(Duration),
    /// The socket failed.
    #[error("the vhost-user socket failed: {0}; the front-end must connect again")]
    Socket(#[from] io::Error),
}

/// How the front-end broke the protocol. The session ends, because nothing that follows can be
/// trusted.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The header's version is not 1.
    #[error(
        "a vhost-user message has version {0}, but only version 1 exists; check that a vhost-user front-end is connected"
    )]
    Version(u32),
    /// The header marks the message as a reply.
    #[error(
        "request {0} is marked as a reply, but virtionetd has sent no request; check the front-end"
    )]
    Reply(u32),
    /// The payload is longer than that of any request.
    #[error(
        "request {code} announces a payload of {size} bytes; at most {MAX_PAYLOAD} are allowed"
    )]
    TooLong {
        /// The request's number.
        code: u32,
        /// The number of bytes announced.
        size: u32,
    },
    /// The connection ended within a message.
    #[error("the front-end closed the connection in the middle of a message")]
    Truncated,
    /// The message carries too many descriptors.
    #[error("a message carries more than {MAX_FDS} file descriptors")]
    TooManyFds,
    /// The size of the payload is not that of the request.
    #[error("{request:?} has a payload of {size} bytes instead of {wanted}")]
    Size {
        /// The request.
        request: FrontendReq,
        /// The number of bytes received.
        size: usize,
        /// The number of bytes that the protocol requires.
        wanted: usize,
    },
    /// The number of descriptors is not that of the request.
    #[error("{request:?} carries {got} file descriptors instead of {wanted}")]
    FdCount {
        /// The request.
        request: FrontendReq,
        /// The number of descriptors received.
        got: usize,
        /// The number of descriptors that the request needs.
        wanted: usize,
    },
    /// The table has more regions than one message may carry.
    #[error(
        "SET_MEM_TABLE announces {0} memory regions, but at most {MAX_TABLE_REGIONS} are allowed; add further ones with ADD_MEM_REG"
    )]
    Regions(u32),
    /// A descriptor is not an eventfd.
    #[error("{request:?} for ring {ring} carries {found} instead of an eventfd")]
    NotEventFd {
        /// The request.
        request: FrontendReq,
        /// The vring's index.
        ring: u16,
        /// What the descriptor is instead.
        found: String,
    },
    /// A request that needs a reply cannot be answered.
    #[error("{request:?} cannot be answered: {refusal}")]
    Unanswerable {
        /// The request.
        request: FrontendReq,
        /// Why it cannot be answered.
        #[source]
        refusal: RequestError,
    },
    /// A request of a postcopy migration came in the wrong order.
    #[error(
        "{request} came {state}; a front-end must send POSTCOPY_ADVISE, POSTCOPY_LISTEN before it starts vrings, an acknowledgement after each memory table, and POSTCOPY_END, in this order"
    )]
    PostcopyOrder {
        /// The request.
        request: &'static str,
        /// The state of the session.
        state: &'static str,
    },
    /// The front-end cannot provide the pages of a memory table that it has sent.
    #[error("the front-end does not accept the addresses of its memory table (it answers {0})")]
    PostcopyMemory(u64),
}

/// Why a well-formed request is refused. The session continues.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The vring index has more than 8 bits, or reserved bits beside it are set.
    #[error("{0:#x} is not a ring index; a ring index has 8 bits")]
    VringIndex(u64),
    /// The device does not have this vring.
    #[error(
        "the front-end configures ring {ring}, but this device has {queue_pairs} queue pairs (rings 0 to {last}); raise virtionetd's --queues or lower queues= of QEMU's -netdev vhost-user",
        last = 2 * u32::from(*queue_pairs) - 1
    )]
    NoSuchVring {
        /// The vring's index.
        ring: u16,
        /// The number of queue pairs of this device.
        queue_pairs: u16,
    },
    /// Virtio does not allow this vring size.
    #[error(
        "ring size {0} is not allowed; it must be 1 to 32768, and a power of two unless the ring is packed"
    )]
    VringSize(u32),
    /// The base does not fit the index of a split vring.
    #[error("ring base {0} does not fit the 16-bit index of a split ring")]
    VringBase(u32),
    /// An area of a vring is not aligned as virtio requires.
    #[error("the ring's {area} at {addr:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// The name of the area.
        area: &'static str,
        /// The front-end address of the area.
        addr: u64,
        /// The required alignment in bytes (virtio 1.3 §2.7, §2.8).
        align: u64,
    },
    /// SET_VRING_ADDR has flags that the protocol does not define.
    #[error("SET_VRING_ADDR has flags {0:#x}, of which virtionetd knows only 0x1")]
    VringAddrFlags(u32),
    /// The value of SET_VRING_ENABLE is neither 0 nor 1.
    #[error("a ring cannot be enabled with {0}; 1 enables and 0 disables it")]
    Enable(u32),
    /// IPv4 or virtio-net does not allow this MTU.
    #[error("an MTU of {0} bytes is not allowed; it must be 68 to 65535")]
    Mtu(u64),
    /// The device status has more than 8 bits.
    #[error("{0:#x} is not a device status; a device status has 8 bits")]
    Status(u64),
    /// The front-end accepts virtio features that were not offered.
    #[error("the front-end accepts feature bits {0:#x}, which virtionetd does not offer")]
    Features(u64),
    /// The front-end accepts protocol features that were not offered.
    #[error("the front-end accepts protocol feature bits {0:#x}, which virtionetd does not offer")]
    ProtocolFeatures(u64),
    /// The request would change the format of the vrings while some of them run.
    #[error(
        "the ring format cannot change between split and packed while rings run; stop them first"
    )]
    FormatWhileRunning,
    /// The memory table cannot be used.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// Guest memory or the dirty log in a file that another machine or process provides.
    #[error(
        "{what} lies in a file on {file_system}, where reading it can block for ever; use memory-backend-memfd, or a file on tmpfs or hugetlbfs"
    )]
    RemoteMemory {
        /// What lies there.
        what: &'static str,
        /// The name of the file system.
        file_system: &'static str,
    },
    /// The log of written pages cannot be used.
    #[error("{0}; the guest cannot be migrated")]
    Log(#[from] LogError),
    /// The log came without a file.
    #[error(
        "the dirty log has no file that virtionetd can share; the front-end must negotiate the protocol feature LOG_SHMFD and send one"
    )]
    LogWithoutFile,
    /// The front-end wants writes to be logged, but its last log was refused.
    #[error("the front-end's dirty log was refused, so writes cannot be logged; send another one")]
    LogRefused,
    /// A translation comes for a device that is not behind an IOMMU.
    #[error(
        "translations mean nothing without VIRTIO_F_ACCESS_PLATFORM, which the driver did not accept"
    )]
    NotTranslated,
    /// The type of an IOTLB message is neither UPDATE nor INVALIDATE.
    #[error(
        "{0} is not the type of an IOTLB message; a front-end sends 2 (UPDATE) and 3 (INVALIDATE)"
    )]
    IotlbType(u8),
    /// The range of a translation is empty or wraps.
    #[error("a translation cannot begin at {iova:#x} and have {size:#x} bytes")]
    TranslationRange {
        /// The first I/O virtual address.
        iova: u64,
        /// The size in bytes.
        size: u64,
    },
    /// The permission of a translation does not exist.
    #[error("{0} is not the permission of a translation; it must be 1 (ro), 2 (wo) or 3 (rw)")]
    TranslationPermission(u8),
    /// A translation leads out of the guest's memory.
    #[error(
        "a translation leads to the {size:#x} bytes at {user_addr:#x}, which are not in one region of the memory table"
    )]
    TranslationOutside {
        /// The first front-end address.
        user_addr: u64,
        /// The size in bytes.
        size: u64,
    },
    /// The descriptor of SET_BACKEND_REQ_FD is no unix stream socket.
    #[error("SET_BACKEND_REQ_FD carries something else than a connected unix stream socket")]
    BackendChannel,
    /// The host has no descriptor left for the event of a miss.
    #[error("cannot make an eventfd for translations: {0}; raise the limit of open files")]
    NoMissEvent(#[source] io::Error),
    /// Postcopy is not possible.
    #[error("{0}")]
    Postcopy(#[from] PostcopyError),
    /// The host lacks what a postcopy migration needs.
    #[error("postcopy is not possible: {0}; raise the limits of open files and threads")]
    PostcopyGuard(#[source] io::Error),
    /// The address is no network device's own.
    #[error("{0:02x?} is not the MAC address of a network device, so it is not announced")]
    Mac([u8; 6]),
    /// The device cannot do it.
    #[error("{0}")]
    Backend(#[from] BackendError),
    /// The request belongs to a protocol feature that was not offered.
    #[error("virtionetd does not offer it")]
    NotOffered,
    /// This version of the protocol does not have the request.
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
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Protocol(error) => error.code(),
            Self::NotShared => "memory-not-shared",
            Self::FdLimit => "open-file-limit",
            Self::FdWithheld => "descriptor-withheld",
            Self::MessageIncomplete(_) => "message-incomplete",
            Self::ReplyNotTaken(_) => "reply-not-taken",
            Self::Socket(_) => "vhost-user-socket-failed",
        }
    }
}

impl ProtocolError {
    /// A stable name of the error, for programs.
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
            Self::PostcopyOrder { .. } => "postcopy-order",
            Self::PostcopyMemory(_) => "postcopy-memory-not-accepted",
        }
    }
}

impl RequestError {
    /// A stable name of the error, for programs.
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
            Self::RemoteMemory { .. } => "memory-on-remote-file-system",
            Self::Log(_) => "dirty-log-invalid",
            Self::LogWithoutFile => "dirty-log-without-file",
            Self::LogRefused => "dirty-log-refused",
            Self::NotTranslated => "iotlb-without-iommu",
            Self::IotlbType(_) => "iotlb-type-invalid",
            Self::TranslationRange { .. } => "iotlb-range-invalid",
            Self::TranslationPermission(_) => "iotlb-permission-invalid",
            Self::TranslationOutside { .. } => "iotlb-address-unmapped",
            Self::BackendChannel => "backend-channel-invalid",
            Self::NoMissEvent(_) => "open-file-limit",
            Self::Postcopy(_) => "postcopy-not-possible",
            Self::PostcopyGuard(_) => "postcopy-not-guarded",
            Self::Mac(_) => "mac-invalid",
            Self::Backend(error) => error.code(),
            Self::NotOffered => "request-not-offered",
            Self::Unknown => "request-unknown",
        }
    }
}

/// Why a message is not a valid request.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The front-end broke the protocol, and the session must end.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// The message is well formed, but its values are not allowed.
    #[error("{0}")]
    Refused(#[from] RequestError),
}

#[cfg(test)]
mod tests;
