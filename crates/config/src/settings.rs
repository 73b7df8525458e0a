//! Values as they were given: each with the place where it stands, for the sentences about it, and
//! the rules by which a stronger layer wins over a weaker one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;
use std::rc::Rc;

use super::keys::{KeyScope, KEYS, Key, ValueKind};
use super::problem::Problem;

/// Where something was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
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
    /// What is wrong here.
    #[must_use]
    pub fn problem(&self, sentence: fmt::Arguments<'_>) -> Problem {
        match self {
            Self::Flag => Problem::new(sentence.to_string()),
            Self::Device(text) => Problem::new(format!("--device {text}: {sentence}")),
            Self::File { path, line } => Problem::in_line(path, *line, sentence.to_string()),
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

    /// How `key` is given `value` here.
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

/// A value, and where it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingValue {
    /// The value, as a flag spells it.
    pub value: OsString,
    /// Where it stands.
    pub origin: Origin,
    /// Whether it may stand beside others that leave it without meaning: it was said for several
    /// devices, or what it belonged to has been overridden.
    pub may_be_unused: bool,
}

impl SettingValue {
    /// A value that must make sense where it stands.
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

/// What was given of a device, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<&'static str, SettingValue>);

/// Keys that say the same in two ways: the stronger layer's leave nothing of the weaker's.
const CONFLICTING_KEYS: [(&[&str], &[&str]); 3] = [
    (&["tap", "uplink"], &["tap", "bridge", "uplink"]),
    (
        &["fd"],
        &["socket-path", "client", "socket-mode", "socket-group"],
    ),
    (&["socket-path"], &["fd"]),
];

/// Keys that have a meaning only with some values of others.
const DEPENDENT_KEYS: [(&[&str], &[&str]); 3] = [
    (&["poll"], &["poll-us"]),
    (&["queues"], &["vcpus"]),
    (&["client"], &["socket-mode", "socket-group"]),
];

impl Settings {
    /// What was given as `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&SettingValue> {
        self.0.get(key)
    }

    /// Sets `key`; true if it was set already.
    pub fn insert(&mut self, key: Key, given: SettingValue) -> bool {
        self.0.insert(key.name, given).is_some()
    }

    /// The keys that are set, in their usual order.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        KEYS.into_iter().filter(|key| self.0.contains_key(key.name))
    }

    /// These, as what several devices have in common; without what describes one of them.
    #[must_use]
    pub fn into_common(mut self) -> Self {
        let shared = |key: &str| Key::find(key).is_some_and(|key| key.scope == KeyScope::Any);
        self.0.retain(|key, _| shared(key));
        self.0.values_mut().for_each(|given| given.may_be_unused = true);
        self
    }

    /// These, and those of a `weaker` layer where they say nothing.
    #[must_use]
    pub fn merged_over(self, weaker: &Self) -> Self {
        let says = |keys: &[&str]| keys.iter().any(|key| self.0.contains_key(key));
        let touched = |rules: &[(&[&str], &[&str])], key: &str| {
            rules
                .iter()
                .any(|(ours, theirs)| theirs.contains(&key) && says(ours))
        };
        let mut all = self.0.clone();
        for (key, given) in &weaker.0 {
            if touched(&CONFLICTING_KEYS, key) || self.0.contains_key(key) {
                continue;
            }
            let mut given = given.clone();
            given.may_be_unused |= touched(&DEPENDENT_KEYS, key);
            all.insert(key, given);
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
        let item = |(key, given): (&&str, &SettingValue)| {
            let mark = if given.may_be_unused { "?" } else { "" };
            format!("{key}={}{mark}", given.text())
        };
        settings.0.iter().map(item).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_stronger_layer_wins_with_all_that_belongs_to_its_keys() {
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
    fn places_spell_keys_and_problems_in_their_own_way() {
        let file = Origin::File {
            path: Path::new("f.toml").into(),
            line: 7,
        };
        for (origin, said) in [
            (Origin::Flag, "--queues 0|--queues|no"),
            (Origin::Device("a".into()), "queues=0|queues|--device a: no"),
            (file, "queues = 0|queues|f.toml:7: no"),
        ] {
            let found = format!(
                "{}|{}|{}",
                origin.set("queues", 0),
                origin.key("queues"),
                origin.problem(format_args!("no"))
            );
            assert_eq!(found, said);
        }
    }
}
