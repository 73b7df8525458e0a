//! One side of a comparison: a back-end on one CPU, and DPDK's testpmd on another, which drives two
//! cards that the back-end joins, or several such couples. Both sides stand at once; the one that is
//! not measured is halted.

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
use super::load::{Cpus, ForwardingLoad, MEMORY_MIB, RING, TrafficPattern};

/// Frames in a burst of testpmd's.
const BURST: u32 = 32;
/// After a halt, until both programs run as before.
const SETTLE: Duration = Duration::from_millis(100);

/// What an interval showed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ForwardingSample {
    /// Frames a second through the back-end, both directions together, as the front-end counts.
    pub rate: f64,
    /// Busy cycles a frame in the back-end, where it tells.
    pub cycles: Option<f64>,
    /// Busy cycles a frame in the front-end.
    pub front_cycles: f64,
    /// The front-end's busy share of its CPU in per cent, where it reports its clock.
    pub front_busy: Option<f64>,
}

/// What became of the frames in circulation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameBalance {
    /// Frames put into circulation.
    pub sent: u64,
    /// Frames that still circulated at the end.
    pub left: u64,
    /// Where others were lost, as far as a program says: the counter and its value.
    pub lost: BTreeMap<String, u64>,
}

/// A back-end and its front-end.
#[derive(Debug)]
pub struct BackEndUnderTest {
    load: ForwardingLoad,
    front: Testpmd,
    back: BackEnd,
    dir: RunDir,
}

/// Huge pages that two sides take together, and no more than one of them with testpmd as its
/// back-end.
#[must_use]
pub fn pages() -> u64 {
    let config = TestpmdConfig::front_end(&[], 0).memory(MEMORY_MIB, 0);
    config.pages() * 3
}

impl BackEndUnderTest {
    /// Starts both, and the load, and halts them.
    ///
    /// # Errors
    /// When a program is missing or the two do not get on: with their words.
    pub fn start(kind: BackEndKind, load: ForwardingLoad, poll: WorkerPollMode) -> Result<Self> {
        let cpus = Cpus::get()?;
        let dir = RunDir::new()?;
        let sockets = load.sockets(&dir);
        let back = BackEnd::start(kind, &dir, &sockets, load, poll, cpus)?;
        let front = front_end(&dir, &sockets, load, cpus.front)
            .with_context(|| format!("the front-end of {}", kind.name()))?;
        let mut side = Self {
            load,
            front,
            back,
            dir,
        };
        side.begin()?;
        side.halt(true)?;
        Ok(side)
    }

    fn begin(&mut self) -> Result<()> {
        self.front
            .command(&format!("set txpkts {}", self.load.size))?;
        match self.load.traffic {
            TrafficPattern::Forward => {
                self.front.command("set fwd io")?;
                self.front.forward(self.load.bursts)
            }
            TrafficPattern::OneWay => {
                self.front.command("set fwd txonly")?;
                self.front.forward(0)
            }
        }
    }

    /// Halts both programs, or lets them go on.
    ///
    /// # Errors
    /// When one has ended.
    pub fn halt(&mut self, halted: bool) -> Result<()> {
        self.front.halt(halted)?;
        let signal = match halted {
            true => Signal::SIGSTOP,
            false => Signal::SIGCONT,
        };
        self.back.proc().signal(signal)
    }

    /// Lets the side run for `interval` and says what it did.
    ///
    /// # Errors
    /// When a program ends or does not answer.
    pub fn measure(&mut self, interval: Duration) -> Result<ForwardingSample> {
        self.halt(false)?;
        sleep(SETTLE);
        let busy = self.back.busy()?;
        let front = self.front.forwarded()?;
        let started_at = Instant::now();
        // The rates are testpmd's own, from one look to the next.
        self.front.port_stats()?;
        sleep(interval);
        let ports = self.front.port_stats()?;
        let front = self.front.forwarded()?.since(front);
        let lasted = started_at.elapsed();
        let busy = match (busy, self.back.busy()?) {
            (Some(before), Some(after)) => Some(after.since(before)),
            _ => None,
        };
        self.halt(true)?;
        let one_way = self.load.traffic == TrafficPattern::OneWay;
        let rate: u64 = match one_way {
            true => ports.iter().map(|port| port.tx_pps).sum(),
            false => ports.iter().map(|port| port.rx_pps).sum(),
        };
        let frames = match one_way {
            true => front.tx_packets,
            false => front.rx_packets,
        };
        ensure!(
            rate > 0 && frames > 0,
            "no frames pass ({:?}); the front-end's ports: {ports:?}; its stderr: {}",
            self.load,
            self.front.proc().stderr().trim()
        );
        if let Some(busy) = busy {
            // Its interval is around the front-end's, and the rings hold some at either end.
            let with_bound = u64::from(self.load.pairs) * u64::from(RING) * 4;
            ensure!(
                busy.frames + with_bound >= frames,
                "the back-end counts {} frames where the front-end counts {frames}",
                busy.frames
            );
        }
        Ok(ForwardingSample {
            rate: float(rate),
            cycles: busy.map(|busy| float(busy.cycles) / float(busy.frames)),
            front_cycles: float(front.busy_cycles) / float(frames),
            front_busy: busy_percent(front, lasted),
        })
    }

    /// Ends the circulation and counts what is left of it: the front-end takes everything in and
    /// sends nothing more.
    ///
    /// # Errors
    /// When a program ends or does not answer.
    pub fn frame_balance(mut self) -> Result<FrameBalance> {
        self.halt(false)?;
        self.front.command("stop")?;
        sleep(SETTLE);
        self.front.command("set fwd rxonly")?;
        let taken = |front: &mut Testpmd| -> Result<u64> {
            Ok(front.port_stats()?.iter().map(|port| port.rx_packets).sum())
        };
        let mut lost = self.back.lost()?;
        let dropped = self.front.forwarded()?.tx_dropped;
        if dropped > 0 {
            lost.insert("front-end's tx_dropped".to_owned(), dropped);
        }
        let before = taken(&mut self.front)?;
        self.front.forward(0)?;
        sleep(SETTLE);
        let left = taken(&mut self.front)? - before;
        let queues = 2 * u64::from(self.load.pairs);
        Ok(FrameBalance {
            sent: queues * u64::from(self.load.bursts * BURST),
            left,
            lost,
        })
    }

    /// CPU time of the back-end over `interval`, which begins 100 ms after the last frame.
    ///
    /// # Errors
    /// When a program ends or does not answer.
    pub fn idle(mut self, interval: Duration) -> Result<Duration> {
        self.halt(false)?;
        sleep(SETTLE);
        self.front.command("stop")?;
        sleep(Duration::from_millis(100));
        let pid = self.back.proc().pid();
        let before = cpu_time(pid)?;
        sleep(interval);
        Ok(cpu_time(pid)?.saturating_sub(before))
    }

    /// Where its sockets and logs are.
    #[must_use]
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }
}

fn front_end(
    dir: &RunDir,
    sockets: &[PathBuf],
    load: ForwardingLoad,
    cpu: usize,
) -> Result<Testpmd> {
    let card = |(n, socket): (usize, &PathBuf)| VirtioUser {
        queues: load.queue_pairs_per_device(),
        queue_size: RING,
        packed: load.packed,
        ..VirtioUser::new(socket, &mac(n))
    };
    let cards: Vec<VirtioUser> = sockets.iter().enumerate().map(card).collect();
    let mut config = TestpmdConfig::front_end(&cards, cpu)
        .memory(MEMORY_MIB, load.mbufs())
        .arg("--txonly-multi-flow");
    for n in 0..cards.len() {
        // A switch knows where each frame is to go.
        config = config.arg(format!("--eth-peer={n},{}", mac(n ^ 1)));
    }
    config.start(dir, "front")
}

/// The share of the time in which a testpmd's CPU worked on frames.
fn busy_percent(stats: ForwardStats, lasted: Duration) -> Option<f64> {
    let cycles = float(stats.clock_mhz?) * 1e6 * lasted.as_secs_f64();
    (cycles > 0.0).then(|| 100.0 * float(stats.busy_cycles) / cycles)
}

/// The MAC of card n.
fn mac(n: usize) -> String {
    format!("02:00:00:00:00:{n:02x}")
}

/// CPU time of all threads of a process that live (proc_pid_schedstat: nanoseconds on a CPU).
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for (tid, _) in threads(pid)? {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat"))?;
        let first = text.split(' ').next().and_then(|word| word.parse().ok());
        sum += first.unwrap_or(0_u64);
    }
    Ok(Duration::from_nanos(sum))
}

/// Counters stay far below 2^53.
fn float(count: u64) -> f64 {
    let [high, low] = [count >> 32, count & 0xffff_ffff];
    let part = |part: u64| u32::try_from(part).map_or(0.0, f64::from);
    part(high) * 4_294_967_296.0 + part(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_share_is_busy_cycles_over_the_clock_or_absent_without_one() {
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
    fn large_counts_keep_their_size() {
        assert_eq!(float(3), 3.0);
        assert_eq!(float(5_323_090_622), 5_323_090_622.0);
    }

    #[test]
    fn the_time_of_this_process_grows() {
        let me = std::process::id();
        let before = cpu_time(me).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while cpu_time(me).unwrap() < before + Duration::from_millis(1) {
            assert!(Instant::now() < until);
        }
    }
}
