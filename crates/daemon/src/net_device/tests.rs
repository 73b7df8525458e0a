//! Tests of a device with a front-end on a socket pair.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_placement::{Placement, PlacementPlanner};
use virtionet_uplink::null::Null;
use virtionet_vhost_user::{SessionLog, serve};

use super::*;
use crate::host_cpus::HostCpus;

const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);

fn net_device(pairs: u16) -> NetDevice {
    let cpus = Arc::new(HostCpus::read().unwrap());
    let planner = PlacementPlanner::new(Placement::Auto, cpus.allowed(), None).unwrap();
    let placer = Placer::new("vnet", planner, cpus);
    NetDevice::new(
        "vnet",
        pairs,
        Arc::new(Null),
        placer,
        PollMode::Off,
        Arc::default(),
    )
}

/// Connects a front-end with two queue pairs, calls `work` with it, and disconnects it.
fn with_frontend(net_device: &NetDevice, work: impl FnOnce(&mut TestFrontend)) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    std::thread::scope(|scope| {
        let session =
            scope.spawn(|| serve(ours, net_device, stop.as_fd(), None, &SessionLog::default()));
        let config = TestFrontendConfig::new(2, 64, MODERN);
        let mut frontend = TestFrontend::from_socket(theirs, &config).unwrap();
        // The answer shows that the session has handled all earlier messages.
        frontend.connection.get_features().unwrap();
        work(&mut frontend);
        drop(frontend);
        session.join().unwrap().unwrap();
    });
}

fn send(frontend: &mut TestFrontend, pair: usize, count: usize) {
    let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
    let frames = vec![frame; count];
    frontend.pairs[pair].tx.send_all(&frames, TIMEOUT).unwrap();
    frontend.pairs[pair].tx.drain(TIMEOUT).unwrap();
}

fn sent_frames(net_device: &NetDevice) -> Vec<u64> {
    let pairs = net_device.pairs();
    pairs
        .map(|served| served.pair.tx().stats().frames.get())
        .collect()
}

#[test]
fn pair_has_descriptors_only_while_a_front_end_is_connected_and_keeps_its_counters() {
    let net_device = net_device(4);
    with_frontend(&net_device, |frontend| {
        for served in net_device.pairs() {
            assert!(served.worker.is_open());
            assert!(served.pair.uplink().is_some());
        }
        send(frontend, 1, 3);
    });
    assert_eq!(sent_frames(&net_device), [0, 3]);
    for served in net_device.pairs() {
        assert!(!served.worker.is_open());
        assert!(served.pair.uplink().is_none());
        // Nothing to wake, which is no error.
        served.pair.wake();
    }
    // The next front-end is served by the same pairs.
    with_frontend(&net_device, |frontend| {
        send(frontend, 0, 2);
        send(frontend, 1, 4);
    });
    assert_eq!(sent_frames(&net_device), [2, 7]);
    assert!(net_device.pairs().all(|served| !served.worker.is_open()));
    assert!(net_device.pairs().all(|served| served.worker.cycles() > 0));
}
