//! Interrupts and steering masks. On the host, the masks match the placement of the workers and are
//! restored afterwards. For the guest, the daemon reports unfavourable settings with the command
//! that improves them.

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
use virtionet_tests::responder::{EchoResponder, ResponderAddresses};
use virtionet_tests::sched;
use virtionet_tests::testbed::BOOT_TIMEOUT;
use virtionet_tests::topology::{GUEST, GUEST_INTERFACE, HostNetwork, TAP, configure_guest};

const PAIRS: u16 = 4;
const TIMEOUT: Duration = Duration::from_secs(5);
/// The mask before the daemon starts, which contains two CPUs.
const ORIGINAL_MASK: &str = "3";

#[test]
fn masks_match_the_workers_after_changes_and_are_restored_when_the_daemon_stops() {
    let network = network_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = options(&network, "apply").start(&dir, "vnet").unwrap();
    let (qemu, _) = Machine::new()
        .vcpus(PAIRS.into())
        .accel(Accel::Auto)
        .nic(Nic::vhost_user(daemon.socket()).queues(PAIRS))
        .pinned()
        .boot(&dir, "guest", BOOT_TIMEOUT)
        .unwrap();
    configure_guest(qemu.guest(), PAIRS).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    assert_worker_masks(&network, &daemon, 4).unwrap();
    let settings = daemon.device().unwrap()["interrupts"]["settings"].clone();
    let first = find_setting(&settings, "tx-0/xps_cpus").unwrap();
    assert_eq!(
        (&first["original"], &first["applied"]),
        (&ORIGINAL_MASK.into(), &true.into())
    );

    // The kernel removes the masks of removed queues, and creates new queues with new masks.
    for pairs in [2, 3, 1, 4] {
        let combined = format!("ethtool -L {GUEST_INTERFACE} combined {pairs}");
        qemu.guest().ok(&combined).unwrap();
        assert_worker_masks(&network, &daemon, pairs).unwrap();
    }
    // The workers move when the vCPUs are pinned to other CPUs.
    qemu.pin_vcpus_to(&[1, 0, 0, 0]).unwrap();
    retry_until_ok(|| {
        let device = daemon.device()?;
        let cpus: Vec<_> = pairs(&device)?.into_iter().map(|pair| pair.cpus).collect();
        ensure!(cpus == [vec![1], vec![0], vec![0], vec![0]], "{cpus:?}");
        Ok(())
    })
    .unwrap();
    assert_worker_masks(&network, &daemon, 4).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();

    let stopped = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{}", stopped.stderr);
    let masks = read_masks(network.netns()).unwrap();
    assert_eq!(masks, [(ORIGINAL_MASK.into(), ORIGINAL_MASK.into())]);
}

#[test]
fn masks_are_restored_when_the_front_end_disconnects() {
    let network = network_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let options = listed_options(&network, "apply");
    let daemon = options.start(&dir, "vnet").unwrap();
    let responder = connect_responder(&daemon, 2).unwrap();
    assert_worker_masks(&network, &daemon, 2).unwrap();
    drop(responder);
    retry_until_ok(|| {
        let masks = read_masks(network.netns())?;
        ensure!(
            masks == [(ORIGINAL_MASK.into(), ORIGINAL_MASK.into())],
            "{masks:?}"
        );
        Ok(())
    })
    .unwrap();
}

#[test]
fn print_mode_reports_the_commands_and_changes_no_mask() {
    let network = network_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let options = listed_options(&network, "print");
    let daemon = options.start(&dir, "vnet").unwrap();
    let _responder = connect_responder(&daemon, 2).unwrap();
    let settings = wait_for_settings(&daemon, 4).unwrap();
    let worker = pairs(&daemon.device().unwrap()).unwrap()[0].tid;
    let cpu = sched::affinity(worker).unwrap()[0];
    let first = find_setting(&settings, "tx-0/xps_cpus").unwrap();
    let command = format!(
        "echo {} > /sys/class/net/{TAP}/queues/tx-0/xps_cpus",
        1 << cpu
    );
    assert_eq!(first["command"], command);
    assert_eq!(first["applied"], false);
    assert!(daemon.stderr().contains(&command), "{}", daemon.stderr());
    for (_, rps) in read_masks(network.netns()).unwrap() {
        assert_eq!(rps, ORIGINAL_MASK);
    }
    let (xps, _) = &read_masks(network.netns()).unwrap()[0];
    assert_eq!(xps, ORIGINAL_MASK);
    // The printed commands have the same effect as the mode `apply`.
    for setting in settings.as_array().unwrap() {
        let command = setting["command"].as_str().unwrap();
        network.netns().run("sh", ["-c", command]).unwrap();
    }
    assert_worker_masks(&network, &daemon, 2).unwrap();
}

#[test]
fn masks_do_not_change_by_default() {
    let network = network_with_masks().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .netns(network.netns())
        .flag("--tap", TAP)
        .start(&dir, "vnet")
        .unwrap();
    let _responder = connect_responder(&daemon, 2).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(daemon.device().unwrap()["interrupts"]["mode"], "off");
    assert_eq!(
        read_masks(network.netns()).unwrap()[0],
        (ORIGINAL_MASK.into(), ORIGINAL_MASK.into())
    );
}

#[test]
fn daemon_that_may_not_write_masks_reports_this_once_and_serves_the_guest() {
    let network = network_with_masks().unwrap();
    network.netns().ip(&format!("link del {TAP}")).unwrap();
    let add = format!("tuntap add dev {TAP} mode tap user 65534 vnet_hdr multi_queue");
    network.netns().ip(&add).unwrap();
    network.configure().unwrap();
    let dir = RunDir::new().unwrap();
    // The daemon runs as another user, which must be able to create sockets in this directory.
    let socket = dir.join("vnet.sock");
    let socket_dir = socket.parent().unwrap();
    fs::set_permissions(socket_dir, fs::Permissions::from_mode(0o777)).unwrap();
    let daemon = listed_options(&network, "apply")
        .wrapped_in([
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ])
        .start(&dir, "vnet")
        .unwrap();
    let _responder = connect_responder(&daemon, 2).unwrap();
    wait_for_settings(&daemon, 2).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    let warnings = daemon.stderr().matches("masks cannot be set").count();
    assert_eq!(warnings, 1, "{}", daemon.stderr());
    let notes = daemon.device().unwrap()["interrupts"]["notes"].to_string();
    assert!(notes.contains("--irq-affinity=print"), "{notes}");
}

#[test]
fn unused_pairs_and_shared_vectors_are_reported_once_with_the_commands_that_help() {
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
        .boot(&dir, "guest", BOOT_TIMEOUT)
        .unwrap();
    configure_guest(qemu.guest(), 2).unwrap();
    let vector_count = qemu.guest().ok("grep -c virtio0 /proc/interrupts").unwrap();
    assert_eq!(
        vector_count.trim(),
        "2",
        "one vector for all queues and one for configuration changes"
    );
    let pairs = "the guest uses 2 of its 4 queue pairs though it has 4 vCPUs: run `ethtool -L IFACE combined 4` in the guest";
    let vectors = "has 3 interrupt vectors for 4 queue pairs, so queues share one and their interrupts cannot be spread over vCPUs: use vectors=10 at QEMU's -device virtio-net-pci";
    let advice = wait_for_advice(&daemon, |advice| {
        advice.contains(pairs) && advice.contains(vectors)
    });
    advice.unwrap();
    for message in [pairs, vectors] {
        assert_eq!(
            daemon.stderr().matches(message).count(),
            1,
            "{}",
            daemon.stderr()
        );
    }

    qemu.guest()
        .ok(&format!("ethtool -L {GUEST_INTERFACE} combined 4"))
        .unwrap();
    let advice = wait_for_advice(&daemon, |advice| !advice.contains(pairs)).unwrap();
    assert!(advice.contains(vectors), "{advice}");
}

#[test]
fn network_device_without_multiqueue_is_reported_with_the_property_that_helps() {
    let network = HostNetwork::bare().unwrap();
    let dir = RunDir::new().unwrap();
    let daemon = options(&network, "off").start(&dir, "vnet").unwrap();
    network.configure().unwrap();
    let (qemu, _) = Machine::new()
        .vcpus(2)
        .accel(Accel::Auto)
        .nic(Nic::vhost_user(daemon.socket()).queues(2).prop("mq=off"))
        .pinned()
        .boot(&dir, "guest", BOOT_TIMEOUT)
        .unwrap();
    configure_guest(qemu.guest(), 1).unwrap();
    wait_for_advice(&daemon, |advice| {
        advice.contains("uses 1 of its 2 queue pairs") && advice.contains("add mq=on")
    })
    .unwrap();
}

#[test]
fn guest_that_uses_all_pairs_and_vectors_gets_no_advice() {
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
        .boot(&dir, "guest", BOOT_TIMEOUT)
        .unwrap();
    configure_guest(qemu.guest(), 2).unwrap();
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(daemon.device().unwrap()["advice"], serde_json::json!([]));
}

/// Creates a TAP whose masks are set before the daemon starts.
fn network_with_masks() -> Result<HostNetwork> {
    let network = HostNetwork::with_tap(PAIRS)?;
    // Kernels that support rps_default_mask use it for queues that are created later.
    let script = format!(
        "echo {ORIGINAL_MASK} >/proc/sys/net/core/rps_default_mask; for f in tx-0/xps_cpus rx-0/rps_cpus; do echo {ORIGINAL_MASK} >/sys/class/net/{TAP}/queues/$f || exit; done"
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

/// Pins each worker to a CPU of its own, because the test front-end has no vCPUs.
fn listed_options(network: &HostNetwork, mode: &str) -> Options {
    options(network, mode).flag("--placement", "list")
}

fn connect_responder(daemon: &Daemon, pairs: u16) -> Result<EchoResponder> {
    let config = TestFrontendConfig::new(pairs, 256, MODERN);
    EchoResponder::connect(
        daemon.socket(),
        &config,
        ResponderAddresses::from_ipv4(GUEST.v4)?,
    )
}

/// Reads the XPS and RPS masks of the TAP's queues, in the order of the queues' numbers.
fn read_masks(netns: &Netns) -> Result<Vec<(String, String)>> {
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

/// Waits until the TAP has `count` queues, which is the number of pairs in use, and the XPS mask of
/// each queue is the affinity of a different worker. The RPS mask must be the same if RPS is on.
fn assert_worker_masks(network: &HostNetwork, daemon: &Daemon, count: usize) -> Result<()> {
    retry_until_ok(|| {
        let enabled_pairs = pairs(&daemon.device()?)?
            .into_iter()
            .filter(|pair| pair.rx.enabled);
        let mut worker_masks = Vec::new();
        for pair in enabled_pairs {
            let mask: u64 = sched::affinity(pair.tid)?.iter().map(|cpu| 1 << cpu).sum();
            worker_masks.push(format!("{mask:x}"));
        }
        let masks = read_masks(network.netns())?;
        let mut xps: Vec<_> = masks.iter().map(|(xps, _)| xps.clone()).collect();
        worker_masks.sort_unstable();
        xps.sort_unstable();
        ensure!(
            worker_masks.len() == count && xps == worker_masks,
            "the affinities of the workers are {worker_masks:?}, but the masks are {masks:?}"
        );
        for (xps, rps) in &masks {
            ensure!(rps == xps || rps == "0", "{masks:?}");
        }
        let (_, rps) = &masks[0];
        ensure!(rps != "0", "RPS was on before and is off now: {masks:?}");
        Ok(())
    })
}

fn find_setting(settings: &Value, file: &str) -> Result<Value> {
    let mut all = settings.as_array().into_iter().flatten();
    let found = all.find(|setting| setting["file"].as_str().is_some_and(|f| f.ends_with(file)));
    found
        .cloned()
        .with_context(|| format!("the settings do not contain {file}: {settings}"))
}

/// Waits until the daemon reports at least `min` settings, and returns them.
fn wait_for_settings(daemon: &Daemon, min: usize) -> Result<Value> {
    let mut settings = Value::Null;
    retry_until_ok(|| {
        settings = daemon.device()?["interrupts"]["settings"].clone();
        let count = settings.as_array().map_or(0, Vec::len);
        ensure!(
            count >= min,
            "the daemon reports fewer than {min} settings: {settings}"
        );
        Ok(())
    })?;
    Ok(settings)
}

/// Waits until `is_done` returns true for the advice, and returns the advice. The daemon gives
/// advice only after the guest has not changed its settings for some time.
fn wait_for_advice(daemon: &Daemon, is_done: impl Fn(&str) -> bool) -> Result<String> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let advice = daemon.device()?["advice"].to_string();
        if is_done(&advice) {
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

/// Repeats `attempt` until it succeeds, for at most [`TIMEOUT`].
fn retry_until_ok(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + TIMEOUT;
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
