//! What the helper does for the daemon: what the daemon's configuration names, and nothing else.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use virtionet_base::Pattern;

use crate::protocol::Request;
use crate::rule::Rule;

/// All rules of a helper.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    taps: Names,
    /// The indexes of the interfaces that were opened by their names. An index stays the same when
    /// the interface is renamed.
    tap_indexes: BTreeSet<u32>,
    bridges: Names,
    sockets: Vec<Pattern>,
    socket_paths: BTreeSet<PathBuf>,
    own_sockets: BTreeSet<PathBuf>,
    own_socket_patterns: Vec<Pattern>,
    affinity: bool,
}

/// Names of interfaces: some exactly, and all that match a pattern.
#[derive(Debug, Default)]
struct Names {
    exact: BTreeSet<String>,
    patterns: Vec<Pattern>,
}

impl Names {
    fn contain(&self, name: &str) -> bool {
        self.exact.contains(name)
            || self
                .patterns
                .iter()
                .any(|pattern| pattern.matches_name(name))
    }
}

impl Rules {
    /// Adds a rule.
    pub(crate) fn add(&mut self, rule: Rule) {
        match rule {
            Rule::Tap(name) => {
                self.taps.exact.insert(name);
            }
            Rule::Taps(pattern) => self.taps.patterns.push(pattern),
            Rule::Bridge(name) => {
                self.bridges.exact.insert(name);
            }
            Rule::Bridges(pattern) => self.bridges.patterns.push(pattern),
            Rule::Socket(path) => {
                self.socket_paths.insert(path.as_path().into());
            }
            Rule::Sockets(pattern) => self.sockets.push(pattern),
            Rule::OwnSocket(path) => {
                self.own_sockets.insert(path.as_path().into());
            }
            Rule::OwnSockets(pattern) => self.own_socket_patterns.push(pattern),
            Rule::Affinity => self.affinity = true,
        }
    }

    /// The sockets whose files it removes.
    pub(crate) fn own_sockets(&self) -> impl Iterator<Item = &Path> {
        self.own_sockets.iter().map(PathBuf::as_path)
    }

    /// The folders in which it makes sockets.
    pub(crate) fn socket_folders(&self) -> Vec<PathBuf> {
        let patterns = self.own_socket_patterns.iter().map(ToString::to_string);
        let folder = |pattern: String| Path::new(&pattern).parent().map(Path::to_owned);
        patterns.filter_map(folder).collect()
    }

    /// Whether the helper writes CPU masks.
    pub(crate) fn allows_affinity(&self) -> bool {
        self.affinity
    }

    /// Remembers an interface that was opened by a name that is allowed.
    pub(crate) fn remember_tap(&mut self, index: u32) {
        self.tap_indexes.insert(index);
    }

    /// Whether `request` may be carried out. `find_index` is the index of an interface by its name.
    pub(crate) fn allow(
        &self,
        request: &Request,
        find_index: impl Fn(&str) -> Option<u32>,
    ) -> bool {
        let is_own_tap = |name: &str| {
            self.taps.contain(name)
                || find_index(name).is_some_and(|index| self.tap_indexes.contains(&index))
        };
        match request {
            Request::AttachTap { name }
            | Request::BringUp { name }
            | Request::SetMtu { name, .. } => is_own_tap(name),
            Request::JoinBridge { name, bridge } => {
                is_own_tap(name) && self.bridges.contain(bridge)
            }
            Request::WriteAffinity { file, text } => {
                self.affinity && is_affinity_file(file.as_path()) && is_cpu_set(text)
            }
            Request::Connect { path } => self.allows_socket(path.as_path()),
            Request::Listen { path, mode } => {
                mode & !0o777 == 0 && self.makes_socket(path.as_path())
            }
            Request::RemoveSocket { path, .. } => {
                self.own_sockets.contains(path.as_path()) || self.makes_socket(path.as_path())
            }
        }
    }

    fn makes_socket(&self, path: &Path) -> bool {
        let mut patterns = self.own_socket_patterns.iter();
        patterns.any(|pattern| pattern.matches_path(path))
    }

    fn allows_socket(&self, path: &Path) -> bool {
        self.socket_paths.contains(path)
            || self
                .sockets
                .iter()
                .any(|pattern| pattern.matches_path(path))
    }
}

/// Whether `file` is one of those that say which CPUs serve an interrupt or a queue.
fn is_affinity_file(file: &Path) -> bool {
    let Some(parts) = file.to_str().and_then(|file| file.strip_prefix('/')) else {
        return false;
    };
    let parts: Vec<&str> = parts.split('/').collect();
    match parts[..] {
        ["proc", "irq", irq, "smp_affinity_list"] => is_number(irq),
        ["sys", "class", "net", nic, "queues", queue, mask] => {
            let is_queue = |kind| queue.strip_prefix(kind).is_some_and(is_number);
            !nic.starts_with('.')
                && match mask {
                    "xps_cpus" => is_queue("tx-"),
                    "rps_cpus" => is_queue("rx-"),
                    _ => false,
                }
        }
        _ => false,
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether `text` can be a mask such as `ff,00000000` or a list such as `0-3,8`.
fn is_cpu_set(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_hexdigit() || b",-\n".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(rules: impl IntoIterator<Item = Rule>) -> Rules {
        let mut all = Rules::default();
        for rule in rules {
            all.add(rule);
        }
        all
    }

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    fn attach(name: &str) -> Request {
        Request::AttachTap { name: name.into() }
    }

    fn connect(path: &str) -> Request {
        Request::Connect {
            path: Path::new(path).into(),
        }
    }

    fn remove(path: &str) -> Request {
        Request::RemoveSocket {
            path: Path::new(path).into(),
            device: 1,
            inode: 2,
        }
    }

    fn write(file: &str, text: &str) -> Request {
        Request::WriteAffinity {
            file: Path::new(file).into(),
            text: text.into(),
        }
    }

    #[test]
    fn helper_without_rules_does_nothing() {
        let none = Rules::default();
        let name = || "tap0".to_owned();
        for request in [
            attach("tap0"),
            Request::BringUp { name: name() },
            Request::SetMtu {
                name: name(),
                mtu: 1500,
            },
            Request::JoinBridge {
                name: name(),
                bridge: "br0".into(),
            },
            write("/proc/irq/1/smp_affinity_list", "0"),
            connect("/run/qemu.sock"),
            remove("/run/vnet.sock"),
        ] {
            assert!(!none.allow(&request, |_| Some(1)), "{request}");
        }
    }

    #[test]
    fn taps_are_allowed_by_name_pattern_template_and_index() {
        let mut rules = rules([
            Rule::Tap("tap0".into()),
            Rule::Tap("t*".into()),
            Rule::Tap("net%d".into()),
            Rule::Taps(pattern("vnet*")),
        ]);
        let allow = |rules: &Rules, name: &str| rules.allow(&attach(name), |_| Some(7));
        for name in ["tap0", "t*", "vnet", "vnet12", "net%d"] {
            assert!(allow(&rules, name), "{name}");
        }
        for name in ["tap00", "t1", "eth0", "net0", "avnet1", "", "n%d"] {
            assert!(!allow(&rules, name), "{name}");
        }
        rules.remember_tap(7);
        assert!(allow(&rules, "renamed"));
        assert!(!rules.allow(&attach("renamed"), |_| Some(8)));
        assert!(!rules.allow(&attach("renamed"), |_| None));
    }

    #[test]
    fn port_needs_an_own_tap_and_an_allowed_bridge() {
        let rules = rules([
            Rule::Tap("tap0".into()),
            Rule::Bridge("br0".into()),
            Rule::Bridges(pattern("lan?")),
        ]);
        for (name, bridge, allowed) in [
            ("tap0", "br0", true),
            ("tap0", "lan1", true),
            ("tap0", "br1", false),
            ("eth0", "br0", false),
        ] {
            let (name, bridge) = (name.into(), bridge.into());
            let request = Request::JoinBridge { name, bridge };
            assert_eq!(rules.allow(&request, |_| None), allowed, "{request}");
        }
    }

    #[test]
    fn sockets_are_allowed_by_path_and_by_pattern_in_one_folder() {
        let rules = rules([
            Rule::socket_at(Path::new("/run/a*.sock")),
            Rule::Sockets(pattern("/run/qemu/*.sock")),
        ]);
        for (path, allowed) in [
            ("/run/a*.sock", true),
            ("/run/ab.sock", false),
            ("/run/qemu/7.sock", true),
            ("/run/qemu/x/7.sock", false),
            ("/run/qemu/../7.sock", false),
            ("/run/docker.sock", false),
        ] {
            assert_eq!(rules.allow(&connect(path), |_| None), allowed, "{path}");
        }
    }

    #[test]
    fn only_own_sockets_are_removed() {
        let rules = rules([
            Rule::own_socket_at(Path::new("/run/vnet.sock")),
            Rule::socket_at(Path::new("/run/qemu.sock")),
            Rule::Sockets(pattern("/run/*")),
        ]);
        for (path, allowed) in [
            ("/run/vnet.sock", true),
            ("/run/qemu.sock", false),
            ("/run/other.sock", false),
            ("/run/../run/vnet.sock", false),
        ] {
            assert_eq!(rules.allow(&remove(path), |_| None), allowed, "{path}");
        }
    }

    #[test]
    fn sockets_are_made_and_removed_where_the_pattern_says_and_with_permissions_only() {
        let rules = rules([
            Rule::OwnSockets(pattern("/run/added/*.sock")),
            Rule::own_socket_at(Path::new("/run/vnet.sock")),
        ]);
        let listen = |path: &str, mode| Request::Listen {
            path: Path::new(path).into(),
            mode,
        };
        for (path, mode, allowed) in [
            ("/run/added/a.sock", 0o660, true),
            ("/run/added/a.sock", 0o4755, false),
            ("/run/added/x/a.sock", 0o600, false),
            ("/run/added/../a.sock", 0o600, false),
            ("/run/vnet.sock", 0o600, false),
        ] {
            let request = listen(path, mode);
            assert_eq!(rules.allow(&request, |_| None), allowed, "{request}");
        }
        assert!(rules.allow(&remove("/run/added/a.sock"), |_| None));
        assert!(!rules.allow(&remove("/run/added/a.lock"), |_| None));
        assert_eq!(rules.socket_folders(), [Path::new("/run/added")]);
    }

    #[test]
    fn only_cpu_sets_are_written_and_only_to_their_files() {
        let rules = rules([Rule::Affinity]);
        for (file, text, allowed) in [
            ("/proc/irq/41/smp_affinity_list", "0-3,8\n", true),
            (
                "/sys/class/net/tap0/queues/tx-0/xps_cpus",
                "ff,00000000",
                true,
            ),
            ("/sys/class/net/tap0/queues/rx-12/rps_cpus", "2", true),
            ("/sys/class/net/tap0/queues/rx-0/xps_cpus", "2", false),
            ("/sys/class/net/../queues/rx-0/rps_cpus", "2", false),
            ("/sys/class/net/tap0/queues/tx-/xps_cpus", "2", false),
            ("/proc/irq/41/smp_affinity_list", "0; reboot", false),
            ("/proc/irq/../smp_affinity_list", "0", false),
            ("/proc/irq/default_smp_affinity", "0", false),
            ("/proc/sysrq-trigger", "b", false),
            ("proc/irq/41/smp_affinity_list", "0", false),
        ] {
            assert_eq!(
                rules.allow(&write(file, text), |_| None),
                allowed,
                "{file} {text}"
            );
        }
    }
}
