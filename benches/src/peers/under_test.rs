//! One side of a comparison: a back-end on one CPU, and DPDK's testpmd as its front-end on another.
//! The back-end forwards frames between the two network devices of a pair; there may be several
//! such pairs. Both sides of a comparison exist at the same time, and the one that is not measured
//! is halted by a signal.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtionet_tests::paths::RunDir;
use virtionet_tests::sched::threads;
use virtionet_tests::testpmd::{ForwardStats, Testpmd, TestpmdConfig, VirtioUser};

use super::back_end::{BackEnd, BackEndKind, WorkerPollMode};
use super::load::{Cpus, ForwardingLoad, MEMORY_MIB, QUEUE_SIZE, TrafficPattern};

/// Frames in a burst of testpmd.
const BURST: u32 = 32;
/// Time after a change until both programs are in their steady state.
const STABILIZATION_TIME: Duration = Duration::from_millis(100);

/// The figures of one interval.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ForwardingSample {
    /// Frames per second through the back-end in both directions together, counted by the
    /// front-end.
    pub rate: f64,
    /// Busy cycles per frame in the back-end, if it reports them.
    pub cycles: Option<f64>,
    /// Busy cycles per frame in the front-end.
    pub front_end_cycles: f64,
    /// The load of the front-end in per cent of its CPU, if it reports the clock of the CPU.
    pub front_end_busy: Option<f64>,
}

/// The number of frames that circulated at the start and at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameBalance {
    /// Frames that were put into circulation.
    pub sent: u64,
    /// Frames that still circulated at the end.
    pub remaining: u64,
    /// The counters of dropped frames that the programs report.
    pub drops: BTreeMap<String, u64>,
}

/// A back-end with its front-end.
#[derive(Debug)]
pub struct BackEndUnderTest {
    load: ForwardingLoad,
    front_end: Testpmd,
    back_end: BackEnd,
    dir: RunDir,
}

/// Number of huge pages that two sides need together. At most one of them has testpmd as its
/// back-end.
#[must_use]
pub fn required_huge_pages() -> u64 {
    let config = TestpmdConfig::front_end(&[], 0).memory(MEMORY_MIB, 0);
    config.pages() * 3
}

impl BackEndUnderTest {
    /// Starts the back-end, the front-end and the load, and then halts both programs.
    ///
    /// # Errors
    /// When a program is missing, or the connection fails. The error contains the messages of the
    /// programs.
    pub fn start(kind: BackEndKind, load: ForwardingLoad, poll: WorkerPollMode) -> Result<Self> {
        let cpus = Cpus::get()?;
        let dir = RunDir::new()?;
        let sockets = load.sockets(&dir);
        let back_end = BackEnd::start(kind, &dir, &sockets, load, poll, cpus)?;
        let front_end = start_front_end(&dir, &sockets, load, cpus.front_end)
            .with_context(|| format!("the front-end of {}", kind.name()))?;
        let mut side = Self {
            load,
            front_end,
            back_end,
            dir,
        };
        side.start_traffic()?;
        side.set_halted(true)?;
        Ok(side)
    }

    fn start_traffic(&mut self) -> Result<()> {
        self.front_end
            .command(&format!("set txpkts {}", self.load.frame_len))?;
        match self.load.traffic {
            TrafficPattern::Forward => {
                self.front_end.command("set fwd io")?;
                self.front_end.forward(self.load.bursts)
            }
            TrafficPattern::OneWay => {
                self.front_end.command("set fwd txonly")?;
                self.front_end.forward(0)
            }
        }
    }

    /// Halts both programs, or lets them continue.
    ///
    /// # Errors
    /// When a program has ended.
    pub fn set_halted(&mut self, is_halted: bool) -> Result<()> {
        self.front_end.halt(is_halted)?;
        let signal = match is_halted {
            true => Signal::SIGSTOP,
            false => Signal::SIGCONT,
        };
        self.back_end.proc().signal(signal)
    }

    /// Lets both programs run for `interval` and returns its figures.
    ///
    /// # Errors
    /// When a program ends or does not answer.
    pub fn measure(&mut self, interval: Duration) -> Result<ForwardingSample> {
        self.set_halted(false)?;
        sleep(STABILIZATION_TIME);
        let busy_before = self.back_end.busy_cycles()?;
        let front_end_before = self.front_end.forwarded()?;
        let started_at = Instant::now();
        // testpmd computes the rates itself, over the time since the previous call.
        self.front_end.port_stats()?;
        sleep(interval);
        let ports = self.front_end.port_stats()?;
        let front_end = self.front_end.forwarded()?.since(front_end_before);
        let duration = started_at.elapsed();
        let busy = match (busy_before, self.back_end.busy_cycles()?) {
            (Some(before), Some(after)) => Some(after.since(before)),
            _ => None,
        };
        self.set_halted(true)?;
        let is_one_way = self.load.traffic == TrafficPattern::OneWay;
        let rate: u64 = match is_one_way {
            true => ports.iter().map(|port| port.tx_pps).sum(),
            false => ports.iter().map(|port| port.rx_pps).sum(),
        };
        let frames = match is_one_way {
            true => front_end.tx_packets,
            false => front_end.rx_packets,
        };
        ensure!(
            rate > 0 && frames > 0,
            "no frames are forwarded ({:?}); ports of the front-end: {ports:?}; its stderr: {}",
            self.load,
            self.front_end.proc().stderr().trim()
        );
        if let Some(busy) = busy {
            // The two counts do not start and end at the same time, and the virtqueues hold frames.
            let in_flight = u64::from(self.load.queue_pairs) * u64::from(QUEUE_SIZE) * 4;
            ensure!(
                busy.frames + in_flight >= frames,
                "the back-end counts {} frames where the front-end counts {frames}",
                busy.frames
            );
        }
        Ok(ForwardingSample {
            rate: to_f64(rate),
            cycles: busy.map(|busy| to_f64(busy.cycles) / to_f64(busy.frames)),
            front_end_cycles: to_f64(front_end.busy_cycles) / to_f64(frames),
            front_end_busy: busy_percent(front_end, duration),
        })
    }

    /// Ends the circulation and counts the remaining frames: the front-end receives all frames and
    /// does not send any more.
    ///
    /// # Errors
    /// When a program ends or does not answer.
    pub fn frame_balance(mut self) -> Result<FrameBalance> {
        self.set_halted(false)?;
        self.front_end.command("stop")?;
        sleep(STABILIZATION_TIME);
        self.front_end.command("set fwd rxonly")?;
        let received = |front_end: &mut Testpmd| -> Result<u64> {
            Ok(front_end
                .port_stats()?
                .iter()
                .map(|port| port.rx_packets)
                .sum())
        };
        let mut drops = self.back_end.drops()?;
        let dropped = self.front_end.forwarded()?.tx_dropped;
        if dropped > 0 {
            drops.insert("front-end's tx_dropped".to_owned(), dropped);
        }
        let before = received(&mut self.front_end)?;
        self.front_end.forward(0)?;
        sleep(STABILIZATION_TIME);
        let remaining = received(&mut self.front_end)? - before;
        let queues = 2 * u64::from(self.load.queue_pairs);
        Ok(FrameBalance {
            sent: queues * u64::from(self.load.bursts * BURST),
            remaining,
            drops,
        })
    }

    /// Returns the CPU time of the back-end in an interval that begins 100 ms after the last frame.
    ///
    /// # Errors
    /// When a program ends or does not answer.
    pub fn idle_cpu_time(mut self, interval: Duration) -> Result<Duration> {
        self.set_halted(false)?;
        sleep(STABILIZATION_TIME);
        self.front_end.command("stop")?;
        sleep(Duration::from_millis(100));
        let pid = self.back_end.proc().pid();
        let before = cpu_time(pid)?;
        sleep(interval);
        Ok(cpu_time(pid)?.saturating_sub(before))
    }

    /// The directory of the sockets and logs.
    #[must_use]
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }
}

fn start_front_end(
    dir: &RunDir,
    sockets: &[PathBuf],
    load: ForwardingLoad,
    cpu: usize,
) -> Result<Testpmd> {
    let device = |(n, socket): (usize, &PathBuf)| VirtioUser {
        queues: load.queue_pairs_per_device(),
        queue_size: QUEUE_SIZE,
        packed: load.is_packed,
        ..VirtioUser::new(socket, &mac(n))
    };
    let devices: Vec<VirtioUser> = sockets.iter().enumerate().map(device).collect();
    let mut config = TestpmdConfig::front_end(&devices, cpu)
        .memory(MEMORY_MIB, load.mbufs())
        .arg("--txonly-multi-flow");
    for n in 0..devices.len() {
        // A switch forwards each frame by its destination address.
        config = config.arg(format!("--eth-peer={n},{}", mac(n ^ 1)));
    }
    config.start(dir, "front")
}

/// Returns the percentage of the time in which a testpmd processed frames.
fn busy_percent(stats: ForwardStats, duration: Duration) -> Option<f64> {
    let cycles = to_f64(stats.clock_mhz?) * 1e6 * duration.as_secs_f64();
    (cycles > 0.0).then(|| 100.0 * to_f64(stats.busy_cycles) / cycles)
}

/// Returns the MAC address of network device n.
fn mac(n: usize) -> String {
    format!("02:00:00:00:00:{n:02x}")
}

/// Returns the CPU time of all running threads of a process (proc_pid_schedstat: nanoseconds on a
/// CPU).
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for (tid, _) in threads(pid)? {
        // A thread may have ended since it was listed.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")) else {
            continue;
        };
        let first = text.split(' ').next().and_then(|word| word.parse().ok());
        sum += first.unwrap_or(0_u64);
    }
    Ok(Duration::from_nanos(sum))
}

/// Converts a counter. The result is exact, because counters are far below 2^53.
fn to_f64(count: u64) -> f64 {
    let [high, low] = [count >> 32, count & 0xffff_ffff];
    let part = |part: u64| u32::try_from(part).map_or(0.0, f64::from);
    part(high) * 4_294_967_296.0 + part(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_busy_cycles_over_the_clock_or_absent_without_clock() {
        let mut stats = ForwardStats {
            busy_cycles: 1_300_000_000,
            clock_mhz: Some(2600),
            ..ForwardStats::default()
        };
        let percent = busy_percent(stats, Duration::from_secs(1)).unwrap();
        assert!((percent - 50.0).abs() < 1e-9, "{percent}");
        assert_eq!(busy_percent(stats, Duration::ZERO), None);
        stats.clock_mhz = None;
        assert_eq!(busy_percent(stats, Duration::from_secs(1)), None);
    }

    #[test]
    fn large_counters_are_converted_exactly() {
        assert_eq!(to_f64(3), 3.0);
        assert_eq!(to_f64(5_323_090_622), 5_323_090_622.0);
    }

    #[test]
    fn cpu_time_of_this_process_increases() {
        let pid = std::process::id();
        let before = cpu_time(pid).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while cpu_time(pid).unwrap() < before + Duration::from_millis(1) {
            assert!(Instant::now() < deadline);
        }
    }
}
