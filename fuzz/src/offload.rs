//! A header, a frame and a target, all of fuzzer's bytes: what is made of the frame where it does
//! not fit.
//!
//! What must hold: no panic; whatever comes out fits the target and is bounded; and it is what went
//! in, byte by byte, once it is put together again, with lengths and checksums that are right.
//!
//! Input: what the target takes (1 byte), the length of the frame's pieces (2 bytes), the header (12
//! bytes), how many bytes to append to the frame (2 bytes), and the frame.

use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::{FrameFormat, VNET_HEADER_LEN, MIN_FRAME, VnetHeader};
use virtionet_virtio_net::offload::{Segmenter, can_pass_unmodified};

use crate::input::Input;
use crate::packets::{self, Packet};

/// One input from start to end.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let format = format(input.u8());
    let cut = usize::from(input.u16()).max(1);
    let header = VnetHeader(input.array::<VNET_HEADER_LEN>());
    let more = usize::from(input.u16());
    let mut bytes = input.0.to_vec();
    bytes.extend((0_u8..251).cycle().take(more));
    let checked = header.check(bytes.len(), Features::offered());
    let packet = Packet { header, bytes };
    let len = packet.bytes.len();
    if can_pass_unmodified(&header, &format) {
        // Nobody would ask then; but what fits a target is what its driver may be sent.
        assert!(format.csum || header.flags() == 0);
    }
    let mut segmenter = Segmenter::new();
    let Ok(made) = packets::convert(&mut segmenter, &packet, cut, &format) else {
        return;
    };
    assert!(len >= MIN_FRAME && made.len() <= 1 + len / 24);
    packets::verify(&packet, &format, &made);
    // The device's own check of a header is no stricter than the segmenter's, but for a hint.
    if usize::from(header.hdr_len()) <= len {
        assert_eq!(checked, Ok(()));
    }
}

/// Bits: csum, tso4, tso6, ecn, ufo.
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
