//! The host's CPUs as sysfs shows them: which ones are online and isolated, and which ones share a
//! core, an L3 cache or a NUMA node.
//!
//! Every file may be missing, as in a container or on a small machine. Unknown facts are then
//! assumed to be those of the simplest host: every CPU is online, is not isolated, is a core of its
//! own, and is on the only NUMA node.

use std::collections::BTreeMap;
use std::path::Path;

use crate::cpuset::CpuSet;
use crate::kernel_files::{numbered_entries, read_cpulist, read_text};

/// The level of the cache that makes CPUs count as near to each other.
const NEAR_CACHE_LEVEL: &str = "3";

/// The host's CPUs: which ones are online and isolated, and what they share.
///
/// [`Topology::default`] is the simplest host: every CPU is online, is not isolated, is a core of
/// its own, and is on the only NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// Empty where they are not known.
    online: CpuSet,
    isolated: CpuSet,
    /// All CPUs of a CPU's core, itself included.
    cores: BTreeMap<u32, CpuSet>,
    /// All CPUs of a CPU's L3 cache, itself included.
    caches: BTreeMap<u32, CpuSet>,
    /// CPUs by node.
    nodes: BTreeMap<u32, CpuSet>,
}

impl Topology {
    /// Reads the topology from the sysfs mounted at `root` (`/sys` for this host). It reads several
    /// files for each CPU, which takes milliseconds on a large host.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let cpus = root.join("devices/system/cpu");
        let online = read_cpulist(&cpus.join("online")).unwrap_or_default();
        let mut isolated = read_cpulist(&cpus.join("isolated")).unwrap_or_default();
        // Cpuset partitions are isolated at run time and do not appear in the file above.
        let partitions = read_cpulist(&root.join("fs/cgroup/cpuset.cpus.isolated"));
        isolated.extend(partitions.unwrap_or_default().iter());
        let mut cores = BTreeMap::new();
        let mut caches = BTreeMap::new();
        for cpu in online.iter() {
            let dir = cpus.join(format!("cpu{cpu}"));
            cores.extend(core(&dir).map(|core| (cpu, core)));
            caches.extend(near_cache(&dir).map(|cache| (cpu, cache)));
        }
        Self {
            online,
            isolated,
            cores,
            caches,
            nodes: nodes(&root.join("devices/system/node")),
        }
    }

    /// Whether `cpu` is online now.
    #[must_use]
    pub fn is_online(&self, cpu: u32) -> bool {
        self.online.is_empty() || self.online.contains(cpu)
    }

    /// Whether the scheduler balances no threads onto `cpu` (`isolcpus=`, or an isolated cpuset
    /// partition).
    #[must_use]
    pub fn is_isolated(&self, cpu: u32) -> bool {
        self.isolated.contains(cpu)
    }

    /// The CPUs that are online now; empty where they are not known.
    #[must_use]
    pub fn online(&self) -> &CpuSet {
        &self.online
    }

    /// The isolated CPUs.
    #[must_use]
    pub fn isolated(&self) -> &CpuSet {
        &self.isolated
    }

    /// The other online CPUs of the core of `cpu`; empty without SMT.
    #[must_use]
    pub fn siblings(&self, cpu: u32) -> CpuSet {
        let core = self.cores.get(&cpu).into_iter().flat_map(CpuSet::iter);
        core.filter(|&other| other != cpu && self.is_online(other))
            .collect()
    }

    /// Whether two CPUs share an L3 cache.
    #[must_use]
    pub fn shares_cache(&self, cpu: u32, other: u32) -> bool {
        cpu == other
            || self
                .caches
                .get(&cpu)
                .is_some_and(|cache| cache.contains(other))
    }

    /// The NUMA node of `cpu`; `None` where it is not known, as for an offline CPU. On a host
    /// without NUMA it is 0.
    #[must_use]
    pub fn node_of(&self, cpu: u32) -> Option<u32> {
        if self.nodes.is_empty() {
            return Some(0);
        }
        let holds = |(&node, cpus): (&u32, &CpuSet)| cpus.contains(cpu).then_some(node);
        self.nodes.iter().find_map(holds)
    }

    /// The NUMA node of `cpus`; `None` where they are on several.
    #[must_use]
    pub fn node_of_all(&self, cpus: &CpuSet) -> Option<u32> {
        let mut nodes = cpus.iter().map(|cpu| self.node_of(cpu));
        let first = nodes.next()??;
        nodes.all(|node| node == Some(first)).then_some(first)
    }

    /// Whether `cpu` is on NUMA node `node`.
    #[must_use]
    pub fn is_on_node(&self, cpu: u32, node: u32) -> bool {
        self.node_of(cpu) == Some(node)
    }

    /// The number of NUMA nodes, at least 1.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.nodes.len().max(1)
    }
}

/// The CPUs that share the core of the CPU in folder `cpu`. Linux 5.3 renamed the file.
fn core(cpu: &Path) -> Option<CpuSet> {
    let file = |name: &str| read_cpulist(&cpu.join("topology").join(name));
    file("core_cpus_list").or_else(|| file("thread_siblings_list"))
}

/// The CPUs that share the L3 cache of the CPU in folder `cpu`.
fn near_cache(cpu: &Path) -> Option<CpuSet> {
    numbered_entries(&cpu.join("cache"), "index")
        .into_iter()
        .map(|number| cpu.join(format!("cache/index{number}")))
        .find(|index| read_text(&index.join("level")).is_ok_and(|level| level == NEAR_CACHE_LEVEL))
        .and_then(|index| read_cpulist(&index.join("shared_cpu_list")))
}

fn nodes(dir: &Path) -> BTreeMap<u32, CpuSet> {
    numbered_entries(dir, "node")
        .into_iter()
        .filter_map(|node| {
            Some((
                node,
                read_cpulist(&dir.join(format!("node{node}/cpulist")))?,
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TempDir, set, sysfs};
    use std::fs;

    #[test]
    fn host_with_two_nodes_is_read_with_its_cores_caches_isolated_and_offline_cpus() {
        let dir = TempDir::new("two-nodes");
        // CPUs k and k + 8 share a core; CPU 7 is offline, so CPU 15 has its core alone.
        sysfs(dir.path())
            .online("0-6,8-15")
            .isolated("3,11")
            .cores(&["0,8", "1,9", "2,10", "3,11", "4,12", "5,13", "6,14", "15"])
            .caches(&["0-1,8-9", "2-3,10-11", "4-5,12-13", "6,14-15"])
            .nodes(&["0-3,8-11", "4-6,12-15"]);
        let topology = Topology::read(dir.path());
        assert_eq!(topology.online(), &set("0-6,8-15"));
        assert_eq!(topology.isolated(), &set("3,11"));
        assert_eq!((topology.node_count(), topology.is_online(7)), (2, false));
        assert_eq!(topology.siblings(2), set("10"));
        assert_eq!(topology.siblings(15), CpuSet::default());
        for (cpu, other, shared) in [(0, 9, true), (0, 2, false), (6, 15, true), (7, 7, true)] {
            assert_eq!(topology.shares_cache(cpu, other), shared, "{cpu} {other}");
        }
        let nodes: Vec<_> = [0, 11, 4, 7].map(|cpu| topology.node_of(cpu)).into();
        assert_eq!(nodes, [Some(0), Some(0), Some(1), None]);
        for (cpus, node) in [("0-3", Some(0)), ("3-4", None), ("7", None), ("", None)] {
            assert_eq!(topology.node_of_all(&set(cpus)), node, "{cpus}");
        }
    }

    #[test]
    fn cpus_of_an_isolated_cpuset_partition_are_isolated() {
        let dir = TempDir::new("partition");
        sysfs(dir.path()).online("0-3").isolated("");
        fs::create_dir_all(dir.path().join("fs/cgroup")).unwrap();
        fs::write(dir.path().join("fs/cgroup/cpuset.cpus.isolated"), "2-3\n").unwrap();
        assert_eq!(Topology::read(dir.path()).isolated(), &set("2-3"));
    }

    #[test]
    fn without_sysfs_every_cpu_is_online_and_on_one_node() {
        let dir = TempDir::new("bare");
        for topology in [Topology::read(dir.path()), Topology::default()] {
            assert!(topology.is_online(5) && !topology.is_isolated(5));
            assert_eq!(topology.siblings(5), CpuSet::default());
            assert!(!topology.shares_cache(0, 1));
            assert_eq!((topology.node_of(5), topology.node_count()), (Some(0), 1));
        }
    }

    #[test]
    fn cpus_of_this_host_are_online_and_on_a_node() {
        let topology = Topology::read(Path::new("/sys"));
        for cpu in crate::allowed_cpus().unwrap().iter() {
            assert!(topology.is_online(cpu), "{topology:?}");
            assert!(topology.node_of(cpu).is_some(), "{topology:?}");
        }
    }
}
