//! Migration by postcopy between two QEMUs: the guest runs at the destination before all of its memory
//! is there. Its TCP connections go on meanwhile, and each of their bytes is checked.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use virtionet_tests::echo_stream::EchoStreams;
use virtionet_tests::migration::{
    Device, Hosts, Method, migrate, set_speed, wait_for_migration, wait_until,
};
use virtionet_tests::qemu::Qemu;
use virtionet_tests::settings::number;
use virtionet_tests::topology::GUEST;

const PROGRESS_TIMEOUT: Duration = Duration::from_secs(40);
/// What the connection carries between two steps of a test.
const PROGRESS: u64 = 1 << 20;
const METHOD: Method = Method {
    multifd: false,
    auto_converge: false,
    postcopy: true,
};
/// How fast memory follows the guest, in bytes/s: slow enough that the guest runs without some of it
/// for seconds.
const SLOW: u64 = 8 << 20;
/// The size of a file in the guest's memory, in MiB.
const FILE_MIB: u64 = 24;

/// Makes a file of random bytes in the guest's memory, and returns its checksum.
fn fill_memory(qemu: &Qemu) -> Result<String> {
    qemu.guest().ok(&format!(
        "dd if=/dev/urandom of=/tmp/f bs=1M count={FILE_MIB} 2>/dev/null"
    ))?;
    checksum(qemu)
}

fn checksum(qemu: &Qemu) -> Result<String> {
    qemu.guest().ok("md5sum </tmp/f")
}

/// Begins a migration that does not end by itself, and lets the guest continue at the destination.
fn begin_postcopy(source: &Qemu, uri: &str) -> Result<()> {
    METHOD.apply(source)?;
    set_speed(source, SLOW, 1)?;
    source.qmp(
        "migrate-set-parameters",
        &json!({"max-postcopy-bandwidth": SLOW}),
    )?;
    source.qmp("migrate", &json!({"uri": uri}))?;
    wait_for_migration(source, "active")?;
    source.qmp("migrate-start-postcopy", &Value::Null)?;
    wait_for_migration(source, "postcopy-active").map(drop)
}

/// Migrates a guest whose connections go on.
fn check_postcopy(device: Device) -> Result<()> {
    let hosts = Hosts::new(device)?;
    let source = hosts.boot()?;
    let sum = fill_memory(&source)?;
    let echo = EchoStreams::start(hosts.bridge().netns(), source.guest(), GUEST.v4, 2)?;
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    let uri = hosts.uri();
    let dest = hosts.expect_guest_by(&uri, METHOD)?;
    begin_postcopy(&source, &uri)?;
    let at_source = hosts.frames(0)?;
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    let migration = source.qmp("query-migrate", &Value::Null)?;
    ensure!(
        migration["status"] == "postcopy-active",
        "too soon: {migration}"
    );
    ensure!(
        hosts.frames(0)? == at_source,
        "the source has the guest no more"
    );
    let [rx, tx] = hosts.frames(1)?;
    ensure!(rx > 20 && tx > 20, "{rx} {tx}");
    // Nothing is left to arrive when the end comes.
    source.qmp(
        "migrate-set-parameters",
        &json!({"max-postcopy-bandwidth": 0}),
    )?;
    let migration = wait_for_migration(&source, "completed")?;
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    drop(source);
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    let bytes = echo.finish()?;
    ensure!(checksum(&dest)? == sum, "the guest's memory changed");
    eprintln!(
        "{device:?}: {bytes} bytes came back, downtime {} ms, {} pages on request, {} frames dropped meanwhile",
        migration["downtime"],
        migration["ram"]["postcopy-requests"],
        hosts.rx_counter(1, "dropped_postcopy")?
    );
    let requests = migration["ram"]["postcopy-requests"].as_u64();
    ensure!(requests > Some(0), "{migration}");
    Ok(())
}

#[test]
fn guest_keeps_its_connections_over_a_migration_by_postcopy() {
    check_postcopy(Device::new(1, false)).unwrap();
}

/// Split and packed rings at a TAP and on a switch, several times each with `MIGRATIONS=N`.
#[test]
fn guests_of_all_kinds_keep_their_connections_over_postcopy_if_asked_for() {
    for _ in 0..number("MIGRATIONS", 0).unwrap() {
        for on_switch in [false, true] {
            for is_packed in [false, true] {
                check_postcopy(Device {
                    on_switch,
                    ..Device::new(1, is_packed)
                })
                .unwrap();
            }
        }
    }
}

/// With `MIGRATIONS=N`: QEMU waits for the vrings to stop while a worker may wait for a page.
#[test]
fn guest_that_is_stopped_during_postcopy_continues_if_asked_for() {
    for _ in 0..number("MIGRATIONS", 0).unwrap() {
        check_stop(Device::new(1, true)).unwrap();
    }
}

fn check_stop(device: Device) -> Result<()> {
    let hosts = Hosts::new(device)?;
    let source = hosts.boot()?;
    let sum = fill_memory(&source)?;
    let echo = EchoStreams::start(hosts.bridge().netns(), source.guest(), GUEST.v4, 2)?;
    let uri = hosts.uri();
    let dest = hosts.expect_guest_by(&uri, METHOD)?;
    begin_postcopy(&source, &uri)?;
    for _ in 0..5 {
        dest.qmp("stop", &Value::Null)?;
        dest.qmp("cont", &Value::Null)?;
        echo.wait_for_progress(PROGRESS / 16, PROGRESS_TIMEOUT)?;
    }
    source.qmp(
        "migrate-set-parameters",
        &json!({"max-postcopy-bandwidth": 0}),
    )?;
    wait_for_migration(&source, "completed")?;
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    echo.finish()?;
    ensure!(checksum(&dest)? == sum, "the guest's memory changed");
    Ok(())
}

/// With `MIGRATIONS=N`: all memory arrives before QEMU is asked to switch over, as it mostly does.
#[test]
fn guest_that_could_have_used_postcopy_and_did_not_keeps_its_connections_if_asked_for() {
    for _ in 0..number("MIGRATIONS", 0).unwrap() {
        check_without_switching_over(Device::new(1, true)).unwrap();
    }
}

fn check_without_switching_over(device: Device) -> Result<()> {
    let hosts = Hosts::new(device)?;
    let source = hosts.boot()?;
    let echo = EchoStreams::start(hosts.bridge().netns(), source.guest(), GUEST.v4, 2)?;
    let uri = hosts.uri();
    let _dest = hosts.expect_guest_by(&uri, METHOD)?;
    METHOD.apply(&source)?;
    migrate(&source, &uri)?;
    drop(source);
    echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    echo.finish().map(drop)
}

/// QEMU 10.0 would wait for ever for its own second queue pair.
#[test]
fn destination_with_several_queue_pairs_refuses_postcopy_before_a_migration() {
    let hosts = Hosts::new(Device::new(2, false)).unwrap();
    let error = hosts.expect_guest_by(&hosts.uri(), METHOD).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("not capable of postcopy"), "{error}");
}

/// With `MIGRATIONS=N`: the process of the destination is killed, as if its host had failed. The
/// daemon serves the next one.
#[test]
fn destination_that_is_killed_during_postcopy_frees_its_device_if_asked_for() {
    for _ in 0..number("MIGRATIONS", 0).unwrap() {
        check_kill(Device::new(1, false)).unwrap();
    }
}

fn check_kill(device: Device) -> Result<()> {
    let hosts = Hosts::new(device)?;
    let source = hosts.boot()?;
    fill_memory(&source)?;
    let echo = EchoStreams::start(hosts.bridge().netns(), source.guest(), GUEST.v4, 2)?;
    let uri = hosts.uri();
    let dest = hosts.expect_guest_by(&uri, METHOD)?;
    begin_postcopy(&source, &uri)?;
    echo.wait_for_progress(PROGRESS / 16, PROGRESS_TIMEOUT)?;
    drop(dest);
    // The source cannot have the guest back: it is postcopy-paused or failed.
    wait_until(&source, "over", |migration| {
        migration["status"] != "postcopy-active"
    })
    .ok();
    drop(source);
    // Its QEMU starts only if the daemon answers, which serves one front-end at a time.
    hosts.expect_guest_by(&uri, METHOD).map(drop)
}
