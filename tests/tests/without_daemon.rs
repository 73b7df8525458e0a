//! The testbed without the daemon: a guest with QEMU's own virtio-net on a multiqueue TAP, traffic
//! in both directions, and the shell on the serial line. The other tests rely on these parts.

use std::time::Duration;

use virtionet_tests::accel::Accel;
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad};
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic};
use virtionet_tests::sched;
use virtionet_tests::topology::{GUEST, HostNetwork, TAP, configure_guest};

const PAIRS: u16 = 4;
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn guest_with_qemus_own_virtio_net_moves_data_both_ways() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::with_tap(PAIRS).unwrap();
    let (qemu, boot_time) = Machine::new()
        .vcpus(PAIRS.into())
        .accel(Accel::Auto)
        .netns(network.netns())
        .nic(Nic::tap(TAP).queues(PAIRS))
        .pinned()
        .boot(&dir, "guest", BOOT_TIMEOUT)
        .unwrap();
    let cpus = sched::allowed_cpus().unwrap();
    for (tid, cpu) in qemu
        .vcpu_threads()
        .unwrap()
        .into_iter()
        .zip(cpus.iter().cycle())
    {
        assert_eq!(sched::affinity(tid).unwrap(), [*cpu], "vCPU thread {tid}");
    }
    eprintln!("booted in {:.1} s", boot_time.as_secs_f64());

    let guest = qemu.guest();
    configure_guest(guest, PAIRS).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    network.wait_for_ping(GUEST.v6).unwrap();
    let interrupts = guest.ok("grep -c virtio0-input /proc/interrupts").unwrap();
    assert_eq!(interrupts.trim(), PAIRS.to_string());

    let iperf = Iperf::new(&network, guest, &dir, Clients::Host, PAIRS).unwrap();
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let report = iperf.run(&IperfLoad::tcp(2).flows(8), direction).unwrap();
        eprintln!(
            "{direction:?}: {:.2} Gbit/s {:?}",
            report.gbps, report.gbps_by_process
        );
        assert_eq!(report.gbps_by_process.len(), usize::from(PAIRS));
        assert!(report.gbps > 0.05, "{direction:?}: {report:?}");
    }
    let report = iperf.run(&IperfLoad::tcp(1).ipv6().flows(4), Direction::HostToGuest);
    assert!(report.unwrap().gbps > 0.05);
    let udp = IperfLoad::udp(1, "10M").flows(4).arg("-l").arg("1400");
    let report = iperf.run(&udp, Direction::GuestToHost).unwrap();
    assert!(
        report.packets > 500 && report.lost < report.packets / 2,
        "{report:?}"
    );

    // Now the clients run in the guest, and the servers run on the host.
    drop(iperf);
    let iperf = Iperf::new(&network, guest, &dir, Clients::Guest, 2).unwrap();
    let report = iperf.run(&IperfLoad::tcp(1).flows(2), Direction::GuestToHost);
    assert!(report.unwrap().gbps > 0.05);
}

#[test]
fn guest_shell_returns_each_commands_own_result_across_failures_and_a_reboot() {
    let dir = RunDir::new().unwrap();
    let (qemu, _) = Machine::new()
        .vcpus(2)
        .boot(&dir, "shell", BOOT_TIMEOUT)
        .unwrap();
    let guest = qemu.guest();

    let long = guest.ok("seq 1 50000").unwrap();
    assert_eq!(long.lines().count(), 50000);
    assert!(long.ends_with("\n50000\n"));
    let failed = guest
        .run("echo out; echo err >&2; exit 9", BOOT_TIMEOUT)
        .unwrap();
    assert_eq!((failed.text.as_str(), failed.exit_code), ("out\nerr\n", 9));
    assert!(
        guest.ok("cat; read x").is_err(),
        "the standard input of a command must be empty"
    );

    let job = guest
        .spawn("echo 'it'\"'\"'s on'; sleep 1; exit 4")
        .unwrap();
    assert_eq!(guest.ok("echo meanwhile").unwrap(), "meanwhile\n");
    let done = job.wait(BOOT_TIMEOUT).unwrap();
    assert_eq!((done.text.as_str(), done.exit_code), ("it's on\n", 4));
    let endless = guest.spawn("sleep 1000").unwrap();
    endless.kill().unwrap();
    assert_eq!(guest.run("pidof sleep", BOOT_TIMEOUT).unwrap().exit_code, 1);

    guest.ok("touch /tmp/before").unwrap();
    guest.reboot(BOOT_TIMEOUT).unwrap();
    assert_eq!(
        guest.run("ls /tmp/before", BOOT_TIMEOUT).unwrap().exit_code,
        1
    );
    assert!(guest.run("sleep 5", Duration::from_millis(200)).is_err());

    let status = qemu.qmp("query-status", &serde_json::Value::Null).unwrap();
    assert_eq!(status["status"], "running");
    assert!(
        qemu.qmp("no-such-command", &serde_json::Value::Null)
            .is_err()
    );
}
