//! Every way in which a front-end and the daemon come together beside the usual
//! one: QEMU listens, or the daemon inherits its socket.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use rustix::io::{FdFlags, fcntl_setfd};
use virtionet_guest::card::CardConfig;
use virtionet_guest::net::MODERN;
use virtionet_tests::daemon::Options;
use virtionet_tests::paths::RunDir;
use virtionet_tests::rig::Plan;
use virtionet_tests::station::{Identity, Station};
use virtionet_tests::topology::{GUEST, Lan, TAP};

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn a_client_serves_a_qemu_that_listens_and_so_does_its_successor() {
    let plan = Plan::new(2).lasting_tap().qemu_listens();
    let mut rig = plan.start().unwrap();
    assert_eq!(rig.daemon.device().unwrap()["role"], "client");
    rig.move_data_both_ways().unwrap();
    rig.daemon.proc().signal(Signal::SIGKILL).unwrap();
    rig.daemon.proc().wait(LIMIT).unwrap();
    rig.daemon = plan.start_daemon(&rig.lan, &rig.dir).unwrap();
    rig.lan.reach(GUEST.v4).unwrap();
    rig.move_data_both_ways().unwrap();
    let stopped = rig.daemon.end(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    let socket = rig.daemon.socket();
    assert!(socket.exists(), "QEMU's socket is not ours to remove");
}

#[test]
fn an_inherited_listening_socket_serves_one_front_end_after_another() {
    let dir = RunDir::new().unwrap();
    let lan = Lan::bare().unwrap();
    let path = dir.join("given.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let options = inheriting(&lan, &listener).unwrap();
    let daemon = options.start(&dir, "vnet").unwrap();
    drop(listener);
    lan.configure().unwrap();
    for pairs in [1, 2] {
        let config = CardConfig::new(pairs, 256, MODERN);
        let who = Identity::at(GUEST.v4).unwrap();
        let station = Station::connect(&path, &config, who).unwrap();
        lan.reach(GUEST.v4).unwrap();
        assert_eq!(daemon.device().unwrap()["role"], "inherited");
        drop(station);
    }
    let stopped = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(path.exists(), "who made the socket removes it");
}

#[test]
fn an_inherited_connection_is_served_to_its_end_and_the_daemon_with_it() {
    let dir = RunDir::new().unwrap();
    let lan = Lan::bare().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = inheriting(&lan, &theirs).unwrap();
    let mut daemon = options.start(&dir, "vnet").unwrap();
    drop(theirs);
    lan.configure().unwrap();
    let config = CardConfig::new(2, 256, MODERN);
    let who = Identity::at(GUEST.v4).unwrap();
    let station = Station::over(ours, &config, who).unwrap();
    lan.reach(GUEST.v4).unwrap();
    let card = station.stop().unwrap();
    card.front.wire.socket().shutdown(Shutdown::Both).unwrap();
    let status = daemon.proc().wait(LIMIT).unwrap();
    assert!(status.success(), "{status}: {}", daemon.stderr());
}

/// A daemon that gets `socket`, which every program started from now on gets as well.
fn inheriting(lan: &Lan, socket: &impl AsFd) -> Result<Options> {
    let fd = socket.as_fd();
    fcntl_setfd(fd, FdFlags::empty())?;
    let options = Options::new().netns(lan.netns()).no_socket();
    let number = fd.as_raw_fd().to_string();
    Ok(options.flag("--tap", TAP).flag("--fd", number))
}
