//! The error messages and exit codes for faults of QEMU's configuration and for unusable sockets.
//! Each error is one line that says what to do.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::accel::Accel;
use virtionet_tests::daemon::{DaemonExit, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic};

const TIMEOUT: Duration = Duration::from_secs(60);

/// QEMU reconnects immediately and indefinitely, so only the messages of QEMU and virtionetd show
/// the cause.
#[test]
fn qemu_with_too_many_pairs_is_reported_at_most_once_a_second_and_the_next_is_served() {
    let dir = RunDir::new().unwrap();
    let daemon = null_options()
        .flag("--queues", "2")
        .start(&dir, "vnet")
        .unwrap();
    let started_at = Instant::now();
    let nic = Nic::vhost_user(daemon.socket()).queues(4);
    let machine = Machine::new().accel(Accel::Auto).nic(nic);
    let mut qemu = machine.start(&dir, "guest").unwrap();
    while !qemu.proc().stderr().contains("queues than supported: 2") {
        assert!(started_at.elapsed() < TIMEOUT, "{}", qemu.proc().stderr());
        sleep(Duration::from_millis(100));
    }
    sleep(Duration::from_secs(2));
    drop(qemu);
    let seconds = usize::try_from(started_at.elapsed().as_secs()).unwrap();
    let log = daemon.stderr();
    let is_report = |line: &&str| line.contains("more than 2 queue pairs, raise --queues 2");
    let reports = log.lines().filter(is_report).count();
    assert!((1..=seconds + 1).contains(&reports), "{seconds} s: {log}");
    // The first line of the log says where the daemon listens.
    assert!(log.lines().count() <= 1 + 2 * (seconds + 1), "{log}");

    let frontend =
        TestFrontend::connect(daemon.socket(), &TestFrontendConfig::new(2, 256, MODERN)).unwrap();
    assert_eq!(frontend.pairs.len(), 2);
    drop(frontend);
    assert!(daemon.stop(Signal::SIGTERM).unwrap().status.success());
}

#[test]
fn unshared_guest_memory_is_reported_with_the_remedy_and_the_next_guest_is_served() {
    let dir = RunDir::new().unwrap();
    let mut daemon = null_options().start(&dir, "vnet").unwrap();
    let nic = Nic::vhost_user(daemon.socket());
    let machine = Machine::new().accel(Accel::Auto).nic(nic).private_memory();
    let qemu = machine.start(&dir, "guest").unwrap();
    let warns = |device: &serde_json::Value| {
        let warnings = device["warnings"].to_string();
        ["memory is not shared", "memory-backend-memfd", "share=on"]
            .iter()
            .all(|part| warnings.contains(part))
    };
    daemon
        .wait_for_device("warning of unshared memory", TIMEOUT, warns)
        .unwrap();
    // QEMU connects again and again, with a line for it once a second at most.
    let log = daemon.stderr();
    let lines = log
        .lines()
        .filter(|line| line.contains("memory is not shared"))
        .count();
    assert!((1..=3).contains(&lines), "{log}");
    drop(qemu);
    let frontend =
        TestFrontend::connect(daemon.socket(), &TestFrontendConfig::new(1, 256, MODERN)).unwrap();
    daemon
        .wait_for_device("without a warning", TIMEOUT, |device| !warns(device))
        .unwrap();
    drop(frontend);
}

#[test]
fn unusable_socket_is_refused_in_one_line_and_socket_of_a_killed_daemon_is_reused() {
    let dir = RunDir::new().unwrap();
    let holder = null_options().start(&dir, "vnet").unwrap();
    let socket = holder.socket().to_owned();
    let second = null_options().no_socket().flag("--socket-path", &socket);
    let refused = second.run_to_end(&dir, "second").unwrap();
    assert_one_error_line(&refused, "vnet.sock is in use by another process");
    assert!(
        socket.exists(),
        "the second daemon must not remove the socket of the first"
    );
    let frontend =
        TestFrontend::connect(&socket, &TestFrontendConfig::new(1, 256, MODERN)).unwrap();
    drop(frontend);

    // A new daemon replaces the socket that a killed daemon has left.
    drop(holder);
    assert!(
        socket.exists(),
        "a killed daemon does not remove its socket"
    );
    let next = second.start(&dir, "next").unwrap();
    drop(TestFrontend::connect(&socket, &TestFrontendConfig::new(1, 256, MODERN)).unwrap());
    assert!(next.stop(Signal::SIGTERM).unwrap().status.success());
    assert!(!socket.exists());

    fs::write(&socket, "a person's file").unwrap();
    let refused = second.run_to_end(&dir, "file").unwrap();
    assert_one_error_line(&refused, "vnet.sock exists and is not a socket");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "a person's file");

    let nowhere = dir.join("nowhere/vnet.sock");
    let options = null_options().no_socket().flag("--socket-path", &nowhere);
    let refused = options.run_to_end(&dir, "nowhere").unwrap();
    assert_one_error_line(&refused, "nowhere/vnet.sock: No such file or directory");

    let options = null_options().no_socket().flag("--fd", "77");
    assert_one_error_line(&options.run_to_end(&dir, "fd").unwrap(), "77");
}

/// Returns the options of a daemon with the null uplink.
fn null_options() -> Options {
    Options::new().flag("--uplink", "null")
}

/// Checks that the daemon has failed, and has printed one line that contains `part`.
fn assert_one_error_line(stopped: &DaemonExit, part: &str) {
    assert_eq!(stopped.status.code(), Some(1), "{stopped:?}");
    let text = stopped.stderr.trim();
    assert!(text.starts_with("virtionetd: vnet: "), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains(part), "no '{part}' in: {text}");
}
