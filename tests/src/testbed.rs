//! A complete testbed: the host's network, the daemon on a TAP, and a guest whose network device
//! the daemon serves and which answers pings.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::accel::Accel;
use crate::daemon::{Daemon, Options};
use crate::diagnostics;
use crate::iperf::{Clients, Direction, Iperf, IperfLoad};
use crate::paths::RunDir;
use crate::qemu::{Machine, Nic, Qemu};
use crate::topology::{HostNetwork, TAP, configure_guest};

/// The time that a guest may take to boot.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(60);

/// The configuration of a testbed.
#[derive(Clone, Debug)]
pub struct TestbedConfig {
    pairs: u16,
    memory_mib: u32,
    is_tap_persistent: bool,
    is_qemu_listening: bool,
    reconnect_ms: Option<u32>,
    props: Vec<String>,
    vcpus: Option<u32>,
    max_vcpus: Option<u32>,
    daemon_flags: Vec<(String, String)>,
    uplink: (&'static str, String),
    iommu: Option<String>,
    is_pluggable: bool,
}

impl TestbedConfig {
    /// Configures a guest with as many vCPUs as queue pairs, which uses all pairs, and a TAP that
    /// the daemon creates.
    pub fn new(pairs: u16) -> Self {
        Self {
            pairs,
            memory_mib: 512,
            is_tap_persistent: false,
            is_qemu_listening: false,
            reconnect_ms: None,
            props: Vec::new(),
            vcpus: None,
            max_vcpus: None,
            daemon_flags: Vec::new(),
            uplink: ("--tap", TAP.to_owned()),
            iommu: None,
            is_pluggable: false,
        }
    }

    /// Sets the number of vCPUs, if it differs from the number of queue pairs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = Some(vcpus);
        self
    }

    /// Sets the maximum number of vCPUs, which can be plugged in later.
    #[must_use]
    pub fn max_vcpus(mut self, vcpus: u32) -> Self {
        self.max_vcpus = Some(vcpus);
        self
    }

    /// Adds a flag of the daemon and its value.
    #[must_use]
    pub fn daemon_flag(mut self, flag: &str, value: &str) -> Self {
        self.daemon_flags.push((flag.to_owned(), value.to_owned()));
        self
    }

    /// Puts the network device behind an IOMMU, and adds `kernel_args` to the arguments of the
    /// guest's kernel.
    #[must_use]
    pub fn intel_iommu(mut self, kernel_args: &str) -> Self {
        self.iommu = Some(kernel_args.to_owned());
        self.prop("iommu_platform=on")
            .prop("disable-legacy=on")
            .prop("ats=on")
    }

    /// Puts the network device into a slot, so that it can be plugged out and in. Its id is `nic`.
    #[must_use]
    pub fn pluggable(mut self) -> Self {
        self.is_pluggable = true;
        self.prop("bus=hot").prop("id=nic")
    }

    /// Makes this the daemon's uplink, instead of the TAP itself.
    #[must_use]
    pub fn uplink(mut self, uplink: &str) -> Self {
        self.uplink = ("--uplink", uplink.to_owned());
        self
    }

    /// Sets the guest's memory in MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Creates the TAP before the daemon starts. The TAP and the host's connections then continue
    /// to exist when the daemon exits.
    #[must_use]
    pub fn persistent_tap(mut self) -> Self {
        self.is_tap_persistent = true;
        self
    }

    /// Makes QEMU listen on the vhost-user socket, so that the daemon connects to it.
    #[must_use]
    pub fn qemu_listens(mut self) -> Self {
        self.is_qemu_listening = true;
        self
    }

    /// Makes QEMU reconnect `ms` milliseconds after a disconnection.
    #[must_use]
    pub fn reconnect_ms(mut self, ms: u32) -> Self {
        self.reconnect_ms = Some(ms);
        self
    }

    /// Adds a property of the network device.
    #[must_use]
    pub fn prop(mut self, prop: &str) -> Self {
        self.props.push(prop.to_owned());
        self
    }

    /// Starts the testbed and waits until the guest answers a ping. vCPU i is pinned to the i-th
    /// CPU, modulo the number of CPUs.
    ///
    /// # Errors
    /// When a part of the testbed does not start. The error contains its output.
    pub fn start(&self) -> Result<Testbed> {
        self.start_with(|options, _| options)
    }

    /// Does so with a daemon whose options `adapt` returns.
    ///
    /// # Errors
    /// When a part of the testbed does not start.
    pub fn start_with(&self, adapt: impl FnOnce(Options, &RunDir) -> Options) -> Result<Testbed> {
        let dir = RunDir::new()?;
        let network = if self.is_tap_persistent {
            HostNetwork::with_tap(self.pairs)?
        } else {
            HostNetwork::bare()?
        };
        let options = adapt(self.options(&network), &dir);
        let daemon = options.start(&dir, "vnet")?;
        network.configure()?;
        let mut testbed = Testbed {
            qemu: self.boot(&dir, &daemon, "guest")?,
            daemon,
            network,
            dir,
            config: self.clone(),
        };
        testbed.configure_guest()?;
        Ok(testbed)
    }

    /// Starts a daemon on the TAP, either the first one or a replacement for one that has exited.
    ///
    /// # Errors
    /// When the daemon does not start.
    pub fn start_daemon(&self, network: &HostNetwork, dir: &RunDir) -> Result<Daemon> {
        let daemon = self.options(network).start(dir, "vnet")?;
        network.configure()?;
        Ok(daemon)
    }

    /// The options of the daemon.
    pub fn options(&self, network: &HostNetwork) -> Options {
        let (flag, uplink) = &self.uplink;
        let mut options = Options::new().netns(network.netns()).flag(flag, uplink);
        for (flag, value) in &self.daemon_flags {
            options = options.flag(flag, value);
        }
        if self.is_qemu_listening {
            options = options.client();
        }
        options
    }

    fn boot(&self, dir: &RunDir, daemon: &Daemon, name: &str) -> Result<Qemu> {
        let mut nic = if self.is_qemu_listening {
            Nic::vhost_user_listen(daemon.socket())
        } else {
            Nic::vhost_user(daemon.socket())
        };
        nic = nic.queues(self.pairs);
        if let Some(ms) = self.reconnect_ms {
            nic = nic.reconnect_ms(ms);
        }
        for prop in &self.props {
            nic = nic.prop(prop);
        }
        let mut machine = Machine::new();
        if let Some(kernel_args) = &self.iommu {
            machine = machine.intel_iommu(kernel_args);
        }
        if self.is_pluggable {
            machine = machine.slot();
        }
        if let Some(max) = self.max_vcpus {
            machine = machine.max_vcpus(max);
        }
        let (qemu, _) = machine
            .vcpus(self.vcpus.unwrap_or(self.pairs.into()))
            .memory_mib(self.memory_mib)
            .accel(Accel::Auto)
            .nic(nic)
            .pinned()
            .boot(dir, name, BOOT_TIMEOUT)?;
        Ok(qemu)
    }
}

/// A running testbed.
#[derive(Debug)]
pub struct Testbed {
    /// The machine of the guest.
    pub qemu: Qemu,
    /// The daemon.
    pub daemon: Daemon,
    /// The host's network.
    pub network: HostNetwork,
    /// The directory of the sockets and logs.
    pub dir: RunDir,
    config: TestbedConfig,
}

impl Testbed {
    /// Configures the addresses of the guest's interface and waits until the guest answers a ping.
    /// Call this after each boot and whenever the driver has been bound again.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn configure_guest(&mut self) -> Result<()> {
        configure_guest(self.qemu.guest(), self.config.pairs)?;
        diagnostics::wait_for_ping(&self.network, self.qemu.guest(), Some(&self.daemon))
    }

    /// Boots a new machine in place of the previous one, which must have exited. Call
    /// [`Testbed::configure_guest`] afterwards.
    ///
    /// # Errors
    /// When the guest does not boot.
    pub fn start_qemu(&mut self, name: &str) -> Result<()> {
        self.qemu = self.config.boot(&self.dir, &self.daemon, name)?;
        Ok(())
    }

    /// Prepares iperf3 with its clients on the host and one process for each queue pair.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn iperf(&self) -> Result<Iperf<'_>> {
        let guest = self.qemu.guest();
        Iperf::new(
            &self.network,
            guest,
            &self.dir,
            Clients::Host,
            self.config.pairs,
        )
    }

    /// Sends TCP data for one second in each direction, with two flows for each queue pair.
    ///
    /// # Errors
    /// When iperf3 fails, or the rate in one direction is 20 Mbit/s or less.
    pub fn move_data_both_ways(&self) -> Result<()> {
        let iperf = self.iperf()?;
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            let load = IperfLoad::tcp(1).flows(2 * self.config.pairs);
            let report = iperf.run(&load, direction)?;
            eprintln!("{direction:?}: {:.2} Gbit/s", report.gbps);
            ensure!(
                report.gbps > 0.02,
                "the rate {direction:?} is too low: {report:?}"
            );
        }
        Ok(())
    }
}
