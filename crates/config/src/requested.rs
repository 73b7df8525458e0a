//! A device that a request describes, by the keys of a `[[device]]`, while the daemon runs.

use std::collections::BTreeMap;

use crate::device::DeviceDescription;
use crate::keys::{Key, ValueKind, find_nearest};
use crate::ownership::check_owners;
use crate::problem::{ConfigError, Problem, ProblemCode, Problems};
use crate::settings::{Origin, SettingValue, Settings};
use crate::types::{Config, DeviceConfig, PollMode, Socket, WorkersConfig};
use crate::uplink::UplinkConfig;

/// The value of a key in a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GivenValue {
    /// A text.
    Text(String),
    /// A whole number.
    Number(u64),
    /// On or off.
    Switch(bool),
    /// Something else, such as a list.
    Other,
}

impl GivenValue {
    /// The value of a key of a device as a command line spells it.
    ///
    /// # Errors
    /// When there is no such key, or the value is of another kind.
    pub fn of_text(name: &str, text: &str) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let key = problems.record(Key::find(name).ok_or_else(|| unknown_key(name)));
        problems.into_result()?;
        let kind = key.map_or(ValueKind::Text, |key| key.kind);
        Ok(match (kind, text, text.parse()) {
            (ValueKind::Number | ValueKind::NumberOrWord, _, Ok(number)) => Self::Number(number),
            (ValueKind::Switch, "on", _) => Self::Switch(true),
            (ValueKind::Switch, "off", _) => Self::Switch(false),
            _ => Self::Text(text.to_owned()),
        })
    }
}

/// A device that a request describes. Its settings and its configuration say the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requested {
    /// The values of its keys, as flags spell them.
    pub settings: BTreeMap<String, String>,
    /// The configuration.
    pub config: DeviceConfig,
}

impl Requested {
    /// The device with these values. Keys that are missing have their defaults, whatever
    /// `[defaults]` and the command line say.
    ///
    /// # Errors
    /// All problems of the values.
    pub fn new(values: &BTreeMap<String, GivenValue>) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let mut settings = BTreeMap::new();
        for (name, value) in values {
            if let Some((key, text)) = problems.record(to_text(name, value)) {
                settings.insert(key.name.to_owned(), text);
            }
        }
        problems.into_result()?;
        Self::from_settings(settings)
    }

    /// The device with these settings.
    ///
    /// # Errors
    /// All problems of the settings.
    pub fn from_settings(settings: BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let mut all = Settings::default();
        for (name, text) in &settings {
            match Key::find(name) {
                Some(key) => _ = all.insert(key, SettingValue::new(text, &Origin::Request)),
                None => problems.add(unknown_key(name)),
            }
        }
        if all.get(Key::NAME).is_none() {
            let message = "no name is given: add \"name\"".into();
            problems.add(Problem::new(ProblemCode::ValueMissing, message));
        }
        let description = DeviceDescription {
            origin: Origin::Request,
            default_name: "vnet".into(),
            settings: all,
        };
        let config = description.resolve(&mut problems);
        problems.into_result()?;
        match config {
            Some(config) => Ok(Self { settings, config }),
            None => Err(ConfigError::unknown()),
        }
    }
}

impl Config {
    /// Checks that `device` can be added to these devices, and that it is allowed.
    ///
    /// # Errors
    /// What prevents it.
    pub fn check_added(&self, device: &DeviceConfig) -> Result<(), ConfigError> {
        let mut problems = Problems::default();
        let allowed = match &self.allow_add {
            Some(allowed) => allowed.check(device),
            None => Err(Problem::new(
                ProblemCode::NotAllowed,
                "no device can be added while virtionetd runs: start it with --allow-add".into(),
            )),
        };
        problems.record(allowed);
        problems.record(check_group(device));
        problems.record(self.check_workers(device));
        check_owners(self, device, &mut problems);
        problems.into_result()
    }

    /// What sharing the workers excludes.
    fn check_workers(&self, device: &DeviceConfig) -> Result<(), Problem> {
        if self.workers == WorkersConfig::PerPair {
            return Ok(());
        }
        let shared = Key::WORKERS.flag();
        let refuse = |why: &str| {
            let message = format!("{}: {why} is not possible with {shared}", device.name);
            Err(Problem::new(ProblemCode::KeysConflict, message))
        };
        // A daemon that started without devices has workers that sleep.
        let poll = self
            .devices
            .first()
            .map_or(PollMode::Off, |first| first.poll);
        match device {
            DeviceConfig { postcopy: true, .. } => refuse("postcopy"),
            device if device.poll != poll => refuse("another poll mode than that of the others"),
            _ => Ok(()),
        }
    }
}

/// A confined process cannot look groups up, and a new switch would need a thread for its TAP.
fn check_group(device: &DeviceConfig) -> Result<(), Problem> {
    if let Socket::Listen {
        group: Some(group), ..
    } = &device.socket
        && group.parse::<u32>().is_err()
    {
        let message = format!(
            "{}: group {group} cannot be looked up while virtionetd runs: write its number",
            device.name
        );
        return Err(Problem::new(ProblemCode::ValueInvalid, message));
    }
    match &device.uplink {
        UplinkConfig::Tap(tap) if tap.name.contains('%') => Err(Problem::new(
            ProblemCode::ValueInvalid,
            format!(
                "{}: the kernel cannot choose the name of a TAP that is added at run time: write its name instead of {}",
                device.name, tap.name
            ),
        )),
        _ => Ok(()),
    }
}

fn to_text(name: &str, value: &GivenValue) -> Result<(Key, String), Problem> {
    let key = Key::find(name).ok_or_else(|| unknown_key(name))?;
    let text = match (key.kind, value) {
        (
            ValueKind::Text | ValueKind::Path | ValueKind::NumberOrWord | ValueKind::Octal,
            GivenValue::Text(text),
        ) => text.clone(),
        (ValueKind::Number | ValueKind::NumberOrWord, GivenValue::Number(number)) => {
            number.to_string()
        }
        (ValueKind::Switch, GivenValue::Switch(is_on)) => {
            if *is_on { "on" } else { "off" }.to_owned()
        }
        (kind, _) => {
            let message = format!(
                "{name} has a value of another kind: write {}",
                kind.expected()
            );
            return Err(Problem::new(ProblemCode::KindWrong, message));
        }
    };
    Ok((key, text))
}

fn unknown_key(name: &str) -> Problem {
    let message = match find_nearest(name, Key::of_devices().map(|key| key.name)) {
        Some(nearest) => {
            format!("the key {name:?} is not known: write {nearest}, which is the most similar one")
        }
        None => format!("the key {name:?} is not known: use {}", Key::names()),
    };
    Problem::new(ProblemCode::KeyUnknown, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    fn requested(values: &[(&str, GivenValue)]) -> Result<Requested, ConfigError> {
        let values = values.iter().cloned();
        Requested::new(&values.map(|(key, value)| (key.into(), value)).collect())
    }

    fn text(text: &str) -> GivenValue {
        GivenValue::Text(text.into())
    }

    fn config(flags: &str) -> Config {
        let words = ["virtionetd"].into_iter().chain(flags.split_whitespace());
        match cli::parse(words.map(Into::into)) {
            Ok(cli::Command::Serve(config)) => *config,
            other => panic!("{flags}: {other:?}"),
        }
    }

    fn device(values: &[(&str, &str)]) -> DeviceConfig {
        let values: Vec<_> = values
            .iter()
            .map(|(key, value)| (*key, text(value)))
            .collect();
        requested(&values).unwrap().config
    }

    #[test]
    fn device_has_the_values_of_the_request_and_defaults() {
        let values = [
            ("name", text("b")),
            ("socket-path", text("/run/b.sock")),
            ("queues", GivenValue::Number(2)),
            ("client", GivenValue::Switch(true)),
            ("uplink", text("null")),
        ];
        let requested = requested(&values).unwrap();
        let same = config("--name b --socket-path /run/b.sock --queues 2 --client --uplink null");
        assert_eq!(requested.config, same.devices[0]);
        let again = Requested::from_settings(requested.settings.clone()).unwrap();
        assert_eq!(again, requested);
    }

    #[test]
    fn value_of_a_command_line_has_the_kind_of_its_key() {
        for (name, written, value) in [
            ("queues", "4", GivenValue::Number(4)),
            ("queues", "high", text("high")),
            ("client", "on", GivenValue::Switch(true)),
            ("client", "maybe", text("maybe")),
            ("socket-mode", "660", text("660")),
            ("name", "7", text("7")),
        ] {
            assert_eq!(GivenValue::of_text(name, written).unwrap(), value, "{name}");
        }
        let error = GivenValue::of_text("control", "/s").unwrap_err();
        assert_eq!(
            error.problems().next().map(Problem::code),
            Some("key-unknown")
        );
    }

    #[test]
    fn wrong_values_are_refused_with_their_codes() {
        let uplink = ("uplink", text("null"));
        let (name, path) = (("name", text("b")), ("socket-path", text("/s")));
        for (values, codes) in [
            (vec![path.clone(), uplink.clone()], vec!["value-missing"]),
            (vec![name.clone(), uplink.clone()], vec!["socket-missing"]),
            (vec![name.clone(), path.clone()], vec!["uplink-missing"]),
            (vec![("queus", text("2"))], vec!["key-unknown"]),
            (
                vec![("queues", GivenValue::Switch(true))],
                vec!["kind-wrong"],
            ),
            (
                vec![("client", text("on")), ("name", GivenValue::Other)],
                vec!["kind-wrong"; 2],
            ),
            (
                vec![name, path, uplink, ("queues", GivenValue::Number(0))],
                vec!["value-invalid"],
            ),
        ] {
            let error = requested(&values).unwrap_err();
            let found: Vec<_> = error.problems().map(Problem::code).collect();
            assert_eq!(found, codes, "{error}");
        }
    }

    #[test]
    fn only_what_is_allowed_and_free_can_be_added() {
        let running = config(
            "--allow-add socket=/run/v/*.sock,tap=vn*,bridge=br0,switch=lan --device socket-path=/run/v/a.sock,tap=vn0,name=a",
        );
        let base = |path| vec![("name", "b"), ("socket-path", path)];
        for (path, more, code) in [
            ("/run/v/b.sock", ("tap", "vn1"), None),
            ("/run/v/b.sock", ("uplink", "tap:vn1,bridge=br0"), None),
            ("/run/v/b.sock", ("uplink", "switch:lan"), None),
            ("/run/v/b.sock", ("uplink", "null"), None),
            ("/run/v/b.sock", ("tap", "vn0"), Some("resource-shared")),
            ("/run/v/a.sock", ("tap", "vn1"), Some("resource-shared")),
            ("/run/w/b.sock", ("tap", "vn1"), Some("not-allowed")),
            ("/run/v/../b.sock", ("tap", "vn1"), Some("not-allowed")),
            ("/run/v/b.sock", ("tap", "eth0"), Some("not-allowed")),
            (
                "/run/v/b.sock",
                ("uplink", "tap:vn1,bridge=br1"),
                Some("not-allowed"),
            ),
            (
                "/run/v/b.sock",
                ("uplink", "switch:wan"),
                Some("not-allowed"),
            ),
            ("/run/v/b.sock", ("tap", "vn%d"), Some("value-invalid")),
        ] {
            let added = device(&[&*base(path), &[more]].concat());
            let problem = running.check_added(&added);
            let found = problem.as_ref().map_err(|error| error.problems().next());
            let found = found.err().flatten().map(Problem::code);
            assert_eq!(found, code, "{path} {more:?}: {problem:?}");
        }
        let same_name = device(&[
            ("name", "a"),
            ("socket-path", "/run/v/b.sock"),
            ("tap", "vn1"),
        ]);
        assert!(running.check_added(&same_name).is_err());
        let closed = config("--socket-path /run/v/a.sock --uplink null");
        let other = device(&[&*base("/run/v/b.sock"), &[("uplink", "null")]].concat());
        assert!(
            closed
                .check_added(&other)
                .unwrap_err()
                .to_string()
                .contains("--allow-add")
        );
    }

    #[test]
    fn daemon_that_may_be_extended_needs_no_device() {
        assert!(config("--allow-add socket=/run/*.sock").devices.is_empty());
    }

    #[test]
    fn sockets_are_allowed_in_one_folder_for_each_pattern() {
        let allowed = config("--allow-add socket=/run/a/*,socket=/run/b/x")
            .allow_add
            .unwrap();
        let folders = ["/run/a", "/run/b"].map(std::path::PathBuf::from);
        assert_eq!(allowed.socket_folders(), folders);
        for value in ["socket=/run/*/x", "socket=x", "tap", "disk=x", "tap=[", ""] {
            let words = ["virtionetd", "--allow-add", value].map(Into::into);
            assert!(cli::parse(words).is_err(), "{value}");
        }
    }
}
