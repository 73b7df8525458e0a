//! The packet headers of a frame, up to the fixed IP header: the one parser of this workspace.
//!
//! It reads a private copy of the frame and trusts none of its fields: a header that extends beyond
//! the bytes is a [`PacketFault`].

/// The EtherType of IPv4.
pub const ETH_P_IP: u16 = 0x0800;
/// The EtherType of IPv6.
pub const ETH_P_IPV6: u16 = 0x86dd;
/// The IP protocol number of TCP.
pub const IPPROTO_TCP: u8 = 6;
/// The IP protocol number of UDP.
pub const IPPROTO_UDP: u8 = 17;
/// The IPv6 extension header with options for every hop.
pub const IPPROTO_HOPOPTS: u8 = 0;
/// The IPv6 extension header for routing.
pub const IPPROTO_ROUTING: u8 = 43;
/// The IPv6 extension header of a fragment.
pub const IPPROTO_FRAGMENT: u8 = 44;
/// The IPv6 extension header with options for the destination.
pub const IPPROTO_DSTOPTS: u8 = 60;
/// The number of bytes of an IPv4 header without options.
pub const MIN_IPV4_HEADER_LEN: usize = 20;
/// The number of bytes of an IPv6 header without extension headers.
pub const IPV6_HEADER_LEN: usize = 40;
/// The most VLAN tags that a frame may have.
pub const MAX_VLAN_TAGS: usize = 2;
/// The number of bytes of a VLAN tag.
pub const VLAN_TAG_LEN: usize = 4;

/// Where the EtherType is in a frame without VLAN tags.
const ETHERTYPE_OFFSET: usize = 12;
/// IEEE 802.1Q, 802.1ad, and the type that was in use for outer tags before 802.1ad.
const VLAN_ETHERTYPES: [u16; 3] = [0x8100, 0x88a8, 0x9100];
/// IPv4's more-fragments bit and fragment offset; don't-fragment is not among them.
const IPV4_FRAGMENT_MASK: u16 = 0x3fff;

/// Why the headers of a frame cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacketFault {
    /// A header extends beyond the bytes, or is shorter than its kind can be.
    Truncated,
    /// The frame does not carry an IP packet.
    NotIp,
}

/// A version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The IP header of a frame, whose fixed part lies within the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpHeader {
    /// IPv4 or IPv6.
    pub version: IpVersion,
    /// Where in the frame the header begins.
    pub offset: usize,
    /// The number of bytes of the header: with the options of IPv4, which may lie beyond the frame,
    /// without the extension headers of IPv6.
    pub len: usize,
    /// The protocol of what follows the header; in IPv6 it may be an extension header.
    pub protocol: u8,
    /// Whether an IPv4 packet is a fragment. An IPv6 fragment has an extension header instead.
    pub is_fragment: bool,
}

impl IpHeader {
    /// Finds the IP header behind the Ethernet header and at most [`MAX_VLAN_TAGS`] tags.
    ///
    /// # Errors
    /// When there is none, or its fixed part is not all there.
    #[inline]
    pub fn parse(frame: &[u8]) -> Result<Self, PacketFault> {
        let (ethertype, offset) = skip_vlan_tags(frame)?;
        match ethertype {
            ETH_P_IP => Self::parse_v4(frame, offset),
            ETH_P_IPV6 => Self::parse_v6(frame, offset),
            _ => Err(PacketFault::NotIp),
        }
    }

    #[inline]
    fn parse_v4(frame: &[u8], offset: usize) -> Result<Self, PacketFault> {
        let first = read_version(frame, offset, 4)?;
        let len = usize::from(first & 0xf) * 4;
        let header: &[u8; MIN_IPV4_HEADER_LEN] = fixed_part(frame, offset)?;
        if len < MIN_IPV4_HEADER_LEN {
            return Err(PacketFault::Truncated);
        }
        Ok(Self {
            version: IpVersion::V4,
            offset,
            len,
            protocol: header[9],
            is_fragment: u16::from_be_bytes([header[6], header[7]]) & IPV4_FRAGMENT_MASK != 0,
        })
    }

    #[inline]
    fn parse_v6(frame: &[u8], offset: usize) -> Result<Self, PacketFault> {
        read_version(frame, offset, 6)?;
        let header: &[u8; IPV6_HEADER_LEN] = fixed_part(frame, offset)?;
        Ok(Self {
            version: IpVersion::V6,
            offset,
            len: IPV6_HEADER_LEN,
            protocol: header[6],
            is_fragment: false,
        })
    }

    /// Where the byte is that holds [`Self::protocol`].
    #[must_use]
    pub fn protocol_offset(&self) -> usize {
        match self.version {
            IpVersion::V4 => self.offset + 9,
            IpVersion::V6 => self.offset + 6,
        }
    }
}

/// The EtherType behind the tags, and where the packet begins.
#[inline]
fn skip_vlan_tags(frame: &[u8]) -> Result<(u16, usize), PacketFault> {
    let mut at = ETHERTYPE_OFFSET;
    let mut ethertype = read_be16(frame, at).ok_or(PacketFault::Truncated)?;
    for _ in 0..MAX_VLAN_TAGS {
        if !VLAN_ETHERTYPES.contains(&ethertype) {
            break;
        }
        at += VLAN_TAG_LEN;
        ethertype = read_be16(frame, at).ok_or(PacketFault::Truncated)?;
    }
    Ok((ethertype, at + 2))
}

/// The first byte of the IP header, which must be of this version.
#[inline]
fn read_version(frame: &[u8], offset: usize, version: u8) -> Result<u8, PacketFault> {
    match frame.get(offset) {
        Some(first) if first >> 4 == version => Ok(*first),
        Some(_) => Err(PacketFault::NotIp),
        None => Err(PacketFault::Truncated),
    }
}

#[inline]
fn fixed_part<const N: usize>(frame: &[u8], offset: usize) -> Result<&[u8; N], PacketFault> {
    let rest = frame.get(offset..).unwrap_or_default();
    rest.first_chunk().ok_or(PacketFault::Truncated)
}

/// The big-endian 16-bit field at `at`; `None` where it is not within `bytes`.
#[inline]
#[must_use]
pub fn read_be16(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with these tags whose IP header has a length of 20 or 40 bytes.
    fn frame(tags: &[u16], ethertype: u16, first: u8) -> Vec<u8> {
        let mut frame = vec![2; ETHERTYPE_OFFSET];
        for tag in tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 5]);
        }
        frame.extend(ethertype.to_be_bytes());
        frame.push(first);
        frame.extend([0; 59]);
        frame
    }

    #[test]
    fn ip_header_is_found_behind_up_to_two_tags_of_each_type() {
        for (count, tags) in [
            (0, &[][..]),
            (1, &[0x8100]),
            (1, &[0x88a8]),
            (1, &[0x9100]),
            (2, &[0x88a8, 0x8100]),
            (2, &[0x9100, 0x8100]),
            (2, &[0x9100, 0x9100]),
        ] {
            let v4 = IpHeader::parse(&frame(tags, ETH_P_IP, 0x46)).unwrap();
            assert_eq!((v4.version, v4.len), (IpVersion::V4, 24));
            let v6 = IpHeader::parse(&frame(tags, ETH_P_IPV6, 0x60)).unwrap();
            assert_eq!((v6.version, v6.len), (IpVersion::V6, 40));
            assert_eq!([v4.offset, v6.offset], [14 + 4 * count; 2]);
        }
        let three = frame(&[0x88a8, 0x8100, 0x8100], ETH_P_IP, 0x45);
        assert_eq!(IpHeader::parse(&three), Err(PacketFault::NotIp));
    }

    #[test]
    fn frame_that_ends_within_its_headers_is_truncated() {
        for (ethertype, first, len) in [(ETH_P_IP, 0x45, 20), (ETH_P_IPV6, 0x60, 40)] {
            let whole = frame(&[0x8100], ethertype, first);
            for end in 0..18 + len {
                let cut = IpHeader::parse(&whole[..end]);
                assert_eq!(cut, Err(PacketFault::Truncated), "{end}");
            }
            IpHeader::parse(&whole[..18 + len]).unwrap();
        }
    }

    #[test]
    fn header_that_contradicts_its_ethertype_is_not_ip() {
        for (ethertype, first) in [(ETH_P_IP, 0x65), (ETH_P_IPV6, 0x45), (0x0806, 0x45)] {
            let parsed = IpHeader::parse(&frame(&[], ethertype, first));
            assert_eq!(parsed, Err(PacketFault::NotIp));
        }
        let short = IpHeader::parse(&frame(&[], ETH_P_IP, 0x44));
        assert_eq!(short, Err(PacketFault::Truncated));
    }

    #[test]
    fn packet_with_only_the_dont_fragment_bit_is_not_a_fragment() {
        for (field, is_fragment) in [(0x4000, false), (0x2000, true), (0x0001, true)] {
            let mut bytes = frame(&[], ETH_P_IP, 0x45);
            bytes[20..22].copy_from_slice(&u16::to_be_bytes(field));
            assert_eq!(IpHeader::parse(&bytes).unwrap().is_fragment, is_fragment);
        }
    }
}
