//! Invalid chains, addresses, indirect tables and directions: only that chain is dropped, under its
//! own counter.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{DATA, END, FULL, HOLE, ISLAND, JOINED, PLAIN, SplitRingFixture, TABLE, frame, good};
use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtionet_virtio_net::{TxOutcome, TxQueue};

/// An invalid chain with head 0, and its counter.
struct Row {
    name: &'static str,
    counter: &'static str,
    size: u16,
    features: u64,
    write: fn(&SplitRingFixture),
}

const fn row(name: &'static str, counter: &'static str, write: fn(&SplitRingFixture)) -> Row {
    Row {
        name,
        counter,
        size: 16,
        features: FULL,
        write,
    }
}

const fn large(name: &'static str, counter: &'static str, write: fn(&SplitRingFixture)) -> Row {
    Row {
        size: 2048,
        ..row(name, counter, write)
    }
}

/// Writes a chain of 72 bytes at `DATA` whose last descriptor is at `addr`.
fn ends_at(fixture: &SplitRingFixture, addr: u64, len: u32) {
    fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 1);
    fixture.desc(1, addr, len, 0, 0);
}

/// Writes the descriptors 0 to `n` - 1 as one chain, each of `len` bytes.
fn line(fixture: &SplitRingFixture, n: u16, len: u32) {
    for at in 0..n {
        let flags = if at + 1 < n { VRING_DESC_F_NEXT } else { 0 };
        fixture.desc(at, DATA, len, flags, at + 1);
    }
}

/// Writes an indirect table of `n` such descriptors.
fn table_line(fixture: &SplitRingFixture, n: u16, len: u32) {
    let flags = |at| if at + 1 < n { VRING_DESC_F_NEXT } else { 0 };
    let entries: Vec<_> = (0..n).map(|at| (DATA, len, flags(at), at + 1)).collect();
    fixture.table(&entries);
    fixture.desc(0, TABLE, 16 * u32::from(n), VRING_DESC_F_INDIRECT, 0);
}

/// Writes a table of these entries, to which descriptor 0 refers.
fn refer(fixture: &SplitRingFixture, entries: &[(u64, u32, u16, u16)]) {
    fixture.table(entries);
    let bytes = u32::try_from(16 * entries.len()).unwrap();
    fixture.desc(0, TABLE, bytes, VRING_DESC_F_INDIRECT, 0);
}

const CHAINS: &[Row] = &[
    row("self-loop", "chain_loop", |fixture| {
        fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 0);
    }),
    row("two-node loop", "chain_loop", |fixture| {
        fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 1);
        fixture.desc(1, DATA, 72, VRING_DESC_F_NEXT, 0);
    }),
    row(
        "loop that the head is not part of",
        "chain_loop",
        |fixture| {
            fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 5);
            fixture.desc(5, DATA, 72, VRING_DESC_F_NEXT, 6);
            fixture.desc(6, DATA, 72, VRING_DESC_F_NEXT, 5);
        },
    ),
    row("loop of empty descriptors", "chain_loop", |fixture| {
        fixture.desc(0, DATA, 0, VRING_DESC_F_NEXT, 0);
    }),
    row("NEXT on the last of many", "chain_loop", |fixture| {
        for at in 0..14 {
            fixture.desc(at, DATA, 72, VRING_DESC_F_NEXT, (at + 1) % 14);
        }
    }),
    row("next = size", "chain_next_out_of_range", |fixture| {
        fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 16);
    }),
    row("next = 65535", "chain_next_out_of_range", |fixture| {
        fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, u16::MAX);
    }),
    row(
        "NEXT on the table's last",
        "chain_next_out_of_range",
        |fixture| {
            fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 15);
            fixture.desc(15, DATA, 72, VRING_DESC_F_NEXT, 16);
        },
    ),
    large("1,025 descriptors", "chain_too_long", |fixture| {
        line(fixture, 1025, 72);
    }),
    large("1,025 empty descriptors", "chain_too_long", |fixture| {
        line(fixture, 1025, 0);
    }),
    large("over 4 GiB", "chain_too_big", |fixture| {
        line(fixture, 300, 0xf0_0000 - 0x1000);
    }),
];

const ADDRESSES: &[Row] = &[
    row("address 0, not mapped", "address_invalid", |fixture| {
        ends_at(fixture, 0, 64);
    }),
    row("beyond RAM", "address_invalid", |fixture| {
        ends_at(fixture, END, 1);
    }),
    row("far beyond RAM", "address_invalid", |fixture| {
        ends_at(fixture, 1 << 52, 64);
    }),
    row("last byte beyond RAM", "address_invalid", |fixture| {
        ends_at(fixture, END - 63, 64);
    }),
    row("address + length wraps", "address_invalid", |fixture| {
        ends_at(fixture, u64::MAX - 10, 64);
    }),
    row("address + length is 2^64", "address_invalid", |fixture| {
        ends_at(fixture, u64::MAX - 63, 64);
    }),
    row("length of 4 GiB - 1", "address_invalid", |fixture| {
        fixture.desc(0, DATA, u32::MAX, 0, 0);
    }),
    row("ends in a hole", "address_invalid", |fixture| {
        ends_at(fixture, HOLE - 32, 64);
    }),
    row("begins in a hole", "address_invalid", |fixture| {
        ends_at(fixture, ISLAND - 32, 64);
    }),
    row("reaches over a hole", "address_invalid", |fixture| {
        let bytes = u32::try_from(ISLAND + 64 - HOLE).unwrap();
        ends_at(fixture, HOLE - 32, bytes);
    }),
    row("no bytes at a bad address", "address_invalid", |fixture| {
        ends_at(fixture, 1 << 52, 0);
    }),
    row("bad address first", "address_invalid", |fixture| {
        fixture.desc(0, 1 << 52, 64, VRING_DESC_F_NEXT, 1);
        fixture.desc(1, DATA, 72, 0, 0);
    }),
];

const INDIRECTS: &[Row] = &[
    row("nested", "indirect_nested", |fixture| {
        refer(
            fixture,
            &[
                (DATA, 72, VRING_DESC_F_NEXT, 1),
                (TABLE, 16, VRING_DESC_F_INDIRECT, 0),
            ],
        );
    }),
    row("nested at once", "indirect_nested", |fixture| {
        refer(fixture, &[(TABLE, 16, VRING_DESC_F_INDIRECT, 0)]);
    }),
    row("INDIRECT with NEXT", "indirect_with_next", |fixture| {
        refer(fixture, &[(DATA, 72, 0, 0)]);
        fixture.desc(0, TABLE, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 1);
        fixture.desc(1, DATA, 72, 0, 0);
    }),
    row("table of 0 bytes", "indirect_bad_length", |fixture| {
        fixture.desc(0, TABLE, 0, VRING_DESC_F_INDIRECT, 0);
    }),
    row("table of 15 bytes", "indirect_bad_length", |fixture| {
        fixture.desc(0, TABLE, 15, VRING_DESC_F_INDIRECT, 0);
    }),
    row("table of 17 bytes", "indirect_bad_length", |fixture| {
        fixture.desc(0, TABLE, 17, VRING_DESC_F_INDIRECT, 0);
    }),
    row(
        "table of 65,536 entries",
        "indirect_bad_length",
        |fixture| {
            fixture.desc(0, TABLE, 16 * 65_536, VRING_DESC_F_INDIRECT, 0);
        },
    ),
    row("table of 4 GiB", "indirect_bad_length", |fixture| {
        fixture.desc(0, TABLE, 0xffff_fff0, VRING_DESC_F_INDIRECT, 0);
    }),
    row("table not mapped", "indirect_unmapped", |fixture| {
        fixture.desc(0, END, 16, VRING_DESC_F_INDIRECT, 0);
    }),
    row("table that wraps", "indirect_unmapped", |fixture| {
        fixture.desc(0, u64::MAX - 15, 32, VRING_DESC_F_INDIRECT, 0);
    }),
    row(
        "table that ends in a hole",
        "indirect_unmapped",
        |fixture| {
            fixture.desc(0, HOLE - 16, 32, VRING_DESC_F_INDIRECT, 0);
        },
    ),
    // Valid, but no driver does it: a table is one small allocation.
    row("table across two regions", "indirect_unmapped", |fixture| {
        fixture.desc(0, JOINED - 16, 32, VRING_DESC_F_INDIRECT, 0);
    }),
    row("next = entries", "chain_next_out_of_range", |fixture| {
        refer(fixture, &[(DATA, 72, VRING_DESC_F_NEXT, 1)]);
    }),
    row("loop in a table", "chain_loop", |fixture| {
        refer(
            fixture,
            &[
                (DATA, 72, VRING_DESC_F_NEXT, 1),
                (DATA, 72, VRING_DESC_F_NEXT, 0),
            ],
        );
    }),
    row("table of 1,025 descriptors", "chain_too_long", |fixture| {
        table_line(fixture, 1025, 64);
    }),
    row("table of 65,535 descriptors", "chain_too_long", |fixture| {
        table_line(fixture, u16::MAX, 64);
    }),
    row(
        "indirect behind a buffer, with NEXT",
        "indirect_with_next",
        |fixture| {
            fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 1);
            fixture.desc(1, TABLE, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 2);
        },
    ),
    row("bad address in a table", "address_invalid", |fixture| {
        refer(fixture, &[(DATA, 72, VRING_DESC_F_NEXT, 1), (END, 1, 0, 0)]);
    }),
    Row {
        features: PLAIN,
        ..row(
            "without the feature",
            "indirect_not_negotiated",
            |fixture| {
                refer(fixture, &[(DATA, 72, 0, 0)]);
            },
        )
    },
];

const DIRECTIONS: &[Row] = &[
    row("writable", "direction_wrong", |fixture| {
        fixture.desc(0, DATA, 72, VRING_DESC_F_WRITE, 0);
    }),
    row("readable, then writable", "direction_wrong", |fixture| {
        fixture.desc(0, DATA, 72, VRING_DESC_F_NEXT, 1);
        fixture.desc(1, DATA, 72, VRING_DESC_F_WRITE, 0);
    }),
    row("writable, then readable", "direction_wrong", |fixture| {
        fixture.desc(0, DATA, 12, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
        fixture.desc(1, DATA, 60, 0, 0);
    }),
    row("writable in a table", "direction_wrong", |fixture| {
        refer(
            fixture,
            &[
                (DATA, 12, VRING_DESC_F_NEXT, 1),
                (DATA, 60, VRING_DESC_F_WRITE, 0),
            ],
        );
    }),
];

#[test]
fn invalid_chain_is_dropped_and_no_other() {
    for row in [CHAINS, ADDRESSES, INDIRECTS, DIRECTIONS]
        .into_iter()
        .flatten()
    {
        let Row { name, counter, .. } = *row;
        let mut fixture = SplitRingFixture::new(row.size, row.features);
        let mut tx: TxQueue = fixture.device();
        (row.write)(&fixture);
        // The chain is between two valid frames of its burst; a third follows in the next burst.
        let last = row.size - 2;
        fixture.readable(last, &good());
        fixture.offer(&[last, 0, last]);
        let sent = tx.send(Some(&fixture.uplink)).unwrap();
        assert_eq!((sent.chains, sent.bytes), (3, 120), "{name}");
        let element = (u32::from(last), 0);
        assert_eq!(fixture.used(), [element, (0, 0), element], "{name}");
        assert_eq!(fixture.counted(), [(counter, 1)], "{name}");
        fixture.offer(&[last]);
        assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().bytes, 60, "{name}");
        assert_eq!(fixture.used(), [element], "{name}");
        assert_eq!(fixture.counted(), [], "{name}");
        let carried = fixture.uplink.sent();
        assert_eq!(carried.len(), 3, "{name}");
        assert!(carried.iter().all(|f| f.bytes == good()[12..]), "{name}");
        assert_eq!(
            tx.send(Some(&fixture.uplink)).unwrap(),
            TxOutcome::default()
        );
    }
}

/// An unusual but valid chain: the frame at `DATA` (72 bytes with its header) passes.
type Legal = (&'static str, fn(&SplitRingFixture));

const LEGAL: &[Legal] = &[
    ("one descriptor", |fixture| fixture.desc(0, DATA, 72, 0, 0)),
    ("header apart", |fixture| {
        fixture.desc(0, DATA, 12, VRING_DESC_F_NEXT, 9);
        fixture.desc(9, DATA + 12, 60, 0, 0);
    }),
    ("header over twelve descriptors", |fixture| {
        for at in 0..12 {
            fixture.desc(at, DATA + u64::from(at), 1, VRING_DESC_F_NEXT, at + 1);
        }
        fixture.desc(12, DATA + 12, 60, 0, 0);
    }),
    ("as many descriptors as the ring has", |fixture| {
        for at in 0..15 {
            fixture.desc(at, DATA + u64::from(at), 1, VRING_DESC_F_NEXT, at + 1);
        }
        fixture.desc(15, DATA + 15, 57, 0, 0);
    }),
    ("empty descriptors between", |fixture| {
        fixture.desc(0, DATA, 0, VRING_DESC_F_NEXT, 1);
        fixture.desc(1, DATA, 12, VRING_DESC_F_NEXT, 2);
        fixture.desc(2, DATA, 0, VRING_DESC_F_NEXT, 3);
        fixture.desc(3, DATA + 12, 60, VRING_DESC_F_NEXT, 4);
        fixture.desc(4, DATA, 0, 0, 0);
    }),
    ("indirect", |fixture| {
        refer(
            fixture,
            &[(DATA, 12, VRING_DESC_F_NEXT, 1), (DATA + 12, 60, 0, 0)],
        );
    }),
    ("indirect, WRITE on the outer descriptor", |fixture| {
        refer(fixture, &[(DATA, 72, 0, 0)]);
        fixture.desc(0, TABLE, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE, 0);
    }),
    ("indirect behind a buffer", |fixture| {
        fixture.table(&[(DATA + 12, 60, 0, 0)]);
        fixture.desc(0, DATA, 12, VRING_DESC_F_NEXT, 1);
        fixture.desc(1, TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    }),
    ("indirect table at an odd address", |fixture| {
        let mut bytes = DATA.to_le_bytes().to_vec();
        bytes.extend([72, 0, 0, 0, 0, 0, 0, 0]);
        fixture.ram.write(TABLE + 3, &bytes).unwrap();
        fixture.desc(0, TABLE + 3, 16, VRING_DESC_F_INDIRECT, 0);
    }),
    ("next without NEXT", |fixture| {
        fixture.desc(0, DATA, 72, 0, u16::MAX)
    }),
    ("flag bits that mean nothing", |fixture| {
        fixture.desc(0, DATA, 72, 0xfff8, 0);
    }),
    ("from one region into the next", |fixture| {
        fixture.ram.write(JOINED - 30, &good()).unwrap();
        fixture.desc(0, JOINED - 30, 72, 0, 0);
    }),
    ("to the end of memory", |fixture| {
        fixture.ram.write(END - 72, &good()).unwrap();
        fixture.desc(0, END - 72, 72, 0, 0);
    }),
];

#[test]
fn unusual_but_valid_chains_pass() {
    for (name, write) in LEGAL {
        let mut fixture = SplitRingFixture::new(16, FULL);
        let mut tx: TxQueue = fixture.device();
        fixture.ram.write(DATA, &good()).unwrap();
        write(&fixture);
        fixture.offer(&[0]);
        let sent = tx.send(Some(&fixture.uplink)).unwrap();
        assert_eq!((sent.chains, sent.bytes), (1, 60), "{name}");
        assert_eq!(fixture.uplink.sent()[0].bytes, good()[12..], "{name}");
        assert_eq!(fixture.used(), [(0, 0)], "{name}");
        assert_eq!(fixture.counted(), [], "{name}");
    }
}

#[test]
fn longest_valid_chain_passes() {
    for indirect in [false, true] {
        let mut fixture = SplitRingFixture::new(2048, FULL);
        let mut tx: TxQueue = fixture.device();
        match indirect {
            true => table_line(&fixture, 1024, 64),
            false => line(&fixture, 1024, 64),
        }
        fixture.offer(&[0]);
        assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().bytes, 65_536 - 12);
        assert_eq!(fixture.uplink.sent()[0].bytes.len(), 65_536 - 12);
        assert_eq!(fixture.counted(), []);
    }
}

/// The device keeps no state for a head or a descriptor.
#[test]
fn head_twice_and_shared_descriptor_are_two_frames() {
    let mut fixture = SplitRingFixture::new(16, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.ram.write(DATA, &good()).unwrap();
    fixture.desc(0, DATA, 12, VRING_DESC_F_NEXT, 2);
    fixture.desc(1, DATA, 12, VRING_DESC_F_NEXT, 2);
    fixture.desc(2, DATA + 12, 60, 0, 0);
    fixture.offer(&[0, 0, 1]);
    let sent = tx.send(Some(&fixture.uplink)).unwrap();
    assert_eq!((sent.chains, sent.bytes), (3, 180));
    assert_eq!(fixture.used(), [(0, 0), (0, 0), (1, 0)]);
    let carried = fixture.uplink.sent();
    assert!(carried.iter().all(|f| f.bytes == good()[12..]));
    assert_eq!(fixture.counted(), []);
}

/// A guest may transmit its own descriptors: they are its memory.
#[test]
fn buffer_in_the_ring_itself_is_ordinary_memory() {
    let mut fixture = SplitRingFixture::new(16, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.ram.write(DATA, &[0; 12]).unwrap();
    let at = fixture.ring.addresses();
    for (head, addr, len) in [
        (0, at.descriptors, 256),
        (2, at.driver, 38),
        (4, at.device, 134),
    ] {
        fixture.desc(head, DATA, 12, VRING_DESC_F_NEXT, head + 1);
        fixture.desc(head + 1, addr, len, 0, 0);
    }
    fixture.offer(&[0, 2, 4]);
    assert_eq!(
        tx.send(Some(&fixture.uplink)).unwrap().bytes,
        256 + 38 + 134
    );
    assert_eq!(fixture.used(), [(0, 0), (2, 0), (4, 0)]);
    assert_eq!(fixture.counted(), []);
}

/// The cost of a burst is bounded by the descriptors that it reads, whatever the guest wrote.
#[test]
fn table_of_65_535_entries_shared_by_1_024_heads_has_a_bounded_cost_per_burst() {
    let mut fixture = SplitRingFixture::new(1024, FULL);
    let mut tx: TxQueue = fixture.device();
    table_line(&fixture, u16::MAX, 64);
    for head in 0..1024 {
        fixture.desc(head, TABLE, 16 * 65_535, VRING_DESC_F_INDIRECT, 0);
    }
    let heads: Vec<u16> = (0..1024).collect();
    fixture.offer(&heads);
    let mut done = 0;
    while done < 1024 {
        let sent = tx.send(Some(&fixture.uplink)).unwrap();
        // Each was followed for 1,025 descriptors; a burst stops at 4,096.
        assert!((1..=4).contains(&sent.chains), "{} at once", sent.chains);
        done += sent.chains;
    }
    let want: Vec<_> = (0..1024).map(|head| (head, 0)).collect();
    assert_eq!(fixture.used(), want);
    assert_eq!(fixture.counted(), [("chain_too_long", 1024)]);
    assert!(fixture.uplink.sent().is_empty());
}

#[test]
fn disabled_ring_drains_whatever_is_in_it() {
    let mut fixture = SplitRingFixture::new(16, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.readable(3, &[vec![0; 12], frame(2, 60)].concat());
    fixture.desc(4, DATA, 72, VRING_DESC_F_NEXT, 4);
    fixture.offer(&[3, 4, 3]);
    assert_eq!(tx.send(None).unwrap().chains, 3);
    assert_eq!(fixture.used(), [(3, 0), (4, 0), (3, 0)]);
    assert_eq!(fixture.counted(), [("dropped_disabled", 3)]);
}
