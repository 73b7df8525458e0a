//! The less common ways in which a front-end and the daemon connect: QEMU listens, or the daemon
//! inherits its socket.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use rustix::io::{FdFlags, fcntl_setfd};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::TestFrontendConfig;
use virtionet_tests::daemon::Options;
use virtionet_tests::paths::RunDir;
use virtionet_tests::responder::{EchoResponder, ResponderAddresses};
use virtionet_tests::testbed::TestbedConfig;
use virtionet_tests::topology::{GUEST, HostNetwork, TAP};

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn client_daemon_and_its_successor_serve_a_qemu_that_listens() {
    let config = TestbedConfig::new(2).persistent_tap().qemu_listens();
    let mut testbed = config.start().unwrap();
    assert_eq!(testbed.daemon.device().unwrap()["role"], "client");
    testbed.move_data_both_ways().unwrap();
    testbed.daemon.proc().signal(Signal::SIGKILL).unwrap();
    testbed.daemon.proc().wait(TIMEOUT).unwrap();
    testbed.daemon = config.start_daemon(&testbed.network, &testbed.dir).unwrap();
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
    testbed.move_data_both_ways().unwrap();
    let stopped = testbed.daemon.stop_in_place(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    let socket = testbed.daemon.socket();
    assert!(
        socket.exists(),
        "the daemon must not remove the socket of QEMU"
    );
}

#[test]
fn inherited_listening_socket_serves_one_front_end_after_another() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let path = dir.join("inherited.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let options = options_with_inherited(&network, &listener).unwrap();
    let daemon = options.start(&dir, "vnet").unwrap();
    drop(listener);
    network.configure().unwrap();
    for pairs in [1, 2] {
        let config = TestFrontendConfig::new(pairs, 256, MODERN);
        let addresses = ResponderAddresses::from_ipv4(GUEST.v4).unwrap();
        let responder = EchoResponder::connect(&path, &config, addresses).unwrap();
        network.wait_for_ping(GUEST.v4).unwrap();
        assert_eq!(daemon.device().unwrap()["role"], "inherited");
        drop(responder);
    }
    let stopped = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(
        path.exists(),
        "the daemon must not remove a socket that it has not created"
    );
}

#[test]
fn inherited_connection_is_served_and_the_daemon_exits_when_it_is_closed() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = options_with_inherited(&network, &theirs).unwrap();
    let mut daemon = options.start(&dir, "vnet").unwrap();
    drop(theirs);
    network.configure().unwrap();
    let config = TestFrontendConfig::new(2, 256, MODERN);
    let addresses = ResponderAddresses::from_ipv4(GUEST.v4).unwrap();
    let responder = EchoResponder::from_socket(ours, &config, addresses).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    let frontend = responder.stop().unwrap();
    frontend
        .connection
        .wire
        .socket()
        .shutdown(Shutdown::Both)
        .unwrap();
    let status = daemon.proc().wait(TIMEOUT).unwrap();
    assert!(status.success(), "{status}: {}", daemon.stderr());
}

/// Returns the options of a daemon that inherits `socket`. Every program that is started while the
/// socket is open inherits it as well.
fn options_with_inherited(network: &HostNetwork, socket: &impl AsFd) -> Result<Options> {
    let fd = socket.as_fd();
    fcntl_setfd(fd, FdFlags::empty())?;
    let options = Options::new().netns(network.netns()).no_socket();
    let number = fd.as_raw_fd().to_string();
    Ok(options.flag("--tap", TAP).flag("--fd", number))
}
