//! The settings of one device, parsed into a [`DeviceConfig`].

use std::borrow::Cow;
use std::fmt::Display;
use std::os::fd::RawFd;
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
use crate::socket_file::{check_path, socket_group, socket_mode};
use crate::types::{DeviceConfig, FeaturesVersion, PollMode, QueuePairCount, Socket};
use crate::uplink::UplinkConfig;

/// The largest value of `poll-us`, in microseconds.
const MAX_POLL_US: u64 = 100_000;

/// The description of a device: its settings from all layers.
#[derive(Debug, Clone)]
pub(crate) struct DeviceDescription {
    /// Where the description is written. In a file, that is the line where it begins.
    pub origin: Origin,
    /// The name that applies where none is set.
    pub default_name: String,
    /// The settings from all layers.
    pub settings: Settings,
}

impl DeviceDescription {
    /// The name, which is not checked yet.
    #[must_use]
    pub fn name(&self) -> String {
        let name = self.settings.get(Key::NAME).map(|name| name.text().into());
        name.unwrap_or_else(|| self.default_name.clone())
    }

    /// The origin of the first one of `keys` that is set; where none is set, the origin of the
    /// description.
    #[must_use]
    pub fn origin_of(&self, keys: &[Key]) -> &Origin {
        let first = keys.iter().find_map(|key| self.settings.get(*key));
        first.map_or(&self.origin, |value| &value.origin)
    }

    /// Parses all settings. Where some cannot be used, adds the reasons to `problems` and returns
    /// `None`.
    pub fn resolve(&self, problems: &mut Problems) -> Option<DeviceConfig> {
        let name = problems.record(self.validate_name());
        let socket = problems.record(self.socket());
        let queues = problems.record(self.queues());
        let uplink = problems.record(self.uplink());
        let placement = problems.record(self.placement());
        let irq_affinity = problems.record(self.irq_affinity());
        let qmp = problems.record(self.qmp());
        let poll = problems.record(self.poll());
        let features_compat = problems.record(self.features_compat());
        let postcopy = problems.record(self.switch(Key::POSTCOPY));
        Some(DeviceConfig {
            name: name?,
            socket: socket?,
            queues: queues?,
            uplink: uplink?,
            placement: placement?,
            irq_affinity: irq_affinity?,
            qmp: qmp?,
            poll: poll?,
            features_compat: features_compat?,
            postcopy: postcopy?.is_some(),
        })
    }

    /// The value of `key`, or its fixed default.
    fn text(&self, key: Key) -> Cow<'_, str> {
        let value = self.settings.get(key);
        value.map_or(Cow::Borrowed(key.fixed_default()), SettingValue::text)
    }

    fn validate_name(&self) -> Result<String, Problem> {
        let name = self.name();
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !name.is_empty() && name.len() <= 64 && name.chars().all(plain) {
            return Ok(name);
        }
        let origin = self.origin_of(&[Key::NAME]);
        Err(origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} {name:?} cannot be used: write 1 to 64 letters, digits, '.', '_' or '-'",
                origin.key(Key::NAME)
            ),
        ))
    }

    fn socket(&self) -> Result<Socket, Problem> {
        let client = self.client()?;
        let (path, fd) = (
            self.settings.get(Key::SOCKET_PATH),
            self.settings.get(Key::FD),
        );
        let socket = match (path, fd) {
            (Some(path), Some(fd)) => {
                return Err(both_are_given(Key::SOCKET_PATH, path, Key::FD, fd));
            }
            (None, None) => return Err(self.missing_socket()),
            (None, Some(fd)) => self.inherited_socket(fd, client)?,
            (Some(path), None) if client.is_some() => Socket::Connect {
                path: check_path(Key::SOCKET_PATH, path)?,
            },
            (Some(path), None) => Socket::Listen {
                path: check_path(Key::SOCKET_PATH, path)?,
                mode: socket_mode(&self.settings, Key::SOCKET_MODE, Key::SOCKET_GROUP)?,
                group: socket_group(&self.settings, Key::SOCKET_GROUP)?,
                peer_uid: self.peer_uid()?,
            },
        };
        match socket {
            Socket::Listen { .. } => {}
            _ => self.refuse_access()?,
        }
        Ok(socket)
    }

    /// The setting that makes virtionetd connect to the front-end; `None` where virtionetd listens.
    fn client(&self) -> Result<Option<&SettingValue>, Problem> {
        self.switch(Key::CLIENT)
    }

    /// The setting that switches `key` on; `None` where it is off.
    fn switch(&self, key: Key) -> Result<Option<&SettingValue>, Problem> {
        let Some(value) = self.settings.get(key) else {
            return Ok(None);
        };
        let name = key.name;
        match &*value.text() {
            "off" => Ok(None),
            "on" => Ok(Some(value)),
            other => Err(value.origin.problem(
                ProblemCode::ValueInvalid,
                format_args!("{name}={other} is not known: write {name}=on or {name}=off"),
            )),
        }
    }

    fn missing_socket(&self) -> Problem {
        let origin = &self.origin;
        origin.problem(
            ProblemCode::SocketMissing,
            format_args!(
                "no socket is given: add {} or {}",
                origin.set(Key::SOCKET_PATH, "PATH"),
                origin.set(Key::FD, "N")
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
            let key = client.origin.key(Key::CLIENT);
            return Err(client.origin.problem(
                ProblemCode::KeysConflict,
                format_args!(
                    "{key} and {} are both given: leave {key} out, or name the socket with {}",
                    origin.set(Key::FD, fd.text()),
                    origin.set(Key::SOCKET_PATH, "PATH"),
                ),
            ));
        }
        match fd.text().parse::<RawFd>() {
            Ok(fd) if fd > 2 => Ok(Socket::Inherited(fd)),
            _ => Err(origin.problem(ProblemCode::ValueInvalid, format_args!(
                "{} cannot be a socket: write the number, 3 or more, of the file descriptor that \
                     the parent process passes on",
                origin.set(Key::FD, fd.text())
            ))),
        }
    }

    /// Refuses a mode, a group or a user for a socket that virtionetd does not create.
    fn refuse_access(&self) -> Result<(), Problem> {
        for key in [Key::SOCKET_MODE, Key::SOCKET_GROUP, Key::PEER_UID] {
            let Some(value) = self.settings.get(key).filter(|value| !value.may_be_unused) else {
                continue;
            };
            let origin = &value.origin;
            return Err(origin.problem(ProblemCode::KeyUnused, format_args!(
                "{} is for a socket that virtionetd creates: leave it out, or use {} without {}",
                origin.key(key),
                origin.key(Key::SOCKET_PATH),
                origin.key(Key::CLIENT),
            )));
        }
        Ok(())
    }

    fn peer_uid(&self) -> Result<Option<u32>, Problem> {
        let Some(value) = self.settings.get(Key::PEER_UID) else {
            return Ok(None);
        };
        match value.text().parse::<u32>() {
            // The largest number stands for no user (chown(2)).
            Ok(uid) if uid != u32::MAX => Ok(Some(uid)),
            _ => Err(value.origin.problem(
                ProblemCode::ValueInvalid,
                format_args!(
                    "{} is not a user: write the number that id -u prints for the user of the \
                     front-end",
                    value.origin.set(Key::PEER_UID, value.text())
                ),
            )),
        }
    }

    fn queues(&self) -> Result<QueuePairCount, Problem> {
        let text = self.text(Key::QUEUES);
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
                None => Err(self.missing_vcpus(&text)),
            },
            (None, _) => {
                let origin = self.origin_of(&[Key::QUEUES]);
                Err(origin.problem(ProblemCode::ValueInvalid, format_args!(
                    "{} cannot be used: write 1 to {MAX_QUEUE_PAIRS} queue pairs, auto for as many \
                     as the front-end asks for, or high, medium or low with {}",
                    origin.set(Key::QUEUES, text),
                    origin.set(Key::VCPUS, "N"),
                )))
            }
        }
    }

    /// The queue pairs for `throughput`; `None` where the number of the guest's vCPUs is not known.
    fn queue_pairs_of(&self, throughput: Throughput) -> Result<Option<u16>, Problem> {
        let Some(value) = self.settings.get(Key::VCPUS) else {
            return Ok(None);
        };
        let origin = &value.origin;
        let invalid = || {
            origin.problem(
                ProblemCode::ValueInvalid,
                format_args!(
                    "{} cannot be used: write the number of the guest's vCPUs, 1 or more",
                    origin.set(Key::VCPUS, value.text())
                ),
            )
        };
        let vcpus = value.text().parse::<u32>().map_err(|_| invalid())?;
        let (pairs, _) =
            queue_pairs_for(vcpus, throughput, MAX_QUEUE_PAIRS).map_err(|_| invalid())?;
        Ok(Some(pairs))
    }

    fn missing_vcpus(&self, queues: &str) -> Problem {
        let origin = self.origin_of(&[Key::QUEUES]);
        origin.problem(ProblemCode::VcpusMissing, format_args!(
            "{} is a share of the guest's vCPUs, which are not known: add {}, or write the number \
             of queue pairs",
            origin.set(Key::QUEUES, queues),
            origin.set(Key::VCPUS, "N"),
        ))
    }

    /// Refuses a number of vCPUs beside a number of queue pairs, which does not depend on it.
    fn refuse_vcpus(&self, queues: &str) -> Result<(), Problem> {
        let Some(value) = self
            .settings
            .get(Key::VCPUS)
            .filter(|value| !value.may_be_unused)
        else {
            return Ok(());
        };
        let origin = &value.origin;
        Err(origin.problem(ProblemCode::KeyUnused, format_args!(
            "{} has no effect with {}: leave it out, or write {} for as many queue pairs as vCPUs",
            origin.set(Key::VCPUS, value.text()),
            self.origin_of(&[Key::QUEUES]).set(Key::QUEUES, queues),
            origin.set(Key::QUEUES, "high"),
        )))
    }

    fn uplink(&self) -> Result<UplinkConfig, Problem> {
        let get = |key| self.settings.get(key);
        let spec = match (get(Key::TAP), get(Key::UPLINK), get(Key::BRIDGE)) {
            (Some(tap), Some(uplink), _) => {
                return Err(both_are_given(Key::TAP, tap, Key::UPLINK, uplink));
            }
            (None, None, _) => return Err(self.missing_uplink()),
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
                        origin.set(Key::BRIDGE, bridge.text()),
                        origin.set(Key::TAP, "NAME"),
                        uplink.origin.set(Key::UPLINK, uplink.text()),
                    ),
                ));
            }
            (None, Some(uplink), None) => uplink.text().into(),
        };
        self.parse(&[Key::TAP, Key::UPLINK], &spec)
    }

    fn missing_uplink(&self) -> Problem {
        let origin = &self.origin;
        origin.problem(
            ProblemCode::UplinkMissing,
            format_args!(
                "no uplink is given: add {}, or {} to drop what the guest sends",
                origin.set(Key::TAP, "NAME"),
                origin.set(Key::UPLINK, "null")
            ),
        )
    }

    fn placement(&self) -> Result<Placement, Problem> {
        self.parse(&[Key::PLACEMENT], &self.text(Key::PLACEMENT))
    }

    fn irq_affinity(&self) -> Result<IrqAffinity, Problem> {
        self.parse(&[Key::IRQ_AFFINITY], &self.text(Key::IRQ_AFFINITY))
    }

    /// Parses `text`, the value of one of `keys`.
    fn parse<T>(&self, keys: &[Key], text: &str) -> Result<T, Problem>
    where
        T: FromStr<Err: Display>,
    {
        let origin = self.origin_of(keys);
        let key = keys.iter().find(|key| self.settings.get(**key).is_some());
        match (text.parse::<T>(), key) {
            (Ok(value), _) => Ok(value),
            (Err(error), Some(key)) => Err(origin.problem(
                ProblemCode::ValueInvalid,
                format_args!("{}: {error}", origin.key(*key)),
            )),
            (Err(error), None) => {
                Err(origin.problem(ProblemCode::ValueInvalid, format_args!("{error}")))
            }
        }
    }

    fn qmp(&self) -> Result<Option<PathBuf>, Problem> {
        let value = self.settings.get(Key::QMP);
        value.map(|value| check_path(Key::QMP, value)).transpose()
    }

    fn poll(&self) -> Result<PollMode, Problem> {
        let text = self.text(Key::POLL);
        let poll = match &*text {
            "off" => PollMode::Off,
            "always" => PollMode::Always,
            "adaptive" => return self.poll_time().map(PollMode::Adaptive),
            _ => {
                let origin = self.origin_of(&[Key::POLL]);
                return Err(origin.problem(
                    ProblemCode::ValueInvalid,
                    format_args!(
                        "{} is not known: write off, adaptive or always",
                        origin.set(Key::POLL, text)
                    ),
                ));
            }
        };
        match self
            .settings
            .get(Key::POLL_US)
            .filter(|value| !value.may_be_unused)
        {
            None => Ok(poll),
            Some(us) => {
                let origin = &us.origin;
                Err(origin.problem(
                    ProblemCode::KeyUnused,
                    format_args!(
                        "{} has no effect with {}: add {}, or leave {} out",
                        origin.set(Key::POLL_US, us.text()),
                        origin.set(Key::POLL, text),
                        origin.set(Key::POLL, "adaptive"),
                        origin.key(Key::POLL_US),
                    ),
                ))
            }
        }
    }

    fn features_compat(&self) -> Result<FeaturesVersion, Problem> {
        let Some(value) = self.settings.get(Key::FEATURES_COMPAT) else {
            return Ok(FeaturesVersion::default());
        };
        FeaturesVersion::find(&value.text()).ok_or_else(|| {
            let known = FeaturesVersion::ALL.map(FeaturesVersion::name).join(", ");
            value.origin.problem(
                ProblemCode::ValueInvalid,
                format_args!(
                    "{} is no version whose features this virtionetd knows: write one of these: \
                     {known}",
                    value.origin.set(Key::FEATURES_COMPAT, value.text())
                ),
            )
        })
    }

    fn poll_time(&self) -> Result<Duration, Problem> {
        let text = self.text(Key::POLL_US);
        match text.parse() {
            Ok(us @ 1..=MAX_POLL_US) => Ok(Duration::from_micros(us)),
            _ => {
                let origin = self.origin_of(&[Key::POLL_US]);
                Err(origin.problem(
                    ProblemCode::ValueInvalid,
                    format_args!(
                        "{} cannot be used: write 1 to {MAX_POLL_US} microseconds",
                        origin.set(Key::POLL_US, text)
                    ),
                ))
            }
        }
    }
}

/// The problem that two keys are set of which only one may be.
fn both_are_given(
    first_key: Key,
    first: &SettingValue,
    second_key: Key,
    second: &SettingValue,
) -> Problem {
    first.origin.problem(
        ProblemCode::KeysConflict,
        format_args!(
            "{} and {} are both given: keep one of them",
            first.origin.set(first_key, first.text()),
            second.origin.set(second_key, second.text())
        ),
    )
}
