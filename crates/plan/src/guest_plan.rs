//! The plan: all numbers and names, from which every text is made.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use virtionet_placement::{CpuSet, Decision, worker_name};
use virtionet_sizing::QueuePlan;

use super::request::{Request, Rings};

/// How many queue pairs, the placement of the workers, and how it is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GuestPlan {
    /// The guest's name.
    pub guest: String,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// The host CPU of each vCPU; `null` where they float.
    pub pins: Option<Vec<u32>>,
    /// The NUMA node that its memory is bound to; `null` where it is not.
    pub memory_node: Option<u32>,
    /// Its network devices.
    pub cards: Vec<NetDevicePlan>,
    /// Its interrupt vectors.
    pub vectors: Vectors,
    /// What the workers cost.
    pub worker_cpus: WorkerCpus,
    /// Notes for the reader of the plan.
    pub notes: Vec<String>,
    /// Folder of the sockets.
    pub socket_dir: PathBuf,
    /// The control socket of virtionetd.
    pub control: PathBuf,
    #[serde(skip)]
    pub(super) request: Request,
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetDevicePlan {
    /// Its name.
    pub name: String,
    /// Queue pairs.
    pub pairs: u16,
    /// Why so many.
    pub why: String,
    /// Interrupt vectors.
    pub vectors: u32,
    /// The Ethernet address.
    pub mac: String,
    /// The device's name in virtionetd.
    pub device: String,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// The uplink, as virtionetd's `--uplink` spells it.
    pub uplink: String,
    /// The workers, by pair.
    pub workers: Vec<WorkerPlan>,
    /// What makes a driver use all pairs that does not by itself; `null` for a single pair.
    pub guest_command: Option<String>,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkerPlan {
    /// The thread's name.
    pub name: String,
    /// The pair that it serves.
    pub pair: u32,
    /// The vCPUs that the driver gives to the pair.
    pub vcpus: Vec<u32>,
    /// The host CPUs that it may run on.
    pub cpus: Vec<u32>,
    /// Whether it may poll there, where polling is configured.
    pub may_poll: bool,
    /// Why it is placed there.
    pub why: String,
}

/// Interrupt vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Vectors {
    /// Those of the network devices.
    pub cards: u32,
    /// Those of other devices.
    pub other: u32,
    /// All of them.
    pub total: u32,
    /// What there may be.
    pub budget: u32,
}

/// What the workers cost, in whole CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct WorkerCpus {
    /// While no frame comes.
    pub idle: u32,
    /// At most, under load.
    pub busy: u32,
}

impl GuestPlan {
    pub(super) fn new(request: Request, queues: QueuePlan, workers: Vec<Vec<Decision>>) -> Self {
        let worker_cpus = WorkerCpus::of(&request, &workers);
        let answers = request.cards.iter().zip(queues.cards).zip(workers);
        let cards: Vec<NetDevicePlan> = answers
            .enumerate()
            .map(|(at, ((requested, queues), decisions))| {
                let device = format!("{}-{}", request.name, requested.name);
                let worker = |decision| WorkerPlan::of(&device, decision);
                let workers = decisions.into_iter().map(worker).collect();
                NetDevicePlan {
                    name: requested.name.clone(),
                    pairs: queues.pairs,
                    why: queues.why,
                    vectors: queues.vectors,
                    mac: requested.mac.to_string(),
                    socket: request.dir.join(format!("{device}.sock")),
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
                cards: queues.total_vectors - queues.other_vectors,
                other: queues.other_vectors,
                total: queues.total_vectors,
                budget: queues.budget,
            },
            cards,
            worker_cpus,
            notes: request.notes.clone(),
            socket_dir: request.dir.clone(),
            control: request.dir.join(format!("{}.ctl", request.name)),
            request,
        }
    }

    /// All host CPUs of the vCPUs, where they are pinned.
    pub(super) fn pinned(&self) -> Option<CpuSet> {
        let pins = self.pins.as_ref()?;
        Some(pins.iter().copied().collect())
    }

    pub(super) fn rings(&self) -> Rings {
        self.request.rings
    }

    pub(super) fn pidfile(&self) -> PathBuf {
        self.socket_dir.join(format!("{}.pid", self.guest))
    }
}

impl WorkerPlan {
    fn of(device: &str, decision: Decision) -> Self {
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
    fn of(request: &Request, workers: &[Vec<Decision>]) -> Self {
        let all: Vec<&Decision> = workers.iter().flatten().collect();
        let spins = request.poll.mode.as_deref() == Some("always");
        let spinning = all.iter().copied().filter(|d| spins && d.may_poll);
        Self {
            idle: count_cpus(spinning),
            busy: count_cpus(all.iter().copied()),
        }
    }
}

/// One for each worker, but no more than the CPUs that they run on.
fn count_cpus<'a>(workers: impl Iterator<Item = &'a Decision>) -> u32 {
    let mut count = 0;
    let mut cpus = BTreeSet::new();
    for worker in workers {
        count += 1;
        cpus.extend(worker.cpus.iter());
    }
    u32::try_from(cpus.len().min(count)).unwrap_or(u32::MAX)
}

/// The text of a path that was checked to be text.
pub(super) fn path_text(path: &Path) -> String {
    path.display().to_string()
}
