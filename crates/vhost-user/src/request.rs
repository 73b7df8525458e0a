//! Requests, decoded from a message and checked as far as that is possible without state.

mod body;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
    VhostUserU64, VhostUserVringAddr, VhostUserVringState,
};
use virtionet_virtqueue::MAX_QUEUE_SIZE;
use virtionet_virtqueue::memory::RegionSpec;

use crate::error::{DecodeError, ProtocolError, RequestError};
use crate::eventfd;
use crate::foreign_fd::ForeignFd;
use crate::iotlb_message::{IOTLB_MESSAGE_SIZE, IotlbMessage};
use crate::limits::MAX_TABLE_REGIONS;
use body::{RequestBody, from_bytes};

/// The vring's index in the payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: bits 0-7.
const INDEX_MASK: u64 = 0xff;
/// The bit of these payloads that means that no descriptor comes with the message: bit 8.
const NO_FD: u64 = 1 << 8;
/// The flag of SET_VRING_ADDR that asks for a log of writes to the used ring: bit 0.
const VHOST_VRING_F_LOG: u32 = 1;
/// The smallest MTU of IPv4 (RFC 791) and of virtio-net (virtio 1.3 §5.1.4.1).
const MIN_MTU: u16 = 68;

/// A request of the front-end. The session checks whether its vring exists and whether its bits
/// were offered.
#[derive(Debug)]
pub enum Request {
    /// Asks for the virtio features that the device offers.
    GetFeatures,
    /// Accepts virtio features.
    SetFeatures(u64),
    /// Begins a session.
    SetOwner,
    /// Stops all vrings (deprecated).
    ResetOwner,
    /// Replaces the memory table.
    SetMemTable(Vec<(RegionSpec, ForeignFd)>),
    /// Adds a region to the memory table.
    AddMemReg(RegionSpec, ForeignFd),
    /// Removes a region from the memory table; its file offset means nothing.
    RemMemReg(RegionSpec),
    /// Acknowledges the addresses of the memory table, in a postcopy migration: 0 if the front-end
    /// can provide the pages. In the form of SET_MEM_TABLE it is an empty table.
    AcknowledgeMemory(u64),
    /// Asks for a userfaultfd.
    PostcopyAdvise,
    /// From now on pages of guest memory may be missing.
    PostcopyListen,
    /// All pages of guest memory have arrived.
    PostcopyEnd,
    /// Sets the log of written pages.
    SetLogBase(LogBase),
    /// Sets a descriptor that would be signalled when the log changes; nobody uses it.
    SetLogFd,
    /// Asks how many regions the memory table may have.
    GetMaxMemSlots,
    /// Sets the size of a vring: 1 to 32,768.
    SetVringNum {
        /// The vring's index.
        ring: u16,
        /// The number of descriptors.
        size: u16,
    },
    /// Sets the addresses of a vring, aligned as virtio requires.
    SetVringAddr {
        /// The vring's index.
        ring: u16,
        /// The areas of the vring.
        areas: VringAreas,
        /// The guest address at which writes to the used ring are logged, if they are.
        used_log: Option<u64>,
    },
    /// Sets the position at which a vring continues.
    SetVringBase {
        /// The vring's index.
        ring: u16,
        /// See [`crate::VringStart::base`].
        base: u32,
    },
    /// Stops a vring and asks for the position at which it would continue.
    GetVringBase {
        /// The vring's index.
        ring: u16,
    },
    /// Sets the descriptor that the driver signals, and allows the vring to start.
    SetVringKick(VringEventFd),
    /// Sets the descriptor with which the device signals the driver.
    SetVringCall(VringEventFd),
    /// Sets the descriptor with which the device reports a fault of the vring to the front-end.
    SetVringErr(VringEventFd),
    /// Enables or disables a vring.
    SetVringEnable {
        /// The vring's index.
        ring: u16,
        /// Whether the vring carries frames.
        enabled: bool,
    },
    /// Asks for the protocol features that the back-end offers.
    GetProtocolFeatures,
    /// Accepts protocol features.
    SetProtocolFeatures(u64),
    /// Asks for the number of queue pairs.
    GetQueueNum,
    /// Sets the MTU that the guest sees: 68 to 65,535.
    NetSetMtu(u16),
    /// Asks for a RARP frame from this MAC address.
    SendRarp([u8; 6]),
    /// Resets the device.
    ResetDevice,
    /// Asks for the device status.
    GetStatus,
    /// Sets the device status.
    SetStatus(u8),
    /// Sets the channel for requests of the back-end.
    SetBackendReqFd(ForeignFd),
    /// Adds or removes translations of I/O virtual addresses.
    Iotlb(IotlbMessage),
    /// A request that belongs to a protocol feature that was not offered.
    NotOffered(FrontendReq),
    /// A request that this version of the protocol does not have.
    Unknown(u32),
}

/// Whether a front-end waits for an answer of its own to `request`, which an acknowledgement is
/// not.
#[must_use]
pub fn has_own_reply(request: FrontendReq) -> bool {
    use FrontendReq as Code;
    matches!(
        request,
        Code::GET_CONFIG
            | Code::GET_INFLIGHT_FD
            | Code::CREATE_CRYPTO_SESSION
            | Code::POSTCOPY_ADVISE
            | Code::POSTCOPY_END
            | Code::GET_SHARED_OBJECT
            | Code::SET_DEVICE_STATE_FD
            | Code::CHECK_DEVICE_STATE
    )
}

/// A vring's areas, as front-end addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAreas {
    /// The descriptor table (split) or descriptor ring (packed).
    pub desc: u64,
    /// The available ring (split) or the driver's event suppression area (packed).
    pub avail: u64,
    /// The used ring (split) or the device's event suppression area (packed).
    pub used: u64,
}

/// A log of written pages, as SET_LOG_BASE describes it.
#[derive(Debug)]
pub struct LogBase {
    /// Its size in bytes.
    pub size: u64,
    /// Its offset in its file in bytes.
    pub offset: u64,
    /// Its file. A front-end that did not negotiate LOG_SHMFD sends none.
    pub fd: Option<ForeignFd>,
}

/// An eventfd for a vring.
#[derive(Debug)]
pub struct VringEventFd {
    /// The vring's index.
    pub ring: u16,
    /// A non-blocking eventfd; with `None` polling is used instead.
    pub fd: Option<Arc<OwnedFd>>,
}

impl Request {
    /// Decodes request `code`. Descriptors that the request does not need are closed.
    ///
    /// # Errors
    /// [`DecodeError::Protocol`] when the payload's size, the number of descriptors or their kind
    /// are not the request's; [`DecodeError::Refused`] when a value is not allowed.
    pub fn decode(code: u32, payload: &[u8], fds: Vec<ForeignFd>) -> Result<Self, DecodeError> {
        let Ok(request) = FrontendReq::try_from(code) else {
            // Where nothing has changed, QEMU acknowledges the memory table under no name.
            return Ok(match <[u8; 8]>::try_from(payload) {
                Ok(bytes) if code == 0 => Self::AcknowledgeMemory(u64::from_ne_bytes(bytes)),
                _ => Self::Unknown(code),
            });
        };
        RequestBody {
            request,
            payload,
            fds,
        }
        .decode()
    }
}

impl RequestBody<'_> {
    fn decode(self) -> Result<Request, DecodeError> {
        use FrontendReq as Code;
        Ok(match self.request {
            Code::GET_FEATURES => self.decode_empty(Request::GetFeatures)?,
            Code::SET_FEATURES => Request::SetFeatures(self.decode_u64()?),
            Code::SET_OWNER => self.decode_empty(Request::SetOwner)?,
            Code::RESET_OWNER => self.decode_empty(Request::ResetOwner)?,
            Code::SET_MEM_TABLE => self.decode_mem_table()?,
            // QEMU's acknowledgement has the name of its last request.
            Code::ADD_MEM_REG | Code::REM_MEM_REG if self.is_u64() => {
                Request::AcknowledgeMemory(self.decode_u64()?)
            }
            Code::ADD_MEM_REG => self.decode_add_mem_reg()?,
            Code::REM_MEM_REG => self.decode_rem_mem_reg()?,
            Code::SET_LOG_BASE => self.decode_log_base()?,
            Code::SET_LOG_FD => self.decode_log_fd()?,
            Code::GET_MAX_MEM_SLOTS => self.decode_empty(Request::GetMaxMemSlots)?,
            Code::SET_VRING_NUM => self.decode_vring_num()?,
            Code::SET_VRING_ADDR => self.decode_vring_addr()?,
            Code::SET_VRING_BASE => self.decode_vring_base()?,
            Code::GET_VRING_BASE => self.decode_get_vring_base()?,
            Code::SET_VRING_KICK => Request::SetVringKick(self.decode_vring_fd()?),
            Code::SET_VRING_CALL => Request::SetVringCall(self.decode_vring_fd()?),
            Code::SET_VRING_ERR => Request::SetVringErr(self.decode_vring_fd()?),
            Code::SET_VRING_ENABLE => self.decode_vring_enable()?,
            Code::GET_PROTOCOL_FEATURES => self.decode_empty(Request::GetProtocolFeatures)?,
            Code::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(self.decode_u64()?),
            Code::GET_QUEUE_NUM => self.decode_empty(Request::GetQueueNum)?,
            Code::NET_SET_MTU => self.decode_mtu()?,
            Code::SEND_RARP => self.decode_rarp()?,
            Code::RESET_DEVICE => self.decode_empty(Request::ResetDevice)?,
            Code::GET_STATUS => self.decode_empty(Request::GetStatus)?,
            Code::SET_STATUS => self.decode_status()?,
            Code::SET_BACKEND_REQ_FD => self.decode_backend_channel()?,
            Code::IOTLB_MSG => self.decode_iotlb()?,
            Code::POSTCOPY_ADVISE => self.decode_empty(Request::PostcopyAdvise)?,
            Code::POSTCOPY_LISTEN => self.decode_empty(Request::PostcopyListen)?,
            Code::POSTCOPY_END => self.decode_empty(Request::PostcopyEnd)?,
            other => Request::NotOffered(other),
        })
    }

    fn decode_empty(&self, request: Request) -> Result<Request, ProtocolError> {
        self.check_fd_count(0)?;
        self.check_size(0)?;
        Ok(request)
    }

    /// Whether the message is a number and nothing else.
    fn is_u64(&self) -> bool {
        self.payload.len() == size_of::<u64>() && self.fds.is_empty()
    }

    fn decode_u64(&self) -> Result<u64, ProtocolError> {
        self.check_fd_count(0)?;
        Ok(self.read::<VhostUserU64>()?.value)
    }

    fn decode_mem_table(self) -> Result<Request, DecodeError> {
        const HEAD: usize = size_of::<VhostUserMemory>();
        const ENTRY: usize = size_of::<VhostUserMemoryRegion>();
        let Some((head, entries)) = self.payload.split_at_checked(HEAD) else {
            return Err(self.wrong_size(HEAD).into());
        };
        let announced = from_bytes::<VhostUserMemory>(head).num_regions;
        let regions = usize::try_from(announced)
            .ok()
            .filter(|n| *n <= MAX_TABLE_REGIONS)
            .ok_or(ProtocolError::Regions(announced))?;
        self.check_size(HEAD + regions * ENTRY)?;
        self.check_fd_count(regions)?;
        let specs = entries
            .chunks(ENTRY)
            .map(|entry| to_region_spec(&from_bytes(entry)));
        Ok(Request::SetMemTable(specs.zip(self.fds).collect()))
    }

    fn decode_add_mem_reg(mut self) -> Result<Request, DecodeError> {
        self.check_fd_count(1)?;
        let spec = to_region_spec(&*self.read::<VhostUserSingleMemoryRegion>()?);
        let fd = self.take_fd()?;
        Ok(Request::AddMemReg(spec, fd))
    }

    /// Accepts a descriptor, which older front-ends send, and closes it without using it.
    fn decode_rem_mem_reg(self) -> Result<Request, DecodeError> {
        if self.fds.len() > 1 {
            self.check_fd_count(0)?;
        }
        let region = self.read::<VhostUserSingleMemoryRegion>()?;
        Ok(Request::RemMemReg(to_region_spec(&region)))
    }

    fn decode_log_base(mut self) -> Result<Request, DecodeError> {
        if self.fds.len() > 1 {
            self.check_fd_count(1)?;
        }
        let log = self.read::<VhostUserLog>()?;
        Ok(Request::SetLogBase(LogBase {
            size: log.mmap_size,
            offset: log.mmap_offset,
            fd: self.fds.pop(),
        }))
    }

    fn decode_backend_channel(mut self) -> Result<Request, DecodeError> {
        self.check_fd_count(1)?;
        Ok(Request::SetBackendReqFd(self.take_fd()?))
    }

    fn decode_iotlb(&self) -> Result<Request, DecodeError> {
        self.check_fd_count(0)?;
        let Ok(payload) = self.payload.try_into() else {
            return Err(self.wrong_size(IOTLB_MESSAGE_SIZE).into());
        };
        Ok(Request::Iotlb(IotlbMessage::decode(payload)?))
    }

    /// Closes the descriptor. The protocol defines no payload; one that old front-ends may send is
    /// not looked at.
    fn decode_log_fd(self) -> Result<Request, DecodeError> {
        if self.fds.len() > 1 {
            self.check_fd_count(1)?;
        }
        Ok(Request::SetLogFd)
    }

    fn decode_vring_num(&self) -> Result<Request, DecodeError> {
        let (ring, num) = self.decode_vring_state()?;
        let size = u16::try_from(num)
            .ok()
            .filter(|size| (1..=MAX_QUEUE_SIZE).contains(size))
            .ok_or(RequestError::VringSize(num))?;
        Ok(Request::SetVringNum { ring, size })
    }

    fn decode_vring_addr(&self) -> Result<Request, DecodeError> {
        self.check_fd_count(0)?;
        let addr = self.read::<VhostUserVringAddr>()?;
        let ring = to_vring_index(addr.index)?;
        if addr.flags & !VHOST_VRING_F_LOG != 0 {
            return Err(RequestError::VringAddrFlags(addr.flags).into());
        }
        let areas = VringAreas {
            desc: check_aligned("descriptor area", addr.descriptor, 16)?,
            avail: check_aligned("driver area", addr.available, 2)?,
            used: check_aligned("device area", addr.used, 4)?,
        };
        let used_log = (addr.flags & VHOST_VRING_F_LOG != 0).then_some(addr.log);
        Ok(Request::SetVringAddr {
            ring,
            areas,
            used_log,
        })
    }

    fn decode_vring_base(&self) -> Result<Request, DecodeError> {
        let (ring, base) = self.decode_vring_state()?;
        Ok(Request::SetVringBase { ring, base })
    }

    fn decode_get_vring_base(&self) -> Result<Request, DecodeError> {
        let request = self.request;
        match self.decode_vring_state() {
            Ok((ring, _)) => Ok(Request::GetVringBase { ring }),
            Err(DecodeError::Refused(refusal)) => {
                Err(ProtocolError::Unanswerable { request, refusal }.into())
            }
            Err(error) => Err(error),
        }
    }

    fn decode_vring_enable(&self) -> Result<Request, DecodeError> {
        let (ring, num) = self.decode_vring_state()?;
        let enabled = match num {
            0 => false,
            1 => true,
            other => return Err(RequestError::Enable(other).into()),
        };
        Ok(Request::SetVringEnable { ring, enabled })
    }

    fn decode_vring_fd(mut self) -> Result<VringEventFd, DecodeError> {
        let value = self.read::<VhostUserU64>()?.value;
        self.check_fd_count(usize::from(value & NO_FD == 0))?;
        if value & !(INDEX_MASK | NO_FD) != 0 {
            return Err(RequestError::VringIndex(value).into());
        }
        let ring = u16::from((value & INDEX_MASK).to_le_bytes()[0]);
        if value & NO_FD != 0 {
            return Ok(VringEventFd { ring, fd: None });
        }
        let request = self.request;
        let fd = eventfd::from_fd(self.take_fd()?).map_err(|found| ProtocolError::NotEventFd {
            request,
            ring,
            found,
        })?;
        Ok(VringEventFd { ring, fd: Some(fd) })
    }

    fn decode_mtu(&self) -> Result<Request, DecodeError> {
        let value = self.decode_u64()?;
        let mtu = u16::try_from(value)
            .ok()
            .filter(|mtu| *mtu >= MIN_MTU)
            .ok_or(RequestError::Mtu(value))?;
        Ok(Request::NetSetMtu(mtu))
    }

    /// Reads the address from the first six bytes of the payload, in the order in which they lie in
    /// memory.
    fn decode_rarp(&self) -> Result<Request, DecodeError> {
        let [a, b, c, d, e, f, _, _] = self.decode_u64()?.to_ne_bytes();
        Ok(Request::SendRarp([a, b, c, d, e, f]))
    }

    fn decode_status(&self) -> Result<Request, DecodeError> {
        let value = self.decode_u64()?;
        let status = u8::try_from(value).map_err(|_| RequestError::Status(value))?;
        Ok(Request::SetStatus(status))
    }

    /// Reads the index of a vring and a number.
    fn decode_vring_state(&self) -> Result<(u16, u32), DecodeError> {
        self.check_fd_count(0)?;
        let state = self.read::<VhostUserVringState>()?;
        Ok((to_vring_index(state.index)?, state.num))
    }
}

fn to_region_spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        user_addr: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

fn to_vring_index(index: u32) -> Result<u16, RequestError> {
    u8::try_from(index)
        .map(u16::from)
        .map_err(|_| RequestError::VringIndex(index.into()))
}

fn check_aligned(area: &'static str, addr: u64, align: u64) -> Result<u64, RequestError> {
    if addr.is_multiple_of(align) {
        return Ok(addr);
    }
    Err(RequestError::Misaligned { area, addr, align })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{eventfd, payload};
    use std::fs::File;

    fn text(code: FrontendReq, payload: &[u8], fds: usize) -> Result<Request, String> {
        let fds = (0..fds).map(|_| ForeignFd::new(eventfd(0))).collect();
        Request::decode(code.into(), payload, fds).map_err(|error| match error {
            DecodeError::Protocol(error) => format!("protocol error: {error}"),
            DecodeError::Refused(refusal) => format!("refused: {refusal}"),
        })
    }

    #[test]
    fn malformed_request_has_an_error_that_names_its_defect() {
        use FrontendReq as Code;
        let num = |index: u32, num: u32| payload(&[index, num]);
        let addr = |flags: u32, desc: u64, used: u64, avail: u64| {
            let mut bytes = payload(&[0u32, flags]);
            for word in [desc, used, avail, 0] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes
        };
        let table = |n: u32, regions: usize| [payload(&[n, 0]), vec![0; regions * 32]].concat();
        let u64s = |value: u64| value.to_ne_bytes().to_vec();
        for (code, bytes, fds, want) in [
            (
                Code::GET_FEATURES,
                vec![0; 8],
                0,
                "protocol error: GET_FEATURES has a payload of 8 bytes",
            ),
            (
                Code::GET_FEATURES,
                vec![],
                1,
                "protocol error: GET_FEATURES carries 1 file",
            ),
            (Code::SET_FEATURES, vec![0; 7], 0, "instead of 8"),
            (
                Code::SET_FEATURES,
                vec![],
                0,
                "protocol error: SET_FEATURES has a payload of 0",
            ),
            (
                Code::SET_FEATURES,
                vec![0; 4096],
                0,
                "protocol error: SET_FEATURES has a payload of 4096",
            ),
            (
                Code::SET_MEM_TABLE,
                vec![0; 7],
                0,
                "protocol error: SET_MEM_TABLE has a payload of 7",
            ),
            (Code::SET_MEM_TABLE, table(1, 2), 1, "instead of 40"),
            (
                Code::SET_MEM_TABLE,
                table(2, 2),
                1,
                "1 file descriptors instead of 2",
            ),
            (
                Code::SET_MEM_TABLE,
                table(1, 1),
                2,
                "2 file descriptors instead of 1",
            ),
            (
                Code::SET_MEM_TABLE,
                table(9, 9),
                9,
                "protocol error: SET_MEM_TABLE announces 9",
            ),
            (Code::SET_MEM_TABLE, table(33, 33), 8, "announces 33"),
            (
                Code::SET_MEM_TABLE,
                table(u32::MAX, 1),
                1,
                "announces 4294967295",
            ),
            (
                Code::ADD_MEM_REG,
                vec![0; 40],
                0,
                "0 file descriptors instead of 1",
            ),
            (
                Code::ADD_MEM_REG,
                vec![0; 40],
                2,
                "2 file descriptors instead of 1",
            ),
            (Code::ADD_MEM_REG, vec![0; 32], 1, "instead of 40"),
            (
                Code::REM_MEM_REG,
                vec![0; 40],
                2,
                "2 file descriptors instead of 0",
            ),
            (Code::SET_VRING_NUM, num(0, 0), 0, "refused: ring size 0"),
            (
                Code::SET_VRING_NUM,
                num(0, 32769),
                0,
                "refused: ring size 32769",
            ),
            (
                Code::SET_VRING_NUM,
                num(0, 65536 + 256),
                0,
                "refused: ring size 65792",
            ),
            (
                Code::SET_VRING_NUM,
                num(256, 256),
                0,
                "refused: 0x100 is not a ring index",
            ),
            (
                Code::SET_VRING_NUM,
                num(u32::MAX, 256),
                0,
                "refused: 0xffffffff is not",
            ),
            (
                Code::SET_VRING_ADDR,
                addr(0, 8, 0, 0),
                0,
                "descriptor area at 0x8 is not aligned to 16",
            ),
            (
                Code::SET_VRING_ADDR,
                addr(0, 0, 2, 0),
                0,
                "device area at 0x2 is not aligned to 4",
            ),
            (
                Code::SET_VRING_ADDR,
                addr(0, 0, 0, 1),
                0,
                "driver area at 0x1 is not aligned to 2",
            ),
            (
                Code::SET_VRING_ADDR,
                addr(3, 0, 0, 0),
                0,
                "refused: SET_VRING_ADDR has flags 0x3",
            ),
            (
                Code::GET_VRING_BASE,
                num(256, 0),
                0,
                "protocol error: GET_VRING_BASE cannot be answered: 0x100",
            ),
            (
                Code::SET_VRING_KICK,
                u64s(0),
                0,
                "protocol error: SET_VRING_KICK carries 0 file",
            ),
            (
                Code::SET_VRING_KICK,
                u64s(0),
                2,
                "protocol error: SET_VRING_KICK carries 2 file",
            ),
            (
                Code::SET_VRING_CALL,
                u64s(0x100),
                1,
                "protocol error: SET_VRING_CALL carries 1 file",
            ),
            (
                Code::SET_VRING_ERR,
                u64s(0x200),
                1,
                "refused: 0x200 is not a ring index",
            ),
            (
                Code::SET_VRING_ENABLE,
                num(0, 2),
                0,
                "refused: a ring cannot be enabled with 2",
            ),
            (Code::NET_SET_MTU, u64s(67), 0, "refused: an MTU of 67"),
            (
                Code::NET_SET_MTU,
                u64s(65536),
                0,
                "refused: an MTU of 65536",
            ),
            (
                Code::SET_STATUS,
                u64s(256),
                0,
                "refused: 0x100 is not a device status",
            ),
        ] {
            let got = text(code, &bytes, fds).unwrap_err();
            assert!(got.contains(want), "{code:?}: {got}\nwanted: {want}");
        }
    }

    #[test]
    fn kick_descriptor_that_is_not_an_eventfd_is_refused() {
        for path in ["/dev/zero", "/"] {
            let fds = vec![ForeignFd::new(File::open(path).unwrap().into())];
            let code = FrontendReq::SET_VRING_KICK.into();
            let error = Request::decode(code, &3u64.to_ne_bytes(), fds).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("SET_VRING_KICK for ring 3 carries {path} instead of an eventfd")
            );
        }
    }

    #[test]
    fn well_formed_request_is_decoded_with_its_values() {
        let region = |base: u64| {
            [base, base + 1, base + 2, base + 3]
                .map(u64::to_ne_bytes)
                .concat()
        };
        let bytes = [payload(&[2, 0]), region(10), region(20)].concat();
        let Ok(Request::SetMemTable(regions)) = text(FrontendReq::SET_MEM_TABLE, &bytes, 2) else {
            panic!("no table");
        };
        let want = |base| RegionSpec {
            guest_addr: base,
            size: base + 1,
            user_addr: base + 2,
            file_offset: base + 3,
        };
        assert_eq!(regions[0].0, want(10));
        assert_eq!(regions[1].0, want(20));

        let bytes = [vec![0; 8], region(30)].concat();
        let Ok(Request::RemMemReg(spec)) = text(FrontendReq::REM_MEM_REG, &bytes, 1) else {
            panic!("no region");
        };
        assert_eq!(spec, want(30));

        let Ok(Request::SendRarp(mac)) = text(FrontendReq::SEND_RARP, &[1, 2, 3, 4, 5, 6, 7, 8], 0)
        else {
            panic!("no address");
        };
        assert_eq!(mac, [1, 2, 3, 4, 5, 6]);

        let bytes = 0x1ffu64.to_ne_bytes();
        let Ok(Request::SetVringKick(kick)) = text(FrontendReq::SET_VRING_KICK, &bytes, 0) else {
            panic!("no kick");
        };
        assert!(kick.ring == 255 && kick.fd.is_none());
    }

    #[test]
    fn log_base_is_decoded_with_and_without_a_descriptor() {
        let bytes = [8u64, 4096].map(u64::to_ne_bytes).concat();
        for fds in [0, 1] {
            let decoded = text(FrontendReq::SET_LOG_BASE, &bytes, fds);
            let Ok(Request::SetLogBase(log)) = decoded else {
                panic!("no log");
            };
            assert_eq!((log.size, log.offset), (8, 4096));
            assert_eq!(log.fd.is_some(), fds == 1);
        }
        for (bytes, fds, want) in [(&bytes[..8], 1, "instead of 16"), (&bytes[..], 2, "2 file")] {
            let error = text(FrontendReq::SET_LOG_BASE, bytes, fds).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        for bytes in [&[][..], &[0; 8]] {
            let decoded = text(FrontendReq::SET_LOG_FD, bytes, 1);
            assert!(matches!(decoded, Ok(Request::SetLogFd)));
        }
    }

    #[test]
    fn used_ring_is_logged_only_with_the_flag() {
        for (flags, want) in [(0, None), (1, Some(0x7000))] {
            let mut bytes = payload(&[0u32, flags]);
            bytes.extend([0u64, 0, 0, 0x7000].map(u64::to_ne_bytes).concat());
            let decoded = text(FrontendReq::SET_VRING_ADDR, &bytes, 0);
            let Ok(Request::SetVringAddr { used_log, .. }) = decoded else {
                panic!("no addresses");
            };
            assert_eq!(used_log, want);
        }
    }

    #[test]
    fn request_that_is_not_offered_is_named_and_its_descriptor_closed() {
        assert!(matches!(
            text(FrontendReq::SET_INFLIGHT_FD, &[0; 16], 1),
            Ok(Request::NotOffered(FrontendReq::SET_INFLIGHT_FD))
        ));
        assert!(matches!(
            Request::decode(1000, &[0; 100], vec![ForeignFd::new(eventfd(0))]),
            Ok(Request::Unknown(1000))
        ));
    }
}
