//! Packets that request offloads, and an independent check of the frames that are made of them. The
//! tests of this crate, those against the kernel, and the fuzzer use it.
#![allow(dead_code, reason = "each user takes its own part of this")]
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use virtionet_guest::frame::{Checksum, FrameSpec, Transport};
use virtionet_guest::header::{
    NetHeader, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_UDP,
};
use virtionet_virtio_net::header::{FrameFormat, VnetHeader};
use virtionet_virtio_net::offload::{OffloadFault, Segmenter, can_pass_unmodified};
use virtionet_virtio_net::uplink::{MAX_BURST, TxFrame};
use virtionet_virtqueue::memory::GuestSlice;

pub const FIN: u8 = 0x01;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;

/// A frame with its virtio-net header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub header: VnetHeader,
    pub bytes: Vec<u8>,
}

/// Builds a packet as a correct guest transmits it.
#[derive(Debug, Clone)]
pub struct PacketBuilder {
    header: NetHeader,
    bytes: Vec<u8>,
    /// The number of bytes of VLAN tags and IP headers so far.
    network: usize,
    transport: usize,
    v6: bool,
}

impl PacketBuilder {
    /// A TCP packet with this many bytes of options (a multiple of 4) and a partial checksum.
    pub fn tcp(v6: bool, options: usize, payload: usize) -> Self {
        let mut builder = Self::new(Transport::Tcp, v6, options + payload);
        let words = u8::try_from(5 + options / 4).unwrap();
        let at = builder.transport;
        builder.bytes[at + 12] = words << 4;
        // The options are no-operations, which the kernel does not read.
        builder.bytes[at + 20..at + 20 + options].fill(1);
        builder
    }

    /// A UDP packet with a partial checksum.
    pub fn udp(v6: bool, payload: usize) -> Self {
        Self::new(Transport::Udp, v6, payload)
    }

    fn new(transport: Transport, v6: bool, payload: usize) -> Self {
        let spec = FrameSpec {
            sequence: 0xffff_fff0,
            checksum: Checksum::Partial,
            ..match v6 {
                false => FrameSpec::v4(transport),
                true => FrameSpec::v6(transport),
            }
        };
        let pattern = (0_u8..251).cycle().take(payload).collect::<Vec<u8>>();
        let frame = spec.build(&pattern).unwrap();
        Self {
            transport: frame.header.csum_start.into(),
            header: frame.header,
            bytes: frame.bytes,
            network: 14,
            v6,
        }
    }

    /// Requests segments of this size.
    pub fn gso(mut self, size: u16) -> Self {
        self.header.gso_size = size;
        let udp = self.header.csum_offset == 6;
        self.header.gso_type = match (udp, self.v6) {
            (true, _) => VIRTIO_NET_HDR_GSO_UDP,
            (_, v6) => VIRTIO_NET_HDR_GSO_TCPV4 + u8::from(v6) * 3,
        };
        self
    }

    /// Sets TCP's flags; with CWR it is a GSO packet with ECN.
    pub fn flags(mut self, flags: u8) -> Self {
        self.bytes[self.transport + 13] = flags;
        if flags & CWR != 0 && self.header.gso_type != VIRTIO_NET_HDR_GSO_NONE {
            self.header.gso_type |= VIRTIO_NET_HDR_GSO_ECN;
        }
        self
    }

    /// Adds a VLAN tag in front of the others.
    pub fn tag(mut self, ethertype: u16, tag: u16) -> Self {
        let [a, b] = ethertype.to_be_bytes();
        let [c, d] = tag.to_be_bytes();
        self.insert(12, &[a, b, c, d]);
        self.network += 4;
        self
    }

    /// Adds an IPv6 extension header of this kind before the others, with `units` times 8 bytes of
    /// padding.
    pub fn extension(mut self, kind: u8, units: u8) -> Self {
        let next = self.bytes[self.network + 6];
        let mut header = vec![0; usize::from(units) * 8];
        header[..4].copy_from_slice(&[next, units - 1, 1, units * 8 - 4]);
        if kind == 43 {
            // Routing type 0 with no segments left.
            header[2..4].fill(0);
        }
        self.insert(self.network + 40, &header);
        self.bytes[self.network + 6] = kind;
        self.lengthen(4, header.len());
        self
    }

    /// Adds this many words of options to the IPv4 header.
    pub fn ip_options(mut self, words: u8) -> Self {
        let options = vec![1; usize::from(words) * 4];
        self.insert(self.network + 20, &options);
        self.bytes[self.network] += words;
        self.lengthen(2, options.len());
        self.sum_ipv4();
        self
    }

    /// Clears DF.
    pub fn may_fragment(mut self) -> Self {
        self.bytes[self.network + 6] &= 0xbf;
        self.sum_ipv4();
        self
    }

    pub fn build(mut self) -> Packet {
        let transport = match self.header.csum_offset {
            6 => 8,
            _ => u16::from(self.bytes[self.transport + 12] >> 4) * 4,
        };
        self.header.hdr_len = self.header.csum_start + transport;
        Packet {
            header: VnetHeader(self.header.to_bytes()),
            bytes: self.bytes,
        }
    }

    fn insert(&mut self, at: usize, bytes: &[u8]) {
        self.bytes.splice(at..at, bytes.iter().copied());
        self.transport += bytes.len();
        self.header.csum_start += u16::try_from(bytes.len()).unwrap();
    }

    fn lengthen(&mut self, field: usize, by: usize) {
        let at = self.network + field;
        let len = word(&self.bytes, at) + u16::try_from(by).unwrap();
        self.bytes[at..at + 2].copy_from_slice(&len.to_be_bytes());
    }

    fn sum_ipv4(&mut self) {
        let header = &mut self.bytes[self.network..self.transport];
        header[10..12].fill(0);
        let sum = !slow_sum(header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// The format of a receiver that accepts everything, nothing, or checksums alone.
pub fn format(csum: bool, rest: bool) -> FrameFormat {
    FrameFormat {
        header_len: 12,
        csum,
        tso4: rest,
        tso6: rest,
        ecn: rest,
        ufo: rest,
    }
}

/// Converts a packet in segments of `cut` bytes of memory.
pub fn convert(
    segmenter: &mut Segmenter,
    packet: &Packet,
    cut: usize,
    format: &FrameFormat,
) -> Result<Vec<Packet>, OffloadFault> {
    let mut memory = packet.bytes.clone();
    let payload: Vec<GuestSlice<'_>> = memory
        .chunks_mut(cut)
        .map(GuestSlice::from_private)
        .collect();
    let frame = TxFrame {
        header: packet.header,
        payload: &payload,
        len: packet.bytes.len(),
    };
    let mut made = Vec::new();
    segmenter.convert(&frame, format, |burst| {
        assert!((1..=MAX_BURST).contains(&burst.len()));
        made.extend(burst.iter().map(copy_packet));
    })?;
    Ok(made)
}

fn copy_packet(frame: &TxFrame<'_>) -> Packet {
    let mut bytes = vec![0; frame.len];
    let mut at = 0;
    for slice in frame.payload {
        assert!(slice.len() <= frame.len - at);
        at += slice.copy_to(&mut bytes[at..]);
    }
    assert_eq!(at, frame.len);
    Packet {
        header: frame.header,
        bytes,
    }
}

/// Checks byte by byte that `made` are the frames of `sent` for a receiver of `format`.
pub fn verify(sent: &Packet, format: &FrameFormat, made: &[Packet]) {
    for packet in made {
        assert!(can_pass_unmodified(&packet.header, format));
        let header = NetHeader::from_bytes(packet.header.0);
        assert_eq!(
            (header.gso_type, header.gso_size),
            (VIRTIO_NET_HDR_GSO_NONE, 0)
        );
    }
    match sent.header.gso_type() & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => verify_one(sent, made),
        VIRTIO_NET_HDR_GSO_UDP => verify_fragments(sent, made),
        _ => verify_segments(sent, made),
    }
}

/// Checks that only the checksum differs.
fn verify_one(sent: &Packet, made: &[Packet]) {
    let [made] = made else {
        panic!("{} frames of one", made.len());
    };
    if sent.header.flags() & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0
        || made.header.flags() & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
    {
        assert_eq!(sent.bytes, made.bytes);
        return;
    }
    let start = usize::from(sent.header.csum_start());
    let at = start + usize::from(sent.header.csum_offset());
    let mut blank = made.bytes.clone();
    blank[at..at + 2].copy_from_slice(&sent.bytes[at..at + 2]);
    assert_eq!(blank, sent.bytes);
    // At an odd offset the field is summed with its bytes swapped, so the checksum is wrong.
    if sent.header.csum_offset().is_multiple_of(2) {
        assert_sum(&made.bytes[start..], word(&sent.bytes, at));
    }
    assert_ne!(word(&made.bytes, at), 0);
}

fn verify_segments(sent: &Packet, made: &[Packet]) {
    let size = usize::from(sent.header.gso_size());
    let original = ParsedPacket::new(&sent.bytes);
    let payload = &sent.bytes[original.payload..];
    assert_eq!(made.len(), payload.len().div_ceil(size).max(1));
    let mut stream = Vec::new();
    for (n, packet) in made.iter().enumerate() {
        let segment = ParsedPacket::new(&packet.bytes);
        segment.check_packet(&packet.bytes);
        let part = &packet.bytes[segment.payload..];
        assert!(part.len() == size || n + 1 == made.len() && part.len() <= size);
        original.check_segment_headers(sent, packet, n, n + 1 == made.len());
        original.check_transport_sum(sent, packet, &segment);
        stream.extend_from_slice(part);
    }
    assert!(stream == payload);
}

fn verify_fragments(sent: &Packet, made: &[Packet]) {
    let size = usize::from(sent.header.gso_size()) / 8 * 8;
    let original = ParsedPacket::new(&sent.bytes);
    let whole = &sent.bytes[original.transport..];
    assert_eq!(made.len(), whole.len().div_ceil(size));
    let mut datagram = Vec::new();
    let first = ParsedPacket::new(&made[0].bytes);
    for (n, packet) in made.iter().enumerate() {
        assert_eq!(packet.header, VnetHeader::default());
        let fragment = ParsedPacket::new(&packet.bytes);
        fragment.check_packet(&packet.bytes);
        assert_eq!(fragment.identification, first.identification);
        assert_eq!(fragment.offset, datagram.len());
        assert_eq!(fragment.more, n + 1 < made.len());
        assert_eq!(fragment.protocol, 17);
        original.check_fragment_headers(sent, &packet.bytes, &fragment, made.len() > 1);
        datagram.extend_from_slice(&packet.bytes[fragment.transport..]);
    }
    let seed = word(whole, 6);
    assert_sum(&datagram, seed);
    original.check_pseudo(&sent.bytes, seed, &datagram);
    datagram[6..8].copy_from_slice(&seed.to_be_bytes());
    assert!(datagram == whole);
}

/// The parsed headers of a packet.
struct ParsedPacket {
    v6: bool,
    network: usize,
    transport: usize,
    /// The offset behind the TCP header; with other protocols, the transport header's offset.
    payload: usize,
    protocol: u8,
    identification: u32,
    /// The fragment's offset, 0 in a packet that is not a fragment.
    offset: usize,
    more: bool,
    /// The number of bytes of the fragment header.
    extra: usize,
}

impl ParsedPacket {
    fn new(bytes: &[u8]) -> Self {
        let mut network = 14;
        while matches!(word(bytes, network - 2), 0x8100 | 0x88a8 | 0x9100) {
            network += 4;
        }
        let mut read = match bytes[network] >> 4 {
            4 => Self::v4(bytes, network),
            _ => Self::v6(bytes, network),
        };
        if read.protocol == 6 {
            read.payload = read.transport + usize::from(bytes[read.transport + 12] >> 4) * 4;
        }
        read
    }

    fn v4(bytes: &[u8], network: usize) -> Self {
        let transport = network + usize::from(bytes[network] & 15) * 4;
        let fragment = word(bytes, network + 6);
        Self {
            v6: false,
            network,
            transport,
            payload: transport,
            protocol: bytes[network + 9],
            identification: word(bytes, network + 4).into(),
            offset: usize::from(fragment & 0x1fff) * 8,
            more: fragment & 0x2000 != 0,
            extra: 0,
        }
    }

    fn v6(bytes: &[u8], network: usize) -> Self {
        let mut read = Self {
            v6: true,
            network,
            transport: network + 40,
            payload: 0,
            protocol: bytes[network + 6],
            identification: 0,
            offset: 0,
            more: false,
            extra: 0,
        };
        while matches!(read.protocol, 0 | 43 | 44 | 60) {
            let at = read.transport;
            let mut len = 8;
            if read.protocol == 44 {
                let place = word(bytes, at + 2);
                read.offset = usize::from(place & 0xfff8);
                read.more = place & 1 != 0;
                read.identification =
                    u32::from(word(bytes, at + 4)) << 16 | u32::from(word(bytes, at + 6));
                read.extra = 8;
            } else {
                len += usize::from(bytes[at + 1]) * 8;
            }
            read.protocol = bytes[at];
            read.transport += len;
        }
        read.payload = read.transport;
        read
    }

    /// Checks the length and the header's checksum of a packet that was made.
    fn check_packet(&self, bytes: &[u8]) {
        let len = bytes.len() - self.network;
        let stated_len = match self.v6 {
            false => usize::from(word(bytes, self.network + 2)),
            true => usize::from(word(bytes, self.network + 4)) + 40,
        };
        assert_eq!(stated_len, len);
        if !self.v6 {
            assert_sum(&bytes[self.network..self.transport], 0);
        }
    }

    /// Restores the fields that may differ from `sent` in segment `n`, and checks that all others
    /// are equal.
    fn check_segment_headers(&self, sent: &Packet, made: &Packet, n: usize, is_last: bool) {
        let mut headers = made.bytes[..self.payload].to_vec();
        let tcp = self.transport;
        let sequence =
            |bytes: &[u8]| u32::from(word(bytes, tcp + 4)) << 16 | u32::from(word(bytes, tcp + 6));
        let advanced = u32::try_from(n).unwrap() * u32::from(sent.header.gso_size());
        assert_eq!(
            sequence(&headers),
            sequence(&sent.bytes).wrapping_add(advanced)
        );
        let last = if is_last { 0xff } else { !(FIN | PSH) };
        let first = if n == 0 { 0xff } else { !CWR };
        assert_eq!(headers[tcp + 13], sent.bytes[tcp + 13] & last & first);
        let mut put_back = |range: std::ops::Range<usize>| {
            headers[range.clone()].copy_from_slice(&sent.bytes[range]);
        };
        put_back(tcp + 4..tcp + 8);
        put_back(tcp + 13..tcp + 14);
        put_back(tcp + 16..tcp + 18);
        if self.v6 {
            put_back(self.network + 4..self.network + 6);
        } else {
            let before = word(&sent.bytes, self.network + 4);
            let number = u16::try_from(n).unwrap();
            put_back(self.network + 2..self.network + 6);
            put_back(self.network + 10..self.network + 12);
            let id = word(&made.bytes, self.network + 4);
            assert_eq!(id, before.wrapping_add(number));
        }
        assert_eq!(headers, sent.bytes[..self.payload]);
    }

    /// The same for a fragment.
    fn check_fragment_headers(&self, sent: &Packet, made: &[u8], read: &Self, is_cut: bool) {
        assert_eq!(read.transport, self.transport + read.extra);
        let mut headers = [&made[..self.transport]].concat();
        let mut put_back = |range: std::ops::Range<usize>| {
            headers[range.clone()].copy_from_slice(&sent.bytes[range]);
        };
        if self.v6 {
            assert_eq!(read.extra, if is_cut { 8 } else { 0 });
            put_back(self.network + 4..self.network + 6);
            // The header before the fragment header names it.
            let differing: Vec<usize> = (0..self.transport)
                .filter(|at| headers[*at] != sent.bytes[*at])
                .collect();
            assert_eq!(differing.len(), usize::from(is_cut), "{differing:?}");
            for at in differing {
                assert_eq!((headers[at], sent.bytes[at]), (44, 17));
            }
        } else {
            put_back(self.network + 2..self.network + 4);
            put_back(self.network + 6..self.network + 8);
            put_back(self.network + 10..self.network + 12);
            assert_eq!(headers, sent.bytes[..self.transport]);
        }
    }

    /// Checks the TCP checksum: with the pseudo header's sum in `sent`, and with the addresses
    /// where that sum was made of them.
    fn check_transport_sum(&self, sent: &Packet, made: &Packet, segment: &Self) {
        let old = u16::try_from(sent.bytes.len() - self.transport).unwrap();
        let new = u16::try_from(made.bytes.len() - segment.transport).unwrap();
        let seed = word(&sent.bytes, self.transport + 16);
        let tcp = &made.bytes[segment.transport..];
        let exchanged = [seed.to_be_bytes(), (!old).to_be_bytes(), new.to_be_bytes()].concat();
        let field = word(tcp, 16);
        if made.header.flags() & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            assert_eq!(usize::from(made.header.csum_start()), segment.transport);
            assert_eq!(made.header.csum_offset(), 16);
            assert_eq!(field % 0xffff, slow_sum(&exchanged) % 0xffff);
            return;
        }
        assert_sum(tcp, slow_sum(&exchanged));
        self.check_pseudo(&sent.bytes, seed, tcp);
    }

    fn check_pseudo(&self, sent: &[u8], seed: u16, made: &[u8]) {
        let pseudo = |len: usize| {
            let addresses = match self.v6 {
                false => self.network + 12..self.network + 20,
                true => self.network + 8..self.network + 40,
            };
            let len = u16::try_from(len).unwrap().to_be_bytes();
            let tail = [len, [0, self.protocol]].concat();
            slow_sum(&[&sent[addresses], &tail].concat())
        };
        if seed == pseudo(sent.len() - self.transport) {
            assert_sum(made, pseudo(made.len()));
        }
    }
}

/// Checks that `bytes` and one more word have a valid checksum.
fn assert_sum(bytes: &[u8], seed: u16) {
    let sum = u32::from(slow_sum(bytes)) + u32::from(seed);
    assert_eq!(sum % 0xffff, 0);
}

/// The one's complement sum as RFC 1071 defines it.
fn slow_sum(bytes: &[u8]) -> u16 {
    bytes.chunks(2).fold(0, |sum: u16, pair| {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
