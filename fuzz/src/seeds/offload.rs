//! Seeds for `offload`: frames that request offloads.

use super::Seeds;
use crate::packets::{ACK, CWR, ECE, FIN, PSH, Packet, PacketBuilder};

// The offloads that the receiver accepts, in the bits of `offload::format`.
const NOTHING: u8 = 0;
const CSUM: u8 = 1;
const ALL: u8 = 31;

/// The input for a packet. It contains at most 160 bytes of the packet; the target appends the
/// rest.
fn input(accepted: u8, packet: Packet) -> Vec<u8> {
    let given = packet.bytes.len().min(160);
    let more = u16::try_from(packet.bytes.len() - given).unwrap();
    let mut bytes = vec![accepted, 0, 4];
    bytes.extend(packet.header.0);
    bytes.extend(more.to_le_bytes());
    bytes.extend(&packet.bytes[..given]);
    bytes
}

/// One frame of each kind, and some whose header is wrong.
pub fn offload() -> Seeds {
    let tcp4 = || PacketBuilder::tcp(false, 12, 5000).gso(1448);
    let tcp6 = || PacketBuilder::tcp(true, 12, 5000).gso(1428);
    let udp4 = || PacketBuilder::udp(false, 5000).gso(1480);
    let udp6 = || PacketBuilder::udp(true, 5000).gso(1448);
    let mut wrong = tcp4().build();
    wrong.header.0[1] = 4;
    let mut cut = tcp4().build();
    cut.bytes.truncate(60);
    let mut arp = udp4().build();
    arp.bytes[12..14].copy_from_slice(&[8, 6]);
    vec![
        ("tcp4", input(NOTHING, tcp4().build())),
        ("tcp6", input(NOTHING, tcp6().build())),
        ("tcp4_partial", input(CSUM, tcp4().build())),
        ("tcp6_as_it_is", input(ALL, tcp6().build())),
        ("udp4", input(NOTHING, udp4().build())),
        ("udp6", input(CSUM, udp6().build())),
        ("ecn", input(NOTHING, tcp4().flags(ACK | CWR | ECE).build())),
        (
            "last",
            input(NOTHING, tcp6().flags(ACK | FIN | PSH).build()),
        ),
        (
            "tags",
            input(NOTHING, tcp4().tag(0x8100, 1).tag(0x88a8, 2).build()),
        ),
        ("options", input(NOTHING, udp4().ip_options(3).build())),
        (
            "extensions",
            input(NOTHING, tcp6().extension(60, 1).extension(0, 2).build()),
        ),
        (
            "fragment_behind_extension",
            input(NOTHING, udp6().extension(43, 2).build()),
        ),
        (
            "checksum",
            input(NOTHING, PacketBuilder::udp(false, 301).build()),
        ),
        (
            "small",
            input(NOTHING, PacketBuilder::tcp(false, 0, 3000).gso(28).build()),
        ),
        ("wrong_version", input(NOTHING, wrong)),
        ("cut", input(NOTHING, cut)),
        ("not_ip", input(NOTHING, arp)),
    ]
}
