//! The back-ends: started on one CPU, and asked what they did.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::process::Proc;
use virtionet_tests::testpmd::{Testpmd, TestpmdConfig};

use super::load::{Cpus, ForwardingLoad, MEMORY_MIB};

const START: Duration = Duration::from_secs(10);

/// Which back-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackEndKind {
    /// virtionetd with the switch uplink.
    Ours,
    /// DPDK's vhost PMD, testpmd in `io` mode.
    Dpdk,
    /// `virtionet-plain`: vhost-user-backend and virtio-queue.
    Plain,
}

impl BackEndKind {
    /// Its name in the results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "virtionetd",
            Self::Dpdk => "DPDK vhost PMD",
            Self::Plain => "vhost-user-backend",
        }
    }
}

/// How our workers wait for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerPollMode {
    /// They never sleep, as the peer's do.
    Always,
    /// They sleep when there is nothing for a while.
    Adaptive,
}

/// A running back-end.
#[derive(Debug)]
pub(super) enum BackEnd {
    Ours(Daemon),
    Dpdk(Testpmd),
    Plain(Proc),
}

/// What a back-end says of its own work.
#[derive(Debug, Clone, Copy)]
pub(super) struct BusyCycles {
    pub(super) cycles: u64,
    pub(super) frames: u64,
}

impl BusyCycles {
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            cycles: self.cycles.saturating_sub(before.cycles),
            frames: self.frames.saturating_sub(before.frames),
        }
    }
}

impl BackEnd {
    /// Starts one on sockets of its own and waits until it listens.
    pub(super) fn start(
        kind: BackEndKind,
        dir: &RunDir,
        sockets: &[PathBuf],
        load: ForwardingLoad,
        poll: WorkerPollMode,
        cpus: Cpus,
    ) -> Result<Self> {
        let mut back = match kind {
            BackEndKind::Ours => Self::Ours(ours(dir, sockets, load, poll, cpus.back)?),
            BackEndKind::Dpdk => Self::Dpdk(dpdk(dir, sockets, load, cpus)?),
            BackEndKind::Plain => Self::Plain(plain(dir, sockets, load, cpus.back)?),
        };
        back.wait_for(sockets)?;
        Ok(back)
    }

    pub(super) fn proc(&mut self) -> &mut Proc {
        match self {
            Self::Ours(daemon) => daemon.proc(),
            Self::Dpdk(testpmd) => testpmd.proc(),
            Self::Plain(proc) => proc,
        }
    }

    /// Its work so far, where it tells.
    pub(super) fn busy(&mut self) -> Result<Option<BusyCycles>> {
        match self {
            Self::Ours(daemon) => parse_busy_cycles(&daemon.get("/v1/devices")?),
            Self::Dpdk(testpmd) => {
                let all = testpmd.forwarded()?;
                Ok(Some(BusyCycles {
                    cycles: all.busy_cycles,
                    frames: all.rx_packets,
                }))
            }
            Self::Plain(_) => Ok(None),
        }
    }

    /// Frames that it dropped, by counter.
    pub(super) fn lost(&mut self) -> Result<BTreeMap<String, u64>> {
        match self {
            Self::Ours(daemon) => parse_drops(&daemon.get("/v1/devices")?),
            Self::Dpdk(testpmd) => {
                let dropped = testpmd.forwarded()?.tx_dropped;
                Ok(BTreeMap::from([("tx_dropped".to_owned(), dropped)]))
            }
            Self::Plain(_) => Ok(BTreeMap::new()),
        }
        .map(|mut lost| {
            lost.retain(|_, count| *count > 0);
            lost
        })
    }

    fn wait_for(&mut self, sockets: &[PathBuf]) -> Result<()> {
        let until = Instant::now() + START;
        while !sockets.iter().all(|socket| socket.exists()) {
            self.proc().check_alive()?;
            ensure!(Instant::now() < until, "the back-end opens no sockets");
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// The sums over all pairs of all devices.
fn parse_busy_cycles(report: &Value) -> Result<Option<BusyCycles>> {
    let mut busy = BusyCycles {
        cycles: 0,
        frames: 0,
    };
    for device in report["devices"].as_array().context("no devices")? {
        for pair in device["pairs"].as_array().context("no pairs")? {
            let cycles = pair["worker_counters"]["busy_cycles"].as_u64();
            let frames = pair["tx"]["counters"]["frames"].as_u64();
            busy.cycles += cycles.with_context(|| format!("no busy_cycles in {pair}"))?;
            busy.frames += frames.with_context(|| format!("no frames in {pair}"))?;
        }
    }
    Ok(Some(busy))
}

/// The sums of all counters of dropped frames.
fn parse_drops(report: &Value) -> Result<BTreeMap<String, u64>> {
    let mut lost = BTreeMap::new();
    for device in report["devices"].as_array().context("no devices")? {
        for pair in device["pairs"].as_array().context("no pairs")? {
            for ring in ["rx", "tx"] {
                let counters = pair[ring]["counters"].as_object();
                for (name, value) in counters.context("no counters")? {
                    if name.starts_with("dropped_") {
                        *lost.entry(name.clone()).or_default() += value.as_u64().unwrap_or(0);
                    }
                }
            }
        }
    }
    Ok(lost)
}

fn ours(
    dir: &RunDir,
    sockets: &[PathBuf],
    load: ForwardingLoad,
    poll: WorkerPollMode,
    cpu: usize,
) -> Result<Daemon> {
    let poll = match poll {
        WorkerPollMode::Always => "always",
        WorkerPollMode::Adaptive => "adaptive",
    };
    let mut options = Options::new().no_socket();
    for (n, socket) in sockets.iter().enumerate() {
        let device = format!(
            "name=card{n},socket-path={},queues={},uplink=switch:couple{},placement=list:{cpu},poll={poll}",
            socket.display(),
            load.queue_pairs_per_device(),
            n / 2
        );
        options = options.flag("--device", device);
    }
    options.start(dir, "virtionetd").context("virtionetd")
}

fn dpdk(dir: &RunDir, sockets: &[PathBuf], load: ForwardingLoad, cpus: Cpus) -> Result<Testpmd> {
    let mut testpmd = TestpmdConfig::back_end(sockets, load.queue_pairs_per_device(), cpus.back)
        .main_cpu(cpus.front)
        .memory(MEMORY_MIB, load.mbufs())
        .start(dir, "back")
        .context("DPDK's back-end")?;
    testpmd.command("set fwd io")?;
    testpmd.forward(0)?;
    Ok(testpmd)
}

fn plain(dir: &RunDir, sockets: &[PathBuf], load: ForwardingLoad, cpu: usize) -> Result<Proc> {
    let me = std::env::current_exe().context("this program's own path is unknown")?;
    let program = me.with_file_name("virtionet-plain");
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
    fn work_is_summed_over_devices_and_pairs() {
        let pair = |cycles: u64, frames: u64| json!({"worker_counters": {"busy_cycles": cycles}, "tx": {"counters": {"frames": frames}}});
        let report =
            json!({"devices": [{"pairs": [pair(1, 10), pair(2, 20)]}, {"pairs": [pair(4, 40)]}]});
        let busy = parse_busy_cycles(&report).unwrap().unwrap();
        assert_eq!((busy.cycles, busy.frames), (7, 70));
        let old = json!({"devices": [{"pairs": [{"worker_counters": {}}]}]});
        let words = format!("{:#}", parse_busy_cycles(&old).unwrap_err());
        assert!(words.contains("busy_cycles"), "{words}");
    }

    #[test]
    fn losses_are_summed_by_counter() {
        let pair = json!({
            "rx": {"counters": {"frames": 9, "dropped_no_buffer": 2}},
            "tx": {"counters": {"frames": 9, "dropped_disabled": 1}}
        });
        let lost = parse_drops(&json!({"devices": [{"pairs": [pair, pair]}]})).unwrap();
        assert_eq!(lost["dropped_no_buffer"], 4);
        assert_eq!((lost["dropped_disabled"], lost.len()), (2, 2));
    }
}
