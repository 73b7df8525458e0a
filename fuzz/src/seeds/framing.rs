//! Front-ends.

use super::Seeds;
use crate::framing::{FILE, FdKind};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const SEND_RARP: u32 = 19;
const NET_SET_MTU: u32 = 20;
const RESET_DEVICE: u32 = 34;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;

const VHOST_USER_NEED_REPLY_MASK: u32 = 8;
const OVER_SOCKET: u32 = 1 << 31;
const VHOST_USER_VRING_NOFD_MASK: u64 = 1 << 8;
/// CSUM, MRG_RXBUF, MQ, INDIRECT_DESC, EVENT_IDX, VERSION_1 and the protocol's bit.
const FEATURES: u64 = 1 | 1 << 15 | 1 << 22 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;
/// MQ, REPLY_ACK, NET_MTU, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 4 | 1 << 13 | 1 << 15 | 1 << 16;
/// Where the front-end has its memory.
const USER: u64 = 0x7f00_0000_0000;

/// What a front-end writes.
#[derive(Default)]
struct Stream(Vec<u8>);

impl Stream {
    fn message(mut self, code: u32, flags: u32, payload: &[u8]) -> Self {
        let size = u32::try_from(payload.len()).unwrap();
        for word in [code, 1 | flags, size] {
            self.0.extend(word.to_ne_bytes());
        }
        self.0.extend(payload);
        self
    }

    fn ask(self, code: u32) -> Self {
        self.message(code, 0, &[])
    }

    fn number(self, code: u32, value: u64) -> Self {
        self.message(code, VHOST_USER_NEED_REPLY_MASK, &value.to_ne_bytes())
    }

    fn state(self, code: u32, ring: u32, value: u32) -> Self {
        let words = [ring.to_ne_bytes(), value.to_ne_bytes()].concat();
        self.message(code, 0, &words)
    }

    fn with_fds(self, code: u32, payload: &[u8], fds: u32, kind: FdKind) -> Self {
        let kind = match kind {
            FdKind::EventFd => 0,
            FdKind::Memory => 1,
            FdKind::Null => 2,
        };
        self.message(code, VHOST_USER_NEED_REPLY_MASK | fds << 8 | kind << 16, payload)
    }

    fn notifier(self, code: u32, ring: u64) -> Self {
        self.with_fds(code, &ring.to_ne_bytes(), 1, FdKind::EventFd)
    }

    fn region(guest: u64, size: u64, offset: u64) -> Vec<u8> {
        [guest, size, USER.wrapping_add(guest), offset]
            .map(u64::to_ne_bytes)
            .concat()
    }

    fn table(self, regions: &[Vec<u8>]) -> Self {
        let count = u32::try_from(regions.len()).unwrap();
        let head = [count.to_ne_bytes(), [0; 4]].concat();
        let payload = [head, regions.concat()].concat();
        self.with_fds(SET_MEM_TABLE, &payload, count, FdKind::Memory)
    }

    fn one_region(self, code: u32, region: &[u8], fds: u32) -> Self {
        let payload = [&[0; 8], region].concat();
        self.with_fds(code, &payload, fds, FdKind::Memory)
    }

    fn negotiate(self) -> Self {
        self.ask(GET_FEATURES)
            .ask(GET_PROTOCOL_FEATURES)
            .message(SET_PROTOCOL_FEATURES, 0, &PROTOCOL.to_ne_bytes())
            .ask(GET_QUEUE_NUM)
            .ask(GET_MAX_MEM_SLOTS)
            .ask(SET_OWNER)
    }

    fn ring(self, ring: u32) -> Self {
        let at = USER + 0x4000 * u64::from(ring);
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
            .notifier(SET_VRING_KICK, kick)
            .notifier(SET_VRING_CALL, kick)
    }

    /// What QEMU sends for one pair.
    fn start(self) -> Self {
        self.negotiate()
            .notifier(SET_VRING_CALL, 0)
            .notifier(SET_VRING_CALL, 1)
            .state(SET_VRING_ENABLE, 0, 1)
            .state(SET_VRING_ENABLE, 1, 1)
            .number(SET_FEATURES, FEATURES)
            .table(&[
                Self::region(0, FILE / 2, 0),
                Self::region(1 << 32, FILE / 2, FILE / 2),
            ])
            .ring(0)
            .ring(1)
    }

    /// The same through a socket.
    fn by_socket(mut self) -> Vec<u8> {
        let mut flags = u32::from_ne_bytes([self.0[4], self.0[5], self.0[6], self.0[7]]);
        flags |= OVER_SOCKET;
        self.0[4..8].copy_from_slice(&flags.to_ne_bytes());
        self.0
    }
}

/// Front-ends.
pub fn framing() -> Seeds {
    let new = Stream::default;
    let all = Stream::region(0, FILE, 0);
    let stopped = |stream: Stream| {
        stream
            .state(GET_VRING_BASE, 0, 0)
            .state(GET_VRING_BASE, 1, 0)
    };
    let slots = new()
        .negotiate()
        .number(SET_FEATURES, FEATURES)
        .one_region(ADD_MEM_REG, &all, 1)
        .ring(0)
        .ring(1)
        .one_region(REM_MEM_REG, &all, 0)
        .one_region(ADD_MEM_REG, &all, 1);
    let device = new()
        .start()
        .number(NET_SET_MTU, 1500)
        .number(SEND_RARP, 0x1234_5678_9abc)
        .number(SET_STATUS, 15)
        .ask(GET_STATUS)
        .number(SET_STATUS, 0)
        .ask(RESET_DEVICE)
        .ask(RESET_OWNER);
    let changes = new()
        .start()
        .table(std::slice::from_ref(&all))
        .state(SET_VRING_NUM, 0, 128)
        .notifier(SET_VRING_ERR, 1)
        .number(SET_VRING_KICK, VHOST_USER_VRING_NOFD_MASK)
        .state(SET_VRING_ENABLE, 1, 0)
        .state(SET_VRING_BASE, 1, 65_535);
    let odd = new()
        .negotiate()
        .state(SET_VRING_NUM, 3, 32_768)
        .state(SET_VRING_NUM, 0, 3)
        .state(SET_VRING_NUM, 255, 0)
        .number(SET_FEATURES, u64::MAX)
        .with_fds(SET_VRING_KICK, &[0; 8], 1, FdKind::Null)
        .number(77, 0);
    let wrong = new()
        .table(&[Stream::region(0, FILE * 2, 0)])
        .table(&[Stream::region(0, 0, 0)])
        .table(&[Stream::region(u64::MAX - 0xfff, FILE, 0)])
        .with_fds(SET_MEM_TABLE, &[9, 0, 0, 0, 0, 0, 0, 0], 9, FdKind::Memory);
    let many = new().with_fds(SET_VRING_CALL, &[0; 8], 33, FdKind::EventFd);
    vec![
        ("start", new().start().0),
        ("start_by_socket", new().start().by_socket()),
        ("stop_and_start", stopped(new().start()).ring(0).ring(1).0),
        ("memory_slots", slots.0),
        ("device", device.0),
        ("changes_while_running", changes.0),
        ("odd_values", odd.0),
        ("wrong_regions", wrong.0),
        ("too_many_fds", many.by_socket()),
        ("half_a_message", new().start().by_socket()[..300].to_vec()),
        (
            "half_a_header",
            new().ask(GET_FEATURES).by_socket()[..9].to_vec(),
        ),
    ]
}
