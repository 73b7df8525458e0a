//! Guests with chains, in rings of both formats.

use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::Seeds;
use crate::packed_chains::{self, Op as Packed};
use crate::split_chains::{self, Op};

const RX: u8 = 1;
const EVENT_IDX: u8 = 2;
const INDIRECT_DESC: u8 = 4;
const MERGEABLE: u8 = 8;
const OFFLOADS: u8 = 16;
const VERSION_1: u8 = 32;
const MODERN: u8 = EVENT_IDX | INDIRECT_DESC | MERGEABLE | OFFLOADS | VERSION_1;

/// Kinds of addresses; see `chains::fields`.
const IN_DATA: u8 = 0;
const IN_TABLE: u8 = 3;
const IN_RING: u8 = 4;
const AT_REGION_BOUNDARY: u8 = 5;
const ANYWHERE: u8 = 7;

/// An operation of either format.
trait Code {
    fn code(self) -> usize;
}

impl Code for split_chains::Op {
    fn code(self) -> usize {
        self as usize
    }
}

impl Code for packed_chains::Op {
    fn code(self) -> usize {
        self as usize
    }
}

/// What a guest does.
struct Script(Vec<u8>);

impl Script {
    /// A ring of a size that the format makes of `size`, which the driver begins 16 before its index
    /// wraps.
    fn new(options: u8, size: u8) -> Self {
        Self(vec![options, size, 0xf0, 0xff, 0, 0])
    }

    fn op(mut self, op: impl Code, operands: &[u8]) -> Self {
        self.0.push(u8::try_from(op.code()).unwrap());
        self.0.extend(operands);
        self
    }

    fn desc(self, op: impl Code, index: u8, to: (u8, u16), len: u16, flags: u16, next: u8) -> Self {
        let operands = [vec![index], fields(to, len, flags, next)].concat();
        self.op(op, &operands)
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

    fn push(self, op: impl Code, count: u8, len: u16) -> Self {
        let [low, high] = len.to_le_bytes();
        self.op(op, &[count, low, high])
    }

    fn turn(self) -> Self {
        self.op(Op::Turn, &[])
    }

    /// A descriptor in the next place of a packed ring.
    fn put(self, to: (u8, u16), len: u16, flags: u16, id: u8) -> Self {
        self.op(Packed::Put, &fields(to, len, flags, id))
    }

    fn packed_turn(self) -> Self {
        self.op(Packed::Turn, &[])
    }
}

/// A descriptor as `chains::fields` reads it.
fn fields(to: (u8, u16), len: u16, flags: u16, next: u8) -> Vec<u8> {
    let (kind, offset) = to;
    let mut bytes = vec![kind];
    bytes.extend(offset.to_le_bytes());
    if kind == ANYWHERE {
        bytes.extend(u64::MAX.to_le_bytes());
    }
    bytes.extend(len.to_le_bytes());
    bytes.push(u8::try_from(flags).unwrap());
    bytes.push(next);
    bytes
}

/// Guests with a split ring.
pub fn split_chains() -> Seeds {
    let tx = || Script::new(MODERN, 4);
    let rx = |options: u8| {
        (0..16).fold(Script::new(options | RX, 4), |s, n: u8| {
            s.ring(n, (IN_DATA, u16::from(n) * 0x800), 1526, VRING_DESC_F_WRITE, 0)
        })
    };
    let all: Vec<u16> = (0..16).collect();
    let frames = tx()
        .ring(0, (IN_DATA, 0), 72, 0, 0)
        .ring(1, (IN_DATA, 0), 12, VRING_DESC_F_NEXT, 2)
        .ring(2, (IN_DATA, 64), 1500, 0, 0)
        .offer(&[0, 1, 0])
        .turn()
        .op(Op::Kicks, &[1])
        .op(Op::UsedEvent, &[0xf4, 0xff])
        .offer(&[1])
        .turn()
        .op(Op::Kicks, &[0]);
    let tables = tx()
        .table(0, (IN_DATA, 0), 12, VRING_DESC_F_NEXT, 1)
        .table(1, (IN_DATA, 12), 60, 0, 0)
        .ring(0, (IN_TABLE, 0), 32, VRING_DESC_F_INDIRECT, 0)
        .ring(1, (IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 0)
        .ring(2, (IN_TABLE, 0), 32, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 0)
        .ring(3, (IN_TABLE, 0), 17, VRING_DESC_F_INDIRECT, 0)
        .table(2, (IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 0)
        .ring(4, (IN_TABLE, 32), 16, VRING_DESC_F_INDIRECT, 0)
        .offer(&[0, 1, 2, 3, 4])
        .turn();
    let bad = tx()
        .ring(0, (IN_DATA, 0), 72, VRING_DESC_F_NEXT, 0)
        .ring(1, (IN_DATA, 0), 72, VRING_DESC_F_NEXT, 0xff)
        .ring(2, (ANYWHERE, 0), 72, 0, 0)
        .ring(3, (AT_REGION_BOUNDARY, 0x7fe0), 72, 0, 0)
        .ring(4, (IN_DATA, 0), 72, VRING_DESC_F_WRITE, 0)
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
        .ring(0, (IN_DATA, 0), 11, VRING_DESC_F_WRITE, 0)
        .ring(1, (IN_DATA, 0), 100, 0, 0)
        .ring(2, (IN_DATA, 0), 12, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 2)
        .ring(3, (IN_RING, 0), 100, VRING_DESC_F_WRITE, 0)
        .feed(3000)
        .offer(&[0, 4, 1, 5, 2, 6, 3, 7, 77])
        .turn()
        .turn();
    let pushed = rx(MODERN)
        .offer(&all)
        .push(Op::Push, 3, 60)
        .push(Op::Push, 2, 4000)
        .feed(1514)
        .turn()
        .push(Op::Push, 64, 1514)
        .op(Op::Rewind, &[]);
    let index = tx().op(Op::AvailIndex, &[9, 9]).turn();
    // 2,047 entries, of which one is followed over and over; the second time over 7 MiB.
    let long = tx()
        .table(0, (IN_DATA, 0), 1, VRING_DESC_F_NEXT, 0)
        .table(1, (AT_REGION_BOUNDARY, 0x8000), 0x8030, VRING_DESC_F_NEXT, 0)
        .ring(0, (IN_TABLE, 0), 0x7ff0, VRING_DESC_F_INDIRECT, 0)
        .ring(1, (IN_TABLE, 16), 0x7fe0, VRING_DESC_F_INDIRECT, 0)
        .offer(&[0, 1])
        .turn();
    let header = |bytes: [u8; 8]| {
        let write_memory = [&[0, 0x80], &bytes[..]].concat();
        let script = tx().ring(0, (IN_DATA, 0), 72, 0, 0).op(Op::WriteMemory, &write_memory);
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
        ("pushed", pushed.0),
        ("long_chains", long.0),
        ("segments", header([1, 1, 54, 0, 168, 5, 34, 0])),
        ("segments_of_no_size", header([1, 1, 54, 0, 0, 0, 34, 0])),
        ("segments_ecn", header([1, 0x81, 54, 0, 168, 5, 34, 0])),
    ]
}

/// Guests with a packed ring.
pub fn packed_chains() -> Seeds {
    // 16 and 5 descriptors: a wrap within the first lap and soon again.
    let tx = || Script::new(MODERN, 15);
    let odd = || Script::new(MODERN, 4);
    let rx = |options: u8, size: u8, buffers: u8| {
        (0..buffers).fold(Script::new(options | RX, size), |s, n| {
            s.put((IN_DATA, u16::from(n) * 0x800), 1526, VRING_DESC_F_WRITE, n)
        })
    };
    let again = |s: Script| s.put((IN_DATA, 0), 72, 0, 1).packed_turn();
    let frames = tx()
        .put((IN_DATA, 0), 72, 0, 3)
        .put((IN_DATA, 0), 12, VRING_DESC_F_NEXT, 9)
        .put((IN_DATA, 64), 1500, 0, 4)
        .packed_turn()
        .op(Packed::Kicks, &[1])
        .op(Packed::Event, &[3, 0x80, 2])
        .put((IN_DATA, 0), 72, 0, 5)
        .packed_turn()
        .op(Packed::Kicks, &[0])
        .op(Packed::Rewind, &[]);
    let laps = (0..12).fold(odd(), |s, _| again(s));
    let tables = (tx())
        .op(
            Packed::Table,
            &[vec![0], fields((IN_DATA, 0), 12, 0, 0)].concat(),
        )
        .op(
            Packed::Table,
            &[vec![1], fields((IN_DATA, 12), 60, 0, 0)].concat(),
        )
        .op(
            Packed::Table,
            &[vec![2], fields((IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 0)].concat(),
        )
        .put((IN_TABLE, 0), 32, VRING_DESC_F_INDIRECT, 1)
        .put((IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 2)
        .put((IN_TABLE, 0), 17, VRING_DESC_F_INDIRECT, 3)
        .put((IN_TABLE, 32), 16, VRING_DESC_F_INDIRECT, 4)
        .put((IN_TABLE, 0), 32, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 5)
        .put((IN_DATA, 0), 60, 0, 5)
        .put((AT_REGION_BOUNDARY, 0x8000), 0x7ff0, VRING_DESC_F_INDIRECT, 6)
        .packed_turn();
    let bad = tx()
        .put((ANYWHERE, 0), 72, 0, 0)
        .put((AT_REGION_BOUNDARY, 0x7fe0), 72, 0, 1)
        .put((IN_DATA, 0), 72, VRING_DESC_F_WRITE, 2)
        .put((IN_DATA, 0), 0xffff, 0, 3)
        .put((IN_DATA, 0), 5, 0, 4)
        .put((IN_RING, 0), 256, 0, 5)
        .packed_turn()
        .packed_turn();
    let whole = (0..4).fold(odd(), |s, _| s.put((IN_DATA, 0), 20, VRING_DESC_F_NEXT, 7));
    let whole = again(whole.put((IN_DATA, 0), 20, 0, 7).packed_turn());
    let endless = (0..5).fold(odd(), |s, _| s.put((IN_DATA, 0), 20, VRING_DESC_F_NEXT, 7));
    let overfull = (0..9).fold(odd(), |s, n| s.put((IN_DATA, 0), 20, 0, n));
    let wrapped = again(again(odd()).op(Packed::Wrap, &[]));
    let rewritten = {
        let operands = [vec![4], fields((IN_DATA, 0), 72, 0x80, 1), vec![0x80]].concat();
        again(tx().op(Packed::Descriptor, &operands))
    };
    let feed = |s: Script, len: u16| s.op(Packed::Feed, &len.to_le_bytes());
    let merged = feed(feed(rx(MODERN, 15, 16), 60), 9000)
        .packed_turn()
        .op(Packed::Rewind, &[])
        .op(Packed::Rebind, &[]);
    let merged = feed(merged, 20_000).packed_turn();
    let pushed = rx(MODERN, 6, 7)
        .push(Packed::Push, 2, 60)
        .push(Packed::Push, 1, 4000)
        .push(Packed::Push, 64, 1514)
        .op(Packed::Rewind, &[]);
    let unmerged = feed(feed(rx(VERSION_1, 15, 9), 60), 9000).packed_turn();
    vec![
        ("frames", frames.0),
        ("laps", laps.0),
        ("indirect_tables", tables.0),
        ("bad_chains", bad.0),
        ("a_chain_as_long_as_the_ring", whole.0),
        ("no_end", endless.packed_turn().0),
        ("too_many", overfull.packed_turn().0),
        ("wrong_wrap_counter", wrapped.0),
        ("rewritten", rewritten.0),
        ("merged_buffers", merged.0),
        ("unmerged_buffers", unmerged.0),
        ("pushed", pushed.0),
    ]
}
