//! A whole set-up: the host side, the daemon on a TAP, a guest whose card it
//! serves, up and reached.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::accel::Accel;
use crate::daemon::{Daemon, Options};
use crate::diagnostics;
use crate::iperf::{Clients, Direction, Iperf, IperfLoad};
use crate::paths::RunDir;
use crate::qemu::{Machine, Nic, Qemu};
use crate::topology::{HostNetwork, TAP, configure_guest};

/// A guest that takes longer to boot does not boot.
pub const BOOT: Duration = Duration::from_secs(60);

/// What is to be set up.
#[derive(Clone, Debug)]
pub struct TestbedConfig {
    pairs: u16,
    memory_mib: u32,
    persistent_tap: bool,
    qemu_listens: bool,
    reconnect_ms: Option<u32>,
    props: Vec<String>,
    vcpus: Option<u32>,
    max_vcpus: Option<u32>,
    daemon_flags: Vec<(String, String)>,
}

impl TestbedConfig {
    /// As many vCPUs as queue pairs, all of them in use; a TAP that the daemon makes.
    pub fn new(pairs: u16) -> Self {
        Self {
            pairs,
            memory_mib: 512,
            persistent_tap: false,
            qemu_listens: false,
            reconnect_ms: None,
            props: Vec::new(),
            vcpus: None,
            max_vcpus: None,
            daemon_flags: Vec::new(),
        }
    }

    /// Another number of vCPUs than of queue pairs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = Some(vcpus);
        self
    }

    /// Room for so many vCPUs, plugged in later.
    #[must_use]
    pub fn max_vcpus(mut self, vcpus: u32) -> Self {
        self.max_vcpus = Some(vcpus);
        self
    }

    /// A further flag of the daemon, with its value.
    #[must_use]
    pub fn daemon_flag(mut self, flag: &str, value: &str) -> Self {
        self.daemon_flags.push((flag.to_owned(), value.to_owned()));
        self
    }

    /// The guest's memory in MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The TAP is there before the daemon and outlives it, and with it the host side's connections.
    #[must_use]
    pub fn persistent_tap(mut self) -> Self {
        self.persistent_tap = true;
        self
    }

    /// QEMU listens and the daemon connects.
    #[must_use]
    pub fn qemu_listens(mut self) -> Self {
        self.qemu_listens = true;
        self
    }

    /// QEMU looks for a new daemon this often, in milliseconds.
    #[must_use]
    pub fn reconnect_ms(mut self, ms: u32) -> Self {
        self.reconnect_ms = Some(ms);
        self
    }

    /// A further property of the card.
    #[must_use]
    pub fn prop(mut self, prop: &str) -> Self {
        self.props.push(prop.to_owned());
        self
    }

    /// Sets it all up and waits until the guest answers a ping. vCPU i is
    /// pinned to the i-th CPU, round and round.
    ///
    /// # Errors
    /// When a part does not come up: with its words.
    pub fn start(&self) -> Result<Testbed> {
        let dir = RunDir::new()?;
        let network = if self.persistent_tap {
            HostNetwork::with_tap(self.pairs)?
        } else {
            HostNetwork::bare()?
        };
        let daemon = self.start_daemon(&network, &dir)?;
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

    /// Starts a daemon on the TAP; also in the place of one that has ended.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_daemon(&self, network: &HostNetwork, dir: &RunDir) -> Result<Daemon> {
        let mut options = Options::new().netns(network.netns()).flag("--tap", TAP);
        for (flag, value) in &self.daemon_flags {
            options = options.flag(flag, value);
        }
        if self.qemu_listens {
            options = options.client();
        }
        let daemon = options.start(dir, "vnet")?;
        network.configure()?;
        Ok(daemon)
    }

    fn boot(&self, dir: &RunDir, daemon: &Daemon, name: &str) -> Result<Qemu> {
        let mut nic = if self.qemu_listens {
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
        if let Some(max) = self.max_vcpus {
            machine = machine.max_vcpus(max);
        }
        let (qemu, _) = machine
            .vcpus(self.vcpus.unwrap_or(self.pairs.into()))
            .memory_mib(self.memory_mib)
            .accel(Accel::Auto)
            .nic(nic)
            .pinned()
            .boot(dir, name, BOOT)?;
        Ok(qemu)
    }
}

/// A set-up that runs.
#[derive(Debug)]
pub struct Testbed {
    /// The machine.
    pub qemu: Qemu,
    /// The daemon.
    pub daemon: Daemon,
    /// The host side.
    pub network: HostNetwork,
    /// Where sockets and logs are.
    pub dir: RunDir,
    config: TestbedConfig,
}

impl Testbed {
    /// Gives the guest's card its addresses and waits until it answers: after a
    /// boot, or when its driver was loaded anew.
    ///
    /// # Errors
    /// When it does not.
    pub fn configure_guest(&mut self) -> Result<()> {
        configure_guest(self.qemu.guest(), self.config.pairs)?;
        diagnostics::wait_for_ping(&self.network, self.qemu.guest(), Some(&self.daemon))
    }

    /// Boots another machine in the place of the last one, which must have
    /// ended; [`Testbed::configure_guest`] comes next.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_qemu(&mut self, name: &str) -> Result<()> {
        self.qemu = self.config.boot(&self.dir, &self.daemon, name)?;
        Ok(())
    }

    /// iperf3 with clients on the host side, one process for each queue pair.
    ///
    /// # Errors
    /// When a server does not start.
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

    /// Moves data for a second each way, two flows a pair.
    ///
    /// # Errors
    /// When nothing to speak of arrives.
    pub fn move_data_both_ways(&self) -> Result<()> {
        let iperf = self.iperf()?;
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            let load = IperfLoad::tcp(1).flows(2 * self.config.pairs);
            let report = iperf.run(&load, direction)?;
            eprintln!("{direction:?}: {:.2} Gbit/s", report.gbps);
            ensure!(
                report.gbps > 0.02,
                "{direction:?} carried next to nothing: {report:?}"
            );
        }
        Ok(())
    }
}
