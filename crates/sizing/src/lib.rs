//! How many queue pairs each network device of a guest gets, and why.
//!
//! This crate is pure arithmetic, for programs that launch the front-end. It reads no file, makes
//! no system call and does not depend on the placement of the workers. Three inputs decide:
//!
//! 1. OpenStack Nova's rules for multiqueue. A guest with one vCPU has no multiqueue. An image and
//!    a flavor that contradict each other are refused. A network device gets as many queue pairs as
//!    the guest has vCPUs, up to a limit.
//! 2. What is requested of each network device: `queues=N`, or a [`Throughput`].
//! 3. The number of MSI-X interrupt vectors that all devices of the guest may use together.
//!
//! ```text
//! vCPUs, image, flavor -> on or off -> request of each device -> limits -> pairs -> MSI-X budget
//! ```
//!
//! [`plan_queues`] plans a whole guest, [`queue_pairs_for`] one network device alone.
//!
//! # Map
//!
//! Each file uses only files below it.
//!
//! | file | subject |
//! |---|---|
//! | `policy.rs` | the rules, from a request to a number of queue pairs |
//! | `error.rs` | why a request cannot be fulfilled |
//! | `request.rs` | the types of a request and of the answer |
//! | `budget.rs` | interrupt vectors, and how queue pairs are reduced to fit |
//! | `throughput.rs` | a share of the vCPUs as a number of queue pairs |

mod budget;
mod error;
mod policy;
mod request;
mod throughput;

pub use budget::{MSIX_BUDGET, vectors_of};
pub use error::QueuesError;
pub use policy::{plan_queues, queue_pairs_for};
pub use request::{
    GuestRequest, MultiqueueDefault, NetDeviceQueues, NetDeviceRequest, QueuePlan, QueueRequest,
};
pub use throughput::{Throughput, ThroughputParseError};

pub use virtionet_base::MAX_QUEUE_PAIRS;

/// The largest number of queues of a TAP since Linux 4.0 (`MAX_TAP_QUEUES`). It was 8 before, and 1
/// before Linux 3.8.
pub const MAX_TAP_QUEUES: u16 = 256;

// A TAP has a queue for each pair that vhost-user can address, so one limit is enough.
const _: () = assert!(MAX_QUEUE_PAIRS <= MAX_TAP_QUEUES);
