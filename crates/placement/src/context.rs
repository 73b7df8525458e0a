//! What the placement of one guest's workers depends on: the host, the vCPU threads and the number
//! of queue pairs, and the sets of CPUs that follow from these.

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::policy::Placement;
use crate::queue_pairs::vcpus_of_queue_pair;
use crate::topology::Topology;
use crate::vcpus::{Vcpu, VcpuMap};

/// Everything that a placement depends on besides the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostConstraints<'a> {
    pub(crate) mode: &'a Placement,
    /// The CPUs that this process may run on, offline ones included.
    pub(crate) allowed: &'a CpuSet,
    pub(crate) topology: &'a Topology,
    /// Whether the workers are configured to poll.
    pub(crate) polling: bool,
    /// The NUMA node of each pair's rings, where it is known.
    pub(crate) memory: &'a BTreeMap<u32, u32>,
    /// The CPUs that vCPUs of other guests are pinned to.
    pub(crate) others: &'a CpuSet,
    /// The CPUs of each worker of another device that polls.
    pub(crate) polling_elsewhere: &'a [CpuSet],
    /// By pair: the CPU of a worker that polls there already.
    pub(crate) previous: &'a BTreeMap<u32, u32>,
}

/// The host and one guest, with the sets of CPUs that the rules need.
#[derive(Debug)]
pub(crate) struct PlacementContext<'a> {
    pub(crate) host: HostConstraints<'a>,
    pub(crate) map: &'a VcpuMap,
    /// The number of pairs that the driver uses.
    pub(crate) pairs: u32,
    /// The CPUs that workers may use: those that are allowed and online.
    pub(crate) usable: CpuSet,
    /// The CPUs that vCPUs are pinned to, those of other guests included.
    pub(crate) pinned_cpus: CpuSet,
    /// The SMT siblings of these.
    pub(crate) pinned_siblings: CpuSet,
    /// Whether all vCPUs may run on the same several CPUs.
    is_floating_together: bool,
}

/// The CPUs that a vCPU's thread may run on, and those of them that workers may use.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum VcpuAffinity<'a> {
    /// The CPUs are not known, for this reason.
    Unknown(String),
    /// The thread may run on these CPUs, none of which workers may use.
    Unreachable(&'a CpuSet),
    /// The thread is not pinned and may run on the first set, of which workers may use the second.
    Floating(&'a CpuSet, CpuSet),
    /// The thread is pinned to the first set, of which workers may use the second.
    Pinned(&'a CpuSet, CpuSet),
}

impl<'a> PlacementContext<'a> {
    pub(crate) fn new(host: HostConstraints<'a>, map: &'a VcpuMap, pairs: u32) -> Self {
        let online = |&cpu: &u32| host.topology.is_online(cpu);
        let mut context = Self {
            host,
            map,
            pairs,
            usable: non_empty_or(host.allowed.iter().filter(online).collect(), host.allowed),
            pinned_cpus: CpuSet::default(),
            pinned_siblings: CpuSet::default(),
            is_floating_together: map.is_floating_together(),
        };
        context.pinned_cpus = context.pinned_by_guest();
        context.pinned_cpus.extend(host.others.iter());
        context.pinned_siblings = context.siblings(&context.pinned_cpus);
        context
    }

    /// The CPUs that this guest's vCPUs are pinned to.
    pub(crate) fn pinned_by_guest(&self) -> CpuSet {
        let vcpus = self.map.vcpus.iter();
        let affinities = vcpus.map(|vcpu| self.vcpu_affinity(Some(vcpu)));
        let pinned = affinities.filter_map(|affinity| match affinity {
            VcpuAffinity::Pinned(to, _) | VcpuAffinity::Unreachable(to) => Some(to),
            VcpuAffinity::Unknown(_) | VcpuAffinity::Floating(..) => None,
        });
        pinned.flat_map(CpuSet::iter).collect()
    }

    /// The CPUs that the thread of `vcpu` may run on.
    pub(crate) fn vcpu_affinity(&self, vcpu: Option<&'a Vcpu>) -> VcpuAffinity<'a> {
        let Some(vcpu) = vcpu else {
            return VcpuAffinity::Unknown(self.map.failures());
        };
        let Some(cpus) = &vcpu.cpus else {
            let why = format!(
                "the CPUs of the vCPU thread cannot be read; {}",
                self.map.failures()
            );
            return VcpuAffinity::Unknown(why.trim_end_matches("; ").into());
        };
        let shared = cpus.intersection(&self.usable);
        // A thread that may use every usable CPU is not pinned.
        let is_unrestricted = cpus.len() > 1 && shared == self.usable;
        match shared.is_empty() {
            true => VcpuAffinity::Unreachable(cpus),
            false if is_unrestricted || self.is_floating_together => {
                VcpuAffinity::Floating(cpus, shared)
            }
            false => VcpuAffinity::Pinned(cpus, shared),
        }
    }

    /// The vCPU that the placement of the worker of `pair` depends on: the first that the driver
    /// assigns to the pair.
    pub(crate) fn first_vcpu(&self, pair: u32) -> Option<&'a Vcpu> {
        self.vcpus_of(pair).into_iter().next()
    }

    /// The affinity of that vCPU.
    pub(crate) fn affinity_of(&self, pair: u32) -> VcpuAffinity<'a> {
        self.vcpu_affinity(self.first_vcpu(pair))
    }

    /// The vCPUs that the driver assigns to `pair`.
    pub(crate) fn vcpus_of(&self, pair: u32) -> Vec<&'a Vcpu> {
        let count = u32::try_from(self.map.vcpus.len()).unwrap_or(u32::MAX);
        let positions = vcpus_of_queue_pair(pair, self.pairs, count);
        positions
            .iter()
            .filter_map(|&position| self.map.vcpus.get(usize::try_from(position).ok()?))
            .collect()
    }

    /// The usable SMT siblings of `cpus` that are not among `cpus`.
    pub(crate) fn siblings(&self, cpus: &CpuSet) -> CpuSet {
        let siblings = cpus.iter().map(|cpu| self.host.topology.siblings(cpu));
        let all: CpuSet = siblings
            .flat_map(|set| set.iter().collect::<Vec<_>>())
            .collect();
        all.difference(cpus).intersection(&self.usable)
    }

    pub(crate) fn is_usable(&self, cpu: u32) -> bool {
        self.usable.contains(cpu)
    }

    /// The usable CPUs that a worker may get without being named: those that are not isolated.
    pub(crate) fn default_cpus(&self) -> CpuSet {
        non_empty_or(self.not_isolated(&self.usable), &self.usable)
    }

    /// The CPUs that a worker of `pair` may use where its vCPU may run on any of `cpus`: those that
    /// are not isolated, and of these the ones on the NUMA node of the pair's memory. The result
    /// names that node if it excludes any CPU.
    pub(crate) fn floating_cpus(&self, pair: u32, cpus: &CpuSet) -> (CpuSet, Option<u32>) {
        let cpus = non_empty_or(self.not_isolated(cpus), cpus);
        if let Some(&node) = self.host.memory.get(&pair) {
            let is_local = |&cpu: &u32| self.host.topology.is_on_node(cpu, node);
            let local: CpuSet = cpus.iter().filter(is_local).collect();
            if !local.is_empty() && local != cpus {
                return (local, Some(node));
            }
        }
        (cpus, None)
    }

    pub(crate) fn not_isolated(&self, cpus: &CpuSet) -> CpuSet {
        cpus.difference(self.host.topology.isolated())
    }
}

/// `cpus`, or `others` where `cpus` is empty.
pub(crate) fn non_empty_or(cpus: CpuSet, others: &CpuSet) -> CpuSet {
    match cpus.is_empty() {
        true => others.clone(),
        false => cpus,
    }
}
