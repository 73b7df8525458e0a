//! Virtqueues of a guest behind an IOMMU, whose addresses a test translates, or not.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use virtionet_guest::driver::Buf;
use virtionet_guest::iommu::to_distant_regions;
use virtionet_guest::memory::GuestRam;
use virtionet_virtqueue::memory::{
    Access, DirtyLog, GuestMemory, Iotlb, IovaRange, MappedRegion, RegionSpec, Translation,
};
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig, VirtqueueLayout};

use common::{DATA, Guest, SLOT, Setup};

const PAGE: u64 = 4096;

/// A guest, and a device that knows its memory only by translated addresses.
struct Translated {
    guest: Guest,
    iotlb: Arc<Iotlb>,
    memory: Arc<GuestMemory>,
    config: VirtqueueConfig,
}

impl Translated {
    fn new(packed: bool, direction: Direction) -> Self {
        Self::with_size(packed, direction, 64)
    }

    fn with_size(packed: bool, direction: Direction, size: u16) -> Self {
        let guest = Guest::new(Setup {
            size,
            packed,
            event_idx: false,
            start: 0,
            direction,
        });
        let iotlb = Arc::new(Iotlb::new(|| ()));
        let map = |spec: RegionSpec| {
            let file = guest.ram.file().try_clone().unwrap();
            Arc::new(MappedRegion::map(spec, file).unwrap())
        };
        let regions = to_distant_regions(guest.ram.regions());
        let memory = GuestMemory::new(regions.into_iter().map(map).collect()).unwrap();
        let at = guest.ring.addresses();
        let layout = VirtqueueLayout {
            size: guest.config.layout.size,
            desc: at.descriptors,
            avail: at.driver,
            used: at.device,
        };
        Self {
            iotlb: Arc::clone(&iotlb),
            memory: Arc::new(memory.with_iotlb(Some(iotlb))),
            config: VirtqueueConfig {
                layout,
                ..guest.config
            },
            guest,
        }
    }

    /// Translates a page to `to`, a guest address of the driver.
    fn map_to(&self, iova: u64, to: u64, access: Access) {
        self.iotlb.update(Translation {
            range: IovaRange::new(iova, PAGE).unwrap(),
            user_addr: self.guest.ram.user_addr(to).unwrap(),
            access,
        });
    }

    fn map(&self, iova: u64, access: Access) {
        self.map_to(iova, iova, access);
    }

    /// Translates the pages of the ring itself.
    fn map_ring(&self) {
        let areas = self.config.layout.areas(self.config.packed);
        while !self.memory.knows_areas(&areas) {
            for miss in self.iotlb.take_misses() {
                assert_eq!(miss.access, Access::ReadWrite);
                self.map(miss.iova, miss.access);
            }
        }
    }

    fn device(&self) -> (Virtqueue, Burst) {
        self.map_ring();
        let queue = Virtqueue::new(self.config, &self.memory).unwrap();
        let burst = Burst::with_direction(Arc::clone(&self.memory), self.config.direction);
        (queue, burst)
    }

    fn misses(&self) -> Vec<(u64, Access)> {
        let misses = self.iotlb.take_misses().into_iter();
        misses.map(|miss| (miss.iova, miss.access)).collect()
    }
}

fn slot(n: u64) -> u64 {
    DATA + n * SLOT
}

#[test]
fn virtqueue_cannot_be_made_before_its_areas_are_translated() {
    for packed in [false, true] {
        let guest = Translated::new(packed, Direction::Readable);
        assert!(Virtqueue::new(guest.config, &guest.memory).is_err());
        let areas = guest.config.layout.areas(packed);
        assert!(!guest.memory.knows_areas(&areas));
        guest.map_ring();
        assert!(Virtqueue::new(guest.config, &guest.memory).is_ok());
        // Reading alone is not enough.
        guest.map(guest.config.layout.desc & !(PAGE - 1), Access::Read);
        assert!(!guest.memory.knows_areas(&areas));
        assert!(Virtqueue::new(guest.config, &guest.memory).is_err());
    }
}

#[test]
fn chain_without_translation_stays_available_and_is_dequeued_when_it_has_come() {
    for packed in [false, true] {
        let mut guest = Translated::new(packed, Direction::Readable);
        let (mut queue, mut burst) = guest.device();
        for (n, byte) in (0..4).zip(7..) {
            guest.guest.ram.write(slot(n), &[byte; 100]).unwrap();
            let buffers = [Buf::readable(slot(n), 100)];
            guest.guest.ring.add(&buffers, false, n).unwrap();
        }
        guest.guest.ring.publish();
        guest.map(slot(0), Access::Read);
        guest.map(slot(2), Access::Read);

        assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
        assert!(burst.waits_for_translation());
        // All that is missing is asked for at once.
        let read = Access::Read;
        assert_eq!(guest.misses(), [(slot(1), read), (slot(3), read)]);
        let base = queue.base();
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
        assert!(burst.waits_for_translation() && queue.has_more());
        assert_eq!(queue.base(), base);
        assert_eq!(guest.misses(), []);

        guest.map(slot(1), Access::Read);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(2));
        guest.map(slot(3), Access::Read);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
        assert!(!burst.waits_for_translation());
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
        for (chain, byte) in burst.chains().iter().zip(7..) {
            let mut bytes = [0; 100];
            assert_eq!(burst.slices(chain)[0].copy_to(&mut bytes), 100);
            assert_eq!((chain.fault(), bytes), (None, [byte; 100]));
        }
        queue.complete_all(burst.chains());
        burst.clear();
        let _ = queue.publish();
        let mut used = Vec::new();
        let ring = &mut guest.guest.ring;
        ring.collect(|token, _| used.push(token)).unwrap();
        assert_eq!(used, [0, 1, 2, 3]);
    }
}

#[test]
fn buffer_across_pages_is_one_segment_only_where_its_pages_follow_each_other() {
    let mut guest = Translated::new(false, Direction::Writable);
    let (mut queue, mut burst) = guest.device();
    let buffer = [Buf::writable(slot(0) + 4000, 2 * 4096)];
    guest.guest.ring.add(&buffer, false, 0).unwrap();
    guest.guest.ring.publish();
    assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
    let write = Access::Write;
    let wanted = [0, 1, 2].map(|n| (slot(n), write));
    assert_eq!(guest.misses(), wanted);
    for (second, lens) in [(1, vec![8192]), (8, vec![96, 4096, 4000])] {
        guest.iotlb.invalidate(IovaRange::ALL);
        burst.forget_translations();
        guest.map(slot(0), write);
        guest.map_to(slot(1), slot(second), write);
        guest.map(slot(2), write);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
        let slices = burst.slices(&burst.chains()[0]);
        let got: Vec<usize> = slices.iter().map(|slice| slice.len()).collect();
        assert_eq!(got, lens);
        queue.rewind(&mut burst);
    }
}

#[test]
fn permission_of_a_page_is_that_of_the_buffers_direction() {
    for (direction, wrong, right) in [
        (Direction::Readable, Access::Write, Access::Read),
        (Direction::Writable, Access::Read, Access::Write),
    ] {
        let mut guest = Translated::new(false, direction);
        let (mut queue, mut burst) = guest.device();
        let buffer = match direction {
            Direction::Readable => Buf::readable(slot(0), 100),
            Direction::Writable => Buf::writable(slot(0), 100),
        };
        guest.guest.ring.add(&[buffer], false, 0).unwrap();
        guest.guest.ring.publish();
        guest.map(slot(0), wrong);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
        assert_eq!(guest.misses(), [(slot(0), right)]);
        guest.map(slot(0), right);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
    }
}

#[test]
fn indirect_table_is_translated_for_reading() {
    for packed in [false, true] {
        let mut guest = Translated::new(packed, Direction::Writable);
        let (mut queue, mut burst) = guest.device();
        // The table must not lie on a page of the virtqueue.
        let is_in_use = |addr: u64| guest.iotlb.find(addr, Access::Read).is_some();
        while is_in_use(guest.guest.ram.alloc(16, 16).unwrap() + 16) {}
        let buffers = [0, 1].map(|n| Buf::writable(slot(n), 100));
        guest.guest.ring.add(&buffers, true, 0).unwrap();
        guest.guest.ring.publish();
        guest.map(slot(0), Access::Write);
        guest.map(slot(1), Access::Write);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
        let misses = guest.misses();
        assert_eq!(misses.len(), 1);
        let (table, access) = misses[0];
        assert_eq!(access, Access::Read);
        guest.map(table, Access::Write);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
        guest.map(table, Access::Read);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
        assert_eq!(burst.chains()[0].len(), 200);
    }
}

#[test]
fn translation_that_was_taken_back_is_not_used_again() {
    for packed in [false, true] {
        let mut guest = Translated::new(packed, Direction::Readable);
        let (mut queue, mut burst) = guest.device();
        let add = |guest: &mut Translated| {
            let buffers = [Buf::readable(slot(0), 100)];
            guest.guest.ring.add(&buffers, false, 0).unwrap();
            guest.guest.ring.publish();
        };
        add(&mut guest);
        guest.map(slot(0), Access::Read);
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
        queue.rewind(&mut burst);
        guest.iotlb.invalidate(IovaRange::new(slot(0), 1).unwrap());
        burst.forget_translations();
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
        guest.map_to(slot(0), slot(5), Access::Read);
        guest.guest.ram.write(slot(5), &[5; 100]).unwrap();
        assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
        let mut bytes = [0; 100];
        burst.slices(&burst.chains()[0])[0].copy_to(&mut bytes);
        assert_eq!(bytes, [5; 100]);
    }
}

#[test]
fn buffer_of_endless_pages_is_asked_for_in_part_and_does_not_hold_the_device() {
    let mut guest = Translated::new(false, Direction::Readable);
    let (mut queue, mut burst) = guest.device();
    let huge = [Buf::readable(1 << 50, u32::MAX)];
    guest.guest.ring.add(&huge, false, 0).unwrap();
    let wrapping = [Buf::readable(u64::MAX - 10, 100)];
    guest.guest.ring.add(&wrapping, false, 1).unwrap();
    guest.guest.ring.publish();
    assert_eq!(queue.dequeue(&mut burst, 64), Ok(0));
    assert!(burst.waits_for_translation());
    assert!((1..=64).contains(&guest.misses().len()));
}

/// The pages of the virtqueue and of a few slots, each in a region of its own, in reverse order and with
/// holes between them: (guest address of the driver, region).
fn scattered_pages(guest: &Translated) -> Vec<(u64, RegionSpec)> {
    let areas = guest.config.layout.areas(guest.config.packed);
    let ring = areas
        .iter()
        .flat_map(|area| area.first() / PAGE..=area.last() / PAGE);
    let slots = (0..4).map(|n| slot(n) / PAGE);
    let pages: BTreeSet<u64> = ring.chain(slots).collect();
    let pages = pages.into_iter().rev().zip(1..);
    pages
        .map(|(page, n)| {
            let spec = RegionSpec {
                guest_addr: n * 3 * PAGE,
                size: PAGE,
                user_addr: n * 2 * PAGE,
                file_offset: page * PAGE,
            };
            (page * PAGE, spec)
        })
        .collect()
}

#[test]
fn virtqueue_whose_pages_are_scattered_works_and_is_logged_like_any_other() {
    for packed in [false, true] {
        let mut guest = Translated::with_size(packed, Direction::Readable, 512);
        let pages = scattered_pages(&guest);
        let map = |spec: RegionSpec| {
            let file = guest.guest.ram.file().try_clone().unwrap();
            Arc::new(MappedRegion::map(spec, file).unwrap())
        };
        let regions = pages.iter().map(|(_, spec)| map(*spec)).collect();
        let log_file = GuestRam::new(4096).unwrap();
        let log = DirtyLog::map(log_file.file().try_clone().unwrap(), 4096, 0).unwrap();
        let memory = GuestMemory::new(regions).unwrap();
        let memory = memory.with_log(Some(Arc::new(log))).unwrap();
        guest.memory = Arc::new(memory.with_iotlb(Some(Arc::clone(&guest.iotlb))));
        for (iova, spec) in &pages {
            guest.iotlb.update(Translation {
                range: IovaRange::new(*iova, PAGE).unwrap(),
                user_addr: spec.user_addr,
                access: Access::ReadWrite,
            });
        }
        let layout = guest.config.layout;
        assert!(guest.memory.user_array::<u64>(layout.desc, 1024).is_some());
        // The mapping in one piece does not report accesses to missing pages.
        let in_postcopy = guest.memory.with_log(None).unwrap().with_postcopy(true);
        assert!(in_postcopy.user_array::<u64>(layout.desc, 1024).is_none());
        let (mut queue, mut burst) = guest.device();
        queue.set_used_log(Some(layout.used), &guest.memory);
        // What is used is near the start and near the end of each area.
        for n in 0..3 * 512 {
            let buffers = [Buf::readable(slot(n % 4), 100)];
            guest.guest.ring.add(&buffers, false, n).unwrap();
            guest.guest.ring.publish();
            assert_eq!(queue.dequeue(&mut burst, 64), Ok(1));
            queue.complete_all(burst.chains());
            burst.clear();
            let _ = queue.publish();
            let mut used = Vec::new();
            let ring = &mut guest.guest.ring;
            ring.collect(|token, _| used.push(token)).unwrap();
            assert_eq!(used, [n]);
        }
        let mut bits = [0; 64];
        log_file.read(0, &mut bits).unwrap();
        let is_logged = |page: u64| {
            let page = page / PAGE;
            bits[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1
        };
        let written = match packed {
            true => IovaRange::new(layout.desc, 16 * 512),
            false => IovaRange::new(layout.used, 4 + 8 * 512),
        };
        for (iova, spec) in &pages {
            let is_written = IovaRange::new(*iova, PAGE)
                .unwrap()
                .overlaps(written.unwrap());
            assert_eq!(is_logged(spec.guest_addr), is_written, "{iova:#x} {packed}");
        }
    }
}
