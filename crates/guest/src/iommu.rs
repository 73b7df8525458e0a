//! An IOMMU in front of a test's device: it answers the back-end's misses, when a test wants it to.
//!
//! The driver's addresses are the I/O virtual addresses. The IOMMU translates page by page to the
//! front-end addresses of the same memory, which the memory table has at other guest addresses
//! ([`to_distant_regions`]): a device that took an I/O virtual address for a guest address would
//! find nothing there.

use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;
use virtionet_virtqueue::memory::RegionSpec;

use crate::error::Error;
use crate::frontend::FrontendConnection;
use crate::memory::GuestRam;
use crate::message_stream::{MessageStream, VHOST_USER_VERSION};

/// VIRTIO_F_ACCESS_PLATFORM.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// The permission to read (VHOST_ACCESS_RO).
pub const READ_ONLY: u8 = 1;
/// The permission to write (VHOST_ACCESS_WO).
pub const WRITE_ONLY: u8 = 2;
/// Both (VHOST_ACCESS_RW).
pub const READ_WRITE: u8 = 3;

/// VHOST_IOTLB_UPDATE.
const UPDATE: u8 = 2;
/// VHOST_IOTLB_INVALIDATE.
const INVALIDATE: u8 = 3;
/// The size of a page.
const PAGE: u64 = 4096;
/// The distance of a guest address from its I/O virtual address.
pub const DISTANCE: u64 = 1 << 30;
/// The size of a request of the back-end: header and `struct vhost_iotlb_msg`.
const MISS_SIZE: usize = 12 + 32;

/// A miss of the back-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IotlbMiss {
    /// The I/O virtual address.
    pub iova: u64,
    /// What the back-end wants to do: [`READ_ONLY`], [`WRITE_ONLY`] or [`READ_WRITE`].
    pub access: u8,
}

/// The IOMMU, with its ends of the connection and of the back-end's channel.
#[derive(Debug)]
pub struct TestIommu {
    channel: UnixStream,
    connection: MessageStream,
    ram: GuestRam,
}

/// The payload of an IOTLB message.
#[must_use]
pub fn iotlb_message(iova: u64, size: u64, user_addr: u64, access: u8, kind: u8) -> Vec<u8> {
    let mut bytes = [iova, size, user_addr].map(u64::to_ne_bytes).concat();
    bytes.extend([access, kind, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// The regions as the memory table has them behind an IOMMU.
#[must_use]
pub fn to_distant_regions(regions: Vec<RegionSpec>) -> Vec<RegionSpec> {
    let move_away = |region: RegionSpec| RegionSpec {
        guest_addr: region.guest_addr + DISTANCE,
        ..region
    };
    regions.into_iter().map(move_away).collect()
}

impl FrontendConnection {
    /// SET_BACKEND_REQ_FD. Returns the front-end's end of the channel.
    ///
    /// # Errors
    /// When the back-end refuses, or the host has no sockets left.
    pub fn open_backend_channel(&mut self) -> Result<UnixStream, Error> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("cannot make the channel"))?;
        self.set(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()])?;
        Ok(ours)
    }

    /// VHOST_USER_IOTLB_MSG with the type INVALIDATE. When it returns, the device no longer uses the
    /// translations of the range.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn invalidate(&mut self, iova: u64, size: u64) -> Result<(), Error> {
        let body = iotlb_message(iova, size, 0, 0, INVALIDATE);
        self.set(FrontendReq::IOTLB_MSG, &body, &[])
    }

    /// VHOST_USER_IOTLB_MSG with the type UPDATE.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn update_translation(
        &mut self,
        iova: u64,
        size: u64,
        user_addr: u64,
        access: u8,
    ) -> Result<(), Error> {
        let body = iotlb_message(iova, size, user_addr, access, UPDATE);
        self.set(FrontendReq::IOTLB_MSG, &body, &[])
    }
}

impl TestIommu {
    /// The IOMMU of a guest with this memory. `socket` is the front-end's end of the vhost-user
    /// connection, and `channel` that of [`FrontendConnection::open_backend_channel`].
    ///
    /// # Errors
    /// When a socket does not accept a time limit.
    pub fn new(socket: UnixStream, channel: UnixStream, ram: &GuestRam) -> Result<Self, Error> {
        channel
            .set_read_timeout(Some(Duration::from_millis(20)))
            .map_err(Error::io("cannot set the channel's time limit"))?;
        Ok(Self {
            channel,
            connection: MessageStream::from_socket(socket)?,
            ram: ram.clone(),
        })
    }

    /// The next miss; `None` if none comes within 20 ms.
    ///
    /// # Errors
    /// When the back-end has closed the channel, or sends something else.
    pub fn next_miss(&mut self) -> io::Result<Option<IotlbMiss>> {
        let mut bytes = [0; MISS_SIZE];
        match self.channel.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        if bytes[..12] != [1u32, 1, 32].map(u32::to_ne_bytes).concat() || bytes[37] != 1 {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut iova = [0; 8];
        iova.copy_from_slice(&bytes[12..20]);
        Ok(Some(IotlbMiss {
            iova: u64::from_ne_bytes(iova),
            access: bytes[36],
        }))
    }

    /// Answers a miss with the permission to read and write the page, without waiting for an
    /// acknowledgement, which the user of the connection would have to take. An address outside of
    /// the guest's memory is not answered.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn answer(&mut self, miss: IotlbMiss) -> Result<(), Error> {
        let Some(user_addr) = self.ram.user_addr(miss.iova) else {
            return Ok(());
        };
        let body = iotlb_message(miss.iova, PAGE, user_addr, READ_WRITE, UPDATE);
        let code = FrontendReq::IOTLB_MSG.into();
        self.connection.send(code, VHOST_USER_VERSION, &body, &[])
    }

    /// Answers all misses until `is_done`, for at most 20 s. Returns how many there were.
    ///
    /// # Errors
    /// When the connection fails, or 20 s have passed.
    pub fn serve_until(&mut self, is_done: impl Fn() -> bool) -> Result<usize, Error> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut answered = 0;
        while !is_done() {
            if Instant::now() > deadline {
                return Err(Error::TimedOut(FrontendReq::IOTLB_MSG.into()));
            }
            while let Some(miss) = self
                .next_miss()
                .map_err(Error::io("cannot read the channel"))?
            {
                self.answer(miss)?;
                answered += 1;
            }
        }
        Ok(answered)
    }
}
