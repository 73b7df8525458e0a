//! The plan: all numbers and names, from which the texts and the JSON are made.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use virtionet_placement::{CpuSet, Decision, worker_name};
use virtionet_sizing::QueuePlan;

use super::request::{Request, Rings};

/// The plan of a guest: its queue pairs, the placement of its workers, and the resources with which
/// it is started. It is serialized as the JSON of `virtionetctl plan --json`, whose keys do not
/// change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GuestPlan {
    /// The guest's name.
    pub guest: String,
    /// The number of the guest's vCPUs.
    pub vcpus: u32,
    /// The guest's memory in MiB.
    pub memory_mib: u64,
    /// The host CPU of each vCPU, by vCPU; `None` where the vCPUs float.
    pub pins: Option<Vec<u32>>,
    /// The NUMA node that the guest's memory is bound to; `None` where it is not bound.
    pub memory_node: Option<u32>,
    /// The network devices, in the order of the request.
    #[serde(rename = "cards")]
    pub net_devices: Vec<NetDevicePlan>,
    /// The interrupt vectors of all devices.
    pub vectors: Vectors,
    /// The CPU time of the workers.
    pub worker_cpus: WorkerCpus,
    /// Notes for the reader of the plan.
    pub notes: Vec<String>,
    /// The directory that the directories of the sockets are in.
    pub socket_dir: PathBuf,
    /// The path of virtionetd's control socket, in a directory that no front-end may write to.
    pub control: PathBuf,
    #[serde(skip)]
    pub(super) request: Request,
}

/// The plan of one network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetDevicePlan {
    /// The name, which is unique in the guest.
    pub name: String,
    /// The number of queue pairs, 1 to [`MAX_QUEUE_PAIRS`](virtionet_sizing::MAX_QUEUE_PAIRS).
    pub pairs: u16,
    /// The reason for this number of queue pairs, in words.
    pub why: String,
    /// The number of interrupt vectors.
    pub vectors: u32,
    /// The Ethernet address, such as `52:54:00:12:34:56`.
    pub mac: String,
    /// The device's name in virtionetd.
    pub device: String,
    /// The path of the vhost-user socket.
    pub socket: PathBuf,
    /// The uplink, as virtionetd's `--uplink` spells it.
    pub uplink: String,
    /// The workers, by queue pair.
    pub workers: Vec<WorkerPlan>,
    /// The command that makes Linux in the guest use all queue pairs, where it does not do so by
    /// itself; `None` for a single queue pair.
    pub guest_command: Option<String>,
}

/// The plan of one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkerPlan {
    /// The thread's name.
    pub name: String,
    /// The index of the queue pair that the worker serves.
    pub pair: u32,
    /// The vCPUs that the driver assigns to the queue pair.
    pub vcpus: Vec<u32>,
    /// The host CPUs that the worker may run on.
    pub cpus: Vec<u32>,
    /// Whether the worker may poll on these CPUs when polling is configured.
    pub may_poll: bool,
    /// The reason for these CPUs, in words.
    pub why: String,
}

/// The interrupt vectors of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Vectors {
    /// Vectors of the network devices.
    #[serde(rename = "cards")]
    pub net_devices: u32,
    /// Vectors of the other devices.
    pub other: u32,
    /// Vectors of all devices together.
    pub total: u32,
    /// Vectors that all devices may use together.
    pub budget: u32,
}

/// The CPU time that the workers of a guest use, in CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct WorkerCpus {
    /// While no frame arrives.
    pub idle: u32,
    /// Under load, at most.
    pub busy: u32,
}

impl GuestPlan {
    /// Puts the parts of a plan together.
    pub(super) fn assemble(
        request: Request,
        queues: QueuePlan,
        workers: Vec<Vec<Decision>>,
    ) -> Self {
        let worker_cpus = WorkerCpus::compute(&request, &workers);
        let parts = request
            .net_devices
            .iter()
            .zip(queues.net_devices)
            .zip(workers);
        let net_devices: Vec<NetDevicePlan> = parts
            .enumerate()
            .map(|(at, ((requested, queues), decisions))| {
                let device = format!("{}-{}", request.name, requested.name);
                let worker = |decision| WorkerPlan::from_decision(&device, decision);
                let workers = decisions.into_iter().map(worker).collect();
                NetDevicePlan {
                    name: requested.name.clone(),
                    pairs: queues.pairs,
                    why: queues.why,
                    vectors: queues.vectors,
                    mac: requested.mac.to_string(),
                    socket: guest_dir(&request).join(format!("{}.sock", requested.name)),
                    device,
                    uplink: requested.uplink.clone(),
                    workers,
                    guest_command: (queues.pairs > 1)
                        .then(|| format!("ethtool -L eth{at} combined {}", queues.pairs)),
                }
            })
            .collect();
        Self {
            guest: request.name.clone(),
            vcpus: request.queues.vcpus,
            memory_mib: request.memory_mib,
            pins: request.pins.clone(),
            memory_node: request.node,
            vectors: Vectors {
                net_devices: queues.total_vectors - queues.other_vectors,
                other: queues.other_vectors,
                total: queues.total_vectors,
                budget: queues.budget,
            },
            net_devices,
            worker_cpus,
            notes: request.notes.clone(),
            socket_dir: request.socket_dir.clone(),
            control: control_dir(&request.socket_dir).join(format!("{}.ctl", request.name)),
            request,
        }
    }

    /// The host CPUs of all vCPUs; `None` where the vCPUs float.
    pub(super) fn pinned_cpus(&self) -> Option<CpuSet> {
        let pins = self.pins.as_ref()?;
        Some(pins.iter().copied().collect())
    }

    /// Sizes and format of each network device's virtqueues.
    pub(super) fn rings(&self) -> Rings {
        self.request.rings
    }

    /// The directory of the guest's vhost-user sockets. Each guest has its own, so that a front-end
    /// that may write to it cannot replace the socket of another guest.
    pub(super) fn guest_dir(&self) -> PathBuf {
        guest_dir(&self.request)
    }

    /// The directory of the control sockets, which only virtionetd may write to.
    pub(super) fn control_dir(&self) -> PathBuf {
        control_dir(&self.socket_dir)
    }

    /// The path of QEMU's PID file.
    pub(super) fn pid_file(&self) -> PathBuf {
        self.socket_dir.join(format!("{}.pid", self.guest))
    }
}

fn guest_dir(request: &Request) -> PathBuf {
    request.socket_dir.join("guests").join(&request.name)
}

fn control_dir(socket_dir: &Path) -> PathBuf {
    socket_dir.join("control")
}

impl WorkerPlan {
    fn from_decision(device: &str, decision: Decision) -> Self {
        Self {
            name: worker_name(device, decision.pair),
            pair: decision.pair,
            vcpus: decision.vcpus,
            cpus: decision.cpus.iter().collect(),
            may_poll: decision.may_poll,
            why: decision.why,
        }
    }
}

impl WorkerCpus {
    fn compute(request: &Request, workers: &[Vec<Decision>]) -> Self {
        let all: Vec<&Decision> = workers.iter().flatten().collect();
        let is_always = request.poll.mode.as_deref() == Some("always");
        let polling = all
            .iter()
            .copied()
            .filter(|decision| is_always && decision.may_poll);
        Self {
            idle: count_cpus(polling),
            busy: count_cpus(all.iter().copied()),
        }
    }
}

/// The number of CPUs that `workers` can use: one for each worker, but at most the CPUs that they
/// may run on.
fn count_cpus<'a>(workers: impl Iterator<Item = &'a Decision>) -> u32 {
    let mut count = 0;
    let mut cpus = BTreeSet::new();
    for worker in workers {
        count += 1;
        cpus.extend(worker.cpus.iter());
    }
    u32::try_from(cpus.len().min(count)).unwrap_or(u32::MAX)
}

/// The text of `path`, which the request has checked to be UTF-8.
pub(super) fn path_text(path: &Path) -> String {
    path.display().to_string()
}
