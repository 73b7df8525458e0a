//! The operations of a guest as the bytes that `split_chains` and `packed_chains` read.

use crate::packed_chains::{self, Op as Packed};
use crate::split_chains::{self, Op};

// Bits of `FuzzSetup::options`.
pub const RX: u8 = 1;
pub const EVENT_IDX: u8 = 2;
pub const INDIRECT_DESC: u8 = 4;
pub const MERGEABLE: u8 = 8;
pub const OFFLOADS: u8 = 16;
pub const VERSION_1: u8 = 32;
pub const MODERN: u8 = EVENT_IDX | INDIRECT_DESC | MERGEABLE | OFFLOADS | VERSION_1;

// Kinds of addresses of `chains::fields`.
pub const IN_DATA: u8 = 0;
pub const IN_TABLE: u8 = 3;
pub const IN_RING: u8 = 4;
pub const AT_REGION_BOUNDARY: u8 = 5;
pub const ANYWHERE: u8 = 7;

/// An operation of either format.
pub trait Code {
    /// The byte that encodes the operation.
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

/// The operations of a guest.
pub struct Script(pub Vec<u8>);

impl Script {
    /// A script for a virtqueue whose size the format derives from `size`. The driver begins 16
    /// entries before its index wraps.
    pub fn new(options: u8, size: u8) -> Self {
        Self(vec![options, size, 0xf0, 0xff, 0, 0])
    }

    pub fn op(mut self, op: impl Code, operands: &[u8]) -> Self {
        self.0.push(u8::try_from(op.code()).unwrap());
        self.0.extend(operands);
        self
    }

    pub fn desc(
        self,
        op: impl Code,
        index: u8,
        to: (u8, u16),
        len: u16,
        flags: u16,
        next: u8,
    ) -> Self {
        let operands = [vec![index], fields(to, len, flags, next)].concat();
        self.op(op, &operands)
    }

    pub fn ring(self, index: u8, to: (u8, u16), len: u16, flags: u16, next: u8) -> Self {
        self.desc(Op::Descriptor, index, to, len, flags, next)
    }

    pub fn table(self, index: u8, to: (u8, u16), len: u16, flags: u16, next: u8) -> Self {
        self.desc(Op::Table, index, to, len, flags, next)
    }

    pub fn offer(self, heads: &[u16]) -> Self {
        let offers = heads.iter();
        offers.fold(self, |s, head| s.op(Op::Offer, &head.to_le_bytes()))
    }

    pub fn feed(self, len: u16) -> Self {
        self.op(Op::Feed, &len.to_le_bytes())
    }

    pub fn push(self, op: impl Code, count: u8, len: u16) -> Self {
        let [low, high] = len.to_le_bytes();
        self.op(op, &[count, low, high])
    }

    pub fn turn(self) -> Self {
        self.op(Op::Turn, &[])
    }

    /// A descriptor at the next position of a packed virtqueue.
    pub fn put(self, to: (u8, u16), len: u16, flags: u16, id: u8) -> Self {
        self.op(Packed::Put, &fields(to, len, flags, id))
    }

    pub fn packed_turn(self) -> Self {
        self.op(Packed::Turn, &[])
    }
}

/// The bytes of a descriptor in the form that `chains::fields` reads.
pub fn fields(to: (u8, u16), len: u16, flags: u16, next: u8) -> Vec<u8> {
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
