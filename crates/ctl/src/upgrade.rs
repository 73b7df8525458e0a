//! `virtionetctl upgrade`: starts a new virtionetd that takes all devices over from the one that runs.
//!
//! The new one has taken over as soon as the control socket, which it takes over as well, answers with
//! its process id. Until then the old one can go on.
//!
//! A daemon that a guest has taken control of can report anything. So the program that is started is
//! never one that it names, and its report of its arguments is used only if none are given.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use virtionet_control::client::{self, ClientError};
use virtionet_control::v1::{ProcessReport, Report};

use crate::control_socket;

/// The flag of a daemon that takes over.
const TAKE_OVER: &str = "--take-over";
/// How long the new daemon may take. The two daemons give up by themselves after 10 s without an
/// answer of the other, and systemd ends this program after 90 s.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The time between two looks at the new daemon.
const INTERVAL: Duration = Duration::from_millis(20);

/// What is to be done.
#[derive(Debug)]
pub(crate) struct Upgrade {
    /// The control socket of the running daemon; `None` for the default one.
    pub control: Option<PathBuf>,
    /// The program to start; `None` for the virtionetd beside this program.
    pub program: Option<PathBuf>,
    /// Its arguments; none for those of the running daemon.
    pub arguments: Vec<OsString>,
}

/// Why the devices are not taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpgradeError {
    /// The running daemon does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The running daemon does not say what its process is.
    #[error(
        "virtionetd {0} does not report how it was started: restart it once with this version, or start the new one with --take-over yourself"
    )]
    TooOld(String),
    /// No other daemon can take over from it.
    #[error(
        "virtionetd (process {0}) has no socket for a successor: restart it once with --handover-socket"
    )]
    NoHandoverSocket(u32),
    /// Part of how it was started is not UTF-8, or unknown.
    #[error(
        "virtionetd (process {0}) cannot report its arguments, because they are not UTF-8: give them behind --"
    )]
    Unreported(u32),
    /// The path of this program is unknown.
    #[error(
        "the virtionetd beside virtionetctl is not found: name the new virtionetd with --binary"
    )]
    NoProgram,
    /// The service manager would take the new daemon for a process of another service.
    #[error(
        "virtionetd (process {pid}) belongs to the service {service}, whose successor must be started by the service manager: run 'systemctl reload {service}'"
    )]
    OtherService {
        /// The process of the running daemon.
        pid: u32,
        /// Its service.
        service: String,
    },
    /// The new daemon cannot be started.
    #[error("{} cannot be started ({source}): name the new virtionetd with --binary", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The new daemon has ended.
    #[error("the new virtionetd has not taken over ({status}), and its messages say why; {old}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// What became of the old one.
        old: String,
    },
    /// The new daemon takes too long.
    #[error("the new virtionetd (process {pid}) has not taken over within {TIMEOUT:?}; {old}")]
    Late {
        /// The process of the new daemon.
        pid: u32,
        /// What became of both.
        old: String,
    },
}

/// Starts a new daemon, and waits until it has taken over. Prints what was done.
///
/// # Errors
/// When it does not take over. The old daemon goes on then.
pub(crate) fn run(upgrade: Upgrade) -> Result<(), UpgradeError> {
    let control = control_socket::path(upgrade.control);
    let before = client::devices(&control)?;
    let old = process_of(&before)?;
    check_service(old.pid)?;
    let mut new = start(old, upgrade.program, upgrade.arguments)?;
    let after = wait(&mut new, old, &control)?;
    // An error of writing is ignored, because the exit status reports the result too.
    let _ = writeln!(io::stdout(), "{}", summary(&before, &after));
    Ok(())
}

/// The process of the daemon, which another one must be able to take over from.
fn process_of(report: &Report) -> Result<&ProcessReport, UpgradeError> {
    let process = report.process.as_ref();
    let process = process.ok_or_else(|| UpgradeError::TooOld(report.version.clone()))?;
    match process.handover_socket {
        Some(_) => Ok(process),
        None => Err(UpgradeError::NoHandoverSocket(process.pid)),
    }
}

/// Checks that a process that this one starts is one of the same service as `pid`. A service manager
/// accepts no process of another service as the main process, and would end the service or start it
/// anew when the old daemon ends.
fn check_service(pid: u32) -> Result<(), UpgradeError> {
    let cgroup = |process: &str| fs::read_to_string(format!("/proc/{process}/cgroup"));
    // Where there is no such file, there are no services either.
    let (Ok(old), Ok(own)) = (cgroup(&pid.to_string()), cgroup("self")) else {
        return Ok(());
    };
    match service_of(&old) {
        Some(service) if service_of(&own) != Some(service) => Err(UpgradeError::OtherService {
            pid,
            service: service.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// The systemd service of a process with this `/proc/PID/cgroup` (cgroups(7)): lines
/// `NUMBER:CONTROLLERS:PATH`, of which those of systemd itself have no controllers or `name=systemd`.
fn service_of(cgroup: &str) -> Option<&str> {
    let mut lines = cgroup.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let is_systemd = matches!(fields.next(), Some("" | "name=systemd"));
        fields.next().filter(|_| is_systemd)
    });
    let path = lines.find(|path| *path != "/")?;
    let is_unit = |part: &&str| part.ends_with(".service") || part.ends_with(".scope");
    let unit = path.rsplit('/').find(is_unit)?;
    unit.ends_with(".service").then_some(unit)
}

/// Starts the successor of `old`. Its messages go where those of this process go.
fn start(
    old: &ProcessReport,
    program: Option<PathBuf>,
    arguments: Vec<OsString>,
) -> Result<Child, UpgradeError> {
    // A relative path is looked up in this folder, and not in that of the daemon.
    let program = program
        .map(|path| path.canonicalize().unwrap_or(path))
        .or_else(beside_this_program)
        .ok_or(UpgradeError::NoProgram)?;
    let mut command = Command::new(&program);
    if arguments.is_empty() {
        let (Some(arguments), Some(directory)) = (&old.arguments, &old.directory) else {
            return Err(UpgradeError::Unreported(old.pid));
        };
        command.args(arguments.iter().filter(|argument| *argument != TAKE_OVER));
        command.current_dir(directory);
    } else {
        command.args(arguments.iter().filter(|argument| *argument != TAKE_OVER));
    }
    command
        .arg(TAKE_OVER)
        .stdin(Stdio::null())
        // It writes nothing there, and would hold up the reader of the output of this program.
        .stdout(Stdio::null())
        // A signal of the terminal is meant for this program.
        .process_group(0)
        .spawn()
        .map_err(|source| UpgradeError::Start { program, source })
}

/// The virtionetd in the folder of this program.
fn beside_this_program() -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    Some(own.with_file_name("virtionetd"))
}

/// Waits until `new` has taken over from `old`, and returns its report.
fn wait(new: &mut Child, old: &ProcessReport, control: &Path) -> Result<Report, UpgradeError> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // While one daemon takes over from the other, the socket may not answer.
        if let Ok(report) = client::devices(control)
            && let Some(process) = &report.process
            && process.pid == new.id()
            && process.taken_over.is_some()
        {
            return Ok(report);
        }
        if let Ok(Some(status)) = new.try_wait() {
            let old = what_became_of(old, control);
            return Err(UpgradeError::Ended { status, old });
        }
        if Instant::now() >= deadline {
            return Err(give_up(new, old, control));
        }
        thread::sleep(INTERVAL);
    }
}

/// Ends `new`, if the devices are still those of `old`.
fn give_up(new: &mut Child, old: &ProcessReport, control: &Path) -> UpgradeError {
    let pid = new.id();
    let is_running = || {
        let report = client::devices(control).ok()?;
        Some(report.process?.pid == old.pid)
    };
    let text = match is_running() {
        Some(true) => {
            // It may have ended meanwhile.
            let _ = new.kill();
            let _ = new.wait();
            format!("it was ended, and {}", what_became_of(old, control))
        }
        _ => "nor does the old one answer: see their messages, and which of the two runs".into(),
    };
    UpgradeError::Late { pid, old: text }
}

/// Whether the old daemon still answers, for a message.
fn what_became_of(old: &ProcessReport, control: &Path) -> String {
    match client::devices(control) {
        Ok(report) if report.process.as_ref().map(|process| process.pid) == Some(old.pid) => {
            format!(
                "virtionetd {} (process {}) goes on",
                report.version, old.pid
            )
        }
        Ok(_) => format!(
            "virtionetd (process {}) is not the one that answers any more",
            old.pid
        ),
        Err(_) => format!("virtionetd (process {}) does not answer any more", old.pid),
    }
}

/// What was done, in one sentence.
fn summary(before: &Report, after: &Report) -> String {
    let daemon = |report: &Report| {
        let pid = report.process.as_ref().map_or(0, |process| process.pid);
        format!("virtionetd {} (process {pid})", report.version)
    };
    let devices = match after.devices.len() {
        1 => "1 device, which was".into(),
        count => format!("{count} devices, which were"),
    };
    let taken_over = after.process.as_ref().and_then(|p| p.taken_over.as_ref());
    let paused_for = taken_over.map_or(Duration::ZERO, |taken_over| {
        Duration::from_micros(taken_over.paused_us)
    });
    format!(
        "{} has taken over from {}: {devices} paused for {paused_for:.1?}",
        daemon(after),
        daemon(before)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtionet_control::v1::TakeOverReport;

    fn report(pid: u32, devices: usize) -> Report {
        let device = serde_json::json!({
            "name": "web", "socket": "/run/web.sock", "role": "server", "connected": false,
            "frontend": null, "memory": [], "uplink": {"kind": "null", "name": ""}, "mtu": null,
            "warnings": [], "advice": [], "pairs": [],
            "interrupts": {"mode": "off", "settings": [], "notes": []},
        });
        let mut report: Report = serde_json::from_value(serde_json::json!({
            "version": "0.1.0", "devices": vec![device; devices],
        }))
        .unwrap();
        report.process = Some(ProcessReport {
            pid,
            arguments: Some(vec!["--config".into(), "/etc/v.toml".into()]),
            directory: Some("/".into()),
            handover_socket: Some("/run/handover".into()),
            taken_over: None,
        });
        report
    }

    #[test]
    fn summary_is_one_sentence_with_versions_devices_and_pause() {
        for (devices, text) in [
            (1, "1 device, which was paused for 3.2ms"),
            (2, "2 devices, which were paused for 3.2ms"),
        ] {
            let mut after = report(9, devices);
            after.version = "0.2.0".into();
            after.process.as_mut().unwrap().taken_over = Some(TakeOverReport {
                version: "0.1.0".into(),
                paused_us: 3210,
            });
            let expected = format!(
                "virtionetd 0.2.0 (process 9) has taken over from virtionetd 0.1.0 (process 8): {text}"
            );
            assert_eq!(summary(&report(8, devices), &after), expected);
        }
    }

    #[test]
    fn daemon_without_a_successors_socket_or_a_process_report_is_refused() {
        let mut report = report(8, 1);
        assert_eq!(process_of(&report).unwrap().pid, 8);
        report.process.as_mut().unwrap().handover_socket = None;
        let error = process_of(&report).unwrap_err().to_string();
        assert!(error.contains("(process 8) has no socket"), "{error}");
        report.process = None;
        let error = process_of(&report).unwrap_err().to_string();
        assert!(
            error.contains("virtionetd 0.1.0 does not report"),
            "{error}"
        );
    }

    #[test]
    fn service_of_a_process_is_the_innermost_one() {
        for (cgroup, service) in [
            (
                "0::/system.slice/virtionetd.service\n",
                Some("virtionetd.service"),
            ),
            (
                "0::/system.slice/system-v.slice/v@1.service/.control\n",
                Some("v@1.service"),
            ),
            ("0::/user.slice/user-0.slice/session-1.scope\n", None),
            (
                "0::/user.slice/user-7.slice/user@7.service/app.slice/t.scope\n",
                None,
            ),
            ("0::/\n", None),
            ("", None),
            (
                "12:cpu,cpuacct:/x.service\n1:name=systemd:/system.slice/a.service\n0::/\n",
                Some("a.service"),
            ),
            ("12:cpu,cpuacct:/x.service\n1:name=systemd:/\n", None),
        ] {
            assert_eq!(service_of(cgroup), service, "{cgroup}");
        }
    }

    #[test]
    fn program_that_cannot_be_started_is_named() {
        let report = report(8, 1);
        let program = Some(PathBuf::from("/nowhere/virtionetd"));
        let error = start(report.process.as_ref().unwrap(), program, Vec::new());
        let error = error.unwrap_err().to_string();
        assert!(
            error.starts_with("/nowhere/virtionetd cannot be started"),
            "{error}"
        );
    }

    #[test]
    fn command_line_that_is_not_reported_must_be_given() {
        let mut report = report(8, 1);
        let process = report.process.as_mut().unwrap();
        process.arguments = None;
        let error = start(process, None, Vec::new()).unwrap_err().to_string();
        let expected = "virtionetd (process 8) cannot report its arguments, because they are not UTF-8: give them behind --";
        assert_eq!(error, expected);
    }
}
