//! The values of keys as they are written, each with its origin for the messages about it, and the
//! rules by which a stronger layer of settings overrides a weaker one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;
use std::rc::Rc;

use crate::keys::{Key, ValueKind};
use crate::problem::{Problem, ProblemCode};

/// Where a value is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// In a flag of the command line.
    Flag,
    /// In a `--device` of this text.
    Device(Rc<str>),
    /// In a line of a file.
    File {
        /// The file.
        path: Rc<Path>,
        /// The line, from 1.
        line: usize,
    },
}

impl Origin {
    /// A problem of what is written here.
    #[must_use]
    pub fn problem(&self, code: ProblemCode, message: fmt::Arguments<'_>) -> Problem {
        match self {
            Self::Flag => Problem::new(code, message.to_string()),
            Self::Device(text) => Problem::new(code, format!("--device {text}: {message}")),
            Self::File { path, line } => Problem::in_line(path, *line, code, message.to_string()),
        }
    }

    /// How `key` is written here.
    #[must_use]
    pub fn key(&self, key: &str) -> String {
        match self {
            Self::Flag => format!("--{key}"),
            Self::Device(_) | Self::File { .. } => key.into(),
        }
    }

    /// How `key` is set to `value` here.
    #[must_use]
    pub fn set(&self, key: &str, value: impl fmt::Display) -> String {
        match self {
            Self::Flag => format!("--{key} {value}"),
            Self::Device(_) => format!("{key}={value}"),
            Self::File { .. } => {
                let kind = Key::find(key).map_or(ValueKind::Text, |key| key.kind);
                format!("{key} = {}", kind.to_toml(&value.to_string()))
            }
        }
    }
}

/// A value and its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SettingValue {
    /// The value, as a flag spells it.
    pub value: OsString,
    /// Where it is written.
    pub origin: Origin,
    /// Whether the value may have no effect: it was given for several devices, or a stronger layer
    /// has overridden the key that it belongs to.
    pub may_be_unused: bool,
}

impl SettingValue {
    /// A value that must have an effect.
    #[must_use]
    pub fn new(value: impl Into<OsString>, origin: &Origin) -> Self {
        Self {
            value: value.into(),
            origin: origin.clone(),
            may_be_unused: false,
        }
    }

    /// The value as a text.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        self.value.to_string_lossy()
    }

    /// The value as a path.
    #[must_use]
    pub fn path(&self) -> &Path {
        Path::new(OsStr::new(&self.value))
    }
}

/// The settings of a device, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings(BTreeMap<&'static str, SettingValue>);

/// Groups of keys that express the same in several ways. Where a stronger layer sets one of the first
/// list, none of the second list is taken from a weaker layer.
const CONFLICTING_KEYS: [(&[&str], &[&str]); 3] = [
    (&["tap", "uplink"], &["tap", "bridge", "uplink"]),
    (
        &["fd"],
        &["socket-path", "client", "socket-mode", "socket-group"],
    ),
    (&["socket-path"], &["fd"]),
];

/// Keys of the second list have an effect only with some values of the keys of the first list.
const DEPENDENT_KEYS: [(&[&str], &[&str]); 3] = [
    (&["poll"], &["poll-us"]),
    (&["queues"], &["vcpus"]),
    (&["client"], &["socket-mode", "socket-group"]),
];

impl Settings {
    /// The value of `key`, where it is set.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&SettingValue> {
        debug_assert!(
            Key::find(key).is_some(),
            "{key} is not in the table of keys"
        );
        self.0.get(key)
    }

    /// Sets `key`; true if it was set already.
    pub fn insert(&mut self, key: Key, value: SettingValue) -> bool {
        self.0.insert(key.name, value).is_some()
    }

    /// The keys that are set, in the order of the table.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        Key::of_devices().filter(|key| self.0.contains_key(key.name))
    }

    /// These settings for several devices: without the keys that describe a single one.
    #[must_use]
    pub fn into_common(mut self) -> Self {
        let shared = |key: &str| Key::find(key).is_some_and(Key::is_common);
        self.0.retain(|key, _| shared(key));
        self.0
            .values_mut()
            .for_each(|value| value.may_be_unused = true);
        self
    }

    /// These settings, and those of a `weaker` layer for the keys that these do not set.
    #[must_use]
    pub fn merged_over(self, weaker: &Self) -> Self {
        let sets = |keys: &[&str]| keys.iter().any(|key| self.0.contains_key(key));
        let is_affected = |rules: &[(&[&str], &[&str])], key: &str| {
            rules
                .iter()
                .any(|(stronger, weaker)| weaker.contains(&key) && sets(stronger))
        };
        let mut all = self.0.clone();
        for (key, value) in &weaker.0 {
            if is_affected(&CONFLICTING_KEYS, key) || self.0.contains_key(key) {
                continue;
            }
            let mut value = value.clone();
            value.may_be_unused |= is_affected(&DEPENDENT_KEYS, key);
            all.insert(key, value);
        }
        Self(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Settings {
        let mut settings = Settings::default();
        for item in text.split_whitespace() {
            let (key, value) = item.split_once('=').unwrap();
            let key = Key::find(key).unwrap();
            assert!(!settings.insert(key, SettingValue::new(value, &Origin::Flag)));
        }
        settings
    }

    fn text(settings: &Settings) -> String {
        let item = |(key, value): (&&str, &SettingValue)| {
            let mark = if value.may_be_unused { "?" } else { "" };
            format!("{key}={}{mark}", value.text())
        };
        settings.0.iter().map(item).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_stronger_layer_overrides_its_keys_and_those_that_belong_to_them() {
        for (strong, weak, both) in [
            ("", "queues=4", "queues=4"),
            ("queues=2", "queues=4 poll=off", "poll=off queues=2"),
            ("queues=2", "queues=high vcpus=4", "queues=2 vcpus=4?"),
            ("poll=off", "poll=adaptive poll-us=9", "poll=off poll-us=9?"),
            ("poll-us=9", "poll=adaptive", "poll=adaptive poll-us=9"),
            (
                "uplink=null",
                "tap=t0 bridge=b name=x",
                "name=x uplink=null",
            ),
            ("tap=t1", "uplink=null", "tap=t1"),
            ("tap=t1", "tap=t0 bridge=b", "tap=t1"),
            ("bridge=c", "tap=t0 bridge=b", "bridge=c tap=t0"),
            ("fd=3", "socket-path=/s client=on socket-mode=600", "fd=3"),
            ("socket-path=/s", "fd=3", "socket-path=/s"),
            (
                "socket-path=/s",
                "socket-path=/t client=on",
                "client=on socket-path=/s",
            ),
            ("client=on", "socket-mode=600", "client=on socket-mode=600?"),
        ] {
            let all = settings(strong).merged_over(&settings(weak));
            assert_eq!(text(&all), both, "{strong} over {weak}");
        }
        assert_eq!(text(&settings("poll-us=9").into_common()), "poll-us=9?");
    }

    #[test]
    fn keys_and_problems_are_spelt_as_at_their_origin() {
        let file = Origin::File {
            path: Path::new("f.toml").into(),
            line: 7,
        };
        for (origin, expected) in [
            (Origin::Flag, "--queues 0|--queues|no"),
            (Origin::Device("a".into()), "queues=0|queues|--device a: no"),
            (file, "queues = 0|queues|f.toml:7: no"),
        ] {
            let found = format!(
                "{}|{}|{}",
                origin.set("queues", 0),
                origin.key("queues"),
                origin.problem(ProblemCode::KeyUnused, format_args!("no"))
            );
            assert_eq!(found, expected);
        }
    }
}
