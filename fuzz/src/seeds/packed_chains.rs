//! Seeds for `packed_chains`.

use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::Seeds;
use super::script::{
    ANYWHERE, AT_REGION_BOUNDARY, IN_DATA, IN_RING, IN_TABLE, MODERN, RX, Script, VERSION_1, fields,
};
use crate::packed_chains::Op as Packed;

/// The seeds.
pub fn packed_chains() -> Seeds {
    vec![
        ("frames", frames().0),
        ("laps", (0..12).fold(tx_of_5(), |s, _| with_frame(s)).0),
        ("indirect_tables", indirect_tables().0),
        ("bad_chains", bad_chains().0),
        ("chain_as_long_as_the_ring", longest_chain().0),
        ("no_end", linked(5).packed_turn().0),
        ("too_many", too_many().0),
        ("wrong_wrap_counter", wrong_wrap_counter().0),
        ("rewritten", rewritten().0),
        ("merged_buffers", merged_buffers().0),
        ("unmerged_buffers", unmerged_buffers().0),
        ("pushed", pushed().0),
    ]
}

/// A guest that sends, with 16 descriptors, so that the first lap ends soon.
fn tx() -> Script {
    Script::new(MODERN, 15)
}

/// A guest that sends, with 5 descriptors.
fn tx_of_5() -> Script {
    Script::new(MODERN, 4)
}

/// A guest that receives, with `buffers` buffers.
fn rx(options: u8, size: u8, buffers: u8) -> Script {
    (0..buffers).fold(Script::new(options | RX, size), |s, n| {
        s.put((IN_DATA, u16::from(n) * 0x800), 1526, VRING_DESC_F_WRITE, n)
    })
}

/// Adds a valid frame and a turn.
fn with_frame(script: Script) -> Script {
    script.put((IN_DATA, 0), 72, 0, 1).packed_turn()
}

/// Adds a frame to receive.
fn feed(script: Script, len: u16) -> Script {
    script.op(Packed::Feed, &len.to_le_bytes())
}

/// A chain of `count` descriptors in a ring of 5, without its end.
fn linked(count: u8) -> Script {
    (0..count).fold(tx_of_5(), |s, _| {
        s.put((IN_DATA, 0), 20, VRING_DESC_F_NEXT, 7)
    })
}

/// Valid frames of one and of two buffers, with event suppression.
fn frames() -> Script {
    tx().put((IN_DATA, 0), 72, 0, 3)
        .put((IN_DATA, 0), 12, VRING_DESC_F_NEXT, 9)
        .put((IN_DATA, 64), 1500, 0, 4)
        .packed_turn()
        .op(Packed::Kicks, &[1])
        .op(Packed::Event, &[3, 0x80, 2])
        .put((IN_DATA, 0), 72, 0, 5)
        .packed_turn()
        .op(Packed::Kicks, &[0])
        .op(Packed::Rewind, &[])
}

/// Valid and invalid indirect tables.
fn indirect_tables() -> Script {
    tx().op(
        Packed::Table,
        &[vec![0], fields((IN_DATA, 0), 12, 0, 0)].concat(),
    )
    .op(
        Packed::Table,
        &[vec![1], fields((IN_DATA, 12), 60, 0, 0)].concat(),
    )
    .op(
        Packed::Table,
        &[vec![2], fields((IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 0)].concat(),
    )
    .put((IN_TABLE, 0), 32, VRING_DESC_F_INDIRECT, 1)
    .put((IN_TABLE, 0), 16, VRING_DESC_F_INDIRECT, 2)
    .put((IN_TABLE, 0), 17, VRING_DESC_F_INDIRECT, 3)
    .put((IN_TABLE, 32), 16, VRING_DESC_F_INDIRECT, 4)
    .put(
        (IN_TABLE, 0),
        32,
        VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT,
        5,
    )
    .put((IN_DATA, 0), 60, 0, 5)
    .put(
        (AT_REGION_BOUNDARY, 0x8000),
        0x7ff0,
        VRING_DESC_F_INDIRECT,
        6,
    )
    .packed_turn()
}

/// One chain for each fault.
fn bad_chains() -> Script {
    tx().put((ANYWHERE, 0), 72, 0, 0)
        .put((AT_REGION_BOUNDARY, 0x7fe0), 72, 0, 1)
        .put((IN_DATA, 0), 72, VRING_DESC_F_WRITE, 2)
        .put((IN_DATA, 0), 0xffff, 0, 3)
        .put((IN_DATA, 0), 5, 0, 4)
        .put((IN_RING, 0), 256, 0, 5)
        .packed_turn()
        .packed_turn()
}

/// A valid chain through the whole ring, and a frame behind it.
fn longest_chain() -> Script {
    with_frame(linked(4).put((IN_DATA, 0), 20, 0, 7).packed_turn())
}

/// More descriptors than the ring has.
fn too_many() -> Script {
    let descriptors = (0..9).fold(tx_of_5(), |s, n| s.put((IN_DATA, 0), 20, 0, n));
    descriptors.packed_turn()
}

/// A wrap counter that is inverted too early.
fn wrong_wrap_counter() -> Script {
    with_frame(with_frame(tx_of_5()).op(Packed::Wrap, &[]))
}

/// A descriptor that is written out of order.
fn rewritten() -> Script {
    let operands = [vec![4], fields((IN_DATA, 0), 72, 0x80, 1), vec![0x80]].concat();
    with_frame(tx().op(Packed::Descriptor, &operands))
}

/// Received frames in mergeable buffers.
fn merged_buffers() -> Script {
    let merged = feed(feed(rx(MODERN, 15, 16), 60), 9000)
        .packed_turn()
        .op(Packed::Rewind, &[])
        .op(Packed::Rebind, &[]);
    feed(merged, 20_000).packed_turn()
}

/// Received frames without mergeable buffers.
fn unmerged_buffers() -> Script {
    feed(feed(rx(VERSION_1, 15, 9), 60), 9000).packed_turn()
}

/// Frames that are pushed to the queue.
fn pushed() -> Script {
    rx(MODERN, 6, 7)
        .push(Packed::Push, 2, 60)
        .push(Packed::Push, 1, 4000)
        .push(Packed::Push, 64, 1514)
        .op(Packed::Rewind, &[])
}
