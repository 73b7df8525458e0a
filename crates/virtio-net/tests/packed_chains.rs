//! Chains in a packed ring that a guest must not send: each costs it that chain, under its own
//! counter, and the next one is found where that chain's own descriptors end.
#![allow(clippy::unwrap_used)]

mod common;

use common::packed::PackedLab;
use common::{DATA, END, FULL, HOLE, ISLAND, JOINED, PLAIN, TABLE, frame, good};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtionet_virtio_net::{DeviceQueue, RxEnd, RxQueue, TxQueue};
use virtionet_guest::packed::{AVAIL, PackedDescriptor, Place, USED};
use virtionet_guest::split::{INDIRECT, NEXT, WRITE};
use virtionet_virtqueue::RingFault;

/// Descriptors in the ring.
const SIZE: u16 = 2047;
/// The buffer id of the chain that a row writes.
const BAD: u16 = 9;
/// A good RX buffer's place and size.
const BUFFER: u64 = DATA + 0x10_0000;
const ROOM: u32 = 1526;
const MERGEABLE: u64 = PLAIN | 1 << VIRTIO_NET_F_MRG_RXBUF;
const UNMERGED: u64 = FULL & !(1 << VIRTIO_NET_F_MRG_RXBUF);

type Write = fn(&mut PackedLab);
/// A bad chain, and the counter that must tell of it.
type Row = (&'static str, &'static str, Write);

/// Three descriptors, the second of which is at `addr`.
fn around(lab: &mut PackedLab, addr: u64, len: u32) {
    lab.put(DATA, 72, BAD, NEXT);
    lab.put(addr, len, BAD, NEXT);
    lab.put(DATA, 72, BAD, 0);
}

/// `n` descriptors of `len` bytes.
fn line(lab: &mut PackedLab, n: u16, len: u32) {
    for _ in 1..n {
        lab.put(DATA, len, BAD, NEXT);
    }
    lab.put(DATA, len, BAD, 0);
}

/// A table of these entries and a descriptor that refers to it.
fn refer(lab: &mut PackedLab, entries: &[(u64, u32, u16)]) {
    lab.table(entries);
    let bytes = u32::try_from(16 * entries.len()).unwrap();
    lab.put(TABLE, bytes, BAD, INDIRECT);
}

const TX: &[Row] = &[
    ("1,025 descriptors", "chain_too_long", |lab| {
        line(lab, 1025, 72);
    }),
    ("1,025 empty descriptors", "chain_too_long", |lab| {
        line(lab, 1025, 0);
    }),
    ("2,045 descriptors", "chain_too_long", |lab| {
        line(lab, 2045, 72);
    }),
    ("over 4 GiB", "chain_too_big", |lab| {
        line(lab, 300, 0xf0_0000 - 0x1000);
    }),
    ("address 0, not mapped", "address_invalid", |lab| {
        around(lab, 0, 64);
    }),
    ("beyond RAM", "address_invalid", |lab| around(lab, END, 1)),
    ("far beyond RAM", "address_invalid", |lab| {
        around(lab, 1 << 52, 64);
    }),
    ("last byte beyond RAM", "address_invalid", |lab| {
        around(lab, END - 63, 64);
    }),
    ("address + length wraps", "address_invalid", |lab| {
        around(lab, u64::MAX - 10, 64);
    }),
    ("ends in a hole", "address_invalid", |lab| {
        around(lab, HOLE - 32, 64);
    }),
    ("begins in a hole", "address_invalid", |lab| {
        around(lab, ISLAND - 32, 64);
    }),
    ("no bytes at a bad address", "address_invalid", |lab| {
        around(lab, 1 << 52, 0);
    }),
    ("bad address first", "address_invalid", |lab| {
        lab.put(END, 64, BAD, NEXT);
        line(lab, 5, 72);
    }),
    ("bad address last", "address_invalid", |lab| {
        lab.put(DATA, 72, BAD, NEXT);
        lab.put(END, 64, BAD, 0);
    }),
    ("every address bad", "address_invalid", |lab| {
        for flags in [NEXT, NEXT, NEXT, 0] {
            lab.put(END, 64, BAD, flags);
        }
    }),
    ("nested", "indirect_nested", |lab| {
        refer(lab, &[(DATA, 72, 0), (TABLE, 16, INDIRECT)]);
    }),
    ("INDIRECT with NEXT", "indirect_with_next", |lab| {
        lab.table(&[(DATA, 72, 0)]);
        lab.put(TABLE, 16, BAD, INDIRECT | NEXT);
        lab.put(DATA, 72, BAD, 0);
    }),
    ("a buffer, a table and NEXT", "indirect_with_next", |lab| {
        lab.table(&[(DATA, 72, 0)]);
        lab.put(DATA, 72, BAD, NEXT);
        lab.put(TABLE, 16, BAD, INDIRECT | NEXT);
        line(lab, 3, 72);
    }),
    ("table of 0 bytes", "indirect_bad_length", |lab| {
        lab.put(TABLE, 0, BAD, INDIRECT);
    }),
    ("table of 15 bytes", "indirect_bad_length", |lab| {
        lab.put(TABLE, 15, BAD, INDIRECT);
    }),
    ("table of 17 bytes", "indirect_bad_length", |lab| {
        lab.put(TABLE, 17, BAD, INDIRECT);
    }),
    ("table of 65,536 entries", "indirect_bad_length", |lab| {
        lab.put(TABLE, 16 * 65_536, BAD, INDIRECT);
    }),
    ("table not mapped", "indirect_unmapped", |lab| {
        lab.put(END, 16, BAD, INDIRECT);
    }),
    ("table that wraps", "indirect_unmapped", |lab| {
        lab.put(u64::MAX - 15, 32, BAD, INDIRECT);
    }),
    ("table that ends in a hole", "indirect_unmapped", |lab| {
        lab.put(HOLE - 16, 32, BAD, INDIRECT);
    }),
    ("table of 1,025 descriptors", "chain_too_long", |lab| {
        refer(lab, &[(DATA, 64, 0); 1025]);
    }),
    ("table of 65,535 descriptors", "chain_too_long", |lab| {
        refer(lab, &[(DATA, 64, 0); 65_535]);
    }),
    ("bad address in a table", "address_invalid", |lab| {
        refer(lab, &[(DATA, 72, 0), (END, 1, 0)]);
    }),
    ("writable", "direction_wrong", |lab| {
        lab.put(DATA, 72, BAD, WRITE);
    }),
    ("readable, then writable", "direction_wrong", |lab| {
        lab.put(DATA, 72, BAD, NEXT);
        lab.put(DATA, 72, BAD, WRITE);
    }),
    ("writable, then readable", "direction_wrong", |lab| {
        lab.put(DATA, 12, BAD, WRITE | NEXT);
        line(lab, 4, 60);
    }),
    ("no bytes", "header_missing", |lab| line(lab, 4, 0)),
    ("11 bytes", "header_missing", |lab| line(lab, 11, 1)),
    ("13 bytes of frame", "frame_too_short", |lab| {
        line(lab, 25, 1);
    }),
];

/// Places at which a row's burst begins: the start, and so that the ring's end lies in its chain.
fn starts() -> [u16; 4] {
    [0, SIZE - 2, SIZE - 1, 2 * SIZE - 3]
}

#[test]
fn a_bad_chain_costs_the_guest_that_chain_and_no_other() {
    let rows = TX.iter().map(|row| (FULL, *row));
    let refused: Row = ("no indirect", "indirect_not_negotiated", |lab| {
        refer(lab, &[(DATA, 72, 0)]);
    });
    for (features, (name, counter, write)) in rows.chain([(PLAIN, refused)]) {
        for start in starts() {
            let mut lab = PackedLab::new(start, SIZE, features);
            let mut tx: TxQueue = lab.device();
            lab.ram.write(DATA, &[0; 72]).unwrap();
            // Between two good frames of its burst, then one more in the next.
            lab.readable(7, &good());
            write(&mut lab);
            lab.readable(8, &good());
            let sent = tx.send(Some(&lab.uplink)).unwrap();
            assert_eq!((sent.chains, sent.bytes), (3, 120), "{name}");
            assert_eq!(lab.used(), [(7, 0), (BAD, 0), (8, 0)], "{name}");
            assert_eq!(lab.counted(), [(counter, 1)], "{name}");
            lab.readable(3, &good());
            assert_eq!(tx.send(Some(&lab.uplink)).unwrap().bytes, 60, "{name}");
            assert_eq!(lab.used(), [(3, 0)], "{name}");
            assert_eq!(lab.counted(), [], "{name}");
            let carried = lab.uplink.sent();
            assert_eq!(carried.len(), 3, "{name}");
            assert!(carried.iter().all(|f| f.bytes == good()[12..]), "{name}");
            assert_eq!(tx.rewind(), lab.base(), "{name}");
        }
    }
}

/// Chains that look odd and are legal: the frame at `DATA` (72 bytes with its header) passes.
const LEGAL: &[(&str, Write)] = &[
    ("one descriptor", |lab| lab.put(DATA, 72, BAD, 0)),
    ("header over twelve descriptors", |lab| {
        for at in 0..12 {
            lab.put(DATA + at, 1, BAD, NEXT);
        }
        lab.put(DATA + 12, 60, BAD, 0);
    }),
    ("as many descriptors as the ring has", |lab| {
        for at in 0..15 {
            lab.put(DATA + at, 1, 0, NEXT);
        }
        lab.put(DATA + 15, 57, BAD, 0);
    }),
    ("empty descriptors between", |lab| {
        lab.put(DATA, 0, BAD, NEXT);
        lab.put(DATA, 12, BAD, NEXT);
        lab.put(DATA, 0, BAD, NEXT);
        lab.put(DATA + 12, 60, BAD, NEXT);
        lab.put(DATA, 0, BAD, 0);
    }),
    ("indirect", |lab| {
        refer(lab, &[(DATA, 12, 0), (DATA + 12, 60, 0)]);
    }),
    ("indirect, WRITE on the outer descriptor", |lab| {
        lab.table(&[(DATA, 72, 0)]);
        lab.put(TABLE, 16, BAD, INDIRECT | WRITE);
    }),
    ("indirect, WRITE on the header, as DPDK has it", |lab| {
        refer(lab, &[(DATA, 12, WRITE), (DATA + 12, 60, 0)]);
    }),
    ("indirect, WRITE on a piece, as DPDK has it", |lab| {
        refer(lab, &[(DATA, 12, WRITE), (DATA + 12, 60, WRITE)]);
    }),
    ("indirect behind a buffer", |lab| {
        lab.table(&[(DATA + 12, 60, 0)]);
        lab.put(DATA, 12, BAD, NEXT);
        lab.put(TABLE, 16, BAD, INDIRECT);
    }),
    ("NEXT and other flags in a table", |lab| {
        refer(lab, &[(DATA, 12, 0x8080), (DATA + 12, 60, NEXT)]);
    }),
    ("from one region into the next", |lab| {
        lab.ram.write(JOINED - 30, &good()).unwrap();
        lab.put(JOINED - 30, 72, BAD, 0);
    }),
];

#[test]
fn odd_but_legal_chains_pass() {
    for (name, write) in LEGAL {
        for start in [0, 9, 25] {
            let mut lab = PackedLab::new(start, 16, FULL);
            let mut tx: TxQueue = lab.device();
            lab.ram.write(DATA, &good()).unwrap();
            write(&mut lab);
            let sent = tx.send(Some(&lab.uplink)).unwrap();
            assert_eq!((sent.chains, sent.bytes), (1, 60), "{name}");
            assert_eq!(lab.uplink.sent()[0].bytes, good()[12..], "{name}");
            assert_eq!(lab.used(), [(BAD, 0)], "{name}");
            assert_eq!(lab.counted(), [], "{name}");
        }
    }
}

/// Flags that do not make a descriptor the device's in its lap, and those that do.
#[test]
fn wrap_counters_that_are_not_this_laps_make_nothing_available() {
    for lap in [0, 1] {
        for (flags, wrap) in [
            (0, None),
            (AVAIL | USED, None),
            (AVAIL, Some(0)),
            (USED, Some(1)),
        ] {
            let mut lab = PackedLab::new(16 * lap, 16, FULL);
            let mut tx: TxQueue = lab.device();
            lab.ram.write(DATA, &good()).unwrap();
            for index in 0..16 {
                let descriptor = PackedDescriptor::new(DATA, 72, index, flags);
                lab.ring.set_descriptor(index, descriptor);
            }
            let chains = if wrap == Some(lap) { 16 } else { 0 };
            assert_eq!(tx.has_more(), chains > 0);
            assert_eq!(tx.send(Some(&lab.uplink)).unwrap().chains, chains);
            assert_eq!(tx.send(Some(&lab.uplink)).unwrap().chains, 0);
            assert_eq!(lab.uplink.sent().len(), chains);
            assert_eq!(lab.counted(), []);
        }
    }
}

/// Buffers in reserve that the driver makes available a second time are not taken a second time.
#[test]
fn wrap_counters_flipped_under_reserved_buffers_give_it_no_more() {
    for features in [MERGEABLE, UNMERGED] {
        let mut lab = PackedLab::new(0, 8, features);
        let mut rx: RxQueue = lab.device();
        for id in 0..8 {
            lab.put(BUFFER + 0x1000 * u64::from(id), ROOM, id, WRITE);
        }
        lab.uplink.feed(with_header(1, 60));
        assert_eq!(rx.fill(&lab.uplink, 1, 1 << 20).unwrap().frames, 1);
        assert_eq!(lab.used(), [(0, 72)]);
        // One is the driver's again; it turns the flags of all.
        for id in 0..8 {
            lab.put(BUFFER, ROOM, id, WRITE);
        }
        for seed in 0..20 {
            lab.uplink.feed(with_header(seed, 1000));
        }
        let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
        assert!(filled.frames <= 8, "{} frames in 8 buffers", filled.frames);
        let word = rx.rewind() & 0xffff;
        assert!(word & 0x7fff < 8, "{word:#x}");
    }
}

fn turn_tx(lab: &PackedLab, tx: &mut TxQueue) -> Result<usize, RingFault> {
    tx.send(Some(&lab.uplink)).map(|sent| sent.chains)
}

#[test]
fn a_chain_without_end_is_a_fault_of_the_ring() {
    let want = Err(RingFault::ChainWithoutEnd { size: 16 });
    for start in [0, 11, 16, 30] {
        let mut lab = PackedLab::new(start, 16, FULL);
        let mut tx: TxQueue = lab.device();
        let mut rx: RxQueue = lab.device();
        lab.uplink.feed(with_header(1, 60));
        for _ in 0..16 {
            lab.put(DATA, 72, 0, NEXT);
        }
        for _ in 0..3 {
            assert_eq!(turn_tx(&lab, &mut tx), want);
            assert_eq!(rx.fill(&lab.uplink, 64, 1 << 20).map(|f| f.frames), want);
        }
        assert_eq!((tx.rewind(), rx.rewind()), (lab.base(), lab.base()));
        let first = lab.ring.descriptor(Place::nth(start, 16).index);
        assert_eq!((first.addr, first.len), (DATA, 72), "nothing was written");
        assert!(lab.uplink.sent().is_empty());
        assert_eq!(lab.uplink.waiting().len(), 1, "the frame waits");
    }
}

#[test]
fn good_chains_before_one_without_end_are_done_first() {
    let mut lab = PackedLab::new(0, 16, FULL);
    let mut tx: TxQueue = lab.device();
    lab.readable(5, &good());
    lab.readable(6, &good());
    for _ in 0..16 {
        // The last two stand where the good ones stood, which are used by then.
        if lab.at.index == 0 {
            assert_eq!(turn_tx(&lab, &mut tx), Ok(2));
        }
        lab.put(DATA, 72, 0, NEXT);
    }
    assert_eq!(lab.uplink.sent().len(), 2);
    let want = Err(RingFault::ChainWithoutEnd { size: 16 });
    assert_eq!(turn_tx(&lab, &mut tx), want);
    assert_eq!(tx.rewind(), 0x8002_8002);
}

#[test]
fn a_ring_set_up_anew_after_a_fault_goes_on() {
    let mut lab = PackedLab::new(3, 8, FULL);
    let mut tx: TxQueue = lab.device();
    for _ in 0..8 {
        lab.put(DATA, 72, 0, NEXT);
    }
    assert!(turn_tx(&lab, &mut tx).is_err());
    lab.reset();
    assert_eq!(lab.base(), 0x8000_8000);
    let mut tx: TxQueue = lab.device();
    assert_eq!(turn_tx(&lab, &mut tx), Ok(0));
    lab.readable(1, &good());
    assert_eq!(turn_tx(&lab, &mut tx), Ok(1));
    assert_eq!(lab.used(), [(1, 0)]);
}

const RX: &[Row] = &[
    ("no bytes", "rx_buffer_too_small", |lab| {
        lab.put(DATA, 0, BAD, WRITE);
    }),
    (
        "11 bytes in eleven descriptors",
        "rx_buffer_too_small",
        |lab| {
            for _ in 0..10 {
                lab.put(DATA, 1, BAD, WRITE | NEXT);
            }
            lab.put(DATA, 1, BAD, WRITE);
        },
    ),
    ("readable", "direction_wrong", |lab| line(lab, 1, ROOM)),
    ("writable header, readable rest", "direction_wrong", |lab| {
        lab.put(DATA, 12, BAD, WRITE | NEXT);
        lab.put(DATA, ROOM, BAD, 0);
    }),
    ("bad address in the middle", "address_invalid", |lab| {
        lab.put(DATA, 12, BAD, WRITE | NEXT);
        lab.put(HOLE - 1, ROOM, BAD, WRITE | NEXT);
        lab.put(DATA, ROOM, BAD, WRITE);
    }),
    ("nested table", "indirect_nested", |lab| {
        refer(lab, &[(TABLE, 16, INDIRECT)]);
    }),
    ("table of 17 bytes", "indirect_bad_length", |lab| {
        lab.put(TABLE, 17, BAD, INDIRECT);
    }),
    ("readable in a table", "direction_wrong", |lab| {
        refer(lab, &[(DATA, ROOM, 0)]);
    }),
];

fn with_header(seed: usize, len: usize) -> Vec<u8> {
    [vec![0; 12], frame(seed, len)].concat()
}

/// What the guest finds in a buffer: its num_buffers and the frame behind the header.
fn found(lab: &PackedLab, addr: u64, len: usize) -> (u16, Vec<u8>) {
    let mut bytes = vec![0; 12 + len];
    lab.ram.read(addr, &mut bytes).unwrap();
    (
        u16::from_le_bytes([bytes[10], bytes[11]]),
        bytes.split_off(12),
    )
}

#[test]
fn a_bad_buffer_goes_back_empty_and_the_frame_takes_the_next() {
    for features in [FULL, UNMERGED] {
        for &(name, counter, write) in RX {
            for start in [0, 48, 49, 98] {
                let mut lab = PackedLab::new(start, 50, features);
                let mut rx: RxQueue = lab.device();
                write(&mut lab);
                lab.put(BUFFER, ROOM, 4, WRITE);
                write(&mut lab);
                lab.put(BUFFER + 0x1000, ROOM, 5, WRITE);
                // A full ring: nothing more is to be waited for.
                while lab.room() > 0 {
                    lab.put(BUFFER, ROOM, 6, WRITE);
                }
                lab.uplink.feed(with_header(1, 1000));
                lab.uplink.feed(with_header(2, 60));
                let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
                assert_eq!((filled.frames, filled.bytes), (2, 1060), "{name}");
                let want = [(BAD, 0), (4, 1012), (BAD, 0), (5, 72)];
                assert_eq!(lab.used(), want, "{name}, {features:#x}");
                assert_eq!(lab.counted(), [(counter, 2)], "{name}");
                assert_eq!(found(&lab, BUFFER, 1000), (1, frame(1, 1000)), "{name}");
                assert_eq!(
                    found(&lab, BUFFER + 0x1000, 60),
                    (1, frame(2, 60)),
                    "{name}"
                );
                assert_eq!(rx.rewind(), lab.base(), "{name}");
            }
        }
    }
}

/// The bad one counts as a buffer of the frame around it, whatever its number of descriptors.
#[test]
fn a_bad_chain_among_the_buffers_of_a_frame_is_an_empty_one_of_them() {
    let mut lab = PackedLab::new(0, 9, MERGEABLE);
    let mut rx: RxQueue = lab.device();
    lab.put(BUFFER, 64, 0, WRITE);
    lab.put(DATA, 64, 1, WRITE | NEXT);
    lab.put(DATA, 64, 1, NEXT);
    lab.put(DATA, 64, 1, WRITE);
    lab.put(BUFFER + 64, 60, 2, WRITE | NEXT);
    lab.put(BUFFER + 124, 4, 2, WRITE);
    lab.put(BUFFER + 0x1000, 64, 3, WRITE);
    lab.uplink.feed(with_header(3, 100));
    assert_eq!(rx.fill(&lab.uplink, 1, 1 << 20).unwrap().frames, 1);
    assert_eq!(lab.used(), [(0, 64), (1, 0), (2, 48)]);
    assert_eq!(lab.counted(), [("direction_wrong", 1)]);
    assert_eq!(found(&lab, BUFFER, 100), (3, frame(3, 100)));
    assert_eq!(rx.rewind(), 0x8006_8006);
}

/// Frames wait for buffers, and none of them is lost while the ring goes round and round.
#[test]
fn a_starved_ring_goes_on_when_buffers_come() {
    for features in [MERGEABLE, UNMERGED] {
        let mut lab = PackedLab::new(0, 7, features);
        let mut rx: RxQueue = lab.device();
        for seed in 0..100 {
            lab.uplink.feed(with_header(seed, 300));
        }
        let mut seen = 0;
        let mut given = 0;
        while seen < 100 {
            let starved = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
            assert_eq!((starved.frames, starved.call), (0, false));
            assert_eq!(starved.end, RxEnd::Starved);
            assert!(!rx.enable_kicks());
            while given < seen + 7 {
                let id = u16::try_from(given % 7).unwrap();
                lab.put(BUFFER + 0x1000 * u64::from(id), ROOM, id, WRITE);
                given += 1;
            }
            assert!(rx.enable_kicks(), "buffers have come");
            let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
            assert!(filled.frames > 0 && filled.call, "{seen} of 100");
            for (id, len) in lab.used() {
                assert_eq!((usize::from(id), len), (seen % 7, 312));
                let addr = BUFFER + 0x1000 * u64::from(id);
                assert_eq!(found(&lab, addr, 300), (1, frame(seen, 300)));
                seen += 1;
            }
        }
        assert_eq!(lab.counted(), []);
        rx.rewind();
        assert_eq!(rx.rewind(), lab.base());
    }
}
