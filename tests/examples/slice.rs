//! Measures what a short slice of all the daemon's threads does, by giving it to them and taking it in turns:
//! the rates of TCP with a Linux guest, and the time that single frames take while all CPUs are busy.
//! `VIRTIONETD` names the program, the arguments are the number of pairs of samples and of queue pairs:
//!
//! ```text
//! VIRTIONETD=target/release/virtionetd cargo run --release -p virtionet-tests --example slice 10 1 2
//! ```

#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::fs;
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::unistd::gettid;
use virtionet_placement::slice::{SHORTEST_SLICE, set_slice};
use virtionet_tests::daemon::Daemon;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::quantile::quantile;
use virtionet_tests::sched::{allowed_cpus, set_real_time, threads};
use virtionet_tests::testbed::TestbedConfig;
use virtionet_tests::traffic::testbed::{Setup, TrafficTestbed, Uplink};
use virtionet_tests::traffic::{End, Flow, Traffic};

const SIDES: [(&str, Duration); 2] = [("short", SHORTEST_SLICE), ("default", Duration::ZERO)];
/// The seconds of each load.
const SECONDS: u32 = 2;
/// The frames of each sample, and the pause in front of each of them.
const FRAMES: u32 = 300;
const PAUSE: Duration = Duration::from_millis(1);
const TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let pairs: u32 = args.next().map_or(Ok(10), |n| n.parse())?;
    measure_frames(pairs)?;
    for queue_pairs in args {
        measure_tcp(pairs, queue_pairs.parse()?)?;
    }
    Ok(())
}

fn set_slices(daemon: &Daemon, slice: Duration) -> Result<()> {
    for (tid, _) in threads(daemon.pid())? {
        set_slice(Some(tid), slice)?;
    }
    Ok(())
}

/// Prints the median of each side, and the median and the quartiles of the ratios of the pairs.
fn print(what: &str, samples: &[[f64; 2]]) {
    let sorted = |values: Vec<f64>| {
        let mut values = values;
        values.sort_by(f64::total_cmp);
        values
    };
    let at = |values: &[f64], quarter: usize| values[(values.len() - 1) * quarter / 4];
    let [short, default] = [0, 1].map(|side| sorted(samples.iter().map(|s| s[side]).collect()));
    let ratios = sorted(
        samples
            .iter()
            .map(|[short, default]| short / default)
            .collect(),
    );
    println!(
        "{what}: {:.2} with the short slice, {:.2} with the default, ratio {:.2} ({:.2} to {:.2})",
        at(&short, 2),
        at(&default, 2),
        at(&ratios, 2),
        at(&ratios, 1),
        at(&ratios, 3),
    );
}

// --- single frames ------------------------------------------------------------------------------

fn measure_frames(pairs: u32) -> Result<()> {
    let setup = Setup {
        uplink: Uplink::Tap,
        is_packed: false,
        pairs: 1,
        shares_worker: false,
    };
    let testbed = TrafficTestbed::start(setup)?;
    let traffic = testbed.connect()?;
    let is_over = Arc::new(AtomicBool::new(false));
    let busy = (0..allowed_cpus()?.len()).map(|_| {
        let is_over = Arc::clone(&is_over);
        thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                spin_loop();
            }
        })
    });
    let busy: Vec<_> = busy.collect();
    // A thread of its own, which gets a real-time priority.
    let measured = thread::spawn(move || sample_frames(&testbed.daemon, traffic, pairs)).join();
    is_over.store(true, Ordering::Relaxed);
    for thread in busy {
        _ = thread.join();
    }
    measured.map_err(|_| anyhow::anyhow!("the thread panicked"))?
}

fn sample_frames(daemon: &Daemon, mut traffic: Traffic, pairs: u32) -> Result<()> {
    set_real_time(gettid().as_raw())?;
    let is_from_driver = |flow: &Flow| matches!(flow.source, End::Driver { .. });
    for (what, from_driver) in [("from the driver", true), ("to the driver", false)] {
        let mut quantiles: BTreeMap<&str, Vec<[f64; 2]>> = BTreeMap::new();
        for _ in 0..pairs {
            let mut sides = [[0.0; 3]; 2];
            for ((_, slice), side) in SIDES.iter().zip(&mut sides) {
                set_slices(daemon, *slice)?;
                let mut times = Vec::new();
                for _ in 0..FRAMES {
                    thread::sleep(PAUSE);
                    times.push(send_one(&mut traffic, |flow| {
                        is_from_driver(flow) == from_driver
                    })?);
                }
                *side = [0.5, 0.99, 1.0].map(|part| quantile(&mut times, part).as_secs_f64() * 1e6);
            }
            for (n, name) in ["median", "p99", "longest"].into_iter().enumerate() {
                let sample = [sides[0][n], sides[1][n]];
                quantiles.entry(name).or_default().push(sample);
            }
        }
        for (name, samples) in quantiles {
            print(
                &format!("a frame {what}, busy CPUs, {name} in us"),
                &samples,
            );
        }
    }
    Ok(())
}

/// The time from sending a frame until it has arrived.
fn send_one(traffic: &mut Traffic, which: impl Fn(&Flow) -> bool) -> Result<Duration> {
    let started_at = Instant::now();
    traffic.send_where(1, which)?;
    while traffic.flows.iter().any(|flow| flow.unreceived() > 0) {
        ensure!(started_at.elapsed() < TIMEOUT, "{}", traffic.describe());
        traffic.exchange(0)?;
    }
    Ok(started_at.elapsed())
}

// --- TCP ----------------------------------------------------------------------------------------

fn measure_tcp(pairs: u32, queue_pairs: u16) -> Result<()> {
    let mut testbed = TestbedConfig::new(queue_pairs).start()?;
    testbed.configure_guest()?;
    let iperf = testbed.iperf()?;
    let mut figures: BTreeMap<String, Vec<[f64; 2]>> = BTreeMap::new();
    // The first load makes the emulator translate the guest's code.
    for n in 0..=pairs {
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            let mut sides = Vec::new();
            for (_, slice) in SIDES {
                set_slices(&testbed.daemon, slice)?;
                let before = Counts::of(&testbed.daemon)?;
                let report = iperf.run(&IperfLoad::tcp(SECONDS).flows(2), direction)?;
                sides.push(Counts::of(&testbed.daemon)?.since(before, report.gbps));
            }
            if n > 0 {
                for ((name, short), (_, default)) in sides[0].into_iter().zip(sides[1]) {
                    let name = format!("{queue_pairs} queue pairs, {direction:?}, {name}");
                    figures.entry(name).or_default().push([short, default]);
                }
            }
        }
    }
    for (name, samples) in &figures {
        print(name, samples);
    }
    Ok(())
}

/// What the daemon's threads and workers have counted.
#[derive(Clone, Copy)]
struct Counts {
    switches: u64,
    busy_cycles: u64,
    busy_frames: u64,
}

impl Counts {
    fn of(daemon: &Daemon) -> Result<Self> {
        let mut switches = 0;
        for (tid, _) in threads(daemon.pid())? {
            let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
            let counts = status.lines().filter(|line| line.contains("ctxt_switches"));
            switches += counts
                .filter_map(|line| line.rsplit('\t').next()?.parse::<u64>().ok())
                .sum::<u64>();
        }
        let device = daemon.device()?;
        let pairs = device["pairs"].as_array().cloned().unwrap_or_default();
        let sum = |name: &str| {
            let counts = pairs
                .iter()
                .map(|pair| pair["worker_counters"][name].as_u64());
            counts.map(|count| count.unwrap_or(0)).sum()
        };
        Ok(Self {
            switches,
            busy_cycles: sum("busy_cycles"),
            busy_frames: sum("busy_frames"),
        })
    }

    /// The figures of a load, named.
    fn since(self, before: Self, gbps: f64) -> [(&'static str, f64); 3] {
        let frames = to_f64(self.busy_frames - before.busy_frames);
        [
            ("Gbit/s", gbps),
            (
                "busy cycles for each frame",
                to_f64(self.busy_cycles - before.busy_cycles) / frames,
            ),
            (
                "context switches for each 1,000 frames",
                1e3 * to_f64(self.switches - before.switches) / frames,
            ),
        ]
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure of a measurement")]
fn to_f64(count: u64) -> f64 {
    count as f64
}
