//! A log that cannot be written. The daemon serves its front-ends all the same, counts the lines
//! that are lost, and ends in time.
#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;

const TIMEOUT: Duration = Duration::from_secs(5);
const FRAME: [u8; 60] = [0x55; 60];

/// Starts a daemon that logs each message of a front-end to `output`.
fn start(dir: &RunDir, output: &Path) -> Daemon {
    let redirect = format!("exec \"$@\" 2>{}", output.display());
    Options::new()
        .wrapped_in(["sh", "-c", &redirect, "sh"])
        .flag("--uplink", "null")
        .arg("-vv")
        .start(dir, "vnet")
        .unwrap()
}

fn make_fifo(dir: &RunDir) -> (std::path::PathBuf, File) {
    let path = dir.join("log");
    assert!(
        Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    // A reader that does not read. It may be the writer, too, so that this does not wait for one.
    let reader = OpenOptions::new().read(true).write(true).open(&path);
    (path, reader.unwrap())
}

/// Front-ends come, carry frames and go; the log loses lines, and SIGTERM ends the daemon.
fn assert_serves_and_stops(mut daemon: Daemon) {
    for _ in 0..30 {
        let config = TestFrontendConfig::new(4, 256, MODERN);
        let mut frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
        let read_frames = |device: &serde_json::Value| {
            device["pairs"][0]["tx"]["counters"]["frames"]
                .as_u64()
                .unwrap_or(0)
        };
        let before = read_frames(&daemon.device().unwrap());
        let tx = &mut frontend.pairs[0].tx;
        assert!(tx.queue(&NetHeader::default(), &FRAME).unwrap());
        tx.flush().unwrap();
        daemon
            .wait_for_device("carrying the frame", TIMEOUT, |device| {
                read_frames(device) == before + 1
            })
            .unwrap();
    }
    let dropped = daemon.get("/v1/devices").unwrap()["log_lines_dropped"].clone();
    assert!(dropped.as_u64() > Some(0), "{dropped}");
    let page = daemon.get_text("/metrics").unwrap();
    assert!(
        page.contains("virtionetd_log_lines_dropped_total{} "),
        "{page}"
    );
    let exit = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(exit.status.success(), "{exit:?}");
    assert!(exit.duration < Duration::from_secs(2), "{exit:?}");
}

#[test]
fn log_on_a_full_disk_loses_lines_and_nothing_else() {
    let dir = RunDir::new().unwrap();
    assert_serves_and_stops(start(&dir, Path::new("/dev/full")));
}

#[test]
fn log_pipe_without_reader_loses_lines_and_nothing_else() {
    let dir = RunDir::new().unwrap();
    let (path, reader) = make_fifo(&dir);
    let daemon = start(&dir, &path);
    drop(reader);
    assert_serves_and_stops(daemon);
}

#[test]
fn log_pipe_whose_reader_sleeps_loses_lines_and_nothing_else() {
    let dir = RunDir::new().unwrap();
    let (path, reader) = make_fifo(&dir);
    assert_serves_and_stops(start(&dir, &path));
    drop(reader);
}
