//! The table of configuration keys. The flags, the keys of `--device`, the keys of a file and the
//! table in docs/configuration.md are all made from it.

/// A key and everything that is known about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    /// The name, which is also the name of the flag.
    pub name: &'static str,
    /// The kind of the value.
    pub kind: ValueKind,
    /// What the key can be set for.
    pub scope: KeyScope,
    /// The placeholder for the value in the help text.
    pub value_name: &'static str,
    /// The value where none is given.
    pub default: DefaultValue,
    /// What the key does, for the help text and the documentation.
    pub help: &'static str,
}

/// The kind of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    /// A text.
    Text,
    /// The path of a file, which need not be UTF-8 in a flag.
    Path,
    /// A whole number.
    Number,
    /// A whole number or a word.
    NumberOrWord,
    /// On or off.
    Switch,
    /// A file mode in octal.
    Octal,
}

/// What a key can be set for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyScope {
    /// The whole process.
    Process,
    /// One device only.
    Device,
    /// One device only, and the flag of this name has it as a part of its value.
    DevicePartOf(&'static str),
    /// One device, or all devices that do not set it themselves.
    Any,
}

/// The value of a key that nobody sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DefaultValue {
    /// None: something else is used, or one of several keys is required.
    None,
    /// This value.
    Value(&'static str),
    /// A value that depends on others, described for a reader.
    Computed(&'static str),
}

/// All keys, in the order of the help text and the documentation.
pub(crate) const KEYS: [Key; 17] = [
    Key {
        name: "name",
        kind: ValueKind::Text,
        scope: KeyScope::Device,
        value_name: "NAME",
        default: DefaultValue::Computed("vnet; vnet0, vnet1, ... with --device"),
        help: "The device's name in log and statistics",
    },
    Key {
        name: "socket-path",
        kind: ValueKind::Path,
        scope: KeyScope::Device,
        value_name: "PATH",
        default: DefaultValue::None,
        help: "The vhost-user socket: virtionetd creates it and the front-end connects; with \
               --client the other way round",
    },
    Key {
        name: "fd",
        kind: ValueKind::Number,
        scope: KeyScope::Device,
        value_name: "N",
        default: DefaultValue::None,
        help: "The vhost-user socket as a file descriptor, inherited from the parent process, \
               instead of --socket-path",
    },
    Key {
        name: "client",
        kind: ValueKind::Switch,
        scope: KeyScope::Any,
        value_name: "on|off",
        default: DefaultValue::Value("off"),
        help: "Connect to the socket of a front-end that listens (QEMU's server=on), and retry \
               until it does",
    },
    Key {
        name: "socket-mode",
        kind: ValueKind::Octal,
        scope: KeyScope::Any,
        value_name: "OCTAL",
        default: DefaultValue::Computed("600; 660 with --socket-group"),
        help: "Mode of the socket that virtionetd creates, in octal",
    },
    Key {
        name: "socket-group",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Any,
        value_name: "NAME",
        default: DefaultValue::Computed("the group of virtionetd"),
        help: "Group of the socket that virtionetd creates, by name or number: the group of the \
               front-end, where that runs as another user",
    },
    Key {
        name: "queues",
        kind: ValueKind::NumberOrWord,
        scope: KeyScope::Any,
        value_name: "N|auto|high|medium|low",
        default: DefaultValue::Value("auto"),
        help: "Queue pairs: 1 to 128; auto for as many as the front-end asks for; or, with \
               --vcpus, a share of the guest's vCPUs: high (as auto then) for one pair for each \
               vCPU, medium for half as many, low for one. A front-end that asks for more is \
               refused",
    },
    Key {
        name: "vcpus",
        kind: ValueKind::Number,
        scope: KeyScope::Any,
        value_name: "N",
        default: DefaultValue::Computed("not known"),
        help: "The number of the guest's vCPUs, for --queues auto, high, medium and low",
    },
    Key {
        name: "tap",
        kind: ValueKind::Text,
        scope: KeyScope::Device,
        value_name: "NAME[,bridge=BR]",
        default: DefaultValue::None,
        help: "The TAP that carries the frames, made a port of the bridge BR. It is created where \
               there is none. Short for --uplink tap:NAME[,bridge=BR]. A TAP that an \
               administrator creates must have several queues: ip tuntap add dev NAME mode tap \
               multi_queue vnet_hdr",
    },
    Key {
        name: "bridge",
        kind: ValueKind::Text,
        scope: KeyScope::DevicePartOf("tap"),
        value_name: "BR",
        default: DefaultValue::None,
        help: "The bridge that the TAP of --tap becomes a port of",
    },
    Key {
        name: "uplink",
        kind: ValueKind::Text,
        scope: KeyScope::Device,
        value_name: "KIND[:...]",
        default: DefaultValue::None,
        help: "The uplink, which carries the frames: tap:NAME[,bridge=BR]; \
               switch:NAME[,tap=IF[,bridge=BR]], which connects the devices of this process that \
               name the same switch, and the host's TAP IF; or null, which drops what the guest \
               sends",
    },
    Key {
        name: "placement",
        kind: ValueKind::Text,
        scope: KeyScope::Any,
        value_name: "auto|same|sibling|core-near|list:CPUS|none",
        default: DefaultValue::Value("auto"),
        help: "The CPU of each queue pair's worker. auto: the CPU that the pair's vCPU is pinned \
               to, or one near it with --poll; where the vCPU is not pinned, the allowed CPUs in \
               turn. same: exactly the CPUs of the vCPU's thread. sibling: the other hardware \
               thread of its core. core-near: another CPU of its L3 cache or NUMA node. \
               list:CPUS: these CPUs in turn, such as list:0-3,8. none: the kernel chooses",
    },
    Key {
        name: "irq-affinity",
        kind: ValueKind::Text,
        scope: KeyScope::Any,
        value_name: "apply|print|off",
        default: DefaultValue::Value("off"),
        help: "Whether the host's interrupts and steering masks follow the workers. apply: they \
               are set, and restored at the end. print: the log and /v1/devices show the commands \
               that would set them. off: they stay as they are",
    },
    Key {
        name: "qmp",
        kind: ValueKind::Path,
        scope: KeyScope::Any,
        value_name: "PATH",
        default: DefaultValue::Computed("thread names only"),
        help: "QEMU's QMP socket, from which the vCPU threads are read where their names do not \
               identify them (QEMU names them with -name debug-threads=on)",
    },
    Key {
        name: "poll",
        kind: ValueKind::Text,
        scope: KeyScope::Any,
        value_name: "off|adaptive|always",
        default: DefaultValue::Value("off"),
        help: "How a worker waits for frames. off: it sleeps, and uses no CPU time when idle. \
               adaptive: after work it polls for up to --poll-us before it sleeps. always: it \
               never sleeps, and uses its CPU completely",
    },
    Key {
        name: "poll-us",
        kind: ValueKind::Number,
        scope: KeyScope::Any,
        value_name: "N",
        default: DefaultValue::Value("50"),
        help: "The longest time that --poll adaptive polls before the worker sleeps, in \
               microseconds",
    },
    Key {
        name: "control",
        kind: ValueKind::Path,
        scope: KeyScope::Process,
        value_name: "PATH",
        default: DefaultValue::Computed("no such socket"),
        help: "Answer HTTP/1.1 on this unix socket, which only its owner may use: GET /v1/devices \
               (JSON) and GET /metrics (for Prometheus)",
    },
];

impl Key {
    /// The key of a device that has this name.
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

    /// The default of the key `name` as a text, which is empty where it has no fixed one.
    #[must_use]
    pub(crate) fn default_of(name: &str) -> &'static str {
        match Self::find(name).map(|key| key.default) {
            Some(DefaultValue::Value(value)) => value,
            _ => "",
        }
    }
}

impl ValueKind {
    /// What may be written in a file, with an example.
    #[must_use]
    pub(crate) fn expected(self) -> &'static str {
        match self {
            Self::Text | Self::Path => "a text in quotes",
            Self::Number => "a whole number without quotes",
            Self::NumberOrWord => "a whole number, or a word in quotes",
            Self::Switch => "true or false",
            Self::Octal => "octal digits in quotes, such as \"660\"",
        }
    }

    /// `value` as a file spells it.
    #[must_use]
    pub(crate) fn to_toml(self, value: &str) -> String {
        let is_number = value.parse::<i64>().is_ok();
        match (self, value) {
            (Self::Switch, "on") => "true".into(),
            (Self::Switch, "off") => "false".into(),
            (Self::Number, _) => value.into(),
            (Self::NumberOrWord, _) if is_number => value.into(),
            _ => format!("{value:?}"),
        }
    }
}

/// The one of `names` that is most similar to `word`, if one is similar at all.
#[must_use]
pub(crate) fn find_nearest(
    word: &str,
    names: impl IntoIterator<Item = &'static str>,
) -> Option<&'static str> {
    let word = word.to_lowercase().replace('_', "-");
    names
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&word, name), name))
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
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
    fn the_table_in_the_documentation_is_the_table_of_keys() {
        let page = include_str!("../../../docs/configuration.md");
        let expected = documented_table();
        assert!(
            page.contains(&expected),
            "replace the table of keys in docs/configuration.md by this one:\n\n{expected}"
        );
    }

    #[test]
    fn a_key_is_found_by_its_misspellings() {
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
