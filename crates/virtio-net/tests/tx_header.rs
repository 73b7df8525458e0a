//! The virtio-net header of TX frames (virtio 1.3 §5.1.6.2): each rule that a guest can break has a
//! counter, and a frame that breaks a rule never reaches the uplink.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{DATA, FULL, PLAIN, SplitRingFixture, frame};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_UFO,
};
use virtionet_guest::header::{
    NetHeader, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP,
};
use virtionet_virtio_net::TxQueue;

const CSUM: u64 = PLAIN | 1 << VIRTIO_NET_F_CSUM;
const TSO4: u64 = CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
const UFO: u64 = CSUM | 1 << VIRTIO_NET_F_HOST_UFO;
const TSO4_ECN: u64 = TSO4 | 1 << VIRTIO_NET_F_HOST_ECN;
const GOOD: &str = "";

/// A checksum at the position of TCP over IPv4.
const PARTIAL: NetHeader = NetHeader {
    flags: VIRTIO_NET_HDR_F_NEEDS_CSUM,
    gso_type: VIRTIO_NET_HDR_GSO_NONE,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
    num_buffers: 0,
};
/// Segments of 1,448 bytes.
const SEGMENTS: NetHeader = NetHeader {
    gso_type: VIRTIO_NET_HDR_GSO_TCPV4,
    hdr_len: 54,
    gso_size: 1448,
    ..PARTIAL
};
const NONE: NetHeader = NetHeader {
    flags: 0,
    csum_start: 0,
    csum_offset: 0,
    ..PARTIAL
};

/// A chain, and the counter of its fault (`GOOD`: it passes).
type Row = (&'static str, u64, NetHeader, usize, &'static str);

const fn gso(gso_type: u8) -> NetHeader {
    NetHeader {
        gso_type,
        ..SEGMENTS
    }
}

const fn flags(flags: u8, header: NetHeader) -> NetHeader {
    NetHeader { flags, ..header }
}

const fn hdr_len(hdr_len: u16) -> NetHeader {
    NetHeader {
        hdr_len,
        ..SEGMENTS
    }
}

const fn csum(csum_start: u16, csum_offset: u16) -> NetHeader {
    NetHeader {
        csum_start,
        csum_offset,
        ..PARTIAL
    }
}

const NO_SIZE: NetHeader = NetHeader {
    gso_size: 0,
    ..SEGMENTS
};
const STRAY: NetHeader = NetHeader {
    csum_start: 3000,
    ..SEGMENTS
};
/// Values in fields that have no meaning without the flags.
const UNUSED: NetHeader = NetHeader {
    flags: 0,
    gso_type: VIRTIO_NET_HDR_GSO_NONE,
    hdr_len: 9999,
    gso_size: 77,
    csum_start: 9999,
    csum_offset: 9999,
    num_buffers: 9,
};

// One row a line.
#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("no frame", FULL, NONE, 0, "frame_too_short"),
    ("1 byte", FULL, NONE, 1, "frame_too_short"),
    ("13 bytes", FULL, NONE, 13, "frame_too_short"),
    ("an Ethernet header alone", FULL, NONE, 14, GOOD),
    ("the longest", FULL, NONE, 65_557, GOOD),
    ("one byte more", FULL, NONE, 65_558, "frame_too_long"),
    ("100,000 bytes", FULL, NONE, 100_000, "frame_too_long"),
    ("values in fields without a meaning", PLAIN, UNUSED, 60, GOOD),
    ("DATA_VALID", PLAIN, flags(VIRTIO_NET_HDR_F_DATA_VALID, NONE), 60, GOOD),
    ("flags that do not exist", PLAIN, flags(0xf8, NONE), 60, GOOD),
    ("gso_type 2", FULL, gso(2), 3000, "gso_unknown"),
    ("gso_type 5, USO, never offered", FULL, gso(5), 3000, "gso_unknown"),
    ("gso_type 0x7f", FULL, gso(0x7f), 3000, "gso_unknown"),
    ("ECN of nothing", FULL, gso(VIRTIO_NET_HDR_GSO_ECN), 3000, "gso_unknown"),
    ("ECN of UFO", UFO | FULL, gso(VIRTIO_NET_HDR_GSO_UDP | VIRTIO_NET_HDR_GSO_ECN), 3000, "gso_unknown"),
    ("TSO4", TSO4, SEGMENTS, 3000, GOOD),
    ("TSO4 not negotiated", CSUM, SEGMENTS, 3000, "gso_not_negotiated"),
    ("TSO6", FULL, gso(VIRTIO_NET_HDR_GSO_TCPV6), 3000, GOOD),
    ("TSO6 not negotiated", TSO4, gso(VIRTIO_NET_HDR_GSO_TCPV6), 3000, "gso_not_negotiated"),
    ("UFO", UFO, gso(VIRTIO_NET_HDR_GSO_UDP), 3000, GOOD),
    ("UFO not negotiated", FULL, gso(VIRTIO_NET_HDR_GSO_UDP), 3000, "gso_not_negotiated"),
    ("TSO4 with ECN", TSO4_ECN, gso(VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN), 3000, GOOD),
    ("ECN not negotiated", TSO4, gso(VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN), 3000, "gso_not_negotiated"),
    ("gso_size 0", FULL, NO_SIZE, 3000, "gso_size_zero"),
    ("GSO without NEEDS_CSUM", FULL, flags(0, SEGMENTS), 3000, "gso_without_csum"),
    ("GSO with DATA_VALID alone", FULL, flags(VIRTIO_NET_HDR_F_DATA_VALID, SEGMENTS), 3000, "gso_without_csum"),
    ("hdr_len of the whole frame", FULL, hdr_len(3000), 3000, GOOD),
    ("hdr_len beyond the frame", FULL, hdr_len(3001), 3000, "hdr_len_out_of_frame"),
    ("hdr_len 65,535", FULL, hdr_len(u16::MAX), 3000, "hdr_len_out_of_frame"),
    ("checksum", CSUM, PARTIAL, 60, GOOD),
    ("checksum not negotiated", PLAIN, PARTIAL, 60, "csum_not_negotiated"),
    ("checksum in the last two bytes", CSUM, PARTIAL, 52, GOOD),
    ("checksum half beyond the frame", CSUM, PARTIAL, 51, "csum_out_of_frame"),
    ("csum_start beyond the frame", CSUM, csum(61, 0), 60, "csum_out_of_frame"),
    ("csum_offset beyond the frame", CSUM, csum(34, 60), 60, "csum_out_of_frame"),
    ("parts in the frame, sum beyond", CSUM, csum(40, 40), 60, "csum_out_of_frame"),
    ("sum over 65,535", CSUM, csum(u16::MAX, u16::MAX), 60, "csum_out_of_frame"),
    ("sum of 65,536", CSUM, csum(0x8000, 0x7ffe), 60, "csum_out_of_frame"),
    ("GSO, checksum beyond the frame", FULL, STRAY, 3000, "csum_out_of_frame"),
];

#[test]
fn every_rule_of_the_header_has_its_counter() {
    for &(name, features, header, len, counter) in ROWS {
        let mut fixture = SplitRingFixture::new(8, features);
        let mut tx: TxQueue = fixture.device();
        let bytes = frame(len, len);
        fixture.readable(0, &[&header.to_bytes()[..], &bytes].concat());
        fixture.readable(1, &[vec![0; 12], frame(1, 60)].concat());
        fixture.offer(&[0, 1]);
        assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().chains, 2, "{name}");
        assert_eq!(fixture.used(), [(0, 0), (1, 0)], "{name}");
        let mut carried = fixture.uplink.sent();
        let last = carried.pop().unwrap();
        assert_eq!(last.bytes, frame(1, 60), "{name}: the good frame after it");
        match counter {
            GOOD => {
                assert_eq!(fixture.counted(), [], "{name}");
                assert_eq!(carried[0].header.0, header.to_bytes(), "{name}");
                assert_eq!((carried[0].len, &carried[0].bytes), (len, &bytes), "{name}");
            }
            counter => {
                assert_eq!(fixture.counted(), [(counter, 1)], "{name}");
                assert!(carried.is_empty(), "{name}");
            }
        }
    }
}

#[test]
fn chain_shorter_than_a_header_is_dropped() {
    for (features, header_len) in [(PLAIN, 12), (0, 10)] {
        for len in 0..=header_len {
            let mut fixture = SplitRingFixture::new(8, features);
            let mut tx: TxQueue = fixture.device();
            fixture.ram.write(DATA, &[0; 12]).unwrap();
            fixture.desc(0, DATA, len, 0, 0);
            fixture.offer(&[0]);
            assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().chains, 1);
            assert_eq!(fixture.used(), [(0, 0)]);
            let counter = match len == header_len {
                true => "frame_too_short",
                false => "header_missing",
            };
            assert_eq!(fixture.counted(), [(counter, 1)], "{len} bytes");
            assert!(fixture.uplink.sent().is_empty());
        }
    }
}

#[test]
fn legacy_header_has_ten_bytes() {
    let mut fixture = SplitRingFixture::new(8, 1 << VIRTIO_NET_F_CSUM);
    let mut tx: TxQueue = fixture.device();
    let header = PARTIAL.to_bytes();
    fixture.readable(0, &[&header[..10], &frame(5, 60)].concat());
    fixture.offer(&[0]);
    assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().bytes, 60);
    let carried = fixture.uplink.sent();
    assert_eq!(carried[0].bytes, frame(5, 60));
    assert_eq!(carried[0].header.0, header);
}
