//! Tests of a device with a front-end on a socket pair.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use virtionet_guest::eventfd::WaitableEventFd;
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::test_frontend::TestFrontend;
use virtionet_uplink::null::Null;
use virtionet_vhost_user::{Backend, UnmappedVring, VringState};

use super::*;
use crate::host_cpus::HostCpus;
use crate::testing::{
    ONE_TEST_WITH_VCPUS_AT_A_TIME, TIMEOUT, TestUplink, net_device, send, sent_frames, two_pairs,
    vring_start, wait_until, with_frontend, with_socket,
};

fn pair(net_device: &NetDevice, index: usize) -> &QueuePair {
    &net_device.pairs().nth(index).unwrap().pair
}

fn attached(uplink: &TestUplink) -> Vec<(u16, bool)> {
    uplink.attached.lock().clone().into_iter().collect()
}

#[test]
fn pair_has_descriptors_only_while_a_front_end_is_connected_and_keeps_its_counters() {
    let net_device = net_device(4, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        for served in net_device.pairs() {
            assert!(served.worker.is_open());
            assert!(served.pair.uplink().is_some());
        }
        send(frontend, 1, 3);
    });
    assert_eq!(sent_frames(&net_device), [0, 3]);
    for served in net_device.pairs() {
        assert!(!served.worker.is_open());
        assert!(served.pair.uplink().is_none());
        // Nothing to wake, which is no error.
        served.pair.wake();
    }
    // The next front-end is served by the same pairs.
    with_frontend(&net_device, &two_pairs(), |frontend| {
        send(frontend, 0, 2);
        send(frontend, 1, 4);
    });
    assert_eq!(sent_frames(&net_device), [2, 7]);
    assert!(net_device.pairs().all(|served| !served.worker.is_open()));
    assert!(net_device.pairs().all(|served| served.worker.cycles() > 0));
}

#[test]
fn frames_that_arrive_at_the_uplink_reach_the_guest() {
    let uplink = TestUplink::with_frames();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    let frame = FrameSpec::v4(Transport::Udp).build(b"arrived").unwrap();
    with_frontend(&net_device, &two_pairs(), |frontend| {
        for _ in 0..100 {
            uplink.arrive(frame.bytes.clone());
        }
        let frames = frontend.pairs[0].rx.wait_frames(100, TIMEOUT).unwrap();
        assert!(frames.iter().all(|received| received.bytes == frame.bytes));
    });
    assert_eq!(pair(&net_device, 0).rx().stats().frames.get(), 100);
    assert_eq!(uplink.waiting_frames(), 0);
}

#[test]
fn frames_for_a_guest_without_buffers_wait_until_it_adds_some() {
    let uplink = TestUplink::with_frames();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    let frame = FrameSpec::v4(Transport::Udp).build(b"arrived").unwrap();
    with_frontend(&net_device, &two_pairs(), |frontend| {
        frontend.pairs[0].rx.refill = false;
        for _ in 0..70 {
            uplink.arrive(frame.bytes.clone());
        }
        let stats = pair(&net_device, 0).rx().stats();
        wait_until("the guest starves", || stats.rx_starved.get() > 0);
        // Half of the ring stays reserved for a long frame.
        assert!((6..=38).contains(&uplink.waiting_frames()));
        frontend.pairs[0].rx.refill = true;
        let received = usize::try_from(stats.frames.get()).unwrap();
        frontend.pairs[0].rx.wait_frames(received, TIMEOUT).unwrap();
        frontend.pairs[0].rx.fill().unwrap();
        frontend.pairs[0]
            .rx
            .wait_frames(70 - received, TIMEOUT)
            .unwrap();
        assert!(stats.kicks.get() > 0);
        assert_eq!(stats.dropped_no_buffer.get(), 0);
    });
}

#[test]
fn frames_of_a_disabled_pair_are_dropped_and_counted_until_it_is_enabled() {
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        assert_eq!(attached(&uplink), [(0, true), (1, true)]);
        frontend.enable(1, false).unwrap();
        assert_eq!(attached(&uplink), [(0, true), (1, false)]);
        assert!(!pair(&net_device, 1).is_in_use());
        send(frontend, 1, 5);
        let stats = pair(&net_device, 1).tx().stats();
        assert_eq!((stats.frames.get(), stats.dropped_disabled.get()), (0, 5));
        frontend.enable(1, true).unwrap();
        assert_eq!(attached(&uplink), [(0, true), (1, true)]);
        send(frontend, 1, 2);
        assert_eq!((stats.frames.get(), stats.dropped_disabled.get()), (2, 5));
    });
    assert_eq!(attached(&uplink), [(0, false), (1, false)]);
}

#[test]
fn ring_that_is_stopped_and_started_again_continues_at_its_base() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        send(frontend, 0, 5);
        frontend.stop().unwrap();
        assert_eq!(frontend.rings()[1].base, 5);
        for served in net_device.pairs() {
            assert_eq!(served.pair.tx().state(), VringState::Stopped);
            assert_eq!(served.pair.rx().size(), 0);
        }
        frontend.start().unwrap();
        assert_eq!(pair(&net_device, 0).rx().size(), 64);
        send(frontend, 0, 3);
    });
    assert_eq!(sent_frames(&net_device), [8, 0]);
}

/// Waits until the queues of two queue pairs are attached, or detached.
fn wait_until_attached(uplink: &TestUplink, is_attached: bool) {
    let expected = [(0, is_attached), (1, is_attached)];
    wait_until("the uplink's queues", || attached(uplink) == expected);
}

#[test]
fn reply_to_get_vring_base_does_not_wait_until_the_uplinks_queue_is_detached() {
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        let busy = uplink.attached.lock();
        frontend.stop().unwrap();
        drop(busy);
        wait_until_attached(&uplink, false);
        frontend.start().unwrap();
        wait_until_attached(&uplink, true);
        send(frontend, 0, 3);
    });
}

#[test]
fn rings_whose_memory_is_removed_stop_and_continue_when_it_is_added_again() {
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        send(frontend, 0, 7);
        let region = frontend.ram().regions()[0];
        frontend.connection.remove_mem_region(&region).unwrap();
        wait_until_attached(&uplink, false);
        for served in net_device.pairs() {
            assert_eq!(served.pair.rx().state(), VringState::Stopped);
            assert_eq!(served.pair.tx().state(), VringState::Stopped);
        }
        let fd = frontend.ram().fd();
        frontend.connection.add_mem_region(&region, fd).unwrap();
        wait_until_attached(&uplink, true);
        send(frontend, 0, 2);
    });
    assert_eq!(sent_frames(&net_device), [9, 0]);
    assert_eq!(pair(&net_device, 0).tx().stats().quarantines.get(), 0);
}

#[test]
fn vrings_that_a_memory_table_lacks_are_returned_with_their_indices_and_bases() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        send(frontend, 0, 7);
        send(frontend, 1, 5);
        let unmapped = net_device.set_memory(&Arc::default());
        let bases: Vec<_> = unmapped.iter().map(|one| (one.index, one.base)).collect();
        assert_eq!(bases, [(0, 0), (1, 7), (2, 0), (3, 5)]);
        for UnmappedVring { index, error, .. } in unmapped {
            assert!(
                error.to_string().contains(&format!("ring {index}")),
                "{error}"
            );
        }
    });
}

#[test]
fn announced_vrings_show_how_many_pairs_the_front_end_has() {
    let net_device = net_device(8, Null, PollMode::Off);
    for (vring, pairs) in [(0, 1), (5, 3), (2, 3), (6, 4)] {
        net_device.on_vring_announced(vring);
        assert_eq!(net_device.frontend().pairs, pairs, "vring {vring}");
    }
}

#[test]
fn kick_descriptor_that_is_replaced_is_waited_for_instead_of_the_old_one() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        let new = WaitableEventFd::new().unwrap();
        let stats = pair(&net_device, 0).tx().stats();
        frontend
            .connection
            .set_vring_kick(1, Some(new.as_raw_fd()))
            .unwrap();
        let before = stats.kicks.get();
        new.signal().unwrap();
        wait_until("the new descriptor wakes the worker", || {
            stats.kicks.get() == before + 1
        });
        // The old one belongs to nobody any more.
        frontend.pairs[0].tx.queue.kick_now().unwrap();
        new.signal().unwrap();
        wait_until("the new descriptor wakes the worker", || {
            stats.kicks.get() >= before + 2
        });
        assert_eq!(stats.kicks.get(), before + 2);
        // The driver's kicks go nowhere now, so the ring must be polled.
        frontend.connection.set_vring_kick(1, None).unwrap();
        assert!(pair(&net_device, 0).tx().must_be_polled());
        send(frontend, 0, 3);
        assert_eq!(stats.kicks.get(), before + 2);
    });
    assert_eq!(sent_frames(&net_device), [3, 0]);
}

#[test]
fn call_descriptor_that_is_replaced_is_signalled_at_once() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        let new = WaitableEventFd::new().unwrap();
        frontend
            .connection
            .set_vring_call(1, Some(new.as_raw_fd()))
            .unwrap();
        assert_eq!(new.wait(TIMEOUT).unwrap(), 1);
        frontend.connection.set_vring_call(1, None).unwrap();
        let calls = pair(&net_device, 0).tx().stats().calls.get();
        send_without_calls(frontend);
        assert_eq!(pair(&net_device, 0).tx().stats().calls.get(), calls);
        assert_eq!(new.try_read(), 0);
    });
}

/// Sends a frame and polls for its end.
fn send_without_calls(frontend: &mut TestFrontend) {
    let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
    let tx = &mut frontend.pairs[0].tx;
    tx.send(&frame).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while tx.reclaim().unwrap() == 0 {
        assert!(Instant::now() < deadline, "the frame is not used");
        std::thread::yield_now();
    }
}

#[test]
fn ring_that_the_guest_breaks_signals_the_err_descriptor_and_leaves_the_others_alone() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        let err = WaitableEventFd::new().unwrap();
        frontend
            .connection
            .set_vring_err(1, Some(err.as_raw_fd()))
            .unwrap();
        let queue = &mut frontend.pairs[0].tx.queue;
        queue.ring.as_split().unwrap().set_avail_index(1000);
        queue.kick_now().unwrap();
        assert_eq!(err.wait(TIMEOUT).unwrap(), 1);
        let tx = pair(&net_device, 0).tx();
        assert_eq!(tx.state(), VringState::Quarantined);
        let stats = tx.stats();
        assert_eq!(
            (stats.quarantines.get(), stats.avail_index_jump.get()),
            (1, 1)
        );
        send(frontend, 1, 4);
        assert_eq!(pair(&net_device, 0).rx().state(), VringState::Running);
        // It is stopped and started again, as by a driver that is loaded again.
        frontend.stop().unwrap();
        frontend.reset().unwrap();
        frontend.start().unwrap();
        send(frontend, 0, 2);
    });
    assert_eq!(sent_frames(&net_device), [2, 4]);
}

#[test]
fn ring_that_is_started_twice_is_refused_and_goes_on() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        let start = vring_start(&net_device, frontend, 1);
        let error = net_device.start_vring(1, start).unwrap_err();
        assert!(
            matches!(error, BackendError::VringState { index: 1, .. }),
            "{error}"
        );
        send(frontend, 0, 1);
    });
    assert_eq!(sent_frames(&net_device), [1, 0]);
}

#[test]
fn pair_whose_queue_the_uplink_refuses_leaves_nothing_behind() {
    let uplink = TestUplink::default();
    uplink.refuses_queues.store(true, Relaxed);
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_socket(&net_device, |socket| {
        let error = TestFrontend::from_socket(socket, &two_pairs()).unwrap_err();
        assert!(error.to_string().contains("refused"), "{error}");
        assert_eq!(net_device.pairs().count(), 0);
        assert_eq!(net_device.pool.worker_count(), 0);
    });
    uplink.refuses_queues.store(false, Relaxed);
    with_frontend(&net_device, &two_pairs(), |frontend| send(frontend, 1, 2));
    assert_eq!(sent_frames(&net_device), [0, 2]);
    // Its queue pairs last, but the next front-end gets no queue.
    uplink.refuses_queues.store(true, Relaxed);
    with_socket(&net_device, |socket| {
        assert!(TestFrontend::from_socket(socket, &two_pairs()).is_err());
        assert!(net_device.pairs().all(|served| !served.worker.is_open()));
    });
}

#[test]
fn queue_pair_beyond_the_last_one_is_an_error_that_names_their_number() {
    let net_device = net_device(2, Null, PollMode::Off);
    let error = net_device.open_pair(2, 4).unwrap_err();
    assert!(
        matches!(
            error,
            BackendError::NoSuchQueuePair {
                index: 4,
                queue_pairs: 2,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(net_device.stop_vring(4), None);
    assert_eq!(net_device.stop_vring(0), None, "it was never started");
    assert!(net_device.set_kick(0, None).is_ok());
}

#[test]
fn offloads_or_queues_that_the_uplink_refuses_are_logged_and_frames_are_carried() {
    let uplink = TestUplink::default();
    uplink.refuses_formats.store(true, Relaxed);
    uplink.refuses_attaching.store(true, Relaxed);
    let net_device = net_device(2, uplink, PollMode::Off);
    let log = with_frontend(&net_device, &two_pairs(), |frontend| send(frontend, 0, 2));
    assert!(
        log.contains("vnet: the uplink cannot be set to the offloads that the driver accepted"),
        "{log}"
    );
    assert!(
        log.contains("vnet pair 0: cannot attach the uplink's queue"),
        "{log}"
    );
    assert_eq!(sent_frames(&net_device), [2, 0]);
}

#[test]
fn front_end_that_leaves_before_it_uses_the_device_is_logged_with_the_likely_reason() {
    let net_device = net_device(2, Null, PollMode::Off);
    let log = with_socket(&net_device, |socket| {
        let mut connection = FrontendConnection::from_socket(socket).unwrap();
        let features = connection.get_protocol_features().unwrap();
        connection.set_protocol_features(features).unwrap();
    });
    assert!(log.contains("vnet: front-end connected (process "), "{log}");
    assert!(
        log.contains("vnet: front-end gone before it used the device; if it asked for more than 2 queue pairs, raise --queues 2"),
        "{log}"
    );
    // It comes again at once, which is not logged.
    let log = with_frontend(&net_device, &two_pairs(), |_| {});
    assert!(!log.contains("front-end"), "{log}");
}

#[test]
fn interrupts_and_advice_follow_the_pairs_in_use() {
    let _guard = ONE_TEST_WITH_VCPUS_AT_A_TIME.lock();
    let uplink = TestUplink::default();
    let net_device = net_device(3, uplink, PollMode::Off);
    assert_eq!(net_device.affinity_input(), None);
    assert!(net_device.queue_usage().is_none());
    with_frontend(&net_device, &two_pairs(), |frontend| {
        net_device.refresh_placement();
        let last = HostCpus::read().unwrap().allowed().last().unwrap();
        let own = CpuSet::from_iter([last]);
        wait_until("both workers are placed", || {
            net_device.affinity_input().is_some_and(|input| {
                input.workers == [own.clone(), own.clone()] && input.interface.queues == [0, 1]
            })
        });
        let usage = net_device.queue_usage().unwrap();
        assert_eq!(
            (usage.offered, usage.enabled, usage.multiqueue),
            (2, 2, true)
        );
        assert_eq!(usage.vcpus, None, "they are not known");
        frontend.enable(0, false).unwrap();
        let input = net_device.affinity_input().unwrap();
        assert_eq!(input.workers, [CpuSet::default(), own]);
        assert_eq!(input.interface.queues, [1]);
        assert_eq!(net_device.queue_usage().unwrap().enabled, 1);
        assert_eq!(net_device.advice(), [""; 0]);
        // The guest leaves the queue pair idle for a while after a check has noted that.
        net_device.refresh_placement();
        let later = Instant::now() + TIMEOUT;
        let observe = || net_device.queue_usage();
        net_device.adviser.update(observe, later);
        let advice = net_device.advice();
        let text = "the guest uses 1 of its 2 queue pairs";
        assert!(
            advice.len() == 1 && advice[0].starts_with(text),
            "{advice:?}"
        );
        frontend.enable(1, false).unwrap();
        assert_eq!(net_device.affinity_input(), None);
        assert!(net_device.queue_usage().is_none(), "it uses none");
    });
    assert_eq!(net_device.advice(), [""; 0]);
    assert_eq!(net_device.affinity_input(), None);
}

#[test]
fn worker_that_was_held_goes_on_after_the_request_to_stop_was_withdrawn() {
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        send(frontend, 1, 1);
        let gate = uplink.gate.lock();
        let frame = FrameSpec::v4(Transport::Udp).build(b"held").unwrap();
        frontend.pairs[0].tx.send(&frame).unwrap();
        wait_until("the first worker is held", || {
            uplink.bursts.load(Relaxed) == 2
        });
        let workers: Vec<_> = net_device.pairs().map(|served| &served.worker).collect();
        net_device.pool.request_stop();
        // The second one stops, and the first one cannot.
        assert!(!workers[0].wait_until_stopped(Instant::now() + Duration::from_millis(1)));
        assert!(workers[1].wait_until_stopped(Instant::now() + TIMEOUT));
        net_device.pool.resume();
        drop(gate);
        send(frontend, 0, 2);
        send(frontend, 1, 3);
    });
    assert_eq!(sent_frames(&net_device), [3, 4]);
}

#[test]
fn worker_that_is_asked_to_stop_and_to_go_on_at_once_goes_on() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        for _ in 0..100 {
            net_device.pool.request_stop();
            net_device.pool.resume();
            send(frontend, 0, 1);
        }
    });
    assert_eq!(sent_frames(&net_device), [100, 0]);
}
