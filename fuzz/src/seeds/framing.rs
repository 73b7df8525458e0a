//! Seeds for `framing`: the messages of correct and incorrect front-ends.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;
use virtionet_guest::frontend::{VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_VRING_NOFD_MASK};
use virtionet_guest::message_stream::{VHOST_USER_NEED_REPLY_MASK, VHOST_USER_VERSION};

use super::Seeds;
use crate::framing::{FdKind, OVER_SOCKET, SHARED_FILE_SIZE};
use crate::requests::*;

/// The feature bits of SET_FEATURES.
const FEATURES: u64 = 1 << net::VIRTIO_NET_F_CSUM
    | 1 << net::VIRTIO_NET_F_MRG_RXBUF
    | 1 << net::VIRTIO_NET_F_MQ
    | 1 << ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << ring::VIRTIO_RING_F_EVENT_IDX
    | VHOST_USER_F_PROTOCOL_FEATURES
    | 1 << VIRTIO_F_VERSION_1;
/// Protocol features: MQ, REPLY_ACK, NET_MTU, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 4 | 1 << 13 | 1 << 15 | 1 << 16;
/// Front-end address of guest address 0.
const USER_BASE: u64 = 0x7f00_0000_0000;

/// The bytes that a front-end writes to the socket.
#[derive(Default)]
struct Stream(Vec<u8>);

impl Stream {
    /// Appends a message.
    fn message(mut self, code: u32, flags: u32, payload: &[u8]) -> Self {
        let size = u32::try_from(payload.len()).unwrap();
        for word in [code, VHOST_USER_VERSION | flags, size] {
            self.0.extend(word.to_ne_bytes());
        }
        self.0.extend(payload);
        self
    }

    /// Appends a request without a payload.
    fn ask(self, code: u32) -> Self {
        self.message(code, 0, &[])
    }

    /// Appends a request with a number and NEED_REPLY.
    fn number(self, code: u32, value: u64) -> Self {
        self.message(code, VHOST_USER_NEED_REPLY_MASK, &value.to_ne_bytes())
    }

    /// Appends a request with the index of a vring and a value.
    fn state(self, code: u32, ring: u32, value: u32) -> Self {
        let words = [ring.to_ne_bytes(), value.to_ne_bytes()].concat();
        self.message(code, 0, &words)
    }

    /// Appends a message with file descriptors.
    fn with_fds(self, code: u32, payload: &[u8], fds: u32, kind: FdKind) -> Self {
        let kind = match kind {
            FdKind::EventFd => 0,
            FdKind::Memory => 1,
            FdKind::Null => 2,
        };
        self.message(
            code,
            VHOST_USER_NEED_REPLY_MASK | fds << 8 | kind << 16,
            payload,
        )
    }

    /// Appends a message with an eventfd for a vring.
    fn eventfd(self, code: u32, ring: u64) -> Self {
        self.with_fds(code, &ring.to_ne_bytes(), 1, FdKind::EventFd)
    }

    /// A memory region.
    fn region(guest: u64, size: u64, offset: u64) -> Vec<u8> {
        [guest, size, USER_BASE.wrapping_add(guest), offset]
            .map(u64::to_ne_bytes)
            .concat()
    }

    /// Appends SET_MEM_TABLE.
    fn table(self, regions: &[Vec<u8>]) -> Self {
        let count = u32::try_from(regions.len()).unwrap();
        let head = [count.to_ne_bytes(), [0; 4]].concat();
        let payload = [head, regions.concat()].concat();
        self.with_fds(SET_MEM_TABLE, &payload, count, FdKind::Memory)
    }

    /// Appends ADD_MEM_REG or REM_MEM_REG.
    fn one_region(self, code: u32, region: &[u8], fds: u32) -> Self {
        let payload = [&[0; 8], region].concat();
        self.with_fds(code, &payload, fds, FdKind::Memory)
    }

    /// Appends the negotiation of features.
    fn negotiate(self) -> Self {
        self.ask(GET_FEATURES)
            .ask(GET_PROTOCOL_FEATURES)
            .message(SET_PROTOCOL_FEATURES, 0, &PROTOCOL_FEATURES.to_ne_bytes())
            .ask(GET_QUEUE_NUM)
            .ask(GET_MAX_MEM_SLOTS)
            .ask(SET_OWNER)
    }

    /// Appends the messages that start a vring.
    fn vring(self, ring: u32) -> Self {
        let at = USER_BASE + 0x4000 * u64::from(ring);
        let areas = [at, at + 0x2000, at + 0x1000, 0].map(u64::to_ne_bytes);
        let addr = [
            &[ring, 0].map(u32::to_ne_bytes).concat(),
            &areas.concat()[..],
        ]
        .concat();
        let kick = u64::from(ring);
        self.state(SET_VRING_NUM, ring, 64)
            .state(SET_VRING_BASE, ring, 0)
            .message(SET_VRING_ADDR, 0, &addr)
            .eventfd(SET_VRING_KICK, kick)
            .eventfd(SET_VRING_CALL, kick)
    }

    /// Appends the messages with which QEMU starts one queue pair.
    fn start(self) -> Self {
        self.negotiate()
            .eventfd(SET_VRING_CALL, 0)
            .eventfd(SET_VRING_CALL, 1)
            .state(SET_VRING_ENABLE, 0, 1)
            .state(SET_VRING_ENABLE, 1, 1)
            .number(SET_FEATURES, FEATURES)
            .table(&[
                Self::region(0, SHARED_FILE_SIZE / 2, 0),
                Self::region(1 << 32, SHARED_FILE_SIZE / 2, SHARED_FILE_SIZE / 2),
            ])
            .vring(0)
            .vring(1)
    }

    /// The bytes for a run over a socket.
    fn over_socket(mut self) -> Vec<u8> {
        let mut flags = u32::from_ne_bytes([self.0[4], self.0[5], self.0[6], self.0[7]]);
        flags |= OVER_SOCKET;
        self.0[4..8].copy_from_slice(&flags.to_ne_bytes());
        self.0
    }
}

/// The seeds.
pub fn framing() -> Seeds {
    let start = || Stream::default().start();
    let too_many_fds = Stream::default().with_fds(SET_VRING_CALL, &[0; 8], 33, FdKind::EventFd);
    let get_features = Stream::default().ask(GET_FEATURES);
    vec![
        ("start", start().0),
        ("start_by_socket", start().over_socket()),
        ("stop_and_start", stop_and_start().0),
        ("memory_slots", memory_slots().0),
        ("device", device_requests().0),
        ("changes_while_running", changes_while_running().0),
        ("odd_values", odd_values().0),
        ("wrong_regions", wrong_regions().0),
        ("too_many_fds", too_many_fds.over_socket()),
        ("half_a_message", start().over_socket()[..300].to_vec()),
        ("half_a_header", get_features.over_socket()[..9].to_vec()),
    ]
}

/// One region with all of the shared file.
fn whole_file() -> Vec<u8> {
    Stream::region(0, SHARED_FILE_SIZE, 0)
}

/// A queue pair that stops and starts again.
fn stop_and_start() -> Stream {
    Stream::default()
        .start()
        .state(GET_VRING_BASE, 0, 0)
        .state(GET_VRING_BASE, 1, 0)
        .vring(0)
        .vring(1)
}

/// A memory region that is added, removed and added again.
fn memory_slots() -> Stream {
    Stream::default()
        .negotiate()
        .number(SET_FEATURES, FEATURES)
        .one_region(ADD_MEM_REG, &whole_file(), 1)
        .vring(0)
        .vring(1)
        .one_region(REM_MEM_REG, &whole_file(), 0)
        .one_region(ADD_MEM_REG, &whole_file(), 1)
}

/// Requests that concern the whole device.
fn device_requests() -> Stream {
    Stream::default()
        .start()
        .number(NET_SET_MTU, 1500)
        .number(SEND_RARP, 0x1234_5678_9abc)
        .number(SET_STATUS, 15)
        .ask(GET_STATUS)
        .number(SET_STATUS, 0)
        .ask(RESET_DEVICE)
        .ask(RESET_OWNER)
}

/// Changes of memory and vrings while the vrings run.
fn changes_while_running() -> Stream {
    Stream::default()
        .start()
        .table(&[whole_file()])
        .state(SET_VRING_NUM, 0, 128)
        .eventfd(SET_VRING_ERR, 1)
        .number(SET_VRING_KICK, VHOST_USER_VRING_NOFD_MASK)
        .state(SET_VRING_ENABLE, 1, 0)
        .state(SET_VRING_BASE, 1, 65_535)
}

/// Values that are unusual or out of range.
fn odd_values() -> Stream {
    Stream::default()
        .negotiate()
        .state(SET_VRING_NUM, 3, 32_768)
        .state(SET_VRING_NUM, 0, 3)
        .state(SET_VRING_NUM, 255, 0)
        .number(SET_FEATURES, u64::MAX)
        .with_fds(SET_VRING_KICK, &[0; 8], 1, FdKind::Null)
        .number(77, 0)
}

/// Memory tables that are invalid.
fn wrong_regions() -> Stream {
    Stream::default()
        .table(&[Stream::region(0, SHARED_FILE_SIZE * 2, 0)])
        .table(&[Stream::region(0, 0, 0)])
        .table(&[Stream::region(u64::MAX - 0xfff, SHARED_FILE_SIZE, 0)])
        .with_fds(SET_MEM_TABLE, &[9, 0, 0, 0, 0, 0, 0, 0], 9, FdKind::Memory)
}
