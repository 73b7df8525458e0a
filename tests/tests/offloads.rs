//! What the guest sees of the card and what passes through it: offloads, large
//! frames, IPv4 and IPv6, TCP and UDP, and every byte as it was sent.

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
use virtionet_tests::topology::{CARD, GUEST, HOST, TAP};

const PORT: u16 = 5000;
const FILE_BYTES: u64 = 256 << 20;
const TRANSFER: Duration = Duration::from_secs(120);

#[test]
fn offloads_are_offered_and_large_segments_pass_whole() {
    let testbed = TestbedConfig::new(2).start().unwrap();
    let guest = testbed.qemu.guest();
    guest_has_its_offloads(guest).unwrap();

    let iperf = testbed.iperf().unwrap();
    for six in [false, true] {
        let family = |load: IperfLoad| if six { load.ipv6() } else { load };
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            eprintln!("IPv{}, {direction:?}:", if six { 6 } else { 4 });
            let load = family(IperfLoad::tcp(2).flows(2));
            segments_pass_whole(&testbed, &iperf, &load, direction).unwrap();
            let load = family(IperfLoad::udp(2, "20M").flows(2).arg("-l").arg("1400"));
            datagrams_arrive(&testbed, &iperf, &load, direction).unwrap();
        }
    }
}

#[test]
fn a_jumbo_link_carries_large_frames_and_every_byte_arrives() {
    let plan = TestbedConfig::new(2).memory_mib(1024).prop("host_mtu=9000");
    let testbed = plan.start().unwrap();
    mtu_is_9000_at_both_ends(&testbed).unwrap();
    unfragmented(&testbed, || {
        let ping = format!("ping -c 3 -s 8900 {}", HOST.v4);
        eprintln!("{}", testbed.qemu.guest().ok(&ping)?);
        let ping = ["ping", "-c", "3", "-s", "8900", GUEST.v4];
        testbed.network.netns().run("busybox", ping)?;
        let iperf = testbed.iperf()?;
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            let load = IperfLoad::udp(2, "50M").flows(2).arg("-l").arg("8900");
            datagrams_arrive(&testbed, &iperf, &load, direction)?;
        }
        Ok(())
    })
    .unwrap();

    let file = testbed.dir.join("file");
    let back = testbed.dir.join("back");
    let mut random = File::open("/dev/urandom").unwrap().take(FILE_BYTES);
    copy(&mut random, &mut File::create(&file).unwrap()).unwrap();
    let sent = sha256(&file).unwrap();
    send_to_guest(&testbed, &file).unwrap();
    let started_at = Instant::now();
    let arrived = testbed.qemu.guest().run("sha256sum /tmp/file", TRANSFER);
    eprintln!("hashed in the guest in {:.1?}", started_at.elapsed());
    assert_eq!(first_word(&arrived.unwrap().text), sent);
    fetch_from_guest(&testbed, &back).unwrap();
    assert_eq!(sha256(&back).unwrap(), sent);
}

/// Feature bits as virtio 1.3 §5.1.3 and §6 number them, and what ethtool makes of them.
fn guest_has_its_offloads(guest: &Guest) -> Result<()> {
    let bits = guest.ok(&format!("cat /sys/class/net/{CARD}/device/features"))?;
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
        ensure!(bits.as_bytes().get(bit) == Some(&b'1'), "{name} in {bits}");
    }
    let features = ethtool::features(guest, CARD)?;
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
            "{feature} is not on in {features:?}"
        );
    }
    Ok(())
}

/// The link carries 1,514 bytes: frames that are larger on average are segments
/// left for the other end to cut, or not to.
fn segments_pass_whole(
    testbed: &Testbed,
    iperf: &Iperf<'_>,
    load: &IperfLoad,
    direction: Direction,
) -> Result<()> {
    let before = carried(testbed, direction)?;
    let report = iperf.run(load, direction)?;
    let after = carried(testbed, direction)?;
    let mean = (after.1 - before.1) / (after.0 - before.0).max(1);
    eprintln!("TCP: {:.2} Gbit/s, {mean} bytes a frame", report.gbps);
    ensure!(report.gbps > 0.05, "{report:?}");
    ensure!(mean > 3000, "{mean} bytes a frame");
    Ok(())
}

/// Frames and bytes of all pairs so far, in the direction of the data.
fn carried(testbed: &Testbed, direction: Direction) -> Result<(u64, u64)> {
    let pairs = pairs(&testbed.daemon.device()?)?;
    let rings = pairs.iter().map(|pair| match direction {
        Direction::HostToGuest => pair.rx,
        Direction::GuestToHost => pair.tx,
    });
    Ok(rings.fold((0, 0), |sum, ring| {
        (sum.0 + ring.frames, sum.1 + ring.bytes)
    }))
}

fn mtu_is_9000_at_both_ends(testbed: &Testbed) -> Result<()> {
    let guest = testbed.qemu.guest();
    let mtu = guest.ok(&format!("cat /sys/class/net/{CARD}/mtu"))?;
    ensure!(mtu.trim() == "9000", "the guest's MTU is {mtu}");
    let link = testbed.network.netns().ip(&format!("-o link show {TAP}"))?;
    ensure!(link.contains(" mtu 9000 "), "the TAP: {link}");
    let device = testbed.daemon.device()?;
    ensure!(device["mtu"] == 9000, "{device}");
    Ok(())
}

/// At most one datagram in a hundred is lost on the way. Those that the
/// receiver's own socket had no room for do not count: on a busy machine iperf3
/// sleeps for too long.
fn datagrams_arrive(
    testbed: &Testbed,
    iperf: &Iperf<'_>,
    load: &IperfLoad,
    direction: Direction,
) -> Result<()> {
    let before = socket_overruns(testbed, direction)?;
    let report = iperf.run(load, direction)?;
    let overruns = socket_overruns(testbed, direction)? - before;
    eprintln!(
        "UDP: {} of {} lost, {overruns} of them at the socket",
        report.lost, report.packets
    );
    ensure!(report.packets > 1000, "{report:?}");
    ensure!(report.lost <= overruns + report.packets / 100, "{report:?}");
    Ok(())
}

/// Datagrams that came and found their socket full, at the receiver.
fn socket_overruns(testbed: &Testbed, direction: Direction) -> Result<u64> {
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
    let six = text
        .lines()
        .find_map(|line| line.strip_prefix("Udp6RcvbufErrors"));
    let six: u64 = six.context("no Udp6RcvbufErrors")?.trim().parse()?;
    let four = snmp(&text, "Udp", "RcvbufErrors").context("no RcvbufErrors")?;
    Ok(four + six)
}

/// Does `work` and checks that neither end cut a packet in pieces.
fn unfragmented(testbed: &Testbed, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = fragments(testbed)?;
    work()?;
    let after = fragments(testbed)?;
    ensure!(before == after, "fragments: {before:?}, then {after:?}");
    Ok(())
}

/// FragCreates and ReasmReqds of IPv4 at both ends.
fn fragments(testbed: &Testbed) -> Result<[u64; 4]> {
    let guest = testbed.qemu.guest().ok("cat /proc/net/snmp")?;
    let host = testbed.network.netns().run("cat", ["/proc/net/snmp"])?;
    let of =
        |text: &str, name| snmp(text, "Ip", name).with_context(|| format!("no {name} in {text}"));
    Ok([
        of(&guest, "FragCreates")?,
        of(&guest, "ReasmReqds")?,
        of(&host, "FragCreates")?,
        of(&host, "ReasmReqds")?,
    ])
}

/// A value of /proc/net/snmp: a line of names, then one of numbers.
fn snmp(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let of = |line: &'_ str| {
        line.strip_prefix(protocol)?
            .strip_prefix(": ")
            .map(str::to_owned)
    };
    let mut lines = text.lines().filter_map(of);
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split(' ').position(|word| word == name)?;
    values.split(' ').nth(at)?.parse().ok()
}

// busybox's nc ends when the other end closes; its standard input must stay
// open, which a FIFO opened for both ways does.

fn send_to_guest(testbed: &Testbed, file: &Path) -> Result<()> {
    let guest = testbed.qemu.guest();
    guest.ok("mkfifo /tmp/hold")?;
    let job = guest.spawn(&format!("nc -l -p {PORT} <>/tmp/hold >/tmp/file"))?;
    wait_for_listener(|| guest.ok("netstat -ltn"))?;
    let send = format!("busybox nc {} {PORT} <{}", GUEST.v4, file.display());
    let started_at = Instant::now();
    testbed.network.netns().run("bash", ["-c", &send])?;
    let done = job.wait(TRANSFER)?;
    ensure!(done.code == 0, "nc in the guest: {done:?}");
    eprintln!("to the guest in {:.1?}", started_at.elapsed());
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
    let sent = testbed.qemu.guest().run(&send, TRANSFER)?;
    ensure!(sent.code == 0, "nc in the guest: {sent:?}");
    let status = receiver.wait(TRANSFER)?;
    ensure!(status.success(), "nc on the host side: {status}");
    eprintln!("from the guest in {:.1?}", started_at.elapsed());
    Ok(())
}

fn wait_for_listener(list: impl Fn() -> Result<String>) -> Result<()> {
    let port = format!(":{PORT}");
    let started_at = Instant::now();
    while !list()?.split_whitespace().any(|word| word.ends_with(&port)) {
        ensure!(
            started_at.elapsed() < Duration::from_secs(10),
            "no listener"
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
