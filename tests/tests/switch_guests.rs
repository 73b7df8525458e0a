//! Two Linux guests on a switch: TCP over IPv4 and IPv6 in both directions. All data and checksums
//! must be correct, and every frame must arrive or be counted as dropped. In further tests, both
//! guests share a worker, and one guest has no offloads, so that the switch computes checksums and
//! segments frames for it.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::IperfLoad;
use virtionet_tests::sched;
use virtionet_tests::topology::{GUEST_INTERFACE, GUESTS};
use virtionet_tests::two_guests::{GuestId, TwoGuestConfig, TwoGuestTestbed, sum_counters};

const PAIRS: u16 = 2;
const FILE_MIB: u32 = 16;
const PORT: u16 = 5000;
/// The time after which frames in flight must be counted.
const COUNT_TIMEOUT: Duration = Duration::from_secs(5);
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(60);
/// The maximum size of a frame in bytes on a link with MTU 1500.
const MAX_FRAME_SIZE: u64 = 1514;
/// The properties of QEMU's virtio-net that turn all offloads off.
const OFFLOADS_OFF: [&str; 10] = [
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
fn two_guests_exchange_correct_data_and_large_segments_pass_unsegmented() {
    let testbed = TwoGuestConfig::new(PAIRS).on_switch().unwrap();
    for carried in exchange(&testbed).unwrap() {
        assert!(carried.sent.mean() > 2 * MAX_FRAME_SIZE, "{carried:?}");
        assert!(carried.received.mean() > 2 * MAX_FRAME_SIZE, "{carried:?}");
    }
    for guest in [GuestId::A, GuestId::B] {
        assert_every_frame_counted(&testbed, guest).unwrap();
        assert_driver_received_all(&testbed, guest).unwrap();
    }
}

#[test]
fn two_guests_that_share_a_worker_exchange_correct_data() {
    let cpu = sched::allowed_cpus().unwrap()[0];
    let config = TwoGuestConfig::new(PAIRS).workers(&format!("list:{cpu}"));
    let testbed = config.on_switch().unwrap();
    exchange(&testbed).unwrap();
    for guest in [GuestId::A, GuestId::B] {
        assert_every_frame_counted(&testbed, guest).unwrap();
        assert_driver_received_all(&testbed, guest).unwrap();
        let workers = vec![format!("worker-cpu{cpu}"); PAIRS.into()];
        assert_eq!(testbed.workers(guest).unwrap(), workers);
    }
}

#[test]
fn guest_without_offloads_receives_segmented_frames_with_complete_checksums() {
    let config = OFFLOADS_OFF
        .into_iter()
        .fold(TwoGuestConfig::new(PAIRS), |config, prop| {
            config.prop(GuestId::B, prop)
        });
    let testbed = config.on_switch().unwrap();
    assert_offloads_are_off(testbed.guest(GuestId::B)).unwrap();
    let [segmented, unchanged] = exchange(&testbed).unwrap();
    assert!(segmented.sent.mean() > 2 * MAX_FRAME_SIZE, "{segmented:?}");
    assert!(segmented.received.mean() <= MAX_FRAME_SIZE, "{segmented:?}");
    assert!(
        segmented.received.frames > 2 * segmented.sent.frames,
        "{segmented:?}"
    );
    assert!(unchanged.sent.mean() <= MAX_FRAME_SIZE, "{unchanged:?}");
    let sent = testbed.counters(GuestId::A, "tx").unwrap();
    assert_eq!(sent["offload_invalid"], 0, "{sent:?}");
    // The switch does not segment the frames from B, so each of them must arrive or be counted.
    assert_every_frame_counted(&testbed, GuestId::B).unwrap();
    for guest in [GuestId::A, GuestId::B] {
        assert_driver_received_all(&testbed, guest).unwrap();
    }
}

/// Checks the feature bits of virtio 1.3 §5.1.3.
fn assert_offloads_are_off(guest: &Guest) -> Result<()> {
    let bits = guest.ok(&format!(
        "cat /sys/class/net/{GUEST_INTERFACE}/device/features"
    ))?;
    for bit in [0, 1, 7, 8, 9, 10, 11, 12, 13, 14] {
        ensure!(
            bits.as_bytes().get(bit) == Some(&b'0'),
            "feature bit {bit} is set: {bits}"
        );
    }
    Ok(())
}

/// The traffic of the loads in one direction, counted at the sender's and at the receiver's rings.
#[derive(Debug)]
struct Carried {
    sent: Traffic,
    received: Traffic,
}

#[derive(Debug)]
struct Traffic {
    frames: u64,
    bytes: u64,
}

impl Traffic {
    fn read(testbed: &TwoGuestTestbed, which: GuestId, direction: &str) -> Result<Self> {
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

    /// Returns the mean size of a frame in bytes.
    fn mean(&self) -> u64 {
        self.bytes / self.frames.max(1)
    }
}

/// Exchanges pings, loads and files in both directions, and checks that both guests have received
/// them without errors. Returns the traffic of the loads, first from guest A and then from guest B.
fn exchange(testbed: &TwoGuestTestbed) -> Result<[Carried; 2]> {
    for from in [GuestId::A, GuestId::B] {
        let to = &GUESTS[usize::from(from == GuestId::A)];
        for address in [to.v4, to.v6] {
            let ping = format!("ping -c 3 -i 0.2 -s 3000 {address}");
            let output = testbed.guest(from).ok(&ping)?;
            ensure!(output.contains(" 0% packet loss"), "{output}");
        }
    }
    let carried = [
        run_loads(testbed, GuestId::A)?,
        run_loads(testbed, GuestId::B)?,
    ];
    assert_files_arrive_unchanged(testbed)?;
    for which in [GuestId::A, GuestId::B] {
        let guest = testbed.guest(which);
        assert_no_errors(guest).with_context(|| format!("guest {which:?} has counted errors"))?;
        assert_all_pairs_used(testbed, which)?;
    }
    Ok(carried)
}

/// Runs TCP over IPv4 and then over IPv6, with two flows for each queue pair.
fn run_loads(testbed: &TwoGuestTestbed, from: GuestId) -> Result<Carried> {
    let read_traffic = || -> Result<[Traffic; 2]> {
        let received = Traffic::read(testbed, from.other(), "rx")?;
        Ok([Traffic::read(testbed, from, "tx")?, received])
    };
    let before = read_traffic()?;
    for load in [IperfLoad::tcp(1), IperfLoad::tcp(1).ipv6()] {
        let report = testbed.iperf(from, &load.flows(2 * PAIRS), PAIRS)?;
        eprintln!(
            "from {from:?}: {:.2} Gbit/s, {} segments retransmitted",
            report.gbps, report.retransmits
        );
        ensure!(
            report.gbps_by_process.len() == usize::from(PAIRS),
            "{report:?}"
        );
        ensure!(
            report.gbps_by_process.iter().all(|gbps| *gbps > 0.0),
            "{report:?}"
        );
    }
    let [sent, received] = read_traffic()?;
    let carried = Carried {
        sent: sent.since(&before[0]),
        received: received.since(&before[1]),
    };
    eprintln!("from {from:?}: {carried:?}");
    Ok(carried)
}

/// Sends a file from guest A to guest B and back, and compares the hashes.
fn assert_files_arrive_unchanged(testbed: &TwoGuestTestbed) -> Result<()> {
    let create = format!(
        "dd if=/dev/urandom of=/tmp/file bs=1M count={FILE_MIB} 2>/dev/null && sha256sum </tmp/file"
    );
    let sent = testbed.guest(GuestId::A).ok(&create)?;
    for (from, name) in [(GuestId::A, "/tmp/file"), (GuestId::B, "/tmp/returned")] {
        let received = send_file(testbed, from, "/tmp/file", name)?;
        ensure!(
            received == sent,
            "the hash of the file changed from {sent} to {received}"
        );
    }
    Ok(())
}

/// Sends a file to the other guest, and returns the SHA-256 of the received file.
fn send_file(testbed: &TwoGuestTestbed, from: GuestId, file: &str, name: &str) -> Result<String> {
    let receiver = testbed.guest(from.other());
    // nc must exit when the other end closes the connection, and not when its standard input ends.
    // Its standard input is a FIFO that is open for reading and writing, which never ends.
    receiver.ok("[ -p /tmp/hold ] || mkfifo /tmp/hold")?;
    let job = receiver.spawn(&format!("nc -l -p {PORT} <>/tmp/hold >{name}"))?;
    let wait_for_listener = format!(
        "for i in $(seq 100); do netstat -ltn | grep -q :{PORT} && exit; sleep 0.1; done; exit 1"
    );
    receiver.ok(&wait_for_listener)?;
    let to = GUESTS[usize::from(from == GuestId::A)].v4;
    testbed.guest(from).ok(&format!("nc {to} {PORT} <{file}"))?;
    let done = job.wait(TRANSFER_TIMEOUT)?;
    ensure!(
        done.exit_code == 0,
        "nc in the receiving guest failed: {done:?}"
    );
    receiver.ok(&format!("sha256sum <{name}"))
}

/// The error counters that every supported kernel has. Linux 6.12 also has counters of UDP-Lite,
/// which Linux 7.2 has no longer.
const ERROR_COUNTERS: [&str; 7] = [
    "Ip:InHdrErrors",
    "Icmp:InCsumErrors",
    "Tcp:InCsumErrors",
    "Udp:InCsumErrors",
    "Ip6InHdrErrors",
    "Icmp6InCsumErrors",
    "Udp6InCsumErrors",
];

/// Checks that the guest has counted no checksum errors, no header errors and no receive errors.
fn assert_no_errors(guest: &Guest) -> Result<()> {
    let text = guest.ok("cat /proc/net/snmp /proc/net/snmp6")?;
    let found = parse_error_counters(&text);
    for name in ERROR_COUNTERS {
        ensure!(
            found.contains_key(name),
            "the guest has no counter {name}: {text}"
        );
    }
    ensure!(found.values().all(|count| *count == 0), "{found:?}");
    let dir = format!("/sys/class/net/{GUEST_INTERFACE}/statistics");
    let counts = guest.ok(&format!("cat {dir}/rx_errors {dir}/rx_frame_errors"))?;
    ensure!(
        counts == "0\n0\n",
        "rx_errors and rx_frame_errors are: {counts}"
    );
    Ok(())
}

/// Parses the counters of checksum errors and header errors, by name.
fn parse_error_counters(snmp: &str) -> BTreeMap<String, u64> {
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
        // For IPv4, a line of names is followed by a line of numbers.
        for (name, value) in line.iter().zip(next) {
            add(format!("{}{name}", line[0]), Some(value));
        }
    }
    for line in &lines {
        // For IPv6, each counter has its own line.
        add(line[0].to_owned(), line.get(1));
    }
    found
}

fn assert_all_pairs_used(testbed: &TwoGuestTestbed, which: GuestId) -> Result<()> {
    let daemon = testbed.daemon().context("the testbed has no daemon")?;
    let devices = daemon.get("/v1/devices")?;
    let pairs = devices["devices"][usize::from(which == GuestId::B)]["pairs"].as_array();
    let pairs = pairs.context("the device has no list of pairs")?;
    ensure!(pairs.len() >= usize::from(PAIRS), "{pairs:?}");
    for pair in pairs.iter().take(usize::from(PAIRS)) {
        for direction in ["rx", "tx"] {
            let frames = pair[direction]["counters"]["frames"].as_u64();
            ensure!(
                frames > Some(100),
                "a pair of guest {which:?} has carried too few {direction} frames: {pair}"
            );
        }
    }
    Ok(())
}

/// Checks that every frame of one guest has been received by the other, or is in a drop counter.
fn assert_every_frame_counted(testbed: &TwoGuestTestbed, from: GuestId) -> Result<()> {
    let daemon = testbed.daemon().context("the testbed has no daemon")?;
    wait_until_equal("sent frames, received and dropped frames", || {
        let devices = daemon.get("/v1/devices")?;
        let sent = sum_counters(&devices, from, "tx")?;
        let received = sum_counters(&devices, from.other(), "rx")?;
        let drops = received
            .iter()
            .filter(|(name, _)| name.starts_with("dropped_"));
        let dropped: u64 = drops.map(|(_, count)| count).sum();
        let (sent, received) = (sent["frames"], received["frames"]);
        eprintln!("from {from:?}: {sent} sent, {received} received, {dropped} dropped");
        Ok((sent, received + dropped))
    })
}

/// Checks that the guest's driver has received as many frames as the daemon has put into the
/// receiveqs.
fn assert_driver_received_all(testbed: &TwoGuestTestbed, which: GuestId) -> Result<()> {
    wait_until_equal("frames of the daemon, frames of the driver", || {
        let guest = testbed.guest(which);
        // In every kernel, both statistics contain the driver's sums over its receive queues, while
        // `ethtool -S` of newer kernels has no packet counter. The network stack adds frames of
        // unknown protocols to rx_dropped, so a value of zero shows that the driver has dropped
        // none.
        let dropped = read_statistic(guest, "rx_dropped")?;
        ensure!(dropped == 0, "guest {which:?} has dropped {dropped} frames");
        let received = read_statistic(guest, "rx_packets")?;
        Ok((testbed.counters(which, "rx")?["frames"], received))
    })
}

/// Reads one of the kernel's counters of the guest's network device.
fn read_statistic(guest: &Guest, name: &str) -> Result<u64> {
    let text = guest.ok(&format!(
        "cat /sys/class/net/{GUEST_INTERFACE}/statistics/{name}"
    ))?;
    let count = text.trim().parse();
    count.with_context(|| format!("{name} is {text:?}, not a number"))
}

/// Waits until the two counts are equal, which they must be when no frame is in flight.
fn wait_until_equal(names: &str, read_counts: impl Fn() -> Result<(u64, u64)>) -> Result<()> {
    let until = Instant::now() + COUNT_TIMEOUT;
    loop {
        let (first, second) = read_counts()?;
        if first == second {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "the counts differ ({names}): {first} and {second}"
        );
        sleep(Duration::from_millis(100));
    }
}
