//! The guest's root shell on its serial line, as `ci/guest-init` serves it:
//! a line `NONCE COMMAND` goes in, the command's output and a line
//! `@@RC NONCE EXITCODE` come back.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process::tail;

/// How long [`Guest::ok`] waits for a command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// How a command in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Standard output and standard error, as they came.
    pub text: String,
    /// The exit code.
    pub code: i32,
}

/// A guest's shell. Commands run one at a time; [`Guest::spawn`] puts one in
/// the background.
#[derive(Debug)]
pub struct Guest {
    line: Mutex<UnixStream>,
    serial: Arc<Serial>,
    next: AtomicU64,
}

impl Guest {
    /// Takes over the connected serial line and starts to read it.
    ///
    /// # Errors
    /// When the socket cannot be shared with the reading thread.
    pub fn new(line: UnixStream) -> Result<Self> {
        let serial = Arc::new(Serial::default());
        let reader = line.try_clone()?;
        let end = Arc::clone(&serial);
        thread::Builder::new()
            .name("guest-serial".into())
            .spawn(move || end.fill(reader))?;
        Ok(Self {
            line: Mutex::new(line),
            serial,
            next: AtomicU64::new(0),
        })
    }

    /// Waits until the guest says that it is up, once for each boot.
    ///
    /// # Errors
    /// When it does not within `timeout`: with the last lines of its console.
    pub fn wait_boot(&self, timeout: Duration) -> Result<()> {
        self.serial
            .read_past("@@READY ", timeout)
            .context("the guest did not boot")?;
        Ok(())
    }

    /// Runs `command` with `sh -c` and returns how it ended.
    ///
    /// # Errors
    /// When it has not ended in `timeout`, or the guest is gone.
    pub fn run(&self, command: &str, timeout: Duration) -> Result<Output> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let nonce = self.send(&mut line, command)?;
        let marker = format!("\n@@RC {nonce} ");
        let (text, code) = self
            .serial
            .read_past(&marker, timeout)
            .with_context(|| format!("the guest did not finish '{command}'"))?;
        Ok(Output {
            text,
            code: code
                .trim()
                .parse()
                .with_context(|| format!("'{command}' ended with no number: {code:?}"))?,
        })
    }

    /// Runs `command`, which has to succeed in a minute; returns its output.
    ///
    /// # Errors
    /// When it fails: with its words.
    pub fn ok(&self, command: &str) -> Result<String> {
        let out = self.run(command, COMMAND_TIMEOUT)?;
        ensure!(
            out.code == 0,
            "'{command}' failed in the guest with code {}: {}",
            out.code,
            tail(&out.text)
        );
        Ok(out.text)
    }

    /// Starts `command` in the background; its output goes to a file.
    ///
    /// # Errors
    /// When the guest's shell does not answer.
    pub fn spawn(&self, command: &str) -> Result<Background<'_>> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let file = format!("/tmp/job.{n}");
        let script = format!("({command}) >{file} 2>&1; echo $? >{file}.code");
        // A session of its own, so that all of it can be killed.
        let pid = self.ok(&format!("setsid sh -c {} & echo $!", quote(&script)))?;
        let pid = pid.trim();
        Ok(Background {
            guest: self,
            pid: pid
                .parse()
                .with_context(|| format!("the guest gave '{pid}' as a process id"))?,
            file,
        })
    }

    /// Reboots the guest and waits until it is up again.
    ///
    /// # Errors
    /// When it is not up within `timeout`.
    pub fn reboot(&self, timeout: Duration) -> Result<()> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        self.send(&mut line, "reboot -f")?;
        drop(line);
        self.wait_boot(timeout)
    }

    /// All that the console has shown since the machine was started.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.serial.state().bytes).into_owned()
    }

    fn send(&self, line: &mut UnixStream, command: &str) -> Result<u64> {
        ensure!(
            !command.contains('\n') && !command.trim().is_empty(),
            "a guest command is one line that is not empty, but this was {command:?}: join the lines with ';'"
        );
        let nonce = self.next.fetch_add(1, Ordering::Relaxed);
        writeln!(line, "{nonce} {command}").context("the guest's serial line is closed")?;
        Ok(nonce)
    }
}

/// A command in the guest's background.
#[derive(Debug)]
pub struct Background<'a> {
    guest: &'a Guest,
    pid: u32,
    file: String,
}

impl Background<'_> {
    /// Its process id in the guest, which is that of its session.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it has written so far.
    ///
    /// # Errors
    /// When the guest's shell does not answer.
    pub fn text(&self) -> Result<String> {
        self.guest.ok(&format!("cat {}", self.file))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended in `timeout`.
    pub fn wait(&self, timeout: Duration) -> Result<Output> {
        let file = &self.file;
        let wait = format!("until [ -s {file}.code ]; do sleep 0.1; done; cat {file}.code");
        let code = self.guest.run(&wait, timeout)?;
        Ok(Output {
            text: self.text()?,
            code: code.text.trim().parse()?,
        })
    }

    /// Kills it and all that it started.
    ///
    /// # Errors
    /// When the guest's shell does not answer.
    pub fn kill(&self) -> Result<()> {
        self.guest
            .ok(&format!("kill -9 -{0} 2>/dev/null || true", self.pid))?;
        Ok(())
    }
}

/// `text` as one word of a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// What came over the line, and up to where it has been taken.
#[derive(Debug, Default)]
struct Serial {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    consumed: usize,
    closed: bool,
}

impl Serial {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the line is closed. A guest whose line nobody reads would
    /// stall in its writes.
    fn fill(&self, mut line: UnixStream) {
        let mut chunk = [0; 16384];
        loop {
            let read = line.read(&mut chunk);
            let mut state = self.state();
            match read {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => state.closed = true,
                Ok(n) => state
                    .bytes
                    .extend_from_slice(chunk.get(..n).unwrap_or_default()),
            }
            let closed = state.closed;
            drop(state);
            self.changed.notify_all();
            if closed {
                return;
            }
        }
    }

    /// Waits for `marker` with the rest of its line; returns what stood before
    /// it and that rest.
    fn read_past(&self, marker: &str, timeout: Duration) -> Result<(String, String)> {
        let until = Instant::now() + timeout;
        let mut state = self.state();
        let mut scanned = state.consumed;
        loop {
            if let Some(at) = state.position(marker.as_bytes(), scanned) {
                if let Some(found) = state.take_line(at, marker.len()) {
                    return Ok(found);
                }
                // The rest of the marker's line is still on its way.
                scanned = at;
            } else {
                // The marker itself may have come in part.
                let len = state.bytes.len();
                scanned = scanned.max(len.saturating_sub(marker.len()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                let why = if state.closed {
                    "its serial line was closed".to_owned()
                } else {
                    format!("{timeout:?} went by")
                };
                let seen = state.bytes.get(state.consumed..).unwrap_or_default();
                bail!(
                    "{why}; it had said: {}",
                    tail(&String::from_utf8_lossy(seen))
                );
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl State {
    fn position(&self, marker: &[u8], from: usize) -> Option<usize> {
        let fresh = self.bytes.get(from..)?;
        let at = fresh.windows(marker.len()).position(|w| w == marker)?;
        Some(from + at)
    }

    /// What stands before the marker at `at`, and the rest of its line, once
    /// that is there.
    fn take_line(&mut self, at: usize, marker: usize) -> Option<(String, String)> {
        let rest = self.bytes.get(at + marker..)?;
        let end = rest.iter().position(|b| *b == b'\n')?;
        let before = self.bytes.get(self.consumed..at)?;
        let found = (
            String::from_utf8_lossy(before).into_owned(),
            String::from_utf8_lossy(rest.get(..end)?).into_owned(),
        );
        self.consumed = at + marker + end + 1;
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (Guest, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Guest::new(ours).unwrap(), theirs)
    }

    #[test]
    fn an_answer_in_pieces_is_put_together() {
        let (guest, mut far) = pair();
        let end = thread::spawn(move || {
            for piece in [
                "boot\n@@REA",
                "DY 3.0 6.1.0-56-cloud-",
                "amd64\none\nt",
                "wo\n@@RC",
                " 0 ",
                "7",
                "\n",
            ] {
                far.write_all(piece.as_bytes()).unwrap();
                thread::sleep(Duration::from_millis(10));
            }
            far
        });
        guest.wait_boot(SOON).unwrap();
        let out = guest.run("x", SOON).unwrap();
        assert_eq!(out.text, "one\ntwo");
        assert_eq!(out.code, 7);
        end.join().unwrap();
    }

    #[test]
    fn a_closed_line_says_what_was_last_seen() {
        let (guest, mut far) = pair();
        far.write_all(b"Kernel panic\n").unwrap();
        drop(far);
        let error = format!("{:#}", guest.wait_boot(SOON).unwrap_err());
        assert!(
            error.contains("closed") && error.contains("Kernel panic"),
            "{error}"
        );
    }

    #[test]
    fn a_command_of_two_lines_is_refused() {
        let (guest, _far) = pair();
        assert!(guest.run("a\nb", SOON).is_err());
        assert!(guest.run(" ", SOON).is_err());
    }

    #[test]
    fn quotes_survive_quoting() {
        assert_eq!(quote("a'b"), r"'a'\''b'");
    }
}
