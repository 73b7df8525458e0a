//! The parts of the inputs of `device` that describe a chain, a packet in it, and what is wrong
//! with it.

use crate::input::Input;
use crate::packets::{ACK, CWR, ECE, Packet, PacketBuilder};

/// The most payload of a packet that an operation builds.
const MAX_PAYLOAD: usize = 0xe000;

/// A segment of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
}

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Flaw {
    None,
    /// The last segment has the other direction.
    Direction,
    /// The last segment ends outside of the memory.
    TooLong,
    /// The first segment is outside of the memory.
    Unmapped,
    /// The last segment is empty.
    Empty,
    /// The last segment continues in a descriptor that does not exist.
    NextOutOfRange,
    /// The last segment continues in the first one.
    Loop,
    /// The length of the indirect table is odd.
    TableLength,
    /// The indirect table is outside of the memory.
    TableUnmapped,
    /// The table's last descriptor is an indirect one.
    Nested,
}

const FLAWS: [Flaw; 9] = [
    Flaw::Direction,
    Flaw::TooLong,
    Flaw::Unmapped,
    Flaw::Empty,
    Flaw::NextOutOfRange,
    Flaw::Loop,
    Flaw::TableLength,
    Flaw::TableUnmapped,
    Flaw::Nested,
];

impl Flaw {
    /// Three of four values mean no flaw.
    fn from_byte(byte: u8) -> Self {
        match byte {
            0..=191 => Self::None,
            n => FLAWS[usize::from(n) % FLAWS.len()],
        }
    }
}

/// How a chain lies in memory.
pub struct Layout {
    /// Number of segments, 1 to 4.
    segments: u32,
    pub indirect: bool,
    /// The length of all segments but the last.
    first: u32,
    pub flaw: Flaw,
}

impl Layout {
    /// Reads 4 bytes: number of segments and bit 7 for an indirect table, the length of all
    /// segments but the last (2 bytes), and the flaw.
    pub fn read(input: &mut Input<'_>) -> Self {
        let shape = input.u8();
        Self {
            segments: u32::from(shape % 4) + 1,
            indirect: shape & 0x80 != 0,
            first: u32::from(input.u16() % 0x1000),
            flaw: Flaw::from_byte(input.u8()),
        }
    }

    /// Cuts the `len` bytes at `addr`.
    pub fn cut(&self, addr: u64, len: u32, flags: u16) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut done = 0;
        for n in 1..=self.segments {
            let left = len - done;
            let here = match n == self.segments {
                true => left,
                false => self.first.min(left),
            };
            segments.push(Segment {
                addr: addr + u64::from(done),
                len: here,
                flags,
            });
            done += here;
            if done == len {
                break;
            }
        }
        segments
    }
}

/// Reads a packet: its kind (1 byte), the length of its payload (2 bytes), the size of its segments
/// (2 bytes), and how many bytes of header and packet are changed (1 byte), each with its offset (2
/// bytes) and value (1 byte).
pub fn packet(input: &mut Input<'_>) -> Packet {
    let kind = input.u8();
    let payload = usize::from(input.u16()).min(MAX_PAYLOAD);
    let gso = input.u16();
    let mut builder = match kind % 4 {
        0 => PacketBuilder::udp(false, payload),
        1 => PacketBuilder::tcp(false, 12, payload),
        2 => PacketBuilder::tcp(true, 0, payload),
        _ => PacketBuilder::udp(true, payload),
    };
    if gso != 0 {
        builder = builder.gso(gso);
    }
    if kind & 0x10 != 0 && kind % 4 == 1 {
        builder = builder.flags(ACK | CWR | ECE);
    }
    if kind & 0x20 != 0 {
        builder = builder.tag(0x8100, 1);
    }
    if kind & 0x40 != 0 && kind % 4 >= 2 {
        builder = builder.extension(60, 1);
    }
    let mut packet = builder.build();
    if kind & 0x0c == 0x0c {
        // Without any offload.
        packet.header.0.fill(0);
    }
    for _ in 0..input.u8() % 8 {
        let at = usize::from(input.u16());
        let value = input.u8();
        let header_len = packet.header.0.len();
        let byte = match at < header_len {
            true => packet.header.0.get_mut(at),
            false => packet.bytes.get_mut(at - header_len),
        };
        if let Some(byte) = byte {
            *byte = value;
        }
    }
    packet
}
