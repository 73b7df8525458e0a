//! Two hosts between which a guest is migrated: two QEMUs, each with a back-end of its own, whose
//! TAPs are ports of one bridge, as two hosts on one network have them.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use crate::daemon::{Daemon, Options};
use crate::paths::RunDir;
use crate::qemu::{Machine, Nic, Qemu};
use crate::testbed::BOOT_TIMEOUT;
use crate::topology::{Bridge, GUEST, HOST, configure_guest};

/// The longest time that a migration may take.
pub const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);
/// The names of both hosts' daemons, TAPs and machines.
const HOSTS: [&str; 2] = ["source", "dest"];
/// A bandwidth with which a migration is soon done, in bytes/s.
const FAST: u64 = 1 << 30;

/// The guest's network device.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// The number of queue pairs.
    pub pairs: u16,
    /// Whether its virtqueues are packed.
    pub is_packed: bool,
    /// Whether the guest announces itself; if not, QEMU asks the back-end for that.
    pub announces: bool,
    /// Whether the device is a port of a switch, which reaches the host's bridge by its TAP, and not a
    /// queue of that TAP itself.
    pub on_switch: bool,
}

impl Device {
    /// A device whose guest announces itself.
    #[must_use]
    pub fn new(pairs: u16, is_packed: bool) -> Self {
        Self {
            pairs,
            is_packed,
            announces: true,
            on_switch: false,
        }
    }
}

/// How QEMU migrates the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Method {
    /// Whether several connections carry the guest's memory.
    pub multifd: bool,
    /// Whether QEMU slows the vCPUs down until the guest writes less memory than is carried.
    pub auto_converge: bool,
    /// Whether the guest may continue at the destination before its memory is there.
    pub postcopy: bool,
}

impl Method {
    /// Makes `qemu` use this method. Both ends must.
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub fn apply(self, qemu: &Qemu) -> Result<()> {
        let of = |name: &str, state: bool| json!({"capability": name, "state": state});
        let capabilities = [
            of("multifd", self.multifd),
            of("auto-converge", self.auto_converge),
            of("postcopy-ram", self.postcopy),
        ];
        let arguments = json!({"capabilities": capabilities});
        qemu.qmp("migrate-set-capabilities", &arguments).map(drop)
    }
}

/// Two hosts, each with a back-end.
#[derive(Debug)]
pub struct Hosts {
    /// The daemons of both hosts; none where QEMU itself serves the device.
    daemons: Vec<Daemon>,
    bridge: Bridge,
    dir: RunDir,
    device: Device,
}

impl Hosts {
    /// Creates the network and a daemon for each host.
    ///
    /// # Errors
    /// When this process is not root, or a part cannot be created.
    pub fn new(device: Device) -> Result<Self> {
        let mut hosts = Self::without_daemons(device)?;
        for name in HOSTS {
            let options = Options::new().netns(hosts.bridge.netns());
            let options = options.arg("--postcopy");
            let options = match device.on_switch {
                true => options.flag("--uplink", format!("switch:lan,tap={name}")),
                false => options.flag("--tap", name),
            };
            let daemon = options.start(&hosts.dir, &format!("vnet-{name}"))?;
            hosts.daemons.push(daemon);
        }
        Ok(hosts)
    }

    /// Creates the network only: QEMU serves the device itself.
    ///
    /// # Errors
    /// As for [`Hosts::new`].
    pub fn without_daemons(device: Device) -> Result<Self> {
        let dir = RunDir::new()?;
        // A device may have more queue pairs than the guest uses, so the TAPs of a daemon are
        // multiqueue TAPs.
        let bridge = Bridge::with_taps(&HOSTS, device.pairs.max(2))?;
        let v4 = HOST.v4;
        bridge.netns().ip(&format!("addr add {v4}/24 dev br0"))?;
        Ok(Self {
            daemons: Vec::new(),
            bridge,
            dir,
            device,
        })
    }

    /// The network of both hosts.
    pub fn bridge(&self) -> &Bridge {
        &self.bridge
    }

    /// The directory for the files of a test.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    fn machine(&self, host: usize) -> Machine {
        let on = |is_on| if is_on { "on" } else { "off" };
        let nic = match self.daemons.get(host) {
            Some(daemon) => Nic::vhost_user(daemon.socket()).queues(self.device.pairs),
            // A multiqueue TAP needs a device with several queue pairs.
            None => Nic::tap(HOSTS[host]).queues(self.device.pairs.max(2)),
        };
        let nic = nic
            .prop("mac=52:54:00:77:00:01")
            .prop(&format!("packed={}", on(self.device.is_packed)))
            .prop(&format!("guest_announce={}", on(self.device.announces)));
        let machine = Machine::new()
            .vcpus(self.device.pairs.min(2).into())
            .memory_mib(256)
            .nic(nic);
        match self.daemons.get(host) {
            Some(_) => machine,
            None => machine.netns(self.bridge.netns()),
        }
    }

    /// Boots the guest at the source.
    ///
    /// # Errors
    /// When the guest does not boot or has no network.
    pub fn boot(&self) -> Result<Qemu> {
        let (qemu, _) = self.machine(0).boot(&self.dir, HOSTS[0], BOOT_TIMEOUT)?;
        configure_guest(qemu.guest(), self.device.pairs)?;
        self.wait_for_ping()?;
        Ok(qemu)
    }

    /// Starts a machine at the destination that waits for a guest from `uri`.
    ///
    /// # Errors
    /// When QEMU exits or refuses it.
    pub fn expect_guest(&self, uri: &str) -> Result<Qemu> {
        self.expect_guest_by(uri, Method::default())
    }

    /// Does the same with this method.
    ///
    /// # Errors
    /// When QEMU exits or refuses it.
    pub fn expect_guest_by(&self, uri: &str, method: Method) -> Result<Qemu> {
        let machine = self.machine(1).args(["-incoming", "defer"]);
        let qemu = machine.start(&self.dir, HOSTS[1])?;
        method.apply(&qemu)?;
        qemu.qmp("migrate-incoming", &json!({"uri": uri}))?;
        Ok(qemu)
    }

    /// The URI of a socket for the migration.
    pub fn uri(&self) -> String {
        unix_uri(&self.migration_socket())
    }

    fn migration_socket(&self) -> PathBuf {
        self.dir.join("migration.sock")
    }

    /// Pings the guest until it answers, for at most 30 s.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn wait_for_ping(&self) -> Result<()> {
        let address = GUEST.v4;
        let wait = format!(
            "for i in $(seq 30); do busybox ping -c 1 -W 1 {address} && exit; done; exit 1"
        );
        self.bridge.netns().run("bash", ["-c", &wait]).map(drop)
    }

    /// Checks that no vring of the device of `host` was quarantined, and returns what `of` returns
    /// for each direction of each queue pair, RX and TX.
    fn vrings<T>(&self, host: usize, of: impl Fn(&Value) -> T) -> Result<Vec<[T; 2]>> {
        let device = self.daemons[host].device()?;
        let mut found = Vec::new();
        for pair in device["pairs"].as_array().into_iter().flatten() {
            for direction in ["rx", "tx"] {
                let counters = &pair[direction]["counters"];
                ensure!(counters["quarantines"] == 0, "{pair}");
            }
            found.push(["rx", "tx"].map(|direction| of(&pair[direction])));
        }
        Ok(found)
    }

    /// Checks that no vring of the device of `host` was quarantined, and returns the frames that
    /// it has carried to the guest and from it.
    ///
    /// # Errors
    /// When the daemon does not answer, or a vring was quarantined.
    pub fn frames(&self, host: usize) -> Result<[u64; 2]> {
        let frames = |vring: &Value| vring["counters"]["frames"].as_u64().unwrap_or(0);
        let pairs = self.vrings(host, frames)?;
        let sum = |n: usize| pairs.iter().map(|pair| pair[n]).sum();
        Ok([sum(0), sum(1)])
    }

    /// The sum of a counter of the receiveqs of the device of `host`.
    ///
    /// # Errors
    /// When the daemon does not answer, or a vring was quarantined.
    pub fn rx_counter(&self, host: usize, name: &str) -> Result<u64> {
        let counter = |vring: &Value| vring["counters"][name].as_u64().unwrap_or(0);
        Ok(self.vrings(host, counter)?.iter().map(|[rx, _]| rx).sum())
    }

    /// The number of queue pairs of the device of `host` that are in use.
    ///
    /// # Errors
    /// When the daemon does not answer, or a vring was quarantined.
    pub fn enabled_pairs(&self, host: usize) -> Result<usize> {
        let enabled = |vring: &Value| vring["enabled"] == true && vring["state"] == "running";
        let pairs = self.vrings(host, enabled)?;
        Ok(pairs.into_iter().filter(|pair| *pair == [true; 2]).count())
    }
}

fn unix_uri(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// Sets how fast the memory is carried, in bytes/s, and the longest time for which the guest may stop,
/// in milliseconds.
///
/// # Errors
/// When QEMU refuses it.
pub fn set_speed(qemu: &Qemu, bandwidth: u64, downtime_ms: u64) -> Result<()> {
    let parameters = json!({"max-bandwidth": bandwidth, "downtime-limit": downtime_ms});
    qemu.qmp("migrate-set-parameters", &parameters).map(drop)
}

/// Lets a migration that was slow end soon, and waits until it has.
///
/// # Errors
/// When the migration fails or takes too long.
pub fn finish_migration(qemu: &Qemu) -> Result<Value> {
    set_speed(qemu, FAST, 1000)?;
    wait_for_migration(qemu, "completed")
}

/// Migrates the guest to `uri`, and waits until that is done. Returns what QEMU says about it.
///
/// # Errors
/// When the migration fails or takes too long.
pub fn migrate(qemu: &Qemu, uri: &str) -> Result<Value> {
    set_speed(qemu, FAST, 1000)?;
    qemu.qmp("migrate", &json!({"uri": uri}))?;
    wait_for_migration(qemu, "completed")
}

/// Waits until the migration has this status. Returns what QEMU says about it.
///
/// # Errors
/// When the migration fails or takes too long.
pub fn wait_for_migration(qemu: &Qemu, wanted: &str) -> Result<Value> {
    wait_until(qemu, wanted, |migration| migration["status"] == wanted)
}

/// Waits until what QEMU says about the migration fulfils a condition, which `wanted` describes.
///
/// # Errors
/// When the migration fails or takes too long.
pub fn wait_until(qemu: &Qemu, wanted: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
    let until = Instant::now() + MIGRATION_TIMEOUT;
    loop {
        let migration = qemu.qmp("query-migrate", &Value::Null)?;
        if is_so(&migration) {
            return Ok(migration);
        }
        if migration["status"] == "failed" || Instant::now() > until {
            bail!("the migration is not {wanted}: {migration}");
        }
        sleep(Duration::from_millis(20));
    }
}
