//! A guest that stops for a while, by itself or because the host stops it, and a network device that
//! is plugged out and in: the vrings stop and start again, and the guest carries on.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use virtionet_tests::guest::Guest;
use virtionet_tests::testbed::{Testbed, TestbedConfig};

const TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn guest_carries_on_after_stop_and_cont_after_a_hot_plug_and_after_a_suspend() {
    let config = TestbedConfig::new(2).prop("packed=on").pluggable();
    let mut testbed = config.start().unwrap();
    testbed.move_data_both_ways().unwrap();
    testbed.qemu.qmp("stop", &Value::Null).unwrap();
    thread::sleep(Duration::from_secs(1));
    testbed.qemu.qmp("cont", &Value::Null).unwrap();
    testbed.move_data_both_ways().unwrap();
    plug_out_and_in(&mut testbed).unwrap();
    testbed.move_data_both_ways().unwrap();
    suspend_and_wake(&testbed).unwrap();
    testbed.move_data_both_ways().unwrap();
    check_vrings(&testbed).unwrap();
}

fn plug_out_and_in(testbed: &mut Testbed) -> Result<()> {
    let qemu = &testbed.qemu;
    qemu.qmp("device_del", &json!({ "id": "nic" }))?;
    qemu.wait_event("DEVICE_DELETED", TIMEOUT)?;
    let nic = json!({
        "driver": "virtio-net-pci", "id": "nic", "netdev": "net0", "bus": "hot", "mq": true,
        "vectors": 6, "packed": true,
    });
    qemu.qmp("device_add", &nic)?;
    let guest = qemu.guest();
    guest.ok(
        "i=0; until [ -e /sys/class/net/eth0 ] || [ $i = 100 ]; do i=$((i+1)); sleep 0.2; done",
    )?;
    testbed.configure_guest()
}

/// Suspends the guest to memory (ACPI S3), in which its driver resets the device.
fn suspend_and_wake(testbed: &Testbed) -> Result<()> {
    let (qemu, guest) = (&testbed.qemu, testbed.qemu.guest());
    let suspended = guest.spawn("echo mem >/sys/power/state")?;
    qemu.wait_event("SUSPEND", TIMEOUT)?;
    thread::sleep(Duration::from_secs(1));
    qemu.qmp("system_wakeup", &Value::Null)?;
    qemu.wait_event("WAKEUP", TIMEOUT)?;
    wait_until_awake(guest)?;
    suspended.wait(TIMEOUT)?;
    Ok(())
}

/// Waits until the guest's console works again: what it receives before is lost.
fn wait_until_awake(guest: &Guest) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while guest.run("true", Duration::from_secs(2)).is_err() {
        ensure!(Instant::now() < deadline, "the guest does not wake up");
    }
    Ok(())
}

/// Checks that every vring runs, and that none was quarantined meanwhile.
fn check_vrings(testbed: &Testbed) -> Result<()> {
    let device = testbed.daemon.device()?;
    for pair in device["pairs"].as_array().into_iter().flatten() {
        for direction in ["rx", "tx"] {
            let vring = &pair[direction];
            ensure!(
                vring["state"] == "running" && vring["counters"]["quarantines"] == 0,
                "{direction}: {vring}"
            );
        }
    }
    Ok(())
}
