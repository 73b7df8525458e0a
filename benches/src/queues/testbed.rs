//! The two guests of this group, which differ in the placement of their threads, and the resources
//! that they use.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtionet_tests::accel::Accel;
use virtionet_tests::counters;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::diagnostics;
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic, Qemu};
use virtionet_tests::sched;
use virtionet_tests::topology::{GUEST_INTERFACE, HostNetwork, TAP, configure_guest};

/// Number of vCPUs of each guest.
pub const VCPUS: u16 = 4;
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
const SWITCH_TIMEOUT: Duration = Duration::from_secs(10);

/// The placement of a guest's vCPUs and of the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuPlacement {
    /// vCPU i is pinned to CPU i mod n. The workers have `placement=auto`.
    Pinned,
    /// The kernel places the vCPUs and the workers, which have `placement=none`.
    Floating,
}

impl VcpuPlacement {
    /// Both placements.
    pub const ALL: [Self; 2] = [Self::Pinned, Self::Floating];

    /// Returns the name in a table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pinned => "pinned",
            Self::Floating => "floating",
        }
    }

    fn placement(self) -> &'static str {
        match self {
            Self::Pinned => "auto",
            Self::Floating => "none",
        }
    }
}

/// A guest, its back-end and its network. They are dropped in this order: QEMU first, the network
/// last. The guest is stopped except while it is measured.
#[derive(Debug)]
pub struct GuestTestbed {
    qemu: Qemu,
    daemon: Daemon,
    network: HostNetwork,
    dir: RunDir,
}

impl GuestTestbed {
    /// Boots a guest with `queue_pairs` queue pairs and stops it again.
    ///
    /// # Errors
    /// When this process is not root, or a part of the testbed fails. The error contains its
    /// message.
    pub fn boot(vcpu_placement: VcpuPlacement, queue_pairs: u16) -> Result<Self> {
        let dir = RunDir::new()?;
        let network = HostNetwork::bare()?;
        let daemon = Options::new()
            .netns(network.netns())
            .flag("--tap", TAP)
            .flag("--placement", vcpu_placement.placement())
            .start(&dir, "vnet")?;
        network.configure()?;
        let nic = Nic::vhost_user(daemon.socket()).queues(queue_pairs);
        let mut machine = Machine::new()
            .vcpus(VCPUS.into())
            .accel(Accel::Auto)
            .nic(nic);
        if vcpu_placement == VcpuPlacement::Pinned {
            machine = machine.pinned();
        }
        let (qemu, _) = machine.boot(&dir, "guest", BOOT_TIMEOUT)?;
        configure_guest(qemu.guest(), queue_pairs)?;
        diagnostics::wait_for_ping(&network, qemu.guest(), Some(&daemon))?;
        let testbed = Self {
            qemu,
            daemon,
            network,
            dir,
        };
        testbed.qmp("stop")?;
        Ok(testbed)
    }

    /// Runs `work` while the guest runs and uses `queue_pairs` queue pairs.
    ///
    /// # Errors
    /// When the guest does not answer, or `work` fails.
    pub fn run_resumed<T>(&self, queue_pairs: u16, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.qmp("cont")?;
        self.set_queue_pairs(queue_pairs)?;
        diagnostics::wait_for_ping(&self.network, self.qemu.guest(), Some(&self.daemon))?;
        let result = work();
        self.qmp("stop")?;
        result
    }

    fn set_queue_pairs(&self, queue_pairs: u16) -> Result<()> {
        if self.enabled_queue_pairs()? == usize::from(queue_pairs) {
            return Ok(());
        }
        let command = format!("ethtool -L {GUEST_INTERFACE} combined {queue_pairs}");
        self.qemu.guest().ok(&command)?;
        let deadline = Instant::now() + SWITCH_TIMEOUT;
        while self.enabled_queue_pairs()? != usize::from(queue_pairs) {
            ensure!(
                Instant::now() < deadline,
                "'{command}' in the guest has not changed the enabled queue pairs after {SWITCH_TIMEOUT:?}"
            );
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn enabled_queue_pairs(&self) -> Result<usize> {
        let pairs = counters::pairs(&self.daemon.device()?)?;
        Ok(pairs.iter().filter(|pair| pair.tx.enabled).count())
    }

    fn qmp(&self, command: &str) -> Result<()> {
        self.qemu.qmp(command, &Value::Null).map(drop)
    }

    /// The virtual machine.
    #[must_use]
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// The network namespace of the host side.
    #[must_use]
    pub fn network(&self) -> &HostNetwork {
        &self.network
    }

    /// The directory of the sockets and logs.
    #[must_use]
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// Returns the resources that the guest and its back-end have used so far, and the counters of
    /// the vrings.
    ///
    /// # Errors
    /// When a process has ended.
    pub fn usage(&self) -> Result<ResourceUsage> {
        let device = self.daemon.device()?;
        let sum = |vring: &str, counter: &str| -> Result<f64> {
            let pairs = device["pairs"]
                .as_array()
                .context("the device has no queue pairs")?;
            let values = pairs.iter().map(|pair| &pair[vring]["counters"][counter]);
            let values = values.map(|value| value.as_f64().context("a counter is missing"));
            values.sum()
        };
        let vrings = |name: &str| -> Result<VringUsage> {
            Ok(VringUsage {
                frames: sum(name, "frames")?,
                bursts: sum(name, "bursts")?,
                kicks: sum(name, "kicks")?,
                calls: sum(name, "calls")?,
            })
        };
        Ok(ResourceUsage {
            at: Instant::now(),
            workers: cpu_seconds(self.daemon.pid())?,
            qemu: cpu_seconds(self.qemu.pid())?,
            rx: vrings("rx")?,
            tx: vrings("tx")?,
        })
    }
}

/// Returns the CPU time of the threads of process `pid`. It is read in nanoseconds, because clock
/// ticks are too coarse for a short run.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let mut sum = 0.0;
    for (tid, _) in sched::threads(pid)? {
        // The thread may have ended since the list was read.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")) else {
            continue;
        };
        let time_ns = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
        sum += time_ns.with_context(|| format!("thread {tid} has no CPU time in {text:?}"))? / 1e9;
    }
    Ok(sum)
}

/// CPU time and counters of a guest and its back-end, since their start or over an interval.
#[derive(Debug, Clone, Copy)]
pub struct ResourceUsage {
    at: Instant,
    /// CPU seconds of virtionetd.
    pub workers: f64,
    /// CPU seconds of QEMU, including the vCPUs.
    pub qemu: f64,
    /// Counters of the receiveqs.
    pub rx: VringUsage,
    /// Counters of the transmitqs.
    pub tx: VringUsage,
}

/// The sums of the counters of the vrings of one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VringUsage {
    /// Frames.
    pub frames: f64,
    /// Bursts of frames.
    pub bursts: f64,
    /// Kicks of the driver.
    pub kicks: f64,
    /// Calls to the driver.
    pub calls: f64,
}

impl ResourceUsage {
    /// Returns the difference to `before`, and the seconds in between.
    #[must_use]
    pub fn since(&self, before: &Self) -> (Self, f64) {
        let difference = Self {
            at: self.at,
            workers: self.workers - before.workers,
            qemu: self.qemu - before.qemu,
            rx: self.rx.since(&before.rx),
            tx: self.tx.since(&before.tx),
        };
        (difference, self.at.duration_since(before.at).as_secs_f64())
    }
}

impl VringUsage {
    fn since(&self, before: &Self) -> Self {
        Self {
            frames: self.frames - before.frames,
            bursts: self.bursts - before.bursts,
            kicks: self.kicks - before.kicks,
            calls: self.calls - before.calls,
        }
    }

    /// Frames per burst, or 0 if there was no burst.
    #[must_use]
    pub fn frames_per_burst(&self) -> f64 {
        self.frames / self.bursts.max(1.0)
    }
}
