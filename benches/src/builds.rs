//! Measures this build of virtionetd against another one, with the loads of [`peers`] and [`iperf`],
//! so that a change can be compared with what was before it.

use std::path::Path;

use anyhow::Result;

use crate::outcome::GroupResult;
use crate::sampling::Effort;
use crate::{iperf, peers};

/// Measures frames that circulate between two devices, and TCP between a guest and its host.
/// `program` is the other build.
///
/// # Errors
/// When this process is not root, DPDK is missing, the other build does not understand today's
/// arguments, or a part of the testbed fails. The error contains its message.
pub fn run(program: &'static Path, effort: Effort) -> Result<GroupResult> {
    let mut outcome = GroupResult::default();
    peers::run_against_build(program, effort, &mut outcome)?;
    iperf::run_against_build(program, effort, &mut outcome)?;
    Ok(outcome)
}
