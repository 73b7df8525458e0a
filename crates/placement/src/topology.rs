//! The host's CPUs as sysfs shows them: which are online, isolated, of one
//! core, of one cache, of one NUMA node.
//!
//! Every file may be missing, as in a container or on a small machine: what is
//! not known is then taken as it is on the simplest host (each CPU online, not
//! isolated, a core of its own, on one node with all others).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::cpuset::CpuSet;

/// Level of the cache that "near" is measured by.
const NEAR_CACHE: &str = "3";

/// What is known of the host's CPUs.
///
/// [`Topology::default`] knows nothing; see the module for what that means.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// Empty: not known.
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
    /// The topology that the sysfs mounted at `root` shows (`/sys` for this
    /// host's). Some reads for each CPU: milliseconds on a large host.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let cpus = root.join("devices/system/cpu");
        let online = list(&cpus.join("online")).unwrap_or_default();
        let mut isolated = list(&cpus.join("isolated")).unwrap_or_default();
        // Partitions that cpusets isolate while the host runs.
        let partitions = list(&root.join("fs/cgroup/cpuset.cpus.isolated"));
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

    /// Whether `cpu` is kept out of the scheduler's balancing (`isolcpus=`, or
    /// an isolated cpuset partition).
    #[must_use]
    pub fn is_isolated(&self, cpu: u32) -> bool {
        self.isolated.contains(cpu)
    }

    /// The CPUs that are online now; empty where that is not known.
    #[must_use]
    pub fn online(&self) -> &CpuSet {
        &self.online
    }

    /// The isolated CPUs.
    #[must_use]
    pub fn isolated(&self) -> &CpuSet {
        &self.isolated
    }

    /// The other online CPUs of the same core; empty without SMT.
    #[must_use]
    pub fn siblings(&self, cpu: u32) -> CpuSet {
        let core = self.cores.get(&cpu).into_iter().flat_map(CpuSet::iter);
        core.filter(|&other| other != cpu && self.is_online(other))
            .collect()
    }

    /// Whether two CPUs have one L3 cache.
    #[must_use]
    pub fn shares_cache(&self, cpu: u32, other: u32) -> bool {
        cpu == other
            || self
                .caches
                .get(&cpu)
                .is_some_and(|cache| cache.contains(other))
    }

    /// The NUMA node of `cpu`; `None` where it is not known, as for one that is
    /// offline. On a host without nodes it is 0.
    #[must_use]
    pub fn node_of(&self, cpu: u32) -> Option<u32> {
        if self.nodes.is_empty() {
            return Some(0);
        }
        let holds = |(&node, cpus): (&u32, &CpuSet)| cpus.contains(cpu).then_some(node);
        self.nodes.iter().find_map(holds)
    }

    /// The node that all of `cpus` lie on, if it is one.
    #[must_use]
    pub fn node_of_all(&self, cpus: &CpuSet) -> Option<u32> {
        let mut nodes = cpus.iter().map(|cpu| self.node_of(cpu));
        let first = nodes.next()??;
        nodes.all(|node| node == Some(first)).then_some(first)
    }

    /// Whether `cpu` lies on `node`.
    #[must_use]
    pub fn is_on_node(&self, cpu: u32, node: u32) -> bool {
        self.node_of(cpu) == Some(node)
    }

    /// Number of NUMA nodes, 1 at least.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.nodes.len().max(1)
    }
}

/// The CPUs of the core whose CPU's directory this is; its name changed in Linux 5.3.
fn core(cpu: &Path) -> Option<CpuSet> {
    let file = |name: &str| list(&cpu.join("topology").join(name));
    file("core_cpus_list").or_else(|| file("thread_siblings_list"))
}

/// The CPUs that share this CPU's L3 cache.
fn near_cache(cpu: &Path) -> Option<CpuSet> {
    numbered(&cpu.join("cache"), "index")
        .into_iter()
        .map(|number| cpu.join(format!("cache/index{number}")))
        .find(|index| text(&index.join("level")).is_some_and(|level| level == NEAR_CACHE))
        .and_then(|index| list(&index.join("shared_cpu_list")))
}

fn nodes(dir: &Path) -> BTreeMap<u32, CpuSet> {
    numbered(dir, "node")
        .into_iter()
        .filter_map(|node| Some((node, list(&dir.join(format!("node{node}/cpulist")))?)))
        .collect()
}

/// The numbers N of the entries `prefixN` in `dir`.
fn numbered(dir: &Path, prefix: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let mut numbers: Vec<u32> = names
        .filter_map(|name| name.strip_prefix(prefix)?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

fn list(file: &Path) -> Option<CpuSet> {
    text(file)?.parse().ok()
}

fn text(file: &Path) -> Option<String> {
    Some(fs::read_to_string(file).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TempDir, set, sysfs};

    #[test]
    fn reads_two_nodes_with_smt_caches_isolated_and_offline_cpus() {
        let dir = TempDir::new("two-nodes");
        // Cores are CPU k and k + 8; 7 is offline, and with it its core is single.
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
    fn isolated_partitions_of_cpusets_count_too() {
        let dir = TempDir::new("partition");
        sysfs(dir.path()).online("0-3").isolated("");
        fs::create_dir_all(dir.path().join("fs/cgroup")).unwrap();
        fs::write(dir.path().join("fs/cgroup/cpuset.cpus.isolated"), "2-3\n").unwrap();
        assert_eq!(Topology::read(dir.path()).isolated(), &set("2-3"));
    }

    #[test]
    fn where_nothing_is_known_the_host_is_simple() {
        let dir = TempDir::new("bare");
        for topology in [Topology::read(dir.path()), Topology::default()] {
            assert!(topology.is_online(5) && !topology.is_isolated(5));
            assert_eq!(topology.siblings(5), CpuSet::default());
            assert!(!topology.shares_cache(0, 1));
            assert_eq!((topology.node_of(5), topology.node_count()), (Some(0), 1));
        }
    }

    #[test]
    fn this_host_shows_its_cpus() {
        let topology = Topology::read(Path::new("/sys"));
        for cpu in crate::allowed_cpus().unwrap().iter() {
            assert!(topology.is_online(cpu), "{topology:?}");
            assert!(topology.node_of(cpu).is_some(), "{topology:?}");
        }
    }
}
