//! What a flow is: frames of one connection, in both directions.
//!
//! The hash is symmetric: request and reply have the same. It reads the frame where the guest may
//! still write it, each field once; a guest that changes fields meanwhile gets its own frames
//! steered elsewhere and nothing more.

use virtionet_virtqueue::memory::GuestSlice;

/// The hash of frames that belong to no flow: those that are not IP.
pub(super) const NO_FLOW: u64 = 0;

const ETHERTYPE_OFFSET: usize = 12;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const VLAN_ETHERTYPES: [u16; 2] = [0x8100, 0x88a8];
const MAX_VLAN_TAGS: usize = 2;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// Headers that may have to be read: Ethernet, two VLAN tags, IPv4 with all options, ports.
const MAX_HEADERS_LEN: usize = 14 + 8 + 60 + 4;
/// Ethernet, IPv4 without options, ports.
const MIN_PLAIN_LEN: usize = 38;
/// EtherType and first byte of IPv4 without options, as the lowest bytes of a word.
const PLAIN_IPV4_PREFIX: u64 = 0x45_0008;
/// IPv4's more-fragments bit and fragment offset.
const IPV4_FRAGMENT_MASK: u16 = 0x3fff;

/// The flow that a frame belongs to, or [`NO_FLOW`].
#[inline(always)]
pub(super) fn hash_flow(payload: &[GuestSlice<'_>], seed: u64) -> u64 {
    let known = match payload.first() {
        Some(first) if first.len() >= MIN_PLAIN_LEN => hash_plain_ipv4(first, seed),
        _ => None,
    };
    known.unwrap_or_else(|| hash_slow_path(payload, seed))
}

/// The usual frame, with [`MIN_PLAIN_LEN`] bytes at least: TCP or UDP over IPv4 without options, whole, not
/// tagged.
#[inline(always)]
fn hash_plain_ipv4(frame: &GuestSlice<'_>, seed: u64) -> Option<u64> {
    let read = |at| {
        let mut bytes = [0; 8];
        frame.skip(at).copy_to(&mut bytes);
        u64::from_le_bytes(bytes)
    };
    let [begin, middle, addresses, ports] = [12, 20, 26, 30].map(read);
    let protocol = u8::try_from(middle >> 24 & 0xff).unwrap_or(0);
    let is_plain = begin & 0xff_ffff == PLAIN_IPV4_PREFIX
        && middle & 0xff3f == 0
        && matches!(protocol, IPPROTO_TCP | IPPROTO_UDP);
    is_plain.then(|| hash_ipv4(addresses, Some(ports >> 32), protocol, seed))
}

/// Any other frame.
#[inline(never)]
fn hash_slow_path(payload: &[GuestSlice<'_>], seed: u64) -> u64 {
    let mut head = [0; MAX_HEADERS_LEN];
    let mut len = 0;
    for slice in payload {
        len += slice.copy_to(&mut head[len..]);
        if len == MAX_HEADERS_LEN {
            break;
        }
    }
    hash_packet(&head[..len], seed).unwrap_or(NO_FLOW)
}

/// `None` for frames that are not IP, or too short.
fn hash_packet(frame: &[u8], seed: u64) -> Option<u64> {
    let mut at = ETHERTYPE_OFFSET;
    for _ in 0..MAX_VLAN_TAGS {
        if VLAN_ETHERTYPES.contains(&read_be16(frame, at)?) {
            at += 4;
        }
    }
    let packet = frame.get(at + 2..)?;
    match read_be16(frame, at)? {
        ETH_P_IP => hash_v4_packet(packet, seed),
        ETH_P_IPV6 => hash_v6_packet(packet, seed),
        _ => None,
    }
}

fn hash_v4_packet(packet: &[u8], seed: u64) -> Option<u64> {
    let header = packet.get(..20)?;
    let len = usize::from(header[0] & 0xf) * 4;
    let protocol = header[9];
    let whole = read_be16(header, 6)? & IPV4_FRAGMENT_MASK == 0;
    let ports = ports(packet.get(len..), protocol).filter(|_| whole);
    Some(hash_ipv4(read_le64(header, 12), ports, protocol, seed))
}

/// Extension headers are not followed: such packets are steered by their addresses.
fn hash_v6_packet(packet: &[u8], seed: u64) -> Option<u64> {
    let header = packet.get(..40)?;
    let ports = ports(packet.get(40..), header[6]);
    let [from, to] = split_ports(ports);
    let address = |at| mix(read_le64(header, at), read_le64(header, at + 8), seed);
    Some(hash_symmetric(
        address(8) ^ from,
        address(24) ^ to,
        protocol_key(ports, header[6]),
        seed,
    ))
}

/// Source and destination port, lowest byte first, where the protocol has some.
fn ports(transport: Option<&[u8]>, protocol: u8) -> Option<u64> {
    match protocol {
        IPPROTO_TCP | IPPROTO_UDP => {
            let bytes = transport?.get(..4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes).into())
        }
        _ => None,
    }
}

/// `addresses`: source and destination, lowest byte first.
#[inline(always)]
fn hash_ipv4(addresses: u64, ports: Option<u64>, protocol: u8, seed: u64) -> u64 {
    let [from, to] = split_ports(ports);
    hash_symmetric(
        (addresses & 0xffff_ffff) << 16 | from,
        addresses >> 32 << 16 | to,
        protocol_key(ports, protocol),
        seed,
    )
}

/// Source port and destination port.
#[inline(always)]
fn split_ports(ports: Option<u64>) -> [u64; 2] {
    let ports = ports.unwrap_or(0);
    [ports & 0xffff, ports >> 16]
}

/// Protocols of one pair of hosts are told apart only where ports tell connections apart: the
/// fragments of a packet have one of them alone.
#[inline(always)]
fn protocol_key(ports: Option<u64>, protocol: u8) -> u64 {
    ports.map_or(0, |_| u64::from(protocol))
}

/// A hash that does not tell which end is which; never [`NO_FLOW`].
#[inline(always)]
fn hash_symmetric(a: u64, b: u64, kind: u64, seed: u64) -> u64 {
    mix(a.min(b), a.max(b), seed ^ kind) | 1
}

#[inline(always)]
fn mix(a: u64, b: u64, seed: u64) -> u64 {
    let x = (a ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let y = (b.rotate_left(17) ^ x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    y ^ y >> 32
}

#[inline(always)]
fn read_be16(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

#[inline(always)]
fn read_le64(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtionet_guest::frame::{FrameSpec, Transport, ethernet};

    use super::*;

    const SEED: u64 = 0x0123_4567_89ab_cdef;

    /// The flow of a frame that lies in pieces of `cut` bytes.
    fn flow_in_pieces(mut bytes: Vec<u8>, cut: usize) -> u64 {
        let pieces: Vec<GuestSlice<'_>> = bytes
            .chunks_mut(cut)
            .map(GuestSlice::from_private)
            .collect();
        hash_flow(&pieces, SEED)
    }

    fn flow(spec: &FrameSpec) -> u64 {
        let bytes = spec.build(b"payload").unwrap().bytes;
        let whole = flow_in_pieces(bytes.clone(), bytes.len());
        for cut in [1, 7, 16, 37, 38] {
            assert_eq!(flow_in_pieces(bytes.clone(), cut), whole, "{cut}");
        }
        whole
    }

    fn reply(spec: &FrameSpec) -> FrameSpec {
        FrameSpec {
            source_mac: spec.target_mac,
            target_mac: spec.source_mac,
            source: spec.target,
            target: spec.source,
            source_port: spec.target_port,
            target_port: spec.source_port,
            sequence: spec.sequence + 77,
            ..spec.clone()
        }
    }

    fn kinds() -> [FrameSpec; 4] {
        [
            FrameSpec::v4(Transport::Tcp),
            FrameSpec::v4(Transport::Udp),
            FrameSpec::v6(Transport::Tcp),
            FrameSpec::v6(Transport::Udp),
        ]
    }

    #[test]
    fn request_and_reply_are_one_flow_and_other_ports_another() {
        let mut seen = std::collections::BTreeSet::new();
        for spec in kinds() {
            assert_eq!(flow(&spec), flow(&reply(&spec)));
            let tagged = FrameSpec {
                vlan: Some(5),
                ..spec.clone()
            };
            assert_eq!(flow(&spec), flow(&tagged));
            assert!(seen.insert(flow(&spec)));
            for port in 0..1000 {
                let other = FrameSpec {
                    source_port: 2000 + port,
                    ..spec.clone()
                };
                assert!(seen.insert(flow(&other)), "{other:?}");
            }
        }
        assert!(!seen.contains(&NO_FLOW));
    }

    #[test]
    fn fragments_and_other_protocols_go_by_addresses() {
        let spec = FrameSpec::v4(Transport::Udp);
        let change = |at: usize, value: u8| {
            let mut bytes = spec.build(&[0; 40]).unwrap().bytes;
            bytes[at] = value;
            let len = bytes.len();
            flow_in_pieces(bytes, len)
        };
        let first = change(20, 0x20);
        // A later fragment has payload where the first has ports.
        let later = change(21, 5);
        let icmp = change(23, 1);
        assert_eq!(first, later);
        assert_eq!(first, icmp);
        assert_ne!(first, flow(&spec));
        // Don't fragment is not a fragment; ECN and DSCP are not the flow's.
        assert_eq!(change(20, 0x00), change(20, 0x40));
        assert_eq!(change(15, 3), flow(&spec));
    }

    #[test]
    fn ipv4_options_are_stepped_over() {
        let spec = FrameSpec::v4(Transport::Tcp);
        let mut bytes = spec.build(&[0; 40]).unwrap().bytes;
        bytes[14] = 0x46;
        bytes.splice(34..34, [1, 1, 1, 1]);
        let len = bytes.len();
        assert_eq!(flow_in_pieces(bytes, len), flow(&spec));
    }

    #[test]
    fn what_is_not_ip_or_cut_short_is_no_flow() {
        let arp = ethernet([0xff; 6], [2; 6], 0x0806, &[0; 28]);
        assert_eq!(flow_in_pieces(arp, 60), NO_FLOW);
        let whole = FrameSpec::v6(Transport::Tcp).build(&[]).unwrap().bytes;
        for len in 1..54 {
            assert_eq!(flow_in_pieces(whole[..len].to_vec(), len), NO_FLOW, "{len}");
        }
        assert_eq!(hash_flow(&[], SEED), NO_FLOW);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_alike_however_they_are_cut(
            bytes in proptest::collection::vec(any::<u8>(), 14..120),
            kind in prop_oneof![Just([8, 0, 0x45]), Just([8, 0, 0x4f]), Just([0x86, 0xdd, 0x60])],
            cut in 1_usize..50,
        ) {
            let mut bytes = bytes;
            let n = kind.len().min(bytes.len() - 12);
            bytes[12..12 + n].copy_from_slice(&kind[..n]);
            let len = bytes.len();
            prop_assert_eq!(flow_in_pieces(bytes.clone(), cut), flow_in_pieces(bytes, len));
        }

        #[test]
        fn the_hash_is_symmetric_and_depends_on_all_of_the_flow(
            ends in any::<[(u32, u16); 2]>(),
            bit in 0_u32..96,
        ) {
            let spec = |ends: [(u32, u16); 2]| FrameSpec {
                source: std::net::Ipv4Addr::from(ends[0].0).into(),
                source_port: ends[0].1,
                target: std::net::Ipv4Addr::from(ends[1].0).into(),
                target_port: ends[1].1,
                ..FrameSpec::v4(Transport::Tcp)
            };
            let [a, b] = ends;
            prop_assert_eq!(flow(&spec([a, b])), flow(&spec([b, a])));
            let mut other = ends;
            match bit {
                0..32 => other[0].0 ^= 1 << bit,
                32..64 => other[1].0 ^= 1 << (bit - 32),
                64..80 => other[0].1 ^= 1 << (bit - 64),
                _ => other[1].1 ^= 1 << (bit - 80),
            }
            prop_assume!(other != [b, a]);
            prop_assert_ne!(flow(&spec(ends)), flow(&spec(other)));
        }
    }
}
