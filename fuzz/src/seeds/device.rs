//! Seeds for `device`: a guest that transmits packets to another one.

use super::Seeds;
use crate::device::Op;

// Bits of the first byte of a guest's properties.
const PACKED: u8 = 1;
const EVENT_IDX: u8 = 2;
const INDIRECT: u8 = 4;
const MERGEABLE: u8 = 8;
const VERSION_1: u8 = 16;
/// The receiver accepts checksum and TCP offloads over IPv4 and IPv6.
const OFFLOADS: u8 = 0xe0;
const MODERN: u8 = EVENT_IDX | INDIRECT | MERGEABLE | VERSION_1;

// Kinds of packets.
const UDP4: u8 = 0;
const TCP4: u8 = 1;
const TCP6: u8 = 2;
const UDP6: u8 = 3;
const ECN: u8 = 0x10;
const TAGGED: u8 = 0x20;
const EXTENSION: u8 = 0x40;
const NO_OFFLOADS: u8 = 0x0c;

/// One segment, and four of them in an indirect table.
const WHOLE: [u8; 4] = [0, 0, 0, 0];
const IN_TABLE: [u8; 4] = [0x83, 64, 0, 0];
/// The sender and the receiver as operands.
const SENDER: u8 = 0;
const RECEIVER: u8 = 1;

/// The operations of both guests.
struct Script(Vec<u8>);

impl Script {
    /// The binary logarithm of the size of split virtqueues is 7, and packed ones have 103
    /// descriptors. Indices wrap soon.
    fn new(sender: u8, receiver: u8) -> Self {
        Self(vec![sender, 102, 0xf0, 0xff, receiver, 102, 0xf0, 0xff])
    }

    /// Large buffers at the receiver.
    fn with_buffers(sender: u8, receiver: u8) -> Self {
        Self::new(sender, receiver).buffers(30, 2048, WHOLE)
    }

    fn op(mut self, op: Op, operands: &[u8]) -> Self {
        self.0.push(op as u8);
        self.0.extend(operands);
        self
    }

    fn packet(self, kind: u8, payload: u16, gso: u16, layout: [u8; 4]) -> Self {
        let (payload, gso) = (payload.to_le_bytes(), gso.to_le_bytes());
        let operands = [&[kind], &payload[..], &gso, &[0], &layout].concat();
        self.op(Op::Packet, &operands)
    }

    fn buffers(self, count: u8, len: u16, layout: [u8; 4]) -> Self {
        let operands = [&[count], &len.to_le_bytes()[..], &layout].concat();
        self.op(Op::Buffers, &operands)
    }

    fn turn(self) -> Self {
        self.op(Op::Turn, &[])
    }
}

/// The seeds.
pub fn device() -> Seeds {
    let mut seeds = formats();
    seeds.extend(flaws());
    seeds
        .into_iter()
        .map(|(name, script)| (name, script.0))
        .collect()
}

/// A packet of each kind, from and to each format, with and without offloads of the receiver.
fn formats() -> Vec<(&'static str, Script)> {
    let all = |sender, receiver| {
        Script::with_buffers(sender, receiver)
            .packet(UDP4, 100, 0, WHOLE)
            .packet(NO_OFFLOADS | UDP4, 100, 0, WHOLE)
            .packet(TCP4, 5000, 1448, WHOLE)
            .packet(TCP6, 5000, 1428, WHOLE)
            .packet(UDP4, 3000, 1480, WHOLE)
            .turn()
            .buffers(30, 2048, WHOLE)
            .packet(UDP6 | EXTENSION, 3000, 1448, WHOLE)
            .packet(TCP4 | ECN, 5000, 1448, WHOLE)
            .packet(TCP4 | TAGGED, 5000, 1448, WHOLE)
            .turn()
    };
    vec![
        ("split_to_split", all(MODERN, MODERN)),
        ("split_to_packed", all(MODERN, MODERN | PACKED)),
        ("packed_to_split", all(MODERN | PACKED, MODERN)),
        ("packed_to_packed", all(MODERN | PACKED, MODERN | PACKED)),
        ("accepted", all(MODERN, MODERN | OFFLOADS)),
        ("legacy", all(0, 0)),
        (
            "tables",
            Script::new(MODERN, MODERN)
                .buffers(20, 1526, IN_TABLE)
                .packet(TCP4, 3000, 1448, IN_TABLE)
                .packet(UDP4, 3000, 0, [3, 20, 0, 0])
                .turn(),
        ),
        (
            "large",
            Script::new(MODERN, MODERN | OFFLOADS)
                .buffers(40, 2048, WHOLE)
                .packet(TCP4, 0xdc00, 1448, WHOLE)
                .turn()
                .packet(TCP6, 0xdc00, 100, WHOLE)
                .turn(),
        ),
        (
            "rebound",
            Script::with_buffers(MODERN | PACKED, MODERN | PACKED)
                .packet(UDP4, 100, 0, WHOLE)
                .op(Op::Rebind, &[SENDER])
                .turn()
                .op(Op::Rebind, &[RECEIVER])
                .packet(UDP4, 100, 0, WHOLE)
                .turn(),
        ),
        (
            "detached",
            Script::with_buffers(MODERN, MODERN)
                .op(Op::Attach, &[0])
                .packet(UDP4, 100, 0, WHOLE)
                .turn()
                .op(Op::Attach, &[1])
                .packet(UDP4, 100, 0, WHOLE)
                .op(Op::DisabledTurn, &[])
                .op(Op::Format, &[7])
                .packet(TCP4, 3000, 1448, WHOLE)
                .turn(),
        ),
    ]
}

/// Guests that break rules.
fn flaws() -> Vec<(&'static str, Script)> {
    let flawed = |features| {
        // From 192 on, each number is a flaw.
        (198..=206).fold(Script::new(features, features), |script, flaw| {
            let layout = [if flaw % 2 == 0 { 0x81 } else { 1 }, 100, 0, flaw];
            script
                .buffers(4, 1526, layout)
                .packet(UDP4, 1000, 0, layout)
                .packet(UDP4, 1000, 0, WHOLE)
                .turn()
        })
    };
    vec![
        ("flaws_split", flawed(MODERN)),
        ("flaws_packed", flawed(MODERN | PACKED)),
        (
            "no_buffers",
            Script::new(MODERN, MODERN)
                .packet(UDP4, 1000, 0, WHOLE)
                .turn()
                .buffers(3, 100, WHOLE)
                .packet(UDP4, 1000, 0, WHOLE)
                .packet(UDP4, 10, 0, WHOLE)
                .turn(),
        ),
        (
            "unmerged_buffers",
            Script::new(MODERN, EVENT_IDX | VERSION_1)
                .buffers(10, 200, WHOLE)
                .packet(UDP4, 1000, 0, WHOLE)
                .packet(UDP4, 10, 0, WHOLE)
                .turn(),
        ),
        (
            "changed_packet",
            Script::with_buffers(MODERN, MODERN).op(
                Op::Packet,
                &[TCP4, 0, 8, 100, 0, 2, 6, 0, 0xff, 24, 0, 0x60, 0, 0, 0, 0],
            ),
        ),
        (
            "same_head_twice",
            Script::with_buffers(MODERN, MODERN)
                .packet(UDP4, 1000, 0, WHOLE)
                .op(Op::Head, &[SENDER, 0, 0])
                .op(Op::Head, &[RECEIVER, 0, 0])
                .op(Op::Head, &[SENDER, 0xff, 0xff])
                .turn(),
        ),
        (
            "descriptors",
            Script::with_buffers(MODERN | PACKED, MODERN)
                .op(Op::Descriptor, &[SENDER, 0, 0, 0x80, 0, 60, 0, 1, 9])
                .op(Op::Descriptor, &[SENDER, 0, 0, 0x90, 0, 60, 0, 0, 9])
                .op(Op::Descriptor, &[RECEIVER, 0, 0, 0x80, 2, 60, 0, 2, 0])
                .turn(),
        ),
        (
            "disorder",
            Script::with_buffers(MODERN | PACKED, MODERN)
                .packet(UDP4, 100, 0, WHOLE)
                .op(Op::Disorder, &[SENDER, 0, 0])
                .packet(UDP4, 100, 0, WHOLE)
                .op(Op::Disorder, &[RECEIVER, 7, 0])
                .op(Op::Kicks, &[3])
                .op(Op::Event, &[RECEIVER, 3, 0, 2])
                .turn(),
        ),
    ]
}
