//! Measures how much of a well-behaved device's throughput remains while another device of the same
//! daemon is attacked. Since an attack costs CPU time, which any neighbour on the same CPU would
//! miss, the peer is a run beside an unrelated process that takes the same CPU time.
//!
//! # Placement
//!
//! Two CPUs suffice. The whole daemon (workers of all devices, and the threads of the devices) runs
//! on the last CPU, and all drivers run on the first one:
//!
//! | CPU | with an attack | in the control run |
//! |---|---|---|
//! | first | well-behaved driver; hostile driver | well-behaved driver; `virtionet-load` |
//! | last | well-behaved workers; other threads | well-behaved workers; `virtionet-load` |
//!
//! The other threads are the worker and the thread of the attacked device.
//!
//! So the attack takes CPU time from the well-behaved device in two ways, and both have their
//! equivalent in the control run. For each pair of samples, the attack comes first. During it, the
//! CPU time on each CPU and the sleeps (voluntary context switches) are measured: of the hostile
//! driver's thread on the first CPU, and on the last one of the daemon without the well-behaved
//! workers. Then the attack rests, with its front-end connected, and `virtionet-load` takes the
//! same share of each CPU for the same time, in as many portions as the attack slept. All threads
//! have the same priority and policy.
//!
//! Where the attack has always work (a flood), its share is what the scheduler gives it, and so is
//! that of the control. The notes say both shares: a control that got less than the attack would
//! make the ratio too low, and the reverse.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::procfs::cpu_ticks;
use virtionet_tests::sched::{self, threads};

use crate::harness::{progress, run_in_thread};
use crate::outcome::{Better, GroupResult};
use crate::peers::load::Cpus;
use crate::sampling::{Effort, PairedSamples, median};
use attack::{Attack, AttackThread};
use control::{ControlLoad, CpuLoad};
use well_behaved::{Traffic, WellBehavedDriver};

pub mod attack;
pub mod control;
pub mod well_behaved;

/// The lowest acceptable ratio.
const BOUND: f64 = 0.95;
/// The time after a change until the load is steady.
const STABILIZATION_TIME: Duration = Duration::from_millis(100);
/// A clock tick of `/proc/PID/stat`.
const TICK: f64 = 0.01;
const MILLION: f64 = 1e6;

/// Measures each attack with each kind of traffic.
///
/// # Errors
/// When this process may use only one CPU, or a part of the testbed fails.
pub fn run(effort: Effort) -> Result<GroupResult> {
    // The affinity of the thread changes.
    run_in_thread(|| {
        let cpus = Cpus::get()?;
        let mut outcome = GroupResult::default();
        for traffic in Traffic::ALL {
            for attack in Attack::ALL {
                measure(traffic, attack, cpus, effort, &mut outcome)
                    .with_context(|| format!("{}, {}", traffic.name(), attack.name()))?;
            }
        }
        outcome.notes.push(
            "the peer is the same traffic while unrelated processes use as much CPU time on the same CPUs as the attack did; shares are medians, of the first and of the last CPU"
                .to_owned(),
        );
        Ok(outcome)
    })
}

fn measure(
    traffic: Traffic,
    attack: Attack,
    cpus: Cpus,
    effort: Effort,
    outcome: &mut GroupResult,
) -> Result<()> {
    let name = format!("{}, {}", traffic.name(), attack.name());
    let interval = effort.choose(Duration::from_secs(1), Duration::from_millis(400));
    let count = effort.choose(9, 5);
    let mut testbed = Testbed::start(traffic, attack, cpus)?;
    let mut samples = PairedSamples::default();
    let mut shares: [Vec<f64>; 4] = Default::default();
    for n in 0..=count {
        let (ours, loads) = testbed.measure_attacked(interval)?;
        let (peer, burned) = testbed.measure_control(interval, loads)?;
        // The first pair warms up the caches and is not counted.
        if n == 0 {
            continue;
        }
        progress(&format!(
            "isolation: {name}: {:.3} and {:.3} million frames per second",
            ours / MILLION,
            peer / MILLION
        ));
        samples.push(ours / MILLION, peer / MILLION);
        let [first, last] = loads.map(|load| load.share);
        for (list, share) in shares.iter_mut().zip([first, last, burned[0], burned[1]]) {
            list.push(100.0 * share);
        }
    }
    let [first, last, control_first, control_last] = shares.map(|list| median(&list));
    outcome.notes.push(format!(
        "{name}: the attack used {first:.0} % and {last:.0} % of the CPUs, the control {control_first:.0} % and {control_last:.0} %"
    ));
    let row = samples.row(&name, "Mframes/s", Better::Higher, "equal CPU load");
    outcome.rows.push(row.with_bound(BOUND));
    Ok(())
}

/// The daemon, the drivers of both sides, and the control.
struct Testbed {
    attack: AttackThread,
    driver: WellBehavedDriver,
    control: [ControlLoad; 2],
    daemon: Daemon,
    _dir: RunDir,
}

impl Testbed {
    fn start(traffic: Traffic, attack: Attack, cpus: Cpus) -> Result<Self> {
        let dir = RunDir::new()?;
        // The daemon inherits the affinity of the thread that starts it.
        sched::pin(0, cpus.back_end)?;
        let mut options = Options::new().no_socket();
        for (name, uplink) in [&[("attacked", "null")], traffic.devices()].concat() {
            let socket = dir.join(&format!("{name}.sock"));
            let device = format!(
                "name={name},socket-path={},uplink={uplink},placement=list:{}",
                socket.display(),
                cpus.back_end
            );
            options = options.flag("--device", device);
        }
        let daemon = options.start(&dir, "virtionetd")?;
        sched::pin(0, cpus.front_end)?;
        Ok(Self {
            driver: WellBehavedDriver::connect(traffic, &dir)?,
            attack: AttackThread::start(attack, &dir.join("attacked.sock"), cpus.front_end)?,
            control: [
                ControlLoad::spawn(cpus.front_end)?,
                ControlLoad::spawn(cpus.back_end)?,
            ],
            daemon,
            _dir: dir,
        })
    }

    /// Carries frames while the other device is attacked. Returns the rate, and the load of the
    /// attack on the first and on the last CPU.
    fn measure_attacked(&mut self, interval: Duration) -> Result<(f64, [CpuLoad; 2])> {
        self.attack.set_active(true);
        self.driver.carry_for(STABILIZATION_TIME)?;
        let before = self.read_times()?;
        let started_at = Instant::now();
        let rate = self.driver.carry_for(interval)?;
        let duration = started_at.elapsed().as_secs_f64();
        let after = self.read_times()?;
        self.attack.set_active(false);
        self.attack.check()?;
        sleep(STABILIZATION_TIME);
        let loads = [0, 1].map(|n: usize| CpuLoad {
            share: ((after[n].seconds - before[n].seconds) / duration).clamp(0.0, 1.0),
            sleeps: ((after[n].sleeps - before[n].sleeps) / duration).max(0.0),
        });
        Ok((rate, loads))
    }

    /// Carries frames beside a load of the same amount. Returns the rate, and the share that the
    /// load took of each CPU.
    fn measure_control(
        &mut self,
        interval: Duration,
        loads: [CpuLoad; 2],
    ) -> Result<(f64, [f64; 2])> {
        let started_at = Instant::now();
        for (control, load) in self.control.iter_mut().zip(loads) {
            control.start(load)?;
        }
        self.driver.carry_for(STABILIZATION_TIME)?;
        let rate = self.driver.carry_for(interval)?;
        let duration = started_at.elapsed().as_secs_f64();
        let [first, last] = &mut self.control;
        let burned = [first.stop()?, last.stop()?];
        sleep(STABILIZATION_TIME);
        Ok((rate, burned.map(|time| time.as_secs_f64() / duration)))
    }

    /// CPU time and sleeps of the attack so far, on the first and on the last CPU.
    fn read_times(&self) -> Result<[AttackTimes; 2]> {
        let pid = self.daemon.pid();
        let own = format!("/proc/self/task/{}", self.attack.tid());
        let driver = AttackTimes {
            seconds: read_cpu_seconds(&own)?,
            sleeps: read_sleeps(&own)?,
        };
        // A worker that has ended is part of the time of the process only.
        let ticks = u32::try_from(cpu_ticks(pid)?)?;
        let mut daemon = AttackTimes {
            seconds: f64::from(ticks) * TICK,
            sleeps: 0.0,
        };
        for (tid, name) in threads(pid)? {
            let task = format!("/proc/{pid}/task/{tid}");
            if name.starts_with("good") {
                daemon.seconds -= read_cpu_seconds(&task)?;
            } else if name.starts_with("attacked") {
                // A worker may end at any time.
                daemon.sleeps += read_sleeps(&task).unwrap_or(0.0);
            }
        }
        Ok([driver, daemon])
    }
}

/// What an attack has used of a CPU so far.
#[derive(Debug, Clone, Copy)]
struct AttackTimes {
    seconds: f64,
    sleeps: f64,
}

/// Returns the CPU time of a thread (proc_pid_schedstat: nanoseconds on a CPU).
fn read_cpu_seconds(task: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("{task}/schedstat"))?;
    let nanoseconds = text.split(' ').next().and_then(|word| word.parse().ok());
    let nanoseconds = nanoseconds.with_context(|| format!("{task} has no CPU time: {text:?}"))?;
    Ok(Duration::from_nanos(nanoseconds).as_secs_f64())
}

/// Returns how often a thread has slept.
fn read_sleeps(task: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("{task}/status"))?;
    let mut lines = text.lines();
    let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    let count: Option<u32> = count.and_then(|count| count.trim().parse().ok());
    count
        .map(f64::from)
        .with_context(|| format!("{task} has no number of context switches"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_and_sleeps_has_cpu_time_and_sleeps() {
        let task = "/proc/thread-self";
        let before = (read_cpu_seconds(task).unwrap(), read_sleeps(task).unwrap());
        let deadline = Instant::now() + Duration::from_secs(10);
        while read_cpu_seconds(task).unwrap() <= before.0 {
            assert!(Instant::now() < deadline);
        }
        sleep(Duration::from_millis(1));
        assert!(read_sleeps(task).unwrap() > before.1);
    }
}
