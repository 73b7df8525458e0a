//! The handshakes of the rings under every order of two threads, and under every old value that a
//! load may still see: `RUSTFLAGS="--cfg loom" cargo test --release --test loom`, or `ci/test loom`.
//!
//! The device is the ring that is shipped, on words of loom's (see `memory/loom.rs`); the driver is
//! a small one that does what Linux does.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::panic)]

mod driver;

use std::sync::Arc;

use driver::{Driver, Format};
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use virtionet_guest::memory::GuestRam;
use virtionet_virtqueue::memory::{DisabledOrdering, GuestMemory, clear_model, disable_ordering};
use virtionet_virtqueue::{Burst, Virtqueue};

/// A chain of token N has this many bytes and N more: that tells them apart.
const LEN: u32 = 100;
/// Bytes that the device says it wrote to a chain of token N, less N.
const WRITTEN: u32 = 50;

/// An eventfd.
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

    /// Sleeps until it has been rung since the last time; for ever, which loom finds, if it is not.
    fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.signalled.wait(count).unwrap();
        }
        *count = 0;
    }
}

/// What the buffers hold. Relaxed, so that only the ring's own order can make it be seen.
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

/// The device's end.
struct Device {
    ring: Virtqueue,
    burst: Burst,
    payload: Payload,
}

impl Device {
    /// Takes what there is, looks whether it is whole, and completes it; how many those were.
    fn work(&mut self) -> usize {
        let taken = self.ring.dequeue(&mut self.burst, 4).unwrap();
        for chain in self.burst.chains() {
            assert_eq!(chain.fault(), None);
            let token = u16::try_from(chain.len()).unwrap() - u16::try_from(LEN).unwrap();
            assert_eq!(self.payload.read(token), 1, "what the driver put there");
            self.payload.write(token, 2);
            self.ring.complete(chain, WRITTEN + u32::from(token));
        }
        self.burst.clear();
        taken
    }
}

/// Both ends on fresh memory.
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

    /// One chain goes there and back, so that what either asked for in the beginning has passed.
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

/// Collects a chain, if one is there; it must be the one of this token, and whole.
fn collect(driver: &mut Driver, payload: &Payload, token: u16) -> bool {
    let Some((id, written)) = driver.collect() else {
        return false;
    };
    assert_eq!((id, written), (token, WRITTEN + u32::from(token)));
    assert_eq!(payload.read(token), 2, "what the device put there");
    true
}

/// Runs `test` in every order for each format; with `preemptions` only in those in which threads are
/// interrupted so often at most, besides where they wait.
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

/// The driver shows a chain and decides whether to kick; the device arms kicks and looks once more.
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
        "the device sleeps and the driver does not kick"
    );
}

/// The device shows a used chain and decides whether to call; the driver asks for calls and looks
/// once more.
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
        "the driver sleeps and the device does not call"
    );
}

/// Two chains shown together: the device sees both, and whole, or none.
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

/// Two chains used together: the driver sees both, and whole, or none.
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
        assert!(collect(&mut driver, &payload, 2), "the driver saw a part");
    }
    using.join().unwrap();
}

/// Both sides sleep whenever they have nothing to do, over two chains shown one after the other.
fn both_sleep(mut endpoints: Endpoints) {
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
fn no_kick_is_lost_while_the_device_goes_to_sleep() {
    model(None, kick_race);
}

#[test]
fn no_call_is_lost_while_the_driver_goes_to_sleep() {
    model(None, call_race);
}

#[test]
fn what_the_driver_shows_together_is_seen_whole() {
    model(None, available_together);
}

#[test]
fn what_the_device_uses_together_is_seen_whole() {
    model(None, used_together);
}

#[test]
fn two_that_sleep_wake_each_other() {
    model(Some(2), both_sleep);
}

/// The models are not blind: each finds what it is there for, in every format.
fn fails(without: DisabledOrdering, test: fn(Endpoints)) {
    for format in Format::ALL {
        let run = std::thread::spawn(move || {
            disable_ordering(without);
            model_of(format, Some(2), test);
        });
        assert!(run.join().is_err(), "{format:?} does without {without:?}");
    }
}

#[test]
fn without_the_fence_a_kick_is_lost() {
    fails(DisabledOrdering::Fences, kick_race);
}

#[test]
fn without_the_fence_a_call_is_lost() {
    fails(DisabledOrdering::Fences, call_race);
}

#[test]
fn without_the_fence_two_that_sleep_do_so_for_ever() {
    fails(DisabledOrdering::Fences, both_sleep);
}

#[test]
fn without_acquire_a_chain_is_seen_in_part() {
    fails(DisabledOrdering::Acquire, available_together);
}

#[test]
fn without_release_a_used_chain_is_seen_in_part() {
    fails(DisabledOrdering::Release, used_together);
}
