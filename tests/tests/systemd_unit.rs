//! The unit file of the documentation: what it exposes, and the service that a systemd makes of it.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::http;
use virtionet_tests::paths::{RunDir, virtionetd};
use virtionet_tests::systemd_machine::{Machine, MachineFiles};

const UNIT: &str = include_str!("../../docs/systemd/virtionetd.service");
const UNIT_PATH: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../docs/systemd/virtionetd.service"
);
/// systemd's rating of what a service could reach, times 10: from 0, nothing, to 100.
const MAX_EXPOSURE: &str = "20";

const SERVICE: &str = "virtionetd.service";
const USER: u32 = 990;
const CONTROL: &str = "/run/virtionetd/control.sock";
const CONFIG: &str = r#"
control = "/run/virtionetd/control.sock"

[[device]]
name = "drop"
socket-path = "/run/virtionetd/drop.sock"
uplink = "null"

[[device]]
name = "tap"
socket-path = "/run/virtionetd/tap.sock"
tap = "vnet0"
"#;
const TIMEOUT: Duration = Duration::from_secs(10);
/// A service that does not end is killed much later.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

#[test]
fn unit_exposes_little_of_the_host() {
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager"])
        .arg(format!("--threshold={MAX_EXPOSURE}"))
        .arg(UNIT_PATH)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("Overall exposure level"), "{text}{errors}");
    // A line that systemd does not understand would protect nothing.
    assert!(!errors.contains("ignoring"), "{errors}");
}

#[test]
fn service_starts_confined_serves_front_ends_and_stops_at_once() {
    let dir = RunDir::new().unwrap();
    let files = MachineFiles::new(&dir).unwrap();
    files.install_program(&virtionetd().unwrap()).unwrap();
    files.add_user("virtionetd", USER).unwrap();
    files.write("etc/virtionetd.toml", CONFIG).unwrap();
    let unit = format!("etc/systemd/system/{SERVICE}");
    files.write(&unit, UNIT).unwrap();
    if let Some(obstacle) = files.find_obstacle().unwrap() {
        eprintln!("skipped: no machine with systemd can be made here: {obstacle}");
        return;
    }
    let machine = files.boot().unwrap();
    let started = machine.run("systemctl", ["start", SERVICE]);
    assert!(started.is_ok(), "{started:?} {}", log(&machine));
    let report = wait_for_report(&machine);
    let state = machine.property(SERVICE, "ActiveState").unwrap();
    assert_eq!(state, "active", "{}", log(&machine));
    let helper = report["rights"]["helper_pid"].clone();
    let expected = json!({
        "sandbox": "on", "user": USER, "capabilities": [],
        "helper": "running", "helper_pid": helper,
    });
    assert_eq!(report["rights"], expected, "{}", log(&machine));
    let daemon = machine.property(SERVICE, "MainPID").unwrap();
    // CAP_NET_ADMIN (linux/capability.h).
    for (pid, capabilities) in [
        (daemon, "0000000000000000"),
        (helper.to_string(), "0000000000001000"),
    ] {
        let lines = [
            ("Seccomp", "2"),
            ("NoNewPrivs", "1"),
            ("CapEff", capabilities),
            ("CapPrm", capabilities),
            ("CapBnd", "0000000000001000"),
        ];
        wait_for_status(&machine, &pid, &lines);
    }
    serve_front_ends(&machine);
    let started_at = Instant::now();
    machine.run("systemctl", ["stop", SERVICE]).unwrap();
    let duration = started_at.elapsed();
    let log = log(&machine);
    assert!(duration < STOP_TIMEOUT, "{duration:?} {log}");
    // systemd logs it if and only if the status is 0 and no process had to be killed. It keeps no
    // properties of a service that has ended.
    let succeeded = format!("{SERVICE}: Deactivated successfully.");
    assert!(log.contains(&succeeded) && !log.contains("ERROR"), "{log}");
    let socket = machine.path(CONTROL);
    assert!(!socket.exists(), "{log}");
    machine.power_off().unwrap();
}

/// A front-end at each device sends a frame by each of its queue pairs. Of those of the TAP, all
/// but the first are opened by the helper.
fn serve_front_ends(machine: &Machine) {
    let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
    for (device, pairs) in [("drop", 1), ("tap", 4)] {
        let socket = machine.path(&format!("/run/virtionetd/{device}.sock"));
        let config = TestFrontendConfig::new(pairs, 256, MODERN);
        let connected = TestFrontend::connect(&socket, &config);
        let mut frontend = connected
            .map_err(|error| format!("{error} {}", log(machine)))
            .unwrap();
        for pair in &mut frontend.pairs {
            pair.tx.send(&frame).unwrap();
            pair.tx.drain(TIMEOUT).unwrap();
        }
        let report = get_report(&machine.path(CONTROL)).unwrap();
        let devices = report["devices"].as_array().unwrap();
        let served = devices
            .iter()
            .find(|found| found["name"] == device)
            .unwrap();
        for pair in served["pairs"].as_array().unwrap() {
            assert_eq!(
                pair["tx"]["counters"]["frames"],
                1,
                "{served} {}",
                log(machine)
            );
        }
    }
}

/// Waits until the fields of /proc/PID/status have these values. The main thread confines itself
/// last, when the control socket may have answered already.
fn wait_for_status(machine: &Machine, pid: &str, fields: &[(&str, &str)]) {
    let path = format!("/proc/{pid}/status");
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let status = machine.run("cat", [&*path]).unwrap();
        let has = |(field, value): &(&str, &str)| status.contains(&format!("{field}:\t{value}\n"));
        if fields.iter().all(has) {
            return;
        }
        assert!(Instant::now() < deadline, "{fields:?} {status}");
        sleep(Duration::from_millis(20));
    }
}

/// Waits until the control socket answers.
fn wait_for_report(machine: &Machine) -> Value {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(report) = get_report(&machine.path(CONTROL)) {
            return report;
        }
        assert!(Instant::now() < deadline, "{}", log(machine));
        sleep(Duration::from_millis(20));
    }
}

fn get_report(control: &Path) -> Option<Value> {
    let response = http::request(control, "GET", "/v1/devices", "").ok()?;
    serde_json::from_str(&response.body).ok()
}

fn log(machine: &Machine) -> String {
    machine.log(SERVICE).unwrap_or_default()
}
