//! Two guests on one network: a switch of virtionetd, or a bridge of the
//! kernel on which QEMU's own cards are.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::accel::Accel;
use crate::daemon::{Daemon, Options};
use crate::guest::Guest;
use crate::iperf::{IperfLoad, IperfReport, between};
use crate::paths::RunDir;
use crate::qemu::{Machine, Nic, Qemu};
use crate::sched;
use crate::testbed::BOOT;
use crate::topology::{Bridge, GUESTS, configure_interface};

/// The names of the guests, of their devices and of their TAPs.
const NAMES: [&str; 2] = ["a", "b"];

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestId {
    /// The first one.
    A,
    /// The second one.
    B,
}

impl GuestId {
    /// The other one.
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

/// What is to be set up.
#[derive(Clone, Debug)]
pub struct TwoGuestConfig {
    pairs: u16,
    memory_mib: u32,
    flags: Vec<String>,
    props: [Vec<String>; 2],
}

impl TwoGuestConfig {
    /// Guests with as many vCPUs as queue pairs, all of them in use, and 256 MiB each.
    pub fn new(pairs: u16) -> Self {
        Self {
            pairs,
            memory_mib: 256,
            flags: Vec::new(),
            props: [Vec::new(), Vec::new()],
        }
    }

    /// A flag and its value for both devices of the daemon, such as `placement` and `none`.
    #[must_use]
    pub fn device(mut self, key: &str, value: &str) -> Self {
        self.flags.push(format!(",{key}={value}"));
        self
    }

    /// A further property of one guest's card.
    #[must_use]
    pub fn prop(mut self, which: GuestId, prop: &str) -> Self {
        self.props[which.index()].push(prop.to_owned());
        self
    }

    /// Sets it up on a switch of virtionetd, up to the guests' first ping.
    ///
    /// # Errors
    /// When a part does not come up: with its words.
    pub fn on_switch(&self) -> Result<TwoGuestTestbed> {
        let dir = RunDir::new()?;
        let socket = |name: &str| dir.join(&format!("{name}.sock"));
        let more = self.flags.concat();
        let options = NAMES.iter().fold(Options::new().no_socket(), |o, name| {
            let path = socket(name);
            let device = format!(
                "name={name},socket-path={},uplink=switch:s{more}",
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

    /// Sets it up with QEMU's own cards (vhost=off) on TAPs of a bridge, up to
    /// the guests' first ping.
    ///
    /// # Errors
    /// When a part does not come up: with its words.
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

    /// Both boot at once. All vCPUs of guest n are on the n-th CPU, round and round.
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
            // QEMU gives each guest's first card the same address.
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
        let mut up = Vec::new();
        for (qemu, machine, name) in started {
            up.push(machine.booted(qemu, dir, &name, BOOT)?.0);
        }
        let up = <[Qemu; 2]>::try_from(up);
        up.ok().context("there are two guests")
    }

    fn wait_until_reachable(&self, testbed: TwoGuestTestbed) -> Result<TwoGuestTestbed> {
        for (qemu, addresses) in testbed.guests.iter().zip(GUESTS) {
            configure_interface(qemu.guest(), addresses, self.pairs)?;
        }
        testbed.wait_for_ping()?;
        Ok(testbed)
    }
}

/// What is between the guests.
#[derive(Debug)]
enum Interconnect {
    Switch(Daemon),
    /// Only to be there.
    Bridge(#[expect(dead_code, reason = "dropped with the guests")] Bridge),
}

/// Two guests that reach each other. QEMU goes first, the network last.
#[derive(Debug)]
pub struct TwoGuestTestbed {
    guests: [Qemu; 2],
    interconnect: Interconnect,
    _dir: RunDir,
}

impl TwoGuestTestbed {
    /// A machine.
    pub fn qemu(&self, which: GuestId) -> &Qemu {
        &self.guests[which.index()]
    }

    /// Its shell.
    pub fn guest(&self, which: GuestId) -> &Guest {
        self.qemu(which).guest()
    }

    /// The daemon, where there is one.
    pub fn daemon(&self) -> Option<&Daemon> {
        match &self.interconnect {
            Interconnect::Switch(daemon) => Some(daemon),
            Interconnect::Bridge(_) => None,
        }
    }

    /// Pings the second guest from the first until an answer comes, 30 s at most.
    ///
    /// # Errors
    /// When none comes.
    pub fn wait_for_ping(&self) -> Result<()> {
        let address = GUESTS[1].v4;
        let wait = format!("for i in $(seq 30); do ping -c 1 -W 1 {address} && exit; done; exit 1");
        let answered = self.guest(GuestId::A).ok(&wait);
        answered
            .context("one guest does not reach the other")
            .map(drop)
    }

    /// Lets both guests run on, or stand still so that they take no CPU.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn set_running(&self, running: bool) -> Result<()> {
        let command = if running { "cont" } else { "stop" };
        for qemu in &self.guests {
            qemu.qmp(command, &Value::Null)?;
        }
        Ok(())
    }

    /// iperf3 from one guest to the other, so many processes at each end.
    ///
    /// # Errors
    /// When a server does not start or a client fails: with its words.
    pub fn iperf(&self, from: GuestId, load: &IperfLoad, processes: u16) -> Result<IperfReport> {
        let to = from.other();
        let guests = (self.guest(from), self.guest(to));
        between(guests, GUESTS[to.index()], load, processes)
    }

    /// All counters of a guest's rings of one direction (`rx`, `tx`), summed
    /// over its pairs; none without a daemon.
    ///
    /// # Errors
    /// When the daemon does not answer as documented.
    pub fn counters(&self, which: GuestId, direction: &str) -> Result<BTreeMap<String, u64>> {
        match self.daemon() {
            Some(daemon) => Ok(sums(&daemon.get("/v1/devices")?, which, direction)?),
            None => Ok(BTreeMap::new()),
        }
    }
}

/// The counters in what `GET /v1/devices` gave, as [`TwoGuestTestbed::counters`].
///
/// # Errors
/// When it has another shape than documented.
pub fn sums(devices: &Value, which: GuestId, direction: &str) -> Result<BTreeMap<String, u64>> {
    let device = &devices["devices"][which.index()];
    let name = NAMES[which.index()];
    ensure!(device["name"] == name, "no device {name} in {devices}");
    let mut sums = BTreeMap::new();
    for pair in device["pairs"].as_array().into_iter().flatten() {
        let counters = pair[direction]["counters"].as_object();
        for (name, value) in counters.with_context(|| format!("no counters in {pair}"))? {
            let value = value.as_u64().context("a counter that is no number")?;
            *sums.entry(name.clone()).or_default() += value;
        }
    }
    Ok(sums)
}
