//! The placement of the workers.

use std::collections::BTreeSet;

use virtionet_placement::{CpuSet, Decision, PlacementPlanner, Vcpu, VcpuMap, VcpuSource, Warning};
use virtionet_sizing::QueuePlan;

use super::request::Request;
use super::{PlanError, TargetHost};

/// The decisions for each network device's queue pairs, by the daemon's own planner: on a map of the vCPUs as the
/// plan would have them, all pairs in use. What it warns of is noted in `request`.
pub(super) fn place_workers(
    request: &mut Request,
    queues: &QueuePlan,
    host: &TargetHost,
) -> Result<Vec<Vec<Decision>>, PlanError> {
    let planner = PlacementPlanner::new(request.placement.clone(), host.cpus.clone(), None)?
        .with_topology(host.topology.clone())
        .with_polling(request.poll.is_polling());
    let map = vcpus(request, &host.cpus);
    let decisions: Vec<Vec<Decision>> = queues
        .cards
        .iter()
        .map(|card| planner.place_all(&map, card.pairs.into(), card.pairs.into()))
        .collect();
    for (card, decisions) in queues.cards.iter().zip(&decisions) {
        for warning in planner.warnings(&map, decisions) {
            // There is no thread yet to be pinned.
            if !matches!(warning, Warning::Floating { .. }) {
                request.notes.push(format!("card {}: {warning}", card.name));
            }
        }
    }
    let contended_cpus = contended_cpus(&decisions);
    if request.poll.is_polling() && !contended_cpus.is_empty() {
        request.notes.push(format!(
            "workers of several cards poll on {}: give each card CPUs of its own, with placement=list:CPUS in its --device",
            contended_cpus.describe()
        ));
    }
    Ok(decisions)
}

/// The CPUs on which workers of several network devices poll: each device is placed by itself.
fn contended_cpus(cards: &[Vec<Decision>]) -> CpuSet {
    let polled = |card: &Vec<Decision>| -> BTreeSet<u32> {
        let alone = card.iter().filter(|d| d.may_poll && d.cpus.len() == 1);
        alone.flat_map(|d| d.cpus.iter()).collect()
    };
    let mut seen = BTreeSet::new();
    let mut contended_cpus = CpuSet::default();
    for cpu in cards.iter().flat_map(polled) {
        if !seen.insert(cpu) {
            contended_cpus.insert(cpu);
        }
    }
    contended_cpus
}

/// The vCPU threads as the daemon will find them.
fn vcpus(request: &Request, host: &CpuSet) -> VcpuMap {
    let cpus = |index: u32| match (&request.pins, usize::try_from(index)) {
        (Some(pins), Ok(at)) => pins.get(at).copied().into_iter().collect(),
        _ => host.clone(),
    };
    VcpuMap {
        vcpus: (0..request.queues.vcpus)
            .map(|index| Vcpu {
                index,
                tid: 0,
                cpus: Some(cpus(index)),
            })
            .collect(),
        source: VcpuSource::ThreadNames,
        notes: Vec::new(),
    }
}
