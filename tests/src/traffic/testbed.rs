//! A daemon for the flows of [`super::Traffic`], and the next one that replaces it.

use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};

use super::Traffic;
use crate::daemon::{Daemon, Options};
use crate::netns::Netns;
use crate::paths::RunDir;
use crate::pause::pause_in_log;
use crate::sched::allowed_cpus;
use crate::topology::{GUEST, HOST, HostNetwork, TAP};

/// The number of descriptors of each virtqueue: more than frames can be on their way.
const QUEUE_SIZE: u16 = 1024;
/// The receive buffer of a socket of the host in bytes: more than the window of a flow needs.
const SOCKET_BUFFER: usize = 4 << 20;
/// The names of the TAPs that devices may have that are added to the daemon.
const ADDED_TAPS: &str = "added*";
/// The ports of the queue pairs begin here.
const FIRST_HOST_PORT: u16 = 3000;
const FIRST_GUEST_PORT: u16 = 2000;
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After it each flow has its vring.
const WARM_UP_TIME: Duration = Duration::from_millis(200);
/// How long the old daemon may take to end, all of its successor's start included.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What the devices are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uplink {
    /// One device on a TAP.
    Tap,
    /// Two devices on a switch.
    Switch,
}

/// What is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// What the devices are on.
    pub uplink: Uplink,
    /// Whether the virtqueues are packed.
    pub is_packed: bool,
    /// The number of queue pairs of each device.
    pub pairs: u16,
    /// Whether one worker serves all queue pairs, instead of one each.
    pub shares_worker: bool,
}

impl Setup {
    /// Both formats on both uplinks.
    #[must_use]
    pub fn all(pairs: u16) -> [Self; 4] {
        [
            (Uplink::Tap, false),
            (Uplink::Tap, true),
            (Uplink::Switch, false),
            (Uplink::Switch, true),
        ]
        .map(|(uplink, is_packed)| Self {
            uplink,
            is_packed,
            pairs,
            shares_worker: false,
        })
    }

    /// The configuration of the front-ends.
    #[must_use]
    pub fn frontend(self) -> TestFrontendConfig {
        let format = if self.is_packed { PACKED } else { 0 };
        TestFrontendConfig {
            required: format,
            connect_timeout: CONNECT_TIMEOUT,
            ..TestFrontendConfig::new(self.pairs, QUEUE_SIZE, MODERN | format)
        }
    }

    fn devices(self) -> usize {
        match self.uplink {
            Uplink::Tap => 1,
            Uplink::Switch => 2,
        }
    }
}

/// A daemon, and the network of its host.
#[derive(Debug)]
pub struct TrafficTestbed {
    /// The daemon.
    pub daemon: Daemon,
    network: HostNetwork,
    dir: RunDir,
    options: Options,
    setup: Setup,
}

impl TrafficTestbed {
    /// Starts a daemon.
    ///
    /// # Errors
    /// When this process is not root, or a part cannot be created.
    pub fn start(setup: Setup) -> Result<Self> {
        let dir = RunDir::new()?;
        // The TAP outlives a daemon. That of a device with several queue pairs is a multiqueue TAP.
        let network = HostNetwork::with_tap(setup.pairs.max(2))?;
        prepare_host(network.netns())?;
        let uplink = match setup.uplink {
            Uplink::Tap => format!("tap={TAP}"),
            Uplink::Switch => "uplink=switch:s".to_owned(),
        };
        let mut options = Options::new()
            .no_socket()
            .netns(network.netns())
            .flag("--handover-socket", dir.join("handover"))
            .flag(
                "--allow-add",
                format!(
                    "socket={}/added*.sock,tap={ADDED_TAPS},switch=*",
                    dir.path().display()
                ),
            );
        if setup.shares_worker {
            let cpu = allowed_cpus()?.last().copied().unwrap_or(0);
            options = options.flag("--workers", format!("list:{cpu}"));
        }
        for device in 0..setup.devices() {
            let socket = socket(&dir, device);
            let socket = socket.display();
            options = options.flag(
                "--device",
                format!("name=d{device},socket-path={socket},{uplink}"),
            );
        }
        Ok(Self {
            daemon: options.start(&dir, "vnet")?,
            network,
            dir,
            options,
            setup,
        })
    }

    /// Connects a front-end to each device, and waits until each flow has its vring.
    ///
    /// # Errors
    /// When one is refused, or the host has no sockets.
    pub fn connect(&self) -> Result<Traffic> {
        let config = self.setup.frontend();
        let connect = |device| -> Result<_> {
            Ok(TestFrontend::connect(&socket(&self.dir, device), &config)?)
        };
        let mut traffic = match self.setup.uplink {
            Uplink::Tap => {
                let sockets = host_sockets(self.network.netns(), self.setup.pairs)?;
                let (guest, host) = (address(GUEST.v4)?, address(HOST.v4)?);
                Traffic::with_host(connect(0)?, sockets, |pair| FrameSpec {
                    source_mac: GUEST_MAC,
                    target_mac: HOST_MAC,
                    source: guest,
                    target: host,
                    source_port: port(FIRST_GUEST_PORT, pair),
                    target_port: port(FIRST_HOST_PORT, pair),
                    ..FrameSpec::v4(Transport::Udp)
                })?
            }
            Uplink::Switch => Traffic::between([connect(0)?, connect(1)?], spec_on_switch)?,
        };
        traffic.warm_up(WARM_UP_TIME)?;
        Ok(traffic)
    }

    /// Connects the front-ends of `traffic` again, to a daemon that has replaced one that vanished.
    ///
    /// # Errors
    /// When one is refused.
    pub fn reconnect(&self, traffic: &mut Traffic) -> Result<()> {
        // A device that sends needs the other one.
        for device in (0..self.setup.devices()).rev() {
            let path = socket(&self.dir, device);
            let connection = FrontendConnection::connect(&path, CONNECT_TIMEOUT)?;
            traffic.reconnect(device, connection, &self.setup.frontend())?;
        }
        Ok(())
    }

    /// Starts the next daemon, after the last one has vanished.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon = self.options.start(&self.dir, "vnet")?;
        Ok(())
    }

    /// Starts a daemon that takes over from the one that runs. Returns how long the devices were
    /// paused by what the old one has logged. `name` is that of the new one's log.
    ///
    /// # Errors
    /// When the devices are not handed over.
    pub fn upgrade(&mut self, name: &str) -> Result<Duration> {
        let options = self.options.clone().take_over(name);
        let successor = options.start(&self.dir, "vnet")?;
        let mut old = std::mem::replace(&mut self.daemon, successor);
        let status = old.proc().wait(END_TIMEOUT)?;
        let log = old.stderr();
        ensure!(status.success(), "the old daemon: {status}: {log}");
        pause_in_log(&log)
    }

    /// The directory for the files of a test.
    #[must_use]
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }
}

fn socket(dir: &RunDir, device: usize) -> PathBuf {
    dir.join(&format!("d{device}.sock"))
}

fn address(v4: &str) -> Result<IpAddr> {
    Ok(v4.parse()?)
}

fn port(first: u16, pair: usize) -> u16 {
    first + u16::try_from(pair).unwrap_or(0)
}

/// A frame of queue pair `pair` of a device. Both directions of a queue pair are one flow, which the
/// switch answers on its own queue pair.
fn spec_on_switch(device: usize, pair: usize) -> FrameSpec {
    let spec = FrameSpec {
        source_port: port(FIRST_GUEST_PORT, pair),
        target_port: port(FIRST_HOST_PORT, pair),
        ..FrameSpec::v4(Transport::Udp)
    };
    match device {
        0 => spec,
        _ => FrameSpec {
            source_mac: spec.target_mac,
            target_mac: spec.source_mac,
            source: spec.target,
            target: spec.source,
            source_port: spec.target_port,
            target_port: spec.source_port,
            ..spec
        },
    }
}

/// Gives both ends of the TAP their MAC addresses, so that nobody has to ask for them.
fn prepare_host(netns: &Netns) -> Result<()> {
    let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    netns.ip(&format!("link set {TAP} address {}", text(HOST_MAC)))?;
    netns.ip(&format!(
        "neigh replace {} lladdr {} dev {TAP} nud permanent",
        GUEST.v4,
        text(GUEST_MAC)
    ))?;
    Ok(())
}

/// A socket in the namespace for each queue pair. The sockets stay there; the thread ends.
fn host_sockets(netns: &Netns, pairs: u16) -> Result<Vec<UdpSocket>> {
    let path = format!("/run/netns/{}", netns.name());
    let opening = thread::spawn(move || -> Result<Vec<UdpSocket>> {
        setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        let open = |pair| -> Result<UdpSocket> {
            let socket = UdpSocket::bind((address(HOST.v4)?, FIRST_HOST_PORT + pair))?;
            socket.connect((address(GUEST.v4)?, FIRST_GUEST_PORT + pair))?;
            socket.set_nonblocking(true)?;
            set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER)?;
            Ok(socket)
        };
        (0..pairs).map(open).collect()
    });
    let opened = opening.join();
    opened.map_err(|_| anyhow!("the thread that opens sockets panicked"))?
}
