//! Changes of the number of queue pairs in use, by `ethtool -L` in the guest. Connections must
//! continue, and an unused pair must neither receive nor transmit frames.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::counters::{PairCounters, pairs};
use virtionet_tests::daemon::Options;
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::paths::RunDir;
use virtionet_tests::testbed::TestbedConfig;
use virtionet_tests::topology::{GUEST_INTERFACE, HostNetwork, TAP};

const PAIRS: u16 = 4;
/// The time for frames in flight, after the number of pairs has changed.
const STABILIZATION_TIME: Duration = Duration::from_millis(700);
const OBSERVATION_TIME: Duration = Duration::from_millis(1500);

#[test]
fn connections_continue_through_pair_changes_and_unused_pairs_carry_no_frames() {
    let testbed = TestbedConfig::new(PAIRS).start().unwrap();
    let guest = testbed.qemu.guest();
    let iperf = testbed.iperf().unwrap();
    // The load must outlast the changes below, which took 25 s to 29 s with emulated guests on 2
    // CPUs.
    let load = IperfLoad::tcp(40).flows(8).arg("--bidir");
    let started_at = Instant::now();
    let mut running = iperf.start(&load, Direction::HostToGuest).unwrap();
    sleep(Duration::from_secs(2));
    for used in [1, 2, 4, 2, 1, 4_usize] {
        guest
            .ok(&format!("ethtool -L {GUEST_INTERFACE} combined {used}"))
            .unwrap();
        sleep(STABILIZATION_TIME);
        let before = pairs(&testbed.daemon.device().unwrap()).unwrap();
        sleep(OBSERVATION_TIME);
        let after = pairs(&testbed.daemon.device().unwrap()).unwrap();
        let carried = frames_between(&before, &after);
        eprintln!("{used} pairs in use: (rx, tx) frames {carried:?}");
        for (k, pair) in after.iter().enumerate() {
            assert_eq!(pair.rx.enabled, k < used, "pair {k} of {used}");
            assert_eq!(pair.tx.enabled, k < used, "pair {k} of {used}");
        }
        assert!(
            carried[used..].iter().all(|frames| *frames == (0, 0)),
            "{used}: {carried:?}"
        );
        let (rx, tx) = carried
            .iter()
            .fold((0, 0), |sum, frames| (sum.0 + frames.0, sum.1 + frames.1));
        assert!(rx > 100 && tx > 100, "{used}: {carried:?}");
        assert_eq!(
            read_interrupt_vcpus(guest, used).unwrap(),
            after[..used]
                .iter()
                .map(|pair| pair.vcpus.clone())
                .collect::<Vec<_>>(),
            "{used} pairs in use"
        );
    }
    eprintln!("the changes took {:?}", started_at.elapsed());
    assert!(
        !running.is_finished().unwrap(),
        "the load ended before the changes"
    );
    let report = running.finish().unwrap();
    eprintln!("{report:?}");
    assert_eq!(report.gbps_by_process.len(), usize::from(PAIRS));
    assert!(
        report.gbps_by_process.iter().all(|gbps| *gbps > 0.0),
        "{report:?}"
    );
}

#[test]
fn tx_frames_of_a_disabled_pair_are_drained_and_counted_and_do_not_reach_the_host() {
    const SENT: u64 = 1000;
    let timeout = Duration::from_secs(10);
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let options = Options::new().netns(network.netns()).flag("--tap", TAP);
    let daemon = options.start(&dir, "vnet").unwrap();
    let config = TestFrontendConfig::new(2, 256, MODERN);
    let mut frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    let frame = FrameSpec::v4(Transport::Udp).build(b"to nobody").unwrap();
    let frames: Vec<Frame> = (0..SENT).map(|_| frame.clone()).collect();

    let mut total_received = 0;
    for is_enabled in [false, true, false] {
        frontend.enable(1, is_enabled).unwrap();
        let old = pairs(&daemon.device().unwrap()).unwrap().remove(1).tx;
        let received_before = count_received_by_host(&network).unwrap();
        frontend.pairs[1].tx.send_all(&frames, timeout).unwrap();
        frontend.pairs[1].tx.drain(timeout).unwrap();
        let new = pairs(&daemon.device().unwrap()).unwrap().remove(1).tx;
        let received = count_received_by_host(&network).unwrap() - received_before;
        let dropped = new.dropped_disabled - old.dropped_disabled;
        assert_eq!(new.enabled, is_enabled);
        if is_enabled {
            assert_eq!((received, dropped), (SENT, 0));
            assert_eq!(new.frames - old.frames, SENT);
        } else {
            assert_eq!((received, dropped), (0, SENT));
        }
        total_received += received;
    }
    assert_eq!(total_received, SENT);
}

/// Returns the RX and TX frames of each queue pair between two samples. Dropped TX frames are
/// included.
fn frames_between(before: &[PairCounters], after: &[PairCounters]) -> Vec<(u64, u64)> {
    let frames = |(old, new): (&PairCounters, &PairCounters)| {
        let tx = new.tx.frames + new.tx.dropped_disabled;
        let old_tx = old.tx.frames + old.tx.dropped_disabled;
        (new.rx.frames - old.rx.frames, tx - old_tx)
    };
    before.iter().zip(after).map(frames).collect()
}

/// Reads the vCPUs to which the driver has assigned the receive interrupts of the first `pairs`
/// queue pairs.
fn read_interrupt_vcpus(guest: &Guest, pairs: usize) -> Result<Vec<Vec<usize>>> {
    let read = |k| {
        let irq = format!("grep 'virtio0-input.{k}$' /proc/interrupts | cut -d: -f1 | tr -d ' '");
        let list = guest.ok(&format!("cat /proc/irq/$({irq})/smp_affinity_list"))?;
        parse_list(list.trim()).with_context(|| format!("{list:?} is not a list of CPUs"))
    };
    (0..pairs).map(read).collect()
}

/// Parses a list such as `0-2,5`.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}

/// Returns the number of frames that the host's network stack has received from the TAP.
fn count_received_by_host(network: &HostNetwork) -> Result<u64> {
    let text = network.netns().ip(&format!("-j -s link show {TAP}"))?;
    let links: Value = serde_json::from_str(&text)?;
    links[0]["stats64"]["rx"]["packets"]
        .as_u64()
        .with_context(|| format!("ip prints no number of received packets: {text}"))
}
