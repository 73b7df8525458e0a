//! Version 1 of the API: the types of the answer to `GET /v1/devices`, and in `change` those of the
//! other requests. They are plain data, so that
//! a client does not link the daemon. Later versions of the daemon can add fields, but never remove
//! one. The names of the fields are the keys of the JSON.

use std::borrow::Cow;
use std::fmt;

mod change;

pub use change::{
    Change, ChangeRequest, Changed, Condition, DeviceSettings, ErrorReport, Health, LinkState,
    Peer, ReadyProblem, Refusal, Reload, Reply, SwitchAddress, SwitchReport, Version,
};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What the control server asks and changes.
pub trait ReportSource: Send + Sync {
    /// The present state of every device.
    fn report(&self) -> Report;

    /// Whether the daemon serves its devices.
    fn health(&self) -> Health {
        Health::default()
    }

    /// The switches, by name.
    fn switches(&self) -> Vec<SwitchReport> {
        Vec::new()
    }

    /// Carries out a change, and calls `reply` when it is done, from any thread.
    fn change(&self, _request: ChangeRequest, reply: Reply) {
        reply(Err(Refusal::new(
            501,
            "not-supported",
            "this daemon cannot be changed while it runs; restart it".into(),
        )));
    }
}

/// The state of the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The daemon's version.
    pub version: String,
    /// Log lines that were lost because standard error did not take them.
    #[serde(default)]
    pub log_lines_dropped: u64,
    /// Panics that were caught, each a bug of the daemon.
    #[serde(default)]
    pub panics: u64,
    /// The rights that the daemon has left; `None` from a daemon that does not report them.
    #[serde(default)]
    pub rights: Option<RightsReport>,
    /// Its process; `None` from a daemon that does not report it.
    #[serde(default)]
    pub process: Option<ProcessReport>,
    /// Its devices, in the order of the command line.
    pub devices: Vec<DeviceReport>,
}

/// The process of the daemon, and what must be known to start its successor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessReport {
    /// The process id.
    pub pid: u32,
    /// The arguments behind the program's name; `None` where one is not UTF-8.
    pub arguments: Option<Vec<String>>,
    /// The working directory, to which paths among the arguments are relative; `None` where it is
    /// unknown or not UTF-8.
    pub directory: Option<String>,
    /// The path of the socket at which the next daemon can take over; `None` where there is none.
    pub handover_socket: Option<String>,
    /// The handover by which this daemon got its devices; `None` if it made them itself.
    pub taken_over: Option<TakeOverReport>,
}

/// How a daemon got the devices of the one before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOverReport {
    /// The version of the daemon before.
    pub version: String,
    /// For how long the devices were paused, in microseconds, as this daemon measured it.
    pub paused_us: u64,
}

/// The rights that the daemon has left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RightsReport {
    /// The mode of the sandbox: `on`, `off` or `log`.
    pub sandbox: String,
    /// The number of the user as which the daemon runs.
    pub user: u32,
    /// The capabilities that its threads have.
    pub capabilities: Vec<String>,
    /// Whether the helper is there.
    pub helper: HelperState,
    /// The number of the helper's process, while it runs.
    pub helper_pid: Option<u32>,
}

/// The state of the helper, which opens TAPs and writes CPU masks for a daemon without rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HelperState {
    /// There is none: the configuration says so, or virtionetd was started without rights.
    Off,
    /// It runs.
    Running,
    /// It has ended, and the daemon goes on without it.
    Lost,
}

/// The state of one device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The device's name.
    pub name: String,
    /// The vhost-user socket: its path, or `fd:N` for an inherited socket.
    pub socket: String,
    /// Whether the daemon listens on the socket, connects to it or inherits it.
    pub role: SocketRole,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// The front-end; `None` while none is connected.
    pub frontend: Option<FrontendReport>,
    /// The regions of the guest's memory, as the front-end describes them.
    pub memory: Vec<MemoryRegionReport>,
    /// The uplink.
    pub uplink: UplinkReport,
    /// The version of virtionetd whose features the device offers; `None` from a daemon that does not
    /// report it.
    #[serde(default)]
    pub features_compat: Option<String>,
    /// The MTU that the front-end sets, in bytes; `None` where it sets none.
    pub mtu: Option<u16>,
    /// Warnings about the placement of vCPUs and workers. Each one says what to do.
    pub warnings: Vec<String>,
    /// Where the device comes from.
    #[serde(default)]
    pub origin: DeviceOrigin,
    /// Whether the link is up. While it is down, no front-end is served.
    #[serde(default)]
    pub link: LinkState,
    /// A number that grows with each change of the device's configuration by this API. It is also its
    /// ETag.
    #[serde(default)]
    pub revision: u64,
    /// Recommendations for the guest's configuration. Each one names the command that applies it.
    pub advice: Vec<String>,
    /// The host's interrupts and steering masks that follow the workers.
    pub interrupts: InterruptReport,
    /// The queue pairs, by index.
    pub pairs: Vec<QueuePairReport>,
}

/// Where a device comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceOrigin {
    /// The command line or the configuration file.
    #[default]
    Configuration,
    /// A request of the control API.
    Request,
}

/// The host's interrupts and steering masks that follow the workers of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptReport {
    /// The mode, as `--irq-affinity` spells it.
    pub mode: String,
    /// The settings of the kernel that the daemon applies, or that it only prints.
    pub settings: Vec<SettingReport>,
    /// Notes for the administrator.
    pub notes: Vec<String>,
}

/// A setting of the kernel, in a file: the CPUs that handle an interrupt or steer frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingReport {
    /// The path of the file.
    pub file: String,
    /// The value that the file should have.
    pub value: String,
    /// The value that the file had before; `None` where it cannot be read.
    pub original: Option<String>,
    /// Whether the daemon has set the value, and restores the original value at the end.
    pub applied: bool,
    /// The shell command that sets the value.
    pub command: String,
    /// Why the daemon failed to set the value; `None` where it did not fail or did not try.
    pub refused: Option<String>,
}

/// How the daemon gets its connection on the vhost-user socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketRole {
    /// The daemon listens, and the front-end connects.
    Server,
    /// The front-end listens, and the daemon connects.
    Client,
    /// The daemon inherits the socket from its parent process.
    Inherited,
}

/// The front-end that is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendReport {
    /// The process id; `None` where the kernel does not report it.
    pub pid: Option<i32>,
    /// The names, without prefix, of the virtio features that the driver has acknowledged.
    pub features: Vec<String>,
    /// The names, without prefix, of the vhost-user protocol features in use.
    pub protocol_features: Vec<String>,
    /// The translations of addresses, if the guest's device is behind an IOMMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iotlb: Option<IotlbReport>,
}

/// The translations of I/O virtual addresses since the driver began to use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IotlbReport {
    /// Translations that are known now.
    pub entries: u64,
    /// Missing translations that the front-end was asked for.
    pub misses: u64,
    /// Translations that the front-end has sent.
    pub updates: u64,
    /// Ranges of addresses whose translations the front-end has taken back.
    pub invalidations: u64,
}

/// One region of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegionReport {
    /// The guest physical address.
    pub guest_addr: u64,
    /// The size in bytes.
    pub size: u64,
    /// The address in the front-end's process.
    pub user_addr: u64,
}

/// The uplink of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkReport {
    /// The kind, as `--uplink` spells it.
    pub kind: String,
    /// The name: that of the interface for a TAP, that of the switch for a switch, otherwise empty.
    pub name: String,
    /// Whether it can carry frames: false while its interface is deleted or down. It is checked
    /// while a front-end is connected.
    #[serde(default = "default_up")]
    pub up: bool,
}

/// Of a daemon that does not report it.
fn default_up() -> bool {
    true
}

/// The state of one queue pair and of its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QueuePairReport {
    /// The index of the queue pair, from 0.
    pub pair: u16,
    /// The vCPU that the placement of the worker follows; `None` where it follows none.
    pub vcpu: Option<u32>,
    /// All vCPUs that the driver assigns to the queue pair.
    pub vcpus: Vec<u32>,
    /// The worker thread's name.
    pub worker: String,
    /// The worker's thread id; `None` while the worker does not run.
    pub tid: Option<i32>,
    /// The host CPUs that the worker may run on.
    pub cpus: Vec<u32>,
    /// Why the worker may run on these CPUs, in words.
    pub placement: String,
    /// The NUMA node of these CPUs; `None` where they are on several nodes.
    pub worker_node: Option<u32>,
    /// The NUMA node of the memory of the receiveq; `None` where the kernel does not report it.
    pub memory_node: Option<u32>,
    /// The counters of the worker, whose names docs/monitoring.md lists.
    pub worker_counters: Counters,
    /// The load of the worker.
    pub worker_load: WorkerLoad,
    /// The vring of the receiveq, which carries frames to the guest.
    pub rx: VringReport,
    /// The vring of the transmitq, which carries frames from the guest.
    pub tx: VringReport,
}

/// The load of a worker since it started. For the load over a period, read the report at its start
/// and at its end, and divide the growth of the counter `busy_cycles` by the growth of `cycles`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct WorkerLoad {
    /// Cycles of the time-stamp counter since the worker started.
    pub cycles: u64,
    /// The share of these cycles that was spent in iterations that found frames, from 0 to 1.
    pub busy_share: f64,
    /// Cycles for each frame in these iterations.
    pub cycles_per_frame: f64,
}

impl WorkerLoad {
    /// The load of a worker that started `cycles` ago, and that spent `busy_cycles` of them in
    /// iterations that found `busy_frames` frames.
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

/// Converts `n`, which is exact up to 2^53. Above that the error does not matter for a ratio.
#[allow(clippy::cast_precision_loss, clippy::as_conversions)]
fn float(n: u64) -> f64 {
    n as f64
}

/// The state of one vring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringReport {
    /// Whether the vring is served.
    pub state: VringStatus,
    /// Whether the front-end has enabled the vring.
    pub enabled: bool,
    /// The number of descriptors; 0 until the front-end sets it.
    pub size: u16,
    /// The counters of the vring, whose names docs/monitoring.md lists.
    pub counters: Counters,
}

/// Whether a vring is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VringStatus {
    /// The front-end has not started the vring, or has stopped it.
    Stopped,
    /// The vring is served.
    Running,
    /// The vring is stopped because of a fault of the guest, until the front-end configures it
    /// again.
    Quarantined,
}

/// One counter of a vring or a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// The name.
    pub name: Cow<'static, str>,
    /// What the counter counts. It is empty in an answer that a client has read.
    pub help: &'static str,
    /// The present count.
    pub value: u64,
}

/// The counters of a vring or a worker, in the daemon's order. In JSON they are a map from names to
/// counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters(pub Vec<Counter>);

impl Counters {
    /// Counters with these names and meanings, and with these counts in the same order.
    #[must_use]
    pub fn new(names: &[(&'static str, &'static str)], values: Vec<u64>) -> Self {
        let counter = |(&(name, help), value)| Counter {
            name: Cow::Borrowed(name),
            help,
            value,
        };
        Self(names.iter().zip(values).map(counter).collect())
    }

    /// The count of the counter `name`; `None` where the daemon has no such counter.
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

/// A report for tests, with a value in every field.
#[cfg(test)]
pub(crate) fn sample() -> Report {
    Report {
        version: "0.1.0".into(),
        log_lines_dropped: 1,
        panics: 2,
        rights: Some(RightsReport {
            sandbox: "on".into(),
            user: 7,
            capabilities: vec!["CAP_CHOWN".into()],
            helper: HelperState::Running,
            helper_pid: Some(9),
        }),
        process: Some(ProcessReport {
            pid: 8,
            arguments: Some(vec!["-v".into()]),
            directory: Some("/".into()),
            handover_socket: Some("/run/h".into()),
            taken_over: Some(TakeOverReport {
                version: "0.0.9".into(),
                paused_us: 1200,
            }),
        }),
        devices: vec![DeviceReport {
            name: "vnet".into(),
            socket: "/run/a \"b\".sock".into(),
            role: SocketRole::Server,
            connected: true,
            frontend: Some(FrontendReport {
                pid: Some(1),
                features: vec!["MQ".into()],
                protocol_features: vec!["MQ".into()],
                iotlb: Some(IotlbReport {
                    entries: 1,
                    misses: 2,
                    updates: 3,
                    invalidations: 4,
                }),
            }),
            memory: vec![MemoryRegionReport {
                guest_addr: 0,
                size: 4096,
                user_addr: 1 << 40,
            }],
            uplink: UplinkReport {
                kind: "tap".into(),
                name: "tap0".into(),
                up: true,
            },
            features_compat: Some("0.1.0".into()),
            mtu: Some(1500),
            warnings: vec!["few".into()],
            origin: DeviceOrigin::Request,
            link: LinkState::Down,
            revision: 3,
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
            pairs: vec![sample_pair()],
        }],
    }
}

#[cfg(test)]
fn sample_pair() -> QueuePairReport {
    const VRING: &[(&str, &str)] = &[
        ("frames", "Frames."),
        ("bytes", "Bytes."),
        ("kicks", "Kicks."),
    ];
    const WORKER: &[(&str, &str)] = &[("wakeups", "Wake-ups."), ("busy_cycles", "Cycles.")];
    let vring = |state, frames| VringReport {
        state,
        enabled: true,
        size: 256,
        counters: Counters::new(VRING, vec![frames, frames * 60, 0]),
    };
    QueuePairReport {
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
        rx: vring(VringStatus::Running, 5),
        tx: vring(VringStatus::Quarantined, 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_has_the_documented_shape() {
        let mut report = serde_json::to_value(sample()).unwrap();
        let device = report["devices"][0].as_object_mut().unwrap();
        let added = ["origin", "link", "revision"].map(|key| device.remove(key));
        let expected = ["request".into(), "down".into(), serde_json::Value::from(3)];
        assert_eq!(added, expected.map(Some));
        let pair = &mut report["devices"][0]["pairs"][0];
        let rx = pair["rx"]["counters"].take();
        let tx = pair["tx"]["counters"].take();
        let worker = pair["worker_counters"].take();
        assert_eq!((&rx["frames"], &tx["bytes"]), (&5.into(), &420.into()));
        assert_eq!(worker["wakeups"], 3);
        assert_eq!(rx.as_object().unwrap().len(), 3);
        assert_eq!(
            report,
            serde_json::json!({"version": "0.1.0", "log_lines_dropped": 1, "panics": 2, "rights": {
                "sandbox": "on", "user": 7, "capabilities": ["CAP_CHOWN"],
                "helper": "running", "helper_pid": 9,
            }, "process": {
                "pid": 8, "arguments": ["-v"], "directory": "/", "handover_socket": "/run/h",
                "taken_over": {"version": "0.0.9", "paused_us": 1200},
            }, "devices": [{
                "name": "vnet", "socket": "/run/a \"b\".sock", "role": "server", "connected": true,
                "frontend": {"pid": 1, "features": ["MQ"], "protocol_features": ["MQ"], "iotlb": {
                    "entries": 1, "misses": 2, "updates": 3, "invalidations": 4,
                }},
                "memory": [{"guest_addr": 0, "size": 4096, "user_addr": 1_u64 << 40}],
                "uplink": {"kind": "tap", "name": "tap0", "up": true},
                "features_compat": "0.1.0", "mtu": 1500,
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
    fn client_reads_the_report_of_the_daemon_without_the_help() {
        let json = serde_json::to_string(&sample()).unwrap();
        let read: Report = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), json);
        let rx = &read.devices[0].pairs[0].rx;
        assert_eq!(rx.counters.get("bytes"), Some(300));
        assert_eq!(rx.counters.get("nonsense"), None);
    }
}
