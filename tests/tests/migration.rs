//! Live migration between two QEMUs. TCP connections to the guest go on meanwhile, and each of their
//! bytes is checked.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use virtionet_tests::echo_stream::EchoStreams;
use virtionet_tests::ethtool::set_combined;
use virtionet_tests::file_transfer::FileTransfer;
use virtionet_tests::migration::{
    Device, Hosts, MIGRATION_TIMEOUT, Method, finish_migration, migrate, set_speed,
    wait_for_migration, wait_until,
};
use virtionet_tests::qemu::Qemu;
use virtionet_tests::settings::number;
use virtionet_tests::topology::{GUEST, GUEST_INTERFACE};

const PROGRESS_TIMEOUT: Duration = Duration::from_secs(40);
/// What each connection carries between two steps of a test.
const PROGRESS: u64 = 1 << 20;

/// Boots the guest at the source, and connects to it.
fn boot_and_connect(hosts: &Hosts, device: Device) -> Result<(Qemu, EchoStreams)> {
    let qemu = hosts.boot()?;
    let echo = EchoStreams::start(hosts.bridge().netns(), qemu.guest(), GUEST.v4, device.pairs)?;
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    Ok((qemu, echo))
}

/// Migrates a guest whose connections go on.
fn check_migration(device: Device) -> Result<()> {
    let hosts = Hosts::new(device)?;
    let (source, echo) = boot_and_connect(&hosts, device)?;
    let uri = hosts.uri();
    let dest = hosts.expect_guest(&uri)?;
    let started_at = Instant::now();
    let migration = migrate(&source, &uri)?;
    eprintln!("downtime: {} ms", migration["downtime"]);
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

#[test]
fn guest_with_a_split_ring_keeps_its_connections_over_a_migration() {
    check_migration(Device::new(1, false)).unwrap();
}

#[test]
fn guest_with_four_packed_queue_pairs_keeps_its_connections_over_a_migration() {
    check_migration(Device::new(4, true)).unwrap();
}

/// The other combinations of format and queue pairs, several times each with `MIGRATIONS=N`.
#[test]
fn guests_of_all_formats_keep_their_connections_over_migrations_if_asked_for() {
    for _ in 0..number("MIGRATIONS", 0).unwrap() {
        for pairs in [1, 4] {
            for is_packed in [false, true] {
                check_migration(Device::new(pairs, is_packed)).unwrap();
            }
        }
    }
}

#[test]
fn silent_guest_that_does_not_announce_itself_is_announced_by_the_daemon() {
    let hosts = Hosts::new(Device {
        announces: false,
        ..Device::new(1, false)
    })
    .unwrap();
    let source = hosts.boot().unwrap();
    // It must not send a router solicitation at the wrong time.
    source.guest().ok("ip -6 addr flush dev eth0").unwrap();
    let uri = hosts.uri();
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
    let device = Device::new(1, true);
    let hosts = Hosts::new(device).unwrap();
    let (source, echo) = boot_and_connect(&hosts, device).unwrap();
    let uri = hosts.uri();
    for _ in 0..2 {
        let dest = hosts.expect_guest(&uri).unwrap();
        set_speed(&source, 1 << 20, 1000).unwrap();
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
    let device = Device::new(1, false);
    let hosts = Hosts::new(device).unwrap();
    let (source, echo) = boot_and_connect(&hosts, device).unwrap();
    let file = hosts.dir().join("saved");
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

/// What happens while a guest is migrated that receives a file.
#[derive(Clone, Copy, Debug, Default)]
struct Variant {
    method: Method,
    /// The guest uses one queue pair less, and one more again.
    changes_pairs: bool,
}

impl Variant {
    fn new(multifd: bool, auto_converge: bool, changes_pairs: bool) -> Self {
        Self {
            method: Method {
                multifd,
                auto_converge,
                ..Method::default()
            },
            changes_pairs,
        }
    }
}

/// Migrates a guest that receives a file meanwhile.
fn check_variant(device: Device, variant: Variant) -> Result<()> {
    let hosts = Hosts::new(device)?;
    let source = hosts.boot()?;
    let started_at = Instant::now();
    let uri = hosts.uri();
    let dest = hosts.expect_guest_by(&uri, variant.method)?;
    variant.method.apply(&source)?;
    let file = FileTransfer::start(hosts.bridge().netns(), source.guest(), GUEST.v4)?;
    file.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    // The guest writes more memory than that, so the migration does not end by itself.
    set_speed(&source, 2 << 20, 1)?;
    source.qmp("migrate", &json!({"uri": uri}))?;
    wait_for_migration(&source, "active")?;
    file.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    if variant.changes_pairs {
        let fewer = device.pairs - 1;
        for pairs in [fewer, device.pairs, fewer] {
            set_combined(source.guest(), GUEST_INTERFACE, pairs.into())?;
            file.wait_for_progress(PROGRESS / 4, PROGRESS_TIMEOUT)?;
            ensure!(hosts.enabled_pairs(0)? == usize::from(pairs));
        }
    }
    if variant.method.auto_converge {
        slow_down_vcpus(&source)?;
    }
    file.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    wait_for_migration(&source, "active")?;
    let migration = finish_migration(&source)?;
    let channels = &migration["ram"]["multifd-bytes"];
    ensure!(
        (channels.as_u64() > Some(0)) == variant.method.multifd,
        "{migration}"
    );
    file.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    if variant.changes_pairs {
        ensure!(hosts.enabled_pairs(1)? == usize::from(device.pairs) - 1);
        set_combined(dest.guest(), GUEST_INTERFACE, device.pairs.into())?;
    }
    ensure!(hosts.enabled_pairs(1)? == usize::from(device.pairs));
    let size = file.finish(dest.guest(), hosts.dir())?;
    let (elapsed, downtime) = (started_at.elapsed(), &migration["downtime"]);
    eprintln!(
        "{device:?} {variant:?}: {size} bytes, {downtime} ms of downtime, {elapsed:?} after the boot"
    );
    Ok(())
}

/// Lets the guest write so much memory that QEMU slows its vCPUs down, which lasts until the migration
/// ends.
fn slow_down_vcpus(qemu: &Qemu) -> Result<()> {
    // Pages of zeros would not count.
    qemu.guest().ok(
        "setsid sh -c 'echo $$ >/tmp/w.pid; while :; do dd if=/tmp/received of=/tmp/w bs=1M count=8 conv=notrunc; done' >/dev/null 2>&1 &",
    )?;
    let parameters = json!({"throttle-trigger-threshold": 1, "max-bandwidth": 40 << 20});
    qemu.qmp("migrate-set-parameters", &parameters)?;
    wait_until(qemu, "slowing down the vCPUs", |migration| {
        migration["cpu-throttle-percentage"].as_u64() > Some(0)
    })?;
    set_speed(qemu, 2 << 20, 1)?;
    qemu.guest().ok("kill $(cat /tmp/w.pid)").map(drop)
}

#[test]
fn guest_that_changes_its_queue_pairs_receives_a_file_while_it_is_migrated_by_all_means() {
    let variant = Variant::new(true, true, true);
    check_variant(Device::new(2, false), variant).unwrap();
}

/// Migrates guests by each means, several times each with `MIGRATIONS=N`.
fn check_variants_if_asked_for(is_packed: bool) -> Result<()> {
    for _ in 0..number("MIGRATIONS", 0)? {
        for variant in [
            Variant::default(),
            Variant::new(true, false, false),
            Variant::new(false, true, false),
            Variant::new(false, false, true),
            Variant::new(true, true, true),
        ] {
            check_variant(Device::new(2, is_packed), variant)?;
        }
    }
    Ok(())
}

#[test]
fn guests_with_split_rings_receive_a_file_while_migrated_by_each_means_if_asked_for() {
    check_variants_if_asked_for(false).unwrap();
}

#[test]
fn guests_with_packed_rings_receive_a_file_while_migrated_by_each_means_if_asked_for() {
    check_variants_if_asked_for(true).unwrap();
}
