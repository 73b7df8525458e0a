//! A process that uses a given share of the time of one CPU, and sleeps a given number of times.
//! The group *isolation* uses it as the load that is not related to virtionetd; it has no other
//! purpose.
//!
//! A line `SHARE PERIOD` on stdin (a share of the CPU, and seconds) starts a load: in each period,
//! it burns what it is behind that share, and then sleeps until the next one. The line `0 0` ends
//! the load. It is answered with the burned CPU time in seconds.

use std::io::{self, BufRead, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use virtionet_tests::sched;

/// A load of the CPU.
#[derive(Debug, Clone, Copy)]
struct Load {
    share: f64,
    period: Duration,
}

fn main() -> Result<()> {
    let cpu = std::env::args().nth(1).context("the CPU is missing")?;
    sched::pin(0, cpu.parse().context("the CPU must be a number")?)?;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let load = parse(&line);
            if sender.send(load).is_err() {
                return;
            }
        }
    });
    while let Ok(load) = receiver.recv() {
        if let Some(load) = load {
            let burned = burn(load, &receiver)?;
            let mut stdout = io::stdout().lock();
            writeln!(stdout, "{}", burned.as_secs_f64())?;
            stdout.flush()?;
        }
    }
    Ok(())
}

/// Returns `None` for the end of a load.
fn parse(line: &str) -> Option<Load> {
    let (share, period) = line.split_once(' ')?;
    let share: f64 = share.parse().ok()?;
    let period = Duration::try_from_secs_f64(period.trim().parse().ok()?).ok()?;
    (!period.is_zero()).then_some(Load { share, period })
}

/// Burns until the next line. Returns the CPU time that was burned.
fn burn(load: Load, lines: &Receiver<Option<Load>>) -> Result<Duration> {
    let started_at = Instant::now();
    let used_before = cpu_time()?;
    let mut next = started_at;
    loop {
        next += load.period;
        let target = started_at.elapsed().mul_f64(load.share);
        while cpu_time()? - used_before < target {
            let spin_end = Instant::now() + Duration::from_micros(5);
            while Instant::now() < spin_end {
                std::hint::spin_loop();
            }
            if Instant::now() >= next {
                break;
            }
        }
        // A load that is late does not sleep, as a thread that has work does not.
        let left = next.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(_) | Err(RecvTimeoutError::Disconnected) => return Ok(cpu_time()? - used_before),
        }
    }
}

/// The CPU time of this thread.
fn cpu_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let times = [usage.user_time(), usage.system_time()];
    Ok(times.iter().fold(Duration::ZERO, |sum, time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        let micros = u64::try_from(time.tv_usec()).unwrap_or(0);
        sum + Duration::from_secs(seconds) + Duration::from_micros(micros)
    }))
}
