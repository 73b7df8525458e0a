//! A guest that rewrites its descriptors, tables, headers and indices while the device reads them.
//!
//! Each rewrite alternates between a valid and an invalid value. Whatever the device reads, it must
//! check the copy that it then uses: no frame has an invalid header or bytes from elsewhere, and no
//! byte is written outside of the buffers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{DATA, END, FULL, SentFrame, SetOnDrop, SplitRingFixture, TABLE, frame};
use virtionet_guest::header::{NetHeader, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4};
use virtionet_guest::memory::{Area, GuestRam};
use virtionet_guest::split::{
    SplitDescriptor, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::{MAX_FRAME, MIN_FRAME};
use virtionet_virtio_net::{DeviceQueue, RxQueue, TxQueue};

const SIZE: u16 = 16;
/// The shortest duration of a race.
const LEAST: Duration = Duration::from_millis(300);
/// The longest duration of a race, in which both outcomes must occur.
const MOST: Duration = Duration::from_secs(20);

/// Runs `write` again and again on a thread of its own, with a rising number, while `step` runs
/// here, until both outcomes that `step` reports (valid, invalid) have occurred.
fn race(write: impl Fn(usize) + Sync, mut step: impl FnMut() -> (bool, bool)) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let rounds = (0..).take_while(|_| !done.load(Ordering::Relaxed));
            rounds.for_each(&write);
        });
        let _done = SetOnDrop(&done);
        let begin = Instant::now();
        let (mut good, mut bad) = (false, false);
        while begin.elapsed() < LEAST || !(good && bad) && begin.elapsed() < MOST {
            let seen = step();
            good |= seen.0;
            bad |= seen.1;
        }
        assert!(good && bad, "good seen: {good}, bad seen: {bad}");
    });
}

/// A view of the fixture's descriptor table that another thread may write through.
fn table(ram: &GuestRam, fixture: &SplitRingFixture) -> Area {
    let bytes = 16 * u64::from(SIZE);
    ram.area(fixture.ring.addresses().descriptors, bytes)
        .unwrap()
}

fn whole(carried: &SentFrame) {
    assert_eq!(carried.bytes.len(), carried.len);
    assert!((MIN_FRAME..=MAX_FRAME).contains(&carried.len));
    let checked = carried.header.check(carried.len, Features(FULL));
    assert_eq!(checked, Ok(()), "{:?}", carried.header);
}

/// Makes every head available once; valid: a frame passed, invalid: a chain was refused.
fn send_all(fixture: &mut SplitRingFixture, tx: &mut TxQueue) -> (bool, bool) {
    let heads: Vec<u16> = (0..SIZE).collect();
    fixture.offer(&heads);
    let mut chains = 0;
    while chains < usize::from(SIZE) {
        chains += tx.send(Some(&fixture.uplink)).unwrap().chains;
    }
    let want: Vec<_> = (0..u32::from(SIZE)).map(|head| (head, 0)).collect();
    assert_eq!(fixture.used(), want);
    let carried = fixture.uplink.sent();
    carried.iter().for_each(whole);
    let refused: u64 = fixture.counted().iter().map(|(_, n)| n).sum();
    let passed = u64::try_from(carried.len()).unwrap();
    assert_eq!(passed + refused, u64::from(SIZE));
    (passed > 0, refused > 0)
}

#[test]
fn tx_headers_that_change_while_they_are_read() {
    let mut fixture = SplitRingFixture::new(SIZE, FULL);
    let mut tx: TxQueue = fixture.device();
    let segments = NetHeader {
        flags: VIRTIO_NET_HDR_F_NEEDS_CSUM,
        gso_type: VIRTIO_NET_HDR_GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    let bad = NetHeader {
        gso_size: 0,
        csum_start: u16::MAX,
        ..segments
    };
    let mut areas = Vec::new();
    for (index, addr) in (0..SIZE).zip((DATA..).step_by(0x1000)) {
        fixture.ram.write(addr + 12, &frame(0, 3000)).unwrap();
        fixture.desc(index, addr, 3012, 0, 0);
        areas.push(fixture.ram.area(addr, 12).unwrap());
    }
    let headers = [segments.to_bytes(), [0; 12], bad.to_bytes()];
    race(
        |round| {
            for (at, area) in areas.iter().enumerate() {
                area.write(0, &headers[(round + at) % 3]);
            }
        },
        || send_all(&mut fixture, &mut tx),
    );
}

/// The values that a descriptor may have at any moment: valid, outside of memory, too long, of the
/// wrong direction, a loop, an index outside of the ring, a table.
fn variants(at: u16, flag: u16) -> [SplitDescriptor; 8] {
    let addr = DATA + 0x1000 * u64::from(at);
    [
        SplitDescriptor::new(addr, 72, flag, 0),
        SplitDescriptor::new(END - 10, 72, flag, 0),
        SplitDescriptor::new(addr, u32::MAX, flag, 0),
        SplitDescriptor::new(addr, 72, flag ^ VRING_DESC_F_WRITE, 0),
        SplitDescriptor::new(addr, 72, flag | VRING_DESC_F_NEXT, at),
        SplitDescriptor::new(addr, 72, flag | VRING_DESC_F_NEXT, SIZE + at),
        SplitDescriptor::new(addr, 72, flag | VRING_DESC_F_NEXT, (at + 1) % SIZE),
        SplitDescriptor::new(TABLE, 64, VRING_DESC_F_INDIRECT, 0),
    ]
}

#[test]
fn tx_descriptors_that_change_while_they_are_read() {
    let mut fixture = SplitRingFixture::new(SIZE, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.table(&[
        (DATA, 12, VRING_DESC_F_NEXT, 1),
        (DATA + 12, 60, 0, 0),
        (0, 0, 0, 0),
        (0, 0, 0, 0),
    ]);
    let area = table(&fixture.ram, &fixture);
    race(
        |round| {
            for at in 0..SIZE {
                let next = variants(at, 0)[(round + usize::from(at)) % 8];
                next.store(&area, 16 * usize::from(at));
            }
        },
        || send_all(&mut fixture, &mut tx),
    );
}

#[test]
fn indirect_tables_that_change_while_they_are_read() {
    let mut fixture = SplitRingFixture::new(SIZE, FULL);
    let mut tx: TxQueue = fixture.device();
    for index in 0..SIZE {
        fixture.desc(index, TABLE, 16 * 4, VRING_DESC_F_INDIRECT, 0);
    }
    let area = fixture.ram.area(TABLE, 64).unwrap();
    race(
        |round| {
            for at in 0..4u16 {
                let mut next = variants(at, 0)[(round / 3 + usize::from(at) * round) % 8];
                next.next %= 5;
                next.store(&area, 16 * usize::from(at));
            }
        },
        || send_all(&mut fixture, &mut tx),
    );
}

/// The buffers are in the first pages at `DATA`, with canaries between them.
#[test]
fn rx_descriptors_that_change_while_buffers_are_filled() {
    let mut fixture = SplitRingFixture::new(SIZE, FULL);
    let mut rx: RxQueue = fixture.device();
    for index in 0..SIZE {
        variants(index, VRING_DESC_F_WRITE)[0]
            .store(&table(&fixture.ram, &fixture), 16 * usize::from(index));
    }
    fixture.table(&[(DATA, 72, VRING_DESC_F_WRITE, 0); 4]);
    // Canaries follow every buffer, and there is one at the end of memory.
    let canary = [0xa5; 0x800];
    for page in (DATA..).step_by(0x1000).take(usize::from(SIZE)) {
        fixture.ram.write(page + 72, &canary).unwrap();
    }
    fixture.ram.write(END - 0x800, &canary).unwrap();
    let area = table(&fixture.ram, &fixture);
    race(
        |round| {
            for at in 0..SIZE {
                // All variants except the one whose length covers the canaries.
                let which = [0, 1, 0, 3, 4, 5, 6, 7][(round + usize::from(at)) % 8];
                variants(at, VRING_DESC_F_WRITE)[which].store(&area, 16 * usize::from(at));
            }
        },
        || {
            let heads: Vec<u16> = (0..SIZE).collect();
            fixture.offer(&heads);
            while fixture.uplink.waiting().len() < 32 {
                fixture.uplink.feed([vec![0; 12], frame(1, 48)].concat());
            }
            let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
            // Rewind everything, so that the next step can make all buffers available again.
            let base = rx.rewind();
            let used = fixture.used();
            assert_eq!(base, u32::from(fixture.ring.used_index()));
            fixture.rewind_to(base);
            assert!(used.iter().all(|(id, len)| *id < 16 && *len <= 72 * 16));
            let refused: u64 = fixture.counted().iter().map(|(_, n)| n).sum();
            (received.frames > 0, refused > 0)
        },
    );
    let mut back = canary;
    for page in (DATA..).step_by(0x1000).take(usize::from(SIZE)) {
        fixture.ram.read(page + 72, &mut back).unwrap();
        assert_eq!(back, canary);
    }
    fixture.ram.read(END - 0x800, &mut back).unwrap();
    assert_eq!(back, canary);
}

/// A wrong index is a fault, a right one moves frames, and a ring that is configured again works.
#[test]
fn indices_and_heads_that_change_while_they_are_read() {
    let mut fixture = SplitRingFixture::new(SIZE, FULL);
    for index in 0..SIZE {
        fixture.readable(index, &common::good());
    }
    let at = fixture.ring.addresses();
    let avail = fixture
        .ram
        .area(at.driver, 6 + 2 * u64::from(SIZE))
        .unwrap();
    let mut tx: TxQueue = fixture.device();
    race(
        |round| {
            let word = u16::try_from(round % 65_536).unwrap();
            avail.release(2, word / 4);
            avail.set(4 + 2 * (round % 16), word % 19);
            avail.release(4 + 2 * 16, word);
        },
        || match tx.send(Some(&fixture.uplink)) {
            Ok(sent) => {
                assert!(sent.chains <= usize::from(SIZE));
                fixture.uplink.sent().iter().for_each(whole);
                assert_eq!(fixture.counted(), []);
                (sent.chains > 0, false)
            }
            Err(_) => {
                let base = u32::from(avail.acquire(2));
                tx.rewind();
                fixture.ring.set_used_index(avail.acquire(2));
                tx = TxQueue::new(fixture.config(base)).unwrap();
                (false, true)
            }
        },
    );
}
