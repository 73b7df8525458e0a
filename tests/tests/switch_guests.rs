//! Two Linux guests on a switch: TCP over IPv4 and IPv6 both ways, every byte
//! and every checksum as it should be, every frame accounted for; also where one
//! of them leaves segmentation and checksums to the switch.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::IperfLoad;
use virtionet_tests::topology::{CARD, GUESTS};
use virtionet_tests::two_guests::{GuestId, TwoGuestConfig, TwoGuestTestbed, sums};

const PAIRS: u16 = 2;
const FILE_MIB: u32 = 16;
const PORT: u16 = 5000;
/// How long frames that are on their way may take to be counted.
const SETTLE: Duration = Duration::from_secs(5);
const TRANSFER: Duration = Duration::from_secs(60);
/// What a frame of a link with MTU 1500 has at most.
const WHOLE_FRAME: u64 = 1514;
/// All that a card can leave to the device or take over from it.
const OFFLOADS: [&str; 10] = [
    "csum=off",
    "guest_csum=off",
    "guest_tso4=off",
    "guest_tso6=off",
    "guest_ecn=off",
    "guest_ufo=off",
    "host_tso4=off",
    "host_tso6=off",
    "host_ecn=off",
    "host_ufo=off",
];

#[test]
fn two_guests_exchange_everything_and_large_segments_stay_whole() {
    let testbed = TwoGuestConfig::new(PAIRS).on_switch().unwrap();
    for carried in exchange(&testbed).unwrap() {
        assert!(carried.sent.mean() > 2 * WHOLE_FRAME, "{carried:?}");
        assert!(carried.got.mean() > 2 * WHOLE_FRAME, "{carried:?}");
    }
    for from in [GuestId::A, GuestId::B] {
        every_frame_arrived_or_is_named(&testbed, from).unwrap();
        the_driver_saw_what_was_carried(&testbed, from).unwrap();
    }
}

#[test]
fn a_guest_without_offloads_gets_frames_that_the_switch_cut_and_summed() {
    let plain = OFFLOADS.into_iter();
    let plan = plain.fold(TwoGuestConfig::new(PAIRS), |plan, p| {
        plan.prop(GuestId::B, p)
    });
    let testbed = plan.on_switch().unwrap();
    offloads_are_off(testbed.guest(GuestId::B)).unwrap();
    let [cut, plain] = exchange(&testbed).unwrap();
    assert!(cut.sent.mean() > 2 * WHOLE_FRAME, "{cut:?}");
    assert!(cut.got.mean() <= WHOLE_FRAME, "{cut:?}");
    assert!(cut.got.frames > 2 * cut.sent.frames, "{cut:?}");
    assert!(plain.sent.mean() <= WHOLE_FRAME, "{plain:?}");
    let sent = testbed.counters(GuestId::A, "tx").unwrap();
    assert_eq!(sent["offload_invalid"], 0, "{sent:?}");
    // What has no need of segmenting is carried as it is.
    every_frame_arrived_or_is_named(&testbed, GuestId::B).unwrap();
    for from in [GuestId::A, GuestId::B] {
        the_driver_saw_what_was_carried(&testbed, from).unwrap();
    }
}

/// By the feature bits of virtio 1.3 §5.1.3.
fn offloads_are_off(guest: &Guest) -> Result<()> {
    let bits = guest.ok(&format!("cat /sys/class/net/{CARD}/device/features"))?;
    for bit in [0, 1, 7, 8, 9, 10, 11, 12, 13, 14] {
        ensure!(bits.as_bytes().get(bit) == Some(&b'0'), "{bit} in {bits}");
    }
    Ok(())
}

/// What loads in one direction made the rings carry: the sender's and the receiver's.
#[derive(Debug)]
struct Carried {
    sent: Work,
    got: Work,
}

#[derive(Debug)]
struct Work {
    frames: u64,
    bytes: u64,
}

impl Work {
    fn so_far(testbed: &TwoGuestTestbed, which: GuestId, direction: &str) -> Result<Self> {
        let counters = testbed.counters(which, direction)?;
        Ok(Self {
            frames: counters["frames"],
            bytes: counters["bytes"],
        })
    }

    fn since(self, before: &Self) -> Self {
        Self {
            frames: self.frames - before.frames,
            bytes: self.bytes - before.bytes,
        }
    }

    /// Bytes a frame.
    fn mean(&self) -> u64 {
        self.bytes / self.frames.max(1)
    }
}

/// Pings, loads and files both ways, from the first guest at first; neither may
/// find anything wrong with them.
fn exchange(testbed: &TwoGuestTestbed) -> Result<[Carried; 2]> {
    for from in [GuestId::A, GuestId::B] {
        let to = &GUESTS[usize::from(from == GuestId::A)];
        for address in [to.v4, to.v6] {
            let ping = format!("ping -c 3 -i 0.2 -s 3000 {address}");
            let said = testbed.guest(from).ok(&ping)?;
            ensure!(said.contains(" 0% packet loss"), "{said}");
        }
    }
    let carried = [load(testbed, GuestId::A)?, load(testbed, GuestId::B)?];
    files_arrive_as_they_were(testbed)?;
    for which in [GuestId::A, GuestId::B] {
        let guest = testbed.guest(which);
        nothing_was_wrong(guest).with_context(|| format!("in guest {which:?}"))?;
        both_pairs_are_used(testbed, which)?;
    }
    Ok(carried)
}

/// TCP over IPv4 and IPv6, two flows a pair.
fn load(testbed: &TwoGuestTestbed, from: GuestId) -> Result<Carried> {
    let so_far = || -> Result<[Work; 2]> {
        let got = Work::so_far(testbed, from.other(), "rx")?;
        Ok([Work::so_far(testbed, from, "tx")?, got])
    };
    let before = so_far()?;
    for load in [IperfLoad::tcp(1), IperfLoad::tcp(1).ipv6()] {
        let report = testbed.iperf(from, &load.flows(2 * PAIRS), PAIRS)?;
        eprintln!(
            "from {from:?}: {:.2} Gbit/s, {} segments sent again",
            report.gbps, report.retransmits
        );
        ensure!(report.each.len() == usize::from(PAIRS), "{report:?}");
        ensure!(report.each.iter().all(|gbps| *gbps > 0.0), "{report:?}");
    }
    let [sent, got] = so_far()?;
    let carried = Carried {
        sent: sent.since(&before[0]),
        got: got.since(&before[1]),
    };
    eprintln!("from {from:?}: {carried:?}");
    Ok(carried)
}

fn files_arrive_as_they_were(testbed: &TwoGuestTestbed) -> Result<()> {
    let make = format!(
        "dd if=/dev/urandom of=/tmp/file bs=1M count={FILE_MIB} 2>/dev/null && sha256sum </tmp/file"
    );
    let sent = testbed.guest(GuestId::A).ok(&make)?;
    for (from, name) in [(GuestId::A, "/tmp/file"), (GuestId::B, "/tmp/back")] {
        let arrived = send(testbed, from, "/tmp/file", name)?;
        ensure!(arrived == sent, "{arrived}arrived for {sent}");
    }
    Ok(())
}

/// Sends a file; gives the SHA-256 of what arrived.
fn send(testbed: &TwoGuestTestbed, from: GuestId, file: &str, name: &str) -> Result<String> {
    let receiver = testbed.guest(from.other());
    // nc ends when the other end closes; its standard input must stay open,
    // which a FIFO opened for both ways does.
    receiver.ok("[ -p /tmp/hold ] || mkfifo /tmp/hold")?;
    let job = receiver.spawn(&format!("nc -l -p {PORT} <>/tmp/hold >{name}"))?;
    let listens = format!(
        "for i in $(seq 100); do netstat -ltn | grep -q :{PORT} && exit; sleep 0.1; done; exit 1"
    );
    receiver.ok(&listens)?;
    let to = GUESTS[usize::from(from == GuestId::A)].v4;
    testbed.guest(from).ok(&format!("nc {to} {PORT} <{file}"))?;
    let done = job.wait(TRANSFER)?;
    ensure!(done.code == 0, "nc: {done:?}");
    receiver.ok(&format!("sha256sum <{name}"))
}

/// The counters that every kernel has. Linux 6.12 also has UDP-Lite's, and 7.2 no longer has them.
const COUNTED: [&str; 7] = [
    "Ip:InHdrErrors",
    "Icmp:InCsumErrors",
    "Tcp:InCsumErrors",
    "Udp:InCsumErrors",
    "Ip6InHdrErrors",
    "Icmp6InCsumErrors",
    "Udp6InCsumErrors",
];

/// No checksum and no header was wrong, and nothing was lost within the guest.
fn nothing_was_wrong(guest: &Guest) -> Result<()> {
    let text = guest.ok("cat /proc/net/snmp /proc/net/snmp6")?;
    let found = errors(&text);
    for name in COUNTED {
        ensure!(found.contains_key(name), "no {name} in {text}");
    }
    ensure!(found.values().all(|count| *count == 0), "{found:?}");
    let dir = format!("/sys/class/net/{CARD}/statistics");
    let counts = guest.ok(&format!("cat {dir}/rx_errors {dir}/rx_frame_errors"))?;
    ensure!(counts == "0\n0\n", "rx_errors, rx_frame_errors: {counts}");
    Ok(())
}

/// What the stack counts of packets that are not as they should be, by name.
fn errors(snmp: &str) -> BTreeMap<String, u64> {
    const ENDINGS: [&str; 2] = ["InCsumErrors", "InHdrErrors"];
    let lines: Vec<Vec<&str>> = snmp
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let mut found = BTreeMap::new();
    let mut add = |name: String, value: Option<&&str>| {
        let value = value.and_then(|value| value.parse().ok());
        if let Some(value) = value
            && ENDINGS.iter().any(|ending| name.ends_with(ending))
        {
            found.insert(name, value);
        }
    };
    for (line, next) in lines.iter().zip(lines.iter().skip(1)) {
        // IPv4 has a line of names, then one of numbers.
        for (name, value) in line.iter().zip(next) {
            add(format!("{}{name}", line[0]), Some(value));
        }
    }
    for line in &lines {
        // IPv6 has a line each.
        add(line[0].to_owned(), line.get(1));
    }
    found
}

fn both_pairs_are_used(testbed: &TwoGuestTestbed, which: GuestId) -> Result<()> {
    let devices = testbed.daemon().context("no daemon")?.get("/v1/devices")?;
    let pairs = devices["devices"][usize::from(which == GuestId::B)]["pairs"].as_array();
    let pairs = pairs.context("no pairs")?;
    ensure!(pairs.len() >= usize::from(PAIRS), "{pairs:?}");
    for pair in pairs.iter().take(usize::from(PAIRS)) {
        for direction in ["rx", "tx"] {
            let frames = pair[direction]["counters"]["frames"].as_u64();
            ensure!(frames > Some(100), "{direction} of {which:?}: {pair}");
        }
    }
    Ok(())
}

/// All frames of one guest are the other's, or in a counter that says why not.
fn every_frame_arrived_or_is_named(testbed: &TwoGuestTestbed, from: GuestId) -> Result<()> {
    let daemon = testbed.daemon().context("no daemon")?;
    wait_until_equal("sent, received, dropped", || {
        let devices = daemon.get("/v1/devices")?;
        let sent = sums(&devices, from, "tx")?;
        let got = sums(&devices, from.other(), "rx")?;
        let drops = got.iter().filter(|(name, _)| name.starts_with("dropped_"));
        let dropped: u64 = drops.map(|(_, count)| count).sum();
        let (sent, got) = (sent["frames"], got["frames"]);
        eprintln!("from {from:?}: {sent} sent, {got} received, {dropped} dropped");
        Ok((sent, got + dropped))
    })
}

/// What the daemon put into a guest's rings is what its driver took from them.
fn the_driver_saw_what_was_carried(testbed: &TwoGuestTestbed, which: GuestId) -> Result<()> {
    wait_until_equal("carried, seen by the driver", || {
        let guest = testbed.guest(which);
        // Both are the driver's sums over its receive queues in every kernel, while `ethtool -S` of
        // newer kernels has no packets. The network stack adds frames of protocols that it does not
        // have to the drops, so zero says no less than the driver's own counter does.
        let dropped = statistic(guest, "rx_dropped")?;
        ensure!(dropped == 0, "{which:?} dropped {dropped} frames");
        let seen = statistic(guest, "rx_packets")?;
        Ok((testbed.counters(which, "rx")?["frames"], seen))
    })
}

/// One of the kernel's counters of the guest's network device.
fn statistic(guest: &Guest, name: &str) -> Result<u64> {
    let text = guest.ok(&format!("cat /sys/class/net/{CARD}/statistics/{name}"))?;
    let count = text.trim().parse();
    count.with_context(|| format!("{name} is {text:?}, not a number"))
}

/// The two figures are equal once nothing is on its way.
fn wait_until_equal(what: &str, figures: impl Fn() -> Result<(u64, u64)>) -> Result<()> {
    let until = Instant::now() + SETTLE;
    loop {
        let (one, other) = figures()?;
        if one == other {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{what}: {one} and {other}");
        sleep(Duration::from_millis(100));
    }
}
