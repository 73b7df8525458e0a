//! virtionetd as a process: started, asked over its control socket, stopped.

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

const START: Duration = Duration::from_secs(10);
const STOP: Duration = Duration::from_secs(10);

/// How the daemon is to be started.
#[derive(Clone, Debug)]
pub struct Options {
    netns: Option<String>,
    program: Option<PathBuf>,
    wrapper: Vec<OsString>,
    own_socket: bool,
    listens: bool,
    control: Option<PathBuf>,
    args: Vec<OsString>,
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}

impl Options {
    /// With `--socket-path` and `--control` in the run's directory and nothing
    /// else.
    pub fn new() -> Self {
        Self {
            netns: None,
            program: None,
            wrapper: Vec::new(),
            own_socket: true,
            listens: true,
            control: None,
            args: Vec::new(),
        }
    }

    /// It runs in this network namespace, where its TAP then is. Its unix
    /// sockets are not affected.
    #[must_use]
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.name().to_owned());
        self
    }

    /// It connects to a QEMU that listens.
    #[must_use]
    pub fn client(mut self) -> Self {
        self.listens = false;
        self.arg("--client")
    }

    /// Without `--socket-path`: for `--fd` and `--device`, which say where front-ends come from.
    #[must_use]
    pub fn no_socket(mut self) -> Self {
        self.own_socket = false;
        self.listens = false;
        self
    }

    /// With the words of this command line, the program's name first, and nothing else; they name
    /// `control` as the control socket.
    #[must_use]
    pub fn command(mut self, words: &[String], control: &Path) -> Self {
        let words = words.iter().skip(1).map(OsString::from);
        self.args.extend(words);
        self.control = Some(control.to_owned());
        self.no_socket()
    }

    /// It is started through these words, such as `setpriv` with its flags, in its namespace.
    #[must_use]
    pub fn wrapped_in<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.wrapper.extend(words.into_iter().map(OsString::from));
        self
    }

    /// Another copy of the program than [`paths::virtionetd`]'s.
    #[must_use]
    pub fn program(mut self, path: &Path) -> Self {
        self.program = Some(path.to_owned());
        self
    }

    /// A further flag or value.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// A further flag and its value.
    #[must_use]
    pub fn flag(self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self.arg(flag).arg(value)
    }

    /// Starts it and waits until its sockets take connections.
    ///
    /// # Errors
    /// When it ends at once or its sockets do not come: with its words.
    pub fn start(&self, dir: &RunDir, name: &str) -> Result<Daemon> {
        let mut daemon = self.spawn(dir, name)?;
        // Connecting to the vhost-user socket would be taken for a front-end.
        if self.listens {
            daemon.wait_for("its vhost-user socket", |d| d.socket.exists())?;
        }
        daemon.wait_for("its control socket", |d| {
            UnixStream::connect(&d.control).is_ok()
        })?;
        Ok(daemon)
    }

    /// Starts it, where it is to refuse, and waits for its end, 10 s at most.
    ///
    /// # Errors
    /// When it does not end.
    pub fn run_to_end(&self, dir: &RunDir, name: &str) -> Result<Stopped> {
        let started_at = Instant::now();
        let mut proc = self.spawn(dir, name)?.proc;
        let status = proc.wait(STOP)?;
        Ok(Stopped {
            status,
            took: started_at.elapsed(),
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
        if self.own_socket {
            words.extend(["--socket-path".into(), socket.clone().into()]);
        }
        words.extend(self.args.iter().cloned());
        let (program, args) = words.split_first().context("an empty command")?;
        Ok(Daemon {
            proc: Proc::spawn(dir, name, self.netns.as_deref(), program, args)?,
            socket,
            control,
        })
    }
}

/// A running daemon; dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    proc: Proc,
    socket: PathBuf,
    control: PathBuf,
}

/// How the daemon ended.
#[derive(Debug)]
pub struct Stopped {
    /// Its exit status.
    pub status: ExitStatus,
    /// How long it took from the signal.
    pub took: Duration,
    /// All that it wrote to its standard error.
    pub stderr: String,
}

impl Daemon {
    /// The vhost-user socket; nothing is there after [`Options::no_socket`].
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.proc.pid()
    }

    /// The process.
    pub fn proc(&mut self) -> &mut Proc {
        &mut self.proc
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        self.proc.stderr()
    }

    /// GETs `target` from the control socket.
    ///
    /// # Errors
    /// When the answer is not 200, or its body is no JSON.
    pub fn get(&self, target: &str) -> Result<Value> {
        let text = self.get_text(target)?;
        serde_json::from_str(&text).with_context(|| format!("GET {target} gave no JSON: {text}"))
    }

    /// GETs `target` as text, such as the metrics.
    ///
    /// # Errors
    /// When the answer is not 200.
    pub fn get_text(&self, target: &str) -> Result<String> {
        let answer = http::request(&self.control, "GET", target, "")?;
        ensure!(
            answer.status == 200,
            "GET {target} gave {}: {}",
            answer.status,
            answer.body
        );
        Ok(answer.body)
    }

    /// The first device, as `GET /v1/devices` shows it.
    ///
    /// # Errors
    /// When there is none.
    pub fn device(&self) -> Result<Value> {
        let mut all = self.get("/v1/devices")?;
        let device = all["devices"][0].take();
        ensure!(device.is_object(), "the daemon shows no device: {all}");
        Ok(device)
    }

    /// Polls the first device until `done` holds.
    ///
    /// # Errors
    /// When it does not within `timeout`: with the device as it was last.
    pub fn wait_device(
        &mut self,
        what: &str,
        timeout: Duration,
        done: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let until = Instant::now() + timeout;
        loop {
            self.proc.check_alive()?;
            let device = self.device()?;
            if done(&device) {
                return Ok(device);
            }
            ensure!(
                Instant::now() < until,
                "the device is not {what} after {timeout:?}: {device}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Sends `signal` and waits for its end, 10 s at most.
    ///
    /// # Errors
    /// When it had ended before, or does not end.
    pub fn stop(mut self, signal: Signal) -> Result<Stopped> {
        self.end(signal)
    }

    /// The same for a daemon that another is to follow.
    ///
    /// # Errors
    /// When it had ended before, or does not end.
    pub fn end(&mut self, signal: Signal) -> Result<Stopped> {
        let started_at = Instant::now();
        self.proc.signal(signal)?;
        let status = self.proc.wait(STOP)?;
        Ok(Stopped {
            status,
            took: started_at.elapsed(),
            stderr: self.proc.stderr(),
        })
    }

    fn wait_for(&mut self, what: &str, is_ready: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + START;
        while !is_ready(self) {
            self.proc.check_alive()?;
            ensure!(
                Instant::now() < until,
                "virtionetd did not open {what} in {START:?}; its stderr: {}",
                self.proc.stderr().trim()
            );
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
