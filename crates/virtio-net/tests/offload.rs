//! Checksums, segmentation and fragmentation in software.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod packets;

use packets::{ACK, CWR, ECE, FIN, PSH, Packet, PacketBuilder, convert, format, verify};
use proptest::prelude::*;
use virtionet_guest::frame::{Frame, check};
use virtionet_guest::header::NetHeader;
use virtionet_virtio_net::header::{MAX_FRAME, VnetHeader};
use virtionet_virtio_net::offload::{MIN_GSO_SIZE, OffloadFault, Segmenter};
use virtionet_virtio_net::stats::VringStats;

const WHOLE: usize = 1 << 17;

fn made(packet: &Packet, csum: bool) -> Vec<Packet> {
    convert(&mut Segmenter::new(), packet, WHOLE, &format(csum, false)).unwrap()
}

fn fault(packet: &Packet) -> OffloadFault {
    convert(&mut Segmenter::new(), packet, WHOLE, &format(false, false)).unwrap_err()
}

#[test]
fn tcp_frames_become_valid_segments() {
    for v6 in [false, true] {
        for packet in [
            PacketBuilder::tcp(v6, 0, 5000).gso(1460),
            PacketBuilder::tcp(v6, 12, 65_000).gso(1448),
            PacketBuilder::tcp(v6, 12, 64_999).gso(1447),
            PacketBuilder::tcp(v6, 40, 64_999).gso(28),
            PacketBuilder::tcp(v6, 12, 2896).gso(1448),
            PacketBuilder::tcp(v6, 12, 9000)
                .gso(1448)
                .flags(ACK | FIN | PSH),
            PacketBuilder::tcp(v6, 12, 9000)
                .gso(1448)
                .flags(ACK | CWR | ECE),
            PacketBuilder::tcp(v6, 12, 9000).gso(1448).tag(0x8100, 7),
            PacketBuilder::tcp(v6, 12, 9000)
                .gso(1448)
                .tag(0x8100, 7)
                .tag(0x88a8, 9),
            PacketBuilder::tcp(v6, 12, 9000)
                .gso(1448)
                .tag(0x8100, 7)
                .tag(0x9100, 9),
            // A frame of one segment, and one without payload.
            PacketBuilder::tcp(v6, 12, 100).gso(1448),
            PacketBuilder::tcp(v6, 12, 0).gso(1448),
            PacketBuilder::tcp(v6, 12, 100).gso(65_535),
        ] {
            let packet = packet.build();
            verify(&packet, &format(false, false), &made(&packet, false));
            verify(&packet, &format(true, false), &made(&packet, true));
        }
    }
}

#[test]
fn headers_before_tcp_are_repeated_in_each_segment() {
    for packet in [
        PacketBuilder::tcp(true, 12, 9000)
            .gso(1400)
            .extension(60, 1),
        PacketBuilder::tcp(true, 12, 9000)
            .gso(1400)
            .extension(60, 2)
            .extension(43, 3)
            .extension(0, 1),
        PacketBuilder::tcp(false, 12, 9000).gso(1400).ip_options(10),
    ] {
        let packet = packet.build();
        let made = made(&packet, false);
        assert_eq!(made.len(), 7);
        verify(&packet, &format(false, false), &made);
    }
}

#[test]
fn udp_frames_become_valid_fragments() {
    for v6 in [false, true] {
        for packet in [
            PacketBuilder::udp(v6, 8000).gso(1480),
            PacketBuilder::udp(v6, 65_400).gso(1472),
            // No multiple of 8, so it is rounded down.
            PacketBuilder::udp(v6, 65_399).gso(1479),
            PacketBuilder::udp(v6, 65_399).gso(28),
            PacketBuilder::udp(v6, 2952).gso(1480),
            PacketBuilder::udp(v6, 8000).gso(1480).tag(0x8100, 7),
            PacketBuilder::udp(v6, 100).gso(1480),
            PacketBuilder::udp(v6, 0).gso(1480),
        ] {
            let packet = packet.build();
            verify(&packet, &format(false, false), &made(&packet, false));
            verify(&packet, &format(true, false), &made(&packet, true));
        }
    }
    let packet = PacketBuilder::udp(true, 8000).gso(1400).extension(60, 1);
    let packet = packet.extension(0, 2).build();
    verify(&packet, &format(false, false), &made(&packet, false));
    let packet = PacketBuilder::udp(false, 8000)
        .gso(1400)
        .ip_options(3)
        .build();
    verify(&packet, &format(false, false), &made(&packet, false));
}

#[test]
fn partial_checksum_is_completed() {
    for v6 in [false, true] {
        for payload in [0, 1, 2, 31, 1447, 1448] {
            for packet in [
                PacketBuilder::tcp(v6, 12, payload),
                PacketBuilder::udp(v6, payload),
            ] {
                let packet = packet.build();
                let made = made(&packet, false);
                verify(&packet, &format(false, false), &made);
                assert_eq!(made[0].header, VnetHeader::default());
                check(&Frame {
                    header: NetHeader::default(),
                    bytes: made[0].bytes.clone(),
                })
                .unwrap();
            }
        }
    }
}

#[test]
fn emitted_headers_request_nothing_that_was_not_negotiated() {
    let mut packet = PacketBuilder::udp(false, 100).build();
    packet.header = VnetHeader([2, 0, 42, 0, 99, 0, 1, 0, 1, 0, 7, 7]);
    let made = made(&packet, false);
    assert_eq!(made.len(), 1);
    assert_eq!(made[0].header, VnetHeader::default());
    assert_eq!(made[0].bytes, packet.bytes);
}

#[test]
fn partial_checksum_stays_partial_for_a_receiver_that_accepts_it() {
    for v6 in [false, true] {
        let packet = PacketBuilder::tcp(v6, 0, 5000).gso(1460).build();
        let segments = made(&packet, true);
        assert_eq!(segments.len(), 4);
        for segment in segments {
            check(&Frame {
                header: NetHeader::from_bytes(segment.header.0),
                bytes: segment.bytes,
            })
            .unwrap();
        }
        // A flag without a meaning does not prevent the offload.
        let mut packet = PacketBuilder::udp(v6, 500).build();
        packet.header.0[0] |= 0x40;
        let whole = made(&packet, true);
        assert_eq!(whole[0].bytes, packet.bytes);
        assert_eq!(whole[0].header.flags(), 1);
    }
}

#[test]
fn result_does_not_depend_on_the_segments_in_memory() {
    let packet = PacketBuilder::tcp(false, 12, 20_000).gso(1448).build();
    let mut segmenter = Segmenter::new();
    let expected = made(&packet, false);
    for cut in [1, 7, 54, 4096] {
        let made = convert(&mut segmenter, &packet, cut, &format(false, false)).unwrap();
        assert!(made == expected, "{cut}");
    }
}

/// Replaces bytes of a packet from an offset on.
fn with(mut packet: Packet, at: usize, bytes: &[u8]) -> Packet {
    packet.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    packet
}

fn with_header(mut packet: Packet, at: usize, bytes: &[u8]) -> Packet {
    packet.header.0[at..at + bytes.len()].copy_from_slice(bytes);
    packet
}

fn cut_to(mut packet: Packet, len: usize) -> Packet {
    packet.bytes.truncate(len);
    packet
}

#[test]
fn request_that_contradicts_the_content_is_refused() {
    use OffloadFault as F;
    let tcp4 = || PacketBuilder::tcp(false, 12, 5000).gso(1448).build();
    let tcp6 = || PacketBuilder::tcp(true, 12, 5000).gso(1448).build();
    let udp4 = || PacketBuilder::udp(false, 5000).gso(1480).build();
    let udp6 = || PacketBuilder::udp(true, 5000).gso(1480).build();
    let long_extensions = |packet: PacketBuilder| packet.extension(60, 20).extension(0, 20).build();
    for (packet, expected) in [
        // gso_type.
        (with_header(tcp4(), 1, &[2]), F::GsoUnknown),
        (with_header(tcp4(), 1, &[0x80]), F::GsoUnknown),
        (with_header(udp4(), 1, &[0x83]), F::GsoUnknown),
        (with_header(tcp4(), 1, &[4]), F::WrongProtocol),
        (with_header(tcp6(), 1, &[1]), F::WrongProtocol),
        (with_header(tcp4(), 1, &[3]), F::WrongProtocol),
        (with_header(udp6(), 1, &[4]), F::WrongProtocol),
        (with_header(tcp4(), 0, &[0]), F::GsoWithoutCsum),
        // gso_size.
        (with_header(tcp4(), 4, &[0, 0]), F::GsoSizeTooSmall),
        (with_header(tcp4(), 4, &[27, 0]), F::GsoSizeTooSmall),
        (with_header(udp6(), 4, &[27, 0]), F::GsoSizeTooSmall),
        // The checksum's position.
        (with_header(tcp4(), 6, &[35, 0]), F::CsumMismatch),
        (with_header(tcp6(), 8, &[6, 0]), F::CsumMismatch),
        (with_header(udp4(), 8, &[16, 0]), F::CsumMismatch),
        (with_header(tcp4(), 6, &[0xff, 0xff]), F::CsumOutOfPacket),
        (with_header(tcp4(), 8, &[0xff, 0xff]), F::CsumOutOfPacket),
        (with_header(tcp4(), 6, &[13, 0]), F::CsumOutOfPacket),
        // The content.
        (with(tcp4(), 12, &[8, 6]), F::WrongProtocol),
        (with(tcp4(), 14, &[0x65]), F::WrongProtocol),
        (with(tcp6(), 14, &[0x45]), F::WrongProtocol),
        (with(tcp4(), 23, &[17]), F::WrongProtocol),
        (with(tcp6(), 20, &[50]), F::WrongProtocol),
        (with(tcp4(), 14, &[0x44]), F::HeaderTruncated),
        (with(tcp4(), 46, &[0x40]), F::HeaderTruncated),
        (with(tcp4(), 20, &[0x20, 0]), F::AlreadyFragmented),
        (with(udp4(), 20, &[0, 1]), F::AlreadyFragmented),
        (with(tcp6(), 20, &[44]), F::AlreadyFragmented),
        (
            with(tcp4(), 12, &[0x81, 0, 0, 0, 0x81, 0, 0, 0, 0x81, 0]),
            F::WrongProtocol,
        ),
        // The frame ends within its headers.
        (cut_to(tcp4(), 13), F::FrameTooShort),
        (cut_to(tcp4(), 14), F::CsumOutOfPacket),
        (cut_to(tcp4(), 60), F::HeaderTruncated),
        (
            cut_to(with_header(udp4(), 6, &[14, 0]), 30),
            F::HeaderTruncated,
        ),
        (
            cut_to(with_header(udp6(), 6, &[14, 0]), 50),
            F::HeaderTruncated,
        ),
        (
            cut_to(with(with_header(tcp4(), 6, &[14, 0]), 12, &[0x81, 0]), 32),
            F::WrongProtocol,
        ),
        // Too long.
        (
            long_extensions(PacketBuilder::tcp(true, 0, 5000).gso(1400)),
            F::HeadersTooLong,
        ),
        (
            long_extensions(PacketBuilder::udp(true, 5000).gso(1400)),
            F::HeadersTooLong,
        ),
        (
            with(with(tcp6(), 20, &[0]), 54, &[0, 255]),
            F::HeadersTooLong,
        ),
    ] {
        assert_eq!(fault(&packet), expected, "{:?}", packet.header);
    }
    let stats = VringStats::default();
    OffloadFault::HeaderTruncated.count(&stats);
    assert_eq!(stats.offload_invalid.get(), 1);
}

#[test]
fn frame_beyond_the_lengths_of_ip_is_refused() {
    let longer = |builder: PacketBuilder, len: usize, size: u16| {
        let mut packet = builder.gso(size).build();
        packet.bytes.resize(len, 7);
        packet
    };
    // Without a tag, the longest frame is too long for one IP packet; its segments are not.
    let packet = longer(PacketBuilder::tcp(false, 0, 100), MAX_FRAME, 1460);
    assert_eq!(made(&packet, true).len(), 45);
    for builder in [
        PacketBuilder::tcp(false, 0, 100),
        PacketBuilder::udp(false, 100),
    ] {
        let packet = longer(builder, MAX_FRAME, 65_535);
        assert_eq!(fault(&packet), OffloadFault::FrameTooLong);
    }
    let packet = longer(PacketBuilder::tcp(false, 0, 100), MAX_FRAME + 1, 1460);
    assert_eq!(fault(&packet), OffloadFault::FrameTooLong);
}

#[test]
fn number_of_frames_made_of_one_is_bounded() {
    let size = u16::try_from(MIN_GSO_SIZE).unwrap();
    for packet in [
        PacketBuilder::tcp(false, 0, 65_400).gso(size).build(),
        PacketBuilder::udp(true, 65_400).gso(size).build(),
    ] {
        assert!(made(&packet, false).len() <= 1 + MAX_FRAME / 24);
    }
}

/// Any packet that a correct guest may transmit.
fn any_packet() -> impl Strategy<Value = Packet> {
    let shape = (any::<bool>(), any::<bool>(), 0..=10usize, 0..65_000usize);
    let rest = (
        28..=u16::MAX,
        0..=2usize,
        any::<u8>(),
        0..=3u8,
        any::<bool>(),
    );
    (shape, rest).prop_map(|((udp, v6, options, payload), rest)| {
        let (size, tags, flags, before, gso) = rest;
        let payload = payload.min(64_000);
        let mut builder = match udp {
            true => PacketBuilder::udp(v6, payload),
            false => PacketBuilder::tcp(v6, options * 4, payload),
        };
        if gso {
            // Small sizes are the most frequent.
            builder = builder.gso(28 + size % (1 << (size % 16)));
        }
        if !udp {
            builder = builder.flags(flags);
        }
        for _ in 0..tags {
            builder = builder.tag(0x8100, 5);
        }
        builder = match v6 {
            true if before > 0 => builder.extension(60, before),
            true => builder,
            false => builder.ip_options(before),
        };
        builder.build()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn reassembled_frames_are_the_original(
        packet in any_packet(),
        csum: bool,
        cut in 1..3000usize,
    ) {
        let format = format(csum, false);
        let made = convert(&mut Segmenter::new(), &packet, cut, &format).unwrap();
        verify(&packet, &format, &made);
    }

    #[test]
    fn damaged_request_is_refused_or_converted(
        packet in any_packet(),
        csum: bool,
        header in prop::collection::vec((0..12usize, any::<u8>()), 0..3),
        bytes in prop::collection::vec((0..120usize, any::<u8>()), 0..4),
        len in 14..3000usize,
    ) {
        let mut packet = packet;
        packet.bytes.truncate(len);
        for (at, value) in header {
            packet.header.0[at] = value;
        }
        for (at, value) in bytes {
            if let Some(byte) = packet.bytes.get_mut(at) {
                *byte = value;
            }
        }
        let format = format(csum, false);
        if let Ok(made) = convert(&mut Segmenter::new(), &packet, 100, &format) {
            prop_assert!(made.len() <= 1 + len / 24);
            verify(&packet, &format, &made);
        }
    }
}
