//! Devices that share a worker.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_uplink::null::Null;
use virtionet_uplink::switch::Switch;

use super::*;
use crate::host_cpus::HostCpus;
use crate::testing::{
    TIMEOUT, TestUplink, net_device_of, send, sent_frames, two_pairs, wait_until, with_frontend,
};

/// A pool with one worker, on the last CPU.
fn one_worker(poll: PollMode) -> Arc<WorkerPool> {
    let cpu = HostCpus::read().unwrap().allowed().last().unwrap();
    Arc::new(WorkerPool::shared(&CpuSet::from_iter([cpu]), poll))
}

fn on_null(pool: &Arc<WorkerPool>) -> NetDevice {
    net_device_of(Arc::clone(pool), 2, Null, PollMode::Off)
}

fn worker(net_device: &NetDevice) -> &Worker {
    &net_device.pairs().next().unwrap().worker
}

/// Waits until `count` frames have come through any queue pair.
fn wait_frames(frontend: &mut TestFrontend, count: usize) {
    let deadline = Instant::now() + TIMEOUT;
    let mut received = 0;
    while received < count {
        assert!(Instant::now() < deadline, "{received} of {count}");
        for pair in &mut frontend.pairs {
            received += pair.rx.receive(usize::MAX, |_| ()).unwrap();
        }
    }
}

#[test]
fn one_worker_carries_frames_between_the_devices_of_a_switch() {
    for poll in [PollMode::Off, PollMode::Always] {
        for format in [MODERN, MODERN | PACKED] {
            let pool = one_worker(poll);
            let switch = Switch::new("lan");
            let [a, b] = ["a", "b"].map(|name| {
                let port = switch.add_device_port(name).unwrap();
                net_device_of(Arc::clone(&pool), 2, port, poll)
            });
            let config = TestFrontendConfig::new(2, 64, format);
            with_frontend(&a, &config, |first| {
                with_frontend(&b, &config, |second| {
                    let mut ends = [first, second];
                    for frontend in &mut ends {
                        for pair in &mut frontend.pairs {
                            pair.rx.fill().unwrap();
                        }
                    }
                    for (from, to) in [(0, 1), (1, 0), (0, 1)] {
                        for pair in [0, 1] {
                            send(ends[from], pair, 30);
                        }
                        wait_frames(ends[to], 60);
                    }
                });
            });
            assert_eq!(pool.worker_count(), 1);
            assert_eq!(sent_frames(&a), [60, 60]);
            // Each queue pair is charged for its own frames.
            for served in a.pairs() {
                assert_eq!(served.pair.worker_stats().busy_frames.get(), 60);
            }
        }
    }
}

#[test]
fn worker_runs_and_has_descriptors_while_one_of_its_devices_has_a_front_end() {
    let pool = one_worker(PollMode::Off);
    let [a, b] = [on_null(&pool), on_null(&pool)];
    with_frontend(&a, &two_pairs(), |first| {
        with_frontend(&b, &two_pairs(), |second| {
            send(second, 0, 1);
        });
        assert!(worker(&b).is_open() && worker(&b).placement().is_some());
        send(first, 1, 2);
        with_frontend(&b, &two_pairs(), |second| {
            send(second, 1, 3);
        });
    });
    assert!(!worker(&a).is_open() && worker(&a).placement().is_none());
    assert_eq!(worker(&a).pair_count(), 4);
    assert_eq!((sent_frames(&a), sent_frames(&b)), (vec![0, 2], vec![1, 3]));
}

/// Both devices connect, send and disconnect all the time, so that one starts while the last queue
/// pair of the other one is released.
#[test]
fn devices_that_come_and_go_at_the_same_time_are_served() {
    const SESSIONS: u64 = 150;
    let pool = one_worker(PollMode::Off);
    let devices = [on_null(&pool), on_null(&pool)];
    std::thread::scope(|scope| {
        for device in &devices {
            scope.spawn(|| {
                for _ in 0..SESSIONS {
                    with_frontend(device, &two_pairs(), |frontend| {
                        send(frontend, 0, 1);
                        send(frontend, 1, 1);
                    });
                }
            });
        }
    });
    for device in &devices {
        assert_eq!(sent_frames(device), [SESSIONS; 2]);
        assert!(!worker(device).is_open() && worker(device).placement().is_none());
    }
}

#[test]
fn frames_of_an_uplink_that_is_polled_reach_each_front_end_that_comes() {
    let pool = one_worker(PollMode::Off);
    let other = on_null(&pool);
    let uplink = TestUplink::with_frames();
    let device = net_device_of(Arc::clone(&pool), 2, uplink.clone(), PollMode::Off);
    let frame = FrameSpec::v4(Transport::Udp).build(b"arrived").unwrap();
    // The worker, and thus its epoll, lasts because of this one.
    with_frontend(&other, &two_pairs(), |_| {
        for _ in 0..3 {
            with_frontend(&device, &two_pairs(), |frontend| {
                frontend.pairs[0].rx.fill().unwrap();
                frontend.pairs[0].rx.queue.kick_now().unwrap();
                uplink.arrive(frame.bytes.clone());
                let frames = frontend.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();
                assert_eq!(frames[0].bytes, frame.bytes);
            });
        }
    });
}

#[test]
fn guest_that_breaks_its_ring_costs_no_other_guest_of_the_worker_a_frame() {
    let pool = one_worker(PollMode::Off);
    let [broken, other] = [on_null(&pool), on_null(&pool)];
    with_frontend(&other, &two_pairs(), |good| {
        with_frontend(&broken, &two_pairs(), |bad| {
            send(bad, 0, 1);
            let ring = bad.pairs[0].tx.queue.ring.as_split().unwrap();
            ring.set_avail_index(1000);
            bad.pairs[0].tx.queue.kick_now().unwrap();
            send(good, 0, 200);
            send(bad, 1, 1);
        });
    });
    let stats = broken.pairs().next().unwrap().pair.tx().stats();
    assert_eq!(stats.avail_index_jump.get(), 1);
    assert_eq!(sent_frames(&other), [200, 0]);
    assert_eq!(sent_frames(&broken), [1, 1]);
}

#[test]
fn workers_that_stopped_for_a_handover_that_failed_serve_all_devices_again() {
    let pool = one_worker(PollMode::Off);
    let devices = [on_null(&pool), on_null(&pool)];
    with_frontend(&devices[0], &two_pairs(), |first| {
        with_frontend(&devices[1], &two_pairs(), |second| {
            for round in 0..20 {
                pool.request_stop();
                if round % 2 == 0 {
                    assert_eq!(pool.join(Instant::now() + TIMEOUT), [""; 0]);
                }
                pool.resume();
                send(first, 0, 1);
                send(second, 1, 1);
            }
        });
    });
    assert_eq!(sent_frames(&devices[0]), [20, 0]);
    assert_eq!(sent_frames(&devices[1]), [0, 20]);
}

/// The worker never runs out of work, because the flooding driver adds frames faster than the uplink
/// transmits them.
#[test]
fn flood_of_one_device_leaves_the_other_its_turns() {
    const SLOW: u16 = 150;
    let pool = one_worker(PollMode::Off);
    let uplink = TestUplink::default();
    uplink.transmit_micros.store(SLOW, Relaxed);
    let flooding = net_device_of(Arc::clone(&pool), 1, uplink, PollMode::Off);
    let other = on_null(&pool);
    let is_done = AtomicBool::new(false);
    // The passes that have left work of the flood.
    let passes = || {
        let served = flooding.pairs().next().unwrap();
        served.pair.worker_stats().over_budget.get()
    };
    let mut waited = Vec::new();
    with_frontend(
        &flooding,
        &TestFrontendConfig::new(1, 1024, MODERN),
        |flood| {
            with_frontend(&other, &two_pairs(), |good| {
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let tx = &mut flood.pairs[0].tx;
                        while !is_done.load(Relaxed) {
                            while tx.queue(&NetHeader::default(), &[0; 60]).unwrap() {}
                            tx.flush().unwrap();
                            tx.reclaim().unwrap();
                        }
                    });
                    wait_until("the flood has begun", || passes() > 5);
                    for _ in 0..100 {
                        let before = passes();
                        send(good, 0, 1);
                        waited.push(passes() - before);
                    }
                    is_done.store(true, Relaxed);
                });
            });
        },
    );
    assert_eq!(sent_frames(&other), [100, 0]);
    // One or two, unless the thread of the test was held up.
    let longest = waited.iter().max();
    assert!(longest < Some(&200), "{waited:?}");
}

/// A front-end that starts its vrings again while workers stop does not hold up a handover.
#[test]
fn vring_that_starts_while_the_workers_are_stopped_is_served_when_they_go_on() {
    for pool in [one_worker(PollMode::Off), Arc::default()] {
        let devices = [on_null(&pool), on_null(&pool)];
        with_frontend(&devices[0], &two_pairs(), |first| {
            with_frontend(&devices[1], &two_pairs(), |second| {
                second.enable(1, false).unwrap();
                second.connection.get_features().unwrap();
                pool.request_stop();
                assert_eq!(pool.join(Instant::now() + TIMEOUT), [""; 0]);
                first.stop().unwrap();
                first.reset().unwrap();
                first.start().unwrap();
                first.connection.get_features().unwrap();
                assert_eq!(pool.join(Instant::now()), [""; 0]);
                pool.resume();
                send(first, 1, 1);
                send(second, 0, 1);
                // It goes on, too, though the driver did not use it.
                second.enable(1, true).unwrap();
                send(second, 1, 1);
            });
        });
    }
}
