//! The table of configuration keys, from which the flags, the keys of `--device`, the keys of a
//! file and the table in docs/configuration.md are made.

pub(crate) use crate::value_kind::{ValueKind, find_nearest};

/// A configuration key, with everything that the flags, the file and the documentation need of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The name, which is also the name of the flag.
    pub name: &'static str,
    /// The kind of the value.
    pub(crate) kind: ValueKind,
    /// What the key can be set for.
    pub(crate) scope: KeyScope,
    /// The placeholder for the value in the help text.
    pub(crate) value_name: &'static str,
    /// The value that applies where the key is not set.
    pub(crate) default: DefaultValue,
    /// What the key does, for the help text and the documentation.
    pub(crate) help: &'static str,
}

/// What a key can be set for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyScope {
    /// The whole process.
    Process,
    /// One device only.
    Device,
    /// One device only. It has no flag, because it is a part of the value of the named flag.
    DevicePartOf(&'static str),
    /// One device, or every device that does not set the key itself.
    Any,
}

/// The value of a key that is not set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DefaultValue {
    /// No value: another key is used, or one of several keys is required.
    None,
    /// This value.
    Value(&'static str),
    /// A value that depends on other keys or on the host. The text describes it.
    Computed(&'static str),
}

/// All keys, in the order of the help text and the documentation.
pub(crate) const KEYS: [Key; 33] = [
    Key::NAME,
    Key::SOCKET_PATH,
    Key::FD,
    Key::CLIENT,
    Key::SOCKET_MODE,
    Key::SOCKET_GROUP,
    Key::PEER_UID,
    Key::QUEUES,
    Key::VCPUS,
    Key::TAP,
    Key::BRIDGE,
    Key::UPLINK,
    Key::PLACEMENT,
    Key::IRQ_AFFINITY,
    Key::QMP,
    Key::POLL,
    Key::POLL_US,
    Key::FEATURES_COMPAT,
    Key::POSTCOPY,
    Key::CONTROL,
    Key::CONTROL_MODE,
    Key::CONTROL_GROUP,
    Key::CONTROL_READ_ONLY,
    Key::CONTROL_READ_ONLY_GROUP,
    Key::ALLOW_ADD,
    Key::HANDOVER_SOCKET,
    Key::WORKERS,
    Key::STATE_DIR,
    Key::SANDBOX,
    Key::USER,
    Key::GROUP,
    Key::HELPER,
    Key::HELPER_ALLOW,
];

/// The keys, by name. Code refers to a key by its constant, so that a misspelt key does not
/// compile. The public ones are those that a plan sets.
impl Key {
    /// The name of a device.
    pub const NAME: Self = Self {
        name: "name",
        kind: ValueKind::Text,
        scope: KeyScope::Device,
        value_name: "NAME",
        default: DefaultValue::Computed("vnet; vnet0, vnet1, ... with --device"),
        help: "The device's name in log and statistics",
    };
    /// The path of the vhost-user socket.
    pub const SOCKET_PATH: Self = Self {
        name: "socket-path",
        kind: ValueKind::Path,
        scope: KeyScope::Device,
        value_name: "PATH",
        default: DefaultValue::None,
        help: "The vhost-user socket: virtionetd creates it and the front-end connects; with \
               --client the other way round",
    };
    pub(crate) const FD: Self = Self {
        name: "fd",
        kind: ValueKind::Number,
        scope: KeyScope::Device,
        value_name: "N",
        default: DefaultValue::None,
        help: "The vhost-user socket as a file descriptor, inherited from the parent process, \
               instead of --socket-path",
    };
    /// Whether virtionetd connects to the front-end's socket.
    pub const CLIENT: Self = Self {
        name: "client",
        kind: ValueKind::Switch,
        scope: KeyScope::Any,
        value_name: "on|off",
        default: DefaultValue::Value("off"),
        help: "Connect to the socket of a front-end that listens (QEMU's server=on), and retry \
               until it does",
    };
    pub(crate) const SOCKET_MODE: Self = Self {
        name: "socket-mode",
        kind: ValueKind::Octal,
        scope: KeyScope::Any,
        value_name: "OCTAL",
        default: DefaultValue::Computed("600; 660 with --socket-group"),
        help: "Mode of the socket that virtionetd creates, in octal",
    };
    pub(crate) const SOCKET_GROUP: Self = Self {
        name: "socket-group",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Any,
        value_name: "NAME",
        default: DefaultValue::Computed("the group of virtionetd"),
        help: "Group of the socket that virtionetd creates, by name or number: the group of the \
               front-end, where that runs as another user",
    };
    pub(crate) const PEER_UID: Self = Self {
        name: "peer-uid",
        kind: ValueKind::Number,
        scope: KeyScope::Any,
        value_name: "UID",
        default: DefaultValue::Computed("any user that the socket's mode lets connect"),
        help: "The number of the only user whose front-end is served on the socket that \
               virtionetd creates",
    };
    /// The number of queue pairs.
    pub const QUEUES: Self = Self {
        name: "queues",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Any,
        value_name: "N|auto|high|medium|low",
        default: DefaultValue::Value("auto"),
        help: "Queue pairs: 1 to 128; auto for as many as the front-end asks for; or, with \
               --vcpus, a share of the guest's vCPUs: high (as auto then) for one pair for each \
               vCPU, medium for half as many, low for one. A front-end that asks for more is \
               refused",
    };
    pub(crate) const VCPUS: Self = Self {
        name: "vcpus",
        kind: ValueKind::Number,
        scope: KeyScope::Any,
        value_name: "N",
        default: DefaultValue::Computed("not known"),
        help: "The number of the guest's vCPUs, for --queues auto, high, medium and low",
    };
    pub(crate) const TAP: Self = Self {
        name: "tap",
        kind: ValueKind::Text,
        scope: KeyScope::Device,
        value_name: "NAME[,bridge=BR]",
        default: DefaultValue::None,
        help: "The TAP that carries the frames, made a port of the bridge BR. It is created where \
               there is none. Short for --uplink tap:NAME[,bridge=BR]. A TAP that an \
               administrator creates must have several queues: ip tuntap add dev NAME mode tap \
               multi_queue vnet_hdr",
    };
    pub(crate) const BRIDGE: Self = Self {
        name: "bridge",
        kind: ValueKind::Text,
        scope: KeyScope::DevicePartOf(Self::TAP.name),
        value_name: "BR",
        default: DefaultValue::None,
        help: "The bridge that the TAP of --tap becomes a port of",
    };
    /// The uplink of a device.
    pub const UPLINK: Self = Self {
        name: "uplink",
        kind: ValueKind::Text,
        scope: KeyScope::Device,
        value_name: "KIND[:...]",
        default: DefaultValue::None,
        help: "The uplink, which carries the frames: tap:NAME[,bridge=BR]; \
               switch:NAME[,tap=IF[,bridge=BR]][,forward-reserved], which connects the devices of \
               this process that name the same switch, and the host's TAP IF; or null, which drops \
               what the guest sends",
    };
    /// The placement of the workers.
    pub const PLACEMENT: Self = Self {
        name: "placement",
        kind: ValueKind::Text,
        scope: KeyScope::Any,
        value_name: "auto|same|sibling|core-near|list:CPUS|none",
        default: DefaultValue::Value("auto"),
        help: "The CPU of each queue pair's worker. auto: the CPU that the pair's vCPU is pinned \
               to, or one near it with --poll; where the vCPU is not pinned, all CPUs that it may \
               use, or a free one of them with --poll. same: exactly the CPUs of the vCPU's \
               thread. sibling: the other hardware thread of its core. core-near: another CPU of \
               its L3 cache or NUMA node. list:CPUS: these CPUs in turn, such as list:0-3,8. \
               none: the kernel chooses",
    };
    pub(crate) const IRQ_AFFINITY: Self = Self {
        name: "irq-affinity",
        kind: ValueKind::Text,
        scope: KeyScope::Any,
        value_name: "apply|print|off",
        default: DefaultValue::Value("off"),
        help: "Whether the host's interrupts and steering masks follow the workers. apply: they \
               are set, and restored at the end. print: the log and /v1/devices show the commands \
               that would set them. off: they stay as they are",
    };
    pub(crate) const QMP: Self = Self {
        name: "qmp",
        kind: ValueKind::Path,
        scope: KeyScope::Any,
        value_name: "PATH",
        default: DefaultValue::Computed("thread names only"),
        help: "QEMU's QMP socket, from which the vCPU threads are read where their names do not \
               identify them (QEMU names them with -name debug-threads=on)",
    };
    /// How workers wait for frames.
    pub const POLL: Self = Self {
        name: "poll",
        kind: ValueKind::Text,
        scope: KeyScope::Any,
        value_name: "off|adaptive|always",
        default: DefaultValue::Value("off"),
        help: "How a worker waits for frames. off: it sleeps, and uses no CPU time when idle. \
               adaptive: after work it polls for up to --poll-us before it sleeps. always: it \
               never sleeps, and uses its CPU completely",
    };
    /// The longest time that a worker polls, in microseconds.
    pub const POLL_US: Self = Self {
        name: "poll-us",
        kind: ValueKind::Number,
        scope: KeyScope::Any,
        value_name: "N",
        default: DefaultValue::Value("50"),
        help: "The longest time that --poll adaptive polls before the worker sleeps, in \
               microseconds",
    };
    pub(crate) const FEATURES_COMPAT: Self = Self {
        name: "features-compat",
        kind: ValueKind::Text,
        scope: KeyScope::Any,
        value_name: "VERSION",
        default: DefaultValue::Computed("all features of this virtionetd"),
        help: "Offer the guest exactly the features that virtionetd VERSION offers, so that the guest \
               can be migrated to a host with that version. virtionetctl status of that host shows \
               VERSION",
    };
    pub(crate) const POSTCOPY: Self = Self {
        name: "postcopy",
        kind: ValueKind::Switch,
        scope: KeyScope::Any,
        value_name: "on|off",
        default: DefaultValue::Value("off"),
        help: "Let the front-end migrate its guest by postcopy. It thereby gets a userfaultfd, with \
               which it can write the memory of this process: switch it on only where it may do that",
    };
    /// The path of the control socket.
    pub const CONTROL: Self = Self {
        name: "control",
        kind: ValueKind::Path,
        scope: KeyScope::Process,
        value_name: "PATH",
        default: DefaultValue::Computed("no such socket"),
        help: "Answer HTTP/1.1 on this unix socket: the control API below /v1/ (JSON) and GET \
               /metrics (for Prometheus)",
    };
    pub(crate) const CONTROL_MODE: Self = Self {
        name: "control-mode",
        kind: ValueKind::Octal,
        scope: KeyScope::Process,
        value_name: "OCTAL",
        default: DefaultValue::Computed("600; 660 with --control-group"),
        help: "Mode of the control socket, in octal",
    };
    pub(crate) const CONTROL_GROUP: Self = Self {
        name: "control-group",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Process,
        value_name: "NAME",
        default: DefaultValue::Computed("the group of virtionetd"),
        help: "Group of the control socket, by name or number: the group of those who may read \
               the state of the daemon. Only root and the user of virtionetd may change it",
    };
    pub(crate) const CONTROL_READ_ONLY: Self = Self {
        name: "control-read-only",
        kind: ValueKind::Path,
        scope: KeyScope::Process,
        value_name: "PATH",
        default: DefaultValue::Computed("no such socket"),
        help: "A second control socket, for monitoring: it answers what --control answers, and \
               refuses every change, also of root",
    };
    pub(crate) const CONTROL_READ_ONLY_GROUP: Self = Self {
        name: "control-read-only-group",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Process,
        value_name: "NAME",
        default: DefaultValue::Computed("the group of virtionetd, and mode 600"),
        help: "Group of the read-only control socket, by name or number, whose members may use it \
               (mode 660)",
    };
    pub(crate) const ALLOW_ADD: Self = Self {
        name: "allow-add",
        kind: ValueKind::Text,
        scope: KeyScope::Process,
        value_name: "socket=PATTERN,tap=PATTERN,bridge=PATTERN,switch=PATTERN",
        default: DefaultValue::Computed("no device can be added at run time"),
        help: "What devices may use that are added while virtionetd runs, by the control API or by \
               a reload: sockets at these paths, TAPs of these names, these bridges and switches. In \
               a pattern * stands for any characters, but not for the / of a path. Each may be \
               repeated. With it virtionetd also runs without a device",
    };
    pub(crate) const HANDOVER_SOCKET: Self = Self {
        name: "handover-socket",
        kind: ValueKind::Path,
        scope: KeyScope::Process,
        value_name: "PATH",
        default: DefaultValue::Computed("no such socket"),
        help: "Let the next virtionetd take the devices over on this unix socket, without a \
               disconnect: start it with the same configuration and --take-over",
    };
    pub(crate) const STATE_DIR: Self = Self {
        name: "state-dir",
        kind: ValueKind::Path,
        scope: KeyScope::Process,
        value_name: "PATH",
        default: DefaultValue::Computed(
            "RUNTIME_DIRECTORY of systemd; else /run/virtionetd as root, and virtionetd in \
             XDG_RUNTIME_DIR as another user",
        ),
        help: "The folder for what must outlive the process: one file for each device, from which \
               packed virtqueues continue after a crash or a restart. It must be in memory (tmpfs)",
    };
    pub(crate) const WORKERS: Self = Self {
        name: "workers",
        kind: ValueKind::Text,
        scope: KeyScope::Process,
        value_name: "per-pair|list:CPUS",
        default: DefaultValue::Value("per-pair"),
        help: "The threads that carry frames. per-pair: each queue pair has a worker, placed by \
               --placement. list:CPUS: one worker on each of these CPUs, such as list:2-3, and \
               each of them serves several queue pairs, of all devices. They wait for frames as \
               --poll says, which must be the same for all devices",
    };
    pub(crate) const SANDBOX: Self = Self {
        name: "sandbox",
        kind: ValueKind::Text,
        scope: KeyScope::Process,
        value_name: "on|off|log",
        default: DefaultValue::Value("on"),
        help: "Whether each thread is confined to the system calls, files and capabilities that it \
               needs. on: what it does not need is refused. log: a system call that would be \
               refused is carried out, and noted in the kernel's log. off: threads are not confined",
    };
    pub(crate) const USER: Self = Self {
        name: "user",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Process,
        value_name: "NAME",
        default: DefaultValue::Computed("the user who starts virtionetd"),
        help: "The user, by name or number, as which virtionetd runs after it has opened its sockets \
               and uplinks. Only root can change it",
    };
    pub(crate) const GROUP: Self = Self {
        name: "group",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Process,
        value_name: "NAME",
        default: DefaultValue::Computed("the group of --user"),
        help: "The group, by name or number, as which virtionetd runs then",
    };
    pub(crate) const HELPER: Self = Self {
        name: "helper",
        kind: ValueKind::Text,
        scope: KeyScope::Process,
        value_name: "on|off",
        default: DefaultValue::Value("on"),
        help: "Whether a process that keeps CAP_NET_ADMIN and CAP_DAC_OVERRIDE, where virtionetd was \
               given them, does what they are needed for later: opening a TAP's queues, making a TAP \
               again, its MTU, --irq-affinity apply, connecting to sockets of other users, removing \
               its own sockets. off: nothing that needs them is done after the start",
    };
    pub(crate) const HELPER_ALLOW: Self = Self {
        name: "helper-allow",
        kind: ValueKind::Text,
        scope: KeyScope::Process,
        value_name: "tap=PATTERN,bridge=PATTERN,socket=PATTERN",
        default: DefaultValue::Computed("what the configuration names"),
        help: "What else the helper may do: open TAPs of these names, make them ports of these \
               bridges, connect to these unix sockets. In a pattern * stands for any characters, but \
               not for the / of a path. Each may be repeated",
    };
}

impl Key {
    /// The flag that sets the key, with its dashes.
    #[must_use]
    pub fn flag(self) -> String {
        format!("--{}", self.name)
    }

    /// The key of a device whose name is `name`; `None` where there is none.
    #[must_use]
    pub(crate) fn find(name: &str) -> Option<Self> {
        Self::of_devices().find(|key| key.name == name)
    }

    /// The keys that describe devices.
    pub(crate) fn of_devices() -> impl Iterator<Item = Self> {
        KEYS.into_iter()
            .filter(|key| key.scope != KeyScope::Process)
    }

    /// The keys of the whole process.
    pub(crate) fn of_process() -> impl Iterator<Item = Self> {
        KEYS.into_iter()
            .filter(|key| key.scope == KeyScope::Process)
    }

    /// The names of the keys of a device, separated by commas.
    #[must_use]
    pub(crate) fn names() -> String {
        let names: Vec<&str> = Self::of_devices().map(|key| key.name).collect();
        names.join(", ")
    }

    /// Whether several devices can have this key in common.
    #[must_use]
    pub(crate) fn is_common(self) -> bool {
        self.scope == KeyScope::Any
    }

    /// The default as a text, which is empty where the key has no fixed default.
    #[must_use]
    pub(crate) fn fixed_default(self) -> &'static str {
        match self.default {
            DefaultValue::Value(value) => value,
            DefaultValue::None | DefaultValue::Computed(_) => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the documentation, one line for each key.
    fn documented_table() -> String {
        let mut table =
            String::from("| key | kind | scope | default | meaning |\n|---|---|---|---|---|\n");
        for key in KEYS {
            let kind = match key.kind {
                ValueKind::Text | ValueKind::Path => "text",
                ValueKind::Number => "number",
                ValueKind::NumberOrWord => "number or word",
                ValueKind::Switch => "true or false",
                ValueKind::Octal => "octal text",
            };
            let scope = match key.scope {
                KeyScope::Process => "process",
                KeyScope::Device | KeyScope::DevicePartOf(_) => "device",
                KeyScope::Any => "any",
            };
            let default = match key.default {
                DefaultValue::None => "",
                DefaultValue::Value(text) | DefaultValue::Computed(text) => text,
            };
            let row = [
                format!("`{} = {}`", key.name, key.value_name).replace('|', "\\|"),
                kind.into(),
                scope.into(),
                default.into(),
                key.help.replace('|', "\\|"),
            ];
            table += &format!("| {} |\n", row.join(" | "));
        }
        table
    }

    #[test]
    fn table_in_the_documentation_is_the_table_of_keys() {
        let page = include_str!("../../../docs/configuration.md");
        let expected = documented_table();
        assert!(
            page.contains(&expected),
            "replace the table of keys in docs/configuration.md by this one:\n\n{expected}"
        );
    }

    #[test]
    fn key_is_found_by_its_misspellings() {
        for (word, key) in [
            ("queues", Some("queues")),
            ("queue", Some("queues")),
            ("quques", Some("queues")),
            ("socket_path", Some("socket-path")),
            ("Socket-Path", Some("socket-path")),
            ("sockt-mode", Some("socket-mode")),
            ("polling", Some("poll")),
            ("poll-ms", Some("poll-us")),
            ("irq_affinity", Some("irq-affinity")),
            ("vcpu", Some("vcpus")),
            ("uplnik", Some("uplink")),
            ("frobnicate", None),
            ("x", None),
        ] {
            let nearest = find_nearest(word, Key::of_devices().map(|key| key.name));
            assert_eq!(nearest, key, "{word}");
        }
    }

    #[test]
    fn values_are_spelt_as_toml_requires() {
        for (kind, value, toml) in [
            (ValueKind::Text, "a\"b", r#""a\"b""#),
            (ValueKind::Number, "7", "7"),
            (ValueKind::Number, "N", "N"),
            (ValueKind::NumberOrWord, "4", "4"),
            (ValueKind::NumberOrWord, "high", "\"high\""),
            (ValueKind::Switch, "on", "true"),
            (ValueKind::Switch, "off", "false"),
            (ValueKind::Octal, "660", "\"660\""),
        ] {
            assert_eq!(kind.to_toml(value), toml);
        }
    }
}
