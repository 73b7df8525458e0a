//! Measures the idle daemon: resident memory, threads and file descriptors while queue pairs are
//! connected, and the time from its start to its first reply.
//!
//! The daemon is the release build with its control socket, started as a user starts it. The
//! front-end is the crate `virtionet-guest` over the vhost-user socket. Guest memory that the
//! daemon has touched (the virtqueues) is part of its resident and of its shared memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::cleanup::{Action, Entry, register};
use virtionet_tests::paths::{RunDir, virtionetd};

use crate::harness::{progress, run_in_netns};
use crate::outcome::{Better, GroupResult, Row};
use crate::sampling::{Effort, median};

const QUEUE_PAIRS: [u16; 4] = [1, 8, 64, 128];
const UPLINKS: [&str; 2] = ["null", "tap:bench0"];
// The aims: memory of the daemon, memory of each queue pair, and time to the first reply.
const MAX_DAEMON_KIB: f64 = 5.0 * 1024.0;
const MAX_QUEUE_PAIR_KIB: f64 = 64.0;
const MAX_START_MS: f64 = 10.0;
/// The time after which a daemon that has not replied is considered broken.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after a start until the daemon is idle.
const TIME_UNTIL_IDLE: Duration = Duration::from_millis(300);

/// Measures both uplinks with every number of queue pairs.
///
/// # Errors
/// When this process is not root, or the daemon fails. The error contains the daemon's stderr.
pub fn run(effort: Effort) -> Result<GroupResult> {
    raise_fd_limit()?;
    run_in_netns(|| {
        let mut outcome = GroupResult::default();
        for uplink in UPLINKS {
            for queue_pairs in QUEUE_PAIRS {
                progress(&format!("footprint: queue pairs {queue_pairs}, {uplink}"));
                measure_memory(uplink, queue_pairs, &mut outcome)?;
            }
        }
        for uplink in UPLINKS {
            outcome.rows.push(measure_start(uplink, effort)?);
        }
        Ok(outcome)
    })
}

/// Raises the limit of file descriptors: 128 queue pairs need more than many shells allow.
fn raise_fd_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}

fn measure_memory(uplink: &str, queue_pairs: u16, outcome: &mut GroupResult) -> Result<()> {
    let daemon = Daemon::spawn(uplink)?;
    let connection = FrontendConnection::from_socket(daemon.connect()?)?;
    let frontend = start_frontend(connection, queue_pairs).with_context(|| daemon.stderr_text())?;
    sleep(TIME_UNTIL_IDLE);
    let used = daemon.usage()?;
    drop(frontend);
    let kind = uplink_kind(uplink);
    let plural = if queue_pairs == 1 { "" } else { "s" };
    let aim = MAX_DAEMON_KIB + MAX_QUEUE_PAIR_KIB * f64::from(queue_pairs);
    for (name, kib) in [
        ("resident", used.resident),
        ("proportional", used.proportional),
        ("private", used.private),
    ] {
        let case = format!("{kind}, {queue_pairs} queue pair{plural}: {name}");
        let row = Row::new(&case, "KiB", Better::Lower, kib, ("aim", aim));
        outcome
            .rows
            .push(row.with_bound(1.0).with_headline(name == "resident"));
    }
    outcome.notes.push(format!(
        "{kind}, {queue_pairs} queue pair{plural}: {} threads, {} file descriptors",
        used.threads, used.descriptors
    ));
    Ok(())
}

fn start_frontend(connection: FrontendConnection, queue_pairs: u16) -> Result<TestFrontend> {
    let config = TestFrontendConfig::new(queue_pairs, 256, MODERN);
    let mut frontend = TestFrontend::negotiate(connection, &config)?;
    for pair in &mut frontend.pairs {
        pair.rx.fill()?;
    }
    frontend.start()?;
    Ok(frontend)
}

fn measure_start(uplink: &str, effort: Effort) -> Result<Row> {
    let mut times = Vec::new();
    for _ in 0..effort.choose(20, 5) {
        let daemon = Daemon::spawn(uplink)?;
        let mut connection = FrontendConnection::from_socket(daemon.connect()?)?;
        connection
            .get_features()
            .with_context(|| daemon.stderr_text())?;
        times.push(daemon.started_at.elapsed().as_secs_f64() * 1e3);
    }
    let case = format!("{}: start to first reply", uplink_kind(uplink));
    let aim = ("aim", MAX_START_MS);
    let row = Row::new(&case, "ms", Better::Lower, median(&times), aim);
    Ok(row.with_bound(1.0).with_headline(true))
}

fn uplink_kind(uplink: &str) -> &str {
    uplink.split(':').next().unwrap_or(uplink)
}

/// A daemon process without a wrapper around it, so that its start is timed precisely.
struct Daemon {
    child: Child,
    started_at: Instant,
    dir: RunDir,
    _entry: Entry,
}

/// The resources of a process. Sizes are in KiB.
struct Usage {
    resident: f64,
    proportional: f64,
    private: f64,
    threads: usize,
    descriptors: usize,
}

impl Daemon {
    fn spawn(uplink: &str) -> Result<Self> {
        let program = virtionetd()?;
        let dir = RunDir::new()?;
        let mut command = Command::new(program);
        command
            .arg("--socket-path")
            .arg(dir.join("vnet.sock"))
            .arg("--control")
            .arg(dir.join("control.sock"))
            .args(["--uplink", uplink])
            .stdin(Stdio::null())
            .stderr(File::create(dir.join("stderr"))?);
        let started_at = Instant::now();
        let child = command.spawn().context("virtionetd cannot be started")?;
        Ok(Self {
            _entry: register(Action::Kill(i32::try_from(child.id())?)),
            child,
            started_at,
            dir,
        })
    }

    /// Connects to the vhost-user socket as soon as the daemon listens.
    fn connect(&self) -> Result<UnixStream> {
        let path = self.dir.join("vnet.sock");
        loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                return Ok(stream);
            }
            if self.started_at.elapsed() > REPLY_TIMEOUT {
                bail!(
                    "virtionetd does not listen after {REPLY_TIMEOUT:?}; {}",
                    self.stderr_text()
                );
            }
            sleep(Duration::from_micros(50));
        }
    }

    fn stderr_text(&self) -> String {
        let text = fs::read_to_string(self.dir.join("stderr")).unwrap_or_default();
        format!("virtionetd's stderr: {}", text.trim())
    }

    fn usage(&self) -> Result<Usage> {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let rollup = fs::read_to_string(proc.join("smaps_rollup"))?;
        let sizes = parse_sizes(&rollup);
        let size = |name| {
            let size = sizes.get(name).copied();
            size.with_context(|| format!("smaps_rollup has no field {name}"))
        };
        ensure!(
            size("Rss")? > 0.0,
            "virtionetd has ended; {}",
            self.stderr_text()
        );
        Ok(Usage {
            resident: size("Rss")?,
            proportional: size("Pss")?,
            private: size("Private_Clean")? + size("Private_Dirty")?,
            threads: fs::read_dir(proc.join("task"))?.count(),
            descriptors: fs::read_dir(proc.join("fd"))?.count(),
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // An error means that the process has already ended, which is the purpose of this function.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Parses the lines `NAME:  N kB`.
fn parse_sizes(text: &str) -> BTreeMap<&str, f64> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let kib = rest.trim().strip_suffix(" kB")?.parse().ok()?;
            Some((name, kib))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed_and_the_head_line_is_skipped() {
        let text = "55d0-7ffe ---p 00000000 00:00 0    [rollup]\nRss:      3412 kB\n\
                    Pss:      1200 kB\nTHP: 0\n";
        let sizes = parse_sizes(text);
        assert_eq!(
            (sizes["Rss"], sizes["Pss"], sizes.len()),
            (3412.0, 1200.0, 2)
        );
    }
}
