//! The command line as the user writes it. What it means is for [`crate::config`] to say.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser};

use crate::settings::{SettingValue, Origin, Settings};
use crate::keys::Key;
use crate::{Command, Config, ConfigError};

/// The answer to `--print-capabilities` (QEMU's docs/interop/vhost-user.rst).
pub const CAPABILITIES: &str = "{\n  \"type\": \"net\"\n}\n";

const ABOUT: &str = "\
A guest's network card: a vhost-user back-end for virtio-net.

virtionetd stands beside QEMU (or another vhost-user front-end), takes the guest's frames from \
its queue pairs and carries them to an uplink, such as a multiqueue TAP. Each queue pair has a \
worker thread of its own, placed on the CPU of the vCPU that it serves.";

const EXAMPLES: &str = "\
Several devices in one process:
  Each --device describes one device as KEY=VALUE,... with the keys name, socket-path, fd, client, \
queues, vcpus, tap, bridge, uplink, placement, irq-affinity, qmp, poll, poll-us, socket-mode and \
socket-group. They mean what the flags of these names mean; client is written client or \
client=on|off, and bridge=BR belongs to tap=NAME. A comma inside a value is written twice: \
placement=list:0-3,,8. Flags beside --device are what a device has that does not say otherwise.

Devices in a file:
  --config FILE reads TOML with the same keys: each device in a [[device]] table, what devices have \
that do not say otherwise in [defaults], and control = \"PATH\" at the top. The command line wins: a \
flag beside --config holds for every device, whatever the file says of it; --device name=X,... \
changes the file's device X, or adds one of another name. virtionetd check FILE tells all that is \
wrong with a file.

Examples:
  One device with four queue pairs on a TAP:
    virtionetd --socket-path /run/vnet.sock --queues 4 --tap tap0,bridge=br0

  QEMU's side of it:
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

  Devices from a file, all of them with another way to wait:
    virtionetd --config /etc/virtionetd.toml --poll adaptive

  Its state, and its counters for Prometheus:
    virtionetd --control /run/virtionetd.ctl ...
    curl --unix-socket /run/virtionetd.ctl http://localhost/v1/devices
    curl --unix-socket /run/virtionetd.ctl http://localhost/metrics

Environment:
  RUST_LOG  what is logged, instead of -v: a level, or target=level,... such as virtionetd=debug
  NO_COLOR  when set, no colours in the log

Exit status:
  0 at the end or on SIGTERM; 1 when something failed; 2 when the command line or the file cannot be used.";

/// The flags, unchecked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Parser)]
#[command(name = "virtionetd", version, about = ABOUT, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// The flags of a single device, or what is common to several.
    #[command(flatten)]
    pub device: DeviceFlags,

    /// One of several devices, described as below; may be repeated
    #[arg(
        long = "device",
        value_name = "KEY=VALUE,...",
        help_heading = "Process"
    )]
    pub devices: Vec<String>,

    /// Read devices, and what they have in common, from this file (TOML); what the command line says
    /// wins over it
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    pub config: Option<PathBuf>,

    /// Answer HTTP/1.1 on this unix socket (made for its owner only): GET /v1/devices (JSON) and
    /// GET /metrics (for Prometheus) [default: no such socket]
    #[arg(long, value_name = "PATH", help_heading = "Process")]
    pub control: Option<PathBuf>,

    /// Print what kind of back-end this is, as JSON for QEMU's management tools, and exit; all
    /// else on the command line is ignored
    #[arg(long, help_heading = "Process")]
    pub print_capabilities: bool,

    /// Log more: -v for debugging, -vv for everything [default: informational]
    #[arg(short, long, action = ArgAction::Count, help_heading = "Process")]
    pub verbose: u8,
}

/// What can be said of one device, unchecked; as flags, or as the keys of `--device`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceFlags {
    /// The device's name in log and statistics [default: vnet; vnet0, vnet1, ... with --device]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// The vhost-user socket: virtionetd creates it and the front-end connects; with --client the
    /// other way round
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// The vhost-user socket as a file descriptor, inherited from the parent process, instead of
    /// --socket-path
    #[arg(long, value_name = "N")]
    pub fd: Option<String>,

    /// Connect to the socket of a front-end that listens (QEMU's server=on), again and again until
    /// it does
    #[arg(long, num_args = 0, default_missing_value = "on")]
    pub client: Option<String>,

    /// Mode of the socket that virtionetd creates, in octal
    /// [default: 600; 660 with --socket-group]
    #[arg(long, value_name = "OCTAL")]
    pub socket_mode: Option<String>,

    /// Group of the socket that virtionetd creates, by name or number: the front-end's, where it
    /// runs as another user [default: virtionetd's own]
    #[arg(long, value_name = "NAME")]
    pub socket_group: Option<String>,

    /// Queue pairs: 1 to 128; auto for as many as the front-end asks for; or with --vcpus a share of
    /// the guest's vCPUs: high for one pair each (as auto then), medium for half as many, low for
    /// one. A front-end that asks for more is refused [default: auto]
    #[arg(long, value_name = "N|auto|high|medium|low")]
    pub queues: Option<String>,

    /// The guest's vCPUs, for --queues auto, high, medium and low [default: not known]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<String>,

    /// Frames go to this TAP, which is made if there is none, and put into bridge BR. Short for
    /// --uplink tap:NAME[,bridge=BR]. One made by hand must have several queues: ip tuntap add dev
    /// NAME mode tap multi_queue vnet_hdr
    #[arg(long, value_name = "NAME[,bridge=BR]")]
    pub tap: Option<String>,

    /// Where frames go: tap:NAME[,bridge=BR]; switch:NAME[,tap=IF[,bridge=BR]], which joins the
    /// devices of this process that name the same switch, and the host's TAP IF; or null, which
    /// drops what the guest sends
    #[arg(long, value_name = "KIND[:...]")]
    pub uplink: Option<String>,

    /// The CPU of each pair's worker. auto: where the pair's vCPU is pinned, or near it with --poll,
    /// else one of the allowed CPUs each in turn; same: the very CPUs of the vCPU's thread; sibling:
    /// the other thread of its core; core-near: another CPU of its L3 cache or NUMA node; list:CPUS:
    /// these in turn, such as list:0-3,8; none: left to the kernel [default: auto]
    #[arg(long, value_name = "auto|same|sibling|core-near|list:CPUS|none")]
    pub placement: Option<String>,

    /// What becomes of the interrupts and steering masks that belong to a worker's CPU on the host's
    /// side. apply: they are set, and put back at the end; print: the log and /v1/devices tell the
    /// commands that would set them; off: nothing [default: off]
    #[arg(long, value_name = "apply|print|off")]
    pub irq_affinity: Option<String>,

    /// QEMU's QMP socket, to ask for its vCPU threads where their names do not tell (QEMU names
    /// them with -name debug-threads=on) [default: names only]
    #[arg(long, value_name = "PATH")]
    pub qmp: Option<PathBuf>,

    /// How a worker waits for frames. off: it sleeps, and uses no CPU when idle; adaptive: after
    /// work it looks on for up to --poll-us before it sleeps; always: it never sleeps and takes its
    /// CPU whole [default: off]
    #[arg(long, value_name = "off|adaptive|always")]
    pub poll: Option<String>,

    /// Microseconds that --poll adaptive looks on at most [default: 50]
    #[arg(long, value_name = "N")]
    pub poll_us: Option<String>,
}

/// Why a command line leads to no [`Command`].
#[derive(Debug)]
pub enum CliError {
    /// Flags that do not exist or lack their value; also `--help` and `--version`.
    Flags(clap::Error),
    /// Flags that cannot be used together, or values that mean nothing.
    Config(ConfigError),
    /// A command that is one of virtionetctl's now.
    Moved(String),
}

impl CliError {
    /// Tells the user, and says with which status to exit.
    #[must_use]
    pub fn report(&self) -> u8 {
        // Where even stderr is closed, the exit status is all that is left to say.
        match self {
            Self::Flags(why) => {
                let _ = why.print();
                u8::try_from(why.exit_code()).unwrap_or(2)
            }
            Self::Config(why) => {
                for problem in why.problems() {
                    let _ = writeln!(io::stderr(), "virtionetd: {problem}");
                }
                2
            }
            Self::Moved(command) => {
                let _ = writeln!(
                    io::stderr(),
                    "virtionetd: '{command}' is a command of virtionetctl: run 'virtionetctl {command}' with the same arguments"
                );
                2
            }
        }
    }
}

/// Reads the command line, the program's name first.
///
/// # Errors
/// When it cannot be used; also for `--help` and `--version`.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, CliError> {
    let args: Vec<OsString> = args.into_iter().collect();
    // The specification wants it to win over all else, right or wrong.
    if args.iter().any(|arg| arg == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    if let Some(command) = args.get(1).and_then(|arg| arg.to_str())
        && matches!(command, "plan" | "check")
    {
        return Err(CliError::Moved(command.into()));
    }
    let cli = Cli::try_parse_from(args).map_err(CliError::Flags)?;
    Config::resolve(cli)
        .map(Command::Serve)
        .map_err(CliError::Config)
}

/// Answers `--print-capabilities` on stdout.
///
/// # Errors
/// When stdout cannot be written.
pub fn print_capabilities() -> io::Result<()> {
    io::stdout().write_all(CAPABILITIES.as_bytes())
}

impl DeviceFlags {
    /// What was given, by key.
    #[must_use]
    pub fn settings(self) -> Settings {
        let path = |path: Option<PathBuf>| path.map(PathBuf::into_os_string);
        let text = |text: Option<String>| text.map(OsString::from);
        let flags = [
            ("name", text(self.name)),
            ("socket-path", path(self.socket_path)),
            ("fd", text(self.fd)),
            ("client", text(self.client)),
            ("queues", text(self.queues)),
            ("vcpus", text(self.vcpus)),
            ("tap", text(self.tap)),
            ("uplink", text(self.uplink)),
            ("placement", text(self.placement)),
            ("irq-affinity", text(self.irq_affinity)),
            ("qmp", path(self.qmp)),
            ("poll", text(self.poll)),
            ("poll-us", text(self.poll_us)),
            ("socket-mode", text(self.socket_mode)),
            ("socket-group", text(self.socket_group)),
        ];
        let mut settings = Settings::default();
        for (name, value) in flags {
            if let (Some(key), Some(value)) = (Key::find(name), value) {
                settings.insert(key, SettingValue::new(value, &Origin::Flag));
            }
        }
        settings
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::keys::KEYS;

    #[test]
    fn clap_finds_no_fault() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_names_every_key_and_fits_a_terminal() {
        let short = Cli::command().render_help().to_string();
        let help = Cli::command().render_long_help().to_string();
        for key in KEYS.map(|key| key.name) {
            assert!(
                key == "bridge" || help.contains(&format!("--{key}")),
                "{key}\n{help}"
            );
        }
        for line in help.lines().chain(short.lines()) {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }

    #[test]
    fn capabilities_win_over_all_else_and_are_json() {
        for args in [
            &["--print-capabilities"][..],
            &["--nonsense", "--print-capabilities", "--fd"],
        ] {
            let args = [&["virtionetd"], args].concat();
            let command = parse(args.iter().map(Into::into)).unwrap();
            assert_eq!(command, Command::PrintCapabilities);
        }
        let json: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!(json, serde_json::json!({"type": "net"}));
    }

    #[test]
    fn exit_status_tells_a_refusal_from_an_answer() {
        for (args, status) in [
            ("--help", 0),
            ("--version", 0),
            ("--nonsense", 2),
            ("--poll", 2),
        ] {
            let refusal = parse(["virtionetd", args].map(Into::into)).unwrap_err();
            let CliError::Flags(why) = &refusal else {
                panic!("{args}: {refusal:?}");
            };
            assert_eq!(why.exit_code(), status, "{args}");
        }
        let refusal = parse(["virtionetd".into()]).unwrap_err();
        assert_eq!(refusal.report(), 2);
    }
}
