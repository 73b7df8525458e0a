//! The plan of a guest, as `virtionetctl plan` prints it: the queue pairs of its network devices,
//! the placement of the workers, and the command lines of QEMU, libvirt and virtionetd.
//!
//! ```text
//! PlanArgs --request--> policy (virtionet_sizing) --workers--> GuestPlan --> text | JSON
//!                                                                  |-> qemu, libvirt, daemon
//! ```
//!
//! The placement comes from
//! [`PlacementPlanner::place_all`](virtionet_placement::PlacementPlanner::place_all), which the
//! daemon calls too. The plan calls it with the vCPU pins that it proposes.

mod args;
mod commands;
mod daemon;
mod error;
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

use virtionet_placement::{CpuSet, Topology, allowed_cpus};
use virtionet_sizing::plan_queues;

pub use args::{Accel, OutputPart, PlanArgs};
pub use commands::Commands;
pub use error::{NicError, PlanError};
pub use guest_plan::{GuestPlan, NetDevicePlan, Vectors, WorkerCpus, WorkerPlan};
use request::Request;

/// Plans the guest that `args` describe, and writes the plan to `out` as text or JSON.
///
/// # Errors
/// When the request contradicts itself or the host, or when `out` cannot be written.
pub fn run(args: &PlanArgs, out: &mut dyn Write) -> Result<(), PlanError> {
    let plan = plan(args, &TargetHost::detect(args)?)?;
    let text = match args.json {
        true => plan.to_json(),
        false => text::render(&plan, args.print),
    };
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The reader, such as head, has closed the pipe because it needs no more.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// The host that a plan is for.
#[derive(Debug)]
pub struct TargetHost {
    /// The CPUs that the daemon may run on.
    pub cpus: CpuSet,
    /// The caches, NUMA nodes and sibling threads of the CPUs, as far as they are known.
    pub topology: Topology,
}

impl TargetHost {
    /// The host with the CPUs of `--host-cpus`, whose topology is unknown; without that flag, this
    /// host.
    fn detect(args: &PlanArgs) -> Result<Self, PlanError> {
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

/// Plans the guest that `args` describe, for `host`.
///
/// # Errors
/// When the request contradicts itself or the host.
pub fn plan(args: &PlanArgs, host: &TargetHost) -> Result<GuestPlan, PlanError> {
    let mut request = Request::resolve(args, host)?;
    let queues = plan_queues(&request.queues)?;
    let workers = workers::place_workers(&mut request, &queues, host)?;
    let plan = GuestPlan::assemble(request, queues, workers);
    daemon::check(&plan)?;
    Ok(plan)
}

#[cfg(test)]
mod tests;
