//! A child process that cannot be left behind, with its output in files.

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

const POLL: Duration = Duration::from_millis(5);

/// A running child. It is killed when dropped, on SIGINT, and by the kernel
/// when *the thread that started it* ends: start it from a thread that stays.
#[derive(Debug)]
pub struct Proc {
    child: Child,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
    entry: Option<Entry>,
}

impl Proc {
    /// Starts `program`, in the namespace called `netns` if given; its output goes to `NAME.stdout`
    /// and `NAME.stderr` in `dir`.
    ///
    /// # Errors
    /// When the process or its files cannot be made.
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
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?);
        let child = command
            .spawn()
            .with_context(|| format!("{name} cannot be started: is setpriv (util-linux) there?"))?;
        let pid = i32::try_from(child.id())?;
        Ok(Self {
            child,
            name: name.to_owned(),
            stdout,
            stderr,
            entry: Some(cleanup::register(Action::Kill(pid))),
        })
    }

    /// The process id; also that of the program itself, as all wrappers exec.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            self.entry = None;
        }
        Ok(status)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended in `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let started_at = Instant::now();
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if started_at.elapsed() > timeout {
                bail!(
                    "{} (pid {}) did not end in {timeout:?}; its stderr: {}",
                    self.name,
                    self.pid(),
                    tail(&self.stderr())
                );
            }
            sleep(POLL);
        }
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(status) = self.try_wait()? {
            bail!("{} has ended ({status}) before {signal}", self.name);
        }
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?;
        Ok(())
    }

    /// An error that says how it ended, if it did.
    ///
    /// # Errors
    /// When it is no longer running: with its status and the end of its stderr.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.try_wait()? {
            None => Ok(()),
            Some(status) => bail!(
                "{} ended early ({status}): {}",
                self.name,
                tail(&self.stderr())
            ),
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // An error here means that it is gone, which is what is wanted.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Runs a short command to its end and returns its standard output.
///
/// # Errors
/// When it cannot be started or exits with another code than 0: with its words.
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

/// The last lines of `text`, short enough for an error.
pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(8);
    let short = lines.get(from..).unwrap_or_default().join(" | ");
    if short.is_empty() {
        "(nothing)".to_owned()
    } else {
        short
    }
}
