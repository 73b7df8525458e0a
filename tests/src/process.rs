//! Child processes that end with this process, and whose output goes to files.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cleanup::{self, Action, Entry};
use crate::paths::RunDir;

const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A running child process. It is killed when this value is dropped, when a signal ends this
/// process, and by the kernel when the thread that started it exits. Start it from a thread that
/// outlives it.
#[derive(Debug)]
pub struct Proc {
    child: Child,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
    entry: Option<Entry>,
}

impl Proc {
    /// Starts `program`, in the network namespace `netns` if that is given. The output goes to the
    /// files `NAME.stdout` and `NAME.stderr` in `dir`.
    ///
    /// # Errors
    /// When the process or its files cannot be created.
    pub fn spawn<S: AsRef<OsStr>>(
        dir: &RunDir,
        name: &str,
        netns: Option<&str>,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let stdout = dir.join(&format!("{name}.stdout"));
        let stderr = dir.join(&format!("{name}.stderr"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if let Some(netns) = netns {
            command.args(["ip", "netns", "exec", netns]);
        }
        command
            .arg(program)
            .args(args)
            .env("LC_ALL", "C")
            // As under systemd, so that a daemon leaves no state in a folder of the host.
            .env("RUNTIME_DIRECTORY", dir.join("state"))
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?);
        let child = command
            .spawn()
            .with_context(|| format!("{name} cannot be started: install setpriv (util-linux)"))?;
        let pid = i32::try_from(child.id())?;
        Ok(Self {
            child,
            name: name.to_owned(),
            stdout,
            stderr,
            entry: Some(cleanup::register(Action::Kill(pid))),
        })
    }

    /// The process id. It is also that of the program, because setpriv and ip replace themselves by
    /// it (exec).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns everything that the process has written to its standard output so far.
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// Returns everything that the process has written to its standard error so far.
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Returns the exit status if the process has exited.
    ///
    /// # Errors
    /// When the state of the process cannot be read.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            self.entry = None;
        }
        Ok(status)
    }

    /// Waits until the process exits.
    ///
    /// # Errors
    /// When the process does not exit within `timeout`. The error contains the end of its standard
    /// error.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let started_at = Instant::now();
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if started_at.elapsed() > timeout {
                bail!(
                    "{} (pid {}) did not exit within {timeout:?}; its stderr: {}",
                    self.name,
                    self.pid(),
                    tail(&self.stderr())
                );
            }
            sleep(POLL_INTERVAL);
        }
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// When the process has exited already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(status) = self.try_wait()? {
            bail!("{} exited ({status}) before {signal}", self.name);
        }
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?;
        Ok(())
    }

    /// Checks that the process still runs.
    ///
    /// # Errors
    /// When the process has exited. The error contains its status and the end of its standard
    /// error.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.try_wait()? {
            None => Ok(()),
            Some(status) => bail!(
                "{} exited unexpectedly ({status}): {}",
                self.name,
                tail(&self.stderr())
            ),
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // An error means that the process has exited already.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Runs a command, waits for it and returns its standard output.
///
/// # Errors
/// When the command cannot be started or fails. The error contains its standard error.
pub fn output<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<String> {
    let args: Vec<OsString> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let out = Command::new(program)
        .args(&args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} cannot be run: run ci/setup, which installs it"))?;
    if !out.status.success() {
        bail!(
            "'{program} {}' failed ({}): {}",
            args.join(OsStr::new(" ")).display(),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn read(path: &PathBuf) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// Returns the last 8 lines of `text`, joined for an error message.
pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(8);
    let joined = lines.get(from..).unwrap_or_default().join(" | ");
    if joined.is_empty() {
        "(nothing)".to_owned()
    } else {
        joined
    }
}
