//! The vhost-user front-end, with one method for each message.
//!
//! The front-end of the `vhost` crate is not usable here: it refuses to send SET_VRING_ENABLE
//! before SET_FEATURES, as QEMU does, and it counts vrings in GET_QUEUE_NUM where QEMU counts queue
//! pairs. Only the message codes of that crate are used. Errors for a request without a reply are
//! found only if acknowledgements are negotiated (REPLY_ACK).

mod postcopy;

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

/// The feature bit that announces protocol features.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// The feature bit that turns dirty logging on.
pub const VHOST_F_LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// In SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: no file descriptor comes with the message.
pub const VHOST_USER_VRING_NOFD_MASK: u64 = 1 << 8;
/// In SET_VRING_ADDR: writes to the used ring are logged.
pub const VHOST_VRING_F_LOG_MASK: u32 = 1;

/// A front-end's end of a vhost-user connection.
#[derive(Debug)]
pub struct FrontendConnection {
    /// The messages on the socket, for those that no method here sends.
    pub wire: MessageStream,
    /// The negotiated protocol features.
    protocol: u64,
    /// Whether each request without a reply asks for an acknowledgement, if REPLY_ACK is
    /// negotiated.
    pub acknowledge: bool,
}

impl FrontendConnection {
    /// A connection on a connected socket, with a time limit of 10 s for replies.
    ///
    /// # Errors
    /// When the socket does not accept a time limit.
    pub fn from_socket(socket: UnixStream) -> Result<Self, Error> {
        Ok(Self::from_stream(MessageStream::from_socket(socket)?))
    }

    /// Connects to a listening back-end, with attempts for up to `connect_timeout`.
    ///
    /// # Errors
    /// When nothing listens within that time.
    pub fn connect(path: &Path, connect_timeout: Duration) -> Result<Self, Error> {
        Ok(Self::from_stream(MessageStream::connect(
            path,
            connect_timeout,
        )?))
    }

    fn from_stream(wire: MessageStream) -> Self {
        Self {
            wire,
            protocol: 0,
            acknowledge: true,
        }
    }

    /// Whether a protocol feature is negotiated.
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

    /// SET_PROTOCOL_FEATURES. The features are in use afterwards.
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

    /// GET_QUEUE_NUM: the number of queue *pairs* of the back-end.
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

    /// SET_MEM_TABLE with all regions of `ram`.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn share(&mut self, ram: &GuestRam) -> Result<(), Error> {
        let table: Vec<_> = ram.regions().into_iter().map(|r| (r, ram.fd())).collect();
        self.set_mem_table(&table)
    }

    /// SET_MEM_TABLE with any regions and their files.
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

    /// SET_LOG_BASE: the `size` bytes from `offset` on in the file `log`.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_log_base(&mut self, size: u64, offset: u64, log: RawFd) -> Result<(), Error> {
        let body = words(&[size, offset]);
        if self.has_feature(Protocol::LOG_SHMFD) {
            // With LOG_SHMFD the message has a reply of unspecified content.
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

    /// GET_VRING_BASE, which stops the vring. Returns its base.
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
                what: format!("it is for another vring than {ring}"),
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

    /// SET_VRING_ADDR for a virtqueue in `ram`, without logging.
    ///
    /// # Errors
    /// When a part is not in `ram`, the connection fails or the back-end refuses.
    pub fn set_vring_addr(
        &mut self,
        ring: u32,
        ram: &GuestRam,
        at: VirtqueueAddresses,
    ) -> Result<(), Error> {
        self.set_vring_user_addr(ring, 0, user_addresses(ram, at)?, 0)
    }

    /// SET_VRING_ADDR with any values: front-end addresses, and the guest address `log` under which
    /// writes to the used ring are logged with [`VHOST_VRING_F_LOG_MASK`].
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

    /// SET_VRING_KICK; `None` for a driver that does not kick.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_kick(&mut self, ring: u32, fd: Option<RawFd>) -> Result<(), Error> {
        self.set_ring_fd(FrontendReq::SET_VRING_KICK, ring, fd)
    }

    /// SET_VRING_CALL; `None` for a driver that polls.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set_vring_call(&mut self, ring: u32, fd: Option<RawFd>) -> Result<(), Error> {
        self.set_ring_fd(FrontendReq::SET_VRING_CALL, ring, fd)
    }

    /// SET_VRING_ERR; `None` for no notification of errors.
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

    /// SEND_RARP with a MAC address.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let [a, b, c, d, e, f] = mac;
        self.set(FrontendReq::SEND_RARP, &[a, b, c, d, e, f, 0, 0], &[])
    }

    /// SET_STATUS with the virtio device status (virtio 1.3 §2.1).
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

    /// Any request without a reply. It asks for an acknowledgement if that is negotiated.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn set(&mut self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> Result<(), Error> {
        let code = request.into();
        let needs_reply = self.acknowledge && self.has_feature(Protocol::REPLY_ACK);
        let flags = if needs_reply {
            VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK
        } else {
            VHOST_USER_VERSION
        };
        self.wire.send(code, flags, body, fds)?;
        if !needs_reply {
            return Ok(());
        }
        match u64::from_ne_bytes(self.wire.reply_of(code)?) {
            0 => Ok(()),
            error => Err(Error::Refused {
                request: code,
                code: error,
            }),
        }
    }

    /// Any request with a reply of `len` bytes, which is returned.
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

/// Converts guest addresses in `ram` to front-end addresses.
pub(crate) fn user_addresses(
    ram: &GuestRam,
    at: VirtqueueAddresses,
) -> Result<VirtqueueAddresses, RamError> {
    let user = |addr| {
        ram.user_addr(addr)
            .ok_or(RamError::OutOfRange { addr, len: 1 })
    };
    Ok(VirtqueueAddresses {
        descriptors: user(at.descriptors)?,
        driver: user(at.driver)?,
        device: user(at.device)?,
    })
}

/// A memory region in the form of SET_MEM_TABLE.
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
