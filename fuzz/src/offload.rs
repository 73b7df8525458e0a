//! Software offloads: a frame with its header is converted for a receiver that does not accept it
//! unchanged.
//!
//! Invariants: there is no panic; the resulting frames fit the receiver, and their number is
//! bounded; their payloads together are the original one byte for byte, with correct lengths and
//! checksums.
//!
//! Input: the offloads that the receiver accepts (1 byte), the length of the frame's segments (2
//! bytes), the header (12 bytes), how many bytes to append to the frame (2 bytes), and the frame.

use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::{FrameFormat, MIN_FRAME, VNET_HEADER_LEN, VnetHeader};
use virtionet_virtio_net::offload::{Segmenter, can_pass_unmodified};

use crate::input::Input;
use crate::packets::{self, Packet};

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let format = format(input.u8());
    let segment_len = usize::from(input.u16()).max(1);
    let header = VnetHeader(input.array::<VNET_HEADER_LEN>());
    let appended = usize::from(input.u16());
    let mut bytes = input.0.to_vec();
    bytes.extend((0_u8..251).cycle().take(appended));
    let checked = header.check(bytes.len(), Features::offered());
    let packet = Packet { header, bytes };
    let len = packet.bytes.len();
    if can_pass_unmodified(&header, &format) {
        // The device does not convert such a frame. It must be valid for the receiver's driver.
        assert!(format.csum || header.flags() == 0);
    }
    let mut segmenter = Segmenter::new();
    let Ok(converted) = packets::convert(&mut segmenter, &packet, segment_len, &format) else {
        return;
    };
    assert!(len >= MIN_FRAME && converted.len() <= 1 + len / 24);
    packets::verify(&packet, &format, &converted);
    // The device's check of a header is not stricter than the segmenter's, except for `hdr_len`.
    if usize::from(header.hdr_len()) <= len {
        assert_eq!(checked, Ok(()));
    }
}

/// Converts the bits of the offloads that the receiver accepts: csum, tso4, tso6, ecn and ufo.
fn format(bits: u8) -> FrameFormat {
    let csum = bits & 1 != 0;
    let also = |n: u8| csum && bits >> n & 1 != 0;
    FrameFormat {
        header_len: VNET_HEADER_LEN,
        csum,
        tso4: also(1),
        tso6: also(2),
        ecn: also(3),
        ufo: also(4),
    }
}
