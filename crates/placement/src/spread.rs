//! Gives each worker that must not share its CPU one CPU of its own, as long as there are enough.
//!
//! There are two kinds of such workers: those that run near their pinned vCPU, and those that poll
//! while their vCPU is not pinned. All choose among CPUs to which no vCPU is pinned.
//!
//! The workers choose in the order of their pairs, each the CPU with the fewest workers. Workers
//! that poll count those of other devices too. Where two CPUs are equally good, a worker keeps the
//! one that it has. So a worker moves only where that reduces the number of workers that share a
//! CPU, and devices that choose one after the other come to rest, whatever their order is.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use virtionet_base::MAX_QUEUE_PAIRS;

use crate::context::{PlacementContext, VcpuAffinity};
use crate::cpuset::CpuSet;
use crate::policy::Placement;

/// How a worker's CPU relates to its vCPU, the best relation first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CpuRelation {
    /// It shares the L3 cache with the vCPU's CPU.
    SharedCache,
    /// It is of the same NUMA node as the vCPU's CPU.
    SameNode,
    /// The vCPU is not pinned to a CPU nearby.
    Unrelated,
}

/// The CPU that a worker gets for itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OwnCpu {
    cpu: u32,
    relation: CpuRelation,
}

/// The choice of a CPU for each worker of one guest.
#[derive(Debug)]
pub(crate) struct Spread<'a> {
    context: &'a PlacementContext<'a>,
    /// By pair.
    chosen: OnceCell<Vec<Option<OwnCpu>>>,
}

impl<'a> Spread<'a> {
    pub(crate) fn new(context: &'a PlacementContext<'a>) -> Self {
        Self {
            context,
            chosen: OnceCell::new(),
        }
    }

    /// The CPU near the vCPU of `pair`; `None` where no CPU near it is free.
    pub(crate) fn near(&self, pair: u32) -> Option<OwnCpu> {
        self.choice(pair)
            .filter(|own| own.relation != CpuRelation::Unrelated)
    }

    /// The CPU for a worker that polls while the vCPU of `pair` is not pinned; `None` where a vCPU
    /// is pinned to each CPU.
    pub(crate) fn free(&self, pair: u32) -> Option<OwnCpu> {
        self.choice(pair)
            .filter(|own| own.relation == CpuRelation::Unrelated)
    }

    /// The result for one worker does not depend on which worker is asked for first.
    fn choice(&self, pair: u32) -> Option<OwnCpu> {
        let chosen = self.chosen.get_or_init(|| {
            // A number from outside must not make the loop longer than any device needs.
            let count = pair.saturating_add(1).max(self.context.pairs);
            self.choose_all(count.min(u32::from(MAX_QUEUE_PAIRS)))
        });
        *chosen.get(usize::try_from(pair).ok()?)?
    }

    fn choose_all(&self, count: u32) -> Vec<Option<OwnCpu>> {
        let host = &self.context.host;
        let mut workers_by_cpu: BTreeMap<u32, u32> = BTreeMap::new();
        let mut previous = BTreeMap::new();
        if host.polling {
            previous = host.previous.clone();
            previous.retain(|pair, _| *pair < count);
            let others = host.polling_elsewhere.iter().flat_map(CpuSet::iter);
            for cpu in others.chain(previous.values().copied()) {
                *workers_by_cpu.entry(cpu).or_default() += 1;
            }
        }
        let choose = |pair| {
            let before = previous.get(&pair).copied();
            if let Some(workers) = before.and_then(|cpu| workers_by_cpu.get_mut(&cpu)) {
                *workers = workers.saturating_sub(1);
            }
            let chosen = self.choose(pair, before, &workers_by_cpu)?;
            *workers_by_cpu.entry(chosen.cpu).or_default() += 1;
            Some(chosen)
        };
        (0..count).map(choose).collect()
    }

    fn choose(
        &self,
        pair: u32,
        before: Option<u32>,
        workers_by_cpu: &BTreeMap<u32, u32>,
    ) -> Option<OwnCpu> {
        let ranked = self.candidates(pair).into_iter().map(|own| {
            let OwnCpu { cpu, relation } = own;
            let workers = workers_by_cpu.get(&cpu).copied().unwrap_or(0);
            let is_sibling = self.context.pinned_siblings.contains(cpu);
            (
                (workers, is_sibling, relation, Some(cpu) != before, cpu),
                own,
            )
        });
        ranked.min_by_key(|(rank, _)| *rank).map(|(_, own)| own)
    }

    /// The CPUs that the worker of `pair` may choose from.
    fn candidates(&self, pair: u32) -> Vec<OwnCpu> {
        let usable = &self.context.usable;
        let near = |to| match self.context.host.mode {
            // This policy places no worker near its vCPU.
            Placement::Same => Vec::new(),
            _ => self.near_candidates(to),
        };
        match self.context.affinity_of(pair) {
            VcpuAffinity::Pinned(to, _) => near(to),
            VcpuAffinity::Unreachable(to) => match near(to) {
                near if near.is_empty() => self.free_candidates(pair, usable),
                near => near,
            },
            VcpuAffinity::Floating(_, shared) => self.free_candidates(pair, &shared),
            VcpuAffinity::Unknown(_) => self.free_candidates(pair, usable),
        }
    }

    fn near_candidates(&self, to: &CpuSet) -> Vec<OwnCpu> {
        let topology = self.context.host.topology;
        let usable = self.context.usable.iter();
        let free = usable
            .filter(|&cpu| !topology.is_isolated(cpu) && !self.context.pinned_cpus.contains(cpu));
        let near = free.filter_map(|cpu| {
            let shares_cache = to.iter().any(|vcpu| topology.shares_cache(vcpu, cpu));
            let node = topology.node_of(cpu)?;
            let same_node = || to.iter().any(|vcpu| topology.is_on_node(vcpu, node));
            let relation = match shares_cache {
                true => CpuRelation::SharedCache,
                false => same_node().then_some(CpuRelation::SameNode)?,
            };
            Some(OwnCpu { cpu, relation })
        });
        near.collect()
    }

    fn free_candidates(&self, pair: u32, cpus: &CpuSet) -> Vec<OwnCpu> {
        // A worker that sleeps leaves the choice to the scheduler.
        if !self.context.host.polling {
            return Vec::new();
        }
        let (cpus, _) = self.context.floating_cpus(pair, cpus);
        let free = cpus.difference(&self.context.pinned_cpus);
        let own = |cpu| OwnCpu {
            cpu,
            relation: CpuRelation::Unrelated,
        };
        free.iter().map(own).collect()
    }
}

impl OwnCpu {
    pub(crate) fn cpus(self) -> CpuSet {
        CpuSet::from_iter([self.cpu])
    }

    pub(crate) fn describe(self) -> &'static str {
        match self.relation {
            CpuRelation::SharedCache => "a CPU that shares its L3 cache",
            CpuRelation::SameNode => "a CPU of its NUMA node",
            CpuRelation::Unrelated => "a CPU to which no vCPU is pinned",
        }
    }
}

#[cfg(test)]
mod tests;
