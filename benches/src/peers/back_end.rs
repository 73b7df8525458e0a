//! Starts the back-ends on one CPU and reads their counters.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::process::Proc;
use virtionet_tests::testpmd::{Testpmd, TestpmdConfig};

use super::load::{Cpus, ForwardingLoad, MEMORY_MIB};
use crate::harness::OTHER_BUILD;

const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The kind of a back-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackEndKind {
    /// virtionetd with the switch uplink, and one worker for all queue pairs.
    Ours,
    /// The same with a worker for each queue pair.
    OursPerPair,
    /// Another build of virtionetd, which is this program, with a worker for each queue pair.
    OtherBuild(&'static Path),
    /// DPDK's vhost PMD, testpmd in `io` mode.
    Dpdk,
    /// `virtionet-plain`: vhost-user-backend and virtio-queue.
    Plain,
}

impl BackEndKind {
    /// Whether it counts its busy cycles.
    #[must_use]
    pub fn has_busy_cycles(self) -> bool {
        self != Self::Plain
    }

    /// Returns the name in the results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours | Self::OursPerPair => "virtionetd",
            Self::OtherBuild(_) => OTHER_BUILD,
            Self::Dpdk => "DPDK vhost PMD",
            Self::Plain => "vhost-user-backend",
        }
    }
}

/// How our workers wait for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerPollMode {
    /// They sleep until they are kicked.
    Off,
    /// They always busy-poll, as the peer does.
    Always,
    /// They busy-poll, and sleep after some time without frames.
    Adaptive,
}

/// A running back-end.
#[derive(Debug)]
pub(crate) enum BackEnd {
    Ours(Daemon),
    Dpdk(Testpmd),
    Plain(Proc),
}

/// The counters that a back-end reports about its work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BusyCycles {
    pub(crate) cycles: u64,
    pub(crate) frames: u64,
}

impl BusyCycles {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            cycles: self.cycles.saturating_sub(before.cycles),
            frames: self.frames.saturating_sub(before.frames),
        }
    }
}

impl BackEnd {
    /// Starts a back-end and waits until its sockets exist.
    pub(crate) fn start(
        kind: BackEndKind,
        dir: &RunDir,
        sockets: &[PathBuf],
        load: ForwardingLoad,
        poll: WorkerPollMode,
        cpus: Cpus,
    ) -> Result<Self> {
        let mut back_end = match kind {
            BackEndKind::Ours => {
                let options = Options::new().flag("--workers", format!("list:{}", cpus.back_end));
                Self::Ours(start_ours(options, dir, sockets, load, poll, None)?)
            }
            BackEndKind::OursPerPair => {
                let options = Options::new();
                let cpu = Some(cpus.back_end);
                Self::Ours(start_ours(options, dir, sockets, load, poll, cpu)?)
            }
            BackEndKind::OtherBuild(program) => {
                let options = Options::new().program(program);
                let cpu = Some(cpus.back_end);
                Self::Ours(start_ours(options, dir, sockets, load, poll, cpu)?)
            }
            BackEndKind::Dpdk => Self::Dpdk(start_dpdk(dir, sockets, load, cpus)?),
            BackEndKind::Plain => Self::Plain(start_plain(dir, sockets, load, cpus.back_end)?),
        };
        back_end.wait_for_sockets(sockets)?;
        Ok(back_end)
    }

    pub(crate) fn proc(&mut self) -> &mut Proc {
        match self {
            Self::Ours(daemon) => daemon.proc(),
            Self::Dpdk(testpmd) => testpmd.proc(),
            Self::Plain(proc) => proc,
        }
    }

    /// Returns the work so far, if the back-end reports it.
    pub(crate) fn busy_cycles(&mut self) -> Result<Option<BusyCycles>> {
        match self {
            Self::Ours(daemon) => parse_busy_cycles(&daemon.get("/v1/devices")?),
            Self::Dpdk(testpmd) => {
                let stats = testpmd.forwarded()?;
                Ok(Some(BusyCycles {
                    cycles: stats.busy_cycles,
                    frames: stats.rx_packets,
                }))
            }
            Self::Plain(_) => Ok(None),
        }
    }

    /// Returns the counters of dropped frames that are not 0.
    pub(crate) fn drops(&mut self) -> Result<BTreeMap<String, u64>> {
        match self {
            Self::Ours(daemon) => parse_drops(&daemon.get("/v1/devices")?),
            Self::Dpdk(testpmd) => {
                let dropped = testpmd.forwarded()?.tx_dropped;
                Ok(BTreeMap::from([("tx_dropped".to_owned(), dropped)]))
            }
            Self::Plain(_) => Ok(BTreeMap::new()),
        }
        .map(|mut drops| {
            drops.retain(|_, count| *count > 0);
            drops
        })
    }

    fn wait_for_sockets(&mut self, sockets: &[PathBuf]) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while !sockets.iter().all(|socket| socket.exists()) {
            self.proc().check_alive()?;
            ensure!(
                Instant::now() < deadline,
                "the back-end has not created its sockets after {START_TIMEOUT:?}"
            );
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// The queue pairs of all devices.
fn queue_pairs(report: &Value) -> Result<Vec<&Value>> {
    let devices = report["devices"].as_array();
    let mut all = Vec::new();
    for device in devices.context("the report has no devices")? {
        let pairs = device["pairs"].as_array();
        all.extend(pairs.context("a device has no queue pairs")?);
    }
    Ok(all)
}

/// Sums the counters of all queue pairs of all devices.
fn parse_busy_cycles(report: &Value) -> Result<Option<BusyCycles>> {
    let mut busy = BusyCycles {
        cycles: 0,
        frames: 0,
    };
    for pair in queue_pairs(report)? {
        let cycles = pair["worker_counters"]["busy_cycles"].as_u64();
        let frames = pair["tx"]["counters"]["frames"].as_u64();
        busy.cycles +=
            cycles.with_context(|| format!("the counter busy_cycles is missing in {pair}"))?;
        busy.frames +=
            frames.with_context(|| format!("the counter frames is missing in {pair}"))?;
    }
    Ok(Some(busy))
}

/// Sums each counter of dropped frames over all vrings of all devices.
fn parse_drops(report: &Value) -> Result<BTreeMap<String, u64>> {
    let mut drops = BTreeMap::new();
    for pair in queue_pairs(report)? {
        for vring in ["rx", "tx"] {
            let counters = pair[vring]["counters"].as_object();
            for (name, value) in counters.context("a vring has no counters")? {
                if name.starts_with("dropped_") {
                    *drops.entry(name.clone()).or_default() += value.as_u64().unwrap_or(0);
                }
            }
        }
    }
    Ok(drops)
}

/// With `worker_cpu`, the workers of all queue pairs run on that CPU.
fn start_ours(
    options: Options,
    dir: &RunDir,
    sockets: &[PathBuf],
    load: ForwardingLoad,
    poll: WorkerPollMode,
    worker_cpu: Option<usize>,
) -> Result<Daemon> {
    let poll = match poll {
        WorkerPollMode::Off => "off",
        WorkerPollMode::Always => "always",
        WorkerPollMode::Adaptive => "adaptive",
    };
    let placement = worker_cpu.map_or(String::new(), |cpu| format!(",placement=list:{cpu}"));
    let mut options = options.no_socket();
    for (n, socket) in sockets.iter().enumerate() {
        let device = format!(
            "name=device{n},socket-path={},queues={},uplink=switch:pair{},poll={poll}{placement}",
            socket.display(),
            load.queue_pairs_per_device(),
            n / 2
        );
        options = options.flag("--device", device);
    }
    options.start(dir, "virtionetd").context("virtionetd")
}

fn start_dpdk(
    dir: &RunDir,
    sockets: &[PathBuf],
    load: ForwardingLoad,
    cpus: Cpus,
) -> Result<Testpmd> {
    let mut testpmd =
        TestpmdConfig::back_end(sockets, load.queue_pairs_per_device(), cpus.back_end)
            .main_cpu(cpus.front_end)
            .memory(MEMORY_MIB, load.mbufs())
            .start(dir, "back")
            .context("the back-end of DPDK")?;
    testpmd.command("set fwd io")?;
    testpmd.forward(0)?;
    Ok(testpmd)
}

fn start_plain(
    dir: &RunDir,
    sockets: &[PathBuf],
    load: ForwardingLoad,
    cpu: usize,
) -> Result<Proc> {
    let this_program = std::env::current_exe().context("the path of this program is unknown")?;
    let program = this_program.with_file_name("virtionet-plain");
    let mut args = vec![
        cpu.to_string().into(),
        load.queue_pairs_per_device().to_string().into(),
    ];
    args.extend(sockets.iter().map(|socket| socket.clone().into_os_string()));
    Proc::spawn(dir, "plain", None, program, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn busy_cycles_are_summed_over_devices_and_queue_pairs() {
        let pair = |cycles: u64, frames: u64| json!({"worker_counters": {"busy_cycles": cycles}, "tx": {"counters": {"frames": frames}}});
        let report =
            json!({"devices": [{"pairs": [pair(1, 10), pair(2, 20)]}, {"pairs": [pair(4, 40)]}]});
        let busy = parse_busy_cycles(&report).unwrap().unwrap();
        assert_eq!((busy.cycles, busy.frames), (7, 70));
        let without_cycles = json!({"devices": [{"pairs": [{"worker_counters": {}}]}]});
        let message = format!("{:#}", parse_busy_cycles(&without_cycles).unwrap_err());
        assert!(message.contains("busy_cycles"), "{message}");
    }

    #[test]
    fn drops_are_summed_by_counter() {
        let pair = json!({
            "rx": {"counters": {"frames": 9, "dropped_no_buffer": 2}},
            "tx": {"counters": {"frames": 9, "dropped_disabled": 1}}
        });
        let drops = parse_drops(&json!({"devices": [{"pairs": [pair, pair]}]})).unwrap();
        assert_eq!(drops["dropped_no_buffer"], 4);
        assert_eq!((drops["dropped_disabled"], drops.len()), (2, 2));
    }
}
