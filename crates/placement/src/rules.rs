//! The rules by which a worker gets its CPUs.
//!
//! ```text
//!                         worker sleeps (poll off)            worker polls
//! auto       pinned       on the vCPU's CPU                   near it; else there, without polling
//!            floating     its CPUs in turn                    the same
//! same                    on the vCPU's CPU                   the same, forced
//! sibling    pinned       on the core's other thread; without one as auto
//! core-near  pinned       near it; without such a CPU as auto
//! list                    as listed                           the same, forced
//! none                    anywhere                            where no vCPU is pinned
//! ```
//!
//! *Near* is another CPU of the same L3 cache, then of the same NUMA node, no
//! vCPU's and not isolated; each worker gets one of its own while there are
//! enough, SMT siblings of vCPUs' CPUs last. All CPUs are allowed and online.
//! Isolated ones are used only where a vCPU is pinned to them (or to their SMT
//! sibling, in `sibling`), or where they are listed.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::policy::Placement;
use crate::queue_pairs::vcpus_of_queue_pair;
use crate::topology::Topology;
use crate::vcpus::{Vcpu, VcpuMap};

/// More pairs than vhost-user can address: no number from outside makes a longer walk.
const MAX_PLACED_PAIRS: u32 = 256;

/// What a decision depends on besides the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostConstraints<'a> {
    pub(crate) mode: &'a Placement,
    pub(crate) allowed: &'a CpuSet,
    pub(crate) topology: &'a Topology,
    /// Whether workers poll.
    pub(crate) polling: bool,
    /// Node of each pair's rings, where there are several nodes.
    pub(crate) memory: &'a BTreeMap<u32, u32>,
    /// The CPUs that vCPUs of other guests are pinned to.
    pub(crate) others: &'a CpuSet,
}

/// Everything that the decisions for one guest depend on.
#[derive(Debug)]
pub(crate) struct Rules<'a> {
    host: HostConstraints<'a>,
    map: &'a VcpuMap,
    /// Pairs that the driver uses.
    pairs: u32,
    /// The CPUs that are allowed and online.
    usable: CpuSet,
    /// The CPUs that vCPUs are pinned to, those of other guests included.
    pinned_cpus: CpuSet,
    /// SMT siblings of those.
    pinned_siblings: CpuSet,
    /// What each worker chose among the CPUs near its vCPU's, and whether that shares the L3 cache.
    near: OnceCell<Vec<Option<(u32, bool)>>>,
}

/// Where a worker stands.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CpuChoice {
    pub(crate) cpus: CpuSet,
    pub(crate) may_poll: bool,
    pub(crate) why: String,
}

/// Where a vCPU is, seen from the CPUs that workers may use.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum VcpuAffinity<'a> {
    /// Not known, for this reason.
    Unknown(String),
    /// Confined to CPUs of which a worker may use none.
    Unreachable(&'a CpuSet),
    /// Not pinned; a worker may use these of its CPUs.
    Floating(&'a CpuSet, CpuSet),
    /// Pinned; a worker may use these of its CPUs.
    Pinned(&'a CpuSet, CpuSet),
}

impl<'a> Rules<'a> {
    pub(crate) fn new(host: HostConstraints<'a>, map: &'a VcpuMap, pairs: u32) -> Self {
        let online = |&cpu: &u32| host.topology.is_online(cpu);
        let mut rules = Self {
            host,
            map,
            pairs,
            usable: non_empty_or(host.allowed.iter().filter(online).collect(), host.allowed),
            pinned_cpus: CpuSet::default(),
            pinned_siblings: CpuSet::default(),
            near: OnceCell::new(),
        };
        rules.pinned_cpus = rules.pinned();
        rules.pinned_cpus.extend(host.others.iter());
        rules.pinned_siblings = rules.siblings(&rules.pinned_cpus);
        rules
    }

    /// The CPUs that this guest's vCPUs are pinned to.
    pub(crate) fn pinned(&self) -> CpuSet {
        let affinities = self
            .map
            .vcpus
            .iter()
            .map(|vcpu| self.vcpu_affinity(Some(vcpu)));
        let pinned = affinities.filter_map(|vcpu_affinity| match vcpu_affinity {
            VcpuAffinity::Pinned(to, _) | VcpuAffinity::Unreachable(to) => Some(to),
            VcpuAffinity::Unknown(_) | VcpuAffinity::Floating(..) => None,
        });
        pinned.flat_map(CpuSet::iter).collect()
    }

    /// Where the worker of `pair` stands.
    pub(crate) fn choose_cpus(&self, pair: u32) -> CpuChoice {
        match self.host.mode {
            Placement::Auto => self.auto(pair),
            Placement::Same => self.same(pair),
            Placement::Sibling => self.sibling(pair),
            Placement::CoreNear => self.core_near(pair),
            Placement::List(cpus) => self.listed(cpus, pair),
            Placement::None => self.leave_to_scheduler(),
        }
    }

    fn auto(&self, pair: u32) -> CpuChoice {
        match self.vcpu_affinity(self.followed_vcpu(pair)) {
            VcpuAffinity::Pinned(to, _) if self.host.polling => match self.near(pair) {
                Some((cpus, how)) => unrestricted(
                    cpus,
                    format!("polls near the vCPU thread on {}, {how}", to.describe()),
                ),
                None => self.colocate(pair),
            },
            _ => self.colocate(pair),
        }
    }

    /// As auto places a worker that does not poll.
    fn colocate(&self, pair: u32) -> CpuChoice {
        match self.vcpu_affinity(self.followed_vcpu(pair)) {
            VcpuAffinity::Unknown(why) => self.round_robin(pair, &why),
            VcpuAffinity::Unreachable(on) => match self.near(pair) {
                Some((cpus, how)) => unrestricted(
                    cpus,
                    format!(
                        "{}; until then the worker is {how}",
                        self.describe_unreachable(on)
                    ),
                ),
                None => self.round_robin(pair, &self.describe_unreachable(on)),
            },
            VcpuAffinity::Floating(over, shared) => self.place_floating(pair, over, &shared),
            VcpuAffinity::Pinned(to, shared) => {
                let mut why = match shared == *to {
                    true => "vCPU thread pinned there".to_owned(),
                    false => format!(
                        "vCPU thread pinned to {}, the rest not allowed to this daemon",
                        to.describe()
                    ),
                };
                if self.host.polling {
                    why.push_str("; it sleeps instead of polling, as no CPU near is free");
                }
                CpuChoice {
                    cpus: shared,
                    may_poll: !self.host.polling,
                    why,
                }
            }
        }
    }

    fn same(&self, pair: u32) -> CpuChoice {
        match self.vcpu_affinity(self.followed_vcpu(pair)) {
            VcpuAffinity::Floating(on, shared) | VcpuAffinity::Pinned(on, shared) => unrestricted(
                shared,
                format!("placement same, vCPU thread on {}", on.describe()),
            ),
            VcpuAffinity::Unreachable(on) => self.round_robin(pair, &self.describe_unreachable(on)),
            VcpuAffinity::Unknown(why) => self.round_robin(pair, &why),
        }
    }

    fn sibling(&self, pair: u32) -> CpuChoice {
        let VcpuAffinity::Pinned(to, _) = self.vcpu_affinity(self.followed_vcpu(pair)) else {
            return self.auto(pair);
        };
        let siblings = self.siblings(to);
        if siblings.is_empty() {
            let why = format!("{} has no SMT sibling to use, so as auto", to.describe());
            return with_reason(why, self.auto(pair));
        }
        let why = format!("SMT sibling of the vCPU thread on {}", to.describe());
        self.avoid_pinned(siblings, why)
    }

    fn core_near(&self, pair: u32) -> CpuChoice {
        let VcpuAffinity::Pinned(to, _) = self.vcpu_affinity(self.followed_vcpu(pair)) else {
            return self.auto(pair);
        };
        match self.near(pair) {
            Some((cpus, how)) => unrestricted(
                cpus,
                format!("near the vCPU thread on {}, {how}", to.describe()),
            ),
            None => with_reason(
                format!("no CPU near {} is free, so as auto", to.describe()),
                self.colocate(pair),
            ),
        }
    }

    fn listed(&self, cpus: &[u32], pair: u32) -> CpuChoice {
        let why = format!("placement {} says so", self.host.mode);
        if cpus.is_empty() {
            return unrestricted(self.default_cpus().nth_cyclic(pair), why);
        }
        let turn = usize::try_from(pair)
            .ok()
            .and_then(|pair| pair.checked_rem(cpus.len()));
        match turn.and_then(|turn| cpus.get(turn)) {
            Some(&cpu) if self.is_usable(cpu) => unrestricted(CpuSet::from_iter([cpu]), why),
            cpu => self.substitute_listed(cpus, cpu, pair),
        }
    }

    /// For a listed CPU that cannot be used now.
    fn substitute_listed(&self, cpus: &[u32], missing: Option<&u32>, pair: u32) -> CpuChoice {
        let name = missing.map_or_else(String::new, |cpu| format!("CPU {cpu} "));
        let others: CpuSet = cpus
            .iter()
            .copied()
            .filter(|&cpu| self.is_usable(cpu))
            .collect();
        let why = format!("{name}of placement {} cannot be used now", self.host.mode);
        match others.is_empty() {
            true => self.round_robin(pair, &why),
            false => unrestricted(
                others.nth_cyclic(pair),
                format!("{why}, so another of it stands in"),
            ),
        }
    }

    fn leave_to_scheduler(&self) -> CpuChoice {
        self.avoid_pinned(
            self.default_cpus(),
            "placement none leaves it to the scheduler".into(),
        )
    }

    /// The CPUs in turn over which a vCPU floats.
    ///
    /// A worker that floats as well would wander off the cache its ring lies
    /// in, and two could meet on one CPU; standing on one of the vCPU's CPUs,
    /// each its own while there are enough, neither happens.
    fn place_floating(&self, pair: u32, over: &CpuSet, shared: &CpuSet) -> CpuChoice {
        let mut choice = non_empty_or(self.not_isolated(shared), shared);
        let mut on_node = String::new();
        if let Some(&node) = self.host.memory.get(&pair) {
            let there: CpuSet = choice
                .iter()
                .filter(|&cpu| self.host.topology.is_on_node(cpu, node))
                .collect();
            if !there.is_empty() && there != choice {
                choice = there;
                on_node = format!(" on the node of its memory, {node}");
            }
        }
        let turn = |cpus: CpuSet| cpus.nth_cyclic(pair);
        self.avoid_pinned_by(
            choice,
            format!(
                "vCPU thread floats over {}, so workers take these in turn{on_node}",
                over.describe()
            ),
            turn,
        )
    }

    fn round_robin(&self, pair: u32, why: &str) -> CpuChoice {
        let default_cpus = self.default_cpus();
        let why = format!("workers take {} in turn, as {why}", default_cpus.describe());
        self.avoid_pinned_by(default_cpus, why, |cpus| cpus.nth_cyclic(pair))
    }

    /// Keeps a worker that polls off the CPUs of pinned vCPUs, or from polling.
    fn avoid_pinned(&self, cpus: CpuSet, why: String) -> CpuChoice {
        self.avoid_pinned_by(cpus, why, |cpus| cpus)
    }

    fn avoid_pinned_by(
        &self,
        cpus: CpuSet,
        why: String,
        choose: impl Fn(CpuSet) -> CpuSet,
    ) -> CpuChoice {
        if !self.host.polling {
            return unrestricted(choose(cpus), why);
        }
        let others = cpus.difference(&self.pinned_cpus);
        let may_poll = !others.is_empty();
        let why = match may_poll {
            true => why,
            false => format!("{why}; it sleeps instead of polling, as vCPUs are pinned there"),
        };
        CpuChoice {
            cpus: choose(non_empty_or(others, &cpus)),
            may_poll,
            why,
        }
    }

    /// A CPU near the vCPU of `pair` for its worker, and in which way it is near.
    ///
    /// The workers choose in order, each the CPU that has the fewest of those
    /// before it; so what one of them gets does not depend on who asks.
    fn near(&self, pair: u32) -> Option<(CpuSet, &'static str)> {
        let near = self.near.get_or_init(|| {
            let mut load = BTreeMap::new();
            let count = self.pairs.max(pair.saturating_add(1)).min(MAX_PLACED_PAIRS);
            (0..count)
                .map(|pair| self.choose_near(pair, &mut load))
                .collect()
        });
        let (cpu, same_cache) = (*near.get(usize::try_from(pair).ok()?)?)?;
        let how = match same_cache {
            true => "on its L3 cache",
            false => "on its NUMA node",
        };
        Some((CpuSet::from_iter([cpu]), how))
    }

    fn choose_near(&self, pair: u32, load: &mut BTreeMap<u32, u32>) -> Option<(u32, bool)> {
        let (VcpuAffinity::Pinned(to, _) | VcpuAffinity::Unreachable(to)) =
            self.vcpu_affinity(self.followed_vcpu(pair))
        else {
            return None;
        };
        let topology = self.host.topology;
        let free = self
            .usable
            .iter()
            .filter(|&cpu| !topology.is_isolated(cpu) && !self.pinned_cpus.contains(cpu));
        let ranked = free.filter_map(|cpu| {
            let same_cache = to.iter().any(|vcpu| topology.shares_cache(vcpu, cpu));
            let node = topology.node_of(cpu)?;
            let same_node = to.iter().any(|vcpu| topology.is_on_node(vcpu, node));
            let load = load.get(&cpu).copied().unwrap_or(0);
            let rank = (load, self.pinned_siblings.contains(cpu), !same_cache, cpu);
            (same_cache || same_node).then_some(rank)
        });
        let (.., far, cpu) = ranked.min()?;
        *load.entry(cpu).or_default() += 1;
        Some((cpu, !far))
    }

    /// The usable SMT siblings of `cpus` that are not among them.
    fn siblings(&self, cpus: &CpuSet) -> CpuSet {
        let siblings = cpus.iter().map(|cpu| self.host.topology.siblings(cpu));
        let all: CpuSet = siblings
            .flat_map(|set| set.iter().collect::<Vec<_>>())
            .collect();
        all.difference(cpus).intersection(&self.usable)
    }

    /// Where `vcpu` is.
    pub(crate) fn vcpu_affinity(&self, vcpu: Option<&'a Vcpu>) -> VcpuAffinity<'a> {
        let Some(vcpu) = vcpu else {
            return VcpuAffinity::Unknown(self.map.failures());
        };
        let Some(pinned) = &vcpu.cpus else {
            let why = format!(
                "the CPUs of the vCPU thread cannot be read; {}",
                self.map.failures()
            );
            return VcpuAffinity::Unknown(why.trim_end_matches("; ").into());
        };
        let shared = pinned.intersection(&self.usable);
        let everywhere = pinned.len() > 1 && shared == self.usable;
        match shared.is_empty() {
            true => VcpuAffinity::Unreachable(pinned),
            false if everywhere || self.map.is_floating_together() => {
                VcpuAffinity::Floating(pinned, shared)
            }
            false => VcpuAffinity::Pinned(pinned, shared),
        }
    }

    /// The vCPU that the worker of `pair` follows.
    pub(crate) fn followed_vcpu(&self, pair: u32) -> Option<&'a Vcpu> {
        self.vcpus_of(pair).into_iter().next()
    }

    /// The vCPUs that the driver gives to `pair`.
    pub(crate) fn vcpus_of(&self, pair: u32) -> Vec<&'a Vcpu> {
        let count = u32::try_from(self.map.vcpus.len()).unwrap_or(u32::MAX);
        let positions = vcpus_of_queue_pair(pair, self.pairs, count);
        positions
            .iter()
            .filter_map(|&at| self.map.vcpus.get(usize::try_from(at).ok()?))
            .collect()
    }

    fn describe_unreachable(&self, on: &CpuSet) -> String {
        match on.intersection(self.host.allowed).is_empty() {
            true => format!(
                "vCPU thread is on {} where this daemon, on {}, may not run: widen the daemon's cpuset",
                on.describe(),
                self.host.allowed.describe()
            ),
            false => format!("vCPU thread is on {}, offline now", on.describe()),
        }
    }

    fn is_usable(&self, cpu: u32) -> bool {
        self.usable.contains(cpu)
    }

    pub(crate) fn host(&self) -> &HostConstraints<'a> {
        &self.host
    }

    pub(crate) fn map(&self) -> &'a VcpuMap {
        self.map
    }

    /// The CPUs that workers may use.
    pub(crate) fn usable(&self) -> &CpuSet {
        &self.usable
    }

    /// Those of them that may be taken without being named.
    fn default_cpus(&self) -> CpuSet {
        non_empty_or(self.not_isolated(&self.usable), &self.usable)
    }

    fn not_isolated(&self, cpus: &CpuSet) -> CpuSet {
        cpus.difference(self.host.topology.isolated())
    }
}

/// `cpus`, or `others` where there are none.
fn non_empty_or(cpus: CpuSet, others: &CpuSet) -> CpuSet {
    match cpus.is_empty() {
        true => others.clone(),
        false => cpus,
    }
}

/// A stand that forbids nothing.
fn unrestricted(cpus: CpuSet, why: String) -> CpuChoice {
    CpuChoice {
        cpus,
        may_poll: true,
        why,
    }
}

fn with_reason(reason: String, choice: CpuChoice) -> CpuChoice {
    CpuChoice {
        why: format!("{reason}: {}", choice.why),
        ..choice
    }
}

#[cfg(test)]
mod tests;
