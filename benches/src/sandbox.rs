//! Measures what the sandbox costs: the cycles that a worker is busy for a frame that the guest
//! sends, with `--sandbox on` and, as the peer, with `--sandbox off`.
//!
//! Both daemons are there all the time and wait for kicks, without using the CPU, while the other
//! one is measured. The workers run on the last CPU, and the drivers on the first one. The frames
//! go to `null`, where a frame costs the least and the kicks and calls are most of the system
//! calls, or to a TAP with one system call for each frame.
//!
//! A second part (`sandbox/filters.rs`) measures the filters alone.

mod filters;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::sched;

use crate::harness::{progress, run_in_netns};
use crate::outcome::{Better, GroupResult};
use crate::peers::load::Cpus;
use crate::sampling::{Effort, PairedSamples};

/// The lowest acceptable ratio.
const BOUND: f64 = 0.99;
/// Frames that are published at once.
const BURST: u16 = 32;
const PAYLOAD: [u8; 100] = [0x5a; 100];
/// The time without any completed frame after which the device counts as stalled.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Measures both uplinks and the filters.
///
/// # Errors
/// When this process is not root, may use only one CPU, or a part of the testbed fails.
pub fn run(effort: Effort) -> Result<GroupResult> {
    run_in_netns(|| {
        let cpus = Cpus::get()?;
        let mut outcome = GroupResult::default();
        for kind in ["null", "tap"] {
            measure(kind, cpus, effort, &mut outcome).with_context(|| kind.to_owned())?;
        }
        filters::measure(cpus.back_end, effort, &mut outcome).context("filters")?;
        Ok(outcome)
    })
}

fn measure(kind: &str, cpus: Cpus, effort: Effort, outcome: &mut GroupResult) -> Result<()> {
    let interval = effort.choose(Duration::from_millis(500), Duration::from_millis(100));
    let mut on = Side::start(kind, "on", cpus)?;
    let mut off = Side::start(kind, "off", cpus)?;
    let mut samples = PairedSamples::default();
    // The first pair warms up the caches and is not counted.
    on.measure(interval)?;
    off.measure(interval)?;
    for n in 0..effort.choose(31, 5) {
        // Which of them is first alternates, because a machine changes its speed all the time.
        let (with, without) = if n % 2 == 0 {
            let with = on.measure(interval)?;
            (with, off.measure(interval)?)
        } else {
            let without = off.measure(interval)?;
            (on.measure(interval)?, without)
        };
        progress(&format!(
            "sandbox: {kind}: {with:.1} and {without:.1} cycles"
        ));
        samples.push(with, without);
    }
    let case = format!("TX to {kind}, busy cycles a frame");
    let row = samples.row(&case, "cycles", Better::Lower, "sandbox off");
    outcome.rows.push(row.with_bound(BOUND));
    Ok(())
}

/// A daemon, and the driver of its device.
struct Side {
    frontend: TestFrontend,
    daemon: Daemon,
    _dir: RunDir,
}

impl Side {
    fn start(kind: &str, mode: &str, cpus: Cpus) -> Result<Self> {
        let dir = RunDir::new()?;
        let uplink = match kind {
            "tap" => format!("tap:bench-{mode}"),
            other => other.to_owned(),
        };
        // The daemon inherits the affinity of the thread that starts it.
        sched::pin(0, cpus.back_end)?;
        let daemon = Options::new()
            .flag("--sandbox", mode)
            .flag("--uplink", uplink)
            .flag("--placement", format!("list:{}", cpus.back_end))
            .start(&dir, "vnet")?;
        sched::pin(0, cpus.front_end)?;
        let config = TestFrontendConfig::new(1, 256, MODERN);
        let mut frontend = TestFrontend::connect(daemon.socket(), &config)?;
        let frame = FrameSpec::v4(Transport::Udp).build(&PAYLOAD)?;
        frontend.pairs[0].tx.prefill(&frame)?;
        Ok(Self {
            frontend,
            daemon,
            _dir: dir,
        })
    }

    /// Sends for `interval`; returns the busy cycles of the worker for each frame.
    fn measure(&mut self, interval: Duration) -> Result<f64> {
        let before = self.read()?;
        let started_at = Instant::now();
        let tx = &mut self.frontend.pairs[0].tx;
        while started_at.elapsed() < interval {
            tx.queue_prefilled(BURST)?;
            tx.flush()?;
        }
        tx.drain(STALL_TIMEOUT)?;
        let after = self.read()?;
        let frames = after.frames - before.frames;
        ensure!(frames > 0.0, "no frame was sent");
        Ok((after.cycles - before.cycles) / frames)
    }

    fn read(&self) -> Result<Work> {
        let device = self.daemon.device()?;
        let pair = &device["pairs"][0];
        let number = |value: &serde_json::Value| value.as_f64().context("a counter is missing");
        Ok(Work {
            cycles: number(&pair["worker_counters"]["busy_cycles"])?,
            frames: number(&pair["tx"]["counters"]["frames"])?,
        })
    }
}

/// The work of a worker so far.
struct Work {
    cycles: f64,
    frames: f64,
}
