//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

use super::transport::Transport;
use crate::memory::to_u64;

/// The sum of the pseudo header of a segment of `segment_len` bytes (RFC 9293 §3.1, RFC 8200 §8.1).
pub(super) fn pseudo_header_sum(
    source: IpAddr,
    target: IpAddr,
    transport: Transport,
    segment_len: usize,
) -> u64 {
    let addresses = match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => sum(&source.octets()) + sum(&target.octets()),
        (IpAddr::V6(source), IpAddr::V6(target)) => sum(&source.octets()) + sum(&target.octets()),
        _ => 0,
    };
    addresses + u64::from(transport.protocol()) + to_u64(segment_len)
}

/// The sum of big-endian 16-bit words. An odd last byte is padded with 0.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u64::from(low)))
        .sum()
}

/// Adds the carries of a sum until it fits 16 bits.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}
