//! The unit file of the documentation: what it exposes, and the service that a systemd makes of it.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::paths::RunDir;
use virtionet_tests::systemd_service::{Service, USER, unit_path};

/// systemd's rating of what a service could reach, times 10: from 0, nothing, to 100.
const MAX_EXPOSURE: &str = "20";

const CONFIG: &str = r#"
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
        .arg(unit_path())
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
    let Some(service) = Service::boot(&dir, CONFIG).unwrap() else {
        return;
    };
    // It is started when virtionetd says so, and then the control socket answers.
    service.systemctl("start").unwrap();
    let report = service.report().unwrap();
    let state = service.property("ActiveState").unwrap();
    assert_eq!(state, "active", "{}", service.log());
    let helper = report["rights"]["helper_pid"].clone();
    let expected = json!({
        "sandbox": "on", "user": USER, "capabilities": [],
        "helper": "running", "helper_pid": helper,
    });
    assert_eq!(report["rights"], expected, "{}", service.log());
    let daemon = service.property("MainPID").unwrap();
    assert_eq!(report["process"]["pid"].to_string(), daemon);
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
        wait_for_status(&service, &pid, &lines);
    }
    serve_front_ends(&service);
    let started_at = Instant::now();
    service.systemctl("stop").unwrap();
    let duration = started_at.elapsed();
    let log = service.log();
    assert!(duration < STOP_TIMEOUT, "{duration:?} {log}");
    // It keeps no properties of a service that has ended.
    let has_succeeded = log.contains(&Service::success());
    assert!(has_succeeded && !log.contains("ERROR"), "{log}");
    assert!(!service.control().exists(), "{log}");
    service.power_off().unwrap();
}

/// A front-end at each device sends a frame by each of its queue pairs. Of those of the TAP, all
/// but the first are opened by the helper.
fn serve_front_ends(service: &Service) {
    let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
    for (device, pairs) in [("drop", 1), ("tap", 4)] {
        let socket = service.path(&format!("/run/virtionetd/{device}.sock"));
        let config = TestFrontendConfig::new(pairs, 256, MODERN);
        let connected = TestFrontend::connect(&socket, &config);
        let mut frontend = connected
            .map_err(|error| format!("{error} {}", service.log()))
            .unwrap();
        for pair in &mut frontend.pairs {
            pair.tx.send(&frame).unwrap();
            pair.tx.drain(TIMEOUT).unwrap();
        }
        let report = service.report().unwrap();
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
                service.log()
            );
        }
    }
}

/// Waits until the fields of /proc/PID/status have these values. The helper may still be confining
/// itself.
fn wait_for_status(service: &Service, pid: &str, fields: &[(&str, &str)]) {
    let path = format!("/proc/{pid}/status");
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let status = service.machine().run("cat", [&*path]).unwrap();
        let has = |(field, value): &(&str, &str)| status.contains(&format!("{field}:\t{value}\n"));
        if fields.iter().all(has) {
            return;
        }
        assert!(Instant::now() < deadline, "{fields:?} {status}");
        sleep(Duration::from_millis(20));
    }
}
