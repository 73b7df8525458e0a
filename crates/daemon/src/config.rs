//! The configuration: the flags of [`crate::cli`], checked and complete.
//!
//! Specifications of uplinks and placements stay text here; the crates that implement them read
//! them.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::{Cli, DeviceFlags};

/// Most queue pairs of a device: a vhost-user ring index has 8 bits, a pair two rings.
pub const MAX_PAIRS: u16 = 128;

/// Longest polling time that can be asked for, in microseconds.
const MAX_POLL_US: u64 = 100_000;

/// Longest path of a unix socket, in bytes (unix(7): 108 with the closing zero).
const MAX_SOCKET_PATH: usize = 107;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `--print-capabilities`.
    PrintCapabilities,
    /// Serve these devices.
    Serve(Config),
}

/// All that the daemon is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The devices, at least one.
    pub devices: Vec<DeviceConfig>,
    /// Where the control server answers.
    pub control: Option<PathBuf>,
    /// How often `-v` was given.
    pub verbosity: u8,
}

/// All that is told of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its name, unlike any other device's: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// How it meets its front-end.
    pub socket: Socket,
    /// Its queue pairs.
    pub queues: Queues,
    /// Its uplink, as `--uplink` spells it.
    pub uplink: String,
    /// The placement of its workers, as `--placement` spells it.
    pub placement: String,
    /// The front-end's QMP socket.
    pub qmp: Option<PathBuf>,
    /// How its workers wait.
    pub poll: Poll,
}

/// How a device meets its front-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    /// Create a socket and wait for the front-end.
    Listen {
        /// Where.
        path: PathBuf,
        /// The file's mode.
        mode: u32,
        /// The file's group, by name or number, where it is not the process's.
        group: Option<String>,
    },
    /// Connect to a front-end that listens, until it does.
    Connect {
        /// Where.
        path: PathBuf,
    },
    /// Use a descriptor from the parent process.
    Inherited(RawFd),
}

/// How many queue pairs a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queues {
    /// As many as the front-end asks for, up to [`MAX_PAIRS`].
    Auto,
    /// At most this many, 1 to [`MAX_PAIRS`].
    AtMost(u16),
}

impl Queues {
    /// Most pairs that the front-end may ask for.
    #[must_use]
    pub fn max(self) -> u16 {
        match self {
            Self::Auto => MAX_PAIRS,
            Self::AtMost(pairs) => pairs,
        }
    }
}

/// How a worker waits for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// It sleeps.
    Off,
    /// It looks on for up to this long before it sleeps.
    Adaptive(Duration),
    /// It never sleeps.
    Always,
}

/// Why flags cannot be used: one sentence that says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// Whose flags are looked at, for the sentences about them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// The process's own.
    Flags,
    /// Those of a `--device`.
    Device {
        /// Its number, from 0.
        at: usize,
        /// Its text.
        text: String,
    },
}

impl Scope {
    /// An error about these flags.
    pub fn error(&self, sentence: fmt::Arguments<'_>) -> ConfigError {
        ConfigError(match self {
            Self::Flags => sentence.to_string(),
            Self::Device { text, .. } => format!("--device {text}: {sentence}"),
        })
    }

    /// How `key` is written here.
    fn key(&self, key: &str) -> String {
        match self {
            Self::Flags => format!("--{key}"),
            Self::Device { .. } => key.into(),
        }
    }

    /// How `key` is given `value` here.
    fn set(&self, key: &str, value: impl fmt::Display) -> String {
        match self {
            Self::Flags => format!("--{key} {value}"),
            Self::Device { .. } => format!("{key}={value}"),
        }
    }

    fn default_name(&self) -> String {
        match self {
            Self::Flags => "vnet".into(),
            Self::Device { at, .. } => format!("vnet{at}"),
        }
    }
}

impl Config {
    /// What `cli` means.
    ///
    /// # Errors
    /// The first conflict or meaningless value found.
    pub fn resolve(cli: Cli) -> Result<Self, ConfigError> {
        let devices = if cli.devices.is_empty() {
            refuse_no_device(&cli.device)?;
            let nothing = DeviceFlags::default();
            vec![DeviceConfig::resolve(&Scope::Flags, cli.device, nothing)?]
        } else {
            refuse_beside_devices(&cli.device)?;
            cli.devices
                .iter()
                .enumerate()
                .map(|(at, text)| {
                    let scope = Scope::Device {
                        at,
                        text: text.clone(),
                    };
                    let flags = DeviceFlags::parse_keys(text, &scope)?;
                    DeviceConfig::resolve(&scope, flags, cli.device.clone())
                })
                .collect::<Result<_, _>>()?
        };
        if let Some(path) = &cli.control {
            check_path(&Scope::Flags, "control", path)?;
        }
        let config = Self {
            devices,
            control: cli.control,
            verbosity: cli.verbose,
        };
        config.check_unshared()?;
        Ok(config)
    }

    /// What belongs to one device must not be given to two.
    fn check_unshared(&self) -> Result<(), ConfigError> {
        let mut owners: HashMap<String, &str> = HashMap::new();
        if let Some(path) = &self.control {
            owners.insert(format!("socket {}", absolute(path)), "--control");
        }
        for device in &self.devices {
            let names = [
                Some(format!("name {}", device.name)),
                Some(device.socket.identity()),
                tap_name(&device.uplink).map(|name| format!("TAP {name}")),
            ];
            for thing in names.into_iter().flatten() {
                if let Some(owner) = owners.insert(thing.clone(), &device.name) {
                    let whom = match owner == device.name {
                        true => "two devices".into(),
                        false => format!("both {owner} and {}", device.name),
                    };
                    return Err(ConfigError(format!(
                        "{thing} is given to {whom}: give each one of its own"
                    )));
                }
            }
        }
        Ok(())
    }
}

fn refuse_no_device(flags: &DeviceFlags) -> Result<(), ConfigError> {
    let socket = flags.socket_path.is_some() || flags.fd.is_some();
    if socket || flags.tap.is_some() || flags.uplink.is_some() {
        return Ok(());
    }
    Err(ConfigError(
        "no device is described: give its socket and its uplink, such as --socket-path /run/vnet.sock --tap tap0".into(),
    ))
}

/// Flags that describe one device cannot be common to several.
fn refuse_beside_devices(flags: &DeviceFlags) -> Result<(), ConfigError> {
    let given = [
        ("name", flags.name.is_some()),
        ("socket-path", flags.socket_path.is_some()),
        ("fd", flags.fd.is_some()),
        ("tap", flags.tap.is_some()),
        ("uplink", flags.uplink.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((key, _)) => Err(ConfigError(format!(
            "--{key} stands beside --device: write it as {key}=... into the --device that it belongs to"
        ))),
    }
}

impl DeviceConfig {
    /// What `own` means, with `common` where it says nothing.
    fn resolve(scope: &Scope, own: DeviceFlags, common: DeviceFlags) -> Result<Self, ConfigError> {
        let all = own.clone().or(common);
        Ok(Self {
            name: name(scope, &all)?,
            socket: socket(scope, &own, &all)?,
            queues: queues(scope, &all)?,
            uplink: uplink(scope, &all)?,
            placement: all.placement.clone().unwrap_or_else(|| "auto".into()),
            qmp: all
                .qmp
                .as_deref()
                .map(|path| check_path(scope, "qmp", path))
                .transpose()?,
            poll: poll(scope, &own, &all)?,
        })
    }
}

fn name(scope: &Scope, flags: &DeviceFlags) -> Result<String, ConfigError> {
    let Some(name) = &flags.name else {
        return Ok(scope.default_name());
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err(scope.error(format_args!(
            "{} cannot be used: write 1 to 64 letters, digits, '.', '_' or '-'",
            scope.set("name", format_args!("{name:?}"))
        )));
    }
    Ok(name.clone())
}

fn socket(scope: &Scope, own: &DeviceFlags, all: &DeviceFlags) -> Result<Socket, ConfigError> {
    let client = is_client(scope, all)?;
    let created = all.socket_path.is_some() && !client;
    for (key, given) in [
        ("socket-mode", own.socket_mode.is_some()),
        ("socket-group", own.socket_group.is_some()),
    ] {
        if given && !created {
            return Err(scope.error(format_args!(
                "{} is for a socket that virtionetd creates: leave it out, or use {} without {}",
                scope.key(key),
                scope.key("socket-path"),
                scope.key("client"),
            )));
        }
    }
    match (&all.socket_path, &all.fd) {
        (Some(path), Some(fd)) => Err(scope.error(format_args!(
            "{} and {} are both given: keep one of them",
            scope.set("socket-path", path.display()),
            scope.set("fd", fd)
        ))),
        (None, None) => Err(scope.error(format_args!(
            "no socket is given: add {} or {}",
            scope.set("socket-path", "PATH"),
            scope.set("fd", "N")
        ))),
        (None, Some(fd)) if client => Err(scope.error(format_args!(
            "{} and {} are both given: leave {} out, or name the socket with {}",
            scope.key("client"),
            scope.set("fd", fd),
            scope.key("client"),
            scope.set("socket-path", "PATH"),
        ))),
        (None, Some(fd)) => inherited(scope, fd),
        (Some(path), None) => {
            let path = check_path(scope, "socket-path", path)?;
            if client {
                return Ok(Socket::Connect { path });
            }
            Ok(Socket::Listen {
                path,
                mode: mode(scope, all)?,
                group: group(scope, all)?,
            })
        }
    }
}

fn is_client(scope: &Scope, flags: &DeviceFlags) -> Result<bool, ConfigError> {
    match flags.client.as_deref() {
        None | Some("off") => Ok(false),
        Some("on") => Ok(true),
        Some(other) => Err(scope.error(format_args!(
            "client={other} is not known: write client=on or client=off"
        ))),
    }
}

fn inherited(scope: &Scope, text: &str) -> Result<Socket, ConfigError> {
    match text.parse::<RawFd>() {
        Ok(fd) if fd > 2 => Ok(Socket::Inherited(fd)),
        _ => Err(scope.error(format_args!(
            "{} is no descriptor for a socket: write the number, 3 or more, under which the parent process hands it over",
            scope.set("fd", text)
        ))),
    }
}

fn mode(scope: &Scope, flags: &DeviceFlags) -> Result<u32, ConfigError> {
    let Some(text) = &flags.socket_mode else {
        return Ok(if flags.socket_group.is_some() {
            0o660
        } else {
            0o600
        });
    };
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(scope.error(format_args!(
            "{} is no file mode: write it in octal, 0 to 777, such as 660",
            scope.set("socket-mode", text)
        ))),
    }
}

fn group(scope: &Scope, flags: &DeviceFlags) -> Result<Option<String>, ConfigError> {
    match flags.socket_group.as_deref() {
        Some("") => Err(scope.error(format_args!(
            "{} is empty: write a group's name or number",
            scope.key("socket-group")
        ))),
        group => Ok(group.map(Into::into)),
    }
}

fn queues(scope: &Scope, flags: &DeviceFlags) -> Result<Queues, ConfigError> {
    let text = flags.queues.as_deref().unwrap_or("auto");
    if text == "auto" {
        return Ok(Queues::Auto);
    }
    match text.parse() {
        Ok(pairs @ 1..=MAX_PAIRS) => Ok(Queues::AtMost(pairs)),
        _ => Err(scope.error(format_args!(
            "{} cannot be had: write 1 to {MAX_PAIRS} queue pairs, or auto for as many as the front-end asks for",
            scope.set("queues", text)
        ))),
    }
}

fn uplink(scope: &Scope, flags: &DeviceFlags) -> Result<String, ConfigError> {
    match (&flags.tap, &flags.uplink) {
        (Some(tap), Some(uplink)) => Err(scope.error(format_args!(
            "{} and {} are both given: keep one of them",
            scope.set("tap", tap),
            scope.set("uplink", uplink)
        ))),
        (None, None) => Err(scope.error(format_args!(
            "no uplink is given: add {}, or {} to drop what the guest sends",
            scope.set("tap", "NAME"),
            scope.set("uplink", "null")
        ))),
        (Some(tap), None) => Ok(match &flags.bridge {
            Some(bridge) => format!("tap:{tap},bridge={bridge}"),
            None => format!("tap:{tap}"),
        }),
        (None, Some(uplink)) => match &flags.bridge {
            Some(bridge) => Err(scope.error(format_args!(
                "bridge={bridge} stands without tap: write tap=NAME instead of uplink={uplink}, or leave bridge out"
            ))),
            None => Ok(uplink.clone()),
        },
    }
}

fn poll(scope: &Scope, own: &DeviceFlags, all: &DeviceFlags) -> Result<Poll, ConfigError> {
    let text = all.poll.as_deref().unwrap_or("off");
    if let Some(us) = own.poll_us.as_ref().filter(|_| text != "adaptive") {
        return Err(scope.error(format_args!(
            "{} has no meaning with {}: add {}, or leave {} out",
            scope.set("poll-us", us),
            scope.set("poll", text),
            scope.set("poll", "adaptive"),
            scope.key("poll-us"),
        )));
    }
    match text {
        "off" => Ok(Poll::Off),
        "always" => Ok(Poll::Always),
        "adaptive" => poll_time(scope, all).map(Poll::Adaptive),
        _ => Err(scope.error(format_args!(
            "{} is not known: write off, adaptive or always",
            scope.set("poll", text)
        ))),
    }
}

fn poll_time(scope: &Scope, flags: &DeviceFlags) -> Result<Duration, ConfigError> {
    let text = flags.poll_us.as_deref().unwrap_or("50");
    match text.parse() {
        Ok(us @ 1..=MAX_POLL_US) => Ok(Duration::from_micros(us)),
        _ => Err(scope.error(format_args!(
            "{} cannot be used: write 1 to {MAX_POLL_US} microseconds",
            scope.set("poll-us", text)
        ))),
    }
}

fn check_path(scope: &Scope, key: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_SOCKET_PATH {
        return Err(scope.error(format_args!(
            "{} is {} bytes long: a unix socket's path has {MAX_SOCKET_PATH} at most, choose a shorter one",
            scope.set(key, path.display()),
            bytes.len()
        )));
    }
    Ok(path.into())
}

impl Socket {
    /// The same text for the same socket.
    fn identity(&self) -> String {
        match self {
            Self::Listen { path, .. } | Self::Connect { path } => {
                format!("socket {}", absolute(path))
            }
            Self::Inherited(fd) => format!("descriptor {fd}"),
        }
    }
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.into())
        .display()
        .to_string()
}

/// The TAP that `uplink` names, unless it is a pattern (`tap%d`) from which the kernel chooses.
fn tap_name(uplink: &str) -> Option<&str> {
    let name = uplink.strip_prefix("tap:")?.split(',').next()?;
    (!name.contains('%')).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Refusal};

    fn command(line: &str) -> Result<Command, String> {
        let args = ["virtionetd"].into_iter().chain(line.split_whitespace());
        cli::parse(args.map(Into::into)).map_err(|refusal| match refusal {
            Refusal::Config(why) => why.to_string(),
            Refusal::Flags(why) => panic!("{line}: {why}"),
        })
    }

    fn config(line: &str) -> Config {
        match command(line) {
            Ok(Command::Serve(config)) => config,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn device(name: &str, path: &str, uplink: &str) -> DeviceConfig {
        DeviceConfig {
            name: name.into(),
            socket: listen(path, 0o600, None),
            queues: Queues::Auto,
            uplink: uplink.into(),
            placement: "auto".into(),
            qmp: None,
            poll: Poll::Off,
        }
    }

    fn listen(path: &str, mode: u32, group: Option<&str>) -> Socket {
        Socket::Listen {
            path: path.into(),
            mode,
            group: group.map(Into::into),
        }
    }

    #[test]
    fn defaults_are_complete() {
        assert_eq!(
            config("--socket-path /s --tap t0"),
            Config {
                devices: vec![device("vnet", "/s", "tap:t0")],
                control: None,
                verbosity: 0,
            }
        );
    }

    #[test]
    fn flags_of_one_device_are_taken() {
        let plain = || device("vnet", "/s", "null");
        let us = |us| Poll::Adaptive(Duration::from_micros(us));
        for (flags, expected) in [
            (
                "--name eth.0_a-b",
                DeviceConfig {
                    name: "eth.0_a-b".into(),
                    ..plain()
                },
            ),
            (
                "--queues 1",
                DeviceConfig {
                    queues: Queues::AtMost(1),
                    ..plain()
                },
            ),
            (
                "--queues 128",
                DeviceConfig {
                    queues: Queues::AtMost(128),
                    ..plain()
                },
            ),
            ("--queues auto", plain()),
            (
                "--placement list:0-3,8",
                DeviceConfig {
                    placement: "list:0-3,8".into(),
                    ..plain()
                },
            ),
            (
                "--qmp /q",
                DeviceConfig {
                    qmp: Some("/q".into()),
                    ..plain()
                },
            ),
            ("--poll off", plain()),
            (
                "--poll always",
                DeviceConfig {
                    poll: Poll::Always,
                    ..plain()
                },
            ),
            (
                "--poll adaptive",
                DeviceConfig {
                    poll: us(50),
                    ..plain()
                },
            ),
            (
                "--poll adaptive --poll-us 7",
                DeviceConfig {
                    poll: us(7),
                    ..plain()
                },
            ),
            (
                "--client",
                DeviceConfig {
                    socket: Socket::Connect { path: "/s".into() },
                    ..plain()
                },
            ),
            (
                "--socket-mode 0640",
                DeviceConfig {
                    socket: listen("/s", 0o640, None),
                    ..plain()
                },
            ),
            (
                "--socket-group kvm",
                DeviceConfig {
                    socket: listen("/s", 0o660, Some("kvm")),
                    ..plain()
                },
            ),
            (
                "--socket-group 7 --socket-mode 620",
                DeviceConfig {
                    socket: listen("/s", 0o620, Some("7")),
                    ..plain()
                },
            ),
        ] {
            let line = format!("--socket-path /s --uplink null {flags}");
            assert_eq!(config(&line).devices, [expected], "{line}");
        }
        let inherited = &config("--fd 3 --tap t0,bridge=br0").devices[0];
        assert_eq!(inherited.socket, Socket::Inherited(3));
        assert_eq!(inherited.uplink, "tap:t0,bridge=br0");
    }

    #[test]
    fn flags_of_the_process_are_taken() {
        let config = config("--socket-path /s --uplink tap:t0 --control /c -vv --verbose");
        assert_eq!((config.control, config.verbosity), (Some("/c".into()), 3));
    }

    #[test]
    fn several_devices_have_keys_of_their_own_and_common_flags() {
        let found = config(
            "--queues 2 --poll adaptive --poll-us 9 --client --socket-group kvm \
             --device socket-path=/a,tap=t0,bridge=br0,placement=list:0-3,,8,client=off \
             --device name=b,socket-path=/b,client,uplink=xdp:e0,,q=1,poll=off,queues=auto,qmp=/q",
        );
        let first = DeviceConfig {
            socket: listen("/a", 0o660, Some("kvm")),
            queues: Queues::AtMost(2),
            placement: "list:0-3,8".into(),
            poll: Poll::Adaptive(Duration::from_micros(9)),
            ..device("vnet0", "/a", "tap:t0,bridge=br0")
        };
        let second = DeviceConfig {
            socket: Socket::Connect { path: "/b".into() },
            qmp: Some("/q".into()),
            ..device("b", "/b", "xdp:e0,q=1")
        };
        assert_eq!(found.devices, [first, second]);
        // A pattern lets the kernel choose: two of it are two TAPs.
        let patterns = config("--device fd=3,tap=t%d --device fd=4,tap=t%d");
        assert_eq!(patterns.devices.len(), 2);
    }

    /// Command lines, and under each the sentence that refuses it.
    const REFUSED: &str = r#"
--queues 2
    no device is described: give its socket and its uplink, such as --socket-path /run/vnet.sock --tap tap0
--tap t0
    no socket is given: add --socket-path PATH or --fd N
--socket-path /s
    no uplink is given: add --tap NAME, or --uplink null to drop what the guest sends
--socket-path /s --fd 3 --tap t0
    --socket-path /s and --fd 3 are both given: keep one of them
--fd 3 --client --tap t0
    --client and --fd 3 are both given: leave --client out, or name the socket with --socket-path PATH
--fd 2 --tap t0
    --fd 2 is no descriptor for a socket: write the number, 3 or more, under which the parent process hands it over
--fd x --tap t0
    --fd x is no descriptor for a socket: write the number, 3 or more, under which the parent process hands it over
--socket-path /s --tap t0 --uplink null
    --tap t0 and --uplink null are both given: keep one of them
--socket-path /s --tap t0 --queues 0
    --queues 0 cannot be had: write 1 to 128 queue pairs, or auto for as many as the front-end asks for
--socket-path /s --tap t0 --queues 129
    --queues 129 cannot be had: write 1 to 128 queue pairs, or auto for as many as the front-end asks for
--socket-path /s --tap t0 --poll busy
    --poll busy is not known: write off, adaptive or always
--socket-path /s --tap t0 --poll-us 5
    --poll-us 5 has no meaning with --poll off: add --poll adaptive, or leave --poll-us out
--socket-path /s --tap t0 --poll adaptive --poll-us 0
    --poll-us 0 cannot be used: write 1 to 100000 microseconds
--socket-path /s --tap t0 --socket-mode 888
    --socket-mode 888 is no file mode: write it in octal, 0 to 777, such as 660
--socket-path /s --tap t0 --socket-mode 1777
    --socket-mode 1777 is no file mode: write it in octal, 0 to 777, such as 660
--socket-path /s --tap t0 --client --socket-mode 600
    --socket-mode is for a socket that virtionetd creates: leave it out, or use --socket-path without --client
--fd 3 --tap t0 --socket-group kvm
    --socket-group is for a socket that virtionetd creates: leave it out, or use --socket-path without --client
--socket-path /s --tap t0 --socket-group=
    --socket-group is empty: write a group's name or number
--socket-path /s --tap t0 --name a/b
    --name "a/b" cannot be used: write 1 to 64 letters, digits, '.', '_' or '-'
--socket-path /s --tap t0 --control /./s
    socket /s is given to both --control and vnet: give each one of its own
--socket-path /s --device socket-path=/t,tap=t0
    --socket-path stands beside --device: write it as socket-path=... into the --device that it belongs to
--device socket-path=/a,tap=t0 --device socket-path=/a,tap=t1
    socket /a is given to both vnet0 and vnet1: give each one of its own
--device socket-path=/a,tap=t0 --device socket-path=/b,uplink=tap:t0,,bridge=b
    TAP t0 is given to both vnet0 and vnet1: give each one of its own
--device fd=3,tap=t0 --device fd=3,tap=t1
    descriptor 3 is given to both vnet0 and vnet1: give each one of its own
--device fd=3,tap=t0,name=x --device fd=4,tap=t1,name=x
    name x is given to two devices: give each one of its own
--device fd=3,tap=t0 --device fd=4
    --device fd=4: no uplink is given: add tap=NAME, or uplink=null to drop what the guest sends
--device tap=t0
    --device tap=t0: no socket is given: add socket-path=PATH or fd=N
--device fd=3,fd=4,tap=t0
    --device fd=3,fd=4,tap=t0: fd is given twice: keep one of them
--device fd=3,tap
    --device fd=3,tap: "tap" is not KEY=VALUE: write a value behind =, and a comma inside a value twice
--device fd=3,tap=
    --device fd=3,tap=: "tap=" is not KEY=VALUE: write a value behind =, and a comma inside a value twice
--device fd=3,tap=t0,placement=list:0-3,8
    --device fd=3,tap=t0,placement=list:0-3,8: "8" is not KEY=VALUE: write a value behind =, and a comma inside a value twice
--device fd=3,tap=t0,client=yes
    --device fd=3,tap=t0,client=yes: client=yes is not known: write client=on or client=off
--device fd=3,uplink=null,bridge=b
    --device fd=3,uplink=null,bridge=b: bridge=b stands without tap: write tap=NAME instead of uplink=null, or leave bridge out
--poll adaptive --device fd=3,tap=t0,poll=off,poll-us=3
    --device fd=3,tap=t0,poll=off,poll-us=3: poll-us=3 has no meaning with poll=off: add poll=adaptive, or leave poll-us out
"#;

    #[test]
    fn every_conflict_is_one_sentence_that_says_what_to_do() {
        let rows: Vec<&str> = REFUSED.trim().lines().collect();
        for row in rows.chunks(2) {
            assert_eq!(command(row[0]), Err(row[1].trim().into()), "{}", row[0]);
        }
        assert_eq!(command(""), command("--queues 2"));
        let long = format!("/{}", "x".repeat(107));
        assert_eq!(
            command(&format!("--socket-path {long} --tap t0")),
            Err(format!(
                "--socket-path {long} is 108 bytes long: a unix socket's path has 107 at most, choose a shorter one"
            ))
        );
        assert_eq!(
            command("--device taps=t0"),
            Err(format!(
                "--device taps=t0: the key \"taps\" is not known: use {}",
                DeviceFlags::KEYS
            ))
        );
    }
}
