//! Measures a group of cases.

use std::path::Path;

use anyhow::{Context, Result};

use crate::groups::Group;
use crate::outcome::GroupResult;
use crate::sampling::Effort;
use crate::{
    builds, footprint, guests, iperf, isolation, latency, peers, queues, ring, sandbox, tap, turn,
};

/// What some of the groups need to know.
#[derive(Debug, Clone)]
pub struct Parameters {
    /// The numbers of queue pairs that [`Group::Queues`] compares with one queue pair.
    pub queue_pairs: Vec<u16>,
    /// The build of virtionetd that [`Group::Builds`] compares with this one.
    pub other_build: Option<&'static Path>,
}

/// Measures `group`.
///
/// # Errors
/// When a part of the testbed fails. The error contains its message.
pub fn measure(group: Group, effort: Effort, parameters: &Parameters) -> Result<GroupResult> {
    match group {
        Group::Ring => ring::run(effort),
        Group::Tap => tap::run(effort),
        Group::Peers => peers::run(effort),
        Group::Footprint => footprint::run(effort),
        Group::Iperf => iperf::run(effort),
        Group::Guests => guests::run(effort),
        Group::Queues => queues::run(effort, &parameters.queue_pairs),
        Group::Turn => turn::run(effort),
        Group::Isolation => isolation::run(effort),
        Group::Sandbox => sandbox::run(effort),
        Group::Latency => latency::run(effort),
        Group::Builds => {
            let program = parameters.other_build;
            let program = program
                .context("the group 'builds' has nothing to compare with: add --against PROGRAM")?;
            builds::run(program, effort)
        }
    }
}
