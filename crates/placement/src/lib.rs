//! Which CPU each worker stands on, and why.
//!
//! Nothing in vhost-user maps a queue pair to a vCPU, so the mapping is rebuilt
//! here from three facts:
//!
//! 1. **Which vCPUs the driver gives to a pair.** Linux's virtio-net driver
//!    spreads its online CPUs over the pairs in use by a fixed rule and sets
//!    interrupt affinity and XPS accordingly; [`vcpus_of_queue_pair`] is that rule.
//! 2. **Which host thread runs a vCPU.** [`PlacementPlanner::discover`] reads the names
//!    of the front-end's threads and, failing that, asks QEMU over QMP.
//! 3. **Where that thread may run.** The kernel's affinity mask of the thread.
//!
//! [`PlacementPlanner::place`] puts them together into a [`Decision`], and [`set_thread_affinity`]
//! carries it out. No step fails hard: where a fact is missing the decision is
//! a turn over the allowed CPUs, and its `why` says what to do about it.
//!
//! ```text
//! pair k --rule--> vCPUs --thread names | QMP--> thread --affinity--> CPUs --> worker DEVICE-qk
//! ```
//!
//! **When to discover.** QEMU connects its network back-ends before it creates
//! its vCPU threads, so discovery belongs at the start of the first ring, and
//! again when the number of pairs in use changes (the rule depends on it). QEMU
//! answers no QMP while it waits for a vhost-user reply: discover from another
//! thread than the one that answers the front-end.
//!
//! **When to look again.** [`VcpuWatch`] tells cheaply whether the vCPU threads or
//! their affinity have changed, [`process_cpus`] which CPUs the process has now,
//! and [`Topology`] which of them are online; [`PlacementPlanner::place`] then says anew
//! where each worker stands, and [`PlacementPlanner::warnings`] what is wrong with that.
//!
//! The guest's CPU numbers are taken to follow the order of QEMU's vCPU
//! indices, all of them online; a guest that took CPUs offline, or a driver
//! other than Linux's, may spread its pairs otherwise.

mod affinity;
mod checks;
mod cpuset;
mod decision;
mod discovery;
pub mod interrupts;
mod numa;
mod planner;
mod policy;
mod procfs;
mod qmp;
mod queue_pairs;
mod rules;
mod sys;
#[cfg(test)]
mod testing;
mod topology;
mod vcpus;
mod warnings;
mod watch;

pub use affinity::{AffinityError, allowed_cpus, process_cpus, set_thread_affinity, thread_cpus};
pub use cpuset::{CpuListError, CpuSet, MAX_CPU, parse_cpulist};
pub use decision::{Decision, worker_name};
pub use numa::{node_of_address, prefer_node};
pub use planner::{PlacementError, PlacementPlanner};
pub use policy::{Placement, PlacementParseError};
pub use qmp::net_devices::{QemuNetDevice, query_net_device};
pub use queue_pairs::vcpus_of_queue_pair;
pub use topology::Topology;
pub use vcpus::{Vcpu, VcpuMap, VcpuSource};
pub use warnings::{Warning, WarningKind};
pub use watch::{VcpuChange, VcpuWatch};
