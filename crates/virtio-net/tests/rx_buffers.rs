//! Invalid receive buffers, and buffers that run out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{DATA, END, FULL, HOLE, JOINED, PLAIN, SplitRingFixture, TABLE, frame};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtionet_virtio_net::{DeviceQueue, RxEndReason, RxQueue};

const MERGEABLE: u64 = PLAIN | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// All features except mergeable buffers.
const UNMERGED: u64 = FULL & !(1 << VIRTIO_NET_F_MRG_RXBUF);
/// The address and the size of a valid buffer.
const BUFFER: u64 = DATA + 0x10_0000;
const BUFFER_LEN: u32 = 1526;

/// An invalid chain with head 0, and its counter.
type Row = (&'static str, &'static str, fn(&SplitRingFixture));

const ROWS: &[Row] = &[
    ("no bytes", "rx_buffer_too_small", |fixture| {
        fixture.desc(0, DATA, 0, VRING_DESC_F_WRITE, 0);
    }),
    ("1 byte", "rx_buffer_too_small", |fixture| {
        fixture.desc(0, DATA, 1, VRING_DESC_F_WRITE, 0);
    }),
    ("11 bytes", "rx_buffer_too_small", |fixture| {
        fixture.desc(0, DATA, 11, VRING_DESC_F_WRITE, 0);
    }),
    (
        "11 bytes in eleven descriptors",
        "rx_buffer_too_small",
        |fixture| {
            for at in 0..10 {
                fixture.desc(
                    at,
                    DATA + u64::from(at),
                    1,
                    VRING_DESC_F_WRITE | VRING_DESC_F_NEXT,
                    at + 1,
                );
            }
            fixture.desc(10, DATA + 10, 1, VRING_DESC_F_WRITE, 0);
        },
    ),
    ("readable", "direction_wrong", |fixture| {
        fixture.desc(0, DATA, BUFFER_LEN, 0, 0);
    }),
    (
        "readable header, writable rest",
        "direction_wrong",
        |fixture| {
            fixture.desc(0, DATA, 12, VRING_DESC_F_NEXT, 1);
            fixture.desc(1, DATA, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
        },
    ),
    (
        "writable header, readable rest",
        "direction_wrong",
        |fixture| {
            fixture.desc(0, DATA, 12, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
            fixture.desc(1, DATA, BUFFER_LEN, 0, 0);
        },
    ),
    ("self-loop", "chain_loop", |fixture| {
        fixture.desc(
            0,
            DATA,
            BUFFER_LEN,
            VRING_DESC_F_WRITE | VRING_DESC_F_NEXT,
            0,
        );
    }),
    (
        "next outside the ring",
        "chain_next_out_of_range",
        |fixture| {
            fixture.desc(
                0,
                DATA,
                BUFFER_LEN,
                VRING_DESC_F_WRITE | VRING_DESC_F_NEXT,
                77,
            );
        },
    ),
    ("outside memory", "address_invalid", |fixture| {
        fixture.desc(0, END, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
    }),
    ("ends in a hole", "address_invalid", |fixture| {
        fixture.desc(0, HOLE - 1525, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
    }),
    ("wraps", "address_invalid", |fixture| {
        fixture.desc(0, u64::MAX - 9, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
    }),
    ("no bytes at a bad address", "address_invalid", |fixture| {
        fixture.desc(
            0,
            DATA,
            BUFFER_LEN,
            VRING_DESC_F_WRITE | VRING_DESC_F_NEXT,
            1,
        );
        fixture.desc(1, END, 0, VRING_DESC_F_WRITE, 0);
    }),
    ("nested table", "indirect_nested", |fixture| {
        fixture.table(&[(TABLE, 16, VRING_DESC_F_INDIRECT, 0)]);
        fixture.desc(0, TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    }),
    ("table of 17 bytes", "indirect_bad_length", |fixture| {
        fixture.desc(0, TABLE, 17, VRING_DESC_F_INDIRECT, 0);
    }),
    ("readable in a table", "direction_wrong", |fixture| {
        fixture.table(&[(DATA, BUFFER_LEN, 0, 0)]);
        fixture.desc(0, TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    }),
];

fn with_header(seed: usize, len: usize) -> Vec<u8> {
    [vec![0; 12], frame(seed, len)].concat()
}

/// The content of a buffer: num_buffers and the frame behind the header.
fn found(fixture: &SplitRingFixture, addr: u64, len: usize) -> (u16, Vec<u8>) {
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
        for &(name, counter, write) in ROWS {
            let mut fixture = SplitRingFixture::new(16, features);
            let mut rx: RxQueue = fixture.device();
            write(&fixture);
            fixture.desc(14, BUFFER, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
            fixture.desc(15, BUFFER + 0x1000, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
            let mut heads = [0; 16];
            (heads[1], heads[3]) = (14, 15);
            fixture.offer(&heads);
            fixture.uplink.feed(with_header(1, 1000));
            fixture.uplink.feed(with_header(2, 60));
            let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
            assert_eq!((received.frames, received.bytes), (2, 1060), "{name}");
            let used = fixture.used();
            let want = [(0, 0), (14, 1012), (0, 0), (15, 72)];
            assert_eq!(used[..4], want, "{name}, {features:#x}");
            assert!(used[4..].iter().all(|e| *e == (0, 0)), "{name}");
            let taken = fixture.counted();
            assert!(
                matches!(taken[..], [(c, 2..=14)] if c == counter),
                "{name}: {taken:?}"
            );
            assert_eq!(found(&fixture, BUFFER, 1000), (1, frame(1, 1000)), "{name}");
            assert_eq!(
                found(&fixture, BUFFER + 0x1000, 60),
                (1, frame(2, 60)),
                "{name}"
            );
            assert_eq!(rx.rewind(), u32::from(fixture.ring.used_index()), "{name}");
        }
    }
}

/// Chains are used in ring order, so the invalid one counts as a buffer of the frame.
#[test]
fn invalid_chain_among_the_buffers_of_a_frame_is_an_empty_buffer() {
    let mut fixture = SplitRingFixture::new(8, MERGEABLE);
    let mut rx: RxQueue = fixture.device();
    fixture.desc(0, BUFFER, 64, VRING_DESC_F_WRITE, 0);
    fixture.desc(1, DATA, 64, 0, 0);
    fixture.desc(2, BUFFER + 64, 64, VRING_DESC_F_WRITE, 0);
    fixture.offer(&[0, 1, 2, 0]);
    fixture.uplink.feed(with_header(3, 100));
    assert_eq!(rx.receive(&fixture.uplink, 1, 1 << 20).unwrap().frames, 1);
    assert_eq!(fixture.used(), [(0, 64), (1, 0), (2, 48)]);
    assert_eq!(fixture.counted(), [("direction_wrong", 1)]);
    assert_eq!(found(&fixture, BUFFER, 100), (3, frame(3, 100)));
    assert_eq!(rx.rewind(), 3);
}

#[test]
fn unmergeable_buffer_must_hold_a_header_and_a_frame() {
    for (len, counter) in [
        (12, "rx_buffer_too_small"),
        (25, "rx_buffer_too_small"),
        (26, ""),
    ] {
        let mut fixture = SplitRingFixture::new(8, UNMERGED);
        let mut rx: RxQueue = fixture.device();
        fixture.desc(0, BUFFER, len, VRING_DESC_F_WRITE, 0);
        fixture.offer(&[0]);
        fixture.uplink.feed(with_header(1, 14));
        rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
        let (element, counted, waiting) = match counter {
            "" => ((0, 26), vec![], 0),
            name => ((0, 0), vec![(name, 1)], 1),
        };
        assert_eq!(fixture.used(), [element], "{len} bytes");
        assert_eq!(fixture.counted(), counted, "{len} bytes");
        assert_eq!(fixture.uplink.waiting().len(), waiting);
    }
}

#[test]
fn frame_longer_than_an_unmergeable_buffer_is_dropped_and_the_buffer_kept() {
    let mut fixture = SplitRingFixture::new(8, UNMERGED);
    let mut rx: RxQueue = fixture.device();
    fixture.desc(0, BUFFER, 200, VRING_DESC_F_WRITE, 0);
    fixture.offer(&[0]);
    fixture.ram.write(BUFFER + 200, &[0xaa; 64]).unwrap();
    for len in [189, 65_557, 188] {
        fixture.uplink.feed(with_header(len, len));
    }
    let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
    assert_eq!((received.bytes, received.end), (188, RxEndReason::Starved));
    assert_eq!(fixture.used(), [(0, 200)]);
    assert_eq!(fixture.counted(), [("dropped_too_long", 2)]);
    assert_eq!(found(&fixture, BUFFER, 188), (1, frame(188, 188)));
    let mut behind = [0; 64];
    fixture.ram.read(BUFFER + 200, &mut behind).unwrap();
    assert_eq!(behind, [0xaa; 64], "a byte was written behind the buffer");
}

#[test]
fn buffer_across_two_regions_is_one_buffer() {
    for features in [MERGEABLE, UNMERGED] {
        for before in [1, 5, 11, 12, 13, 500] {
            let mut fixture = SplitRingFixture::new(2, features);
            let mut rx: RxQueue = fixture.device();
            fixture.desc(0, JOINED - before, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
            fixture.offer(&[0]);
            fixture.uplink.feed(with_header(9, 1514));
            assert_eq!(rx.receive(&fixture.uplink, 64, 1 << 20).unwrap().frames, 1);
            assert_eq!(fixture.used(), [(0, BUFFER_LEN)]);
            assert_eq!(found(&fixture, JOINED - before, 1514), (1, frame(9, 1514)));
        }
    }
}

#[test]
fn frames_wait_without_buffers_and_arrive_in_order_later() {
    for features in [MERGEABLE, UNMERGED] {
        let mut fixture = SplitRingFixture::new(8, features);
        let mut rx: RxQueue = fixture.device();
        for (index, addr) in (0..8).zip((BUFFER..).step_by(0x1000)) {
            fixture.desc(index, addr, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
        }
        for seed in 0..40 {
            fixture.uplink.feed(with_header(seed, 300));
        }
        let mut seen = 0;
        while seen < 40 {
            // Without new buffers no frame moves, and none is lost.
            let starved = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
            assert_eq!((starved.frames, starved.should_call), (0, false));
            assert_eq!(starved.end, RxEndReason::Starved);
            assert_eq!(fixture.uplink.waiting().len(), 40 - seen);
            // Then all free buffers are added, in the order in which they were used.
            let next = fixture.ring.avail_index();
            let free = 8 - (next - fixture.ring.used_index());
            let heads: Vec<u16> = (next..next + free).map(|at| at % 8).collect();
            fixture.offer(&heads);
            let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
            assert!(received.frames > 0, "{seen} of 40");
            for (id, len) in fixture.used() {
                assert_eq!(len, 312);
                let addr = BUFFER + 0x1000 * u64::from(id);
                assert_eq!(found(&fixture, addr, 300), (1, frame(seen, 300)));
                seen += 1;
            }
        }
        assert_eq!(seen, 40);
        assert_eq!(fixture.counted(), []);
    }
}

/// The cost of a call is bounded by the descriptors that it reads.
#[test]
fn table_of_65_535_entries_shared_by_1_024_heads_has_a_bounded_cost_per_call() {
    let mut fixture = SplitRingFixture::new(1024, FULL);
    let mut rx: RxQueue = fixture.device();
    let entries: Vec<_> = (0..u16::MAX)
        .map(|at| (DATA, 1, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, at + 1))
        .collect();
    fixture.table(&entries);
    for head in 0..1024 {
        fixture.desc(head, TABLE, 16 * 65_535, VRING_DESC_F_INDIRECT, 0);
    }
    let heads: Vec<u16> = (0..1024).collect();
    fixture.offer(&heads);
    fixture.uplink.feed(with_header(1, 60));
    let mut done = 0;
    while done < 1024 {
        let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
        let back = fixture.used().len();
        // A call reads at most 16,384 descriptors, and those of its last dequeue.
        assert!((1..=20).contains(&back), "{back} at once");
        assert_eq!(received.frames, 0);
        done += back;
    }
    assert_eq!(fixture.counted(), [("chain_too_long", 1024)]);
    assert_eq!(fixture.uplink.waiting().len(), 1);
}

/// Reading a descriptor that is refused at once is work as well.
#[test]
fn large_ring_of_invalid_heads_takes_more_than_one_call() {
    for (features, counter, len) in [
        (MERGEABLE, "indirect_not_negotiated", 16),
        (FULL, "indirect_bad_length", 0),
        (FULL, "indirect_nested", 16),
        (FULL, "indirect_unmapped", 16 * 65_535),
    ] {
        let mut fixture = SplitRingFixture::new(32_768, features);
        let mut rx: RxQueue = fixture.device();
        fixture.table(&[(TABLE, 16, VRING_DESC_F_INDIRECT, 0)]);
        let addr = if counter == "indirect_unmapped" {
            HOLE
        } else {
            TABLE
        };
        for head in 0..32_768 {
            fixture.desc(head, addr, len, VRING_DESC_F_INDIRECT, 0);
        }
        let heads: Vec<u16> = (0..32_768).collect();
        fixture.offer(&heads);
        fixture.uplink.feed(with_header(1, 60));
        let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
        assert_eq!(
            (received.frames, received.end),
            (0, RxEndReason::Budget),
            "{counter}"
        );
        let back = fixture.used().len();
        assert!(back <= 20 * 1024, "{counter}: {back} at once");
        assert_eq!(fixture.counted().len(), 1, "{counter}");
    }
}

/// Frames that were received before a fault stay with the guest, and the base includes them.
#[test]
fn frames_before_a_fault_are_published() {
    for features in [MERGEABLE, UNMERGED] {
        let mut fixture = SplitRingFixture::new(64, features);
        let mut rx: RxQueue = fixture.device();
        fixture.desc(0, BUFFER, BUFFER_LEN, VRING_DESC_F_WRITE, 0);
        let mut heads = vec![0; 60];
        heads.push(64);
        fixture.offer(&heads);
        for seed in 0..64 {
            fixture.uplink.feed(with_header(seed, 1000));
        }
        let faulted = (0..4).find_map(|_| rx.receive(&fixture.uplink, 64, 1 << 20).err());
        assert!(faulted.is_some());
        let base = rx.rewind();
        assert_eq!(base, u32::from(fixture.ring.used_index()), "{features:#x}");
        let given = u64::try_from(fixture.used().len()).unwrap();
        assert_eq!(fixture.stats.frames.get(), given);
    }
}
