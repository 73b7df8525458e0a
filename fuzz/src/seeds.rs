//! Inputs to begin with: what a good front-end and a good guest do, so that a fuzzer need not find
//! that out, and one of each thing that they must not do.

use virtionet_guest::split::{INDIRECT, NEXT, WRITE};

use crate::framing::{FILE, Kind};
use crate::split_chains::Op;

/// Names and bytes.
pub type Seeds = Vec<(&'static str, Vec<u8>)>;

// --- framing ------------------------------------------------------------------------------------

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

const NEED_REPLY: u32 = 8;
const SOCKET: u32 = 1 << 31;
const NO_FD: u64 = 1 << 8;
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
        self.message(code, NEED_REPLY, &value.to_ne_bytes())
    }

    fn state(self, code: u32, ring: u32, value: u32) -> Self {
        let words = [ring.to_ne_bytes(), value.to_ne_bytes()].concat();
        self.message(code, 0, &words)
    }

    fn with_fds(self, code: u32, payload: &[u8], fds: u32, kind: Kind) -> Self {
        let kind = match kind {
            Kind::EventFd => 0,
            Kind::Memory => 1,
            Kind::Null => 2,
        };
        self.message(code, NEED_REPLY | fds << 8 | kind << 16, payload)
    }

    fn notifier(self, code: u32, ring: u64) -> Self {
        self.with_fds(code, &ring.to_ne_bytes(), 1, Kind::EventFd)
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
        self.with_fds(SET_MEM_TABLE, &payload, count, Kind::Memory)
    }

    fn one_region(self, code: u32, region: &[u8], fds: u32) -> Self {
        let payload = [&[0; 8], region].concat();
        self.with_fds(code, &payload, fds, Kind::Memory)
    }

    fn hello(self) -> Self {
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
        self.hello()
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
        flags |= SOCKET;
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
        .hello()
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
        .number(SET_VRING_KICK, NO_FD)
        .state(SET_VRING_ENABLE, 1, 0)
        .state(SET_VRING_BASE, 1, 65_535);
    let odd = new()
        .hello()
        .state(SET_VRING_NUM, 3, 32_768)
        .state(SET_VRING_NUM, 0, 3)
        .state(SET_VRING_NUM, 255, 0)
        .number(SET_FEATURES, u64::MAX)
        .with_fds(SET_VRING_KICK, &[0; 8], 1, Kind::Null)
        .number(77, 0);
    let wrong = new()
        .table(&[Stream::region(0, FILE * 2, 0)])
        .table(&[Stream::region(0, 0, 0)])
        .table(&[Stream::region(u64::MAX - 0xfff, FILE, 0)])
        .with_fds(SET_MEM_TABLE, &[9, 0, 0, 0, 0, 0, 0, 0], 9, Kind::Memory);
    let many = new().with_fds(SET_VRING_CALL, &[0; 8], 33, Kind::EventFd);
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

// --- split rings --------------------------------------------------------------------------------

const RX: u8 = 1;
const EVENT_IDX: u8 = 2;
const INDIRECT_DESC: u8 = 4;
const MERGEABLE: u8 = 8;
const OFFLOADS: u8 = 16;
const VERSION_1: u8 = 32;
const MODERN: u8 = EVENT_IDX | INDIRECT_DESC | MERGEABLE | OFFLOADS | VERSION_1;

/// Kinds of addresses; see `split_chains`.
const IN_DATA: u8 = 0;
const IN_TABLE: u8 = 3;
const IN_RING: u8 = 4;
const AT_SEAM: u8 = 5;
const ANYWHERE: u8 = 7;

/// What a guest does.
struct Script(Vec<u8>);

impl Script {
    fn new(options: u8, log: u8) -> Self {
        Self(vec![options, log, 0xf0, 0xff, 0, 0])
    }

    fn op(mut self, op: Op, operands: &[u8]) -> Self {
        self.0.push(u8::try_from(op as usize).unwrap());
        self.0.extend(operands);
        self
    }

    fn desc(self, op: Op, index: u8, to: (u8, u16), len: u16, flags: u16, next: u8) -> Self {
        let (kind, offset) = to;
        let mut bytes = vec![index, kind];
        bytes.extend(offset.to_le_bytes());
        if kind == ANYWHERE {
            bytes.extend(u64::MAX.to_le_bytes());
        }
        bytes.extend(len.to_le_bytes());
        bytes.push(u8::try_from(flags).unwrap());
        bytes.push(next);
        self.op(op, &bytes)
    }

    fn ring(self, index: u8, to: (u8, u16), len: u16, flags: u16, next: u8) -> Self {
        self.desc(Op::Descriptor, index, to, len, flags, next)
    }

    fn table(self, index: u8, to: (u8, u16), len: u16, flags: u16, next: u8) -> Self {
        self.desc(Op::Table, index, to, len, flags, next)
    }

    fn offer(self, heads: &[u16]) -> Self {
        let offers = heads.iter();
        offers.fold(self, |s, head| s.op(Op::Offer, &head.to_le_bytes()))
    }

    fn feed(self, len: u16) -> Self {
        self.op(Op::Feed, &len.to_le_bytes())
    }

    fn turn(self) -> Self {
        self.op(Op::Turn, &[])
    }
}

/// Guests.
pub fn split_chains() -> Seeds {
    let tx = || Script::new(MODERN, 4);
    let rx = |options: u8| {
        (0..16).fold(Script::new(options | RX, 4), |s, n: u8| {
            s.ring(n, (IN_DATA, u16::from(n) * 0x800), 1526, WRITE, 0)
        })
    };
    let all: Vec<u16> = (0..16).collect();
    let frames = tx()
        .ring(0, (IN_DATA, 0), 72, 0, 0)
        .ring(1, (IN_DATA, 0), 12, NEXT, 2)
        .ring(2, (IN_DATA, 64), 1500, 0, 0)
        .offer(&[0, 1, 0])
        .turn()
        .op(Op::Kicks, &[1])
        .op(Op::UsedEvent, &[0xf4, 0xff])
        .offer(&[1])
        .turn()
        .op(Op::Kicks, &[0]);
    let tables = tx()
        .table(0, (IN_DATA, 0), 12, NEXT, 1)
        .table(1, (IN_DATA, 12), 60, 0, 0)
        .ring(0, (IN_TABLE, 0), 32, INDIRECT, 0)
        .ring(1, (IN_TABLE, 0), 16, INDIRECT, 0)
        .ring(2, (IN_TABLE, 0), 32, INDIRECT | NEXT, 0)
        .ring(3, (IN_TABLE, 0), 17, INDIRECT, 0)
        .table(2, (IN_TABLE, 0), 16, INDIRECT, 0)
        .ring(4, (IN_TABLE, 32), 16, INDIRECT, 0)
        .offer(&[0, 1, 2, 3, 4])
        .turn();
    let bad = tx()
        .ring(0, (IN_DATA, 0), 72, NEXT, 0)
        .ring(1, (IN_DATA, 0), 72, NEXT, 0xff)
        .ring(2, (ANYWHERE, 0), 72, 0, 0)
        .ring(3, (AT_SEAM, 0x7fe0), 72, 0, 0)
        .ring(4, (IN_DATA, 0), 72, WRITE, 0)
        .ring(5, (IN_DATA, 0), 0xffff, 0, 0)
        .ring(6, (IN_DATA, 0), 5, 0, 0)
        .ring(7, (IN_RING, 0), 256, 0, 0)
        .offer(&[0, 1, 2, 3, 4, 5, 6, 7])
        .turn()
        .offer(&[99])
        .turn();
    let merged = rx(MODERN)
        .offer(&all)
        .feed(60)
        .feed(9000)
        .turn()
        .op(Op::Rewind, &[])
        .offer(&all[..7])
        .feed(20_000)
        .turn()
        .op(Op::Rebind, &[])
        .feed(1514)
        .turn();
    let unmerged = rx(VERSION_1)
        .offer(&all)
        .feed(60)
        .feed(9000)
        .feed(1514)
        .turn();
    let legacy = rx(0).offer(&all[..3]).feed(60).feed(61).turn();
    let bad_buffers = rx(MODERN)
        .ring(0, (IN_DATA, 0), 11, WRITE, 0)
        .ring(1, (IN_DATA, 0), 100, 0, 0)
        .ring(2, (IN_DATA, 0), 12, WRITE | NEXT, 2)
        .ring(3, (IN_RING, 0), 100, WRITE, 0)
        .feed(3000)
        .offer(&[0, 4, 1, 5, 2, 6, 3, 7, 77])
        .turn()
        .turn();
    let index = tx().op(Op::AvailIndex, &[9, 9]).turn();
    // 2,047 entries, of which one is followed over and over; the second time over 7 MiB.
    let long = tx()
        .table(0, (IN_DATA, 0), 1, NEXT, 0)
        .table(1, (AT_SEAM, 0x8000), 0x8030, NEXT, 0)
        .ring(0, (IN_TABLE, 0), 0x7ff0, INDIRECT, 0)
        .ring(1, (IN_TABLE, 16), 0x7fe0, INDIRECT, 0)
        .offer(&[0, 1])
        .turn();
    let header = |bytes: [u8; 8]| {
        let poke = [&[0, 0x80], &bytes[..]].concat();
        let script = tx().ring(0, (IN_DATA, 0), 72, 0, 0).op(Op::Poke, &poke);
        script.offer(&[0]).turn().0
    };
    vec![
        ("frames", frames.0),
        ("indirect_tables", tables.0),
        ("bad_chains", bad.0),
        ("merged_buffers", merged.0),
        ("unmerged_buffers", unmerged.0),
        ("legacy_buffers", legacy.0),
        ("bad_buffers", bad_buffers.0),
        ("bad_index", index.0),
        ("long_chains", long.0),
        ("segments", header([1, 1, 54, 0, 168, 5, 34, 0])),
        ("segments_of_no_size", header([1, 1, 54, 0, 0, 0, 34, 0])),
        ("segments_ecn", header([1, 0x81, 54, 0, 168, 5, 34, 0])),
    ]
}
