//! Interrupts and steering masks: on the host's side they follow the workers and go back to what
//! they were; on the guest's side what it chose badly is told with the command that mends it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::TestFrontendConfig;
use virtionet_tests::accel::Accel;
use virtionet_tests::counters::pairs;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::netns::Netns;
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic};
use virtionet_tests::responder::{EchoResponder, Identity};
use virtionet_tests::sched;
use virtionet_tests::testbed::BOOT;
use virtionet_tests::topology::{CARD, GUEST, HostNetwork, TAP, configure_guest};

const PAIRS: u16 = 4;
const SOON: Duration = Duration::from_secs(5);
/// All CPUs, as somebody might have set it before.
const BEFORE: &str = "3";

#[test]
fn masks_follow_the_workers_of_a_guest_and_go_back_at_the_end() {
    let network = lan_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = options(&network, "apply").start(&dir, "vnet").unwrap();
    let (qemu, _) = Machine::new()
        .vcpus(PAIRS.into())
        .accel(Accel::Auto)
        .nic(Nic::vhost_user(daemon.socket()).queues(PAIRS))
        .pinned()
        .boot(&dir, "guest", BOOT)
        .unwrap();
    configure_guest(qemu.guest(), PAIRS).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    assert_worker_masks(&network, &daemon, 4).unwrap();
    let settings = daemon.device().unwrap()["interrupts"]["settings"].clone();
    let first = find(&settings, "tx-0/xps_cpus").unwrap();
    assert_eq!(
        (&first["original"], &first["applied"]),
        (&BEFORE.into(), &true.into())
    );

    // The kernel takes queues' numbers and masks away with the pairs, and makes new ones.
    for pairs in [2, 3, 1, 4] {
        let combined = format!("ethtool -L {CARD} combined {pairs}");
        qemu.guest().ok(&combined).unwrap();
        assert_worker_masks(&network, &daemon, pairs).unwrap();
    }
    // The vCPUs are moved, and the workers go after them.
    qemu.pin_vcpus_to(&[1, 0, 0, 0]).unwrap();
    eventually(|| {
        let device = daemon.device()?;
        let places: Vec<_> = pairs(&device)?.into_iter().map(|pair| pair.cpus).collect();
        ensure!(places == [vec![1], vec![0], vec![0], vec![0]], "{places:?}");
        Ok(())
    })
    .unwrap();
    assert_worker_masks(&network, &daemon, 4).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();

    let ended = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(ended.status.success(), "{}", ended.stderr);
    let masks = masks(network.netns()).unwrap();
    assert_eq!(masks, [(BEFORE.into(), BEFORE.into())]);
}

#[test]
fn masks_go_back_when_the_front_end_goes() {
    let network = lan_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = options(&network, "apply").start(&dir, "vnet").unwrap();
    let responder = responder(&daemon, 2).unwrap();
    assert_worker_masks(&network, &daemon, 2).unwrap();
    drop(responder);
    eventually(|| {
        let now = masks(network.netns())?;
        ensure!(now == [(BEFORE.into(), BEFORE.into())], "{now:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn printing_names_the_commands_and_changes_nothing() {
    let network = lan_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = options(&network, "print").start(&dir, "vnet").unwrap();
    let _station = responder(&daemon, 2).unwrap();
    let settings = wait_settings(&daemon, 4).unwrap();
    let worker = pairs(&daemon.device().unwrap()).unwrap()[0].tid;
    let cpu = sched::affinity(worker).unwrap()[0];
    let first = find(&settings, "tx-0/xps_cpus").unwrap();
    let command = format!(
        "echo {} > /sys/class/net/{TAP}/queues/tx-0/xps_cpus",
        1 << cpu
    );
    assert_eq!(first["command"], command);
    assert_eq!(first["applied"], false);
    assert!(daemon.stderr().contains(&command), "{}", daemon.stderr());
    for (_, rps) in masks(network.netns()).unwrap() {
        assert_eq!(rps, BEFORE);
    }
    let (xps, _) = &masks(network.netns()).unwrap()[0];
    assert_eq!(xps, BEFORE);
    // The commands do what applying would.
    for setting in settings.as_array().unwrap() {
        let command = setting["command"].as_str().unwrap();
        network.netns().run("sh", ["-c", command]).unwrap();
    }
    assert_worker_masks(&network, &daemon, 2).unwrap();
}

#[test]
fn nothing_is_touched_unless_asked() {
    let network = lan_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .netns(network.netns())
        .flag("--tap", TAP)
        .start(&dir, "vnet")
        .unwrap();
    let _station = responder(&daemon, 2).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(daemon.device().unwrap()["interrupts"]["mode"], "off");
    assert_eq!(
        masks(network.netns()).unwrap()[0],
        (BEFORE.into(), BEFORE.into())
    );
}

#[test]
fn without_the_right_to_write_it_says_so_once_and_goes_on() {
    let network = lan_with_masks().unwrap();
    network.netns().ip(&format!("link del {TAP}")).unwrap();
    let make = format!("tuntap add dev {TAP} mode tap user 65534 vnet_hdr multi_queue");
    network.netns().ip(&make).unwrap();
    network.configure().unwrap();
    let dir = RunDir::new().unwrap();
    // Another user's daemon makes its sockets here.
    let home = dir.join("vnet.sock");
    let home = home.parent().unwrap();
    fs::set_permissions(home, fs::Permissions::from_mode(0o777)).unwrap();
    let daemon = options(&network, "apply")
        .wrapped_in([
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ])
        .start(&dir, "vnet")
        .unwrap();
    let _station = responder(&daemon, 2).unwrap();
    wait_settings(&daemon, 2).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    let told = daemon.stderr().matches("masks cannot be set").count();
    assert_eq!(told, 1, "{}", daemon.stderr());
    let notes = daemon.device().unwrap()["interrupts"]["notes"].to_string();
    assert!(notes.contains("--irq-affinity=print"), "{notes}");
}

#[test]
fn a_guest_that_wastes_its_pairs_and_shares_its_vectors_is_told() {
    let network = HostNetwork::bare().unwrap();
    let dir = RunDir::new().unwrap();
    let monitor = dir.join("monitor.qmp");
    let daemon = Options::new()
        .netns(network.netns())
        .flag("--tap", TAP)
        .flag("--qmp", &monitor)
        .start(&dir, "vnet")
        .unwrap();
    network.configure().unwrap();
    let (qemu, _) = Machine::new()
        .vcpus(PAIRS.into())
        .accel(Accel::Auto)
        .monitor(&monitor)
        .nic(
            Nic::vhost_user(daemon.socket())
                .queues(PAIRS)
                .prop("vectors=3"),
        )
        .pinned()
        .boot(&dir, "guest", BOOT)
        .unwrap();
    configure_guest(qemu.guest(), 2).unwrap();
    let shared = qemu.guest().ok("grep -c virtio0 /proc/interrupts").unwrap();
    assert_eq!(
        shared.trim(),
        "2",
        "a vector for all queues, one for changes"
    );
    let pairs = "the guest uses 2 of its 4 queue pairs though it has 4 vCPUs: run `ethtool -L IFACE combined 4` in the guest";
    let vectors = "has 3 interrupt vectors for 4 queue pairs, so queues share one and their interrupts cannot be spread over vCPUs: use vectors=10 at QEMU's -device virtio-net-pci";
    let advice = wait_advice(&daemon, |advice| {
        advice.contains(pairs) && advice.contains(vectors)
    });
    advice.unwrap();
    for words in [pairs, vectors] {
        assert_eq!(
            daemon.stderr().matches(words).count(),
            1,
            "{}",
            daemon.stderr()
        );
    }

    qemu.guest()
        .ok(&format!("ethtool -L {CARD} combined 4"))
        .unwrap();
    let advice = wait_advice(&daemon, |advice| !advice.contains(pairs)).unwrap();
    assert!(advice.contains(vectors), "{advice}");
}

#[test]
fn a_card_that_does_not_offer_its_pairs_is_told() {
    let network = HostNetwork::bare().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = options(&network, "off").start(&dir, "vnet").unwrap();
    network.configure().unwrap();
    let (qemu, _) = Machine::new()
        .vcpus(2)
        .accel(Accel::Auto)
        .nic(Nic::vhost_user(daemon.socket()).queues(2).prop("mq=off"))
        .pinned()
        .boot(&dir, "guest", BOOT)
        .unwrap();
    configure_guest(qemu.guest(), 1).unwrap();
    wait_advice(&daemon, |advice| {
        advice.contains("uses 1 of its 2 queue pairs") && advice.contains("add mq=on")
    })
    .unwrap();
}

#[test]
fn a_guest_that_uses_all_it_has_is_told_nothing() {
    let network = HostNetwork::bare().unwrap();
    let dir = RunDir::new().unwrap();
    let monitor = dir.join("monitor.qmp");
    let daemon = options(&network, "off")
        .flag("--qmp", &monitor)
        .start(&dir, "vnet")
        .unwrap();
    network.configure().unwrap();
    let (qemu, _) = Machine::new()
        .vcpus(2)
        .accel(Accel::Auto)
        .monitor(&monitor)
        .nic(Nic::vhost_user(daemon.socket()).queues(2))
        .pinned()
        .boot(&dir, "guest", BOOT)
        .unwrap();
    configure_guest(qemu.guest(), 2).unwrap();
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(daemon.device().unwrap()["advice"], serde_json::json!([]));
}

/// A TAP that was there before, with masks that somebody set.
fn lan_with_masks() -> Result<HostNetwork> {
    let network = HostNetwork::with_tap(PAIRS)?;
    // Queues that come later get it from here, where the kernel has such a thing.
    let script = format!(
        "echo {BEFORE} >/proc/sys/net/core/rps_default_mask; for f in tx-0/xps_cpus rx-0/rps_cpus; do echo {BEFORE} >/sys/class/net/{TAP}/queues/$f || exit; done"
    );
    network.netns().run("sh", ["-c", &script])?;
    Ok(network)
}

fn options(network: &HostNetwork, mode: &str) -> Options {
    Options::new()
        .netns(network.netns())
        .flag("--tap", TAP)
        .flag("--irq-affinity", mode)
}

fn responder(daemon: &Daemon, pairs: u16) -> Result<EchoResponder> {
    let config = TestFrontendConfig::new(pairs, 256, MODERN);
    EchoResponder::connect(daemon.socket(), &config, Identity::at(GUEST.v4)?)
}

/// XPS and RPS masks of the TAP's queues, by number.
fn masks(netns: &Netns) -> Result<Vec<(String, String)>> {
    let script = format!(
        "cd /sys/class/net/{TAP}/queues && for n in $(seq 0 255); do [ -e tx-$n ] || exit 0; echo $(cat tx-$n/xps_cpus rx-$n/rps_cpus); done"
    );
    let text = netns.run("sh", ["-c", &script])?;
    let mut masks = Vec::new();
    for line in text.lines() {
        let (xps, rps) = line.split_once(' ').unwrap_or((line, ""));
        masks.push((xps.to_owned(), rps.to_owned()));
    }
    Ok(masks)
}

/// There are as many queues as pairs in use, and each has the mask of a worker of its own, as the
/// kernel has that worker's affinity. RPS is narrowed where it is on.
fn assert_worker_masks(network: &HostNetwork, daemon: &Daemon, count: usize) -> Result<()> {
    eventually(|| {
        let live = pairs(&daemon.device()?)?
            .into_iter()
            .filter(|pair| pair.rx.enabled);
        let mut wanted = Vec::new();
        for pair in live {
            let mask: u64 = sched::affinity(pair.tid)?.iter().map(|cpu| 1 << cpu).sum();
            wanted.push(format!("{mask:x}"));
        }
        let masks = masks(network.netns())?;
        let mut xps: Vec<_> = masks.iter().map(|(xps, _)| xps.clone()).collect();
        wanted.sort_unstable();
        xps.sort_unstable();
        ensure!(
            wanted.len() == count && xps == wanted,
            "workers on {wanted:?}, but masks are {masks:?}"
        );
        for (xps, rps) in &masks {
            ensure!(rps == xps || rps == "0", "{masks:?}");
        }
        let (_, first) = &masks[0];
        ensure!(first != "0", "RPS was on and is off now: {masks:?}");
        Ok(())
    })
}

fn find(settings: &Value, file: &str) -> Result<Value> {
    let mut all = settings.as_array().into_iter().flatten();
    let found = all.find(|setting| setting["file"].as_str().is_some_and(|f| f.ends_with(file)));
    found
        .cloned()
        .with_context(|| format!("no {file} in {settings}"))
}

fn wait_settings(daemon: &Daemon, least: usize) -> Result<Value> {
    let mut settings = Value::Null;
    eventually(|| {
        settings = daemon.device()?["interrupts"]["settings"].clone();
        let count = settings.as_array().map_or(0, Vec::len);
        ensure!(count >= least, "only {settings}");
        Ok(())
    })?;
    Ok(settings)
}

/// The advice once it is as wanted; it comes when the guest's choice has stood for a while.
fn wait_advice(daemon: &Daemon, done: impl Fn(&str) -> bool) -> Result<String> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let advice = daemon.device()?["advice"].to_string();
        if done(&advice) {
            return Ok(advice);
        }
        ensure!(
            Instant::now() < until,
            "the advice is {advice}; the log: {}",
            daemon.stderr()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Tries until it succeeds, or for a while.
fn eventually(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + SOON;
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
