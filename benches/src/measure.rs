//! Measures a group of cases.

use anyhow::Result;

use crate::groups::Group;
use crate::outcome::GroupResult;
use crate::sampling::Effort;
use crate::{footprint, guests, iperf, isolation, peers, queues, ring, sandbox, tap, turn};

/// Measures `group`. `queue_pairs` are the numbers of queue pairs that [`Group::Queues`] compares
/// with one queue pair.
///
/// # Errors
/// When a part of the testbed fails. The error contains its message.
pub fn measure(group: Group, effort: Effort, queue_pairs: &[u16]) -> Result<GroupResult> {
    match group {
        Group::Ring => ring::run(effort),
        Group::Tap => tap::run(effort),
        Group::Peers => peers::run(effort),
        Group::Footprint => footprint::run(effort),
        Group::Iperf => iperf::run(effort),
        Group::Guests => guests::run(effort),
        Group::Queues => queues::run(effort, queue_pairs),
        Group::Turn => turn::run(effort),
        Group::Isolation => isolation::run(effort),
        Group::Sandbox => sandbox::run(effort),
    }
}
