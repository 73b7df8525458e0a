//! Both formats compared with a model: a driver and a device take random steps in random order.
//! After each step, each must see what the other did, and be notified exactly when it must be.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::VecDeque;

use common::event_suppression::EventSuppression;
use common::{DATA, Guest, SLOT, SLOTS, Setup};
use proptest::prelude::*;
use virtionet_guest::driver::{Buf, DriverVirtqueueError};
use virtionet_virtqueue::{Burst, Direction, Virtqueue};

/// The next step of the driver or the device.
#[derive(Debug, Clone)]
enum Op {
    /// The driver writes a chain of buffers of these lengths.
    Add { lens: Vec<u16>, indirect: bool },
    /// The driver publishes the added chains and decides whether to kick.
    DriverPublish,
    /// The driver collects the used chains.
    Collect,
    /// The driver enables or disables calls.
    Calls(bool),
    /// The device dequeues up to this many chains.
    Dequeue(usize),
    /// The device finds up to `most` chains of one buffer of at least `min` bytes and at most `max`,
    /// and completes up to `take` of them.
    Singles {
        most: usize,
        take: usize,
        min: usize,
        max: u32,
    },
    /// The device completes up to this many chains, some of them filled in part.
    Complete(usize),
    /// The device completes up to this many chains with one call, without writing to them.
    CompleteAll(usize),
    /// The device fills chains one after the other with up to this many bytes and completes them.
    Fill(usize),
    /// The device publishes the completed chains and decides whether to call.
    Publish,
    /// The device enables or disables kicks.
    Kicks(bool),
    /// The device rewinds the chains that it has not completed.
    Rewind,
    /// The device continues in a new snapshot of memory.
    Rebind,
    /// The device stops, and another one continues at its base.
    Restart,
    /// The device crashes, and another one continues at the base that the driver derives.
    Crash,
}

fn ops() -> impl Strategy<Value = Op> {
    let lens = prop::collection::vec(prop_oneof![1 => Just(0u16), 9 => 1u16..400], 1..9);
    let single = prop_oneof![1 => Just(0u16), 9 => 100u16..400];
    let limits = (
        prop_oneof![0usize..200, Just(0)],
        prop_oneof![50u32..400, Just(u32::MAX)],
    );
    let singles = (0usize..80, 0usize..80, limits);
    prop_oneof![
        8 => (lens, any::<bool>()).prop_map(|(lens, indirect)| Op::Add { lens, indirect }),
        12 => single.prop_map(|len| Op::Add { lens: vec![len], indirect: false }),
        6 => singles.prop_map(|(most, take, (min, max))| Op::Singles { most, take, min, max }),
        5 => Just(Op::DriverPublish),
        4 => Just(Op::Collect),
        2 => any::<bool>().prop_map(Op::Calls),
        5 => (0usize..80).prop_map(Op::Dequeue),
        4 => (0usize..80).prop_map(Op::Complete),
        2 => (0usize..80).prop_map(Op::CompleteAll),
        2 => (0usize..4000).prop_map(Op::Fill),
        4 => Just(Op::Publish),
        2 => any::<bool>().prop_map(Op::Kicks),
        1 => Just(Op::Rewind),
        1 => Just(Op::Rebind),
        1 => Just(Op::Restart),
        1 => Just(Op::Crash),
    ]
}

fn setups() -> impl Strategy<Value = Setup> {
    let formats = prop_oneof![
        3 => prop::sample::select(vec![1, 2, 3, 4, 5, 7, 8, 256]).prop_map(|size| (true, size)),
        1 => prop::sample::select(vec![2, 4, 8, 256]).prop_map(|size| (false, size)),
    ];
    let starts = prop_oneof![Just(0), 0..600u16, 65_500u16..];
    (formats, starts, any::<bool>(), any::<bool>()).prop_map(|(format, start, event_idx, tx)| {
        let (packed, size) = format;
        Setup {
            size,
            packed,
            event_idx,
            start,
            direction: match tx {
                true => Direction::Readable,
                false => Direction::Writable,
            },
        }
    })
}

/// A chain that the driver added.
#[derive(Debug, Clone)]
struct TestChain {
    token: u64,
    lens: Vec<u16>,
    indirect: bool,
    descriptors: u16,
    /// The number of bytes that the device reports as written.
    written: usize,
}

impl TestChain {
    fn addr(&self) -> u64 {
        DATA + self.token % SLOTS * SLOT
    }

    fn len(&self) -> usize {
        self.lens.iter().map(|len| usize::from(*len)).sum()
    }

    /// The content that a side writes: 0 is the driver, 1 the device.
    fn bytes(&self, side: u64) -> Vec<u8> {
        let byte = |at: u64| u8::try_from((self.token * 31 + side * 101 + at * 7) % 251).unwrap();
        (0..).map(byte).take(self.len()).collect()
    }
}

/// Driver and device, and the chains by their progress.
struct Model {
    setup: Setup,
    guest: Guest,
    ring: Virtqueue,
    burst: Burst,
    next: u64,
    added: VecDeque<TestChain>,
    available: VecDeque<TestChain>,
    taken: VecDeque<TestChain>,
    completed: VecDeque<TestChain>,
    used: VecDeque<TestChain>,
    kicks: EventSuppression,
    calls: EventSuppression,
}

impl Model {
    fn new(setup: Setup) -> Self {
        let guest = Guest::new(setup);
        let (ring, burst) = guest.device(guest.ring.base());
        Self {
            setup,
            guest,
            ring,
            burst,
            next: 0,
            added: VecDeque::new(),
            available: VecDeque::new(),
            taken: VecDeque::new(),
            completed: VecDeque::new(),
            used: VecDeque::new(),
            kicks: EventSuppression::new(setup),
            calls: EventSuppression::new(setup),
        }
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Add { lens, indirect } => self.add(lens, *indirect),
            Op::DriverPublish => self.driver_publish(),
            Op::Collect => self.collect(),
            Op::Calls(true) => {
                let more = self.guest.ring.enable_calls();
                assert_eq!(more, !self.used.is_empty());
                self.calls.enable(self.setup, self.moved(&self.used));
            }
            Op::Calls(false) => {
                self.guest.ring.disable_calls();
                self.calls.disable(self.setup);
            }
            Op::Dequeue(most) => self.dequeue(*most),
            Op::Singles {
                most,
                take,
                min,
                max,
            } => self.singles(*most, *take, *min, *max),
            Op::Complete(most) => self.complete(*most),
            Op::CompleteAll(most) => self.complete_all(*most),
            Op::Fill(bytes) => self.fill(*bytes),
            Op::Publish => self.publish(),
            Op::Kicks(true) => {
                let more = self.ring.enable_kicks();
                assert_eq!(more, !self.available.is_empty());
                self.kicks.enable(self.setup, self.moved(&self.available));
            }
            Op::Kicks(false) => {
                self.ring.disable_kicks();
                self.kicks.disable(self.setup);
            }
            Op::Rewind => self.rewind(),
            Op::Rebind => self.rebind(),
            Op::Restart => self.restart(),
            Op::Crash => self.crash(),
        }
        self.check();
    }

    /// By how much these chains move a position.
    fn moved(&self, chains: &VecDeque<TestChain>) -> u64 {
        let each = |made: &TestChain| match self.setup.packed {
            true => u64::from(made.descriptors),
            false => 1,
        };
        chains.iter().map(each).sum()
    }

    fn add(&mut self, lens: &[u16], indirect: bool) {
        let descriptors = match indirect {
            true => 1,
            false => u16::try_from(lens.len()).unwrap(),
        };
        let made = TestChain {
            token: self.next,
            lens: lens.to_vec(),
            indirect,
            descriptors,
            written: 0,
        };
        let writable = self.setup.direction == Direction::Writable;
        let mut addr = made.addr();
        let mut chain = Vec::new();
        for &len in lens {
            chain.push(Buf {
                addr,
                len: len.into(),
                writable,
            });
            addr += u64::from(len);
        }
        let free = self.guest.ring.free();
        match self.guest.ring.add(&chain, indirect, made.token) {
            Ok(_) => {
                assert_eq!(self.guest.ring.free(), free - descriptors);
                let bytes = made.bytes(0);
                self.guest.ram.write(made.addr(), &bytes).unwrap();
                self.added.push_back(made);
                self.next += 1;
            }
            Err(DriverVirtqueueError::Full { .. }) => assert!(free < descriptors),
            Err(error) => panic!("{error}"),
        }
    }

    fn driver_publish(&mut self) {
        self.guest.ring.publish();
        let count = self.moved(&self.added);
        let kicked = self.guest.ring.is_kick_needed();
        self.kicks.record(self.setup, count, kicked);
        self.available.append(&mut self.added);
    }

    fn dequeue(&mut self, most: usize) {
        let before = self.burst.chains().len();
        let taken = self.ring.dequeue(&mut self.burst, most).unwrap();
        assert_eq!(taken, most.min(64).min(self.available.len()));
        assert_eq!(self.burst.chains().len(), before + taken);
        self.taken.extend(self.available.drain(..taken));
        for (chain, made) in self.burst.chains().iter().zip(&self.taken).skip(before) {
            assert_eq!(chain.fault(), None);
            assert_eq!(chain.len(), made.len());
            assert_eq!(contents(&self.burst, chain), made.bytes(0));
            let segments: Vec<_> = self.burst.slices(chain).iter().map(|s| s.len()).collect();
            let lens = made.lens.iter().map(|len| usize::from(*len));
            assert_eq!(segments, lens.filter(|len| *len != 0).collect::<Vec<_>>());
        }
    }

    fn singles(&mut self, most: usize, take: usize, min: usize, max: u32) {
        let direction = self.setup.direction;
        let lens = std::iter::repeat_n(min, most);
        let found = self
            .ring
            .find_singles(&mut self.burst, direction, lens, max);
        if !self.taken.is_empty() {
            assert_eq!((found.count, found.has_other), (0, true));
            return;
        }
        let limit = most.min(64).min(self.available.len());
        let is_single = |made: &&TestChain| {
            let len = made.len();
            !made.indirect && made.lens.len() == 1 && len >= min.max(1) && to_u32(len) <= max
        };
        let expected = self.available.iter().take(limit).take_while(is_single);
        let expected: Vec<TestChain> = expected.cloned().collect();
        assert_eq!(found.count, expected.len());
        assert_eq!(found.has_other, found.count < limit);
        let (ids, slices) = self.burst.singles(take.min(found.count));
        let mut written = Vec::new();
        for (slice, made) in slices.iter().zip(&expected) {
            let mut bytes = vec![0; made.len()];
            assert_eq!(slice.copy_to(&mut bytes), slice.len());
            assert_eq!(bytes, made.bytes(0));
            let mut made = self.available.pop_front().unwrap();
            if direction == Direction::Writable {
                made.written = made.len() * usize::try_from(made.token % 3).unwrap() / 2;
                slice.copy_from(&made.bytes(1)[..made.written]);
            }
            written.push(to_u32(made.written));
            self.completed.push_back(made);
        }
        self.ring.complete_singles(ids, written.into_iter());
    }

    fn complete(&mut self, most: usize) {
        for _ in 0..most.min(self.taken.len()) {
            let mut made = self.taken.pop_front().unwrap();
            let chain = self.burst.chains()[0];
            if self.setup.direction == Direction::Writable {
                // The device writes nothing, half or all of the chain.
                made.written = made.len() * usize::try_from(made.token % 3).unwrap() / 2;
                let bytes = made.bytes(1);
                let mut at = 0;
                for slice in self.burst.slices(&chain) {
                    at += slice.copy_from(&bytes[at..made.written.max(at)]);
                }
            }
            let written = u32::try_from(made.written).unwrap();
            self.ring.complete(&chain, written);
            self.burst.retire(1);
            self.completed.push_back(made);
        }
    }

    fn complete_all(&mut self, most: usize) {
        let count = most.min(self.taken.len());
        self.ring.complete_all(&self.burst.chains()[..count]);
        self.burst.retire(count);
        self.completed.extend(self.taken.drain(..count));
    }

    fn fill(&mut self, bytes: usize) {
        let capacity: usize = self.taken.iter().map(TestChain::len).sum();
        let mut rest = match self.setup.direction {
            Direction::Readable => 0,
            Direction::Writable => bytes.min(capacity),
        };
        let used = self.ring.complete_filled(self.burst.chains(), rest);
        let mut count = 0;
        while rest > 0 {
            let mut made = self.taken.pop_front().unwrap();
            let chain = self.burst.chains()[count];
            made.written = made.len().min(rest);
            let mut at = 0;
            for slice in self.burst.slices(&chain) {
                at += slice.copy_from(&made.bytes(1)[at..made.written.max(at)]);
            }
            rest -= made.written;
            count += 1;
            self.completed.push_back(made);
        }
        assert_eq!(used, count);
        self.burst.retire(count);
    }

    fn publish(&mut self) {
        let count = self.moved(&self.completed);
        let called = self.ring.publish();
        self.calls.record(self.setup, count, called);
        self.used.append(&mut self.completed);
    }

    fn collect(&mut self) {
        let mut back = Vec::new();
        let count = self
            .guest
            .ring
            .collect(|token, len| back.push((token, len)));
        assert_eq!(usize::from(count.unwrap()), back.len());
        let used = std::mem::take(&mut self.used);
        let want: Vec<_> = used
            .iter()
            .map(|made| (made.token, u32::try_from(made.written).unwrap()))
            .collect();
        assert_eq!(back, want);
        for made in &used {
            let mut bytes = made.bytes(1);
            bytes[made.written..].copy_from_slice(&made.bytes(0)[made.written..]);
            let mut found = vec![0; made.len()];
            self.guest.ram.read(made.addr(), &mut found).unwrap();
            assert_eq!(found, bytes);
        }
    }

    fn rewind(&mut self) {
        self.ring.rewind(&mut self.burst);
        self.all_available();
    }

    fn all_available(&mut self) {
        while let Some(made) = self.taken.pop_back() {
            self.available.push_front(made);
        }
    }

    fn rebind(&mut self) {
        self.publish();
        self.rewind();
        let memory = self.guest.memory();
        self.ring = self.ring.rebind(&memory).unwrap();
        self.burst = Burst::new(memory);
    }

    fn restart(&mut self) {
        self.publish();
        self.rewind();
        let base = self.ring.base();
        assert_eq!(base, self.guest.ring.base());
        (self.ring, self.burst) = self.guest.device(base);
    }

    /// Chains that the driver has not seen used become available again. Their content may have
    /// changed.
    fn crash(&mut self) {
        (self.ring, self.burst) = self.guest.device(self.guest.ring.base());
        self.all_available();
        while let Some(mut made) = self.completed.pop_back() {
            made.written = 0;
            self.guest.ram.write(made.addr(), &made.bytes(0)).unwrap();
            self.available.push_front(made);
        }
    }

    fn check(&mut self) {
        let ring = &mut self.guest.ring;
        assert_eq!(self.ring.has_more(), !self.available.is_empty());
        let out = [&self.available, &self.taken, &self.completed, &self.used];
        let out: usize = out.iter().map(|list| list.len()).sum();
        assert_eq!(usize::from(ring.in_flight()), out);
        assert_eq!(usize::from(ring.refresh().unwrap()), self.used.len());
        if self.taken.is_empty() && self.completed.is_empty() {
            assert_eq!(self.ring.base(), ring.base());
        }
    }
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap()
}

fn contents(burst: &Burst, chain: &virtionet_virtqueue::Chain) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slice in burst.slices(chain) {
        let at = bytes.len();
        bytes.resize(at + slice.len(), 0);
        assert_eq!(slice.copy_to(&mut bytes[at..]), slice.len());
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn driver_and_device_agree_with_the_model(setup in setups(), ops in prop::collection::vec(ops(), 1..250)) {
        let mut model = Model::new(setup);
        for op in &ops {
            model.step(op);
        }
    }
}

fn each_setup(test: impl Fn(Setup)) {
    for (packed, sizes) in [
        (true, &[1, 2, 3, 4, 5, 7, 8, 100, 256][..]),
        (false, &[2, 4, 8, 256]),
    ] {
        for &size in sizes {
            for (event_idx, direction) in
                [(false, Direction::Readable), (true, Direction::Writable)]
            {
                test(Setup {
                    size,
                    packed,
                    event_idx,
                    start: 0,
                    direction,
                });
            }
        }
    }
}

#[test]
fn full_virtqueue_is_used_completely_lap_after_lap() {
    each_setup(|setup| {
        let mut model = Model::new(setup);
        for round in 0..20u16 {
            let longest = setup.size.min(9);
            loop {
                let free = model.guest.ring.free();
                let count = (round % longest + 1).min(free);
                if count == 0 {
                    break;
                }
                let lens = vec![7 + round; usize::from(count)];
                let indirect = round % 4 == 3;
                model.step(&Op::Add { lens, indirect });
            }
            model.step(&Op::DriverPublish);
            while !model.available.is_empty() {
                model.step(&Op::Dequeue(100));
            }
            assert_eq!(model.guest.ring.free(), 0);
            model.step(&Op::Complete(usize::MAX));
            model.step(&Op::Publish);
            model.step(&Op::Collect);
            assert_eq!(model.guest.ring.free(), setup.size);
        }
    });
}

#[test]
fn side_that_waits_is_notified_once_for_the_next_chain() {
    each_setup(|setup| {
        let mut model = Model::new(setup);
        for round in 0..3 * setup.size {
            model.step(&Op::Kicks(true));
            model.step(&Op::Calls(true));
            let count = usize::from(round % setup.size.min(9) + 1);
            model.step(&Op::Add {
                lens: vec![3; count],
                indirect: false,
            });
            // Both sides wait. The model expects one notification for each.
            for op in [
                Op::DriverPublish,
                Op::Dequeue(9),
                Op::Complete(9),
                Op::Publish,
            ] {
                model.step(&op);
            }
            model.step(&Op::Collect);
        }
    });
}
