//! The settings of one device, parsed into a [`DeviceConfig`].

use std::borrow::Cow;
use std::fmt::Display;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use virtionet_base::MAX_QUEUE_PAIRS;
use virtionet_placement::Placement;
use virtionet_placement::interrupts::IrqAffinity;
use virtionet_sizing::{Throughput, queue_pairs_for};

use crate::keys::Key;
use crate::problem::{Problem, ProblemCode, Problems};
use crate::settings::{Origin, SettingValue, Settings};
use crate::types::{DeviceConfig, PollMode, QueuePairCount, Socket};
use crate::uplink::UplinkConfig;

/// The longest value of `poll-us`.
const MAX_POLL_US: u64 = 100_000;

/// Longest path of a unix socket, in bytes (unix(7): 108 with the closing zero).
const MAX_SOCKET_PATH: usize = 107;

/// The description of a device: its settings from all layers.
#[derive(Debug, Clone)]
pub(crate) struct DeviceDescription {
    /// Where the description is written, or begins.
    pub origin: Origin,
    /// The name where none is set.
    pub default_name: String,
    /// The settings.
    pub settings: Settings,
}

impl DeviceDescription {
    /// The name, not checked yet.
    #[must_use]
    pub fn name(&self) -> String {
        let name = self.settings.get("name").map(|name| name.text().into());
        name.unwrap_or_else(|| self.default_name.clone())
    }

    /// The origin of the first of `keys` that is set, otherwise of the description.
    #[must_use]
    pub fn origin_of(&self, keys: &[&str]) -> &Origin {
        let first = keys.iter().find_map(|key| self.settings.get(key));
        first.map_or(&self.origin, |value| &value.origin)
    }

    /// Parses all settings. `None` where some cannot be used; `problems` then hold the reasons.
    pub fn resolve(&self, problems: &mut Problems) -> Option<DeviceConfig> {
        let name = problems.record(self.validate_name());
        let socket = problems.record(self.socket());
        let queues = problems.record(self.queues());
        let uplink = problems.record(self.uplink());
        let placement = problems.record(self.placement());
        let irq_affinity = problems.record(self.irq_affinity());
        let qmp = problems.record(self.qmp());
        let poll = problems.record(self.poll());
        Some(DeviceConfig {
            name: name?,
            socket: socket?,
            queues: queues?,
            uplink: uplink?,
            placement: placement?,
            irq_affinity: irq_affinity?,
            qmp: qmp?,
            poll: poll?,
        })
    }

    /// The value of `key`, or its default.
    fn text(&self, key: &str) -> Cow<'_, str> {
        let value = self.settings.get(key);
        value.map_or(Cow::Borrowed(Key::default_of(key)), SettingValue::text)
    }

    fn validate_name(&self) -> Result<String, Problem> {
        let name = self.name();
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !name.is_empty() && name.len() <= 64 && name.chars().all(plain) {
            return Ok(name);
        }
        let origin = self.origin_of(&["name"]);
        Err(origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} {name:?} cannot be used: write 1 to 64 letters, digits, '.', '_' or '-'",
                origin.key("name")
            ),
        ))
    }

    fn socket(&self) -> Result<Socket, Problem> {
        let client = self.client()?;
        let (path, fd) = (self.settings.get("socket-path"), self.settings.get("fd"));
        let socket = match (path, fd) {
            (Some(path), Some(fd)) => return Err(both("socket-path", path, "fd", fd)),
            (None, None) => return Err(self.no_socket()),
            (None, Some(fd)) => self.inherited_socket(fd, client)?,
            (Some(path), None) if client.is_some() => Socket::Connect {
                path: check_path("socket-path", path)?,
            },
            (Some(path), None) => Socket::Listen {
                path: check_path("socket-path", path)?,
                mode: self.mode()?,
                group: self.group()?,
            },
        };
        match socket {
            Socket::Listen { .. } => {}
            _ => self.refuse_access()?,
        }
        Ok(socket)
    }

    /// The setting that makes virtionetd the side that connects, if there is one.
    fn client(&self) -> Result<Option<&SettingValue>, Problem> {
        let Some(value) = self.settings.get("client") else {
            return Ok(None);
        };
        match &*value.text() {
            "off" => Ok(None),
            "on" => Ok(Some(value)),
            other => Err(value.origin.problem(
                ProblemCode::ValueInvalid,
                format_args!("client={other} is not known: write client=on or client=off"),
            )),
        }
    }

    fn no_socket(&self) -> Problem {
        let origin = &self.origin;
        origin.problem(
            ProblemCode::SocketMissing,
            format_args!(
                "no socket is given: add {} or {}",
                origin.set("socket-path", "PATH"),
                origin.set("fd", "N")
            ),
        )
    }

    fn inherited_socket(
        &self,
        fd: &SettingValue,
        client: Option<&SettingValue>,
    ) -> Result<Socket, Problem> {
        let origin = &fd.origin;
        if let Some(client) = client.filter(|client| !client.may_be_unused) {
            let key = client.origin.key("client");
            return Err(client.origin.problem(
                ProblemCode::KeysConflict,
                format_args!(
                    "{key} and {} are both given: leave {key} out, or name the socket with {}",
                    origin.set("fd", fd.text()),
                    origin.set("socket-path", "PATH"),
                ),
            ));
        }
        match fd.text().parse::<RawFd>() {
            Ok(fd) if fd > 2 => Ok(Socket::Inherited(fd)),
            _ => Err(origin.problem(ProblemCode::ValueInvalid, format_args!(
                "{} cannot be a socket: write the number, 3 or more, of the file descriptor that the parent process passes on",
                origin.set("fd", fd.text())
            ))),
        }
    }

    /// Refuses a mode or a group for a socket that virtionetd does not create.
    fn refuse_access(&self) -> Result<(), Problem> {
        for key in ["socket-mode", "socket-group"] {
            let Some(value) = self.settings.get(key).filter(|value| !value.may_be_unused) else {
                continue;
            };
            let origin = &value.origin;
            return Err(origin.problem(ProblemCode::KeyUnused, format_args!(
                "{} is for a socket that virtionetd creates: leave it out, or use {} without {}",
                origin.key(key),
                origin.key("socket-path"),
                origin.key("client"),
            )));
        }
        Ok(())
    }

    fn mode(&self) -> Result<u32, Problem> {
        let Some(value) = self.settings.get("socket-mode") else {
            return Ok(match self.settings.get("socket-group") {
                Some(_) => 0o660,
                None => 0o600,
            });
        };
        match u32::from_str_radix(&value.text(), 8) {
            Ok(mode) if mode <= 0o777 => Ok(mode),
            _ => Err(value.origin.problem(
                ProblemCode::ValueInvalid,
                format_args!(
                    "{} is not a file mode: write it in octal, 0 to 777, such as 660",
                    value.origin.set("socket-mode", value.text())
                ),
            )),
        }
    }

    fn group(&self) -> Result<Option<String>, Problem> {
        let Some(value) = self.settings.get("socket-group") else {
            return Ok(None);
        };
        if value.value.is_empty() {
            return Err(value.origin.problem(
                ProblemCode::ValueInvalid,
                format_args!(
                    "{} is empty: write a group's name or number",
                    value.origin.key("socket-group")
                ),
            ));
        }
        Ok(Some(value.text().into()))
    }

    fn queues(&self) -> Result<QueuePairCount, Problem> {
        let text = self.text("queues");
        let throughput = match &*text {
            "auto" => None,
            share => share.parse::<Throughput>().ok(),
        };
        match (throughput, text.parse::<u16>()) {
            (None, Ok(pairs @ 1..=MAX_QUEUE_PAIRS)) => {
                self.refuse_vcpus(&text)?;
                Ok(QueuePairCount::AtMost(pairs))
            }
            (None, _) if text == "auto" => self
                .queue_pairs_of(Throughput::High)
                .map(|pairs| pairs.map_or(QueuePairCount::Auto, QueuePairCount::AtMost)),
            (Some(throughput), _) => match self.queue_pairs_of(throughput)? {
                Some(pairs) => Ok(QueuePairCount::AtMost(pairs)),
                None => Err(self.no_vcpus(&text)),
            },
            (None, _) => {
                let origin = self.origin_of(&["queues"]);
                Err(origin.problem(ProblemCode::ValueInvalid, format_args!(
                    "{} cannot be used: write 1 to {MAX_QUEUE_PAIRS} queue pairs, auto for as many as the front-end asks for, or high, medium or low with {}",
                    origin.set("queues", text),
                    origin.set("vcpus", "N"),
                )))
            }
        }
    }

    /// The queue pairs for `throughput`, where the guest's vCPUs are known.
    fn queue_pairs_of(&self, throughput: Throughput) -> Result<Option<u16>, Problem> {
        let Some(value) = self.settings.get("vcpus") else {
            return Ok(None);
        };
        let origin = &value.origin;
        let wrong = || {
            origin.problem(
                ProblemCode::ValueInvalid,
                format_args!(
                    "{} cannot be used: write the number of the guest's vCPUs, 1 or more",
                    origin.set("vcpus", value.text())
                ),
            )
        };
        let vcpus = value.text().parse::<u32>().map_err(|_| wrong())?;
        let (pairs, _) =
            queue_pairs_for(vcpus, throughput, MAX_QUEUE_PAIRS).map_err(|_| wrong())?;
        Ok(Some(pairs))
    }

    fn no_vcpus(&self, queues: &str) -> Problem {
        let origin = self.origin_of(&["queues"]);
        origin.problem(ProblemCode::VcpusMissing, format_args!(
            "{} is a share of the guest's vCPUs, which are not known: add {}, or write the number of queue pairs",
            origin.set("queues", queues),
            origin.set("vcpus", "N"),
        ))
    }

    fn refuse_vcpus(&self, queues: &str) -> Result<(), Problem> {
        let Some(value) = self
            .settings
            .get("vcpus")
            .filter(|value| !value.may_be_unused)
        else {
            return Ok(());
        };
        let origin = &value.origin;
        Err(origin.problem(ProblemCode::KeyUnused, format_args!(
            "{} has no effect with {}: leave it out, or write {} for as many queue pairs as vCPUs",
            origin.set("vcpus", value.text()),
            self.origin_of(&["queues"]).set("queues", queues),
            origin.set("queues", "high"),
        )))
    }

    fn uplink(&self) -> Result<UplinkConfig, Problem> {
        let get = |key| self.settings.get(key);
        let spec = match (get("tap"), get("uplink"), get("bridge")) {
            (Some(tap), Some(uplink), _) => return Err(both("tap", tap, "uplink", uplink)),
            (None, None, _) => return Err(self.no_uplink()),
            (Some(tap), None, Some(bridge)) => {
                format!("tap:{},bridge={}", tap.text(), bridge.text())
            }
            (Some(tap), None, None) => format!("tap:{}", tap.text()),
            (None, Some(uplink), Some(bridge)) => {
                let origin = &bridge.origin;
                return Err(origin.problem(
                    ProblemCode::KeysConflict,
                    format_args!(
                        "{} needs tap: write {} instead of {}, or leave bridge out",
                        origin.set("bridge", bridge.text()),
                        origin.set("tap", "NAME"),
                        uplink.origin.set("uplink", uplink.text()),
                    ),
                ));
            }
            (None, Some(uplink), None) => uplink.text().into(),
        };
        self.parse(&["tap", "uplink"], &spec)
    }

    fn no_uplink(&self) -> Problem {
        let origin = &self.origin;
        origin.problem(
            ProblemCode::UplinkMissing,
            format_args!(
                "no uplink is given: add {}, or {} to drop what the guest sends",
                origin.set("tap", "NAME"),
                origin.set("uplink", "null")
            ),
        )
    }

    fn placement(&self) -> Result<Placement, Problem> {
        self.parse(&["placement"], &self.text("placement"))
    }

    fn irq_affinity(&self) -> Result<IrqAffinity, Problem> {
        self.parse(&["irq-affinity"], &self.text("irq-affinity"))
    }

    /// Parses `text`, the value of one of `keys`.
    fn parse<T>(&self, keys: &[&str], text: &str) -> Result<T, Problem>
    where
        T: FromStr<Err: Display>,
    {
        let origin = self.origin_of(keys);
        let key = keys.iter().find(|key| self.settings.get(key).is_some());
        match (text.parse::<T>(), key) {
            (Ok(value), _) => Ok(value),
            (Err(error), Some(key)) => Err(origin.problem(
                ProblemCode::ValueInvalid,
                format_args!("{}: {error}", origin.key(key)),
            )),
            (Err(error), None) => {
                Err(origin.problem(ProblemCode::ValueInvalid, format_args!("{error}")))
            }
        }
    }

    fn qmp(&self) -> Result<Option<PathBuf>, Problem> {
        let value = self.settings.get("qmp");
        value.map(|value| check_path("qmp", value)).transpose()
    }

    fn poll(&self) -> Result<PollMode, Problem> {
        let text = self.text("poll");
        let poll = match &*text {
            "off" => PollMode::Off,
            "always" => PollMode::Always,
            "adaptive" => return self.poll_time().map(PollMode::Adaptive),
            _ => {
                let origin = self.origin_of(&["poll"]);
                return Err(origin.problem(
                    ProblemCode::ValueInvalid,
                    format_args!(
                        "{} is not known: write off, adaptive or always",
                        origin.set("poll", text)
                    ),
                ));
            }
        };
        match self
            .settings
            .get("poll-us")
            .filter(|value| !value.may_be_unused)
        {
            None => Ok(poll),
            Some(us) => {
                let origin = &us.origin;
                Err(origin.problem(
                    ProblemCode::KeyUnused,
                    format_args!(
                        "{} has no effect with {}: add {}, or leave {} out",
                        origin.set("poll-us", us.text()),
                        origin.set("poll", text),
                        origin.set("poll", "adaptive"),
                        origin.key("poll-us"),
                    ),
                ))
            }
        }
    }

    fn poll_time(&self) -> Result<Duration, Problem> {
        let text = self.text("poll-us");
        match text.parse() {
            Ok(us @ 1..=MAX_POLL_US) => Ok(Duration::from_micros(us)),
            _ => {
                let origin = self.origin_of(&["poll-us"]);
                Err(origin.problem(
                    ProblemCode::ValueInvalid,
                    format_args!(
                        "{} cannot be used: write 1 to {MAX_POLL_US} microseconds",
                        origin.set("poll-us", text)
                    ),
                ))
            }
        }
    }
}

fn both(a: &str, first: &SettingValue, b: &str, second: &SettingValue) -> Problem {
    first.origin.problem(
        ProblemCode::KeysConflict,
        format_args!(
            "{} and {} are both given: keep one of them",
            first.origin.set(a, first.text()),
            second.origin.set(b, second.text())
        ),
    )
}

/// The path of a socket.
///
/// # Errors
/// When it is empty, or longer than the address of a socket can be.
pub(crate) fn check_path(key: &str, value: &SettingValue) -> Result<PathBuf, Problem> {
    let path = value.path();
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} is empty: write a path, or leave it out",
                value.origin.key(key)
            ),
        ));
    }
    if bytes.len() > MAX_SOCKET_PATH {
        return Err(value.origin.problem(ProblemCode::ValueInvalid, format_args!(
            "{} is {} bytes long: the path of a unix socket has at most {MAX_SOCKET_PATH}, choose a shorter one",
            value.origin.set(key, path.display()),
            bytes.len()
        )));
    }
    Ok(path.into())
}
