//! `virtionetctl plan`: how many queue pairs, the placement of the workers, and the command lines for them.
//!
//! ```text
//! PlanArgs --request--> policy (virtionet_sizing) --workers--> GuestPlan --> text | JSON
//!                                                                          |-> qemu, libvirt, daemon
//! ```
//!
//! A worker's CPU is what [`PlacementPlanner::place`](virtionet_placement::PlacementPlanner::place) says of the vCPU
//! pins that the plan proposes: the daemon asks the same function.

mod args;
mod commands;
mod daemon;
mod guest_plan;
mod libvirt;
mod nic;
mod qemu;
mod request;
mod shell;
mod text;
mod workers;

use std::io::{self, Write};
use std::path::Path;

use virtionet_placement::{
    AffinityError, CpuListError, CpuSet, PlacementParseError, Topology, allowed_cpus,
};
use virtionet_sizing::{QueuesError, plan_queues};

pub use args::{Accel, OutputPart, PlanArgs};
pub use commands::Commands;
pub use guest_plan::{GuestPlan, NetDevicePlan, Vectors, WorkerCpus, WorkerPlan};
use request::Request;

/// Why there is no plan, as one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A flag or key whose value cannot be used.
    #[error("{0}")]
    Usage(String),
    /// The request contradicts itself or the budget.
    #[error(transparent)]
    Queues(#[from] QueuesError),
    /// A text that is not a list of CPUs.
    #[error(transparent)]
    CpuList(#[from] CpuListError),
    /// A placement that does not exist.
    #[error(transparent)]
    Placement(#[from] PlacementParseError),
    /// A placement that is impossible on this host.
    #[error(transparent)]
    PlacementPlanner(#[from] virtionet_placement::PlacementError),
    /// The CPUs of this process cannot be read.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The answer cannot be written.
    #[error("the plan cannot be written: {0}; check where standard output goes")]
    Write(#[from] io::Error),
}

impl PlanError {
    /// The kind of the error, as a stable name for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Usage(_) => "request-invalid",
            Self::Queues(_) => "queues-impossible",
            Self::CpuList(_) => "cpu-list-invalid",
            Self::Placement(_) => "placement-invalid",
            Self::PlacementPlanner(_) => "placement-impossible",
            Self::Affinity(_) => "affinity-unreadable",
            Self::Write(_) => "output-failed",
        }
    }

    /// The exit status: 2 for a request that cannot be used, 1 for a failure.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::Write(_) | Self::Affinity(_) => 1,
            _ => 2,
        }
    }
}

/// Answers `virtionetctl plan`.
///
/// # Errors
/// When what is asked for contradicts itself or this host, or `out` cannot be written.
pub fn run(args: &PlanArgs, out: &mut dyn Write) -> Result<(), PlanError> {
    let plan = plan(args, &TargetHost::of(args)?)?;
    let text = match args.json {
        true => plan.json(),
        false => text::part(&plan, args.print),
    };
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The reader, such as head, has closed the pipe because it needs no more.
        Err(why) if why.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// The host that is planned for.
#[derive(Debug)]
pub struct TargetHost {
    /// The CPUs that the daemon may run on.
    pub cpus: CpuSet,
    /// Their caches, nodes and siblings, as far as they are known.
    pub topology: Topology,
}

impl TargetHost {
    /// The host with the CPUs of `--host-cpus` and an unknown topology, or this host.
    fn of(args: &PlanArgs) -> Result<Self, PlanError> {
        Ok(match &args.host_cpus {
            Some(list) => Self {
                cpus: list.parse()?,
                topology: Topology::default(),
            },
            None => Self {
                cpus: allowed_cpus()?,
                topology: Topology::read(Path::new("/sys")),
            },
        })
    }
}

/// The plan for `host`.
///
/// # Errors
/// When what is asked for contradicts itself or that host.
pub fn plan(args: &PlanArgs, host: &TargetHost) -> Result<GuestPlan, PlanError> {
    let mut request = Request::resolve(args, host)?;
    let queues = plan_queues(&request.queues)?;
    let workers = workers::place_workers(&mut request, &queues, host)?;
    let plan = GuestPlan::new(request, queues, workers);
    daemon::check(&plan)?;
    Ok(plan)
}

#[cfg(test)]
mod tests;
