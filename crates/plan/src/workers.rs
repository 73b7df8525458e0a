//! Where the workers will stand.

use std::collections::BTreeSet;

use virtionet_sizing::QueuePlan;
use virtionet_placement::{CpuSet, Decision, Planner, Source, Vcpu, VcpuMap, Warning};

use super::request::Request;
use super::{Host, PlanError};

/// The decisions for each card's pairs, by the daemon's own planner: on a map of the vCPUs as the
/// plan would have them, all pairs in use. What it warns of is noted in `request`.
pub(super) fn place(
    request: &mut Request,
    queues: &QueuePlan,
    host: &Host,
) -> Result<Vec<Vec<Decision>>, PlanError> {
    let planner = Planner::new(request.placement.clone(), host.cpus.clone(), None)?
        .with_topology(host.topology.clone())
        .polling(request.poll.polls());
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
    let crowded = crowded(&decisions);
    if request.poll.polls() && !crowded.is_empty() {
        request.notes.push(format!(
            "workers of several cards poll on {}: give each card CPUs of its own, with placement=list:CPUS in its --device",
            crowded.words()
        ));
    }
    Ok(decisions)
}

/// The CPUs on which workers of several cards poll, for the cards know nothing of each other.
fn crowded(cards: &[Vec<Decision>]) -> CpuSet {
    let polled = |card: &Vec<Decision>| -> BTreeSet<u32> {
        let alone = card.iter().filter(|d| d.may_poll && d.cpus.len() == 1);
        alone.flat_map(|d| d.cpus.iter()).collect()
    };
    let mut seen = BTreeSet::new();
    let mut crowded = CpuSet::default();
    for cpu in cards.iter().flat_map(polled) {
        if !seen.insert(cpu) {
            crowded.insert(cpu);
        }
    }
    crowded
}

/// The vCPU threads as they will be found.
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
        source: Source::ThreadNames,
        notes: Vec::new(),
    }
}
