//! The values of keys as they are written, each with its origin for the problems that concern it,
//! and the rules by which a stronger layer of settings overrides a weaker one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;
use std::rc::Rc;

use crate::keys::Key;
use crate::problem::{Problem, ProblemCode};

/// Where a value is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// In a flag of the command line.
    Flag,
    /// In a `--device` of this text.
    Device(Rc<str>),
    /// In the description of a device that a request has.
    Request,
    /// In a line of a file.
    File {
        /// The file.
        path: Rc<Path>,
        /// The line, from 1.
        line: usize,
    },
}

impl Origin {
    /// A problem of a setting that is written here.
    #[must_use]
    pub fn problem(&self, code: ProblemCode, message: fmt::Arguments<'_>) -> Problem {
        match self {
            Self::Flag | Self::Request => Problem::new(code, message.to_string()),
            Self::Device(text) => Problem::new(code, format!("--device {text}: {message}")),
            Self::File { path, line } => Problem::in_line(path, *line, code, message.to_string()),
        }
    }

    /// How `key` is written here.
    #[must_use]
    pub fn key(&self, key: Key) -> String {
        match self {
            Self::Flag => key.flag(),
            Self::Device(_) | Self::Request | Self::File { .. } => key.name.into(),
        }
    }

    /// How `key` is set to `value` here.
    #[must_use]
    pub fn set(&self, key: Key, value: impl fmt::Display) -> String {
        let Key { name, kind, .. } = key;
        match self {
            Self::Flag => format!("--{name} {value}"),
            Self::Device(_) => format!("{name}={value}"),
            // Texts, numbers and switches are spelt alike in TOML and JSON.
            Self::Request => format!("{name:?}: {}", kind.to_toml(&value.to_string())),
            Self::File { .. } => format!("{name} = {}", kind.to_toml(&value.to_string())),
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
    /// Whether it is no problem when the value has no effect, because it was given for several
    /// devices or because a stronger layer has overridden the key that it depends on.
    pub may_be_unused: bool,
}

impl SettingValue {
    /// A value that is reported as a problem when it has no effect.
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

/// The settings of a device or of the process, by the name of the key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings(BTreeMap<&'static str, SettingValue>);

/// Two lists of keys: where a stronger layer sets a key of the first list, the rule applies to the
/// keys of the second list in a weaker layer.
type KeyRule = (&'static [Key], &'static [Key]);

/// Keys that express the same in several ways. Where a stronger layer sets a key of the first list,
/// no key of the second list is taken from a weaker layer.
const CONFLICTING_KEYS: [KeyRule; 3] = [
    (
        &[Key::TAP, Key::UPLINK],
        &[Key::TAP, Key::BRIDGE, Key::UPLINK],
    ),
    (
        &[Key::FD],
        &[
            Key::SOCKET_PATH,
            Key::CLIENT,
            Key::SOCKET_MODE,
            Key::SOCKET_GROUP,
            Key::PEER_UID,
        ],
    ),
    (&[Key::SOCKET_PATH], &[Key::FD]),
];

/// Keys of the second list have an effect only with some values of the keys of the first list, so
/// that those of a weaker layer may be unused.
const DEPENDENT_KEYS: [KeyRule; 3] = [
    (&[Key::POLL], &[Key::POLL_US]),
    (&[Key::QUEUES], &[Key::VCPUS]),
    (
        &[Key::CLIENT],
        &[Key::SOCKET_MODE, Key::SOCKET_GROUP, Key::PEER_UID],
    ),
];

impl Settings {
    /// The value of `key`, where it is set.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&SettingValue> {
        self.0.get(key.name)
    }

    /// Sets `key`, and returns whether it was set already.
    pub fn insert(&mut self, key: Key, value: SettingValue) -> bool {
        self.0.insert(key.name, value).is_some()
    }

    /// The keys that are set, in the order of the table.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        Key::of_devices().filter(|key| self.0.contains_key(key.name))
    }

    /// Turns these settings into settings for several devices: removes the keys that describe a
    /// single device.
    #[must_use]
    pub fn into_common(mut self) -> Self {
        self.0
            .retain(|name, _| Key::find(name).is_some_and(Key::is_common));
        self.0
            .values_mut()
            .for_each(|value| value.may_be_unused = true);
        self
    }

    /// Adds the settings of a `weaker` layer for the keys that these settings do not have.
    #[must_use]
    pub fn merged_over(self, weaker: &Self) -> Self {
        let has_any = |keys: &[Key]| keys.iter().any(|key| self.get(*key).is_some());
        let is_affected = |rules: &[KeyRule], name: &str| {
            rules.iter().any(|(stronger, weaker)| {
                weaker.iter().any(|key| key.name == name) && has_any(stronger)
            })
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
    fn stronger_layer_overrides_its_keys_and_those_that_belong_to_them() {
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
                origin.set(Key::QUEUES, 0),
                origin.key(Key::QUEUES),
                origin.problem(ProblemCode::KeyUnused, format_args!("no"))
            );
            assert_eq!(found, expected);
        }
    }
}
