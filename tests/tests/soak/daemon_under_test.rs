//! The daemon, its devices and its counters, and the network of its TAPs.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::topology::{HostNetwork, TAP};

use crate::journal::Journal;

/// The time within which every effect of an action must be visible. It is generous, because the
/// machine may be busy and a guest may be emulated.
pub const TIMEOUT: Duration = Duration::from_secs(20);
/// Queue pairs of each attacked device.
pub const PAIRS: u16 = 2;
/// Queue pairs and vCPUs of the guest.
pub const GUEST_PAIRS: u16 = 2;
/// The TAP of the device `tap`; the guest has [`TAP`].
pub const ATTACKED_TAP: &str = "tap1";

/// The parts that all actors share.
#[derive(Debug)]
pub struct DaemonUnderTest {
    pub journal: Journal,
    pub daemon: Daemon,
    pub network: HostNetwork,
    pub dir: RunDir,
    /// The number of frames that the well-behaved device has received.
    pub progress: Arc<AtomicU64>,
}

impl DaemonUnderTest {
    /// Starts one daemon with all devices.
    pub fn start(seed: u64) -> Self {
        let dir = RunDir::new().unwrap();
        let network = HostNetwork::with_tap(GUEST_PAIRS).unwrap();
        create_attacked_tap(&network);
        let uplinks = [
            ("good0", 1, "switch:good".to_owned()),
            ("good1", 1, "switch:good".to_owned()),
            ("null", PAIRS, "null".to_owned()),
            ("bad0", PAIRS, "switch:bad".to_owned()),
            ("bad1", PAIRS, "switch:bad".to_owned()),
            ("tap", PAIRS, format!("tap:{ATTACKED_TAP}")),
            ("guest", GUEST_PAIRS, format!("tap:{TAP}")),
        ];
        let mut options = Options::new().no_socket().netns(network.netns());
        for (name, queues, uplink) in uplinks {
            let socket = dir.join(&format!("{name}.sock"));
            let device = format!(
                "name={name},socket-path={},queues={queues},uplink={uplink}",
                socket.display()
            );
            options = options.flag("--device", device);
        }
        let daemon = options.start(&dir, "vnet").unwrap();
        Self {
            journal: Journal::new(seed),
            daemon,
            network,
            dir,
            progress: Arc::default(),
        }
    }

    /// The vhost-user socket of a device.
    pub fn socket(&self, device: &str) -> PathBuf {
        self.dir.join(&format!("{device}.sock"))
    }

    /// The state and counters of a device.
    pub fn device(&self, name: &str) -> Value {
        let mut report = self.daemon.get("/v1/devices").unwrap();
        let devices = report["devices"].as_array_mut().unwrap();
        let device = devices.iter_mut().find(|device| device["name"] == name);
        device.unwrap().take()
    }

    /// Waits until `is_reached` is true for a device.
    pub fn wait_for(&self, name: &str, state: &str, is_reached: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let device = self.device(name);
            if is_reached(&device) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is not {state}: {device}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Checks that the well-behaved device receives further frames.
    pub fn assert_progress(&self) {
        let before = self.progress.load(Ordering::Relaxed);
        let deadline = Instant::now() + TIMEOUT;
        while self.progress.load(Ordering::Relaxed) == before {
            assert!(Instant::now() < deadline, "the well-behaved device stalls");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Creates the TAP of the device `tap`, with an address and a neighbour behind it.
pub fn create_attacked_tap(network: &HostNetwork) {
    let netns = network.netns();
    for command in [
        format!("tuntap add dev {ATTACKED_TAP} mode tap multi_queue vnet_hdr"),
        format!("addr replace 10.78.0.1/24 dev {ATTACKED_TAP}"),
        format!("link set {ATTACKED_TAP} up"),
        format!(
            "neigh replace 10.78.0.2 lladdr 02:00:00:00:00:30 dev {ATTACKED_TAP} nud permanent"
        ),
    ] {
        netns.ip(&command).unwrap();
    }
}

/// One counter of a vring.
pub fn counter(device: &Value, pair: usize, vring: &str, name: &str) -> u64 {
    device["pairs"][pair][vring]["counters"][name]
        .as_u64()
        .unwrap_or(0)
}
