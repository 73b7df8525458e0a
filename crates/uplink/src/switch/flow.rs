//! The hash of a flow: of the frames of one connection, in both directions.
//!
//! The hash is symmetric: request and reply have the same one. It reads each field of the frame
//! once, in memory that the guest may still write; a guest that changes a field meanwhile only
//! affects the steering of its own frames.

use virtionet_virtio_net::packet::{
    IPPROTO_TCP, IPPROTO_UDP, IpHeader, IpVersion, MAX_VLAN_TAGS, VLAN_TAG_LEN,
};
use virtionet_virtqueue::memory::GuestSlice;

/// The hash of frames that belong to no flow: those that are not IP.
pub(super) const NO_FLOW: u64 = 0;

/// The longest headers that are read: Ethernet, two VLAN tags, IPv4 with all options, ports.
const MAX_HEADERS_LEN: usize = 14 + MAX_VLAN_TAGS * VLAN_TAG_LEN + 60 + 4;
/// The length of the usual headers: Ethernet, IPv4 without options, ports.
const MIN_PLAIN_LEN: usize = 38;
/// The EtherType and the first byte of IPv4 without options, as the lowest bytes of a word.
const PLAIN_IPV4_PREFIX: u64 = 0x45_0008;

/// The hash of the flow to which a frame belongs, or [`NO_FLOW`].
#[inline(always)]
pub(super) fn hash_flow(payload: &[GuestSlice<'_>], seed: u64) -> u64 {
    let known = match payload.first() {
        Some(first) if first.len() >= MIN_PLAIN_LEN => hash_plain_ipv4(first, seed),
        _ => None,
    };
    known.unwrap_or_else(|| hash_slow_path(payload, seed))
}

/// The flow of the usual frame: TCP or UDP over IPv4 without options, not a fragment, not tagged.
/// The slice has at least [`MIN_PLAIN_LEN`] bytes.
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

/// The flow of any frame.
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

/// The flow of the frame that begins with these bytes; `None` where it is not IP, or truncated.
fn hash_packet(frame: &[u8], seed: u64) -> Option<u64> {
    let ip = IpHeader::parse(frame).ok()?;
    let header = frame.get(ip.offset..)?;
    let ports = match ip.is_fragment {
        // Later fragments have payload where the first one has ports.
        true => None,
        false => ports(header.get(ip.len..), ip.protocol),
    };
    Some(match ip.version {
        IpVersion::V4 => hash_ipv4(read_le64(header, 12), ports, ip.protocol, seed),
        IpVersion::V6 => hash_ipv6(header, ports, ip.protocol, seed),
    })
}

/// Extension headers are not parsed: packets with such headers are steered by their addresses.
fn hash_ipv6(header: &[u8], ports: Option<u64>, protocol: u8, seed: u64) -> u64 {
    let [from, to] = split_ports(ports);
    let address = |at| mix(read_le64(header, at), read_le64(header, at + 8), seed);
    hash_symmetric(
        address(8) ^ from,
        address(24) ^ to,
        protocol_key(ports, protocol),
        seed,
    )
}

/// The source and destination port, lowest byte first, where the protocol has ports.
fn ports(transport: Option<&[u8]>, protocol: u8) -> Option<u64> {
    match protocol {
        IPPROTO_TCP | IPPROTO_UDP => {
            let bytes = transport?.get(..4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes).into())
        }
        _ => None,
    }
}

/// The hash of an IPv4 flow; `addresses` are source and destination, lowest byte first.
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

/// The source port and the destination port; 0 where there are none.
#[inline(always)]
fn split_ports(ports: Option<u64>) -> [u64; 2] {
    let ports = ports.unwrap_or(0);
    [ports & 0xffff, ports >> 16]
}

/// The protocol counts only together with ports, because all fragments of a packet must have the
/// same hash, and only the first one has ports.
#[inline(always)]
fn protocol_key(ports: Option<u64>, protocol: u8) -> u64 {
    ports.map_or(0, |_| u64::from(protocol))
}

/// A hash that is the same with `a` and `b` exchanged; never [`NO_FLOW`].
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

    /// The flow of a frame in segments of `cut` bytes.
    fn flow_in_segments(mut bytes: Vec<u8>, cut: usize) -> u64 {
        let segments: Vec<GuestSlice<'_>> = bytes
            .chunks_mut(cut)
            .map(GuestSlice::from_private)
            .collect();
        hash_flow(&segments, SEED)
    }

    fn flow(spec: &FrameSpec) -> u64 {
        let bytes = spec.build(b"payload").unwrap().bytes;
        let whole = flow_in_segments(bytes.clone(), bytes.len());
        for cut in [1, 7, 16, 37, 38] {
            assert_eq!(flow_in_segments(bytes.clone(), cut), whole, "{cut}");
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
    fn tags_of_each_type_do_not_change_the_flow() {
        for spec in kinds() {
            for tags in [
                &[0x81, 0, 0, 5][..],
                &[0x88, 0xa8, 0, 5],
                &[0x91, 0, 0, 5],
                &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6],
                &[0x91, 0, 0, 5, 0x81, 0, 0, 6],
            ] {
                let mut bytes = spec.build(b"payload").unwrap().bytes;
                bytes.splice(12..12, tags.iter().copied());
                let len = bytes.len();
                assert_eq!(flow_in_segments(bytes, len), flow(&spec), "{tags:02x?}");
            }
        }
    }

    #[test]
    fn fragments_and_other_protocols_are_hashed_by_their_addresses() {
        let spec = FrameSpec::v4(Transport::Udp);
        let change = |at: usize, value: u8| {
            let mut bytes = spec.build(&[0; 40]).unwrap().bytes;
            bytes[at] = value;
            let len = bytes.len();
            flow_in_segments(bytes, len)
        };
        let first = change(20, 0x20);
        // A later fragment has payload where the first one has ports.
        let later = change(21, 5);
        let icmp = change(23, 1);
        assert_eq!(first, later);
        assert_eq!(first, icmp);
        assert_ne!(first, flow(&spec));
        // A packet with DF is not a fragment; ECN and DSCP are not part of the flow.
        assert_eq!(change(20, 0x00), change(20, 0x40));
        assert_eq!(change(15, 3), flow(&spec));
    }

    #[test]
    fn ipv4_options_do_not_change_the_flow() {
        let spec = FrameSpec::v4(Transport::Tcp);
        let mut bytes = spec.build(&[0; 40]).unwrap().bytes;
        bytes[14] = 0x46;
        bytes.splice(34..34, [1, 1, 1, 1]);
        let len = bytes.len();
        assert_eq!(flow_in_segments(bytes, len), flow(&spec));
    }

    #[test]
    fn frame_that_is_not_ip_or_truncated_has_no_flow() {
        let arp = ethernet([0xff; 6], [2; 6], 0x0806, &[0; 28]);
        assert_eq!(flow_in_segments(arp, 60), NO_FLOW);
        let whole = FrameSpec::v6(Transport::Tcp).build(&[]).unwrap().bytes;
        for len in 1..54 {
            assert_eq!(
                flow_in_segments(whole[..len].to_vec(), len),
                NO_FLOW,
                "{len}"
            );
        }
        assert_eq!(hash_flow(&[], SEED), NO_FLOW);
    }

    proptest! {
        #[test]
        fn any_bytes_have_the_same_flow_in_any_segments(
            bytes in proptest::collection::vec(any::<u8>(), 14..120),
            kind in prop_oneof![Just([8, 0, 0x45]), Just([8, 0, 0x4f]), Just([0x86, 0xdd, 0x60])],
            cut in 1_usize..50,
        ) {
            let mut bytes = bytes;
            let n = kind.len().min(bytes.len() - 12);
            bytes[12..12 + n].copy_from_slice(&kind[..n]);
            let len = bytes.len();
            prop_assert_eq!(flow_in_segments(bytes.clone(), cut), flow_in_segments(bytes, len));
        }

        #[test]
        fn hash_is_symmetric_and_depends_on_every_bit_of_the_flow(
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
