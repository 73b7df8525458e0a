//! What a guest and its QEMU go through: resets, the driver taken off the card,
//! a QEMU that is killed. Afterwards frames pass again, and the daemon has as
//! many descriptors and threads as before.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use virtionet_tests::iperf::{Direction, Load};
use virtionet_tests::procfs::open_fds;
use virtionet_tests::rig::{BOOT, Plan, Rig};
use virtionet_tests::sched;

const PAIRS: u16 = 2;
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";

#[test]
fn frames_pass_again_after_resets_and_a_new_driver() {
    let mut rig = Plan::new(PAIRS).start().unwrap();
    rig.move_data_both_ways().unwrap();
    let before = holdings(&rig).unwrap();
    eprintln!("{before:?}");

    rig.qemu.guest().reboot(BOOT).unwrap();
    works_as_before(&mut rig, &before).unwrap();

    under_load(&rig, || {
        rig.qemu.qmp("system_reset", &Value::Null)?;
        rig.qemu.guest().wait_boot(BOOT)
    })
    .unwrap();
    works_as_before(&mut rig, &before).unwrap();

    under_load(&rig, || {
        let guest = rig.qemu.guest();
        guest.ok(&format!("echo virtio0 >{DRIVER}/unbind"))?;
        guest.ok(&format!("echo virtio0 >{DRIVER}/bind"))?;
        Ok(())
    })
    .unwrap();
    works_as_before(&mut rig, &before).unwrap();
}

#[test]
fn a_killed_qemu_is_followed_by_the_next() {
    let mut rig = Plan::new(PAIRS).start().unwrap();
    rig.move_data_both_ways().unwrap();
    let before = holdings(&rig).unwrap();
    let iperf = rig.iperf().unwrap();
    let load = Load::tcp(30).flows(4);
    let running = iperf.start(&load, Direction::GuestToHost).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let qemu = Pid::from_raw(rig.qemu.pid().try_into().unwrap());
    kill(qemu, Signal::SIGKILL).unwrap();
    drop(running);
    drop(iperf);
    rig.qemu.proc().wait(Duration::from_secs(10)).unwrap();
    let gone = |device: &Value| device["connected"] == false;
    let limit = Duration::from_secs(5);
    rig.daemon.wait_device("free", limit, gone).unwrap();
    rig.start_qemu("next").unwrap();
    works_as_before(&mut rig, &before).unwrap();
}

/// The daemon's open descriptors and its threads' names.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    fds: usize,
    threads: Vec<String>,
}

fn holdings(rig: &Rig) -> Result<Holdings> {
    let pid = rig.daemon.pid();
    let threads = sched::threads(pid)?;
    let mut threads: Vec<String> = threads.into_iter().map(|(_, name)| name).collect();
    threads.sort();
    Ok(Holdings {
        fds: open_fds(pid)?,
        threads,
    })
}

/// Does `work` while data flows to the guest; the load's own end does not count.
fn under_load(rig: &Rig, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let iperf = rig.iperf()?;
    let _running = iperf.start(&Load::tcp(60).flows(4), Direction::HostToGuest)?;
    std::thread::sleep(Duration::from_secs(1));
    work()
}

fn works_as_before(rig: &mut Rig, before: &Holdings) -> Result<()> {
    rig.configure_guest()?;
    rig.move_data_both_ways()?;
    // The last answers to the control socket may just be on their way out.
    let began = Instant::now();
    while holdings(rig)? != *before && began.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let now = holdings(rig)?;
    ensure!(now == *before, "{before:?} became {now:?}");
    Ok(())
}
