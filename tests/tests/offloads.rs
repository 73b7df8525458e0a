//! The features that the guest negotiates, and the traffic that passes: offloads, large frames,
//! IPv4 and IPv6, TCP and UDP, and file transfers whose contents are compared.

use std::fs::File;
use std::io::{Read, copy};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtionet_tests::counters::pairs;
use virtionet_tests::ethtool;
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::{Direction, Iperf, IperfLoad};
use virtionet_tests::process::{Proc, output};
use virtionet_tests::testbed::{Testbed, TestbedConfig};
use virtionet_tests::topology::{GUEST, GUEST_INTERFACE, HOST, TAP};

const PORT: u16 = 5000;
const FILE_BYTES: u64 = 256 << 20;
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(120);

#[test]
fn guest_negotiates_offloads_and_large_segments_pass_unsegmented() {
    let testbed = TestbedConfig::new(2).start().unwrap();
    let guest = testbed.qemu.guest();
    assert_offloads_negotiated(guest).unwrap();

    let iperf = testbed.iperf().unwrap();
    for is_ipv6 in [false, true] {
        let with_family = |load: IperfLoad| if is_ipv6 { load.ipv6() } else { load };
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            eprintln!("IPv{}, {direction:?}:", if is_ipv6 { 6 } else { 4 });
            let load = with_family(IperfLoad::tcp(2).flows(2));
            assert_segments_pass_whole(&testbed, &iperf, &load, direction).unwrap();
            let load = with_family(IperfLoad::udp(2, "20M").flows(2).arg("-l").arg("1400"));
            assert_datagrams_arrive(&testbed, &iperf, &load, direction).unwrap();
        }
    }
}

#[test]
fn link_with_mtu_9000_carries_large_frames_unfragmented_and_files_unchanged() {
    let config = TestbedConfig::new(2).memory_mib(1024).prop("host_mtu=9000");
    let testbed = config.start().unwrap();
    assert_mtu_is_9000(&testbed).unwrap();
    assert_no_fragments(&testbed, || {
        let ping = format!("ping -c 3 -s 8900 {}", HOST.v4);
        eprintln!("{}", testbed.qemu.guest().ok(&ping)?);
        let ping = ["ping", "-c", "3", "-s", "8900", GUEST.v4];
        testbed.network.netns().run("busybox", ping)?;
        let iperf = testbed.iperf()?;
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            let load = IperfLoad::udp(2, "50M").flows(2).arg("-l").arg("8900");
            assert_datagrams_arrive(&testbed, &iperf, &load, direction)?;
        }
        Ok(())
    })
    .unwrap();

    let file = testbed.dir.join("file");
    let returned = testbed.dir.join("returned");
    let mut random = File::open("/dev/urandom").unwrap().take(FILE_BYTES);
    copy(&mut random, &mut File::create(&file).unwrap()).unwrap();
    let sent = sha256(&file).unwrap();
    send_to_guest(&testbed, &file).unwrap();
    let started_at = Instant::now();
    let arrived = testbed
        .qemu
        .guest()
        .run("sha256sum /tmp/file", TRANSFER_TIMEOUT);
    eprintln!("hashed in the guest in {:.1?}", started_at.elapsed());
    assert_eq!(first_word(&arrived.unwrap().text), sent);
    fetch_from_guest(&testbed, &returned).unwrap();
    assert_eq!(sha256(&returned).unwrap(), sent);
}

/// Checks the negotiated feature bits (virtio 1.3 §5.1.3 and §6), and the features that ethtool
/// shows.
fn assert_offloads_negotiated(guest: &Guest) -> Result<()> {
    let bits = guest.ok(&format!(
        "cat /sys/class/net/{GUEST_INTERFACE}/device/features"
    ))?;
    for (bit, name) in [
        (0, "CSUM"),
        (1, "GUEST_CSUM"),
        (7, "GUEST_TSO4"),
        (8, "GUEST_TSO6"),
        (11, "HOST_TSO4"),
        (12, "HOST_TSO6"),
        (15, "MRG_RXBUF"),
        (22, "MQ"),
        (28, "INDIRECT_DESC"),
        (29, "EVENT_IDX"),
        (32, "VERSION_1"),
    ] {
        ensure!(
            bits.as_bytes().get(bit) == Some(&b'1'),
            "{name} (bit {bit}) is not negotiated: {bits}"
        );
    }
    let features = ethtool::features(guest, GUEST_INTERFACE)?;
    for feature in [
        "rx-checksumming",
        "tx-checksumming",
        "tx-checksum-ip-generic",
        "scatter-gather",
        "tcp-segmentation-offload",
        "tx-tcp-segmentation",
        "tx-tcp6-segmentation",
    ] {
        ensure!(
            features.get(feature) == Some(&true),
            "{feature} is not on: {features:?}"
        );
    }
    Ok(())
}

/// Checks that the mean size of a frame exceeds the 1,514 bytes of a frame on the link, which shows
/// that large segments pass without segmentation.
fn assert_segments_pass_whole(
    testbed: &Testbed,
    iperf: &Iperf<'_>,
    load: &IperfLoad,
    direction: Direction,
) -> Result<()> {
    let before = read_carried(testbed, direction)?;
    let report = iperf.run(load, direction)?;
    let after = read_carried(testbed, direction)?;
    let mean = (after.1 - before.1) / (after.0 - before.0).max(1);
    eprintln!("TCP: {:.2} Gbit/s, {mean} bytes per frame", report.gbps);
    ensure!(report.gbps > 0.05, "{report:?}");
    ensure!(mean > 3000, "the mean size of a frame is only {mean} bytes");
    Ok(())
}

/// Returns the frames and bytes that all queue pairs have carried in the direction of the data.
fn read_carried(testbed: &Testbed, direction: Direction) -> Result<(u64, u64)> {
    let pairs = pairs(&testbed.daemon.device()?)?;
    let rings = pairs.iter().map(|pair| match direction {
        Direction::HostToGuest => pair.rx,
        Direction::GuestToHost => pair.tx,
    });
    Ok(rings.fold((0, 0), |sum, ring| {
        (sum.0 + ring.frames, sum.1 + ring.bytes)
    }))
}

fn assert_mtu_is_9000(testbed: &Testbed) -> Result<()> {
    let guest = testbed.qemu.guest();
    let mtu = guest.ok(&format!("cat /sys/class/net/{GUEST_INTERFACE}/mtu"))?;
    ensure!(mtu.trim() == "9000", "the MTU of the guest is {mtu}");
    let link = testbed.network.netns().ip(&format!("-o link show {TAP}"))?;
    ensure!(
        link.contains(" mtu 9000 "),
        "the MTU of the TAP is not 9000: {link}"
    );
    let device = testbed.daemon.device()?;
    ensure!(
        device["mtu"] == 9000,
        "the MTU of the device is not 9000: {device}"
    );
    Ok(())
}

/// Checks that at most one datagram in a hundred is lost on the way. Datagrams for which the
/// receiver's socket had no free space are not counted, because on a busy machine iperf3 may read
/// them too late.
fn assert_datagrams_arrive(
    testbed: &Testbed,
    iperf: &Iperf<'_>,
    load: &IperfLoad,
    direction: Direction,
) -> Result<()> {
    let before = count_socket_overruns(testbed, direction)?;
    let report = iperf.run(load, direction)?;
    let overruns = count_socket_overruns(testbed, direction)? - before;
    eprintln!(
        "UDP: {} of {} datagrams lost, {overruns} of them at the socket",
        report.lost, report.packets
    );
    ensure!(report.packets > 1000, "{report:?}");
    ensure!(report.lost <= overruns + report.packets / 100, "{report:?}");
    Ok(())
}

/// Returns the number of datagrams that the receiver dropped because the buffer of their socket was
/// full.
fn count_socket_overruns(testbed: &Testbed, direction: Direction) -> Result<u64> {
    let text = match direction {
        Direction::HostToGuest => testbed
            .qemu
            .guest()
            .ok("cat /proc/net/snmp /proc/net/snmp6")?,
        Direction::GuestToHost => {
            let files = ["/proc/net/snmp", "/proc/net/snmp6"];
            testbed.network.netns().run("cat", files)?
        }
    };
    let ipv6 = text
        .lines()
        .find_map(|line| line.strip_prefix("Udp6RcvbufErrors"));
    let ipv6: u64 = ipv6
        .context("snmp6 has no Udp6RcvbufErrors")?
        .trim()
        .parse()?;
    let ipv4 =
        parse_snmp(&text, "Udp", "RcvbufErrors").context("snmp has no RcvbufErrors of UDP")?;
    Ok(ipv4 + ipv6)
}

/// Runs `work`, and checks that neither end has fragmented or reassembled a packet.
fn assert_no_fragments(testbed: &Testbed, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = read_fragment_counters(testbed)?;
    work()?;
    let after = read_fragment_counters(testbed)?;
    ensure!(
        before == after,
        "the fragment counters were {before:?} and are now {after:?}"
    );
    Ok(())
}

/// Returns FragCreates and ReasmReqds of IPv4 at both ends.
fn read_fragment_counters(testbed: &Testbed) -> Result<[u64; 4]> {
    let guest = testbed.qemu.guest().ok("cat /proc/net/snmp")?;
    let host = testbed.network.netns().run("cat", ["/proc/net/snmp"])?;
    let counter = |text: &str, name| {
        parse_snmp(text, "Ip", name).with_context(|| format!("snmp has no {name} of IPv4: {text}"))
    };
    Ok([
        counter(&guest, "FragCreates")?,
        counter(&guest, "ReasmReqds")?,
        counter(&host, "FragCreates")?,
        counter(&host, "ReasmReqds")?,
    ])
}

/// Parses a value of /proc/net/snmp, which contains a line of names and a line of numbers for each
/// protocol.
fn parse_snmp(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let fields = |line: &'_ str| {
        line.strip_prefix(protocol)?
            .strip_prefix(": ")
            .map(str::to_owned)
    };
    let mut lines = text.lines().filter_map(fields);
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split(' ').position(|word| word == name)?;
    values.split(' ').nth(at)?.parse().ok()
}

// nc of busybox must exit when the other end closes the connection, and not when its standard input
// ends. Its standard input is a FIFO that is open for reading and writing, which never ends.

fn send_to_guest(testbed: &Testbed, file: &Path) -> Result<()> {
    let guest = testbed.qemu.guest();
    guest.ok("mkfifo /tmp/hold")?;
    let job = guest.spawn(&format!("nc -l -p {PORT} <>/tmp/hold >/tmp/file"))?;
    wait_for_listener(|| guest.ok("netstat -ltn"))?;
    let send = format!("busybox nc {} {PORT} <{}", GUEST.v4, file.display());
    let started_at = Instant::now();
    testbed.network.netns().run("bash", ["-c", &send])?;
    let done = job.wait(TRANSFER_TIMEOUT)?;
    ensure!(done.exit_code == 0, "nc in the guest failed: {done:?}");
    eprintln!("sent to the guest in {:.1?}", started_at.elapsed());
    Ok(())
}

fn fetch_from_guest(testbed: &Testbed, file: &Path) -> Result<()> {
    let hold = testbed.dir.join("hold");
    let receive = format!(
        "mkfifo {0} && busybox nc -l -p {PORT} <>{0} >{1}",
        hold.display(),
        file.display()
    );
    let netns = testbed.network.netns();
    let mut receiver = Proc::spawn(
        &testbed.dir,
        "nc",
        Some(netns.name()),
        "bash",
        ["-c", &receive],
    )?;
    wait_for_listener(|| netns.run("ss", ["-ltn"]))?;
    let started_at = Instant::now();
    let send = format!("nc {} {PORT} </tmp/file", HOST.v4);
    let sent = testbed.qemu.guest().run(&send, TRANSFER_TIMEOUT)?;
    ensure!(sent.exit_code == 0, "nc in the guest failed: {sent:?}");
    let status = receiver.wait(TRANSFER_TIMEOUT)?;
    ensure!(status.success(), "nc on the host failed: {status}");
    eprintln!("received from the guest in {:.1?}", started_at.elapsed());
    Ok(())
}

fn wait_for_listener(list_listeners: impl Fn() -> Result<String>) -> Result<()> {
    let port = format!(":{PORT}");
    let started_at = Instant::now();
    while !list_listeners()?
        .split_whitespace()
        .any(|word| word.ends_with(&port))
    {
        ensure!(
            started_at.elapsed() < Duration::from_secs(10),
            "no process listens on port {PORT} after 10 s"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn sha256(file: &Path) -> Result<String> {
    Ok(first_word(&output("sha256sum", [file])?))
}

fn first_word(text: &str) -> String {
    text.split_whitespace().next().unwrap_or("").to_owned()
}
