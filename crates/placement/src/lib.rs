//! Which CPUs each worker is pinned to, and why.
//!
//! vhost-user does not transfer which vCPU uses a queue pair, so this crate derives it from three
//! facts:
//!
//! 1. **Which vCPUs the driver assigns to a queue pair.** Linux's virtio-net driver distributes its
//!    online CPUs over the pairs in use by a fixed rule, and sets interrupt affinity and XPS
//!    accordingly. [`vcpus_of_queue_pair`] is that rule.
//! 2. **Which host thread runs a vCPU.** [`PlacementPlanner::discover`] reads the names of the
//!    front-end's threads and, where these are not enough, asks QEMU over QMP.
//! 3. **Which CPUs that thread may run on.** This is the kernel's affinity mask of the thread.
//!
//! [`PlacementPlanner::place`] combines them into a [`Decision`], and [`set_thread_affinity`]
//! applies it. No step is fatal: where a fact is missing, workers float over the allowed CPUs, and
//! the decision's `why` says what to do about it.
//!
//! ```text
//! pair k --rule--> vCPUs --thread names | QMP--> thread --affinity--> CPUs --> worker DEVICE-qk
//! ```
//!
//! **When to discover.** QEMU connects its network back-ends before it creates its vCPU threads, so
//! discovery belongs at the start of the first ring, and again when the number of pairs in use
//! changes, because the rule depends on it. QEMU answers no QMP request while it waits for a
//! vhost-user reply, so discover from another thread than the one that answers the front-end.
//!
//! **When to place again.** [`VcpuWatch`] detects at low cost whether the vCPU threads or their
//! affinity have changed, [`process_cpus`] returns the CPUs that the process may run on now, and
//! [`Topology`] which of them are online. [`PlacementPlanner::place`] then gives the new decisions,
//! and [`PlacementPlanner::warnings`] the problems with them.
//!
//! The guest's CPU numbers are assumed to be in the order of QEMU's vCPU indices, all of them
//! online. A guest with offline CPUs, or a driver other than Linux's, may distribute its vCPUs
//! differently.
//!
//! # Map
//!
//! Each file uses only files below it; [`interrupts`] has a map of its own.
//!
//! | file | subject |
//! |---|---|
//! | `planner.rs` | the entry point: discovers, decides and checks |
//! | `discovery.rs` | finds the vCPU threads by name or over QMP |
//! | `qmp.rs`, `qmp/net_devices.rs` | a QMP session, and what it asks about vCPUs and network devices |
//! | `checks.rs` | finds problems with the decisions |
//! | `warnings.rs` | these problems as sentences |
//! | `rules.rs` | chooses the CPUs by policy |
//! | `spread.rs` | gives workers CPUs of their own, apart from those of other devices |
//! | `context.rs` | what the rules and the checks depend on |
//! | `watch.rs` | detects changes of the vCPU threads |
//! | `interrupts/` | affinity of interrupts, and XPS and RPS masks of a TAP |
//! | `affinity.rs` | pins a thread, and reads which CPUs it may run on |
//! | `decision.rs`, `policy.rs`, `vcpus.rs` | types: the result, the policy, the vCPU threads |
//! | `queue_pairs.rs` | the driver's rule |
//! | `slice.rs` | how soon a thread runs once it is woken |
//! | `topology.rs` | the host's CPUs in sysfs |
//! | `procfs.rs` | threads in procfs |
//! | `numa.rs` | the NUMA node of memory |
//! | `kernel_files.rs` | reads the text files of procfs and sysfs |
//! | `sys.rs` | system calls; all unsafe code |
//! | `cpuset.rs` | a set of CPUs |

mod affinity;
mod checks;
mod context;
mod cpuset;
mod decision;
mod discovery;
pub mod interrupts;
mod kernel_files;
mod numa;
mod planner;
mod policy;
mod procfs;
mod qmp;
mod queue_pairs;
mod rules;
pub mod slice;
mod spread;
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
pub use qmp::QmpError;
pub use qmp::net_devices::{QemuNetDevice, query_net_device};
pub use queue_pairs::vcpus_of_queue_pair;
pub use topology::Topology;
pub use vcpus::{Vcpu, VcpuMap, VcpuSource};
pub use warnings::{Warning, WarningKind};
pub use watch::{VcpuChange, VcpuWatch};
