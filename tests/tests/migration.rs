//! Live migration between two QEMUs, each with a virtionetd of its own, whose TAPs are ports of one
//! bridge, as two hosts on one network have them. TCP connections to the guest go on meanwhile, and
//! each of their bytes is checked.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::echo_stream::EchoStreams;
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic, Qemu};
use virtionet_tests::testbed::BOOT_TIMEOUT;
use virtionet_tests::topology::{Bridge, GUEST, HOST, configure_guest};

const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(40);
/// What each connection carries between two steps of a test.
const PROGRESS: u64 = 1 << 20;
/// The names of both hosts' daemons, TAPs and machines.
const HOSTS: [&str; 2] = ["source", "dest"];

/// The guest's network device.
#[derive(Clone, Copy, Debug)]
struct Device {
    pairs: u16,
    is_packed: bool,
    /// Whether the guest announces itself; if not, QEMU asks the back-end for that.
    announces: bool,
}

/// Two hosts, each with a daemon.
struct Hosts {
    daemons: [Daemon; 2],
    bridge: Bridge,
    dir: RunDir,
    device: Device,
}

impl Hosts {
    fn new(device: Device) -> Result<Self> {
        let dir = RunDir::new()?;
        // A device may have more queue pairs than the guest uses, so the TAPs are multiqueue TAPs.
        let bridge = Bridge::with_taps(&HOSTS, device.pairs.max(2))?;
        let v4 = HOST.v4;
        bridge.netns().ip(&format!("addr add {v4}/24 dev br0"))?;
        let start = |name| {
            let options = Options::new().netns(bridge.netns()).flag("--tap", name);
            options.start(&dir, &format!("vnet-{name}"))
        };
        Ok(Self {
            daemons: [start(HOSTS[0])?, start(HOSTS[1])?],
            bridge,
            dir,
            device,
        })
    }

    fn machine(&self, host: usize) -> Machine {
        let on = |is_on| if is_on { "on" } else { "off" };
        let nic = Nic::vhost_user(self.daemons[host].socket())
            .queues(self.device.pairs)
            .prop("mac=52:54:00:77:00:01")
            .prop(&format!("packed={}", on(self.device.is_packed)))
            .prop(&format!("guest_announce={}", on(self.device.announces)));
        Machine::new()
            .vcpus(self.device.pairs.min(2).into())
            .memory_mib(256)
            .nic(nic)
    }

    /// Boots the guest at the source.
    fn boot(&self) -> Result<Qemu> {
        let (qemu, _) = self.machine(0).boot(&self.dir, HOSTS[0], BOOT_TIMEOUT)?;
        configure_guest(qemu.guest(), self.device.pairs)?;
        self.wait_for_ping()?;
        Ok(qemu)
    }

    /// Boots the guest at the source, and connects to it.
    fn boot_and_connect(&self) -> Result<(Qemu, EchoStreams)> {
        let qemu = self.boot()?;
        let pairs = self.device.pairs;
        let echo = EchoStreams::start(self.bridge.netns(), qemu.guest(), GUEST.v4, pairs)?;
        echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
        Ok((qemu, echo))
    }

    /// Starts a machine at the destination that waits for a guest from `uri`.
    fn expect_guest(&self, uri: &str) -> Result<Qemu> {
        let machine = self.machine(1).args(["-incoming", uri]);
        let qemu = machine.start(&self.dir, HOSTS[1])?;
        // It answers when it listens.
        qemu.qmp("query-status", &Value::Null)?;
        Ok(qemu)
    }

    fn migration_socket(&self) -> PathBuf {
        self.dir.join("migration.sock")
    }

    fn wait_for_ping(&self) -> Result<()> {
        let address = GUEST.v4;
        let wait = format!(
            "for i in $(seq 30); do busybox ping -c 1 -W 1 {address} && exit; done; exit 1"
        );
        self.bridge.netns().run("bash", ["-c", &wait]).map(drop)
    }

    /// Checks that no vring of either device was quarantined, and returns the frames that the
    /// device of `host` has carried to the guest and from it.
    fn frames(&self, host: usize) -> Result<[u64; 2]> {
        let device = self.daemons[host].device()?;
        let mut frames = [0; 2];
        for pair in device["pairs"].as_array().into_iter().flatten() {
            for (sum, direction) in frames.iter_mut().zip(["rx", "tx"]) {
                let counters = &pair[direction]["counters"];
                ensure!(counters["quarantines"] == 0, "{pair}");
                *sum += counters["frames"].as_u64().unwrap_or(0);
            }
        }
        Ok(frames)
    }
}

fn unix_uri(path: &Path) -> String {
    format!("unix:{}", path.display())
}

fn set_bandwidth(qemu: &Qemu, bytes: u64) -> Result<()> {
    let parameters = json!({"max-bandwidth": bytes, "downtime-limit": 1000});
    qemu.qmp("migrate-set-parameters", &parameters).map(drop)
}

/// Migrates the guest to `uri`, and waits until that is done.
fn migrate(qemu: &Qemu, uri: &str) -> Result<()> {
    set_bandwidth(qemu, 1 << 30)?;
    qemu.qmp("migrate", &json!({"uri": uri}))?;
    wait_for_migration(qemu, "completed")
}

/// Waits until the migration has this status.
fn wait_for_migration(qemu: &Qemu, wanted: &str) -> Result<()> {
    let until = Instant::now() + MIGRATION_TIMEOUT;
    loop {
        let migration = qemu.qmp("query-migrate", &Value::Null)?;
        let status = migration["status"].as_str().unwrap_or_default();
        if status == wanted {
            return Ok(());
        }
        if status == "failed" || Instant::now() > until {
            bail!("the migration is not {wanted}: {migration}");
        }
        sleep(Duration::from_millis(20));
    }
}

/// Migrates a guest whose connections go on.
fn check_migration(device: Device) -> Result<()> {
    let hosts = Hosts::new(device)?;
    let (source, echo) = hosts.boot_and_connect()?;
    let uri = unix_uri(&hosts.migration_socket());
    let dest = hosts.expect_guest(&uri)?;
    let started_at = Instant::now();
    migrate(&source, &uri)?;
    eprintln!("{device:?}: migrated in {:?}", started_at.elapsed());
    let at_source = hosts.frames(0)?;
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    // The source no longer has the guest.
    assert_eq!(hosts.frames(0)?, at_source);
    drop(source);
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    let [rx, tx] = hosts.frames(1)?;
    assert!(rx > 50 && tx > 50, "{rx} {tx}");
    assert_eq!(dest.guest().ok("echo moved")?.trim(), "moved");
    eprintln!("{} bytes came back", echo.finish()?);
    Ok(())
}

fn device(pairs: u16, is_packed: bool) -> Device {
    Device {
        pairs,
        is_packed,
        announces: true,
    }
}

#[test]
fn guest_with_a_split_ring_keeps_its_connections_over_a_migration() {
    check_migration(device(1, false)).unwrap();
}

#[test]
fn guest_with_four_packed_queue_pairs_keeps_its_connections_over_a_migration() {
    check_migration(device(4, true)).unwrap();
}

/// The other combinations of format and queue pairs, several times each with `MIGRATIONS=N`.
#[test]
fn guests_of_all_formats_keep_their_connections_over_migrations_if_asked_for() {
    let runs = std::env::var("MIGRATIONS").ok();
    for _ in 0..runs.and_then(|n| n.parse().ok()).unwrap_or(0) {
        for pairs in [1, 4] {
            for is_packed in [false, true] {
                check_migration(device(pairs, is_packed)).unwrap();
            }
        }
    }
}

#[test]
fn silent_guest_that_does_not_announce_itself_is_announced_by_the_daemon() {
    let hosts = Hosts::new(Device {
        announces: false,
        ..device(1, false)
    })
    .unwrap();
    let source = hosts.boot().unwrap();
    // It must not send a router solicitation at the wrong time.
    source.guest().ok("ip -6 addr flush dev eth0").unwrap();
    let uri = unix_uri(&hosts.migration_socket());
    let dest = hosts.expect_guest(&uri).unwrap();
    migrate(&source, &uri).unwrap();
    // QEMU asks for five announcements, of which two may become one.
    let until = Instant::now() + PROGRESS_TIMEOUT;
    while hosts.frames(1).unwrap()[1] < 3 {
        assert!(Instant::now() < until, "{:?}", hosts.frames(1).unwrap());
        sleep(Duration::from_millis(20));
    }
    hosts.wait_for_ping().unwrap();
    assert_eq!(dest.guest().ok("echo moved").unwrap().trim(), "moved");
}

#[test]
fn cancelled_migration_leaves_the_guest_as_it_was_and_the_next_one_succeeds() {
    let hosts = Hosts::new(device(1, true)).unwrap();
    let (source, echo) = hosts.boot_and_connect().unwrap();
    let uri = unix_uri(&hosts.migration_socket());
    for _ in 0..2 {
        let dest = hosts.expect_guest(&uri).unwrap();
        set_bandwidth(&source, 1 << 20).unwrap();
        source.qmp("migrate", &json!({"uri": uri})).unwrap();
        wait_for_migration(&source, "active").unwrap();
        echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT).unwrap();
        source.qmp("migrate_cancel", &Value::Null).unwrap();
        wait_for_migration(&source, "cancelled").unwrap();
        drop(dest);
        echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT).unwrap();
    }
    let dest = hosts.expect_guest(&uri).unwrap();
    migrate(&source, &uri).unwrap();
    drop(source);
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT).unwrap();
    assert_eq!(dest.guest().ok("echo moved").unwrap().trim(), "moved");
    echo.finish().unwrap();
}

#[test]
fn guest_that_is_saved_to_a_file_continues_from_it() {
    let hosts = Hosts::new(device(1, false)).unwrap();
    let (source, echo) = hosts.boot_and_connect().unwrap();
    let file = hosts.dir.join("saved");
    source.qmp("stop", &Value::Null).unwrap();
    migrate(&source, &format!("exec:cat >{}", file.display())).unwrap();
    drop(source);
    let dest = hosts
        .expect_guest(&format!("exec:cat {}", file.display()))
        .unwrap();
    // It was stopped when it was saved, and is stopped when it is loaded.
    let until = Instant::now() + MIGRATION_TIMEOUT;
    let status = || dest.qmp("query-status", &Value::Null).unwrap()["status"].take();
    while status() == "inmigrate" {
        assert!(Instant::now() < until);
        sleep(Duration::from_millis(20));
    }
    dest.resume().unwrap();
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT).unwrap();
    echo.finish().unwrap();
}
