//! The placement of the workers.

use std::collections::BTreeSet;

use virtionet_config::Key;
use virtionet_placement::{CpuSet, Decision, PlacementPlanner, Vcpu, VcpuMap, VcpuSource, Warning};
use virtionet_sizing::QueuePlan;

use super::TargetHost;
use super::error::PlanError;
use super::request::Request;

/// Places the workers with the daemon's planner, as if the vCPUs had the pins of the plan and the
/// driver used all queue pairs. Returns the decisions for the queue pairs of each network device,
/// and adds the planner's warnings to the notes of `request`.
pub(super) fn place_workers(
    request: &mut Request,
    queues: &QueuePlan,
    host: &TargetHost,
) -> Result<Vec<Vec<Decision>>, PlanError> {
    let mut planner = PlacementPlanner::new(request.placement.clone(), host.cpus.clone(), None)?
        .with_topology(host.topology.clone())
        .with_polling(request.poll.is_polling());
    let map = planned_vcpus(request, &host.cpus);
    let (mut decisions, mut polling) = (Vec::new(), Vec::new());
    for device in &queues.net_devices {
        // As in the daemon, workers avoid the CPUs on which those of other devices poll.
        planner.set_polling_elsewhere(polling.clone());
        let of_device = planner.place_all(&map, device.pairs.into(), device.pairs.into());
        polling.extend(planner.polling_workers(&of_device));
        decisions.push(of_device);
    }
    // The note below names the CPUs that several devices share.
    planner.set_polling_elsewhere(Vec::new());
    for (device, decisions) in queues.net_devices.iter().zip(&decisions) {
        for warning in planner.warnings(&map, decisions) {
            // The vCPU threads do not exist yet, so they cannot be pinned now.
            if !matches!(warning, Warning::Floating { .. }) {
                let note = format!("network device {}: {warning}", device.name);
                request.notes.push(note);
            }
        }
    }
    let contended_cpus = contended_cpus(&decisions);
    if request.poll.is_polling() && !contended_cpus.is_empty() {
        request.notes.push(format!(
            "workers of several network devices poll on {}: give each network device CPUs of its \
             own, with {}=list:CPUS in its --device",
            contended_cpus.describe(),
            Key::PLACEMENT.name
        ));
    }
    Ok(decisions)
}

/// The CPUs on which workers of several network devices poll, because there are too few CPUs or the
/// policy names the same ones.
fn contended_cpus(decisions: &[Vec<Decision>]) -> CpuSet {
    let polled = |of_device: &Vec<Decision>| -> BTreeSet<u32> {
        let pinned = of_device
            .iter()
            .filter(|decision| decision.may_poll && decision.cpus.len() == 1);
        pinned.flat_map(|decision| decision.cpus.iter()).collect()
    };
    let mut seen = BTreeSet::new();
    let mut contended_cpus = CpuSet::default();
    for cpu in decisions.iter().flat_map(polled) {
        if !seen.insert(cpu) {
            contended_cpus.insert(cpu);
        }
    }
    contended_cpus
}

/// The vCPU threads as the daemon finds them when the guest is started as planned.
fn planned_vcpus(request: &Request, host: &CpuSet) -> VcpuMap {
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
