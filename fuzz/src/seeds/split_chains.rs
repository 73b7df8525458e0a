//! Seeds for `split_chains`.

use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::Seeds;
use super::script::{
    ANYWHERE, AT_REGION_BOUNDARY, IN_DATA, IN_RING, IN_TABLE, MODERN, RX, Script, VERSION_1,
};
use crate::split_chains::Op;

/// The heads of all 16 descriptors.
const ALL_HEADS: [u16; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// The seeds.
pub fn split_chains() -> Seeds {
    vec![
        ("frames", frames().0),
        ("indirect_tables", indirect_tables().0),
        ("bad_chains", bad_chains().0),
        ("merged_buffers", merged_buffers().0),
        ("unmerged_buffers", unmerged_buffers().0),
        ("legacy_buffers", legacy_buffers().0),
        ("bad_buffers", bad_buffers().0),
        ("bad_index", bad_index().0),
        ("pushed", pushed().0),
        ("long_chains", long_chains().0),
        ("segments", with_header([1, 1, 54, 0, 168, 5, 34, 0]).0),
        (
            "segments_of_no_size",
            with_header([1, 1, 54, 0, 0, 0, 34, 0]).0,
        ),
        (
            "segments_ecn",
            with_header([1, 0x81, 54, 0, 168, 5, 34, 0]).0,
        ),
    ]
}

/// A guest that sends, with 16 descriptors.
fn tx() -> Script {
    Script::new(MODERN, 4)
}

/// A guest that receives, with 16 buffers.
fn rx(options: u8) -> Script {
    (0..16).fold(Script::new(options | RX, 4), |s, n: u8| {
        s.ring(
            n,
            (IN_DATA, u16::from(n) * 0x800),
            1526,
            VRING_DESC_F_WRITE,
            0,
        )
    })
}

/// Valid frames of one and of two buffers, with event suppression.
fn frames() -> Script {
    tx().ring(0, (IN_DATA, 0), 72, 0, 0)
        .ring(1, (IN_DATA, 0), 12, VRING_DESC_F_NEXT, 2)
        .ring(2, (IN_DATA, 64), 1500, 0, 0)
        .offer(&[0, 1, 0])
        .turn()
        .op(Op::Kicks, &[1])
        .op(Op::UsedEvent, &[0xf4, 0xff])
        .offer(&[1])
        .turn()
        .op(Op::Kicks, &[0])
}

/// Valid and invalid indirect tables.
fn indirect_tables() -> Script {
    tx().table(0, (IN_DATA, 0), 12, VRING_DESC_F_NEXT, 1)
        .table(1, (IN_DATA, 12), 60, 0, 0)
        .ring(0, (IN_TABLE, 0), 32, VRING_DESC_F_INDIRECT, 0)
        .ring(1, (IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 0)
        .ring(
            2,
            (IN_TABLE, 0),
            32,
            VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT,
            0,
        )
        .ring(3, (IN_TABLE, 0), 17, VRING_DESC_F_INDIRECT, 0)
        .table(2, (IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 0)
        .ring(4, (IN_TABLE, 32), 16, VRING_DESC_F_INDIRECT, 0)
        .offer(&[0, 1, 2, 3, 4])
        .turn()
}

/// One chain for each fault.
fn bad_chains() -> Script {
    tx().ring(0, (IN_DATA, 0), 72, VRING_DESC_F_NEXT, 0)
        .ring(1, (IN_DATA, 0), 72, VRING_DESC_F_NEXT, 0xff)
        .ring(2, (ANYWHERE, 0), 72, 0, 0)
        .ring(3, (AT_REGION_BOUNDARY, 0x7fe0), 72, 0, 0)
        .ring(4, (IN_DATA, 0), 72, VRING_DESC_F_WRITE, 0)
        .ring(5, (IN_DATA, 0), 0xffff, 0, 0)
        .ring(6, (IN_DATA, 0), 5, 0, 0)
        .ring(7, (IN_RING, 0), 256, 0, 0)
        .offer(&[0, 1, 2, 3, 4, 5, 6, 7])
        .turn()
        .offer(&[99])
        .turn()
}

/// Received frames in mergeable buffers.
fn merged_buffers() -> Script {
    rx(MODERN)
        .offer(&ALL_HEADS)
        .feed(60)
        .feed(9000)
        .turn()
        .op(Op::Rewind, &[])
        .offer(&ALL_HEADS[..7])
        .feed(20_000)
        .turn()
        .op(Op::Rebind, &[])
        .feed(1514)
        .turn()
}

/// Received frames without mergeable buffers.
fn unmerged_buffers() -> Script {
    rx(VERSION_1)
        .offer(&ALL_HEADS)
        .feed(60)
        .feed(9000)
        .feed(1514)
        .turn()
}

/// Received frames of a legacy driver.
fn legacy_buffers() -> Script {
    rx(0).offer(&ALL_HEADS[..3]).feed(60).feed(61).turn()
}

/// Invalid RX buffers among valid ones.
fn bad_buffers() -> Script {
    rx(MODERN)
        .ring(0, (IN_DATA, 0), 11, VRING_DESC_F_WRITE, 0)
        .ring(1, (IN_DATA, 0), 100, 0, 0)
        .ring(
            2,
            (IN_DATA, 0),
            12,
            VRING_DESC_F_WRITE | VRING_DESC_F_NEXT,
            2,
        )
        .ring(3, (IN_RING, 0), 100, VRING_DESC_F_WRITE, 0)
        .feed(3000)
        .offer(&[0, 4, 1, 5, 2, 6, 3, 7, 77])
        .turn()
        .turn()
}

/// Frames that are pushed to the queue.
fn pushed() -> Script {
    rx(MODERN)
        .offer(&ALL_HEADS)
        .push(Op::Push, 3, 60)
        .push(Op::Push, 2, 4000)
        .feed(1514)
        .turn()
        .push(Op::Push, 64, 1514)
        .op(Op::Rewind, &[])
}

/// An available index that is too far ahead.
fn bad_index() -> Script {
    tx().op(Op::AvailIndex, &[9, 9]).turn()
}

/// Indirect tables of 2,047 and 2,046 entries that loop: one through a buffer of 1 byte, and one
/// through a buffer of 6 MiB.
fn long_chains() -> Script {
    tx().table(0, (IN_DATA, 0), 1, VRING_DESC_F_NEXT, 0)
        .table(
            1,
            (AT_REGION_BOUNDARY, 0x8000),
            0x8030,
            VRING_DESC_F_NEXT,
            0,
        )
        .ring(0, (IN_TABLE, 0), 0x7ff0, VRING_DESC_F_INDIRECT, 0)
        .ring(1, (IN_TABLE, 16), 0x7fe0, VRING_DESC_F_INDIRECT, 0)
        .offer(&[0, 1])
        .turn()
}

/// A frame with the given first bytes of its virtio-net header.
fn with_header(header: [u8; 8]) -> Script {
    let write_memory = [&[0, 0x80], &header[..]].concat();
    tx().ring(0, (IN_DATA, 0), 72, 0, 0)
        .op(Op::WriteMemory, &write_memory)
        .offer(&[0])
        .turn()
}
