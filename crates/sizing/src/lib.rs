//! How many queue pairs each card of a guest gets, and why.
//!
//! Pure policy, for whoever launches the front-end: OpenStack Nova's rules for
//! multiqueue (a guest with one vCPU has none; image and flavor that contradict
//! each other are refused; as many pairs as vCPUs, up to a limit), a wish of
//! each card's own (`queues=N`, or [`Throughput`]), and a budget of interrupt
//! vectors over all cards.
//!
//! ```text
//! vCPUs, image, flavor --on or off?--> each card's wish --limits--> pairs --2N+2--> MSI-X budget
//! ```
//!
//! [`plan_queues`] answers for a whole guest, [`queue_pairs_for`] for a card alone.

mod budget;
mod policy;
mod throughput;

pub use budget::{MSIX_BUDGET, vectors_of};
pub use policy::{
    GuestRequest, MultiqueueDefault, NetDeviceQueues, NetDeviceRequest, QueuePlan, QueueRequest,
    QueuesError, plan_queues, queue_pairs_for,
};
pub use throughput::{Throughput, ThroughputParseError};

pub use virtionet_base::MAX_QUEUE_PAIRS;

/// Most queues of a TAP since Linux 4.0 (`MAX_TAP_QUEUES`; 8 before, and 1
/// before 3.8).
pub const MAX_TAP_QUEUES: u16 = 256;

// What vhost-user can address, a TAP can carry: one limit is enough.
const _: () = assert!(MAX_QUEUE_PAIRS <= MAX_TAP_QUEUES);
