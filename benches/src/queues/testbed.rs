//! The two guests of this group, which differ in where their threads stand, and what they cost.

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
use virtionet_tests::topology::{CARD, HostNetwork, TAP, configure_guest};

/// Of each guest.
pub const VCPUS: u16 = 4;
const BOOT: Duration = Duration::from_secs(120);
const SWITCH: Duration = Duration::from_secs(10);

/// Where a guest's vCPUs and its workers stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuPlacement {
    /// vCPU i on CPU i mod n, the workers where `placement=auto` puts them.
    Pinned,
    /// All of them where the kernel likes, with `placement=none`.
    Floating,
}

impl VcpuPlacement {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Pinned, Self::Floating];

    /// In a table.
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

/// A guest, its card and its network, stopped except while it is measured. QEMU goes first, the
/// network last.
#[derive(Debug)]
pub struct GuestTestbed {
    qemu: Qemu,
    daemon: Daemon,
    network: HostNetwork,
    dir: RunDir,
}

impl GuestTestbed {
    /// Boots a guest with `pairs` queue pairs and stops it again.
    ///
    /// # Errors
    /// When this process is not root, or a part does not come up: with its words.
    pub fn boot(vcpu_placement: VcpuPlacement, pairs: u16) -> Result<Self> {
        let dir = RunDir::new()?;
        let network = HostNetwork::bare()?;
        let daemon = Options::new()
            .netns(network.netns())
            .flag("--tap", TAP)
            .flag("--placement", vcpu_placement.placement())
            .start(&dir, "vnet")?;
        network.configure()?;
        let nic = Nic::vhost_user(daemon.socket()).queues(pairs);
        let mut machine = Machine::new()
            .vcpus(VCPUS.into())
            .accel(Accel::Auto)
            .nic(nic);
        if vcpu_placement == VcpuPlacement::Pinned {
            machine = machine.pinned();
        }
        let (qemu, _) = machine.boot(&dir, "guest", BOOT)?;
        configure_guest(qemu.guest(), pairs)?;
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

    /// Runs `work` while the guest runs, with `pairs` of its queue pairs in use.
    ///
    /// # Errors
    /// When the guest does not answer, or as `work`.
    pub fn run_resumed<T>(&self, pairs: u16, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.qmp("cont")?;
        self.use_pairs(pairs)?;
        diagnostics::wait_for_ping(&self.network, self.qemu.guest(), Some(&self.daemon))?;
        let done = work();
        self.qmp("stop")?;
        done
    }

    fn use_pairs(&self, pairs: u16) -> Result<()> {
        if self.enabled()? == usize::from(pairs) {
            return Ok(());
        }
        let command = format!("ethtool -L {CARD} combined {pairs}");
        self.qemu.guest().ok(&command)?;
        let until = Instant::now() + SWITCH;
        while self.enabled()? != usize::from(pairs) {
            ensure!(
                Instant::now() < until,
                "'{command}' in the guest has not reached the card after {SWITCH:?}"
            );
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn enabled(&self) -> Result<usize> {
        let pairs = counters::pairs(&self.daemon.device()?)?;
        Ok(pairs.iter().filter(|pair| pair.tx.enabled).count())
    }

    fn qmp(&self, command: &str) -> Result<()> {
        self.qemu.qmp(command, &Value::Null).map(drop)
    }

    /// The machine.
    #[must_use]
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// The host's side.
    #[must_use]
    pub fn network(&self) -> &HostNetwork {
        &self.network
    }

    /// For sockets and logs.
    #[must_use]
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// What it has cost and done so far.
    ///
    /// # Errors
    /// When a process is gone.
    pub fn usage(&self) -> Result<ResourceUsage> {
        let device = self.daemon.device()?;
        let sum = |ring: &str, counter: &str| -> Result<f64> {
            let pairs = device["pairs"]
                .as_array()
                .context("a device without pairs")?;
            let values = pairs.iter().map(|pair| &pair[ring]["counters"][counter]);
            let values = values.map(|value| value.as_f64().context("a counter is missing"));
            values.sum()
        };
        let ring = |name: &str| -> Result<RingUsage> {
            Ok(RingUsage {
                frames: sum(name, "frames")?,
                bursts: sum(name, "bursts")?,
                kicks: sum(name, "kicks")?,
                calls: sum(name, "calls")?,
            })
        };
        Ok(ResourceUsage {
            at: Instant::now(),
            workers: seconds(self.daemon.pid())?,
            qemu: seconds(self.qemu.pid())?,
            rx: ring("rx")?,
            tx: ring("tx")?,
        })
    }
}

/// CPU time of the threads that `pid` has: in a short run, clock ticks would be too coarse.
fn seconds(pid: u32) -> Result<f64> {
    let mut sum = 0.0;
    for (tid, _) in sched::threads(pid)? {
        // One that ended in between has no more to tell.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")) else {
            continue;
        };
        let time_ns = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
        sum += time_ns.with_context(|| format!("thread {tid} has no CPU time in {text:?}"))? / 1e9;
    }
    Ok(sum)
}

/// What a guest and its card have cost and done, up to a moment or in between.
#[derive(Debug, Clone, Copy)]
pub struct ResourceUsage {
    at: Instant,
    /// CPU seconds of virtionetd.
    pub workers: f64,
    /// CPU seconds of QEMU: vCPUs and all else.
    pub qemu: f64,
    /// To the guest.
    pub rx: RingUsage,
    /// From the guest.
    pub tx: RingUsage,
}

/// The part of one direction's rings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RingUsage {
    /// Frames carried.
    pub frames: f64,
    /// Bursts in which they were carried.
    pub bursts: f64,
    /// Times the guest told of more.
    pub kicks: f64,
    /// Interrupts that the guest got.
    pub calls: f64,
}

impl ResourceUsage {
    /// What came since `before`, and in how many seconds.
    #[must_use]
    pub fn since(&self, before: &Self) -> (Self, f64) {
        let came = Self {
            at: self.at,
            workers: self.workers - before.workers,
            qemu: self.qemu - before.qemu,
            rx: self.rx.since(&before.rx),
            tx: self.tx.since(&before.tx),
        };
        (came, self.at.duration_since(before.at).as_secs_f64())
    }
}

impl RingUsage {
    fn since(&self, before: &Self) -> Self {
        Self {
            frames: self.frames - before.frames,
            bursts: self.bursts - before.bursts,
            kicks: self.kicks - before.kicks,
            calls: self.calls - before.calls,
        }
    }

    /// Frames a burst; 0 where there was none.
    #[must_use]
    pub fn frames_per_burst(&self) -> f64 {
        self.frames / self.bursts.max(1.0)
    }
}
