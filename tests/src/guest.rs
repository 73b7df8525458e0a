//! The root shell of a guest, which `ci/guest-init` provides on the serial line. This side writes a
//! line `NONCE COMMAND`; the guest writes the command's output and a line `@@RC NONCE EXITCODE`.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process::tail;

/// The time that [`Guest::ok`] allows for a command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// The output and the exit code of a command in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandOutput {
    /// Standard output and standard error, in the order in which they arrived.
    pub text: String,
    /// The exit code.
    pub exit_code: i32,
}

/// The shell of a guest. It runs one command at a time; [`Guest::spawn`] starts a command in the
/// background.
#[derive(Debug)]
pub struct Guest {
    line: Mutex<UnixStream>,
    serial: Arc<Serial>,
    next: AtomicU64,
}

impl Guest {
    /// Takes the connected serial line and starts a thread that reads it.
    ///
    /// # Errors
    /// When the socket cannot be duplicated, or the thread cannot be started.
    pub fn new(line: UnixStream) -> Result<Self> {
        let serial = Arc::new(Serial::default());
        let reader = line.try_clone()?;
        let reader_serial = Arc::clone(&serial);
        thread::Builder::new()
            .name("guest-serial".into())
            .spawn(move || reader_serial.read_all(reader))?;
        Ok(Self {
            line: Mutex::new(line),
            serial,
            next: AtomicU64::new(0),
        })
    }

    /// Waits until the guest reports that it has booted. Call this once for each boot.
    ///
    /// # Errors
    /// When the guest does not report within `timeout`. The error contains the last lines of its
    /// console.
    pub fn wait_boot(&self, timeout: Duration) -> Result<()> {
        self.serial
            .read_past("@@READY ", timeout)
            .context("the guest did not boot")?;
        Ok(())
    }

    /// Runs `command` with `sh -c` and returns its output and its exit code.
    ///
    /// # Errors
    /// When the command does not exit within `timeout`, or the serial line is closed.
    pub fn run(&self, command: &str, timeout: Duration) -> Result<CommandOutput> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let nonce = self.send(&mut line, command)?;
        let marker = format!("\n@@RC {nonce} ");
        let (text, exit_code) = self
            .serial
            .read_past(&marker, timeout)
            .with_context(|| format!("the guest did not finish '{command}'"))?;
        Ok(CommandOutput {
            text,
            exit_code: exit_code.trim().parse().with_context(|| {
                format!("the exit code of '{command}' is not a number: {exit_code:?}")
            })?,
        })
    }

    /// Runs `command`, which must succeed within [`COMMAND_TIMEOUT`], and returns its output.
    ///
    /// # Errors
    /// When the command fails or does not exit in time. The error contains the end of its output.
    pub fn ok(&self, command: &str) -> Result<String> {
        let output = self.run(command, COMMAND_TIMEOUT)?;
        ensure!(
            output.exit_code == 0,
            "'{command}' failed in the guest with code {}: {}",
            output.exit_code,
            tail(&output.text)
        );
        Ok(output.text)
    }

    /// Starts `command` in the background. Its output is written to a file in the guest.
    ///
    /// # Errors
    /// When the guest's shell does not answer.
    pub fn spawn(&self, command: &str) -> Result<BackgroundCommand<'_>> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let file = format!("/tmp/job.{n}");
        let script = format!("({command}) >{file} 2>&1; echo $? >{file}.code");
        // In a session of its own, the command can be killed with all processes that it started.
        let pid = self.ok(&format!("setsid sh -c {} & echo $!", quote(&script)))?;
        let pid = pid.trim();
        Ok(BackgroundCommand {
            guest: self,
            pid: pid
                .parse()
                .with_context(|| format!("the process id in the guest is '{pid}', not a number"))?,
            file,
        })
    }

    /// Reboots the guest and waits until it has booted.
    ///
    /// # Errors
    /// When the guest does not boot within `timeout`.
    pub fn reboot(&self, timeout: Duration) -> Result<()> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        self.send(&mut line, "reboot -f")?;
        drop(line);
        self.wait_boot(timeout)
    }

    /// Returns everything that the guest has written to its console since the machine was started.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.serial.state().bytes).into_owned()
    }

    fn send(&self, line: &mut UnixStream, command: &str) -> Result<u64> {
        ensure!(
            !command.contains('\n') && !command.trim().is_empty(),
            "a guest command must be one line that is not empty, but this is {command:?}: join the lines with ';'"
        );
        let nonce = self.next.fetch_add(1, Ordering::Relaxed);
        writeln!(line, "{nonce} {command}").context("the guest's serial line is closed")?;
        Ok(nonce)
    }
}

/// A command that runs in the background of the guest.
#[derive(Debug)]
pub struct BackgroundCommand<'a> {
    guest: &'a Guest,
    pid: u32,
    file: String,
}

impl BackgroundCommand<'_> {
    /// The process id of the command in the guest, which is also the id of its session.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns what the command has written so far.
    ///
    /// # Errors
    /// When the guest's shell does not answer.
    pub fn text(&self) -> Result<String> {
        self.guest.ok(&format!("cat {}", self.file))
    }

    /// Waits until the command exits.
    ///
    /// # Errors
    /// When the command does not exit within `timeout`.
    pub fn wait(&self, timeout: Duration) -> Result<CommandOutput> {
        let file = &self.file;
        let wait = format!("until [ -s {file}.code ]; do sleep 0.1; done; cat {file}.code");
        let exit_code = self.guest.run(&wait, timeout)?;
        Ok(CommandOutput {
            text: self.text()?,
            exit_code: exit_code.text.trim().parse()?,
        })
    }

    /// Kills the command and all processes that it started.
    ///
    /// # Errors
    /// When the guest's shell does not answer.
    pub fn kill(&self) -> Result<()> {
        self.guest
            .ok(&format!("kill -9 -{0} 2>/dev/null || true", self.pid))?;
        Ok(())
    }
}

/// Quotes `text` as one word for a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The bytes that were received on the serial line.
#[derive(Debug, Default)]
struct Serial {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// The number of bytes that have been returned to callers.
    consumed: usize,
    is_closed: bool,
}

impl Serial {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the line is closed. The guest would block in its writes if nothing read the
    /// line.
    fn read_all(&self, mut line: UnixStream) {
        let mut chunk = [0; 16384];
        loop {
            let read = line.read(&mut chunk);
            let mut state = self.state();
            match read {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => state.is_closed = true,
                Ok(n) => state
                    .bytes
                    .extend_from_slice(chunk.get(..n).unwrap_or_default()),
            }
            let is_closed = state.is_closed;
            drop(state);
            self.changed.notify_all();
            if is_closed {
                return;
            }
        }
    }

    /// Waits for a complete line with `marker`. Returns the text before the marker and the rest of
    /// its line.
    fn read_past(&self, marker: &str, timeout: Duration) -> Result<(String, String)> {
        let until = Instant::now() + timeout;
        let mut state = self.state();
        let mut scanned = state.consumed;
        loop {
            if let Some(at) = state.position(marker.as_bytes(), scanned) {
                if let Some(found) = state.take_line(at, marker.len()) {
                    return Ok(found);
                }
                // The rest of the marker's line has not arrived yet.
                scanned = at;
            } else {
                // The buffer may end with a part of the marker.
                let len = state.bytes.len();
                scanned = scanned.max(len.saturating_sub(marker.len()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.is_closed || left.is_zero() {
                let reason = if state.is_closed {
                    "its serial line was closed".to_owned()
                } else {
                    format!("it did not answer within {timeout:?}")
                };
                let unread = state.bytes.get(state.consumed..).unwrap_or_default();
                bail!(
                    "{reason}; its last output was: {}",
                    tail(&String::from_utf8_lossy(unread))
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
        let unscanned = self.bytes.get(from..)?;
        let at = unscanned.windows(marker.len()).position(|w| w == marker)?;
        Some(from + at)
    }

    /// Returns the text before the marker at `at`, and the rest of the marker's line. Returns
    /// `None` until the line is complete.
    fn take_line(&mut self, at: usize, marker_len: usize) -> Option<(String, String)> {
        let rest = self.bytes.get(at + marker_len..)?;
        let end = rest.iter().position(|b| *b == b'\n')?;
        let before = self.bytes.get(self.consumed..at)?;
        let found = (
            String::from_utf8_lossy(before).into_owned(),
            String::from_utf8_lossy(rest.get(..end)?).into_owned(),
        );
        self.consumed = at + marker_len + end + 1;
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// Returns a guest and the other end of its serial line.
    fn guest_with_line() -> (Guest, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Guest::new(ours).unwrap(), theirs)
    }

    #[test]
    fn output_that_arrives_in_several_reads_is_joined() {
        let (guest, mut line) = guest_with_line();
        let writer = thread::spawn(move || {
            for part in [
                "boot\n@@REA",
                "DY 3.0 6.1.0-56-cloud-",
                "amd64\none\nt",
                "wo\n@@RC",
                " 0 ",
                "7",
                "\n",
            ] {
                line.write_all(part.as_bytes()).unwrap();
                thread::sleep(Duration::from_millis(10));
            }
            line
        });
        guest.wait_boot(TIMEOUT).unwrap();
        let output = guest.run("x", TIMEOUT).unwrap();
        assert_eq!(output.text, "one\ntwo");
        assert_eq!(output.exit_code, 7);
        writer.join().unwrap();
    }

    #[test]
    fn error_of_a_closed_line_contains_the_last_output() {
        let (guest, mut line) = guest_with_line();
        line.write_all(b"Kernel panic\n").unwrap();
        drop(line);
        let error = format!("{:#}", guest.wait_boot(TIMEOUT).unwrap_err());
        assert!(
            error.contains("closed") && error.contains("Kernel panic"),
            "{error}"
        );
    }

    #[test]
    fn command_with_two_lines_or_no_words_is_rejected() {
        let (guest, _line) = guest_with_line();
        assert!(guest.run("a\nb", TIMEOUT).is_err());
        assert!(guest.run(" ", TIMEOUT).is_err());
    }

    #[test]
    fn quote_escapes_single_quotes() {
        assert_eq!(quote("a'b"), r"'a'\''b'");
    }
}
