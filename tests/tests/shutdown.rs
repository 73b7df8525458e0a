//! The exit of the daemon, by a signal or killed. A QEMU that reconnects continues with the next
//! daemon, and the guest's connections stay open.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad};
use virtionet_tests::paths::RunDir;
use virtionet_tests::procfs::cpu_ticks;
use virtionet_tests::testbed::TestbedConfig;
use virtionet_tests::topology::{GUEST, HostNetwork};

const PAIRS: u16 = 2;
const MAX_SHUTDOWN_TIME: Duration = Duration::from_millis(100);

#[test]
fn sigterm_and_sigint_stop_the_daemon_within_100_ms_and_the_next_daemon_continues() {
    let config = TestbedConfig::new(PAIRS).persistent_tap().reconnect_ms(100);
    let mut testbed = config.start().unwrap();
    let mut times = Vec::new();
    // On a busy machine a shutdown may take longer, so the best of three counts.
    while times.len() < 3 {
        let iperf = prepare_iperf(&testbed.network, testbed.qemu.guest(), &testbed.dir).unwrap();
        let mut running = iperf
            .start(&IperfLoad::tcp(8).flows(4), Direction::GuestToHost)
            .unwrap();
        sleep(Duration::from_secs(2));
        assert!(!running.is_finished().unwrap());
        drop(iperf);
        let stopped = testbed.daemon.stop_in_place(Signal::SIGTERM).unwrap();
        eprintln!("SIGTERM under load: {:?}", stopped.duration);
        assert!(stopped.status.success(), "{stopped:?}");
        assert!(!testbed.daemon.socket().exists());
        assert!(!testbed.daemon.control().exists());
        testbed.daemon = config.start_daemon(&testbed.network, &testbed.dir).unwrap();
        let report = running.finish().unwrap();
        eprintln!(
            "{:.2} Gbit/s including the restart of the daemon",
            report.gbps
        );
        assert!(
            report.gbps_by_process.iter().all(|gbps| *gbps > 0.0),
            "{report:?}"
        );
        times.push(stopped.duration);
        if stopped.duration <= MAX_SHUTDOWN_TIME {
            break;
        }
    }
    assert!(
        times.iter().any(|time| *time <= MAX_SHUTDOWN_TIME),
        "{times:?}"
    );

    times.clear();
    while times.len() < 3 && times.last().is_none_or(|time| *time > MAX_SHUTDOWN_TIME) {
        // The configuration is the same.
        testbed.daemon.proc().signal(Signal::SIGHUP).unwrap();
        testbed.network.wait_for_ping(GUEST.v4).unwrap();
        let stopped = testbed.daemon.stop_in_place(Signal::SIGINT).unwrap();
        eprintln!("SIGINT: {:?}", stopped.duration);
        assert!(stopped.status.success(), "{stopped:?}");
        assert!(!testbed.daemon.socket().exists());
        times.push(stopped.duration);
        testbed.daemon = config.start_daemon(&testbed.network, &testbed.dir).unwrap();
    }
    assert!(
        times.iter().any(|time| *time <= MAX_SHUTDOWN_TIME),
        "{times:?}"
    );
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
    testbed.network.wait_for_ping(GUEST.v6).unwrap();
}

#[test]
fn after_the_daemon_is_killed_the_next_daemon_continues_and_connections_stay_open() {
    let config = TestbedConfig::new(PAIRS).persistent_tap().reconnect_ms(100);
    let mut testbed = config.start().unwrap();
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let iperf = prepare_iperf(&testbed.network, testbed.qemu.guest(), &testbed.dir).unwrap();
        let mut running = iperf
            .start(&IperfLoad::tcp(15).flows(4), direction)
            .unwrap();
        for _ in 0..3 {
            sleep(Duration::from_millis(1500));
            testbed.daemon.proc().signal(Signal::SIGKILL).unwrap();
            testbed.daemon.proc().wait(Duration::from_secs(5)).unwrap();
            assert!(
                testbed.daemon.socket().exists(),
                "a killed daemon cannot remove its socket"
            );
            testbed.daemon = config.start_daemon(&testbed.network, &testbed.dir).unwrap();
            testbed.network.wait_for_ping(GUEST.v4).unwrap();
        }
        assert!(
            !running.is_finished().unwrap(),
            "the load ended before the restarts"
        );
        let report = running.finish().unwrap();
        eprintln!("{direction:?}: {report:?}");
        assert!(
            report.gbps_by_process.iter().all(|gbps| *gbps > 0.0),
            "{report:?}"
        );
    }
    testbed.move_data_both_ways().unwrap();
}

#[test]
fn daemon_of_an_idle_guest_uses_at_most_one_clock_tick_in_10_s() {
    let testbed = TestbedConfig::new(4).start().unwrap();
    testbed.move_data_both_ways().unwrap();
    // For some seconds after a link has come up, the kernels send neighbour discovery and multicast
    // frames.
    sleep(Duration::from_secs(5));
    let before = cpu_ticks(testbed.daemon.pid()).unwrap();
    sleep(Duration::from_secs(10));
    let used = cpu_ticks(testbed.daemon.pid()).unwrap() - before;
    eprintln!("{used} clock ticks in 10 s, after {before}");
    assert!(used <= 1, "{used} clock ticks in 10 s");
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
}

/// Does the same as [`virtionet_tests::testbed::Testbed::iperf`], but does not borrow the testbed's
/// daemon, so that the test can replace it.
fn prepare_iperf<'a>(
    network: &'a HostNetwork,
    guest: &'a Guest,
    dir: &'a RunDir,
) -> Result<Iperf<'a>> {
    Iperf::new(network, guest, dir, Clients::Host, PAIRS)
}
