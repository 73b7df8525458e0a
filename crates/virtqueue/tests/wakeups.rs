//! A driver and a device on two threads. Each waits for a notification when it has nothing to do,
//! so a lost notification stops both, and the test reaches its time limit.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{DATA, Guest, SetOnDrop, Setup};
use virtionet_guest::driver::Buf;
use virtionet_guest::eventfd::WaitableEventFd;
use virtionet_virtqueue::{Burst, Direction, Virtqueue};

/// A time limit that no wait reaches unless a notification is lost.
const LIMIT: Duration = Duration::from_secs(20);

/// Waits for a notification.
fn wait(event: &WaitableEventFd, who: &str) {
    assert_ne!(event.wait(LIMIT).unwrap(), 0, "the {who} was not notified");
}

fn drive(mut guest: Guest, chains: u64, kick: &WaitableEventFd, call: &WaitableEventFd) {
    let ring = &mut guest.ring;
    let mut out = VecDeque::new();
    let (mut added, mut back) = (0, 0);
    while back < chains {
        // As many chains as fit, each of one to three descriptors, published a few at a time.
        let batch = 1 + added % 7;
        for _ in 0..batch {
            let count = usize::try_from(1 + added % 3).unwrap();
            let chain = vec![Buf::readable(DATA + added % 64, 8); count];
            let indirect = added.is_multiple_of(5) || count > usize::from(ring.size());
            if added == chains || ring.add(&chain, indirect, added).is_err() {
                break;
            }
            out.push_back(added);
            added += 1;
        }
        ring.publish();
        if ring.is_kick_needed() {
            kick.signal().unwrap();
        }
        let more = ring.collect(|token, _| assert_eq!(Some(token), out.pop_front()));
        let more = more.unwrap();
        back += u64::from(more);
        if more == 0 && (ring.free() < 3 || added == chains) && !ring.enable_calls() {
            wait(call, "driver");
            ring.disable_calls();
        }
    }
}

fn serve(
    mut ring: Virtqueue,
    mut burst: Burst,
    chains: u64,
    kick: &WaitableEventFd,
    call: &WaitableEventFd,
) {
    let mut done = 0;
    while done < chains {
        let taken = ring.dequeue(&mut burst, 5).unwrap();
        for chain in burst.chains() {
            assert_eq!(chain.fault(), None);
            ring.complete(chain, 0);
        }
        burst.clear();
        if ring.publish() {
            call.signal().unwrap();
        }
        done += u64::try_from(taken).unwrap();
        if taken == 0 && !ring.enable_kicks() {
            wait(kick, "device");
            ring.disable_kicks();
        }
    }
}

fn setup(size: u16, packed: bool, event_idx: bool) -> Setup {
    Setup {
        size,
        packed,
        event_idx,
        start: 3,
        direction: Direction::Readable,
    }
}

fn run(size: u16, packed: bool, event_idx: bool) {
    let guest = Guest::new(setup(size, packed, event_idx));
    let (ring, burst) = guest.device(guest.ring.base());
    let chains = 30_000;
    let (kick, call) = (
        WaitableEventFd::new().unwrap(),
        WaitableEventFd::new().unwrap(),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| serve(ring, burst, chains, &kick, &call));
        drive(guest, chains, &kick, &call);
    });
}

/// A device that polls, and a driver that waits after each chain that it adds, sometimes at the
/// moment when the chain is used.
fn wait_while_used(packed: bool, event_idx: bool) {
    let mut guest = Guest::new(setup(8, packed, event_idx));
    let (ring, burst) = guest.device(guest.ring.base());
    let call = WaitableEventFd::new().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| poll(ring, burst, &call, &done));
        let _done = SetOnDrop(&done);
        let begin = Instant::now();
        let mut round = 0u32;
        while begin.elapsed() < Duration::from_millis(400) {
            guest.ring.add(&[Buf::readable(DATA, 8)], false, 0).unwrap();
            guest.ring.publish();
            for _ in 0..round % 97 {
                std::hint::spin_loop();
            }
            round += 1;
            while guest.ring.collect(|_, _| {}).unwrap() == 0 {
                if !guest.ring.enable_calls() {
                    wait(&call, "driver");
                }
            }
            guest.ring.disable_calls();
        }
    });
}

fn poll(mut ring: Virtqueue, mut burst: Burst, call: &WaitableEventFd, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        if ring.dequeue(&mut burst, 64).unwrap() == 0 {
            std::thread::yield_now();
        }
        for chain in burst.chains() {
            ring.complete(chain, 0);
        }
        burst.clear();
        if ring.publish() {
            call.signal().unwrap();
        }
    }
}

/// The driver and the device each publish 60 chains at once, and check that they see either all
/// chains of the other or none.
fn publish_batches(packed: bool) {
    let mut guest = Guest::new(setup(256, packed, false));
    let (ring, burst) = guest.device(guest.ring.base());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| complete_whole_batches(ring, burst, &done));
        let _done = SetOnDrop(&done);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(400) {
            for token in 0..60 {
                let chain = [Buf::readable(DATA, 8)];
                guest.ring.add(&chain, false, token).unwrap();
            }
            guest.ring.publish();
            loop {
                match guest.ring.collect(|_, _| {}).unwrap() {
                    0 if done.load(Ordering::Relaxed) => return,
                    0 => std::thread::yield_now(),
                    count => break assert_eq!(count, 60, "the driver sees a part of the batch"),
                }
            }
        }
    });
}

fn complete_whole_batches(mut ring: Virtqueue, mut burst: Burst, done: &AtomicBool) {
    let _done = SetOnDrop(done);
    while !done.load(Ordering::Relaxed) {
        let taken = ring.dequeue(&mut burst, 64).unwrap();
        if taken == 0 {
            std::thread::yield_now();
            continue;
        }
        assert_eq!(taken, 60, "the device sees a part of the batch");
        for chain in burst.chains() {
            ring.complete(chain, 0);
        }
        burst.clear();
        let _call = ring.publish();
    }
}

#[test]
fn driver_that_waits_while_a_chain_is_used_gets_a_call() {
    for packed in [false, true] {
        for event_idx in [false, true] {
            wait_while_used(packed, event_idx);
        }
    }
}

#[test]
fn chains_published_together_become_visible_together() {
    publish_batches(false);
    publish_batches(true);
}

#[test]
fn packed_virtqueue_loses_no_notification() {
    for size in [1, 2, 3, 5, 8, 256] {
        for event_idx in [false, true] {
            run(size, true, event_idx);
        }
    }
}

#[test]
fn split_virtqueue_loses_no_notification() {
    for size in [2, 4, 8, 256] {
        for event_idx in [false, true] {
            run(size, false, event_idx);
        }
    }
}
