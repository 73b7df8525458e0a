//! Checking the placement of one guest's vCPUs and workers for problems that a user can solve.

use crate::context::{PlacementContext, VcpuAffinity};
use crate::cpuset::CpuSet;
use crate::decision::Decision;
use crate::policy::Placement;
use crate::vcpus::Vcpu;
use crate::warnings::Warning;

/// The problems of the placement; `decisions` are those for the pairs in use.
pub(crate) fn find_warnings(
    context: &PlacementContext<'_>,
    decisions: &[Decision],
) -> Vec<Warning> {
    let by_vcpus = context.host.mode.follows_vcpus();
    let of_vcpus = [
        check_discovery,
        check_floating,
        check_outside,
        check_vcpus_online,
    ];
    let found = of_vcpus.map(|check| by_vcpus.then(|| check(context)).flatten());
    let of_workers = [
        check_polling,
        check_vcpu_nodes,
        check_memory_nodes,
        check_cpu_count,
    ];
    found
        .into_iter()
        .chain(of_workers.map(|check| check(context, decisions)))
        .chain([check_list_online(context), check_list_allowed(context)])
        .flatten()
        .collect()
}

fn check_discovery(context: &PlacementContext<'_>) -> Option<Warning> {
    let map = context.map;
    let has_unreadable = map.vcpus.iter().any(|vcpu| vcpu.cpus.is_none());
    let why = map.failures();
    let is_unknown = (map.vcpus.is_empty() || has_unreadable) && !why.is_empty();
    is_unknown.then_some(Warning::Unknown { why })
}

fn check_floating(context: &PlacementContext<'_>) -> Option<Warning> {
    let floating = vcpus_with_affinity(context, |vcpu_affinity| match vcpu_affinity {
        VcpuAffinity::Floating(over, _) => Some(over),
        _ => None,
    });
    let (first, over) = *floating.first()?;
    Some(Warning::Floating {
        vcpus: indices(&floating),
        over: over.clone(),
        tid: first.tid,
    })
}

fn check_outside(context: &PlacementContext<'_>) -> Option<Warning> {
    let allowed = context.host.allowed;
    let outside = vcpus_with_affinity(context, |vcpu_affinity| match vcpu_affinity {
        VcpuAffinity::Unreachable(on) if on.intersection(allowed).is_empty() => Some(on),
        _ => None,
    });
    (!outside.is_empty()).then(|| Warning::Outside {
        vcpus: indices(&outside),
        on: union(outside.iter().map(|(_, on)| *on)),
        allowed: allowed.clone(),
    })
}

fn check_vcpus_online(context: &PlacementContext<'_>) -> Option<Warning> {
    let offline = vcpus_with_affinity(context, |vcpu_affinity| match vcpu_affinity {
        VcpuAffinity::Unreachable(on) if !on.intersection(context.host.allowed).is_empty() => {
            Some(on)
        }
        _ => None,
    });
    (!offline.is_empty()).then(|| Warning::VcpusOffline {
        vcpus: indices(&offline),
        on: union(offline.iter().map(|(_, on)| *on)),
    })
}

fn check_polling(_: &PlacementContext<'_>, decisions: &[Decision]) -> Option<Warning> {
    let not_polling: Vec<_> = decisions.iter().filter(|one| !one.may_poll).collect();
    (!not_polling.is_empty()).then(|| Warning::NoPolling {
        pairs: not_polling.iter().map(|one| one.pair).collect(),
        on: union(not_polling.iter().map(|one| &one.cpus)),
    })
}

fn check_vcpu_nodes(context: &PlacementContext<'_>, decisions: &[Decision]) -> Option<Warning> {
    let topology = context.host.topology;
    let remote: Vec<_> = decisions
        .iter()
        .filter_map(|one| {
            let vcpu = context.first_vcpu(one.pair)?.cpus.as_ref()?;
            let (there, here) = (
                topology.node_of_all(vcpu)?,
                topology.node_of_all(&one.cpus)?,
            );
            (there != here).then_some((one, vcpu))
        })
        .collect();
    (!remote.is_empty()).then(|| Warning::RemoteVcpus {
        pairs: remote.iter().map(|(one, _)| one.pair).collect(),
        on: union(remote.iter().map(|(one, _)| &one.cpus)),
        vcpus_on: union(remote.iter().map(|(_, vcpu)| *vcpu)),
    })
}

fn check_memory_nodes(context: &PlacementContext<'_>, decisions: &[Decision]) -> Option<Warning> {
    let host = &context.host;
    let remote: Vec<_> = decisions
        .iter()
        .filter_map(|one| {
            let memory = *host.memory.get(&one.pair)?;
            let worker = host.topology.node_of_all(&one.cpus)?;
            (memory != worker).then_some((one, memory))
        })
        .collect();
    (!remote.is_empty()).then(|| Warning::RemoteMemory {
        pairs: remote.iter().map(|(one, _)| one.pair).collect(),
        on: union(remote.iter().map(|(one, _)| &one.cpus)),
        nodes: remote.iter().map(|(_, node)| *node).collect(),
    })
}

/// Workers that sleep share CPUs because their vCPUs share them. That is a problem only where the
/// daemon has too few CPUs for one each. Workers that poll share CPUs with those of other devices
/// too.
fn check_cpu_count(context: &PlacementContext<'_>, decisions: &[Decision]) -> Option<Warning> {
    let on = union(decisions.iter().map(|one| &one.cpus));
    let others = context.host.polling_elsewhere.iter();
    let beside = others.filter(|cpus| context.host.polling && cpus.difference(&on).is_empty());
    let workers = decisions.len() + beside.count();
    let has_too_few = match context.host.mode {
        Placement::List(_) => true,
        _ => context.host.polling || context.usable.len() < decisions.len(),
    };
    (has_too_few && on.len() < workers).then_some(Warning::FewCpus { workers, on })
}

fn check_list_online(context: &PlacementContext<'_>) -> Option<Warning> {
    let host = &context.host;
    let cpus = find_listed(context, |cpu| {
        host.allowed.contains(cpu) && !host.topology.is_online(cpu)
    })?;
    Some(Warning::ListOffline { cpus })
}

fn check_list_allowed(context: &PlacementContext<'_>) -> Option<Warning> {
    let allowed = context.host.allowed;
    let cpus = find_listed(context, |cpu| !allowed.contains(cpu))?;
    let allowed = allowed.clone();
    Some(Warning::ListOutside { cpus, allowed })
}

/// The CPUs of the policy's list for which `is_wrong` holds; `None` where there are none.
fn find_listed(context: &PlacementContext<'_>, is_wrong: impl Fn(u32) -> bool) -> Option<CpuSet> {
    let Placement::List(cpus) = context.host.mode else {
        return None;
    };
    let cpus: CpuSet = cpus.iter().copied().filter(|&cpu| is_wrong(cpu)).collect();
    (!cpus.is_empty()).then_some(cpus)
}

/// The vCPUs for whose affinity `pick` returns a set of CPUs, with that set.
fn vcpus_with_affinity<'a>(
    context: &PlacementContext<'a>,
    pick: impl Fn(VcpuAffinity<'a>) -> Option<&'a CpuSet>,
) -> Vec<(&'a Vcpu, &'a CpuSet)> {
    let vcpus = context.map.vcpus.iter();
    vcpus
        .filter_map(|vcpu| Some((vcpu, pick(context.vcpu_affinity(Some(vcpu)))?)))
        .collect()
}

fn indices(vcpus: &[(&Vcpu, &CpuSet)]) -> CpuSet {
    vcpus.iter().map(|(vcpu, _)| vcpu.index).collect()
}

fn union<'a>(sets: impl Iterator<Item = &'a CpuSet>) -> CpuSet {
    sets.flat_map(CpuSet::iter).collect()
}

#[cfg(test)]
mod tests;
