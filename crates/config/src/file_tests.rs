//! Tests of the configuration file: its values, what overrides them, and every problem of a file.

use std::path::PathBuf;

use crate::cli::{self, CliError, Command};
use crate::types::{
    Config, ControlSocket, DeviceConfig, PollMode, QueuePairCount, SandboxMode, Socket,
};

/// Parses the command line `line` beside a file with the content `text`, which is called `f.toml`
/// in the errors.
fn command(name: &str, text: impl AsRef<[u8]>, line: &str) -> Result<Config, String> {
    let dir = std::env::temp_dir().join(format!("vnet-config-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path: PathBuf = dir.join("f.toml");
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let args = ["virtionetd", "--config", path].into_iter();
    let args = args.chain(line.split_whitespace()).map(Into::into);
    let command = cli::parse(args).map_err(|error| match error {
        CliError::Config(error) => error.to_string().replace(path, "f.toml"),
        CliError::Flags(error) => panic!("{line}: {error}"),
        CliError::Moved(command) => panic!("{line}: {command}"),
    });
    std::fs::remove_dir_all(&dir).unwrap();
    command.map(|command| match command {
        Command::Serve(config) => *config,
        other => panic!("{other:?}"),
    })
}

const TWO: &str = r#"
control = "/c"
control-group = 4

[defaults]
queues = 4
poll = "adaptive"
poll-us = 9
socket-group = "kvm"

[[device]]
name = "a"
socket-path = "/a"
tap = "t0"
bridge = "br0"
placement = "list:0-3,8"
socket-mode = 0o640

[[device]]
fd = 3
uplink = "switch:lan,tap=t1"
queues = "medium"
vcpus = 6
poll = "off"
irq-affinity = "print"
"#;

/// A summary of a configuration, with one line for each device.
fn summary(config: &Config) -> String {
    let line = |device: &DeviceConfig| {
        let socket = match &device.socket {
            Socket::Listen {
                path,
                mode,
                group,
                peer_uid,
            } => {
                let group = group.as_deref().unwrap_or("-");
                let user = peer_uid.map_or_else(String::new, |uid| format!(" for user {uid}"));
                format!("listen {} {mode:o} {group}{user}", path.display())
            }
            Socket::Connect { path } => format!("connect {}", path.display()),
            Socket::Inherited(fd) => format!("fd {fd}"),
        };
        let queues = match device.queues {
            QueuePairCount::Auto => "auto".into(),
            QueuePairCount::AtMost(pairs) => pairs.to_string(),
        };
        let poll = match device.poll {
            PollMode::Off => "off".into(),
            PollMode::Adaptive(time) => format!("{}us", time.as_micros()),
            PollMode::Always => "always".into(),
        };
        let (name, uplink) = (&device.name, &device.uplink);
        let (placement, irq) = (&device.placement, &device.irq_affinity);
        format!("{name}: {socket}, {queues} on {uplink}, {placement}, {poll}, irq {irq}")
    };
    let lines: Vec<String> = config.devices.iter().map(line).collect();
    lines.join("\n")
}

/// A summary of the control socket.
fn control(config: &Config) -> String {
    let ControlSocket { path, mode, group } = config.control.clone().unwrap();
    format!("{} {mode:o} {}", path.display(), group.unwrap_or_default())
}

#[test]
fn devices_have_their_keys_and_the_defaults() {
    let config = command("two", TWO, "").unwrap();
    assert_eq!(control(&config), "/c 660 4");
    assert_eq!(config.sandbox, SandboxMode::On);
    let logged = command("log", format!("sandbox = \"log\"\n{TWO}"), "").unwrap();
    assert_eq!(logged.sandbox, SandboxMode::Log);
    assert_eq!(
        summary(&config),
        "a: listen /a 640 kvm, 4 on tap:t0,bridge=br0, list:0,1,2,3,8, 9us, irq off\n\
         vnet1: fd 3, 3 on switch:lan,tap=t1, auto, off, irq print"
    );
}

#[test]
fn command_line_overrides_the_file() {
    for (line, expected) in [
        (
            "--poll always --queues 2 --control /d",
            "a: listen /a 640 kvm, 2 on tap:t0,bridge=br0, list:0,1,2,3,8, always, irq off\n\
             vnet1: fd 3, 2 on switch:lan,tap=t1, auto, always, irq print",
        ),
        // A flag for all devices may have no effect on some of them, which is not an error.
        (
            "--poll-us 7 --client",
            "a: connect /a, 4 on tap:t0,bridge=br0, list:0,1,2,3,8, 7us, irq off\n\
             vnet1: fd 3, 3 on switch:lan,tap=t1, auto, off, irq print",
        ),
        (
            "--vcpus 2",
            "a: listen /a 640 kvm, 4 on tap:t0,bridge=br0, list:0,1,2,3,8, 9us, irq off\n\
             vnet1: fd 3, 1 on switch:lan,tap=t1, auto, off, irq print",
        ),
        // The --device of one device overrides the flags for all devices.
        (
            "--poll off --device name=a,uplink=null,poll=always",
            "a: listen /a 640 kvm, 4 on null, list:0,1,2,3,8, always, irq off\n\
             vnet1: fd 3, 3 on switch:lan,tap=t1, auto, off, irq print",
        ),
        (
            "--device name=vnet1,socket-path=/b,queues=1,socket-group=7",
            "a: listen /a 640 kvm, 4 on tap:t0,bridge=br0, list:0,1,2,3,8, 9us, irq off\n\
             vnet1: listen /b 660 7, 1 on switch:lan,tap=t1, auto, off, irq print",
        ),
        (
            "--peer-uid 7 --control-mode 660",
            "a: listen /a 640 kvm for user 7, 4 on tap:t0,bridge=br0, list:0,1,2,3,8, 9us, irq off\n\
             vnet1: fd 3, 3 on switch:lan,tap=t1, auto, off, irq print",
        ),
        (
            "--device name=a,fd=4 --device socket-path=/x,tap=t3,socket-mode=600",
            "a: fd 4, 4 on tap:t0,bridge=br0, list:0,1,2,3,8, 9us, irq off\n\
             vnet1: fd 3, 3 on switch:lan,tap=t1, auto, off, irq print\n\
             vnet2: listen /x 600 kvm, 4 on tap:t3, auto, 9us, irq off",
        ),
    ] {
        let config = command("overrides", TWO, line).unwrap();
        assert_eq!(summary(&config), expected, "{line}");
        let path = if line.contains("--control /d") {
            "/d"
        } else {
            "/c"
        };
        assert_eq!(control(&config), format!("{path} 660 4"));
    }
}

/// Files, each with its name above it and all its problems below it.
const REFUSED: &str = r#"
## unknown keys, in all places
queues = 4
contrl = "/c"
frob = 1
[defaults]
tap = "t0"
queue = 4
[[device]]
socket_path = "/a"
socket-path = "/b"
uplink = "null"
frobnicate = true
[[devices]]
--
f.toml:1: queues belongs to a device: write it below a [[device]], or below [defaults] where it is for all
f.toml:2: "contrl" is not known at the top: write control, which is the most similar one
f.toml:3: "frob" is not known at the top: write control = "PATH", [defaults] or [[device]]
f.toml:5: tap describes one device: write it below its [[device]]
f.toml:6: the key "queue" is not known: write queues, which is the most similar one
f.toml:8: the key "socket_path" is not known: write socket-path, which is the most similar one
f.toml:11: the key "frobnicate" is not known: use name, socket-path, fd, client, socket-mode, socket-group, peer-uid, queues, vcpus, tap, bridge, uplink, placement, irq-affinity, qmp, poll, poll-us, features-compat, postcopy
f.toml:12: "devices" is not known at the top: write device, which is the most similar one
## wrong kinds
control = 5
defaults = "x"
[[device]]
name = 1
socket-path = ["/a"]
queues = 1.5
uplink = true
client = "on"
poll-us = "50"
socket-mode = 660
qmp = 1979-05-27
vcpus = 0x4
placement = {a = 1}
--
f.toml:1: control is the number 5: write a text in quotes
f.toml:2: defaults is a table: write [defaults]
f.toml:3: no socket is given: add socket-path = "PATH" or fd = N
f.toml:3: no uplink is given: add tap = "NAME", or uplink = "null" to drop what the guest sends
f.toml:4: name is the number 1: write a text in quotes
f.toml:5: socket-path is a list: write a text in quotes
f.toml:6: queues is the number 1.5: write a whole number, or a word in quotes
f.toml:7: uplink is true: write a text in quotes
f.toml:8: client is the text "on": write true or false
f.toml:9: poll-us is the text "50": write a whole number without quotes
f.toml:10: socket-mode is the number 660: write octal digits in quotes, such as "660"
f.toml:11: qmp is the date 1979-05-27: write a text in quotes
f.toml:12: vcpus is the number 0x4: write a whole number without quotes
f.toml:13: placement is a table: write a text in quotes
## one table for devices
[device]
tap = "t0"
--
f.toml:1: each device is a table of its own in a list: write [[device]]
f.toml:1: no device is described: add [[device]], with socket-path and tap below it
## a list of other things
device = [1]
--
f.toml:1: each device is a table of its own: write [[device]], and its keys below
f.toml:1: no device is described: add [[device]], with socket-path and tap below it
## values that cannot be used
[defaults]
poll = "busy"
[[device]]
name = "a b"
socket-path = "/a"
tap = "t0"
uplink = "null"
queues = 129
[[device]]
fd = 2
tap = "abcdefghijklmnopq"
placement = "list:"
client = true
[[device]]
socket-path = "/c"
uplink = "null"
bridge = "b"
poll = "off"
poll-us = 3
queues = "high"
irq-affinity = "on"
qmp = ""
--
f.toml:2: poll = "busy" is not known: write off, adaptive or always
f.toml:4: name "a b" cannot be used: write 1 to 64 letters, digits, '.', '_' or '-'
f.toml:6: tap = "t0" and uplink = "null" are both given: keep one of them
f.toml:8: queues = 129 cannot be used: write 1 to 128 queue pairs, auto for as many as the front-end asks for, or high, medium or low with vcpus = N
f.toml:11: tap: TAP name "abcdefghijklmnopq" has 17 bytes; an interface's name has 1 to 15
f.toml:12: placement: placement "list:" names no CPU: write list:CPUS, such as list:0-3,8, or list for all allowed CPUs
f.toml:13: client and fd = 2 are both given: leave client out, or name the socket with socket-path = "PATH"
f.toml:17: bridge = "b" needs tap: write tap = "NAME" instead of uplink = "null", or leave bridge out
f.toml:19: poll-us = 3 has no effect with poll = "off": add poll = "adaptive", or leave poll-us out
f.toml:20: queues = "high" is a share of the guest's vCPUs, which are not known: add vcpus = N, or write the number of queue pairs
f.toml:21: irq-affinity: there is no interrupt affinity mode "on": use apply, print or off
f.toml:22: qmp is empty: write a path, or leave it out
## resources given to two devices
control = "/a"
[[device]]
socket-path = "/a"
tap = "t0"
[[device]]
socket-path = "/./b"
tap = "t0"
name = "vnet0"
[[device]]
socket-path = "/b"
uplink = "switch:s,tap=t0"
--
f.toml:3: socket /a is given to both control (f.toml:1) and vnet0: give each one of its own
f.toml:7: TAP t0 is given to two devices (f.toml:4): give each one of its own
f.toml:8: name vnet0 is given to two devices (f.toml:2): give each one of its own
f.toml:10: socket /b is given to both vnet0 (f.toml:6) and vnet2: give each one of its own
f.toml:11: TAP t0 is given to both vnet0 (f.toml:4) and switch s: give each one of its own
## twice
[[device]]
tap = "t0"
fd = 3
tap = "t1"
--
f.toml:4: tap is given twice: keep one of them
## syntax errors, and what can be read in spite of them
[[device]]
tap = lan0
fd = 3
quques = 4
uplink "null"
--
f.toml:2: `tap = lan0` has a value that cannot be read: write a text in quotes, and a number, true or false without quotes
f.toml:4: the key "quques" is not known: write queues, which is the most similar one
f.toml:5: `uplink "null"` is not TOML (key with no value, expected `=`): write KEY = VALUE or [TABLE]
## a control socket that is not there, and modes
control-mode = 640
control-group = ""
[[device]]
socket-path = "/a"
uplink = "null"
peer-uid = "root"
--
f.toml:1: control-mode is the number 640: write octal digits in quotes, such as "660"
f.toml:2: control-group is empty: write a group's name or number
f.toml:2: control-group = "" has no effect without a control socket: add control = "PATH", or leave control-group out
f.toml:6: peer-uid is the text "root": write a whole number without quotes
## nothing
# only a comment
--
f.toml:1: no device is described: add [[device]], with socket-path and tap below it
"#;

#[test]
fn every_problem_is_reported_with_its_line() {
    for (at, case) in REFUSED.trim().split("## ").skip(1).enumerate() {
        let (name, case) = case.split_once('\n').unwrap();
        let (text, problems) = case.split_once("--\n").unwrap();
        let found = command(&format!("bad{at}"), text, "").unwrap_err();
        assert_eq!(found, problems.trim_end(), "{name}");
    }
    assert_eq!(REFUSED.matches("## ").count(), 10);
}

#[test]
fn problems_of_the_command_line_and_the_file_are_reported_together() {
    for (line, problem) in [
        (
            "--poll busy",
            "--poll busy is not known: write off, adaptive or always",
        ),
        (
            "--tap t5",
            "--tap cannot be used beside --config: write it as tap=... into the --device that it belongs to",
        ),
        (
            "--device name=b,fd=3,tap=t5",
            "descriptor 3 is given to both vnet1 (f.toml:20) and b: give each one of its own",
        ),
        (
            "--device name=a,queues=1 --device name=a,poll=off",
            "--device name=a,poll=off: another --device has the same name: write all keys of a device into one --device",
        ),
        (
            "--device name=a,tap=t1",
            "f.toml:21: TAP t1 is given to both a and switch lan: give each one of its own",
        ),
        (
            "--device name=a,client,socket-mode=600",
            "--device name=a,client,socket-mode=600: socket-mode is for a socket that virtionetd creates: leave it out, or use socket-path without client",
        ),
    ] {
        assert_eq!(command("sides", TWO, line).unwrap_err(), problem, "{line}");
    }
    let bad = format!("{TWO}queus = 1\n");
    assert_eq!(
        command("both", bad, "--poll busy").unwrap_err(),
        "--poll busy is not known: write off, adaptive or always\n\
         f.toml:26: the key \"queus\" is not known: write queues, which is the most similar one"
    );
}

#[test]
fn file_that_cannot_be_read_is_one_problem() {
    assert_eq!(
        command("binary", b"a = 1\nb = \xff", "").unwrap_err(),
        "f.toml:2: the file is not UTF-8 text: save it as UTF-8"
    );
    let long = command("long", format!("a = [{}", "[".repeat(9_000)), "").unwrap_err();
    assert!(long.len() < 400, "{long}");
    let huge = command("huge", "#".repeat((1 << 20) + 1), "").unwrap_err();
    assert!(huge.contains("it is larger than 1 MiB; name a"), "{huge}");
    assert!(command("large", "#".repeat(1 << 20), "").is_err_and(|e| e.contains("no device")));
    let args = ["virtionetd", "--config", "/nowhere/f.toml"].map(Into::into);
    let Err(CliError::Config(error)) = cli::parse(args) else {
        panic!("a file that is not there was read");
    };
    assert_eq!(
        error.to_string(),
        "cannot read /nowhere/f.toml: No such file or directory (os error 2); name a configuration file that exists and that this user may read"
    );
}

#[test]
fn example_in_the_documentation_is_valid() {
    let page = include_str!("../../../docs/configuration.md");
    let (_, example) = page.split_once("```toml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    assert_eq!(
        summary(&command("page", example, "").unwrap()),
        "web: listen /run/web.sock 660 kvm, 4 on tap:web0,bridge=br0, list:0,1,2,3, 30us, irq off\n\
         db: connect /run/db.sock, 4 on switch:lan,tap=lan0, auto, 30us, irq off"
    );
}
