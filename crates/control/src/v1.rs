//! Version 1 of the API: the answer to `GET /v1/devices`. Data only, so that a client links nothing
//! of the daemon. Fields are added in later versions of the daemon and never removed.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Who can say how the devices are.
pub trait ReportSource: Send + Sync {
    /// The state of every device now.
    fn report(&self) -> Report;
}

/// The whole daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The daemon's version.
    pub version: String,
    /// Its devices, in the order of the command line.
    pub devices: Vec<DeviceReport>,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// The vhost-user socket: its path, or `fd:N` for an inherited one.
    pub socket: String,
    /// Who connects to whom.
    pub role: SocketRole,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// The front-end, while it is connected.
    pub frontend: Option<FrontendReport>,
    /// The guest's memory as the front-end described it.
    pub memory: Vec<MemoryRegionReport>,
    /// Where the frames go.
    pub uplink: UplinkReport,
    /// The MTU that the front-end set, in bytes.
    pub mtu: Option<u16>,
    /// What is wrong with where vCPUs and workers stand, one sentence each with the remedy.
    pub warnings: Vec<String>,
    /// What the guest could do better, one sentence each with the command that mends it.
    pub advice: Vec<String>,
    /// The host's interrupts and steering masks that follow the workers.
    pub interrupts: InterruptReport,
    /// The queue pairs, by number.
    pub pairs: Vec<QueuePairReport>,
}

/// The host's interrupts and steering masks of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptReport {
    /// As `--irq-affinity` spells it.
    pub mode: String,
    /// The files that are set, or would be.
    pub settings: Vec<SettingReport>,
    /// What a person should know or do.
    pub notes: Vec<String>,
}

/// A file that says on which CPUs the kernel works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingReport {
    /// The file.
    pub file: String,
    /// What it should hold.
    pub value: String,
    /// What it held before; `None` where it cannot be read.
    pub original: Option<String>,
    /// Whether it was set, and is put back at the end.
    pub applied: bool,
    /// The command that sets it.
    pub command: String,
    /// Why it was not set, where that was tried.
    pub refused: Option<String>,
}

/// Who connects on the vhost-user socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketRole {
    /// The daemon listens, the front-end connects.
    Server,
    /// The front-end listens, the daemon connects.
    Client,
    /// The socket came from the parent process.
    Inherited,
}

/// What is known of the front-end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendReport {
    /// Its process, where the kernel tells.
    pub pid: Option<i32>,
    /// The virtio features that the driver took, by name without prefix.
    pub features: Vec<String>,
    /// The vhost-user protocol features in use, by name without prefix.
    pub protocol_features: Vec<String>,
}

/// One region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegionReport {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front-end's process.
    pub user_addr: u64,
}

/// Where the frames of a device go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkReport {
    /// The kind, as `--uplink` spells it.
    pub kind: String,
    /// The name; the interface's for a TAP.
    pub name: String,
}

/// One queue pair and its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QueuePairReport {
    /// Its number, from 0.
    pub pair: u16,
    /// The vCPU that the worker follows.
    pub vcpu: Option<u32>,
    /// All vCPUs that the driver gives to the pair.
    pub vcpus: Vec<u32>,
    /// The worker thread's name.
    pub worker: String,
    /// The worker thread's id, while it runs.
    pub tid: Option<i32>,
    /// The CPUs the worker may run on.
    pub cpus: Vec<u32>,
    /// Why it stands there.
    pub placement: String,
    /// The NUMA node of those CPUs, if it is one.
    pub worker_node: Option<u32>,
    /// The NUMA node of the pair's receive ring, as far as the kernel tells.
    pub memory_node: Option<u32>,
    /// What the worker did; docs/monitoring.md lists the names.
    pub worker_counters: Counters,
    /// How busy the worker is.
    pub worker_load: WorkerLoad,
    /// The receive ring: frames to the guest.
    pub rx: VringReport,
    /// The transmit ring: frames from the guest.
    pub tx: VringReport,
}

/// What a worker's time went into, since it first ran. For a shorter while, read twice: the busy
/// share is the growth of `busy_cycles` over that of `cycles`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct WorkerLoad {
    /// Time-stamp counter cycles that it has lived.
    pub cycles: u64,
    /// The share of those that turns took which found frames, from 0 to 1.
    pub busy_share: f64,
    /// Cycles that a frame took in those turns.
    pub cycles_per_frame: f64,
}

impl WorkerLoad {
    /// The load of a worker that has lived for `cycles`, of which `busy_cycles` went into turns that
    /// found `busy_frames` frames.
    #[must_use]
    pub fn new(cycles: u64, busy_cycles: u64, busy_frames: u64) -> Self {
        let share = |part: u64, whole: u64| match whole {
            0 => 0.0,
            _ => float(part) / float(whole),
        };
        Self {
            cycles,
            busy_share: share(busy_cycles, cycles).min(1.0),
            cycles_per_frame: share(busy_cycles, busy_frames),
        }
    }
}

/// Precise up to 2^53; beyond that a ratio does not need it.
#[allow(clippy::cast_precision_loss, clippy::as_conversions)]
fn float(n: u64) -> f64 {
    n as f64
}

/// One ring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringReport {
    /// Whether it is served.
    pub state: VringStatus,
    /// Whether the front-end enabled it.
    pub enabled: bool,
    /// Descriptors; 0 until the front-end sets it.
    pub size: u16,
    /// What happened on it; docs/monitoring.md lists the names.
    pub counters: Counters,
}

/// Whether a ring is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VringStatus {
    /// The front-end has not started it, or has stopped it.
    Stopped,
    /// It is served.
    Running,
    /// The guest broke the ring's rules; it waits to be configured anew.
    Quarantined,
}

/// One counter of a ring or a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// Its name.
    pub name: Cow<'static, str>,
    /// What it counts; empty in an answer that a client has read.
    pub help: &'static str,
    /// The count so far.
    pub value: u64,
}

/// The counters of a ring or a worker: a map from names to counts in JSON, in the daemon's order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters(pub Vec<Counter>);

impl Counters {
    /// The counters of a block whose names and meanings are `names`.
    #[must_use]
    pub fn new(names: &[(&'static str, &'static str)], values: Vec<u64>) -> Self {
        let counter = |(&(name, help), value)| Counter {
            name: Cow::Borrowed(name),
            help,
            value,
        };
        Self(names.iter().zip(values).map(counter).collect())
    }

    /// The count of this name; `None` where the daemon has no such counter.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        let counter = self.0.iter().find(|counter| counter.name == name)?;
        Some(counter.value)
    }
}

impl Serialize for Counters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|counter| (&counter.name, counter.value)))
    }
}

impl<'de> Deserialize<'de> for Counters {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(CountersVisitor)
    }
}

struct CountersVisitor;

impl<'de> Visitor<'de> for CountersVisitor {
    type Value = Counters;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from names to counts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Counters, A::Error> {
        let mut counters = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, u64>()? {
            counters.push(Counter {
                name: Cow::Owned(name),
                help: "",
                value,
            });
        }
        Ok(Counters(counters))
    }
}

/// A report with something in every field, for tests of what is made from it.
#[cfg(test)]
pub(crate) fn sample() -> Report {
    const RING: &[(&str, &str)] = &[
        ("frames", "Frames."),
        ("bytes", "Bytes."),
        ("kicks", "Kicks."),
    ];
    const WORKER: &[(&str, &str)] = &[("wakeups", "Wake-ups."), ("busy_cycles", "Cycles.")];
    let ring = |state, frames| VringReport {
        state,
        enabled: true,
        size: 256,
        counters: Counters::new(RING, vec![frames, frames * 60, 0]),
    };
    Report {
        version: "0.1.0".into(),
        devices: vec![DeviceReport {
            name: "vnet".into(),
            socket: "/run/a \"b\".sock".into(),
            role: SocketRole::Server,
            connected: true,
            frontend: Some(FrontendReport {
                pid: Some(1),
                features: vec!["MQ".into()],
                protocol_features: vec!["MQ".into()],
            }),
            memory: vec![MemoryRegionReport {
                guest_addr: 0,
                size: 4096,
                user_addr: 1 << 40,
            }],
            uplink: UplinkReport {
                kind: "tap".into(),
                name: "tap0".into(),
            },
            mtu: Some(1500),
            warnings: vec!["few".into()],
            advice: vec!["more".into()],
            interrupts: InterruptReport {
                mode: "apply".into(),
                settings: vec![SettingReport {
                    file: "/f".into(),
                    value: "2".into(),
                    original: Some("0".into()),
                    applied: true,
                    command: "echo 2 > /f".into(),
                    refused: None,
                }],
                notes: vec!["note".into()],
            },
            pairs: vec![QueuePairReport {
                pair: 0,
                vcpu: Some(0),
                vcpus: vec![0],
                worker: "vnet-q0".into(),
                tid: Some(1),
                cpus: vec![2],
                placement: "why".into(),
                worker_node: Some(0),
                memory_node: Some(1),
                worker_counters: Counters::new(WORKER, vec![3, 100]),
                worker_load: WorkerLoad::new(400, 100, 2),
                rx: ring(VringStatus::Running, 5),
                tx: ring(VringStatus::Quarantined, 7),
            }],
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_the_documented_shape() {
        let mut report = serde_json::to_value(sample()).unwrap();
        let pair = &mut report["devices"][0]["pairs"][0];
        let rx = pair["rx"]["counters"].take();
        let tx = pair["tx"]["counters"].take();
        let worker = pair["worker_counters"].take();
        assert_eq!((&rx["frames"], &tx["bytes"]), (&5.into(), &420.into()));
        assert_eq!(worker["wakeups"], 3);
        assert_eq!(rx.as_object().unwrap().len(), 3);
        assert_eq!(
            report,
            serde_json::json!({"version": "0.1.0", "devices": [{
                "name": "vnet", "socket": "/run/a \"b\".sock", "role": "server", "connected": true,
                "frontend": {"pid": 1, "features": ["MQ"], "protocol_features": ["MQ"]},
                "memory": [{"guest_addr": 0, "size": 4096, "user_addr": 1_u64 << 40}],
                "uplink": {"kind": "tap", "name": "tap0"},
                "mtu": 1500,
                "warnings": ["few"], "advice": ["more"],
                "interrupts": {"mode": "apply", "notes": ["note"], "settings": [{
                    "file": "/f", "value": "2", "original": "0", "applied": true,
                    "command": "echo 2 > /f", "refused": null,
                }]},
                "pairs": [{
                    "pair": 0, "vcpu": 0, "vcpus": [0], "worker": "vnet-q0", "tid": 1, "cpus": [2],
                    "placement": "why", "worker_node": 0, "memory_node": 1, "worker_counters": null,
                    "worker_load": {"cycles": 400, "busy_share": 0.25, "cycles_per_frame": 50.0},
                    "rx": {"state": "running", "enabled": true, "size": 256, "counters": null},
                    "tx": {"state": "quarantined", "enabled": true, "size": 256, "counters": null},
                }],
            }]})
        );
    }

    #[test]
    fn what_a_client_reads_is_what_the_daemon_wrote_without_the_help() {
        let json = serde_json::to_string(&sample()).unwrap();
        let read: Report = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), json);
        let rx = &read.devices[0].pairs[0].rx;
        assert_eq!(rx.counters.get("bytes"), Some(300));
        assert_eq!(rx.counters.get("nonsense"), None);
    }
}
