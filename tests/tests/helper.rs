//! The helper of a running daemon, and a daemon without one.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;

const NO_CAPABILITY: &str = "0000000000000000";
const TIMEOUT: Duration = Duration::from_secs(5);

fn rights(daemon: &Daemon) -> Value {
    daemon.get("/v1/devices").unwrap()["rights"].take()
}

fn helper_pid(daemon: &Daemon) -> u32 {
    let pid = rights(daemon)["helper_pid"].as_u64().unwrap();
    u32::try_from(pid).unwrap()
}

/// The value of a field of /proc/PID/status.
fn status(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

/// Waits until the main thread of `pid` has these capabilities and a filter. It confines itself
/// last, when the control socket may have answered already.
fn wait_until_confined(pid: u32, capabilities: &str) {
    let deadline = Instant::now() + TIMEOUT;
    let has_both = || status(pid, "CapPrm") == capabilities && status(pid, "Seccomp") == "2";
    while !has_both() {
        let now = status(pid, "CapPrm");
        assert!(Instant::now() < deadline, "{pid} has capabilities {now}");
        sleep(Duration::from_millis(5));
    }
}

/// A daemon that gives up its user.
fn start_as_nobody(dir: &RunDir) -> Daemon {
    Options::new()
        .flag("--uplink", "null")
        .flag("--user", "65534")
        .flag("--group", "65534")
        .start(dir, "vnet")
        .unwrap()
}

#[test]
fn helper_keeps_two_capabilities_and_the_daemon_none() {
    let dir = RunDir::new().unwrap();
    let daemon = start_as_nobody(&dir);
    let helper = helper_pid(&daemon);
    let expected = json!({
        "sandbox": "on", "user": 65534, "capabilities": [],
        "helper": "running", "helper_pid": helper,
    });
    assert_eq!(rights(&daemon), expected);
    // CAP_DAC_OVERRIDE and CAP_NET_ADMIN (linux/capability.h).
    wait_until_confined(helper, "0000000000001002");
    assert_eq!(status(helper, "CapEff"), "0000000000001002");
    assert_eq!(status(helper, "NoNewPrivs"), "1");
    wait_until_confined(daemon.pid(), NO_CAPABILITY);
    assert_eq!(status(daemon.pid(), "Uid"), "65534\t65534\t65534\t65534");
    let exit = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(exit.status.success(), "{}", exit.stderr);
    // The daemon has waited for it.
    assert!(!fs::exists(format!("/proc/{helper}")).unwrap());
}

#[test]
fn sockets_that_the_user_may_not_remove_are_removed_at_the_end() {
    let dir = RunDir::new().unwrap();
    let daemon = start_as_nobody(&dir);
    let sockets = [daemon.socket().to_owned(), daemon.control().to_owned()];
    let exist = || sockets.iter().map(|socket| socket.exists());
    assert!(exist().all(|exists| exists));
    let exit = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(exit.status.success(), "{}", exit.stderr);
    assert!(!exist().any(|exists| exists), "{sockets:?} {}", exit.stderr);
    assert!(!exit.stderr.contains("WARN"), "{}", exit.stderr);
}

#[test]
fn helper_that_is_killed_is_reported_and_the_daemon_goes_on() {
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")
        .unwrap();
    let helper = helper_pid(&daemon);
    kill(
        Pid::from_raw(i32::try_from(helper).unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while rights(&daemon)["helper"] != "lost" {
        assert!(Instant::now() < deadline, "{:?}", rights(&daemon));
        sleep(Duration::from_millis(10));
    }
    assert!(
        daemon
            .get_text("/metrics")
            .unwrap()
            .contains("virtionetd_helper_running{} 0\n")
    );
    let config = TestFrontendConfig::new(1, 256, MODERN);
    let _frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    let exit = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(exit.status.success(), "{}", exit.stderr);
    let reports = exit.stderr.matches("the helper ended (signal: 9").count();
    assert_eq!(reports, 1, "{}", exit.stderr);
}

#[test]
fn daemon_without_a_helper_says_so_and_has_no_capability_either() {
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .flag("--uplink", "null")
        .flag("--helper", "off")
        .start(&dir, "vnet")
        .unwrap();
    assert_eq!(rights(&daemon)["helper"], "off");
    wait_until_confined(daemon.pid(), NO_CAPABILITY);
    assert!(
        !daemon
            .get_text("/metrics")
            .unwrap()
            .contains("virtionetd_helper_running{}")
    );
    assert!(daemon.stop(Signal::SIGTERM).unwrap().status.success());
}

#[test]
fn user_that_does_not_exist_is_refused() {
    let dir = RunDir::new().unwrap();
    let exit = Options::new()
        .flag("--uplink", "null")
        .flag("--user", "no-such-user")
        .run_to_end(&dir, "vnet")
        .unwrap();
    let text = "user no-such-user does not exist; create it or name another";
    assert!(
        !exit.status.success() && exit.stderr.contains(text),
        "{}",
        exit.stderr
    );
}

#[test]
fn daemon_runs_confined_in_a_user_namespace() {
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .wrapped_in(["unshare", "--user", "--map-root-user", "--net"])
        .flag("--uplink", "tap:tap0")
        .start(&dir, "vnet")
        .unwrap();
    let expected = json!({
        "sandbox": "on", "user": 0, "capabilities": [],
        "helper": "running", "helper_pid": helper_pid(&daemon),
    });
    assert_eq!(rights(&daemon), expected);
    let config = TestFrontendConfig::new(4, 256, MODERN);
    let _frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    let exit = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(exit.status.success(), "{}", exit.stderr);
    assert!(!exit.stderr.contains("ERROR"), "{}", exit.stderr);
}
