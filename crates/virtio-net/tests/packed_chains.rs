//! Invalid chains in a packed ring: only that chain is dropped, under its own counter, and the next
//! chain is found behind its descriptors.
#![allow(clippy::unwrap_used)]

mod common;

use common::packed::PackedRingFixture;
use common::{DATA, END, FULL, HOLE, ISLAND, JOINED, PLAIN, TABLE, frame, good};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtionet_guest::packed::{
    PackedDescriptor, RingPosition, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED,
};
use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtionet_virtio_net::{DeviceQueue, RxEndReason, RxQueue, TxQueue};
use virtionet_virtqueue::VirtqueueFault;

/// Descriptors in the ring.
const SIZE: u16 = 2047;
/// The buffer id of the chain that a row writes.
const BAD: u16 = 9;
/// The address and the size of a valid RX buffer.
const BUFFER: u64 = DATA + 0x10_0000;
const BUFFER_LEN: u32 = 1526;
const MERGEABLE: u64 = PLAIN | 1 << VIRTIO_NET_F_MRG_RXBUF;
const UNMERGED: u64 = FULL & !(1 << VIRTIO_NET_F_MRG_RXBUF);

type Write = fn(&mut PackedRingFixture);
/// An invalid chain, and its counter.
type Row = (&'static str, &'static str, Write);

/// Writes three descriptors, the second of which is at `addr`.
fn around(fixture: &mut PackedRingFixture, addr: u64, len: u32) {
    fixture.put(DATA, 72, BAD, VRING_DESC_F_NEXT);
    fixture.put(addr, len, BAD, VRING_DESC_F_NEXT);
    fixture.put(DATA, 72, BAD, 0);
}

/// Writes `n` descriptors of `len` bytes.
fn line(fixture: &mut PackedRingFixture, n: u16, len: u32) {
    for _ in 1..n {
        fixture.put(DATA, len, BAD, VRING_DESC_F_NEXT);
    }
    fixture.put(DATA, len, BAD, 0);
}

/// Writes a table of these entries and a descriptor that refers to it.
fn refer(fixture: &mut PackedRingFixture, entries: &[(u64, u32, u16)]) {
    fixture.table(entries);
    let bytes = u32::try_from(16 * entries.len()).unwrap();
    fixture.put(TABLE, bytes, BAD, VRING_DESC_F_INDIRECT);
}

const TX: &[Row] = &[
    ("1,025 descriptors", "chain_too_long", |fixture| {
        line(fixture, 1025, 72);
    }),
    ("1,025 empty descriptors", "chain_too_long", |fixture| {
        line(fixture, 1025, 0);
    }),
    ("2,045 descriptors", "chain_too_long", |fixture| {
        line(fixture, 2045, 72);
    }),
    ("over 4 GiB", "chain_too_big", |fixture| {
        line(fixture, 300, 0xf0_0000 - 0x1000);
    }),
    ("address 0, not mapped", "address_invalid", |fixture| {
        around(fixture, 0, 64);
    }),
    ("beyond RAM", "address_invalid", |fixture| {
        around(fixture, END, 1)
    }),
    ("far beyond RAM", "address_invalid", |fixture| {
        around(fixture, 1 << 52, 64);
    }),
    ("last byte beyond RAM", "address_invalid", |fixture| {
        around(fixture, END - 63, 64);
    }),
    ("address + length wraps", "address_invalid", |fixture| {
        around(fixture, u64::MAX - 10, 64);
    }),
    ("ends in a hole", "address_invalid", |fixture| {
        around(fixture, HOLE - 32, 64);
    }),
    ("begins in a hole", "address_invalid", |fixture| {
        around(fixture, ISLAND - 32, 64);
    }),
    ("no bytes at a bad address", "address_invalid", |fixture| {
        around(fixture, 1 << 52, 0);
    }),
    ("bad address first", "address_invalid", |fixture| {
        fixture.put(END, 64, BAD, VRING_DESC_F_NEXT);
        line(fixture, 5, 72);
    }),
    ("bad address last", "address_invalid", |fixture| {
        fixture.put(DATA, 72, BAD, VRING_DESC_F_NEXT);
        fixture.put(END, 64, BAD, 0);
    }),
    ("every address bad", "address_invalid", |fixture| {
        for flags in [VRING_DESC_F_NEXT, VRING_DESC_F_NEXT, VRING_DESC_F_NEXT, 0] {
            fixture.put(END, 64, BAD, flags);
        }
    }),
    ("nested", "indirect_nested", |fixture| {
        refer(
            fixture,
            &[(DATA, 72, 0), (TABLE, 16, VRING_DESC_F_INDIRECT)],
        );
    }),
    ("INDIRECT with NEXT", "indirect_with_next", |fixture| {
        fixture.table(&[(DATA, 72, 0)]);
        fixture.put(TABLE, 16, BAD, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT);
        fixture.put(DATA, 72, BAD, 0);
    }),
    (
        "a buffer, a table and NEXT",
        "indirect_with_next",
        |fixture| {
            fixture.table(&[(DATA, 72, 0)]);
            fixture.put(DATA, 72, BAD, VRING_DESC_F_NEXT);
            fixture.put(TABLE, 16, BAD, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT);
            line(fixture, 3, 72);
        },
    ),
    ("table of 0 bytes", "indirect_bad_length", |fixture| {
        fixture.put(TABLE, 0, BAD, VRING_DESC_F_INDIRECT);
    }),
    ("table of 15 bytes", "indirect_bad_length", |fixture| {
        fixture.put(TABLE, 15, BAD, VRING_DESC_F_INDIRECT);
    }),
    ("table of 17 bytes", "indirect_bad_length", |fixture| {
        fixture.put(TABLE, 17, BAD, VRING_DESC_F_INDIRECT);
    }),
    (
        "table of 65,536 entries",
        "indirect_bad_length",
        |fixture| {
            fixture.put(TABLE, 16 * 65_536, BAD, VRING_DESC_F_INDIRECT);
        },
    ),
    ("table not mapped", "indirect_unmapped", |fixture| {
        fixture.put(END, 16, BAD, VRING_DESC_F_INDIRECT);
    }),
    ("table that wraps", "indirect_unmapped", |fixture| {
        fixture.put(u64::MAX - 15, 32, BAD, VRING_DESC_F_INDIRECT);
    }),
    (
        "table that ends in a hole",
        "indirect_unmapped",
        |fixture| {
            fixture.put(HOLE - 16, 32, BAD, VRING_DESC_F_INDIRECT);
        },
    ),
    ("table of 1,025 descriptors", "chain_too_long", |fixture| {
        refer(fixture, &[(DATA, 64, 0); 1025]);
    }),
    ("table of 65,535 descriptors", "chain_too_long", |fixture| {
        refer(fixture, &[(DATA, 64, 0); 65_535]);
    }),
    ("bad address in a table", "address_invalid", |fixture| {
        refer(fixture, &[(DATA, 72, 0), (END, 1, 0)]);
    }),
    ("writable", "direction_wrong", |fixture| {
        fixture.put(DATA, 72, BAD, VRING_DESC_F_WRITE);
    }),
    ("readable, then writable", "direction_wrong", |fixture| {
        fixture.put(DATA, 72, BAD, VRING_DESC_F_NEXT);
        fixture.put(DATA, 72, BAD, VRING_DESC_F_WRITE);
    }),
    ("writable, then readable", "direction_wrong", |fixture| {
        fixture.put(DATA, 12, BAD, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT);
        line(fixture, 4, 60);
    }),
    ("no bytes", "header_missing", |fixture| line(fixture, 4, 0)),
    ("11 bytes", "header_missing", |fixture| line(fixture, 11, 1)),
    ("13 bytes of frame", "frame_too_short", |fixture| {
        line(fixture, 25, 1);
    }),
];

/// The positions at which a row's burst begins: the ring's start, and positions from which the
/// chain wraps round.
fn starts() -> [u16; 4] {
    [0, SIZE - 2, SIZE - 1, 2 * SIZE - 3]
}

#[test]
fn invalid_chain_is_dropped_and_no_other() {
    let rows = TX.iter().map(|row| (FULL, *row));
    let refused: Row = ("no indirect", "indirect_not_negotiated", |fixture| {
        refer(fixture, &[(DATA, 72, 0)]);
    });
    for (features, (name, counter, write)) in rows.chain([(PLAIN, refused)]) {
        for start in starts() {
            let mut fixture = PackedRingFixture::new(start, SIZE, features);
            let mut tx: TxQueue = fixture.device();
            fixture.ram.write(DATA, &[0; 72]).unwrap();
            // The chain is between two valid frames of its burst; a third follows in the next
            // burst.
            fixture.readable(7, &good());
            write(&mut fixture);
            fixture.readable(8, &good());
            let sent = tx.send(Some(&fixture.uplink)).unwrap();
            assert_eq!((sent.chains, sent.bytes), (3, 120), "{name}");
            assert_eq!(fixture.used(), [(7, 0), (BAD, 0), (8, 0)], "{name}");
            assert_eq!(fixture.counted(), [(counter, 1)], "{name}");
            fixture.readable(3, &good());
            assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().bytes, 60, "{name}");
            assert_eq!(fixture.used(), [(3, 0)], "{name}");
            assert_eq!(fixture.counted(), [], "{name}");
            let carried = fixture.uplink.sent();
            assert_eq!(carried.len(), 3, "{name}");
            assert!(carried.iter().all(|f| f.bytes == good()[12..]), "{name}");
            assert_eq!(tx.rewind(), fixture.base(), "{name}");
        }
    }
}

/// Unusual but valid chains: the frame at `DATA` (72 bytes with its header) passes.
const LEGAL: &[(&str, Write)] = &[
    ("one descriptor", |fixture| fixture.put(DATA, 72, BAD, 0)),
    ("header over twelve descriptors", |fixture| {
        for at in 0..12 {
            fixture.put(DATA + at, 1, BAD, VRING_DESC_F_NEXT);
        }
        fixture.put(DATA + 12, 60, BAD, 0);
    }),
    ("as many descriptors as the ring has", |fixture| {
        for at in 0..15 {
            fixture.put(DATA + at, 1, 0, VRING_DESC_F_NEXT);
        }
        fixture.put(DATA + 15, 57, BAD, 0);
    }),
    ("empty descriptors between", |fixture| {
        fixture.put(DATA, 0, BAD, VRING_DESC_F_NEXT);
        fixture.put(DATA, 12, BAD, VRING_DESC_F_NEXT);
        fixture.put(DATA, 0, BAD, VRING_DESC_F_NEXT);
        fixture.put(DATA + 12, 60, BAD, VRING_DESC_F_NEXT);
        fixture.put(DATA, 0, BAD, 0);
    }),
    ("indirect", |fixture| {
        refer(fixture, &[(DATA, 12, 0), (DATA + 12, 60, 0)]);
    }),
    ("indirect, WRITE on the outer descriptor", |fixture| {
        fixture.table(&[(DATA, 72, 0)]);
        fixture.put(TABLE, 16, BAD, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE);
    }),
    ("indirect, WRITE on the header, as in DPDK", |fixture| {
        refer(
            fixture,
            &[(DATA, 12, VRING_DESC_F_WRITE), (DATA + 12, 60, 0)],
        );
    }),
    ("indirect, WRITE on a segment, as in DPDK", |fixture| {
        refer(
            fixture,
            &[
                (DATA, 12, VRING_DESC_F_WRITE),
                (DATA + 12, 60, VRING_DESC_F_WRITE),
            ],
        );
    }),
    ("indirect behind a buffer", |fixture| {
        fixture.table(&[(DATA + 12, 60, 0)]);
        fixture.put(DATA, 12, BAD, VRING_DESC_F_NEXT);
        fixture.put(TABLE, 16, BAD, VRING_DESC_F_INDIRECT);
    }),
    ("NEXT and other flags in a table", |fixture| {
        refer(
            fixture,
            &[(DATA, 12, 0x8080), (DATA + 12, 60, VRING_DESC_F_NEXT)],
        );
    }),
    ("from one region into the next", |fixture| {
        fixture.ram.write(JOINED - 30, &good()).unwrap();
        fixture.put(JOINED - 30, 72, BAD, 0);
    }),
];

#[test]
fn unusual_but_valid_chains_pass() {
    for (name, write) in LEGAL {
        for start in [0, 9, 25] {
            let mut fixture = PackedRingFixture::new(start, 16, FULL);
            let mut tx: TxQueue = fixture.device();
            fixture.ram.write(DATA, &good()).unwrap();
            write(&mut fixture);
            let sent = tx.send(Some(&fixture.uplink)).unwrap();
            assert_eq!((sent.chains, sent.bytes), (1, 60), "{name}");
            assert_eq!(fixture.uplink.sent()[0].bytes, good()[12..], "{name}");
            assert_eq!(fixture.used(), [(BAD, 0)], "{name}");
            assert_eq!(fixture.counted(), [], "{name}");
        }
    }
}

/// A descriptor is available only with the flags of the present wrap counter.
#[test]
fn descriptor_with_another_wrap_counter_is_not_available() {
    for lap in [0, 1] {
        for (flags, wrap) in [
            (0, None),
            (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED, None),
            (VIRTQ_DESC_F_AVAIL, Some(0)),
            (VIRTQ_DESC_F_USED, Some(1)),
        ] {
            let mut fixture = PackedRingFixture::new(16 * lap, 16, FULL);
            let mut tx: TxQueue = fixture.device();
            fixture.ram.write(DATA, &good()).unwrap();
            for index in 0..16 {
                let descriptor = PackedDescriptor::new(DATA, 72, index, flags);
                fixture.ring.set_descriptor(index, descriptor);
            }
            let chains = if wrap == Some(lap) { 16 } else { 0 };
            assert_eq!(tx.has_more(), chains > 0);
            assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().chains, chains);
            assert_eq!(tx.send(Some(&fixture.uplink)).unwrap().chains, 0);
            assert_eq!(fixture.uplink.sent().len(), chains);
            assert_eq!(fixture.counted(), []);
        }
    }
}

/// Reserved buffers that the driver makes available again are not dequeued again.
#[test]
fn flipped_wrap_counters_do_not_make_reserved_buffers_available_again() {
    for features in [MERGEABLE, UNMERGED] {
        let mut fixture = PackedRingFixture::new(0, 8, features);
        let mut rx: RxQueue = fixture.device();
        for id in 0..8 {
            fixture.put(
                BUFFER + 0x1000 * u64::from(id),
                BUFFER_LEN,
                id,
                VRING_DESC_F_WRITE,
            );
        }
        fixture.uplink.feed(with_header(1, 60));
        assert_eq!(rx.receive(&fixture.uplink, 1, 1 << 20).unwrap().frames, 1);
        assert_eq!(fixture.used(), [(0, 72)]);
        // The driver owns one buffer again; it flips the flags of all buffers.
        for id in 0..8 {
            fixture.put(BUFFER, BUFFER_LEN, id, VRING_DESC_F_WRITE);
        }
        for seed in 0..20 {
            fixture.uplink.feed(with_header(seed, 1000));
        }
        let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
        assert!(
            received.frames <= 8,
            "{} frames in 8 buffers",
            received.frames
        );
        let word = rx.rewind() & 0xffff;
        assert!(word & 0x7fff < 8, "{word:#x}");
    }
}

fn send_burst(fixture: &PackedRingFixture, tx: &mut TxQueue) -> Result<usize, VirtqueueFault> {
    tx.send(Some(&fixture.uplink)).map(|sent| sent.chains)
}

#[test]
fn chain_without_end_is_a_fault_of_the_ring() {
    let want = Err(VirtqueueFault::ChainWithoutEnd { size: 16 });
    for start in [0, 11, 16, 30] {
        let mut fixture = PackedRingFixture::new(start, 16, FULL);
        let mut tx: TxQueue = fixture.device();
        let mut rx: RxQueue = fixture.device();
        fixture.uplink.feed(with_header(1, 60));
        for _ in 0..16 {
            fixture.put(DATA, 72, 0, VRING_DESC_F_NEXT);
        }
        for _ in 0..3 {
            assert_eq!(send_burst(&fixture, &mut tx), want);
            assert_eq!(
                rx.receive(&fixture.uplink, 64, 1 << 20).map(|f| f.frames),
                want
            );
        }
        assert_eq!((tx.rewind(), rx.rewind()), (fixture.base(), fixture.base()));
        let first = fixture.ring.descriptor(RingPosition::nth(start, 16).index);
        assert_eq!((first.addr, first.len), (DATA, 72), "nothing was written");
        assert!(fixture.uplink.sent().is_empty());
        assert_eq!(fixture.uplink.waiting().len(), 1, "the frame waits");
    }
}

#[test]
fn chains_before_one_without_end_are_completed_first() {
    let mut fixture = PackedRingFixture::new(0, 16, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.readable(5, &good());
    fixture.readable(6, &good());
    for _ in 0..16 {
        // The last two take the place of the valid ones, which are used by then.
        if fixture.at.index == 0 {
            assert_eq!(send_burst(&fixture, &mut tx), Ok(2));
        }
        fixture.put(DATA, 72, 0, VRING_DESC_F_NEXT);
    }
    assert_eq!(fixture.uplink.sent().len(), 2);
    let want = Err(VirtqueueFault::ChainWithoutEnd { size: 16 });
    assert_eq!(send_burst(&fixture, &mut tx), want);
    assert_eq!(tx.rewind(), 0x8002_8002);
}

#[test]
fn ring_that_is_configured_again_after_a_fault_works() {
    let mut fixture = PackedRingFixture::new(3, 8, FULL);
    let mut tx: TxQueue = fixture.device();
    for _ in 0..8 {
        fixture.put(DATA, 72, 0, VRING_DESC_F_NEXT);
    }
    assert!(send_burst(&fixture, &mut tx).is_err());
    fixture.reset();
    assert_eq!(fixture.base(), 0x8000_8000);
    let mut tx: TxQueue = fixture.device();
    assert_eq!(send_burst(&fixture, &mut tx), Ok(0));
    fixture.readable(1, &good());
    assert_eq!(send_burst(&fixture, &mut tx), Ok(1));
    assert_eq!(fixture.used(), [(1, 0)]);
}

const RX: &[Row] = &[
    ("no bytes", "rx_buffer_too_small", |fixture| {
        fixture.put(DATA, 0, BAD, VRING_DESC_F_WRITE);
    }),
    (
        "11 bytes in eleven descriptors",
        "rx_buffer_too_small",
        |fixture| {
            for _ in 0..10 {
                fixture.put(DATA, 1, BAD, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT);
            }
            fixture.put(DATA, 1, BAD, VRING_DESC_F_WRITE);
        },
    ),
    ("readable", "direction_wrong", |fixture| {
        line(fixture, 1, BUFFER_LEN)
    }),
    (
        "writable header, readable rest",
        "direction_wrong",
        |fixture| {
            fixture.put(DATA, 12, BAD, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT);
            fixture.put(DATA, BUFFER_LEN, BAD, 0);
        },
    ),
    ("bad address in the middle", "address_invalid", |fixture| {
        fixture.put(DATA, 12, BAD, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT);
        fixture.put(
            HOLE - 1,
            BUFFER_LEN,
            BAD,
            VRING_DESC_F_WRITE | VRING_DESC_F_NEXT,
        );
        fixture.put(DATA, BUFFER_LEN, BAD, VRING_DESC_F_WRITE);
    }),
    ("nested table", "indirect_nested", |fixture| {
        refer(fixture, &[(TABLE, 16, VRING_DESC_F_INDIRECT)]);
    }),
    ("table of 17 bytes", "indirect_bad_length", |fixture| {
        fixture.put(TABLE, 17, BAD, VRING_DESC_F_INDIRECT);
    }),
    ("readable in a table", "direction_wrong", |fixture| {
        refer(fixture, &[(DATA, BUFFER_LEN, 0)]);
    }),
];

fn with_header(seed: usize, len: usize) -> Vec<u8> {
    [vec![0; 12], frame(seed, len)].concat()
}

/// The content of a buffer: num_buffers and the frame behind the header.
fn found(fixture: &PackedRingFixture, addr: u64, len: usize) -> (u16, Vec<u8>) {
    let mut bytes = vec![0; 12 + len];
    fixture.ram.read(addr, &mut bytes).unwrap();
    (
        u16::from_le_bytes([bytes[10], bytes[11]]),
        bytes.split_off(12),
    )
}

#[test]
fn invalid_buffer_is_completed_empty_and_the_frame_uses_the_next() {
    for features in [FULL, UNMERGED] {
        for &(name, counter, write) in RX {
            for start in [0, 48, 49, 98] {
                let mut fixture = PackedRingFixture::new(start, 50, features);
                let mut rx: RxQueue = fixture.device();
                write(&mut fixture);
                fixture.put(BUFFER, BUFFER_LEN, 4, VRING_DESC_F_WRITE);
                write(&mut fixture);
                fixture.put(BUFFER + 0x1000, BUFFER_LEN, 5, VRING_DESC_F_WRITE);
                // The ring is full, so the device does not wait for further buffers.
                while fixture.free_descriptors() > 0 {
                    fixture.put(BUFFER, BUFFER_LEN, 6, VRING_DESC_F_WRITE);
                }
                fixture.uplink.feed(with_header(1, 1000));
                fixture.uplink.feed(with_header(2, 60));
                let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
                assert_eq!((received.frames, received.bytes), (2, 1060), "{name}");
                let want = [(BAD, 0), (4, 1012), (BAD, 0), (5, 72)];
                assert_eq!(fixture.used(), want, "{name}, {features:#x}");
                assert_eq!(fixture.counted(), [(counter, 2)], "{name}");
                assert_eq!(found(&fixture, BUFFER, 1000), (1, frame(1, 1000)), "{name}");
                assert_eq!(
                    found(&fixture, BUFFER + 0x1000, 60),
                    (1, frame(2, 60)),
                    "{name}"
                );
                assert_eq!(rx.rewind(), fixture.base(), "{name}");
            }
        }
    }
}

/// The invalid chain counts as one buffer of the frame, whatever its number of descriptors.
#[test]
fn invalid_chain_among_the_buffers_of_a_frame_is_an_empty_buffer() {
    let mut fixture = PackedRingFixture::new(0, 9, MERGEABLE);
    let mut rx: RxQueue = fixture.device();
    fixture.put(BUFFER, 64, 0, VRING_DESC_F_WRITE);
    fixture.put(DATA, 64, 1, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT);
    fixture.put(DATA, 64, 1, VRING_DESC_F_NEXT);
    fixture.put(DATA, 64, 1, VRING_DESC_F_WRITE);
    fixture.put(BUFFER + 64, 60, 2, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT);
    fixture.put(BUFFER + 124, 4, 2, VRING_DESC_F_WRITE);
    fixture.put(BUFFER + 0x1000, 64, 3, VRING_DESC_F_WRITE);
    fixture.uplink.feed(with_header(3, 100));
    assert_eq!(rx.receive(&fixture.uplink, 1, 1 << 20).unwrap().frames, 1);
    assert_eq!(fixture.used(), [(0, 64), (1, 0), (2, 48)]);
    assert_eq!(fixture.counted(), [("direction_wrong", 1)]);
    assert_eq!(found(&fixture, BUFFER, 100), (3, frame(3, 100)));
    assert_eq!(rx.rewind(), 0x8006_8006);
}

/// Frames wait for buffers, and none is lost while the ring wraps round many times.
#[test]
fn starved_ring_continues_when_buffers_are_added() {
    for features in [MERGEABLE, UNMERGED] {
        let mut fixture = PackedRingFixture::new(0, 7, features);
        let mut rx: RxQueue = fixture.device();
        for seed in 0..100 {
            fixture.uplink.feed(with_header(seed, 300));
        }
        let mut seen = 0;
        let mut given = 0;
        while seen < 100 {
            let starved = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
            assert_eq!((starved.frames, starved.should_call), (0, false));
            assert_eq!(starved.end, RxEndReason::Starved);
            assert!(!rx.enable_kicks());
            while given < seen + 7 {
                let id = u16::try_from(given % 7).unwrap();
                fixture.put(
                    BUFFER + 0x1000 * u64::from(id),
                    BUFFER_LEN,
                    id,
                    VRING_DESC_F_WRITE,
                );
                given += 1;
            }
            assert!(rx.enable_kicks(), "buffers have come");
            let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
            assert!(received.frames > 0 && received.should_call, "{seen} of 100");
            for (id, len) in fixture.used() {
                assert_eq!((usize::from(id), len), (seen % 7, 312));
                let addr = BUFFER + 0x1000 * u64::from(id);
                assert_eq!(found(&fixture, addr, 300), (1, frame(seen, 300)));
                seen += 1;
            }
        }
        assert_eq!(fixture.counted(), []);
        rx.rewind();
        assert_eq!(rx.rewind(), fixture.base());
    }
}
