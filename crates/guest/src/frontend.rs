//! The vhost-user front-end: one message a method, and raw messages for tests of the protocol.
//!
//! The `vhost` crate's own front-end cannot take this place: it refuses SET_VRING_ENABLE before
//! SET_FEATURES, which is what QEMU sends, and counts GET_QUEUE_NUM in rings where QEMU counts
//! pairs. Its message vocabulary is used.

use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use virtionet_virtqueue::memory::RegionSpec;

use crate::driver::VirtqueueAddresses;
use crate::error::Error;
use crate::memory::{GuestRam, RamError, to_u64};
use crate::message_stream::{MessageStream, VHOST_USER_NEED_REPLY_MASK, VHOST_USER_VERSION};

/// The feature bit that stands for the protocol features (VHOST_USER_F_PROTOCOL_FEATURES).
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// The feature bit that turns dirty logging on (VHOST_F_LOG_ALL).
pub const VHOST_F_LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// In SET_VRING_KICK, CALL and ERR: no descriptor comes with the message.
pub const VHOST_USER_VRING_NOFD_MASK: u64 = 1 << 8;
/// In SET_VRING_ADDR: the used ring's writes are logged.
pub const VHOST_VRING_F_LOG_MASK: u32 = 1;

/// A front-end's end of a vhost-user connection.
#[derive(Debug)]
pub struct FrontendConnection {
    /// The socket, for messages that no method here would send.
    pub wire: MessageStream,
    /// Protocol features in force.
    protocol: u64,
    /// Whether every request without a reply of its own asks for an acknowledgement, once
    /// REPLY_ACK is negotiated.
    pub acknowledge: bool,
}

impl FrontendConnection {
    /// Over a connected socket; replies are awaited for 10 s.
    ///
    /// # Errors
    /// When the socket takes no time limit.
    pub fn from_socket(socket: UnixStream) -> Result<Self, Error> {
        Ok(Self::on(MessageStream::from_socket(socket)?))
    }

    /// Connects to a listening back-end, trying for up to `patience`.
    ///
    /// # Errors
    /// When nobody listens in that time.
    pub fn connect(path: &Path, connect_timeout: Duration) -> Result<Self, Error> {
        Ok(Self::on(MessageStream::connect(path, connect_timeout)?))
    }

    fn on(wire: MessageStream) -> Self {
        Self {
            wire,
            protocol: 0,
            acknowledge: true,
        }
    }

    /// Whether a protocol feature is in force.
    #[must_use]
    pub fn has_feature(&self, feature: Protocol) -> bool {
        self.protocol & feature.bits() != 0
    }

    /// GET_FEATURES.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn get_features(&mut self) -> Result<u64, Error> {
        self.get_u64(FrontendReq::GET_FEATURES)
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_features(&mut self, features: u64) -> Result<(), Error> {
        self.set_u64(FrontendReq::SET_FEATURES, features)
    }

    /// GET_PROTOCOL_FEATURES.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn get_protocol_features(&mut self) -> Result<u64, Error> {
        self.get_u64(FrontendReq::GET_PROTOCOL_FEATURES)
    }

    /// SET_PROTOCOL_FEATURES; they are in force from here on.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<(), Error> {
        self.set_u64(FrontendReq::SET_PROTOCOL_FEATURES, features)?;
        self.protocol = features;
        Ok(())
    }

    /// SET_OWNER.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_owner(&mut self) -> Result<(), Error> {
        self.set(FrontendReq::SET_OWNER, &[], &[])
    }

    /// RESET_OWNER.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn reset_owner(&mut self) -> Result<(), Error> {
        self.set(FrontendReq::RESET_OWNER, &[], &[])
    }

    /// RESET_DEVICE.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn reset_device(&mut self) -> Result<(), Error> {
        self.set(FrontendReq::RESET_DEVICE, &[], &[])
    }

    /// GET_QUEUE_NUM: the back-end's queue *pairs*.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn get_queue_num(&mut self) -> Result<u64, Error> {
        self.get_u64(FrontendReq::GET_QUEUE_NUM)
    }

    /// GET_MAX_MEM_SLOTS.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn get_max_mem_slots(&mut self) -> Result<u64, Error> {
        self.get_u64(FrontendReq::GET_MAX_MEM_SLOTS)
    }

    /// SET_MEM_TABLE with every region of `ram`.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn share(&mut self, ram: &GuestRam) -> Result<(), Error> {
        let table: Vec<_> = ram.regions().into_iter().map(|r| (r, ram.fd())).collect();
        self.set_mem_table(&table)
    }

    /// SET_MEM_TABLE with any regions and files.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_mem_table(&mut self, table: &[(RegionSpec, RawFd)]) -> Result<(), Error> {
        let mut body = to_u64(table.len()).to_ne_bytes().to_vec();
        let mut fds = Vec::new();
        for (region, fd) in table {
            body.extend_from_slice(&region_bytes(region));
            fds.push(*fd);
        }
        self.set(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    /// ADD_MEM_REG.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn add_mem_region(&mut self, region: &RegionSpec, fd: RawFd) -> Result<(), Error> {
        let body = [&[0; 8][..], &region_bytes(region)].concat();
        self.set(FrontendReq::ADD_MEM_REG, &body, &[fd])
    }

    /// REM_MEM_REG.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn remove_mem_region(&mut self, region: &RegionSpec) -> Result<(), Error> {
        let body = [&[0; 8][..], &region_bytes(region)].concat();
        self.set(FrontendReq::REM_MEM_REG, &body, &[])
    }

    /// SET_LOG_BASE: `size` bytes from `offset` of the log's file.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_log_base(&mut self, size: u64, offset: u64, log: RawFd) -> Result<(), Error> {
        let body = words(&[size, offset]);
        if self.has_feature(Protocol::LOG_SHMFD) {
            // With LOG_SHMFD the message has a reply of its own, of no set content.
            self.wire.send(
                FrontendReq::SET_LOG_BASE.into(),
                VHOST_USER_VERSION,
                &body,
                &[log],
            )?;
            self.wire.reply(FrontendReq::SET_LOG_BASE.into()).map(drop)
        } else {
            self.set(FrontendReq::SET_LOG_BASE, &body, &[log])
        }
    }

    /// SET_VRING_NUM.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_num(&mut self, ring: u32, size: u32) -> Result<(), Error> {
        self.set_ring(FrontendReq::SET_VRING_NUM, ring, size)
    }

    /// SET_VRING_BASE.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_base(&mut self, ring: u32, base: u32) -> Result<(), Error> {
        self.set_ring(FrontendReq::SET_VRING_BASE, ring, base)
    }

    /// GET_VRING_BASE: stops the ring.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn get_vring_base(&mut self, ring: u32) -> Result<u32, Error> {
        let request = FrontendReq::GET_VRING_BASE;
        let reply = self.get(request, &u32_pair_bytes(ring, 0), 8)?;
        match reply.as_chunks() {
            ([index, base], []) if u32::from_ne_bytes(*index) == ring => {
                Ok(u32::from_ne_bytes(*base))
            }
            _ => Err(Error::Reply {
                request: request.into(),
                what: format!("it names another ring than {ring}"),
            }),
        }
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_enable(&mut self, ring: u32, enable: bool) -> Result<(), Error> {
        self.set_ring(FrontendReq::SET_VRING_ENABLE, ring, enable.into())
    }

    /// SET_VRING_ADDR for a ring that lies in `ram`, without logging.
    ///
    /// # Errors
    /// When a part does not lie in `ram`, the connection fails or the back-end refuses.
    pub fn set_vring_addr(
        &mut self,
        ring: u32,
        ram: &GuestRam,
        at: VirtqueueAddresses,
    ) -> Result<(), Error> {
        let user = |addr| {
            ram.user_addr(addr)
                .ok_or(RamError::OutOfRange { addr, len: 1 })
        };
        let addresses = VirtqueueAddresses {
            descriptors: user(at.descriptors)?,
            driver: user(at.driver)?,
            device: user(at.device)?,
        };
        self.set_vring_user_addr(ring, 0, addresses, 0)
    }

    /// SET_VRING_ADDR with any values: addresses in the front-end's own address space, and the
    /// guest address `log` that used-ring writes are logged at with [`VRING_F_LOG`].
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_user_addr(
        &mut self,
        ring: u32,
        flags: u32,
        at: VirtqueueAddresses,
        log: u64,
    ) -> Result<(), Error> {
        let parts = words(&[at.descriptors, at.device, at.driver, log]);
        let body = [&u32_pair_bytes(ring, flags)[..], &parts].concat();
        self.set(FrontendReq::SET_VRING_ADDR, &body, &[])
    }

    /// SET_VRING_KICK; `None` for polling.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_kick(&mut self, ring: u32, fd: Option<RawFd>) -> Result<(), Error> {
        self.set_ring_fd(FrontendReq::SET_VRING_KICK, ring, fd)
    }

    /// SET_VRING_CALL; `None` for polling.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_call(&mut self, ring: u32, fd: Option<RawFd>) -> Result<(), Error> {
        self.set_ring_fd(FrontendReq::SET_VRING_CALL, ring, fd)
    }

    /// SET_VRING_ERR; `None` for silence.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_err(&mut self, ring: u32, fd: Option<RawFd>) -> Result<(), Error> {
        self.set_ring_fd(FrontendReq::SET_VRING_ERR, ring, fd)
    }

    /// NET_SET_MTU.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_mtu(&mut self, mtu: u64) -> Result<(), Error> {
        self.set_u64(FrontendReq::NET_SET_MTU, mtu)
    }

    /// SEND_RARP for this MAC address.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let [a, b, c, d, e, f] = mac;
        self.set(FrontendReq::SEND_RARP, &[a, b, c, d, e, f, 0, 0], &[])
    }

    /// SET_STATUS: the virtio device status.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_status(&mut self, status: u64) -> Result<(), Error> {
        self.set_u64(FrontendReq::SET_STATUS, status)
    }

    /// GET_STATUS.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn get_status(&mut self) -> Result<u64, Error> {
        self.get_u64(FrontendReq::GET_STATUS)
    }

    /// Any request without a reply of its own, acknowledged where that is negotiated.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set(&mut self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> Result<(), Error> {
        let code = request.into();
        let asks = self.acknowledge && self.has_feature(Protocol::REPLY_ACK);
        let flags = if asks {
            VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK
        } else {
            VHOST_USER_VERSION
        };
        self.wire.send(code, flags, body, fds)?;
        if !asks {
            return Ok(());
        }
        match u64::from_ne_bytes(self.wire.reply_of(code)?) {
            0 => Ok(()),
            refusal => Err(Error::Refused {
                request: code,
                code: refusal,
            }),
        }
    }

    /// Any request with a reply of `len` bytes.
    ///
    /// # Errors
    /// When the connection fails or the reply has another length.
    pub fn get(&mut self, request: FrontendReq, body: &[u8], len: usize) -> Result<Vec<u8>, Error> {
        let code = request.into();
        self.wire.send(code, VHOST_USER_VERSION, body, &[])?;
        let reply = self.wire.reply(code)?;
        if reply.len() == len {
            return Ok(reply);
        }
        Err(Error::Reply {
            request: code,
            what: format!("{} bytes, not {len}", reply.len()),
        })
    }

    fn get_u64(&mut self, request: FrontendReq) -> Result<u64, Error> {
        let code = request.into();
        self.wire.send(code, VHOST_USER_VERSION, &[], &[])?;
        Ok(u64::from_ne_bytes(self.wire.reply_of(code)?))
    }

    fn set_u64(&mut self, request: FrontendReq, value: u64) -> Result<(), Error> {
        self.set(request, &value.to_ne_bytes(), &[])
    }

    fn set_ring(&mut self, request: FrontendReq, ring: u32, value: u32) -> Result<(), Error> {
        self.set(request, &u32_pair_bytes(ring, value), &[])
    }

    fn set_ring_fd(
        &mut self,
        request: FrontendReq,
        ring: u32,
        fd: Option<RawFd>,
    ) -> Result<(), Error> {
        let flag = if fd.is_none() {
            VHOST_USER_VRING_NOFD_MASK
        } else {
            0
        };
        let body = (u64::from(ring) | flag).to_ne_bytes();
        self.set(request, &body, fd.as_slice())
    }
}

fn region_bytes(region: &RegionSpec) -> Vec<u8> {
    words(&[
        region.guest_addr,
        region.size,
        region.user_addr,
        region.file_offset,
    ])
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

fn u32_pair_bytes(first: u32, second: u32) -> Vec<u8> {
    [first, second].map(u32::to_ne_bytes).concat()
}
