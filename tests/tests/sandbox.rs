//! The sandbox of a running daemon, as the kernel reports it for each thread. What a thread may not
//! do is tried in `crates/sandbox/tests`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_placement::slice::{SHORTEST_SLICE, slice_of};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::sched;

const TIMEOUT: Duration = Duration::from_secs(5);

/// What /proc/PID/task/TID/status says of one thread.
#[derive(Debug)]
struct ThreadStatus {
    filters: u64,
    no_new_privs: bool,
    capabilities: u64,
    blocked: u64,
}

/// The threads of `daemon`, by name.
fn threads(daemon: &Daemon) -> BTreeMap<String, ThreadStatus> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let tasks = tasks.flatten().map(|task| task.path().join("status"));
    let status = tasks.filter_map(|status| fs::read_to_string(status).ok());
    status
        .map(|status| {
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap().trim_start_matches(':').trim().to_owned()
            };
            let hex = |name| u64::from_str_radix(&field(name), 16).unwrap();
            let thread = ThreadStatus {
                filters: field("Seccomp_filters").parse().unwrap(),
                no_new_privs: field("NoNewPrivs") == "1",
                capabilities: hex("CapPrm") | hex("CapEff") | hex("CapInh") | hex("CapAmb"),
                blocked: hex("SigBlk"),
            };
            (field("Name"), thread)
        })
        .collect()
}

/// The number of filters of each thread, once it is confined. Two filters are
/// the process's; a worker also has that of the device's thread.
const EXPECTED: [(&str, u64); 7] = [
    ("virtionetd", 3),
    ("vnet", 3),
    ("vnet-q0", 4),
    ("placer", 3),
    ("control", 3),
    ("log", 3),
    ("closer", 3),
];

#[test]
fn every_thread_of_a_running_daemon_has_its_filters_and_no_other_capabilities() {
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")
        .unwrap();
    let config = TestFrontendConfig::new(1, 256, MODERN);
    let _frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    // The main thread is the last one. The worker starts with its vring, as confined as the session.
    let threads = loop {
        let threads = threads(&daemon);
        let is_confined = |(name, filters): &(&str, u64)| {
            let thread = threads.get(*name);
            thread.is_some_and(|thread| thread.filters >= *filters)
        };
        if EXPECTED.iter().all(is_confined) {
            break threads;
        }
        assert!(Instant::now() < deadline, "{threads:?}");
        sleep(Duration::from_millis(20));
    };
    for (name, filters) in EXPECTED {
        let thread = &threads[name];
        assert_eq!(thread.filters, filters, "{name}: {thread:?}");
        assert_eq!(thread.capabilities, 0, "{name}: {thread:?}");
        assert!(thread.no_new_privs, "{name}");
        // SIGTERM is for the main thread.
        let blocks_sigterm = thread.blocked & 1 << (Signal::SIGTERM as u64 - 1) != 0;
        assert_eq!(blocks_sigterm, name != "virtionetd", "{name}: {thread:?}");
    }
    assert!(
        threads.values().all(|thread| thread.filters > 2),
        "{threads:?}"
    );
    assert!(daemon.stop(Signal::SIGTERM).unwrap().status.success());
}

#[test]
fn without_the_sandbox_no_thread_is_confined_and_the_log_says_so() {
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .flag("--uplink", "null")
        .flag("--sandbox", "off")
        .start(&dir, "vnet")
        .unwrap();
    assert!(threads(&daemon).values().all(|thread| thread.filters == 0));
    let exit = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(exit.status.success());
    assert!(
        exit.stderr.contains("the sandbox is off"),
        "{}",
        exit.stderr
    );
}

/// Otherwise a front-end or the next daemon waits for milliseconds where a CPU is busy. A worker would
/// interrupt its vCPU too often.
#[test]
fn threads_other_than_workers_have_the_shortest_slice_where_the_kernel_has_slices() {
    let dir = RunDir::new().unwrap();
    let daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")
        .unwrap();
    let config = TestFrontendConfig::new(1, 256, MODERN);
    let _frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    let default = slice_of(0).unwrap();
    let short = match default {
        Duration::ZERO => Duration::ZERO,
        _ => SHORTEST_SLICE,
    };
    let expected = EXPECTED.map(|(name, _)| match name {
        "vnet-q0" => (name, default),
        _ => (name, short),
    });
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let threads = sched::threads(daemon.pid()).unwrap();
        let slices = threads
            .iter()
            .map(|(tid, name)| (name.as_str(), slice_of(*tid).unwrap()));
        let slices = BTreeMap::from_iter(slices);
        if expected
            .iter()
            .all(|(name, slice)| slices.get(name) == Some(slice))
        {
            break;
        }
        // A thread gets its name, and a worker its slice, only after it has started.
        assert!(Instant::now() < deadline, "{slices:?}");
        sleep(Duration::from_millis(10));
    }
}
