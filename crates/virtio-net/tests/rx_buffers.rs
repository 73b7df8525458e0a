//! Receive buffers that a guest must not offer, and buffers that run out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{DATA, END, FULL, HOLE, JOINED, Lab, PLAIN, TABLE, frame};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtionet_virtio_net::{DeviceQueue, RxEnd, RxQueue};
use virtionet_guest::split::{INDIRECT, NEXT, WRITE};

const MERGEABLE: u64 = PLAIN | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Everything but mergeable buffers.
const UNMERGED: u64 = FULL & !(1 << VIRTIO_NET_F_MRG_RXBUF);
/// A good buffer's place and size.
const BUFFER: u64 = DATA + 0x10_0000;
const ROOM: u32 = 1526;

/// A bad chain with head 0, and the counter that must tell of it.
type Row = (&'static str, &'static str, fn(&Lab));

const ROWS: &[Row] = &[
    ("no bytes", "rx_buffer_too_small", |lab| {
        lab.desc(0, DATA, 0, WRITE, 0);
    }),
    ("1 byte", "rx_buffer_too_small", |lab| {
        lab.desc(0, DATA, 1, WRITE, 0);
    }),
    ("11 bytes", "rx_buffer_too_small", |lab| {
        lab.desc(0, DATA, 11, WRITE, 0);
    }),
    (
        "11 bytes in eleven descriptors",
        "rx_buffer_too_small",
        |lab| {
            for at in 0..10 {
                lab.desc(at, DATA + u64::from(at), 1, WRITE | NEXT, at + 1);
            }
            lab.desc(10, DATA + 10, 1, WRITE, 0);
        },
    ),
    ("readable", "direction_wrong", |lab| {
        lab.desc(0, DATA, ROOM, 0, 0);
    }),
    ("readable header, writable rest", "direction_wrong", |lab| {
        lab.desc(0, DATA, 12, NEXT, 1);
        lab.desc(1, DATA, ROOM, WRITE, 0);
    }),
    ("writable header, readable rest", "direction_wrong", |lab| {
        lab.desc(0, DATA, 12, WRITE | NEXT, 1);
        lab.desc(1, DATA, ROOM, 0, 0);
    }),
    ("self-loop", "chain_loop", |lab| {
        lab.desc(0, DATA, ROOM, WRITE | NEXT, 0);
    }),
    ("next outside the ring", "chain_next_out_of_range", |lab| {
        lab.desc(0, DATA, ROOM, WRITE | NEXT, 77);
    }),
    ("outside memory", "address_invalid", |lab| {
        lab.desc(0, END, ROOM, WRITE, 0);
    }),
    ("ends in a hole", "address_invalid", |lab| {
        lab.desc(0, HOLE - 1525, ROOM, WRITE, 0);
    }),
    ("wraps", "address_invalid", |lab| {
        lab.desc(0, u64::MAX - 9, ROOM, WRITE, 0);
    }),
    ("no bytes at a bad address", "address_invalid", |lab| {
        lab.desc(0, DATA, ROOM, WRITE | NEXT, 1);
        lab.desc(1, END, 0, WRITE, 0);
    }),
    ("nested table", "indirect_nested", |lab| {
        lab.table(&[(TABLE, 16, INDIRECT, 0)]);
        lab.desc(0, TABLE, 16, INDIRECT, 0);
    }),
    ("table of 17 bytes", "indirect_bad_length", |lab| {
        lab.desc(0, TABLE, 17, INDIRECT, 0);
    }),
    ("readable in a table", "direction_wrong", |lab| {
        lab.table(&[(DATA, ROOM, 0, 0)]);
        lab.desc(0, TABLE, 16, INDIRECT, 0);
    }),
];

fn with_header(seed: usize, len: usize) -> Vec<u8> {
    [vec![0; 12], frame(seed, len)].concat()
}

/// What the guest finds in a buffer: its num_buffers and the frame behind the header.
fn found(lab: &Lab, addr: u64, len: usize) -> (u16, Vec<u8>) {
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
        for &(name, counter, write) in ROWS {
            let mut lab = Lab::new(16, features);
            let mut rx: RxQueue = lab.device();
            write(&lab);
            lab.desc(14, BUFFER, ROOM, WRITE, 0);
            lab.desc(15, BUFFER + 0x1000, ROOM, WRITE, 0);
            let mut heads = [0; 16];
            (heads[1], heads[3]) = (14, 15);
            lab.offer(&heads);
            lab.uplink.feed(with_header(1, 1000));
            lab.uplink.feed(with_header(2, 60));
            let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
            assert_eq!((filled.frames, filled.bytes), (2, 1060), "{name}");
            let used = lab.used();
            let want = [(0, 0), (14, 1012), (0, 0), (15, 72)];
            assert_eq!(used[..4], want, "{name}, {features:#x}");
            assert!(used[4..].iter().all(|e| *e == (0, 0)), "{name}");
            let taken = lab.counted();
            assert!(
                matches!(taken[..], [(c, 2..=14)] if c == counter),
                "{name}: {taken:?}"
            );
            assert_eq!(found(&lab, BUFFER, 1000), (1, frame(1, 1000)), "{name}");
            assert_eq!(
                found(&lab, BUFFER + 0x1000, 60),
                (1, frame(2, 60)),
                "{name}"
            );
            assert_eq!(rx.rewind(), u32::from(lab.ring.used_index()), "{name}");
        }
    }
}

/// Used elements stand in ring order, so the bad one counts as a buffer of the frame around it.
#[test]
fn a_bad_chain_among_the_buffers_of_a_frame_is_an_empty_one_of_them() {
    let mut lab = Lab::new(8, MERGEABLE);
    let mut rx: RxQueue = lab.device();
    lab.desc(0, BUFFER, 64, WRITE, 0);
    lab.desc(1, DATA, 64, 0, 0);
    lab.desc(2, BUFFER + 64, 64, WRITE, 0);
    lab.offer(&[0, 1, 2, 0]);
    lab.uplink.feed(with_header(3, 100));
    assert_eq!(rx.fill(&lab.uplink, 1, 1 << 20).unwrap().frames, 1);
    assert_eq!(lab.used(), [(0, 64), (1, 0), (2, 48)]);
    assert_eq!(lab.counted(), [("direction_wrong", 1)]);
    assert_eq!(found(&lab, BUFFER, 100), (3, frame(3, 100)));
    assert_eq!(rx.rewind(), 3);
}

#[test]
fn without_merging_a_buffer_must_hold_a_header_and_a_frame() {
    for (len, counter) in [
        (12, "rx_buffer_too_small"),
        (25, "rx_buffer_too_small"),
        (26, ""),
    ] {
        let mut lab = Lab::new(8, UNMERGED);
        let mut rx: RxQueue = lab.device();
        lab.desc(0, BUFFER, len, WRITE, 0);
        lab.offer(&[0]);
        lab.uplink.feed(with_header(1, 14));
        rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
        let (element, counted, waiting) = match counter {
            "" => ((0, 26), vec![], 0),
            name => ((0, 0), vec![(name, 1)], 1),
        };
        assert_eq!(lab.used(), [element], "{len} bytes");
        assert_eq!(lab.counted(), counted, "{len} bytes");
        assert_eq!(lab.uplink.waiting().len(), waiting);
    }
}

#[test]
fn a_frame_longer_than_an_unmerged_buffer_is_dropped_and_the_buffer_kept() {
    let mut lab = Lab::new(8, UNMERGED);
    let mut rx: RxQueue = lab.device();
    lab.desc(0, BUFFER, 200, WRITE, 0);
    lab.offer(&[0]);
    lab.ram.write(BUFFER + 200, &[0xaa; 64]).unwrap();
    for len in [189, 65_553, 188] {
        lab.uplink.feed(with_header(len, len));
    }
    let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
    assert_eq!((filled.bytes, filled.end), (188, RxEnd::Starved));
    assert_eq!(lab.used(), [(0, 200)]);
    assert_eq!(lab.counted(), [("dropped_too_long", 2)]);
    assert_eq!(found(&lab, BUFFER, 188), (1, frame(188, 188)));
    let mut behind = [0; 64];
    lab.ram.read(BUFFER + 200, &mut behind).unwrap();
    assert_eq!(behind, [0xaa; 64], "nothing is written behind the buffer");
}

#[test]
fn a_buffer_across_two_regions_is_one_buffer() {
    for features in [MERGEABLE, UNMERGED] {
        for before in [1, 5, 11, 12, 13, 500] {
            let mut lab = Lab::new(2, features);
            let mut rx: RxQueue = lab.device();
            lab.desc(0, JOINED - before, ROOM, WRITE, 0);
            lab.offer(&[0]);
            lab.uplink.feed(with_header(9, 1514));
            assert_eq!(rx.fill(&lab.uplink, 64, 1 << 20).unwrap().frames, 1);
            assert_eq!(lab.used(), [(0, ROOM)]);
            assert_eq!(found(&lab, JOINED - before, 1514), (1, frame(9, 1514)));
        }
    }
}

#[test]
fn frames_wait_while_there_are_no_buffers_and_come_in_order_later() {
    for features in [MERGEABLE, UNMERGED] {
        let mut lab = Lab::new(8, features);
        let mut rx: RxQueue = lab.device();
        for (index, addr) in (0..8).zip((BUFFER..).step_by(0x1000)) {
            lab.desc(index, addr, ROOM, WRITE, 0);
        }
        for seed in 0..40 {
            lab.uplink.feed(with_header(seed, 300));
        }
        let mut seen = 0;
        while seen < 40 {
            // Without new buffers nothing moves, and nothing is lost.
            let starved = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
            assert_eq!((starved.frames, starved.call), (0, false));
            assert_eq!(starved.end, RxEnd::Starved);
            assert_eq!(lab.uplink.waiting().len(), 40 - seen);
            // Then every buffer that the device does not have, in the order they came back.
            let next = lab.ring.avail_index();
            let free = 8 - (next - lab.ring.used_index());
            let heads: Vec<u16> = (next..next + free).map(|at| at % 8).collect();
            lab.offer(&heads);
            let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
            assert!(filled.frames > 0, "{seen} of 40");
            for (id, len) in lab.used() {
                assert_eq!(len, 312);
                let addr = BUFFER + 0x1000 * u64::from(id);
                assert_eq!(found(&lab, addr, 300), (1, frame(seen, 300)));
                seen += 1;
            }
        }
        assert_eq!(seen, 40);
        assert_eq!(lab.counted(), []);
    }
}

/// What a turn costs is bounded by the descriptors it reads.
#[test]
fn a_table_of_65_535_entries_shared_by_1_024_heads_costs_little_at_a_time() {
    let mut lab = Lab::new(1024, FULL);
    let mut rx: RxQueue = lab.device();
    let entries: Vec<_> = (0..u16::MAX)
        .map(|at| (DATA, 1, WRITE | NEXT, at + 1))
        .collect();
    lab.table(&entries);
    for head in 0..1024 {
        lab.desc(head, TABLE, 16 * 65_535, INDIRECT, 0);
    }
    let heads: Vec<u16> = (0..1024).collect();
    lab.offer(&heads);
    lab.uplink.feed(with_header(1, 60));
    let mut done = 0;
    while done < 1024 {
        let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
        let back = lab.used().len();
        // 16,384 descriptors at most, and what the last look at the ring adds to that.
        assert!((1..=20).contains(&back), "{back} at once");
        assert_eq!(filled.frames, 0);
        done += back;
    }
    assert_eq!(lab.counted(), [("chain_too_long", 1024)]);
    assert_eq!(lab.uplink.waiting().len(), 1);
}

/// A descriptor that is refused at sight is work as well.
#[test]
fn a_large_ring_of_heads_refused_at_sight_takes_more_than_one_turn() {
    for (features, counter, len) in [
        (MERGEABLE, "indirect_not_negotiated", 16),
        (FULL, "indirect_bad_length", 0),
        (FULL, "indirect_nested", 16),
        (FULL, "indirect_unmapped", 16 * 65_535),
    ] {
        let mut lab = Lab::new(32_768, features);
        let mut rx: RxQueue = lab.device();
        lab.table(&[(TABLE, 16, INDIRECT, 0)]);
        let addr = if counter == "indirect_unmapped" {
            HOLE
        } else {
            TABLE
        };
        for head in 0..32_768 {
            lab.desc(head, addr, len, INDIRECT, 0);
        }
        let heads: Vec<u16> = (0..32_768).collect();
        lab.offer(&heads);
        lab.uplink.feed(with_header(1, 60));
        let filled = rx.fill(&lab.uplink, 64, 1 << 20).unwrap();
        assert_eq!((filled.frames, filled.end), (0, RxEnd::Budget), "{counter}");
        let back = lab.used().len();
        assert!(back <= 20 * 1024, "{counter}: {back} at once");
        assert_eq!(lab.counted().len(), 1, "{counter}");
    }
}

/// Frames that the guest was given before a fault was met stay given, and the base says so.
#[test]
fn frames_before_a_fault_are_shown_to_the_guest() {
    for features in [MERGEABLE, UNMERGED] {
        let mut lab = Lab::new(64, features);
        let mut rx: RxQueue = lab.device();
        lab.desc(0, BUFFER, ROOM, WRITE, 0);
        let mut heads = vec![0; 60];
        heads.push(64);
        lab.offer(&heads);
        for seed in 0..64 {
            lab.uplink.feed(with_header(seed, 1000));
        }
        let faulted = (0..4).find_map(|_| rx.fill(&lab.uplink, 64, 1 << 20).err());
        assert!(faulted.is_some());
        let base = rx.rewind();
        assert_eq!(base, u32::from(lab.ring.used_index()), "{features:#x}");
        let given = u64::try_from(lab.used().len()).unwrap();
        assert_eq!(lab.stats.frames.get(), given);
    }
}
