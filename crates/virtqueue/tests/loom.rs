//! Driver and device in every order of two threads, and with every old value that a load may still
//! return: `RUSTFLAGS="--cfg loom" cargo test --release --test loom`, or `ci/test loom`.
//!
//! The device is the shipped virtqueue on loom's atomics (see `memory/loom.rs`). The driver is a
//! small one that accesses memory as Linux does.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::panic)]

mod model_driver;

use std::sync::Arc;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use model_driver::{Driver, Format};
use virtionet_guest::memory::GuestRam;
use virtionet_virtqueue::memory::{DisabledOrdering, GuestMemory, clear_model, disable_ordering};
use virtionet_virtqueue::{Burst, Direction, Virtqueue};

/// The chain of token N has LEN + N bytes, so that the device can identify it.
const LEN: u32 = 100;
/// The device reports WRITTEN + N bytes written to the chain of token N.
const WRITTEN: u32 = 50;

/// A model of an eventfd.
#[derive(Default)]
struct ModelEventFd {
    count: Mutex<u64>,
    signalled: Condvar,
}

impl ModelEventFd {
    fn signal(&self) {
        *self.count.lock().unwrap() += 1;
        self.signalled.notify_one();
    }

    /// Waits until it is signalled. loom reports a deadlock if it never is.
    fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.signalled.wait(count).unwrap();
        }
        *count = 0;
    }
}

/// The content of the buffers. Accesses are relaxed, so that only the ordering of the virtqueue
/// makes them visible.
#[derive(Clone)]
struct Payload(Arc<[AtomicU32; 4]>);

impl Payload {
    fn new() -> Self {
        Self(Arc::new(std::array::from_fn(|_| AtomicU32::new(0))))
    }

    fn write(&self, token: u16, value: u32) {
        self.0[usize::from(token)].store(value, Ordering::Relaxed);
    }

    fn read(&self, token: u16) -> u32 {
        self.0[usize::from(token)].load(Ordering::Relaxed)
    }
}

/// The device.
struct Device {
    ring: Virtqueue,
    burst: Burst,
    payload: Payload,
}

impl Device {
    /// Dequeues all available chains, checks their content and completes them. Returns how many.
    fn work(&mut self) -> usize {
        let taken = self.ring.dequeue(&mut self.burst, 4).unwrap();
        for chain in self.burst.chains() {
            assert_eq!(chain.fault(), None);
            let token = u16::try_from(chain.len()).unwrap() - u16::try_from(LEN).unwrap();
            assert_eq!(
                self.payload.read(token),
                1,
                "the content that the driver wrote"
            );
            self.payload.write(token, 2);
            self.ring.complete(chain, WRITTEN + u32::from(token));
        }
        self.burst.clear();
        taken
    }

    /// The same for chains of one buffer, by the fast path.
    fn work_on_singles(&mut self) -> usize {
        let lens = std::iter::repeat_n(1, 4);
        let found = self
            .ring
            .find_singles(&mut self.burst, Direction::Writable, lens, u32::MAX);
        let (ids, slices) = self.burst.singles(found.count);
        let mut written = Vec::new();
        for slice in slices {
            let token = u16::try_from(slice.len()).unwrap() - u16::try_from(LEN).unwrap();
            assert_eq!(
                self.payload.read(token),
                1,
                "the content that the driver wrote"
            );
            self.payload.write(token, 2);
            written.push(WRITTEN + u32::from(token));
        }
        self.ring.complete_singles(ids, written.into_iter());
        found.count
    }
}

/// Driver and device of a new virtqueue.
struct Endpoints {
    driver: Driver,
    device: Device,
}

impl Endpoints {
    fn new(memory: &Arc<GuestMemory>, base: u64, format: Format) -> Self {
        let (driver, config) = Driver::new(memory, base, format);
        let payload = Payload::new();
        let device = Device {
            ring: Virtqueue::new(config, memory).unwrap(),
            burst: Burst::new(Arc::clone(memory)),
            payload: payload.clone(),
        };
        Self { driver, device }
    }

    /// Passes one chain through both sides, so that event suppression is no longer in its initial
    /// state.
    fn first_lap(&mut self) {
        self.offer(0);
        self.driver.publish();
        let _kick = self.driver.is_kick_needed();
        self.device.ring.disable_kicks();
        self.driver.disable_calls();
        assert_eq!(self.device.work(), 1);
        let _call = self.device.ring.publish();
        assert_eq!(self.driver.collect(), Some((0, WRITTEN)));
    }

    fn offer(&mut self, token: u16) {
        offer(&mut self.driver, &self.device.payload, token);
    }
}

fn offer(driver: &mut Driver, payload: &Payload, token: u16) {
    payload.write(token, 1);
    driver.add(token, LEN + u32::from(token), 1 + token % 2);
}

/// Collects a chain, if one is used, and checks its token and content.
fn collect(driver: &mut Driver, payload: &Payload, token: u16) -> bool {
    let Some((id, written)) = driver.collect() else {
        return false;
    };
    assert_eq!((id, written), (token, WRITTEN + u32::from(token)));
    assert_eq!(payload.read(token), 2, "the content that the device wrote");
    true
}

/// Runs `test` in every order for each format. `preemptions` limits the orders to those in which
/// threads are preempted at most that often.
fn model(preemptions: Option<usize>, test: fn(Endpoints)) {
    for format in Format::ALL {
        model_of(format, preemptions, test);
    }
}

fn model_of(format: Format, preemptions: Option<usize>, test: fn(Endpoints)) {
    let ram = GuestRam::new(0x4000).unwrap();
    let memory = Arc::new(ram.guest_memory().unwrap());
    let base = ram.user_addr(0x1000).unwrap();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        test(Endpoints::new(&memory, base, format));
        clear_model();
    });
}

/// The driver publishes a chain and decides whether to kick, while the device enables kicks and
/// checks for chains once more.
fn kick_race(mut endpoints: Endpoints) {
    endpoints.first_lap();
    let Endpoints {
        mut driver,
        mut device,
    } = endpoints;
    let payload = device.payload.clone();
    let arming = thread::spawn(move || device.ring.enable_kicks());
    offer(&mut driver, &payload, 1);
    driver.publish();
    let kick = driver.is_kick_needed();
    let seen = arming.join().unwrap();
    assert!(
        kick || seen,
        "the device waits and the driver does not kick"
    );
}

/// The device publishes a used chain and decides whether to call, while the driver enables calls
/// and checks for used chains once more.
fn call_race(mut endpoints: Endpoints) {
    endpoints.first_lap();
    endpoints.offer(1);
    endpoints.driver.publish();
    let Endpoints {
        mut driver,
        mut device,
    } = endpoints;
    let using = thread::spawn(move || {
        assert_eq!(device.work(), 1);
        device.ring.publish()
    });
    let seen = driver.enable_calls();
    let call = using.join().unwrap();
    assert!(
        call || seen,
        "the driver waits and the device does not call"
    );
}

/// The driver publishes two chains together. The device sees both with their content, or none.
fn available_together(mut endpoints: Endpoints) {
    endpoints.first_lap();
    let Endpoints {
        mut driver,
        mut device,
    } = endpoints;
    let payload = device.payload.clone();
    let working = thread::spawn(move || device.work());
    offer(&mut driver, &payload, 1);
    offer(&mut driver, &payload, 2);
    driver.publish();
    let taken = working.join().unwrap();
    assert!(
        taken == 0 || taken == 2,
        "the device saw {taken} of 2 chains"
    );
}

/// The same with the fast path, for chains of one buffer.
fn singles_together(mut endpoints: Endpoints) {
    endpoints.first_lap();
    let Endpoints {
        mut driver,
        mut device,
    } = endpoints;
    let payload = device.payload.clone();
    let working = thread::spawn(move || {
        let taken = device.work_on_singles();
        let _call = device.ring.publish();
        taken
    });
    for token in [1, 2] {
        payload.write(token, 1);
        driver.add(token, LEN + u32::from(token), 1);
    }
    driver.publish();
    if collect(&mut driver, &payload, 1) {
        assert!(
            collect(&mut driver, &payload, 2),
            "the driver saw only one of two chains"
        );
    }
    let taken = working.join().unwrap();
    assert!(
        taken == 0 || taken == 2,
        "the device saw {taken} of 2 chains"
    );
}

/// The device publishes two used chains together. The driver sees both with their content, or none.
fn used_together(mut endpoints: Endpoints) {
    endpoints.first_lap();
    endpoints.offer(1);
    endpoints.offer(2);
    endpoints.driver.publish();
    let Endpoints {
        mut driver,
        mut device,
    } = endpoints;
    let payload = device.payload.clone();
    let using = thread::spawn(move || {
        assert_eq!(device.work(), 2);
        let _call = device.ring.publish();
    });
    if collect(&mut driver, &payload, 1) {
        assert!(
            collect(&mut driver, &payload, 2),
            "the driver saw only one of two chains"
        );
    }
    using.join().unwrap();
}

/// Both sides wait whenever they have nothing to do, while two chains pass one after the other.
fn both_wait(mut endpoints: Endpoints) {
    endpoints.first_lap();
    let Endpoints {
        mut driver,
        mut device,
    } = endpoints;
    let payload = device.payload.clone();
    let events = Arc::new((ModelEventFd::default(), ModelEventFd::default()));
    let device_events = Arc::clone(&events);
    let serving = thread::spawn(move || {
        let mut done = 0;
        while done < 2 {
            let taken = device.work();
            if device.ring.publish() {
                device_events.1.signal();
            }
            done += taken;
            if taken == 0 && !device.ring.enable_kicks() {
                device_events.0.wait();
                device.ring.disable_kicks();
            }
        }
    });
    for token in 1..3 {
        offer(&mut driver, &payload, token);
        driver.publish();
        if driver.is_kick_needed() {
            events.0.signal();
        }
    }
    let mut back = 1;
    while back < 3 {
        if collect(&mut driver, &payload, back) {
            back += 1;
        } else if !driver.enable_calls() {
            events.1.wait();
            driver.disable_calls();
        }
    }
    serving.join().unwrap();
}

#[test]
fn device_that_enables_kicks_misses_no_chain() {
    model(None, kick_race);
}

#[test]
fn driver_that_enables_calls_misses_no_used_chain() {
    model(None, call_race);
}

#[test]
fn chains_published_together_are_seen_with_their_content() {
    model(None, available_together);
}

#[test]
fn single_buffers_published_together_are_seen_and_used_with_their_content() {
    model(Some(3), singles_together);
}

#[test]
fn chains_used_together_are_seen_with_their_content() {
    model(None, used_together);
}

#[test]
fn driver_and_device_that_wait_notify_each_other() {
    model(Some(2), both_wait);
}

/// Checks that a model detects a missing ordering in every format.
fn assert_detected(without: DisabledOrdering, test: fn(Endpoints)) {
    for format in Format::ALL {
        let run = std::thread::spawn(move || {
            disable_ordering(without);
            model_of(format, Some(2), test);
        });
        assert!(run.join().is_err(), "{format:?} passes without {without:?}");
    }
}

#[test]
fn model_without_fences_loses_a_kick() {
    assert_detected(DisabledOrdering::Fences, kick_race);
}

#[test]
fn model_without_fences_loses_a_call() {
    assert_detected(DisabledOrdering::Fences, call_race);
}

#[test]
fn model_without_fences_deadlocks_when_both_sides_wait() {
    assert_detected(DisabledOrdering::Fences, both_wait);
}

#[test]
fn model_without_acquire_sees_a_part_of_a_batch() {
    assert_detected(DisabledOrdering::Acquire, available_together);
}

#[test]
fn model_without_acquire_sees_a_part_of_a_batch_of_single_buffers() {
    assert_detected(DisabledOrdering::Acquire, singles_together);
}

#[test]
fn model_without_release_sees_a_part_of_a_used_batch() {
    assert_detected(DisabledOrdering::Release, used_together);
}
