//! A network device with an uplink of the test, and a front-end over a real session.
#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use virtionet_config::PollMode;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_net_device::host_cpus::HostCpus;
use virtionet_net_device::net_device::NetDevice;
use virtionet_net_device::placer::Placer;
use virtionet_placement::{Placement, PlacementPlanner};
use virtionet_vhost_user::{SessionLog, serve};
use virtionet_virtio_net::uplink::Uplink;

const TIMEOUT: Duration = Duration::from_secs(20);

/// Calls `work` with a front-end that is connected to a device of `uplink`, and the device. The
/// device has as many queue pairs as `config`.
pub fn with_frontend(
    uplink: Arc<dyn Uplink>,
    config: &TestFrontendConfig,
    work: impl FnOnce(&mut TestFrontend, &NetDevice),
) {
    let host = Arc::new(HostCpus::read().unwrap());
    let planner = PlacementPlanner::new(Placement::Auto, host.allowed(), None).unwrap();
    let device = NetDevice::new(
        "net0",
        config.pairs,
        uplink,
        Placer::new("net0", planner, host),
        PollMode::Off,
        Arc::default(),
    );
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (front_end_socket, back_end_socket) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let session = scope.spawn(|| {
            let log = SessionLog::default();
            serve(back_end_socket, &device, stop.as_fd(), None, &log)
        });
        let mut frontend = TestFrontend::from_socket(front_end_socket, config).unwrap();
        work(&mut frontend, &device);
        drop(frontend);
        session.join().unwrap().unwrap();
    });
}

/// Waits until `is_done`.
pub fn wait_until(what: &str, is_done: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}
