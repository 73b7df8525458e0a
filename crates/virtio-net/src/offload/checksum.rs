//! The Internet checksum (RFC 1071).

use super::CsumField;
use super::headers::write_be16;
use crate::packet::read_be16;

/// A one's complement sum that is not folded yet. It is kept in the machine's byte order, of which
/// the sum is independent; `fold` converts it (RFC 1071 §2 B).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// The sum of `bytes` as 16-bit words; the last one is padded with a zero.
    pub(super) fn of(bytes: &[u8]) -> Self {
        // Words of 32 bits in lanes of 64 cannot overflow below 16 GiB, and the compiler makes
        // vector instructions of them.
        let mut lanes = [0u64; 8];
        let (blocks, rest) = bytes.as_chunks::<32>();
        for block in blocks {
            let (words, _) = block.as_chunks::<4>();
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let mut sum = lanes.iter().sum::<u64>();
        let (words, rest) = rest.as_chunks::<2>();
        for word in words {
            sum += u64::from(u16::from_ne_bytes(*word));
        }
        if let [last] = rest {
            sum += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        Self(sum)
    }

    /// Adds one word, which is given as a number.
    pub(super) fn add_word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word.to_be()))
    }

    /// The 16-bit sum, not complemented, as in a partial checksum.
    pub(super) fn fold(self) -> u16 {
        let mut sum = self.0;
        while let Some(carry) = Some(sum >> 16).filter(|carry| *carry != 0) {
            sum = (sum & 0xffff) + carry;
        }
        u16::from_be(u16::try_from(sum).unwrap_or(u16::MAX))
    }

    /// The checksum: the complement of the sum.
    pub(super) fn checksum(self) -> u16 {
        !self.fold()
    }
}

/// The pseudo header's sum with the length `new` in the place of `old`. Lengths count modulo 2^16
/// as in the kernel, which a packet's length never reaches.
pub(super) fn replace_length(pseudo_sum: u16, old: u16, new: u16) -> u16 {
    Sum::default()
        .add_word(pseudo_sum)
        .add_word(!old)
        .add_word(new)
        .fold()
}

/// Completes the checksum at `field`, which holds the pseudo header's sum.
pub(super) fn write_checksum(packet: &mut [u8], field: CsumField) {
    let covered = packet.get(field.start..).unwrap_or_default();
    let sum = Sum::of(covered);
    // A field at an odd offset is summed with its bytes swapped, as in the kernel.
    let checksum = match sum.checksum() {
        // In UDP a 0 means that there is no checksum (RFC 768); elsewhere both values are equal.
        0 => 0xffff,
        checksum => checksum,
    };
    write_be16(packet, field.position(), checksum);
}

/// Writes the checksum of the IPv4 header in `header`.
pub(super) fn write_ipv4_checksum(header: &mut [u8]) {
    write_be16(header, IPV4_CHECKSUM_OFFSET, 0);
    let checksum = Sum::of(header).checksum();
    write_be16(header, IPV4_CHECKSUM_OFFSET, checksum);
}

/// Writes the checksum at `at` of the transport segment in `segment`: the complete one, or
/// `pseudo_sum` alone for a receiver that accepts partial checksums.
pub(super) fn write_segment_checksum(
    segment: &mut [u8],
    at: usize,
    pseudo_sum: u16,
    partial: bool,
) {
    write_be16(segment, at, pseudo_sum);
    if !partial {
        let checksum = Sum::of(segment).checksum();
        write_be16(segment, at, checksum);
    }
}

/// The present value of a checksum field.
pub(super) fn read_pseudo_sum(packet: &[u8], field: CsumField) -> u16 {
    read_be16(packet, field.position()).unwrap_or(0)
}

const IPV4_CHECKSUM_OFFSET: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference_sum(bytes: &[u8]) -> u16 {
        bytes.chunks(2).fold(0u16, |sum, pair| {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            let (sum, carry) = sum.overflowing_add(word);
            sum + u16::from(carry)
        })
    }

    #[test]
    fn sum_is_that_of_the_example_in_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::of(&bytes).fold(), 0xddf2);
        assert_eq!(Sum::of(&bytes).checksum(), 0x220d);
    }

    #[test]
    fn checksum_of_zero_is_written_as_all_ones() {
        let mut packet = [0; 24];
        packet[14..16].copy_from_slice(&[0xff, 0xff]);
        let field = CsumField {
            start: 14,
            offset: 6,
        };
        write_checksum(&mut packet, field);
        assert_eq!(packet[20..22], [0xff, 0xff]);
    }

    proptest! {
        #[test]
        fn any_bytes_have_the_sum_of_the_reference(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(Sum::of(&bytes).fold(), reference_sum(&bytes));
        }

        #[test]
        fn adding_a_word_equals_prepending_its_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40), word: u16) {
            let longer = [&word.to_be_bytes()[..], &bytes].concat();
            prop_assert_eq!(Sum::of(&bytes).add_word(word).fold(), reference_sum(&longer));
        }

        #[test]
        fn replacing_the_length_equals_summing_again(bytes in prop::collection::vec(1u8.., 8), old: u16, new: u16) {
            let with = |length: u16| Sum::of(&bytes).add_word(length).fold();
            prop_assert_eq!(replace_length(with(old), old, new) % 0xffff, with(new) % 0xffff);
        }
    }
}
