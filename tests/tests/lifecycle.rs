//! What a guest and its QEMU go through: resets, the driver taken off the card,
//! a QEMU that is killed. Afterwards frames pass again, and the daemon has as
//! many descriptors and threads as before.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::procfs::open_fds;
use virtionet_tests::sched;
use virtionet_tests::testbed::{BOOT, Testbed, TestbedConfig};

const PAIRS: u16 = 2;
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";

#[test]
fn frames_pass_again_after_resets_and_a_new_driver() {
    let mut testbed = TestbedConfig::new(PAIRS).start().unwrap();
    testbed.move_data_both_ways().unwrap();
    let before = resources(&testbed).unwrap();
    eprintln!("{before:?}");

    testbed.qemu.guest().reboot(BOOT).unwrap();
    works_as_before(&mut testbed, &before).unwrap();

    under_load(&testbed, || {
        testbed.qemu.qmp("system_reset", &Value::Null)?;
        testbed.qemu.guest().wait_boot(BOOT)
    })
    .unwrap();
    works_as_before(&mut testbed, &before).unwrap();

    under_load(&testbed, || {
        let guest = testbed.qemu.guest();
        guest.ok(&format!("echo virtio0 >{DRIVER}/unbind"))?;
        guest.ok(&format!("echo virtio0 >{DRIVER}/bind"))?;
        Ok(())
    })
    .unwrap();
    works_as_before(&mut testbed, &before).unwrap();
}

#[test]
fn a_killed_qemu_is_followed_by_the_next() {
    let mut testbed = TestbedConfig::new(PAIRS).start().unwrap();
    testbed.move_data_both_ways().unwrap();
    let before = resources(&testbed).unwrap();
    let iperf = testbed.iperf().unwrap();
    let load = IperfLoad::tcp(30).flows(4);
    let running = iperf.start(&load, Direction::GuestToHost).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let qemu = Pid::from_raw(testbed.qemu.pid().try_into().unwrap());
    kill(qemu, Signal::SIGKILL).unwrap();
    drop(running);
    drop(iperf);
    testbed.qemu.proc().wait(Duration::from_secs(10)).unwrap();
    let gone = |device: &Value| device["connected"] == false;
    let limit = Duration::from_secs(5);
    testbed.daemon.wait_device("free", limit, gone).unwrap();
    testbed.start_qemu("next").unwrap();
    works_as_before(&mut testbed, &before).unwrap();
}

/// The daemon's open descriptors and its threads' names.
#[derive(Debug, PartialEq, Eq)]
struct ProcessResources {
    fds: usize,
    threads: Vec<String>,
}

fn resources(testbed: &Testbed) -> Result<ProcessResources> {
    let pid = testbed.daemon.pid();
    let threads = sched::threads(pid)?;
    let mut threads: Vec<String> = threads.into_iter().map(|(_, name)| name).collect();
    threads.sort();
    Ok(ProcessResources {
        fds: open_fds(pid)?,
        threads,
    })
}

/// Does `work` while data flows to the guest; the load's own end does not count.
fn under_load(testbed: &Testbed, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let iperf = testbed.iperf()?;
    let _running = iperf.start(&IperfLoad::tcp(60).flows(4), Direction::HostToGuest)?;
    std::thread::sleep(Duration::from_secs(1));
    work()
}

fn works_as_before(testbed: &mut Testbed, before: &ProcessResources) -> Result<()> {
    testbed.configure_guest()?;
    testbed.move_data_both_ways()?;
    // The last answers to the control socket may just be on their way out.
    let started_at = Instant::now();
    while resources(testbed)? != *before && started_at.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let now = resources(testbed)?;
    ensure!(now == *before, "{before:?} became {now:?}");
    Ok(())
}
