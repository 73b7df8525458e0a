//! The main job: a Linux guest under QEMU, four queue pairs, traffic both ways on each of them.

use std::time::Duration;

use virtionet_tests::accel::Accel;
use virtionet_tests::daemon::Options;
use virtionet_tests::iperf::{Clients, Direction, Iperf, Load};
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic};
use virtionet_tests::topology::{GUEST, Lan, TAP, configure_guest};

const PAIRS: u16 = 4;
const BOOT: Duration = Duration::from_secs(60);

#[test]
fn every_pair_carries_frames_both_ways() {
    let dir = RunDir::new().unwrap();
    let lan = Lan::bare().unwrap();
    let daemon = Options::new()
        .netns(lan.netns())
        .flag("--tap", TAP)
        .arg("-vv")
        .start(&dir, "vnet")
        .unwrap();
    lan.configure().unwrap();
    let mut qemu = Machine::new()
        .vcpus(PAIRS.into())
        .accel(Accel::Auto)
        .nic(Nic::vhost_user(daemon.socket()).queues(PAIRS))
        .paused()
        .start(&dir, "guest")
        .unwrap();
    qemu.pin_vcpus().unwrap();
    qemu.resume().unwrap();
    let boot = qemu.boot(Duration::from_secs(20));
    eprintln!("{}", daemon.stderr());
    if boot.is_err() {
        eprintln!("{:#}", daemon.device().unwrap());
        std::thread::sleep(Duration::from_secs(12));
    }
    let boot = boot.unwrap();
    eprintln!("booted in {:.1} s", boot.as_secs_f64());
    let guest = qemu.guest();
    configure_guest(guest, PAIRS).unwrap();
    let reached = lan.reach(GUEST.v4);
    eprintln!("{}", daemon.stderr());
    reached.unwrap();
    let iperf = Iperf::new(&lan, guest, &dir, Clients::Host, PAIRS).unwrap();
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let report = iperf.run(&Load::tcp(3).flows(8), direction).unwrap();
        eprintln!("{direction:?}: {:.2} Gbit/s {:?}", report.gbps, report.each);
    }
    eprintln!("{:#}", daemon.device().unwrap());
}
