//! Two guests on one network, which is a switch of virtionetd, or a kernel bridge whose TAPs QEMU's
//! own virtio-net uses.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::accel::Accel;
use crate::daemon::{Daemon, Options};
use crate::guest::Guest;
use crate::iperf::{IperfLoad, IperfReport, run_between_guests};
use crate::paths::RunDir;
use crate::qemu::{Machine, Nic, Qemu};
use crate::sched;
use crate::testbed::BOOT_TIMEOUT;
use crate::topology::{Bridge, GUESTS, configure_interface};

/// The names of the guests, of the daemon's devices and of the TAPs.
const NAMES: [&str; 2] = ["a", "b"];

/// One of the two guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestId {
    /// The first guest.
    A,
    /// The second guest.
    B,
}

impl GuestId {
    /// Returns the other guest.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// The configuration of a testbed with two guests.
#[derive(Clone, Debug)]
pub struct TwoGuestConfig {
    pairs: u16,
    memory_mib: u32,
    flags: Vec<String>,
    workers: Option<String>,
    props: [Vec<String>; 2],
}

impl TwoGuestConfig {
    /// Configures guests with 256 MiB each and as many vCPUs as queue pairs, which use all pairs.
    pub fn new(pairs: u16) -> Self {
        Self {
            pairs,
            memory_mib: 256,
            flags: Vec::new(),
            workers: None,
            props: [Vec::new(), Vec::new()],
        }
    }

    /// Adds a key and its value to `--device` of both devices, such as `placement` and `none`.
    #[must_use]
    pub fn device(mut self, key: &str, value: &str) -> Self {
        self.flags.push(format!(",{key}={value}"));
        self
    }

    /// Sets the daemon's `--workers`.
    #[must_use]
    pub fn workers(mut self, value: &str) -> Self {
        self.workers = Some(value.to_owned());
        self
    }

    /// Adds a property of one guest's network device.
    #[must_use]
    pub fn prop(mut self, which: GuestId, prop: &str) -> Self {
        self.props[which.index()].push(prop.to_owned());
        self
    }

    /// Starts the testbed with a switch of virtionetd, and waits until the first guest can ping the
    /// second.
    ///
    /// # Errors
    /// When a part of the testbed does not start. The error contains its output.
    pub fn on_switch(&self) -> Result<TwoGuestTestbed> {
        let dir = RunDir::new()?;
        let socket = |name: &str| dir.join(&format!("{name}.sock"));
        let flags = self.flags.concat();
        let options = match &self.workers {
            Some(workers) => Options::new().flag("--workers", workers),
            None => Options::new(),
        };
        let options = NAMES.iter().fold(options.no_socket(), |o, name| {
            let path = socket(name);
            let device = format!(
                "name={name},socket-path={},uplink=switch:s{flags}",
                path.display()
            );
            o.flag("--device", device)
        });
        let daemon = options.start(&dir, "switch")?;
        let nics = NAMES.map(|name| Nic::vhost_user(&socket(name)));
        let guests = self.boot(&dir, "switched", Machine::new(), nics)?;
        self.wait_until_reachable(TwoGuestTestbed {
            guests,
            interconnect: Interconnect::Switch(daemon),
            _dir: dir,
        })
    }

    /// Starts the testbed with QEMU's own virtio-net (vhost=off) on the TAPs of a bridge, and waits
    /// until the first guest can ping the second.
    ///
    /// # Errors
    /// When a part of the testbed does not start. The error contains its output.
    pub fn on_bridge(&self) -> Result<TwoGuestTestbed> {
        let dir = RunDir::new()?;
        let bridge = Bridge::with_taps(&NAMES, self.pairs)?;
        let machine = Machine::new().netns(bridge.netns());
        let guests = self.boot(&dir, "bridged", machine, NAMES.map(Nic::tap))?;
        self.wait_until_reachable(TwoGuestTestbed {
            guests,
            interconnect: Interconnect::Bridge(bridge),
            _dir: dir,
        })
    }

    /// Boots both guests at the same time. Pins all vCPUs of guest n to the n-th CPU, modulo the
    /// number of CPUs.
    fn boot(
        &self,
        dir: &RunDir,
        name: &str,
        machine: Machine,
        nics: [Nic; 2],
    ) -> Result<[Qemu; 2]> {
        let cpus = sched::allowed_cpus()?;
        let mut started = Vec::new();
        for (n, (nic, cpu)) in nics.into_iter().zip(cpus.iter().cycle()).enumerate() {
            // By default, QEMU gives the first network device of every guest the same MAC address.
            let mac = format!("mac=52:54:00:77:00:{n:02x}");
            let props = self.props[n].iter();
            let nic = props.fold(nic.queues(self.pairs).prop(&mac), |nic, p| nic.prop(p));
            let name = format!("{name}-{}", NAMES[n]);
            let machine = machine
                .clone()
                .vcpus(self.pairs.into())
                .memory_mib(self.memory_mib)
                .accel(Accel::Auto)
                .pinned_to(&[*cpu])
                .nic(nic);
            started.push((machine.start(dir, &name)?, machine, name));
        }
        let mut booted = Vec::new();
        for (qemu, machine, name) in started {
            let (qemu, _) = machine.wait_boot_or_restart(qemu, dir, &name, BOOT_TIMEOUT)?;
            booted.push(qemu);
        }
        let booted = <[Qemu; 2]>::try_from(booted);
        booted.ok().context("the number of guests is not 2")
    }

    fn wait_until_reachable(&self, testbed: TwoGuestTestbed) -> Result<TwoGuestTestbed> {
        for (qemu, addresses) in testbed.guests.iter().zip(GUESTS) {
            configure_interface(qemu.guest(), addresses, self.pairs)?;
        }
        testbed.wait_for_ping()?;
        Ok(testbed)
    }
}

/// The network between the guests.
#[derive(Debug)]
enum Interconnect {
    Switch(Daemon),
    Bridge(#[expect(dead_code, reason = "dropped with the guests")] Bridge),
}

/// Two running guests that can reach each other. Dropping this value stops QEMU before the network.
#[derive(Debug)]
pub struct TwoGuestTestbed {
    guests: [Qemu; 2],
    interconnect: Interconnect,
    _dir: RunDir,
}

impl TwoGuestTestbed {
    /// The machine of a guest.
    pub fn qemu(&self, which: GuestId) -> &Qemu {
        &self.guests[which.index()]
    }

    /// The shell of a guest.
    pub fn guest(&self, which: GuestId) -> &Guest {
        self.qemu(which).guest()
    }

    /// The daemon, if the guests are on a switch.
    pub fn daemon(&self) -> Option<&Daemon> {
        match &self.interconnect {
            Interconnect::Switch(daemon) => Some(daemon),
            Interconnect::Bridge(_) => None,
        }
    }

    /// Pings the second guest from the first until an answer arrives, for at most 30 s.
    ///
    /// # Errors
    /// When no answer arrives.
    pub fn wait_for_ping(&self) -> Result<()> {
        let address = GUESTS[1].v4;
        let wait = format!("for i in $(seq 30); do ping -c 1 -W 1 {address} && exit; done; exit 1");
        let pinged = self.guest(GuestId::A).ok(&wait);
        pinged
            .context("the first guest cannot ping the second")
            .map(drop)
    }

    /// Starts or stops the vCPUs of both guests. Stopped vCPUs use no CPU time.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn set_running(&self, should_run: bool) -> Result<()> {
        let command = if should_run { "cont" } else { "stop" };
        for qemu in &self.guests {
            qemu.qmp(command, &Value::Null)?;
        }
        Ok(())
    }

    /// Runs `load` from guest `from` to the other guest, with `processes` iperf3 processes at each
    /// end.
    ///
    /// # Errors
    /// When a server does not start or a client fails. The error contains its message.
    pub fn iperf(&self, from: GuestId, load: &IperfLoad, processes: u16) -> Result<IperfReport> {
        let to = from.other();
        let guests = (self.guest(from), self.guest(to));
        run_between_guests(guests, GUESTS[to.index()], load, processes)
    }

    /// Returns all counters of a guest's vrings of one direction (`rx` or `tx`), summed over its
    /// queue pairs. The map is empty if the guests are on a bridge.
    ///
    /// # Errors
    /// When the daemon's response does not have the documented format.
    pub fn counters(&self, which: GuestId, direction: &str) -> Result<BTreeMap<String, u64>> {
        match self.daemon() {
            Some(daemon) => sum_counters(&daemon.get("/v1/devices")?, which, direction),
            None => Ok(BTreeMap::new()),
        }
    }

    /// Returns the name of the worker of each queue pair of a guest. The list is empty if the guests
    /// are on a bridge.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn workers(&self, which: GuestId) -> Result<Vec<String>> {
        let Some(daemon) = self.daemon() else {
            return Ok(Vec::new());
        };
        let pairs = daemon.get("/v1/devices")?["devices"][which.index()]["pairs"].take();
        let pairs = pairs.as_array().into_iter().flatten();
        let names = pairs.map(|pair| pair["worker"].as_str().unwrap_or_default().to_owned());
        Ok(names.collect())
    }
}

/// Sums the counters in `devices`, the response to `GET /v1/devices`, as
/// [`TwoGuestTestbed::counters`] does.
///
/// # Errors
/// When the response does not have the documented format.
pub fn sum_counters(
    devices: &Value,
    which: GuestId,
    direction: &str,
) -> Result<BTreeMap<String, u64>> {
    let device = &devices["devices"][which.index()];
    let name = NAMES[which.index()];
    ensure!(
        device["name"] == name,
        "the response contains no device {name}: {devices}"
    );
    let mut sums = BTreeMap::new();
    for pair in device["pairs"].as_array().into_iter().flatten() {
        let counters = pair[direction]["counters"].as_object();
        for (name, value) in
            counters.with_context(|| format!("this queue pair has no counters: {pair}"))?
        {
            let value = value
                .as_u64()
                .with_context(|| format!("the counter {name} is not a number: {value}"))?;
            *sums.entry(name.clone()).or_default() += value;
        }
    }
    Ok(sums)
}
