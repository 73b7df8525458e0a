//! virtionetd as a process: starting it, querying it over its control socket, and stopping it.

use std::ffi::{OsStr, OsString};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::http;
use crate::netns::Netns;
use crate::paths::{self, RunDir};
use crate::process::Proc;

const START_TIMEOUT: Duration = Duration::from_secs(10);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The options with which a daemon is started.
#[derive(Clone, Debug)]
pub struct Options {
    netns: Option<String>,
    program: Option<PathBuf>,
    wrapper: Vec<OsString>,
    has_socket: bool,
    is_listening: bool,
    control: Option<PathBuf>,
    log_name: Option<String>,
    args: Vec<OsString>,
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}

impl Options {
    /// Starts the daemon with `--socket-path` and `--control` in the run's directory, and without
    /// further arguments.
    pub fn new() -> Self {
        Self {
            netns: None,
            program: None,
            wrapper: Vec::new(),
            has_socket: true,
            is_listening: true,
            control: None,
            log_name: None,
            args: Vec::new(),
        }
    }

    /// Adds `--take-over`: the daemon takes the sockets and devices of one that runs. Its log has
    /// the name `log_name`, because that of the other one is still written.
    #[must_use]
    pub fn take_over(mut self, log_name: &str) -> Self {
        self.log_name = Some(log_name.to_owned());
        self.arg("--take-over")
    }

    /// Runs the daemon in this network namespace, so that it opens its TAP there. The namespace
    /// does not affect its Unix sockets.
    #[must_use]
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.name().to_owned());
        self
    }

    /// Adds `--client`: QEMU listens on the socket, and the daemon connects to it.
    #[must_use]
    pub fn client(mut self) -> Self {
        self.is_listening = false;
        self.arg("--client")
    }

    /// Omits `--socket-path`, for a daemon whose `--fd` or `--device` says where front-ends
    /// connect.
    #[must_use]
    pub fn no_socket(mut self) -> Self {
        self.has_socket = false;
        self.is_listening = false;
        self
    }

    /// Uses the arguments of this command line, whose first word is the program's name. The command
    /// line must name `control` as the control socket.
    #[must_use]
    pub fn command(mut self, words: &[String], control: &Path) -> Self {
        let words = words.iter().skip(1).map(OsString::from);
        self.args.extend(words);
        self.control = Some(control.to_owned());
        self.no_socket()
    }

    /// Starts the daemon through this command, such as `setpriv` with its flags. The command runs
    /// in the daemon's namespace.
    #[must_use]
    pub fn wrapped_in<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.wrapper.extend(words.into_iter().map(OsString::from));
        self
    }

    /// Starts this program instead of [`paths::virtionetd`].
    #[must_use]
    pub fn program(mut self, path: &Path) -> Self {
        self.program = Some(path.to_owned());
        self
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds a flag and its value.
    #[must_use]
    pub fn flag(self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self.arg(flag).arg(value)
    }

    /// Starts the daemon and waits, for at most 10 s, until its sockets accept connections. Its
    /// sockets and its log are files in `dir` whose names begin with `name`.
    ///
    /// # Errors
    /// When the daemon exits, or does not create its sockets in time. The error contains its log.
    pub fn start(&self, dir: &RunDir, name: &str) -> Result<Daemon> {
        let mut daemon = self.spawn(dir, name)?;
        // The daemon would take a connection to the vhost-user socket for a front-end.
        if self.is_listening {
            daemon.wait_for("its vhost-user socket", |d| d.socket.exists())?;
        }
        daemon.wait_for("its control socket", |d| {
            UnixStream::connect(&d.control).is_ok()
        })?;
        Ok(daemon)
    }

    /// Starts a daemon that is expected to exit, and waits for its exit for at most 10 s.
    ///
    /// # Errors
    /// When it does not exit in time.
    pub fn run_to_end(&self, dir: &RunDir, name: &str) -> Result<DaemonExit> {
        let started_at = Instant::now();
        let mut proc = self.spawn(dir, name)?.proc;
        let status = proc.wait(STOP_TIMEOUT)?;
        Ok(DaemonExit {
            status,
            duration: started_at.elapsed(),
            stderr: proc.stderr(),
        })
    }

    fn spawn(&self, dir: &RunDir, name: &str) -> Result<Daemon> {
        let socket = dir.join(&format!("{name}.sock"));
        let control = match &self.control {
            Some(path) => path.clone(),
            None => dir.join(&format!("{name}.control")),
        };
        let program = match &self.program {
            Some(path) => path.clone(),
            None => paths::virtionetd()?,
        };
        let mut words = self.wrapper.clone();
        words.push(program.into());
        if self.control.is_none() {
            words.extend(["--control".into(), control.clone().into()]);
        }
        if self.has_socket {
            words.extend(["--socket-path".into(), socket.clone().into()]);
        }
        if self.control.is_none() {
            words.extend(["--state-dir".into(), dir.join("state").into()]);
        }
        words.extend(self.args.iter().cloned());
        let (program, args) = words.split_first().context("the command is empty")?;
        let log_name = self.log_name.as_deref().unwrap_or(name);
        Ok(Daemon {
            proc: Proc::spawn(dir, log_name, self.netns.as_deref(), program, args)?,
            socket,
            control,
        })
    }
}

/// A running daemon. Dropping this value kills it.
#[derive(Debug)]
pub struct Daemon {
    proc: Proc,
    socket: PathBuf,
    control: PathBuf,
}

/// The exit of a daemon.
#[derive(Debug)]
pub struct DaemonExit {
    /// The exit status.
    pub status: ExitStatus,
    /// The time from the signal to the exit, or from the start if no signal was sent.
    pub duration: Duration,
    /// Everything that the daemon wrote to its standard error.
    pub stderr: String,
}

impl Daemon {
    /// The path of the vhost-user socket, which does not exist after [`Options::no_socket`].
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The path of the control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.proc.pid()
    }

    /// The process.
    pub fn proc(&mut self) -> &mut Proc {
        &mut self.proc
    }

    /// Everything that the daemon has written to its standard error so far.
    pub fn stderr(&self) -> String {
        self.proc.stderr()
    }

    /// Sends `GET target` to the control socket and parses the response as JSON.
    ///
    /// # Errors
    /// When the status is not 200, or the body is not JSON.
    pub fn get(&self, target: &str) -> Result<Value> {
        let text = self.get_text(target)?;
        serde_json::from_str(&text)
            .with_context(|| format!("the response to GET {target} is not JSON: {text}"))
    }

    /// Sends `GET target` to the control socket and returns the response as text.
    ///
    /// # Errors
    /// When the status is not 200.
    pub fn get_text(&self, target: &str) -> Result<String> {
        let response = http::request(&self.control, "GET", target, "")?;
        ensure!(
            response.status == 200,
            "GET {target} returned status {}: {}",
            response.status,
            response.body
        );
        Ok(response.body)
    }

    /// Returns the first device of `GET /v1/devices`.
    ///
    /// # Errors
    /// When there is no device.
    pub fn device(&self) -> Result<Value> {
        let mut all = self.get("/v1/devices")?;
        let device = all["devices"][0].take();
        ensure!(device.is_object(), "the daemon reports no device: {all}");
        Ok(device)
    }

    /// Reads the first device until `is_done` returns true, and returns the device. `state`
    /// describes the expected state for the error, as in "the device is not `state`".
    ///
    /// # Errors
    /// When the daemon exits, or the state is not reached within `timeout`. The error contains the
    /// last state of the device.
    pub fn wait_for_device(
        &mut self,
        state: &str,
        timeout: Duration,
        is_done: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let until = Instant::now() + timeout;
        loop {
            self.proc.check_alive()?;
            let device = self.device()?;
            if is_done(&device) {
                return Ok(device);
            }
            ensure!(
                Instant::now() < until,
                "the device is not {state} after {timeout:?}: {device}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Sends `signal` and waits for the exit for at most 10 s.
    ///
    /// # Errors
    /// When the daemon has exited before the signal, or does not exit in time.
    pub fn stop(mut self, signal: Signal) -> Result<DaemonExit> {
        self.stop_in_place(signal)
    }

    /// Does the same as [`Daemon::stop`], but keeps the value, so that the caller can still read
    /// the daemon's paths.
    ///
    /// # Errors
    /// When the daemon has exited before the signal, or does not exit in time.
    pub fn stop_in_place(&mut self, signal: Signal) -> Result<DaemonExit> {
        let started_at = Instant::now();
        self.proc.signal(signal)?;
        let status = self.proc.wait(STOP_TIMEOUT)?;
        Ok(DaemonExit {
            status,
            duration: started_at.elapsed(),
            stderr: self.proc.stderr(),
        })
    }

    fn wait_for(&mut self, socket: &str, is_ready: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + START_TIMEOUT;
        while !is_ready(self) {
            self.proc.check_alive()?;
            ensure!(
                Instant::now() < until,
                "virtionetd did not open {socket} within {START_TIMEOUT:?}; its stderr: {}",
                self.proc.stderr().trim()
            );
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
