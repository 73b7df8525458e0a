//! The program as a process, with a control socket whose reports the tests decide.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtionet_control::server::{Access, ControlServer, SocketPermissions};
use virtionet_control::v1::{Report, ReportSource};

/// A directory of one test, which is removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let name = format!("virtionetctl-{}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// The path of a file with this content.
    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// One device with a queue pair that has carried 2,000,000 frames more at each report.
#[derive(Default)]
struct BusyDevice {
    reports: AtomicU64,
}

impl ReportSource for BusyDevice {
    fn report(&self) -> Report {
        let frames = 2_000_000 * self.reports.fetch_add(1, Ordering::Relaxed);
        let vring = |frames: u64| {
            serde_json::json!({"state": "running", "enabled": true, "size": 256, "counters": {
                "frames": frames, "bytes": frames * 100,
            }})
        };
        let report = serde_json::json!({"version": "9.8.7", "devices": [{
            "name": "web", "socket": "/run/web.sock", "role": "client", "connected": false,
            "memory": [], "uplink": {"kind": "null", "name": ""}, "mtu": null,
            "warnings": [], "advice": ["run `ethtool -L IFACE combined 4` in the guest"],
            "interrupts": {"mode": "off", "settings": [], "notes": []},
            "pairs": [{
                "pair": 0, "vcpus": [], "worker": "web-q0", "cpus": [0, 2, 4, 6, 8, 10],
                "placement": "", "worker_counters": {},
                "worker_load": {"cycles": 0, "busy_share": 0.0, "cycles_per_frame": 0.0},
                "rx": vring(0), "tx": vring(frames),
            }],
        }]});
        serde_json::from_value(report).unwrap()
    }
}

fn serve(directory: &Directory) -> ControlServer {
    let path = directory.0.join("control");
    let access = SocketPermissions::default();
    ControlServer::start(
        &path,
        &access,
        Access::ReadOnly,
        Arc::new(BusyDevice::default()),
        || (),
    )
    .unwrap()
}

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_virtionetctl"))
}

/// The exit status, standard output and standard error.
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

fn status(control: &Path) -> Command {
    let mut command = command();
    command.arg("status").arg("--control").arg(control);
    command
}

#[test]
fn status_shows_the_rates_between_two_reports_and_the_advice() {
    let directory = Directory::new("status");
    let server = serve(&directory);
    let (code, stdout, stderr) = run(command()
        .arg("status")
        .env("VIRTIONETD_CONTROL", server.path()));
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let mut lines = stdout.lines();
    assert_eq!(lines.next(), Some("virtionetd 9.8.7: 1 device"));
    let head = "web: uplink null; connects to /run/web.sock; no front-end connected";
    assert!(lines.any(|line| line == head), "{stdout}");
    let pair = lines.find(|line| line.contains("web-q0")).unwrap();
    let columns: Vec<_> = pair.split_whitespace().collect();
    // The list of CPUs is longer than its column, and without cycles the load is unknown.
    assert_eq!(columns[..5], ["0", "-", "web-q0", "0,2,4,6,8+", "-"]);
    // The reports are at least a second apart, and later on a machine that is busy.
    let rate: u64 = columns[7].strip_suffix('k').unwrap().parse().unwrap();
    assert!((100..=2_000).contains(&rate), "{pair}");
    assert_eq!(
        lines.next(),
        Some("  advice: run `ethtool -L IFACE combined 4` in the guest")
    );
}

#[test]
fn status_as_json_is_the_answer_of_the_daemon() {
    let directory = Directory::new("json");
    let server = serve(&directory);
    let (code, stdout, _) = run(status(server.path()).arg("--json"));
    assert_eq!(code, Some(0));
    let expected = serde_json::to_string(&BusyDevice::default().report()).unwrap();
    assert_eq!(stdout, expected + "\n");
}

#[test]
fn daemon_that_does_not_answer_is_a_failure_that_names_the_socket() {
    let directory = Directory::new("unreachable");
    let path = directory.0.join("none");
    let (code, stdout, stderr) = run(&mut status(&path));
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    let text = format!(
        "virtionetctl: control socket {} cannot be reached",
        path.display()
    );
    assert!(stderr.starts_with(&text), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn full_disk_is_a_failure_and_a_reader_that_has_ended_is_none() {
    let directory = Directory::new("output");
    let server = serve(&directory);
    let mut json = status(server.path());
    json.arg("--json");
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = json.stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.ends_with("check where standard output goes\n"),
        "{stderr}"
    );
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = json.stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
}

#[test]
fn check_reports_each_file_and_fails_if_one_cannot_be_used() {
    let directory = Directory::new("check");
    let device = |name: &str| {
        format!("[[device]]\nname = \"{name}\"\nsocket-path = \"/run/{name}\"\nuplink = \"null\"\n")
    };
    let one = directory.file("one.toml", &device("a"));
    let two = directory.file("two.toml", &(device("a") + &device("b")));
    let wrong = directory.file("wrong.toml", "[[device]]\nsocket-pth = \"/run/a\"\n");
    let (code, stdout, stderr) = run(command().arg("check").args([&one, &two]));
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let expected = format!(
        "{}: 1 device, ok\n{}: 2 devices, ok\n",
        one.display(),
        two.display()
    );
    assert_eq!(stdout, expected);
    let (code, stdout, stderr) = run(command().arg("check").args([&wrong, &one]));
    assert_eq!(code, Some(2));
    assert_eq!(stdout, format!("{}: 1 device, ok\n", one.display()));
    assert!(
        stderr.contains("wrong.toml") && stderr.contains("socket-pth"),
        "{stderr}"
    );
}

#[test]
fn plan_is_printed_and_a_request_that_cannot_be_used_has_status_2() {
    let (code, stdout, stderr) = run(command().args(["plan", "--vcpus", "4"]));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("virtionetd "), "{stdout}");
    let (code, stdout, stderr) = run(command().args(["plan", "--vcpus", "4", "--nic", "colour=1"]));
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(stderr.contains("colour"), "{stderr}");
}
