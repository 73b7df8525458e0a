//! The rules that choose a worker's CPUs.
//!
//! ```text
//! policy     vCPU      worker sleeps (poll off)               worker polls
//! auto       pinned    the vCPU's CPU                         near it; else its CPU, sleeping
//!            floating  all CPUs that the vCPU may run on      one of them that is free
//! same                 the CPUs that the vCPU may run on      the same
//! sibling    pinned    an SMT sibling; without one, as auto   the same
//! core-near  pinned    near it; without such a CPU, as auto   the same
//! list                 as listed                              the same
//! none                 any CPU                                CPUs that no vCPU is pinned to
//! ```
//!
//! *Near* is a CPU that shares the L3 cache, else a CPU of the same NUMA node, that no vCPU is
//! pinned to and that is not isolated. *Free* is a CPU that no vCPU is pinned to, of the NUMA node
//! that holds the pair's memory if the vCPU may run there. `spread.rs` gives each worker a CPU of
//! its own while there are enough; SMT siblings of the vCPUs' CPUs come last. Workers use only CPUs
//! that are allowed and online. They use isolated CPUs only where a vCPU is pinned to them (with
//! `sibling`: or to their SMT sibling), or where the list names them.
//!
//! A worker that sleeps is not pinned to one CPU where its vCPU floats. Each device and each daemon
//! would choose from the same CPUs without regard to the others, and their workers would share a
//! few CPUs of a large host. The scheduler knows all threads.
//!
//! A vCPU whose thread is not known counts as one that floats over all allowed CPUs.

use crate::context::{PlacementContext, VcpuAffinity, non_empty_or};
use crate::cpuset::CpuSet;
use crate::policy::Placement;
use crate::spread::Spread;

/// The CPUs that a worker is pinned to, with the reason.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CpuChoice {
    pub(crate) cpus: CpuSet,
    pub(crate) may_poll: bool,
    pub(crate) why: String,
}

/// The rules, applied to one guest.
#[derive(Debug)]
pub(crate) struct Rules<'a> {
    context: &'a PlacementContext<'a>,
    /// The CPUs of workers that must not share theirs.
    spread: Spread<'a>,
}

impl<'a> Rules<'a> {
    pub(crate) fn new(context: &'a PlacementContext<'a>) -> Self {
        Self {
            context,
            spread: Spread::new(context),
        }
    }

    /// The CPUs for the worker of `pair`.
    pub(crate) fn choose_cpus(&self, pair: u32) -> CpuChoice {
        match self.context.host.mode {
            Placement::Auto => self.place_auto(pair),
            Placement::Same => self.place_same(pair),
            Placement::Sibling => self.place_on_sibling(pair),
            Placement::CoreNear => self.place_near(pair),
            Placement::List(cpus) => self.place_listed(cpus, pair),
            Placement::None => self.place_anywhere(),
        }
    }

    fn place_auto(&self, pair: u32) -> CpuChoice {
        match self.context.affinity_of(pair) {
            VcpuAffinity::Pinned(to, _) if self.context.host.polling => {
                match self.spread.near(pair) {
                    Some(near) => unrestricted(
                        near.cpus(),
                        format!(
                            "the worker polls near the vCPU thread on {}, on {}",
                            to.describe(),
                            near.describe()
                        ),
                    ),
                    None => self.colocate(pair),
                }
            }
            _ => self.colocate(pair),
        }
    }

    /// Chooses as policy `auto` does for a worker that does not poll.
    fn colocate(&self, pair: u32) -> CpuChoice {
        match self.context.affinity_of(pair) {
            VcpuAffinity::Unknown(why) => self.place_unknown(pair, &why),
            VcpuAffinity::Unreachable(on) => match self.spread.near(pair) {
                Some(near) => unrestricted(
                    near.cpus(),
                    format!(
                        "{}; meanwhile the worker runs on {}",
                        self.describe_unreachable(on),
                        near.describe()
                    ),
                ),
                None => self.place_unknown(pair, &self.describe_unreachable(on)),
            },
            VcpuAffinity::Floating(over, shared) => self.place_floating(pair, over, &shared),
            VcpuAffinity::Pinned(to, shared) => self.place_pinned(to, shared),
        }
    }

    /// Chooses the CPU of a pinned vCPU.
    fn place_pinned(&self, to: &CpuSet, shared: CpuSet) -> CpuChoice {
        let polling = self.context.host.polling;
        let mut why = match shared == *to {
            true => "the vCPU thread is pinned there".to_owned(),
            false => format!(
                "the vCPU thread is pinned to {}, of which this daemon may not use the others",
                to.describe()
            ),
        };
        if polling {
            why.push_str("; the worker sleeps instead of polling, as no CPU near it is free");
        }
        CpuChoice {
            cpus: shared,
            may_poll: !polling,
            why,
        }
    }

    fn place_same(&self, pair: u32) -> CpuChoice {
        match self.context.affinity_of(pair) {
            VcpuAffinity::Floating(on, shared) | VcpuAffinity::Pinned(on, shared) => unrestricted(
                shared,
                format!(
                    "placement same, and the vCPU thread may run on {}",
                    on.describe()
                ),
            ),
            VcpuAffinity::Unreachable(on) => {
                self.place_unknown(pair, &self.describe_unreachable(on))
            }
            VcpuAffinity::Unknown(why) => self.place_unknown(pair, &why),
        }
    }

    fn place_on_sibling(&self, pair: u32) -> CpuChoice {
        let VcpuAffinity::Pinned(to, _) = self.context.affinity_of(pair) else {
            return self.place_auto(pair);
        };
        let siblings = self.context.siblings(to);
        if siblings.is_empty() {
            let why = format!(
                "{} has no usable SMT sibling, so placement auto applies",
                to.describe()
            );
            return with_reason(&why, self.place_auto(pair));
        }
        let why = format!(
            "this is an SMT sibling of {}, which the vCPU thread is pinned to",
            to.describe()
        );
        self.avoid_pinned(siblings, why)
    }

    fn place_near(&self, pair: u32) -> CpuChoice {
        let VcpuAffinity::Pinned(to, _) = self.context.affinity_of(pair) else {
            return self.place_auto(pair);
        };
        match self.spread.near(pair) {
            Some(near) => unrestricted(
                near.cpus(),
                format!(
                    "the worker runs near the vCPU thread on {}, on {}",
                    to.describe(),
                    near.describe()
                ),
            ),
            None => with_reason(
                &format!(
                    "no CPU near {} is free, so placement auto applies",
                    to.describe()
                ),
                self.colocate(pair),
            ),
        }
    }

    fn place_listed(&self, cpus: &[u32], pair: u32) -> CpuChoice {
        let mode = self.context.host.mode;
        if cpus.is_empty() {
            let cpus = self.context.default_cpus().nth_cyclic(pair);
            return unrestricted(cpus, format!("placement {mode} takes all CPUs in turn"));
        }
        let position = usize::try_from(pair)
            .ok()
            .and_then(|pair| pair.checked_rem(cpus.len()));
        match position.and_then(|position| cpus.get(position)) {
            Some(&cpu) if self.context.is_usable(cpu) => unrestricted(
                CpuSet::from_iter([cpu]),
                format!("placement {mode} names it"),
            ),
            cpu => self.substitute_listed(cpus, cpu, pair),
        }
    }

    /// Chooses another CPU for a listed one that cannot be used now, because it is offline or no
    /// longer allowed.
    fn substitute_listed(&self, cpus: &[u32], missing: Option<&u32>, pair: u32) -> CpuChoice {
        let name = missing.map_or_else(String::new, |cpu| format!("CPU {cpu} "));
        let others: CpuSet = cpus
            .iter()
            .copied()
            .filter(|&cpu| self.context.is_usable(cpu))
            .collect();
        let why = format!(
            "{name}of placement {} cannot be used now",
            self.context.host.mode
        );
        match others.is_empty() {
            true => self.place_in_turn(pair, &why),
            false => unrestricted(
                others.nth_cyclic(pair),
                format!("{why}, so another CPU of the list replaces it"),
            ),
        }
    }

    fn place_anywhere(&self) -> CpuChoice {
        self.avoid_pinned(
            self.context.default_cpus(),
            "placement none leaves the choice to the scheduler".into(),
        )
    }

    /// Chooses from the CPUs that a floating vCPU may run on.
    fn place_floating(&self, pair: u32, over: &CpuSet, shared: &CpuSet) -> CpuChoice {
        let (cpus, node) = self.context.floating_cpus(pair, shared);
        let which = match node {
            Some(node) => format!("those of NUMA node {node}, which holds the pair's memory"),
            None if cpus == *over => "these".to_owned(),
            None => "those of them that it may use".to_owned(),
        };
        let over = over.describe();
        self.float_or_poll(pair, cpus, &which, |worker| {
            format!("the vCPU thread floats over {over}, so {worker}")
        })
    }

    /// Chooses from all CPUs that need not be named, because the CPUs of the vCPU are not known or
    /// cannot be used; `why` says which.
    fn place_unknown(&self, pair: u32, why: &str) -> CpuChoice {
        let (cpus, node) = self.context.floating_cpus(pair, &self.context.usable);
        let mut which = cpus.describe();
        if let Some(node) = node {
            which.push_str(&format!(
                " of NUMA node {node}, which holds the pair's memory"
            ));
        }
        self.float_or_poll(pair, cpus, &which, |worker| format!("{worker}, as {why}"))
    }

    /// Lets a worker that sleeps float over `cpus`, and gives one that polls a CPU of its own among
    /// them. `which` are these CPUs in words, and `sentence` completes what the worker does.
    fn float_or_poll(
        &self,
        pair: u32,
        cpus: CpuSet,
        which: &str,
        sentence: impl Fn(String) -> String,
    ) -> CpuChoice {
        let floats = sentence(format!("the worker floats over {which}"));
        if !self.context.host.polling {
            return unrestricted(cpus, floats);
        }
        match self.spread.free(pair) {
            Some(own) => unrestricted(
                own.cpus(),
                sentence(format!(
                    "the worker polls on one of {which}, chosen to avoid pinned vCPUs and other polling workers"
                )),
            ),
            None => CpuChoice {
                cpus,
                may_poll: false,
                why: format!(
                    "{floats}; the worker sleeps instead of polling, as vCPUs are pinned there"
                ),
            },
        }
    }

    fn place_in_turn(&self, pair: u32, why: &str) -> CpuChoice {
        let cpus = self.context.default_cpus();
        let why = format!(
            "workers are pinned to {} in turn, as {why}",
            cpus.describe()
        );
        self.avoid_pinned_by(cpus, why, |cpus| cpus.nth_cyclic(pair))
    }

    /// If workers poll, removes the CPUs of pinned vCPUs from `cpus`. If no CPU is left, the worker
    /// keeps `cpus` and must not poll.
    fn avoid_pinned(&self, cpus: CpuSet, why: String) -> CpuChoice {
        self.avoid_pinned_by(cpus, why, |cpus| cpus)
    }

    fn avoid_pinned_by(
        &self,
        cpus: CpuSet,
        why: String,
        choose: impl Fn(CpuSet) -> CpuSet,
    ) -> CpuChoice {
        if !self.context.host.polling {
            return unrestricted(choose(cpus), why);
        }
        let others = cpus.difference(&self.context.pinned_cpus);
        let may_poll = !others.is_empty();
        let why = match may_poll {
            true => why,
            false => {
                format!("{why}; the worker sleeps instead of polling, as vCPUs are pinned there")
            }
        };
        CpuChoice {
            cpus: choose(non_empty_or(others, &cpus)),
            may_poll,
            why,
        }
    }

    fn describe_unreachable(&self, on: &CpuSet) -> String {
        let allowed = self.context.host.allowed;
        match on.intersection(allowed).is_empty() {
            true => format!(
                "the vCPU thread is pinned to {}, but this daemon may run on {} only: widen the daemon's cpuset",
                on.describe(),
                allowed.describe()
            ),
            false => format!(
                "the vCPU thread is pinned to {}, which is offline",
                on.describe()
            ),
        }
    }
}

/// A choice that does not forbid polling.
fn unrestricted(cpus: CpuSet, why: String) -> CpuChoice {
    CpuChoice {
        cpus,
        may_poll: true,
        why,
    }
}

fn with_reason(reason: &str, choice: CpuChoice) -> CpuChoice {
    CpuChoice {
        why: format!("{reason}: {}", choice.why),
        ..choice
    }
}

#[cfg(test)]
mod tests;
