//! Resets of the guest, rebinding its driver, and killing QEMU. Afterwards, frames must pass again,
//! and the daemon must have as many file descriptors and threads as before.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::procfs::open_fds;
use virtionet_tests::sched;
use virtionet_tests::testbed::{BOOT_TIMEOUT, Testbed, TestbedConfig};

const PAIRS: u16 = 2;
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";

#[test]
fn frames_pass_and_no_resources_leak_after_a_reboot_a_reset_and_a_rebound_driver() {
    let mut testbed = TestbedConfig::new(PAIRS).start().unwrap();
    testbed.move_data_both_ways().unwrap();
    let before = read_resources(&testbed).unwrap();
    eprintln!("{before:?}");

    testbed.qemu.guest().reboot(BOOT_TIMEOUT).unwrap();
    assert_works_as_before(&mut testbed, &before).unwrap();

    run_under_load(&testbed, || {
        testbed.qemu.qmp("system_reset", &Value::Null)?;
        testbed.qemu.guest().wait_boot(BOOT_TIMEOUT)
    })
    .unwrap();
    assert_works_as_before(&mut testbed, &before).unwrap();

    run_under_load(&testbed, || {
        let guest = testbed.qemu.guest();
        guest.ok(&format!("echo virtio0 >{DRIVER}/unbind"))?;
        guest.ok(&format!("echo virtio0 >{DRIVER}/bind"))?;
        Ok(())
    })
    .unwrap();
    assert_works_as_before(&mut testbed, &before).unwrap();
}

#[test]
fn new_qemu_is_served_and_no_resources_leak_after_qemu_was_killed_under_load() {
    let mut testbed = TestbedConfig::new(PAIRS).start().unwrap();
    testbed.move_data_both_ways().unwrap();
    let before = read_resources(&testbed).unwrap();
    let iperf = testbed.iperf().unwrap();
    let load = IperfLoad::tcp(30).flows(4);
    let running = iperf.start(&load, Direction::GuestToHost).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let qemu = Pid::from_raw(testbed.qemu.pid().try_into().unwrap());
    kill(qemu, Signal::SIGKILL).unwrap();
    drop(running);
    drop(iperf);
    testbed.qemu.proc().wait(Duration::from_secs(10)).unwrap();
    let is_disconnected = |device: &Value| device["connected"] == false;
    let timeout = Duration::from_secs(5);
    testbed
        .daemon
        .wait_for_device("disconnected", timeout, is_disconnected)
        .unwrap();
    testbed.start_qemu("next").unwrap();
    assert_works_as_before(&mut testbed, &before).unwrap();
}

/// The number of open file descriptors and the names of the threads of the daemon.
#[derive(Debug, PartialEq, Eq)]
struct ProcessResources {
    fds: usize,
    threads: Vec<String>,
}

fn read_resources(testbed: &Testbed) -> Result<ProcessResources> {
    let pid = testbed.daemon.pid();
    let threads = sched::threads(pid)?;
    let mut threads: Vec<String> = threads.into_iter().map(|(_, name)| name).collect();
    threads.sort();
    Ok(ProcessResources {
        fds: open_fds(pid)?,
        threads,
    })
}

/// Runs `work` while iperf3 sends data to the guest. The result of iperf3 is ignored.
fn run_under_load(testbed: &Testbed, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let iperf = testbed.iperf()?;
    let _running = iperf.start(&IperfLoad::tcp(60).flows(4), Direction::HostToGuest)?;
    std::thread::sleep(Duration::from_secs(1));
    work()
}

fn assert_works_as_before(testbed: &mut Testbed, before: &ProcessResources) -> Result<()> {
    testbed.configure_guest()?;
    testbed.move_data_both_ways()?;
    // The daemon may not have closed the last connections to the control socket yet.
    let started_at = Instant::now();
    while read_resources(testbed)? != *before && started_at.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = read_resources(testbed)?;
    ensure!(
        after == *before,
        "the resources were {before:?} and are now {after:?}"
    );
    Ok(())
}
