//! What the keys of one device mean.

use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use virtionet_placement::Placement;
use virtionet_placement::interrupts::IrqAffinity;
use virtionet_sizing::{Throughput, queue_pairs_for};

use super::settings::{SettingValue, Origin, Settings};
use super::problem::{Problem, Problems};
use super::uplink::UplinkConfig;
use super::{DeviceConfig, Poll, Queues, Socket};
use virtionet_base::MAX_QUEUE_PAIRS;

/// Longest polling time that can be asked for, in microseconds.
const MAX_POLL_US: u64 = 100_000;

/// Longest path of a unix socket, in bytes (unix(7): 108 with the closing zero).
const MAX_SOCKET_PATH: usize = 107;

/// A device as it is described.
#[derive(Debug, Clone)]
pub struct DeviceDescription {
    /// Where its description stands, or begins.
    pub origin: Origin,
    /// Its name where none is given.
    pub default_name: String,
    /// All that is said of it.
    pub settings: Settings,
}

impl DeviceDescription {
    /// The name that it will have, right or wrong.
    #[must_use]
    pub fn name(&self) -> String {
        let given = self.settings.get("name").map(|name| name.text().into());
        given.unwrap_or_else(|| self.default_name.clone())
    }

    /// Where the first of `keys` that is set was set; else the device's own place.
    #[must_use]
    pub fn origin_of(&self, keys: &[&str]) -> &Origin {
        let given = keys.iter().find_map(|key| self.settings.get(key));
        given.map_or(&self.origin, |given| &given.origin)
    }

    /// What all of it means. `None` where something is wrong with it, which `problems` then hold.
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

    fn validate_name(&self) -> Result<String, Problem> {
        let name = self.name();
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !name.is_empty() && name.len() <= 64 && name.chars().all(plain) {
            return Ok(name);
        }
        let origin = self.origin_of(&["name"]);
        Err(origin.problem(format_args!(
            "{} {name:?} cannot be used: write 1 to 64 letters, digits, '.', '_' or '-'",
            origin.key("name")
        )))
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

    /// What turns virtionetd into the side that connects, if anything does.
    fn client(&self) -> Result<Option<&SettingValue>, Problem> {
        let Some(given) = self.settings.get("client") else {
            return Ok(None);
        };
        match &*given.text() {
            "off" => Ok(None),
            "on" => Ok(Some(given)),
            other => Err(given.origin.problem(format_args!(
                "client={other} is not known: write client=on or client=off"
            ))),
        }
    }

    fn no_socket(&self) -> Problem {
        let origin = &self.origin;
        origin.problem(format_args!(
            "no socket is given: add {} or {}",
            origin.set("socket-path", "PATH"),
            origin.set("fd", "N")
        ))
    }

    fn inherited_socket(&self, fd: &SettingValue, client: Option<&SettingValue>) -> Result<Socket, Problem> {
        let origin = &fd.origin;
        if let Some(client) = client.filter(|client| !client.may_be_unused) {
            let key = client.origin.key("client");
            return Err(client.origin.problem(format_args!(
                "{key} and {} are both given: leave {key} out, or name the socket with {}",
                origin.set("fd", fd.text()),
                origin.set("socket-path", "PATH"),
            )));
        }
        match fd.text().parse::<RawFd>() {
            Ok(fd) if fd > 2 => Ok(Socket::Inherited(fd)),
            _ => Err(origin.problem(format_args!(
                "{} is no descriptor for a socket: write the number, 3 or more, under which the parent process hands it over",
                origin.set("fd", fd.text())
            ))),
        }
    }

    /// Refuses a mode or a group for a socket that somebody else made.
    fn refuse_access(&self) -> Result<(), Problem> {
        for key in ["socket-mode", "socket-group"] {
            let Some(given) = self.settings.get(key).filter(|given| !given.may_be_unused) else {
                continue;
            };
            let origin = &given.origin;
            return Err(origin.problem(format_args!(
                "{} is for a socket that virtionetd creates: leave it out, or use {} without {}",
                origin.key(key),
                origin.key("socket-path"),
                origin.key("client"),
            )));
        }
        Ok(())
    }

    fn mode(&self) -> Result<u32, Problem> {
        let Some(given) = self.settings.get("socket-mode") else {
            return Ok(match self.settings.get("socket-group") {
                Some(_) => 0o660,
                None => 0o600,
            });
        };
        match u32::from_str_radix(&given.text(), 8) {
            Ok(mode) if mode <= 0o777 => Ok(mode),
            _ => Err(given.origin.problem(format_args!(
                "{} is no file mode: write it in octal, 0 to 777, such as 660",
                given.origin.set("socket-mode", given.text())
            ))),
        }
    }

    fn group(&self) -> Result<Option<String>, Problem> {
        let Some(given) = self.settings.get("socket-group") else {
            return Ok(None);
        };
        if given.value.is_empty() {
            return Err(given.origin.problem(format_args!(
                "{} is empty: write a group's name or number",
                given.origin.key("socket-group")
            )));
        }
        Ok(Some(given.text().into()))
    }

    fn queues(&self) -> Result<Queues, Problem> {
        let queues = self.settings.get("queues");
        let text = queues.map_or("auto".into(), SettingValue::text);
        let throughput = match &*text {
            "auto" => None,
            share => share.parse::<Throughput>().ok(),
        };
        match (throughput, text.parse::<u16>()) {
            (None, Ok(pairs @ 1..=MAX_QUEUE_PAIRS)) => {
                self.refuse_vcpus(&text)?;
                Ok(Queues::AtMost(pairs))
            }
            (None, _) if text == "auto" => self
                .queue_pairs_of(Throughput::High)
                .map(|pairs| pairs.map_or(Queues::Auto, Queues::AtMost)),
            (Some(throughput), _) => match self.queue_pairs_of(throughput)? {
                Some(pairs) => Ok(Queues::AtMost(pairs)),
                None => Err(self.no_vcpus(&text)),
            },
            (None, _) => {
                let origin = self.origin_of(&["queues"]);
                Err(origin.problem(format_args!(
                    "{} cannot be had: write 1 to {MAX_QUEUE_PAIRS} queue pairs, auto for as many as the front-end asks for, or high, medium or low with {}",
                    origin.set("queues", text),
                    origin.set("vcpus", "N"),
                )))
            }
        }
    }

    /// The pairs of `throughput`, where the guest's vCPUs are known.
    fn queue_pairs_of(&self, throughput: Throughput) -> Result<Option<u16>, Problem> {
        let Some(given) = self.settings.get("vcpus") else {
            return Ok(None);
        };
        let origin = &given.origin;
        let wrong = || {
            origin.problem(format_args!(
                "{} cannot be: write the number of the guest's vCPUs, 1 or more",
                origin.set("vcpus", given.text())
            ))
        };
        let vcpus = given.text().parse::<u32>().map_err(|_| wrong())?;
        let (pairs, _) = queue_pairs_for(vcpus, throughput, MAX_QUEUE_PAIRS).map_err(|_| wrong())?;
        Ok(Some(pairs))
    }

    fn no_vcpus(&self, queues: &str) -> Problem {
        let origin = self.origin_of(&["queues"]);
        origin.problem(format_args!(
            "{} is a share of the guest's vCPUs, which are not known: add {}, or write the number of queue pairs",
            origin.set("queues", queues),
            origin.set("vcpus", "N"),
        ))
    }

    fn refuse_vcpus(&self, queues: &str) -> Result<(), Problem> {
        let Some(given) = self.settings.get("vcpus").filter(|given| !given.may_be_unused) else {
            return Ok(());
        };
        let origin = &given.origin;
        Err(origin.problem(format_args!(
            "{} has no meaning with {}: leave it out, or write {} for as many queue pairs as vCPUs",
            origin.set("vcpus", given.text()),
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
                return Err(origin.problem(format_args!(
                    "{} stands without tap: write {} instead of {}, or leave bridge out",
                    origin.set("bridge", bridge.text()),
                    origin.set("tap", "NAME"),
                    uplink.origin.set("uplink", uplink.text()),
                )));
            }
            (None, Some(uplink), None) => uplink.text().into(),
        };
        self.parse(&["tap", "uplink"], &spec)
    }

    fn no_uplink(&self) -> Problem {
        let origin = &self.origin;
        origin.problem(format_args!(
            "no uplink is given: add {}, or {} to drop what the guest sends",
            origin.set("tap", "NAME"),
            origin.set("uplink", "null")
        ))
    }

    fn placement(&self) -> Result<Placement, Problem> {
        let given = self.settings.get("placement");
        let text = given.map_or("auto".into(), |given| given.text().into_owned());
        self.parse(&["placement"], &text)
    }

    fn irq_affinity(&self) -> Result<IrqAffinity, Problem> {
        let given = self.settings.get("irq-affinity");
        let text = given.map_or_else(String::new, |given| given.text().into_owned());
        self.parse(&["irq-affinity"], &text)
    }

    /// The value that `text`, given as one of `keys`, spells.
    fn parse<T>(&self, keys: &[&str], text: &str) -> Result<T, Problem>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
    {
        let origin = self.origin_of(keys);
        let key = keys.iter().find(|key| self.settings.get(key).is_some());
        match (text.parse::<T>(), key) {
            (Ok(value), _) => Ok(value),
            (Err(why), Some(key)) => Err(origin.problem(format_args!("{}: {why}", origin.key(key)))),
            (Err(why), None) => Err(origin.problem(format_args!("{why}"))),
        }
    }

    fn qmp(&self) -> Result<Option<PathBuf>, Problem> {
        let given = self.settings.get("qmp");
        given.map(|given| check_path("qmp", given)).transpose()
    }

    fn poll(&self) -> Result<Poll, Problem> {
        let given = self.settings.get("poll");
        let text = given.map_or("off".into(), SettingValue::text);
        let poll = match &*text {
            "off" => Poll::Off,
            "always" => Poll::Always,
            "adaptive" => return self.poll_time().map(Poll::Adaptive),
            _ => {
                let origin = self.origin_of(&["poll"]);
                return Err(origin.problem(format_args!(
                    "{} is not known: write off, adaptive or always",
                    origin.set("poll", text)
                )));
            }
        };
        match self.settings.get("poll-us").filter(|given| !given.may_be_unused) {
            None => Ok(poll),
            Some(us) => {
                let origin = &us.origin;
                Err(origin.problem(format_args!(
                    "{} has no meaning with {}: add {}, or leave {} out",
                    origin.set("poll-us", us.text()),
                    origin.set("poll", text),
                    origin.set("poll", "adaptive"),
                    origin.key("poll-us"),
                )))
            }
        }
    }

    fn poll_time(&self) -> Result<Duration, Problem> {
        let Some(given) = self.settings.get("poll-us") else {
            return Ok(Duration::from_micros(50));
        };
        match given.text().parse() {
            Ok(us @ 1..=MAX_POLL_US) => Ok(Duration::from_micros(us)),
            _ => Err(given.origin.problem(format_args!(
                "{} cannot be used: write 1 to {MAX_POLL_US} microseconds",
                given.origin.set("poll-us", given.text())
            ))),
        }
    }
}

fn both(a: &str, first: &SettingValue, b: &str, second: &SettingValue) -> Problem {
    first.origin.problem(format_args!(
        "{} and {} are both given: keep one of them",
        first.origin.set(a, first.text()),
        second.origin.set(b, second.text())
    ))
}

/// The socket's path that `given` is.
///
/// # Errors
/// When it is empty, or longer than a socket's address.
pub fn check_path(key: &str, given: &SettingValue) -> Result<PathBuf, Problem> {
    let path = given.path();
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(given.origin.problem(format_args!(
            "{} is empty: write a path, or leave it out",
            given.origin.key(key)
        )));
    }
    if bytes.len() > MAX_SOCKET_PATH {
        return Err(given.origin.problem(format_args!(
            "{} is {} bytes long: a unix socket's path has {MAX_SOCKET_PATH} at most, choose a shorter one",
            given.origin.set(key, path.display()),
            bytes.len()
        )));
    }
    Ok(path.into())
}
