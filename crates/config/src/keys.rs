//! The keys that describe a device: the same on the command line, in `--device` and in a file.

/// A key, and what may stand behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The kind of its value.
    pub kind: ValueKind,
    /// Whose value it can be.
    pub scope: KeyScope,
}

/// The kind of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// A text.
    Text,
    /// A whole number.
    Number,
    /// A whole number, or a word.
    NumberOrWord,
    /// On or off.
    Switch,
    /// A file's mode, in octal.
    Octal,
}

/// Who can have a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyScope {
    /// One device only.
    Device,
    /// A device, or all that do not say otherwise.
    Any,
}

/// All keys, in the order in which help and documentation name them.
pub const KEYS: [Key; 16] = [
    Key::of_device("name", ValueKind::Text),
    Key::of_device("socket-path", ValueKind::Text),
    Key::of_device("fd", ValueKind::Number),
    Key::of_any("client", ValueKind::Switch),
    Key::of_any("queues", ValueKind::NumberOrWord),
    Key::of_any("vcpus", ValueKind::Number),
    Key::of_device("tap", ValueKind::Text),
    Key::of_device("bridge", ValueKind::Text),
    Key::of_device("uplink", ValueKind::Text),
    Key::of_any("placement", ValueKind::Text),
    Key::of_any("irq-affinity", ValueKind::Text),
    Key::of_any("qmp", ValueKind::Text),
    Key::of_any("poll", ValueKind::Text),
    Key::of_any("poll-us", ValueKind::Number),
    Key::of_any("socket-mode", ValueKind::Octal),
    Key::of_any("socket-group", ValueKind::NumberOrWord),
];

impl Key {
    /// The key of this name.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        KEYS.into_iter().find(|key| key.name == name)
    }

    /// The names of all keys, with commas between them.
    #[must_use]
    pub fn names() -> String {
        KEYS.map(|key| key.name).join(", ")
    }

    const fn of_device(name: &'static str, kind: ValueKind) -> Self {
        let scope = KeyScope::Device;
        Self { name, kind, scope }
    }

    const fn of_any(name: &'static str, kind: ValueKind) -> Self {
        let scope = KeyScope::Any;
        Self { name, kind, scope }
    }
}

impl ValueKind {
    /// What may be written in a file, with an example.
    #[must_use]
    pub fn expected(self) -> &'static str {
        match self {
            Self::Text => "a text in quotes",
            Self::Number => "a whole number without quotes",
            Self::NumberOrWord => "a whole number, or a word in quotes",
            Self::Switch => "true or false",
            Self::Octal => "octal digits in quotes, such as \"660\"",
        }
    }

    /// `value` as a file spells it.
    #[must_use]
    pub fn to_toml(self, value: &str) -> String {
        let number = value.parse::<i64>().is_ok();
        match (self, value) {
            (Self::Switch, "on") => "true".into(),
            (Self::Switch, "off") => "false".into(),
            (Self::Number, _) => value.into(),
            (Self::NumberOrWord, _) if number => value.into(),
            _ => format!("{value:?}"),
        }
    }
}

/// The one of `names` that is most like `word`, if one is.
#[must_use]
pub fn find_nearest(word: &str, names: impl IntoIterator<Item = &'static str>) -> Option<&'static str> {
    let alike = |name| {
        (
            strsim::jaro_winkler(&word.to_lowercase().replace('_', "-"), name),
            name,
        )
    };
    names
        .into_iter()
        .map(alike)
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_its_name_and_its_misspellings() {
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
            let near = find_nearest(word, KEYS.map(|key| key.name));
            assert_eq!(near, key, "{word}");
        }
    }

    #[test]
    fn values_are_spelt_as_toml_wants_them() {
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
