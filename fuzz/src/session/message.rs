//! A message of a front-end: a typed request with its descriptors, as the input describes it.

use std::ops::RangeInclusive;

use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;
use virtionet_guest::frontend::{
    VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_VRING_NOFD_MASK,
};
use virtionet_guest::message_stream::{VHOST_USER_NEED_REPLY_MASK, VHOST_USER_VERSION};

use super::files::{AVAIL_AREA, FILE_SIZE, FdKind, RING_DISTANCE, RING_SIZE, RINGS, USED_AREA};
use crate::input::Input;
use crate::requests::*;

/// Front-end address of guest address 0.
pub const USER_BASE: u64 = 0x7f00_0000_0000;
/// The feature bits of a split virtqueue.
pub const FEATURES: u64 = 1 << net::VIRTIO_NET_F_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_CSUM
    | 1 << net::VIRTIO_NET_F_MRG_RXBUF
    | 1 << net::VIRTIO_NET_F_MQ
    | 1 << ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << ring::VIRTIO_RING_F_EVENT_IDX
    | VHOST_USER_F_PROTOCOL_FEATURES
    | 1 << VIRTIO_F_VERSION_1;
pub const PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;
/// MQ, LOG_SHMFD, RARP, REPLY_ACK, NET_MTU, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
pub const PROTOCOL_FEATURES: u64 =
    1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 13 | 1 << 15 | 1 << 16;
const BACKEND_REQ: u64 = 1 << 5;
/// The addresses of the driver are I/O virtual addresses.
const TRANSLATED: u64 = FEATURES | 1 << VIRTIO_F_ACCESS_PLATFORM;
/// The requests whose numbers an input encodes in one byte, and some numbers that do not exist.
const CODES: RangeInclusive<u8> = 0..=47;
/// The flag that marks a reply.
const REPLY: u32 = 4;
/// The most descriptors of a message, which is more than the device accepts.
const MAX_FDS: usize = 40;

/// How a message is wrong as a whole, or how it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Framing {
    Correct,
    WrongVersion,
    Reply,
    ReservedFlags,
    /// Sent in two parts.
    InTwoParts,
    /// The payload is shorter than the request's, and the header says so.
    Shorter,
    /// The payload is longer than the request's, and the header says so.
    Longer,
    /// The header announces more than there is.
    Incomplete,
    /// The header announces less than there is.
    Surplus,
    /// The header announces more than any message may have.
    TooLong,
}

const FRAMINGS: [Framing; 9] = [
    Framing::WrongVersion,
    Framing::Reply,
    Framing::ReservedFlags,
    Framing::InTwoParts,
    Framing::Shorter,
    Framing::Longer,
    Framing::Incomplete,
    Framing::Surplus,
    Framing::TooLong,
];

impl Framing {
    /// Most values mean a correct one. Bit 0 is not used.
    pub fn from_byte(byte: u8) -> Self {
        match byte >> 1 {
            0..=112 => Self::Correct,
            n => FRAMINGS[usize::from(n) % FRAMINGS.len()],
        }
    }
}

/// A message, and the kinds of its descriptors.
#[derive(Debug, Clone)]
pub struct Message {
    pub code: u32,
    pub needs_reply: bool,
    pub payload: Vec<u8>,
    pub fds: Vec<FdKind>,
    /// What [`FdKind::Suitable`] means for the request.
    pub suitable: FdKind,
    pub framing: Framing,
}

impl Message {
    /// A correct message without descriptors.
    pub fn new(code: u32, payload: &[u8]) -> Self {
        Self {
            code,
            needs_reply: false,
            payload: payload.to_vec(),
            fds: Vec::new(),
            suitable: FdKind::Suitable,
            framing: Framing::Correct,
        }
    }

    /// A correct message with a number.
    pub fn number(code: u32, value: u64) -> Self {
        Self::new(code, &value.to_ne_bytes())
    }

    /// A correct message with the index of a vring and a value.
    pub fn state(code: u32, ring: u32, value: u32) -> Self {
        Self::new(code, &[ring, value].map(u32::to_ne_bytes).concat())
    }

    /// SET_VRING_ADDR with the correct areas.
    pub fn vring_addr(ring: u32) -> Self {
        let at = USER_BASE + RING_DISTANCE * u64::from(ring);
        Self::new(
            SET_VRING_ADDR,
            &addr_payload(ring, 0, [at, at + USED_AREA, at + AVAIL_AREA]),
        )
    }

    /// SET_MEM_TABLE with the correct regions: two halves of the file.
    pub fn mem_table() -> Self {
        let regions = [REGIONS[0], REGIONS[1]];
        Self {
            fds: vec![FdKind::Memory; regions.len()],
            suitable: FdKind::Memory,
            ..Self::new(SET_MEM_TABLE, &table_payload(&regions))
        }
    }

    /// Reads a request: its code (1 byte), 1 byte for NEED_REPLY and the framing, its payload (see
    /// [`payload`]), and its descriptors: their number (1 byte) and the kind of each (1 byte).
    pub fn read(input: &mut Input<'_>) -> Self {
        let code = match input.u8() {
            n if n < 240 => u32::from(n % (CODES.end() + 1)),
            _ => u32::from(input.u16()) << 8,
        };
        let how = input.u8();
        let (payload, wanted) = payload(code, input);
        let count = match input.u8() {
            0..=199 => wanted,
            n => usize::from(n - 200) % (MAX_FDS + 1),
        };
        let suitable = match code {
            SET_MEM_TABLE | ADD_MEM_REG | SET_LOG_BASE => FdKind::Memory,
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => FdKind::EventFd,
            SET_BACKEND_REQ_FD => FdKind::Socket,
            _ => FdKind::Null,
        };
        Self {
            code,
            needs_reply: how & 1 == 1,
            payload,
            fds: (0..count).map(|_| FdKind::from(input.u8())).collect(),
            suitable,
            framing: Framing::from_byte(how),
        }
    }

    /// Whether the session may wait for more bytes after this message, or take some of it for the
    /// next one.
    pub fn ends_stream(&self) -> bool {
        matches!(self.framing, Framing::Incomplete | Framing::Surplus)
    }

    /// The bytes on the socket.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut payload = self.payload.clone();
        match self.framing {
            Framing::Shorter => payload.truncate(payload.len() / 2),
            Framing::Longer => payload.extend([0; 8]),
            _ => {}
        }
        let len = u32::try_from(payload.len()).unwrap();
        let announced = match self.framing {
            Framing::Incomplete => len + 8,
            Framing::Surplus => len / 2,
            Framing::TooLong => u32::MAX - len,
            _ => len,
        };
        let need_reply = match self.needs_reply {
            true => VHOST_USER_NEED_REPLY_MASK,
            false => 0,
        };
        let flags = match self.framing {
            Framing::WrongVersion => 2,
            Framing::Reply => VHOST_USER_VERSION | REPLY,
            Framing::ReservedFlags => VHOST_USER_VERSION | 0xffff_fff0,
            _ => VHOST_USER_VERSION,
        };
        let header = [self.code, flags | need_reply, announced];
        let mut bytes = header.map(u32::to_ne_bytes).concat();
        bytes.extend(payload);
        bytes
    }
}

/// Memory regions: guest address, size, front-end address, offset in the file. The first two are
/// the correct ones; the others are the whole file, one that overlaps, and some that are invalid.
const REGIONS: [[u64; 4]; 8] = [
    [0, FILE_SIZE / 2, USER_BASE, 0],
    [1 << 32, FILE_SIZE / 2, USER_BASE + (1 << 32), FILE_SIZE / 2],
    [0, FILE_SIZE, USER_BASE, 0],
    [0x4_0000, FILE_SIZE / 2, USER_BASE + 0x4_0000, 0x4_0000],
    [0, 0x1000, USER_BASE, 0],
    [1 << 33, 0x800, USER_BASE + (1 << 33), 0x800],
    [0, 0, USER_BASE, 0],
    [u64::MAX - 0xfff, FILE_SIZE, USER_BASE, 0],
];

/// Reads a value: one of `table`, or with a byte from 0xc0 on any number (8 bytes).
fn value(input: &mut Input<'_>, table: &[u64]) -> u64 {
    match input.u8() {
        n if n < 0xc0 => table[usize::from(n) % table.len()],
        _ => input.u64(),
    }
}

/// The same with 32 bits.
fn value32(input: &mut Input<'_>, table: &[u64]) -> u32 {
    let bytes = value(input, table).to_le_bytes();
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Reads the payload of request `code`; returns it and the number of descriptors that the request
/// has.
fn payload(code: u32, input: &mut Input<'_>) -> (Vec<u8>, usize) {
    const VRINGS: [u64; RINGS + 1] = [0, 1, 2, 3, 4];
    let number = |input: &mut Input<'_>, table: &[u64]| value(input, table).to_ne_bytes().to_vec();
    let state = |input: &mut Input<'_>, table: &[u64]| {
        let words = [value32(input, &VRINGS), value32(input, table)];
        words.map(u32::to_ne_bytes).concat()
    };
    let bytes = match code {
        SET_FEATURES => {
            let logged = FEATURES | VHOST_F_LOG_ALL;
            let table = [
                FEATURES,
                FEATURES | PACKED,
                0,
                u64::MAX,
                logged,
                logged | PACKED,
                TRANSLATED,
                TRANSLATED | PACKED,
            ];
            number(input, &table)
        }
        SET_LOG_BASE => {
            let words = [value(input, &[4096, 64, 8, 0]), value(input, &[0, 4096, 8])];
            return (words.map(u64::to_ne_bytes).concat(), 1);
        }
        SET_PROTOCOL_FEATURES => {
            let translated = PROTOCOL_FEATURES | BACKEND_REQ;
            number(input, &[PROTOCOL_FEATURES, 1, 0, u64::MAX, translated])
        }
        NET_SET_MTU => number(input, &[1500, 9000, 67, 65_536]),
        SEND_RARP => number(input, &[0x1234_5678_9abc]),
        SET_STATUS => number(input, &[15, 0, 0x80, 256]),
        SET_VRING_NUM => state(input, &[RING_SIZE.into(), 128, 1, 3, 32_768, 0]),
        SET_VRING_BASE => state(input, &[0, 0x8000_8000, 1, 65_535, 65_536, 0x8000]),
        SET_VRING_ENABLE => state(input, &[1, 0, 2]),
        GET_VRING_BASE => state(input, &[0]),
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
            let no_fd = VHOST_USER_VRING_NOFD_MASK;
            let index = value(input, &[0, 1, 2, 3, no_fd, no_fd | 1, no_fd | 2, 4]);
            let fds = usize::from(index & no_fd == 0);
            return (index.to_ne_bytes().to_vec(), fds);
        }
        SET_VRING_ADDR => {
            let ring = value32(input, &VRINGS);
            let at = USER_BASE + RING_DISTANCE * u64::from(ring % 4);
            let areas = [at, at + USED_AREA, at + AVAIL_AREA];
            let areas = areas.map(|area| value(input, &[area, area, area, at, area + 8, 0]));
            let flags = value32(input, &[0, 0, 0, 1]);
            addr_payload(ring, flags, areas)
        }
        SET_BACKEND_REQ_FD => return (Vec::new(), 1),
        IOTLB_MSG => iotlb_payload(input),
        SET_MEM_TABLE => {
            let count = match input.u8() {
                n if n < 0xe0 => usize::from(n % 3) + 1,
                n => usize::from(n % 40),
            };
            let regions: Vec<_> = (0..count).map(|n| region(input, n)).collect();
            return (table_payload(&regions), count);
        }
        ADD_MEM_REG => return (region_payload(region(input, 0)), 1),
        REM_MEM_REG => region_payload(region(input, 0)),
        GET_FEATURES
        | SET_OWNER
        | RESET_OWNER
        | GET_PROTOCOL_FEATURES
        | GET_QUEUE_NUM
        | RESET_DEVICE
        | GET_MAX_MEM_SLOTS
        | GET_STATUS => Vec::new(),
        _ => {
            let len = usize::from(input.u8() % 64);
            input.bytes(len).to_vec()
        }
    };
    (bytes, 0)
}

/// Reads a memory region: one of [`REGIONS`], which is the `n`th for 0, or with a byte from 0xf0 on
/// any one (32 bytes).
fn region(input: &mut Input<'_>, n: usize) -> [u64; 4] {
    match input.u8() {
        k if k < 0xf0 => REGIONS[(usize::from(k) + n) % REGIONS.len()],
        _ => [(); 4].map(|()| input.u64()),
    }
}

/// Reads a translation or an invalidation. The first values translate the addresses of vrings and of
/// buffers to those that they are without an IOMMU.
fn iotlb_payload(input: &mut Input<'_>) -> Vec<u8> {
    let iova = value(input, &[USER_BASE, 0, USER_BASE + 0x1000, u64::MAX - 0xfff]);
    let size = value(input, &[FILE_SIZE / 2, 0x1000, 1, 0, u64::MAX]);
    let user_addr = value(input, &[USER_BASE, USER_BASE + 0x1000, 0, u64::MAX - 0xfff]);
    // The type is an update or an invalidation.
    let [permission, ..] = value(input, &[3, 1, 2, 0, 4]).to_le_bytes();
    let [kind, ..] = value(input, &[2, 3, 1, 4]).to_le_bytes();
    let mut bytes = [iova, size, user_addr].map(u64::to_ne_bytes).concat();
    bytes.extend([permission, kind, 0, 0, 0, 0, 0, 0]);
    bytes
}

fn region_payload(region: [u64; 4]) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    bytes.extend(region.map(u64::to_ne_bytes).concat());
    bytes
}

fn table_payload(regions: &[[u64; 4]]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap();
    let mut bytes = [count, 0].map(u32::to_ne_bytes).concat();
    for region in regions {
        bytes.extend(region.map(u64::to_ne_bytes).concat());
    }
    bytes
}

fn addr_payload(ring: u32, flags: u32, [desc, used, avail]: [u64; 3]) -> Vec<u8> {
    let words = [ring, flags].map(u32::to_ne_bytes).concat();
    let areas = [desc, used, avail, 0].map(u64::to_ne_bytes).concat();
    [words, areas].concat()
}
