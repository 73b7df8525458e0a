//! The number of pairs in use, as `ethtool -L` in the guest changes it: no
//! connection suffers, and a pair out of use gets and sends nothing.

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
use virtionet_tests::topology::{CARD, HostNetwork, TAP};

const PAIRS: u16 = 4;
/// For what was on its way when the number changed.
const SETTLE: Duration = Duration::from_millis(700);
const OBSERVATION_TIME: Duration = Duration::from_millis(1500);

#[test]
fn connections_live_through_changes_and_unused_pairs_stay_silent() {
    let testbed = TestbedConfig::new(PAIRS).start().unwrap();
    let guest = testbed.qemu.guest();
    let iperf = testbed.iperf().unwrap();
    // It has to outlast the changes below, which took 25 s to 29 s with emulated guests on 2 CPUs.
    let load = IperfLoad::tcp(40).flows(8).arg("--bidir");
    let began = Instant::now();
    let mut running = iperf.start(&load, Direction::HostToGuest).unwrap();
    sleep(Duration::from_secs(2));
    for used in [1, 2, 4, 2, 1, 4_usize] {
        guest
            .ok(&format!("ethtool -L {CARD} combined {used}"))
            .unwrap();
        sleep(SETTLE);
        let before = pairs(&testbed.daemon.device().unwrap()).unwrap();
        sleep(OBSERVATION_TIME);
        let after = pairs(&testbed.daemon.device().unwrap()).unwrap();
        let moved = changes(&before, &after);
        eprintln!("{used} in use: (rx, tx) frames {moved:?}");
        for (k, pair) in after.iter().enumerate() {
            assert_eq!(pair.rx.enabled, k < used, "pair {k} of {used}");
            assert_eq!(pair.tx.enabled, k < used, "pair {k} of {used}");
        }
        assert!(
            moved[used..].iter().all(|m| *m == (0, 0)),
            "{used}: {moved:?}"
        );
        let (rx, tx) = moved
            .iter()
            .fold((0, 0), |sum, m| (sum.0 + m.0, sum.1 + m.1));
        assert!(rx > 100 && tx > 100, "{used}: {moved:?}");
        assert_eq!(
            vcpus_of_interrupts(guest, used).unwrap(),
            after[..used]
                .iter()
                .map(|pair| pair.vcpus.clone())
                .collect::<Vec<_>>(),
            "{used} in use"
        );
    }
    eprintln!("the changes took {:?}", began.elapsed());
    assert!(!running.is_over().unwrap(), "the load ended too early");
    let report = running.finish().unwrap();
    eprintln!("{report:?}");
    assert_eq!(report.each.len(), usize::from(PAIRS));
    assert!(report.each.iter().all(|gbps| *gbps > 0.0), "{report:?}");
}

#[test]
fn a_disabled_pairs_frames_are_drained_counted_and_reach_nobody() {
    const SENT: u64 = 1000;
    let limit = Duration::from_secs(10);
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let options = Options::new().netns(network.netns()).flag("--tap", TAP);
    let daemon = options.start(&dir, "vnet").unwrap();
    let config = TestFrontendConfig::new(2, 256, MODERN);
    let mut frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    let frame = FrameSpec::v4(Transport::Udp).build(b"to nobody").unwrap();
    let frames: Vec<Frame> = (0..SENT).map(|_| frame.clone()).collect();

    let mut handed_over = 0;
    for enabled in [false, true, false] {
        frontend.enable(1, enabled).unwrap();
        let old = pairs(&daemon.device().unwrap()).unwrap().remove(1).tx;
        let seen = received_by_host(&network).unwrap();
        frontend.pairs[1].tx.send_all(&frames, limit).unwrap();
        frontend.pairs[1].tx.drain(limit).unwrap();
        let new = pairs(&daemon.device().unwrap()).unwrap().remove(1).tx;
        let host = received_by_host(&network).unwrap() - seen;
        let dropped = new.dropped_disabled - old.dropped_disabled;
        assert_eq!(new.enabled, enabled);
        if enabled {
            assert_eq!((host, dropped), (SENT, 0));
            assert_eq!(new.frames - old.frames, SENT);
        } else {
            assert_eq!((host, dropped), (0, SENT));
        }
        handed_over += host;
    }
    assert_eq!(handed_over, SENT);
}

/// Frames to and from the guest in between, by pair.
fn changes(before: &[PairCounters], after: &[PairCounters]) -> Vec<(u64, u64)> {
    let change = |(old, new): (&PairCounters, &PairCounters)| {
        let tx = new.tx.frames + new.tx.dropped_disabled;
        let old_tx = old.tx.frames + old.tx.dropped_disabled;
        (new.rx.frames - old.rx.frames, tx - old_tx)
    };
    before.iter().zip(after).map(change).collect()
}

/// The vCPUs that the driver gave to the receive interrupts of the first pairs.
fn vcpus_of_interrupts(guest: &Guest, pairs: usize) -> Result<Vec<Vec<usize>>> {
    let one = |k| {
        let irq = format!("grep 'virtio0-input.{k}$' /proc/interrupts | cut -d: -f1 | tr -d ' '");
        let list = guest.ok(&format!("cat /proc/irq/$({irq})/smp_affinity_list"))?;
        parse_list(list.trim()).with_context(|| format!("{list:?} is no list of CPUs"))
    };
    (0..pairs).map(one).collect()
}

/// `0-2,5` as numbers.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}

/// Frames that the host's network stack got from the TAP.
fn received_by_host(network: &HostNetwork) -> Result<u64> {
    let text = network.netns().ip(&format!("-j -s link show {TAP}"))?;
    let links: Value = serde_json::from_str(&text)?;
    links[0]["stats64"]["rx"]["packets"]
        .as_u64()
        .with_context(|| format!("no count in {text}"))
}
