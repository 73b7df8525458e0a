//! Tests of command lines: the configuration or the problem that each one results in.

use std::time::Duration;

use virtionet_placement::Placement;
use virtionet_placement::interrupts::IrqAffinity;

use crate::cli::{self, CliError, Command};
use crate::keys::Key;
use crate::types::{
    Config, ControlSocket, DeviceConfig, FeaturesVersion, HelperConfig, IdentityConfig, PollMode,
    QueuePairCount, SandboxMode, Socket, WorkersConfig,
};

fn command(line: &str) -> Result<Command, String> {
    let args = ["virtionetd"].into_iter().chain(line.split_whitespace());
    cli::parse(args.map(Into::into)).map_err(|error| match error {
        CliError::Config(error) => error.to_string(),
        CliError::Flags(error) => panic!("{line}: {error}"),
        CliError::Moved(command) => panic!("{line}: {command}"),
    })
}

fn config(line: &str) -> Config {
    match command(line) {
        Ok(Command::Serve(config)) => *config,
        other => panic!("{line}: {other:?}"),
    }
}

fn device(name: &str, path: &str, uplink: &str) -> DeviceConfig {
    DeviceConfig {
        name: name.into(),
        socket: listen(path, 0o600, None),
        queues: QueuePairCount::Auto,
        uplink: uplink.parse().unwrap(),
        placement: Placement::Auto,
        irq_affinity: IrqAffinity::default(),
        qmp: None,
        poll: PollMode::Off,
        features_compat: FeaturesVersion::default(),
        postcopy: false,
    }
}

fn listen(path: &str, mode: u32, group: Option<&str>) -> Socket {
    Socket::Listen {
        path: path.into(),
        mode,
        group: group.map(Into::into),
        peer_uid: None,
    }
}

#[test]
fn defaults_are_complete() {
    assert_eq!(
        config("--socket-path /s --tap t0"),
        Config {
            devices: vec![device("vnet", "/s", "tap:t0")],
            file: None,
            allow_add: None,
            control: None,
            control_read_only: None,
            handover: None,
            take_over: false,
            state_folder: None,
            workers: WorkersConfig::PerPair,
            sandbox: SandboxMode::On,
            identity: IdentityConfig::default(),
            helper: Some(HelperConfig::default()),
            verbosity: 0,
        }
    );
}

/// What flags change in the configuration of a device.
type Change = fn(&mut DeviceConfig);

/// Flags, and how they change the configuration of a device.
const FLAGS_OF_A_DEVICE: [(&str, Change); 23] = [
    ("--name eth.0_a-b", |d| d.name = "eth.0_a-b".into()),
    ("--queues 1", |d| d.queues = QueuePairCount::AtMost(1)),
    ("--queues 128", |d| d.queues = QueuePairCount::AtMost(128)),
    ("--queues auto", |_| {}),
    ("--queues auto --vcpus 3", |d| {
        d.queues = QueuePairCount::AtMost(3)
    }),
    ("--queues high --vcpus 200", |d| {
        d.queues = QueuePairCount::AtMost(128)
    }),
    ("--queues medium --vcpus 3", |d| {
        d.queues = QueuePairCount::AtMost(2)
    }),
    ("--queues low --vcpus 3", |d| {
        d.queues = QueuePairCount::AtMost(1)
    }),
    ("--irq-affinity print", |d| {
        d.irq_affinity = IrqAffinity::Print
    }),
    ("--placement list:0-3,8", |d| {
        d.placement = "list:0-3,8".parse().unwrap()
    }),
    ("--qmp /q", |d| d.qmp = Some("/q".into())),
    ("--poll off", |_| {}),
    ("--poll always", |d| d.poll = PollMode::Always),
    ("--poll adaptive", |d| d.poll = adaptive(50)),
    ("--poll adaptive --poll-us 7", |d| d.poll = adaptive(7)),
    ("--features-compat 0.1.0", |d| {
        d.features_compat = FeaturesVersion::V0_1_0
    }),
    ("--postcopy", |d| d.postcopy = true),
    ("--client", |d| {
        d.socket = Socket::Connect { path: "/s".into() }
    }),
    ("--socket-mode 0640", |d| {
        d.socket = listen("/s", 0o640, None)
    }),
    ("--socket-group kvm", |d| {
        d.socket = listen("/s", 0o660, Some("kvm"))
    }),
    ("--socket-group 7 --socket-mode 620", |d| {
        d.socket = listen("/s", 0o620, Some("7"))
    }),
    ("--peer-uid 0", |d| d.socket = listen_for(0)),
    ("--peer-uid 4294967294", |d| {
        d.socket = listen_for(4_294_967_294)
    }),
];

fn listen_for(uid: u32) -> Socket {
    Socket::Listen {
        path: "/s".into(),
        mode: 0o600,
        group: None,
        peer_uid: Some(uid),
    }
}

fn adaptive(microseconds: u64) -> PollMode {
    PollMode::Adaptive(Duration::from_micros(microseconds))
}

#[test]
fn flags_of_one_device_are_read() {
    for (flags, change) in FLAGS_OF_A_DEVICE {
        let line = format!("--socket-path /s --uplink null {flags}");
        let mut expected = device("vnet", "/s", "null");
        change(&mut expected);
        assert_eq!(config(&line).devices, [expected], "{line}");
    }
    let inherited = &config("--fd 3 --tap t0,bridge=br0").devices[0];
    assert_eq!(inherited.socket, Socket::Inherited(3));
    assert_eq!(inherited.uplink.to_string(), "tap:t0,bridge=br0");
}

#[test]
fn flags_of_the_process_are_read() {
    let verbose = config("--socket-path /s --uplink tap:t0 -vv --verbose");
    assert_eq!(verbose.verbosity, 3);
    for (value, mode) in [
        ("on", SandboxMode::On),
        ("off", SandboxMode::Off),
        ("log", SandboxMode::Log),
    ] {
        let line = format!("--socket-path /s --uplink null --sandbox={value}");
        assert_eq!(config(&line).sandbox, mode);
    }
    let shared = WorkersConfig::Shared("2-3,5".parse().unwrap());
    for (value, workers) in [("per-pair", WorkersConfig::PerPair), ("list:2-3,5", shared)] {
        let line = format!("--socket-path /s --uplink null --poll always --workers {value}");
        assert_eq!(config(&line).workers, workers);
    }
    let identity = config("--socket-path /s --uplink null --user vnet --group 12").identity;
    assert_eq!(identity.user.as_deref(), Some("vnet"));
    assert_eq!(identity.group.as_deref(), Some("12"));
    assert_eq!(
        config("--socket-path /s --uplink null --helper=off").helper,
        None
    );
    let allow = "tap=vnet*,bridge=br0,socket=/run/a,,b,tap=t?";
    let line = format!("--socket-path /s --uplink null --helper-allow {allow}");
    let expected = HelperConfig {
        taps: ["vnet*", "t?"].map(|tap| tap.parse().unwrap()).into(),
        bridges: vec!["br0".parse().unwrap()],
        sockets: vec!["/run/a,b".parse().unwrap()],
    };
    assert_eq!(config(&line).helper, Some(expected));
    for (flags, mode, group) in [
        ("", 0o600, None),
        ("--control-mode 640", 0o640, None),
        ("--control-group 7", 0o660, Some("7")),
        (
            "--control-group adm --control-mode 0620",
            0o620,
            Some("adm"),
        ),
    ] {
        let line = format!("--socket-path /s --uplink tap:t0 --control /c {flags}");
        let expected = ControlSocket {
            path: "/c".into(),
            mode,
            group: group.map(Into::into),
        };
        assert_eq!(config(&line).control, Some(expected), "{flags}");
    }
}

#[test]
fn several_devices_have_keys_of_their_own_and_common_flags() {
    let found = config(
        "--queues 2 --poll adaptive --poll-us 9 --client --socket-group kvm \
             --device socket-path=/a,tap=t0,bridge=br0,placement=list:0-3,,8,client=off \
             --device name=b,socket-path=/b,client,uplink=switch:e0,,tap=t9,poll=off,queues=auto,qmp=/q",
    );
    let first = DeviceConfig {
        socket: listen("/a", 0o660, Some("kvm")),
        queues: QueuePairCount::AtMost(2),
        placement: "list:0-3,8".parse().unwrap(),
        poll: PollMode::Adaptive(Duration::from_micros(9)),
        ..device("vnet0", "/a", "tap:t0,bridge=br0")
    };
    let second = DeviceConfig {
        socket: Socket::Connect { path: "/b".into() },
        qmp: Some("/q".into()),
        ..device("b", "/b", "switch:e0,tap=t9")
    };
    assert_eq!(found.devices, [first, second]);
    // The kernel makes a new name from a pattern each time, so two patterns are two TAPs.
    let patterns = config("--device fd=3,tap=t%d --device fd=4,tap=t%d");
    assert_eq!(patterns.devices.len(), 2);
}

#[test]
fn newest_version_with_features_of_its_own_is_the_default() {
    let versions = FeaturesVersion::ALL;
    assert!(versions.is_sorted_by(|older, newer| older < newer));
    assert_eq!(versions.last(), Some(&FeaturesVersion::default()));
    for version in versions {
        assert_eq!(FeaturesVersion::find(version.name()), Some(version));
    }
}

/// Command lines, and below each its problem.
const REFUSED: &str = r#"
--queues 2
    no device is described: give its socket and its uplink, such as --socket-path /run/vnet.sock --tap tap0, or a file that describes devices with --config FILE
--tap t0
    no socket is given: add --socket-path PATH or --fd N
--socket-path /s
    no uplink is given: add --tap NAME, or --uplink null to drop what the guest sends
--socket-path /s --fd 3 --tap t0
    --socket-path /s and --fd 3 are both given: keep one of them
--fd 3 --client --tap t0
    --client and --fd 3 are both given: leave --client out, or name the socket with --socket-path PATH
--fd 2 --tap t0
    --fd 2 cannot be a socket: write the number, 3 or more, of the file descriptor that the parent process passes on
--fd x --tap t0
    --fd x cannot be a socket: write the number, 3 or more, of the file descriptor that the parent process passes on
--socket-path /s --tap t0 --uplink null
    --tap t0 and --uplink null are both given: keep one of them
--socket-path /s --tap t0 --queues 0
    --queues 0 cannot be used: write 1 to 128 queue pairs, auto for as many as the front-end asks for, or high, medium or low with --vcpus N
--socket-path /s --tap t0 --queues 129
    --queues 129 cannot be used: write 1 to 128 queue pairs, auto for as many as the front-end asks for, or high, medium or low with --vcpus N
--socket-path /s --tap t0 --queues medium
    --queues medium is a share of the guest's vCPUs, which are not known: add --vcpus N, or write the number of queue pairs
--socket-path /s --tap t0 --queues high --vcpus 0
    --vcpus 0 cannot be used: write the number of the guest's vCPUs, 1 or more
--socket-path /s --tap t0 --vcpus many
    --vcpus many cannot be used: write the number of the guest's vCPUs, 1 or more
--socket-path /s --tap t0 --queues 4 --vcpus 4
    --vcpus 4 has no effect with --queues 4: leave it out, or write --queues high for as many queue pairs as vCPUs
--socket-path /s --tap t0 --placement list:
    --placement: placement "list:" names no CPU: write list:CPUS, such as list:0-3,8, or list for all allowed CPUs
--socket-path /s --tap a/b
    --tap: TAP name "a/b" contains '/'; use letters, digits, '-', '_' and '.'
--socket-path /s --tap t0 --poll busy
    --poll busy is not known: write off, adaptive or always
--socket-path /s --tap t0 --poll-us 5
    --poll-us 5 has no effect with --poll off: add --poll adaptive, or leave --poll-us out
--socket-path /s --tap t0 --poll adaptive --poll-us 0
    --poll-us 0 cannot be used: write 1 to 100000 microseconds
--socket-path /s --tap t0 --features-compat 0.0.9
    --features-compat 0.0.9 is no version whose features this virtionetd knows: write one of these: 0.1.0
--device fd=3,tap=t0,features-compat=new
    --device fd=3,tap=t0,features-compat=new: features-compat=new is no version whose features this virtionetd knows: write one of these: 0.1.0
--socket-path /s --tap t0 --socket-mode 888
    --socket-mode 888 is not a file mode: write it in octal, 0 to 777, such as 660
--socket-path /s --tap t0 --socket-mode 1777
    --socket-mode 1777 is not a file mode: write it in octal, 0 to 777, such as 660
--socket-path /s --tap t0 --client --socket-mode 600
    --socket-mode is for a socket that virtionetd creates: leave it out, or use --socket-path without --client
--fd 3 --tap t0 --socket-group kvm
    --socket-group is for a socket that virtionetd creates: leave it out, or use --socket-path without --client
--socket-path /s --tap t0 --socket-group=
    --socket-group is empty: write a group's name or number
--socket-path /s --tap t0 --peer-uid libvirt-qemu
    --peer-uid libvirt-qemu is not a user: write the number that id -u prints for the user of the front-end
--socket-path /s --tap t0 --peer-uid 4294967295
    --peer-uid 4294967295 is not a user: write the number that id -u prints for the user of the front-end
--socket-path /s --tap t0 --client --peer-uid 64055
    --peer-uid is for a socket that virtionetd creates: leave it out, or use --socket-path without --client
--fd 3 --tap t0 --peer-uid 64055
    --peer-uid is for a socket that virtionetd creates: leave it out, or use --socket-path without --client
--socket-path /s --tap t0 --control /c --control-mode 999
    --control-mode 999 is not a file mode: write it in octal, 0 to 777, such as 660
--socket-path /s --tap t0 --control /c --control-group=
    --control-group is empty: write a group's name or number
--socket-path /s --tap t0 --control-mode 640
    --control-mode 640 has no effect without a control socket: add --control PATH, or leave --control-mode out
--socket-path /s --tap t0 --sandbox=strict
    --sandbox strict is not known: write on, off or log
--socket-path /s --tap t0 --workers=2
    --workers 2 is not known: write per-pair, or list: and CPUs, such as list:2-3
--socket-path /s --tap t0 --workers=list:
    --workers list: names no CPU: write per-pair, or list: and CPUs, such as list:2-3
--socket-path /s --tap t0 --workers=list:3-2
    the range "3-2" in the CPU list "3-2" runs backwards: write the lower CPU first
--socket-path /s --tap t0 --workers=list:2 --placement none
    --placement none has no effect with --workers list:2, whose CPUs are those of the workers: leave it out
--socket-path /s --tap t0 --workers=list:2 --postcopy
    --workers list:2 is not possible with postcopy of device vnet: its worker waits for pages of the guest, and would not serve other guests meanwhile; leave one of them out
--workers=list:2 --poll off --device name=a,socket-path=/a,tap=a --device name=b,socket-path=/b,tap=b,poll=always
    --workers list:2 is not possible with different poll modes of the devices a and b: give all devices the same
--socket-path /s --tap t0 --user=
    --user is empty: write a name or a number
--socket-path /s --tap t0 --group kvm
    --group kvm has no effect without a user: add --user NAME, or leave --group out
--socket-path /s --tap t0 --helper=off --helper-allow tap=a*
    --helper-allow tap=a* has no effect without a helper: leave one of --helper-allow and --helper out
--socket-path /s --tap t0 --helper-allow tap=a*,nic=eth0
    --helper-allow tap=a*,nic=eth0: "nic=eth0" is not known: write tap=PATTERN, bridge=PATTERN or socket=PATTERN
--socket-path /s --tap t0 --helper-allow tap=a*,bridge=br[
    --helper-allow tap=a*,bridge=br[: "bridge=br[" has no valid pattern (invalid range pattern): write * for any characters, ? for one and [abc] for one of these
--socket-path /s --tap t0 --helper-allow socket=/run/***
    --helper-allow socket=/run/***: "socket=/run/***" has no valid pattern (wildcards are either regular `*` or recursive `**`): write * for any characters, ? for one and [abc] for one of these
--socket-path /s --tap t0 --name a/b
    --name "a/b" cannot be used: write 1 to 64 letters, digits, '.', '_' or '-'
--socket-path /s --tap t0 --control /./s
    socket /s is given to both --control and vnet: give each one of its own
--socket-path /s --device socket-path=/t,tap=t0
    --socket-path cannot be used beside --device: write it as socket-path=... into the --device that it belongs to
--device socket-path=/a,tap=t0 --device socket-path=/a,tap=t1
    socket /a is given to both vnet0 and vnet1: give each one of its own
--device socket-path=/a,tap=t0 --device socket-path=/b,uplink=tap:t0,,bridge=b
    TAP t0 is given to both vnet0 and vnet1: give each one of its own
--device socket-path=/a,tap=t0 --device socket-path=/b,uplink=switch:s,,tap=t0
    TAP t0 is given to both vnet0 and switch s: give each one of its own
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
    --device fd=3,uplink=null,bridge=b: bridge=b needs tap: write tap=NAME instead of uplink=null, or leave bridge out
--poll adaptive --device fd=3,tap=t0,poll=off,poll-us=3
    --device fd=3,tap=t0,poll=off,poll-us=3: poll-us=3 has no effect with poll=off: add poll=adaptive, or leave poll-us out
"#;

#[test]
fn every_problem_of_a_command_line_says_what_to_do() {
    let rows: Vec<&str> = REFUSED.trim().lines().collect();
    for row in rows.chunks(2) {
        assert_eq!(command(row[0]), Err(row[1].trim().into()), "{}", row[0]);
    }
    assert_eq!(command(""), command("--queues 2"));
    let long = format!("/{}", "x".repeat(107));
    assert_eq!(
        command(&format!("--socket-path {long} --tap t0")),
        Err(format!(
            "--socket-path {long} is 108 bytes long: the path of a unix socket has at most 107, choose a shorter one"
        ))
    );
    assert_eq!(
        command("--device taps=t0"),
        Err(format!(
            "--device taps=t0: the key \"taps\" is not known: use {}",
            Key::names()
        ))
    );
}
