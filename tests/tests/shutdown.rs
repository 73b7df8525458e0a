//! The end of the daemon, asked for or not, and what the guest sees of it: a
//! QEMU that reconnects goes on with the next daemon, its connections alive.

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
const AT_ONCE: Duration = Duration::from_millis(100);

#[test]
fn signals_end_it_at_once_and_the_next_daemon_goes_on() {
    let plan = TestbedConfig::new(PAIRS).persistent_tap().reconnect_ms(100);
    let mut testbed = plan.start().unwrap();
    let mut times = Vec::new();
    // Each round loads the path anew; on a busy machine the best of three counts.
    while times.len() < 3 {
        let iperf = iperf(&testbed.network, testbed.qemu.guest(), &testbed.dir).unwrap();
        let mut running = iperf
            .start(&IperfLoad::tcp(8).flows(4), Direction::GuestToHost)
            .unwrap();
        sleep(Duration::from_secs(2));
        assert!(!running.is_over().unwrap());
        drop(iperf);
        let stopped = testbed.daemon.end(Signal::SIGTERM).unwrap();
        eprintln!("SIGTERM under load: {:?}", stopped.took);
        assert!(stopped.status.success(), "{stopped:?}");
        assert!(!testbed.daemon.socket().exists());
        assert!(!testbed.daemon.control().exists());
        testbed.daemon = plan.start_daemon(&testbed.network, &testbed.dir).unwrap();
        let report = running.finish().unwrap();
        eprintln!("{:.2} Gbit/s across the change", report.gbps);
        assert!(report.each.iter().all(|gbps| *gbps > 0.0), "{report:?}");
        times.push(stopped.took);
        if stopped.took <= AT_ONCE {
            break;
        }
    }
    assert!(times.iter().any(|took| *took <= AT_ONCE), "{times:?}");

    times.clear();
    while times.len() < 3 && times.last().is_none_or(|took| *took > AT_ONCE) {
        // SIGHUP is ignored, and the guest's connection lives on.
        testbed.daemon.proc().signal(Signal::SIGHUP).unwrap();
        testbed.network.wait_for_ping(GUEST.v4).unwrap();
        let stopped = testbed.daemon.end(Signal::SIGINT).unwrap();
        eprintln!("SIGINT: {:?}", stopped.took);
        assert!(stopped.status.success(), "{stopped:?}");
        assert!(!testbed.daemon.socket().exists());
        times.push(stopped.took);
        testbed.daemon = plan.start_daemon(&testbed.network, &testbed.dir).unwrap();
    }
    assert!(times.iter().any(|took| *took <= AT_ONCE), "{times:?}");
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
    testbed.network.wait_for_ping(GUEST.v6).unwrap();
}

#[test]
fn a_killed_daemon_is_followed_by_the_next_and_connections_live_on() {
    let plan = TestbedConfig::new(PAIRS).persistent_tap().reconnect_ms(100);
    let mut testbed = plan.start().unwrap();
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let iperf = iperf(&testbed.network, testbed.qemu.guest(), &testbed.dir).unwrap();
        let mut running = iperf
            .start(&IperfLoad::tcp(15).flows(4), direction)
            .unwrap();
        for _ in 0..3 {
            sleep(Duration::from_millis(1500));
            testbed.daemon.proc().signal(Signal::SIGKILL).unwrap();
            testbed.daemon.proc().wait(Duration::from_secs(5)).unwrap();
            assert!(
                testbed.daemon.socket().exists(),
                "nobody was left to remove it"
            );
            testbed.daemon = plan.start_daemon(&testbed.network, &testbed.dir).unwrap();
            testbed.network.wait_for_ping(GUEST.v4).unwrap();
        }
        assert!(!running.is_over().unwrap(), "the load ended too early");
        let report = running.finish().unwrap();
        eprintln!("{direction:?}: {report:?}");
        assert!(report.each.iter().all(|gbps| *gbps > 0.0), "{report:?}");
    }
    testbed.move_data_both_ways().unwrap();
}

#[test]
fn an_idle_card_uses_no_cpu() {
    let testbed = TestbedConfig::new(4).start().unwrap();
    testbed.move_data_both_ways().unwrap();
    // Neighbour and multicast chatter after the start of a link takes some seconds to end.
    sleep(Duration::from_secs(5));
    let before = cpu_ticks(testbed.daemon.pid()).unwrap();
    sleep(Duration::from_secs(10));
    let used = cpu_ticks(testbed.daemon.pid()).unwrap() - before;
    eprintln!("{used} clock ticks in 10 s, after {before}");
    assert!(used <= 1, "{used} clock ticks in 10 s");
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
}

/// As [`virtionet_tests::testbed::Testbed::iperf`], but the daemon may change meanwhile.
fn iperf<'a>(network: &'a HostNetwork, guest: &'a Guest, dir: &'a RunDir) -> Result<Iperf<'a>> {
    Iperf::new(network, guest, dir, Clients::Host, PAIRS)
}
