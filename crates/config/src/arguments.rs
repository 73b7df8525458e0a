//! The command line: clap's arguments, which are made from the table of keys, and their values.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::keys::{DefaultValue, Key, KeyScope, ValueKind};
use crate::settings::{Origin, SettingValue, Settings};

const ABOUT: &str = "\
A vhost-user back-end for virtio-net: the network device of a QEMU guest.

virtionetd runs beside QEMU (or another vhost-user front-end), takes the guest's frames from its \
queue pairs and carries them to an uplink, such as a multiqueue TAP. Each queue pair has a worker \
thread of its own, placed on the CPU of the vCPU that it serves.";

const SEVERAL_DEVICES: &str = "\
The keys have the meaning of the flags of the same name. client is written client or \
client=on|off, and bridge=BR belongs to tap=NAME. A comma inside a value is written twice: \
placement=list:0-3,,8. Flags beside --device apply to each device that does not set the key itself.

Devices in a file:
  --config FILE reads TOML with the same keys: each device in a [[device]] table, the values that \
devices have in common in [defaults], and control = \"PATH\" at the top. The command line \
overrides the file: a flag beside --config applies to every device, and --device name=X,... \
changes the file's device X, or adds a device of another name. virtionetctl check FILE reports \
every problem of a file.

Examples:
  One device with four queue pairs on a TAP:
    virtionetd --socket-path /run/vnet.sock --queues 4 --tap tap0,bridge=br0

  QEMU for it:
    qemu-system-x86_64 -smp 4 -m 4G \\
      -object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem \\
      -chardev socket,id=vnet,path=/run/vnet.sock \\
      -netdev vhost-user,id=net0,chardev=vnet,queues=4 \\
      -device virtio-net-pci,netdev=net0,mq=on,vectors=10

  Two devices:
    virtionetd --poll adaptive \\
      --device socket-path=/run/a.sock,tap=tap0 \\
      --device socket-path=/run/b.sock,tap=tap1,placement=list:2,,3

  Two devices on a switch, with the host as a third port:
    virtionetd --device socket-path=/run/a.sock,uplink=switch:lan,,tap=tap0 \\
      --device socket-path=/run/b.sock,uplink=switch:lan

  Devices from a file, with adaptive polling for all of them:
    virtionetd --config /etc/virtionetd.toml --poll adaptive

  The state of the daemon, and its counters for Prometheus:
    virtionetd --control /run/virtionetd.ctl ...
    virtionetctl status
    curl --unix-socket /run/virtionetd.ctl http://localhost/v1/devices
    curl --unix-socket /run/virtionetd.ctl http://localhost/metrics

Environment:
  RUST_LOG  what is logged, instead of -v: a level, or target=level,... such as virtionetd=debug
  NO_COLOR  when set, no colours in the log

Exit status:
  0 at the end or on SIGTERM; 1 when something failed; 2 when the command line or the file cannot \
be used.";

/// The arguments that are no configuration keys: each constant is clap's id and the flag's name.
const DEVICE: &str = "device";
const CONFIG: &str = "config";
const PRINT_CAPABILITIES: &str = "print-capabilities";
const VERBOSE: &str = "verbose";
const TAKE_OVER: &str = "take-over";

/// The values of the command line, unchecked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// The flags of a single device, or those that several devices have in common.
    pub settings: Settings,
    /// The texts of `--device`.
    pub devices: Vec<String>,
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// The flags of the whole process.
    pub process: Settings,
    /// The number of `-v` flags.
    pub verbosity: u8,
    /// Whether `--take-over` is given.
    pub take_over: bool,
}

impl Arguments {
    /// Parses the command line, of which the first word is the program's name.
    ///
    /// # Errors
    /// When clap refuses the command line. `--help` and `--version` are errors too.
    pub(crate) fn parse(args: Vec<OsString>) -> Result<Self, clap::Error> {
        let mut matches = command().try_get_matches_from(args)?;
        Ok(Self {
            settings: take_settings(&mut matches, Key::of_devices()),
            process: take_settings(&mut matches, Key::of_process()),
            devices: matches
                .remove_many(DEVICE)
                .map(Iterator::collect)
                .unwrap_or_default(),
            config: matches.remove_one(CONFIG),
            verbosity: matches.get_count(VERBOSE),
            take_over: matches.get_flag(TAKE_OVER),
        })
    }
}

/// clap's description of the command line.
pub(crate) fn command() -> Command {
    let after_help = format!(
        "Several devices in one process:\n  Each --device describes one device as KEY=VALUE,... \
         with the keys {}. {SEVERAL_DEVICES}",
        Key::names()
    );
    Command::new("virtionetd")
        .version(env!("CARGO_PKG_VERSION"))
        .about(ABOUT)
        .after_help(after_help)
        .max_term_width(100)
        .next_help_heading("Device")
        .args(Key::of_devices().filter_map(key_argument))
        .next_help_heading("Process")
        .arg(
            Arg::new(DEVICE)
                .long(DEVICE)
                .value_name("KEY=VALUE,...")
                .action(ArgAction::Append)
                .help("One of several devices, described as below; may be repeated"),
        )
        .arg(
            Arg::new(CONFIG)
                .long(CONFIG)
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help(
                    "Read devices, and the values that they have in common, from this file (TOML); \
                     the command line overrides the file",
                ),
        )
        .args(Key::of_process().filter_map(key_argument))
        .arg(
            Arg::new(PRINT_CAPABILITIES)
                .long(PRINT_CAPABILITIES)
                .action(ArgAction::SetTrue)
                .help(
                    "Print the kind of this back-end, as JSON for QEMU's management tools, and \
                     exit; the rest of the command line is ignored",
                ),
        )
        .arg(
            Arg::new(TAKE_OVER)
                .long(TAKE_OVER)
                .action(ArgAction::SetTrue)
                .help(
                    "Take the devices over from the virtionetd that listens on --handover-socket, \
                     which then ends; if that fails, it continues and this one ends",
                ),
        )
        .arg(
            Arg::new(VERBOSE)
                .short('v')
                .long(VERBOSE)
                .action(ArgAction::Count)
                .help("Log more: -v for debugging, -vv for everything [default: informational]"),
        )
}

/// The flag of `key`; `None` where the key is a part of another key's flag.
fn key_argument(key: Key) -> Option<Arg> {
    if matches!(key.scope, KeyScope::DevicePartOf(_)) {
        return None;
    }
    let help = match (key.kind, key.default) {
        (ValueKind::Switch, _) | (_, DefaultValue::None) => key.help.to_owned(),
        (_, DefaultValue::Value(default) | DefaultValue::Computed(default)) => {
            format!("{} [default: {default}]", key.help)
        }
    };
    let argument = Arg::new(key.name).long(key.name).help(help);
    Some(match key.kind {
        ValueKind::Switch => argument
            .action(ArgAction::Set)
            .value_parser(ValueParser::os_string())
            .num_args(0)
            .default_missing_value("on"),
        ValueKind::Path => argument
            .value_name(key.value_name)
            .value_parser(ValueParser::os_string()),
        _ => argument
            .value_name(key.value_name)
            .value_parser(|text: &str| Ok::<_, clap::Error>(OsString::from(text))),
    })
}

/// Takes the values of `keys` out of `matches`.
fn take_settings(matches: &mut ArgMatches, keys: impl Iterator<Item = Key>) -> Settings {
    let mut settings = Settings::default();
    for key in keys {
        // clap reports an error for a key that has no flag, such as bridge.
        if let Ok(Some(value)) = matches.try_remove_one::<OsString>(key.name) {
            settings.insert(key, SettingValue::new(value, &Origin::Flag));
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_accepts_the_description() {
        command().debug_assert();
    }

    #[test]
    fn help_names_every_flag_and_fits_a_terminal() {
        let short = command().render_help().to_string();
        let help = command().render_long_help().to_string();
        for key in Key::of_devices() {
            let is_flag = help.contains(&format!("--{} ", key.name))
                || help.contains(&format!("--{}\n", key.name));
            assert_eq!(is_flag, key != Key::BRIDGE, "{}\n{help}", key.name);
        }
        for line in help.lines().chain(short.lines()) {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }
}
