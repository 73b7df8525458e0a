//! What a person is told when something is wrong on QEMU's side or with a
//! socket: one sentence that says what to do, and an exit code that tells.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::accel::Accel;
use virtionet_tests::daemon::{Options, Stopped};
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic};

const LIMIT: Duration = Duration::from_secs(60);

/// QEMU tries again at once and without end: nothing but its own words and ours tells why.
#[test]
fn a_qemu_that_wants_more_pairs_is_told_of_once_a_second_and_the_next_is_served() {
    let dir = RunDir::new().unwrap();
    let daemon = null().flag("--queues", "2").start(&dir, "vnet").unwrap();
    let started_at = Instant::now();
    let nic = Nic::vhost_user(daemon.socket()).queues(4);
    let machine = Machine::new().accel(Accel::Auto).nic(nic);
    let mut qemu = machine.start(&dir, "guest").unwrap();
    while !qemu.proc().stderr().contains("queues than supported: 2") {
        assert!(started_at.elapsed() < LIMIT, "{}", qemu.proc().stderr());
        sleep(Duration::from_millis(100));
    }
    sleep(Duration::from_secs(2));
    drop(qemu);
    let seconds = usize::try_from(started_at.elapsed().as_secs()).unwrap();
    let said = daemon.stderr();
    let told = |line: &&str| line.contains("more than 2 queue pairs, raise --queues 2");
    let times = said.lines().filter(told).count();
    assert!((1..=seconds + 1).contains(&times), "{seconds} s: {said}");
    // One line says at start where the daemon listens.
    assert!(said.lines().count() <= 1 + 2 * (seconds + 1), "{said}");

    let frontend =
        TestFrontend::connect(daemon.socket(), &TestFrontendConfig::new(2, 256, MODERN)).unwrap();
    assert_eq!(frontend.pairs.len(), 2);
    drop(frontend);
    assert!(daemon.stop(Signal::SIGTERM).unwrap().status.success());
}

#[test]
fn guest_memory_that_is_not_shared_ends_the_daemon_with_the_remedy() {
    let dir = RunDir::new().unwrap();
    let mut daemon = null().start(&dir, "vnet").unwrap();
    let nic = Nic::vhost_user(daemon.socket());
    let machine = Machine::new().accel(Accel::Auto).nic(nic).private_memory();
    let _qemu = machine.start(&dir, "guest").unwrap();
    let status = daemon.proc().wait(LIMIT).unwrap();
    assert_eq!(status.code(), Some(1));
    let said = daemon.stderr();
    let last = said.lines().next_back().unwrap();
    assert!(last.starts_with("virtionetd: vnet: "), "{said}");
    assert!(last.contains("memory is not shared"), "{said}");
    assert!(last.contains("memory-backend-memfd"), "{said}");
    assert!(last.contains("share=on"), "{said}");
    // Nothing else is an error.
    assert!(!said.contains("ERROR"), "{said}");
    assert!(!daemon.socket().exists());
}

#[test]
fn a_socket_that_cannot_be_had_is_named_with_the_remedy() {
    let dir = RunDir::new().unwrap();
    let holder = null().start(&dir, "vnet").unwrap();
    let socket = holder.socket().to_owned();
    let second = null().no_socket().flag("--socket-path", &socket);
    let refused = second.run_to_end(&dir, "second").unwrap();
    assert_one_error_line(&refused, "vnet.sock is in use by another process");
    assert!(socket.exists(), "the holder's socket must stay");
    let frontend =
        TestFrontend::connect(&socket, &TestFrontendConfig::new(1, 256, MODERN)).unwrap();
    drop(frontend);

    // Left behind by a daemon that is gone: taken over.
    drop(holder);
    assert!(socket.exists(), "a killed daemon leaves its socket");
    let next = second.start(&dir, "next").unwrap();
    drop(TestFrontend::connect(&socket, &TestFrontendConfig::new(1, 256, MODERN)).unwrap());
    assert!(next.stop(Signal::SIGTERM).unwrap().status.success());
    assert!(!socket.exists());

    fs::write(&socket, "a person's file").unwrap();
    let refused = second.run_to_end(&dir, "file").unwrap();
    assert_one_error_line(&refused, "vnet.sock exists and is not a socket");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "a person's file");

    let nowhere = dir.join("nowhere/vnet.sock");
    let lost = null().no_socket().flag("--socket-path", &nowhere);
    let refused = lost.run_to_end(&dir, "nowhere").unwrap();
    assert_one_error_line(&refused, "nowhere/vnet.sock: No such file or directory");

    let fd = null().no_socket().flag("--fd", "77");
    assert_one_error_line(&fd.run_to_end(&dir, "fd").unwrap(), "77");
}

/// A daemon whose frames go nowhere.
fn null() -> Options {
    Options::new().flag("--uplink", "null")
}

fn assert_one_error_line(stopped: &Stopped, part: &str) {
    assert_eq!(stopped.status.code(), Some(1), "{stopped:?}");
    let text = stopped.stderr.trim();
    assert!(text.starts_with("virtionetd: vnet: "), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains(part), "no '{part}' in: {text}");
}
