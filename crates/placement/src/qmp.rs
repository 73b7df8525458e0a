//! Asking QEMU for its vCPU threads over QMP.
//!
//! A session is short and read-only: the greeting, `qmp_capabilities`, then `query-cpus-fast` or
//! the commands of [`net_devices`]. QEMU may send events between any two messages; they are
//! skipped. A monitor serves one client at a time, so the socket must be one that no other program
//! (such as libvirt) keeps open. The whole session has one deadline and a limit on the bytes that
//! it reads.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::de::IoRead;
use serde_json::{Deserializer, StreamDeserializer, Value, json};

use virtionet_base::unix_socket;

pub(crate) mod net_devices;

/// The largest number of bytes read in one session; 4,096 vCPUs need about 1 MiB.
const MAX_BYTES: u64 = 4 << 20;

/// One vCPU as QEMU lists it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct CpuInfo {
    /// The vCPU's index.
    #[serde(rename = "cpu-index")]
    pub(crate) index: u32,
    /// Its thread's id in QEMU's PID namespace.
    #[serde(rename = "thread-id")]
    pub(crate) tid: i32,
}

/// Why QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No connection could be made.
    #[error("the QMP socket {} cannot be reached: {source}; start QEMU with -qmp unix:{},server=on,wait=off", .path.display(), .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Other clients are waiting for the monitor.
    #[error("the QMP socket {} has other clients waiting: give a monitor that nobody else uses", .0.display())]
    Busy(PathBuf),
    /// The answer did not arrive in time.
    #[error("QEMU did not answer {step} on {} within {timeout:?}: give a monitor that nobody else uses", .path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command that was running.
        step: &'static str,
        /// The time limit.
        timeout: Duration,
    },
    /// The other end closed the connection.
    #[error("{} closed the connection before it answered {step}: check that it is QEMU's QMP socket", .path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The command that was running.
        step: &'static str,
    },
    /// The answer is not in QMP's form.
    #[error("{} does not speak QMP ({what} in place of the answer to {step}): check that it is QEMU's QMP socket", .path.display())]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// The command that was running.
        step: &'static str,
        /// The answer, or why it cannot be parsed.
        what: String,
    },
    /// QEMU returned an error.
    #[error("QEMU at {} refused {step} ({what}): use QEMU 2.12 or later", .path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The command that was running.
        step: &'static str,
        /// QEMU's error.
        what: String,
    },
    /// Reading or writing failed.
    #[error("the connection to QEMU at {} failed at {step}: {source}; check that QEMU still runs", .path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The command that was running.
        step: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

impl QmpError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "qmp-unreachable",
            Self::Busy(_) => "qmp-busy",
            Self::Timeout { .. } => "qmp-timeout",
            Self::Closed { .. } => "qmp-closed",
            Self::Malformed { .. } => "qmp-malformed",
            Self::Refused { .. } => "qmp-command-refused",
            Self::Broken { .. } => "qmp-connection-failed",
        }
    }
}

/// QEMU's vCPUs and their threads, sorted by index, from the monitor at `path`. Takes at most
/// `timeout`.
pub(crate) fn query_vcpus(path: &Path, timeout: Duration) -> Result<Vec<CpuInfo>, QmpError> {
    let mut session = QmpSession::open(path, timeout)?;
    session.read_greeting()?;
    session.execute("qmp_capabilities")?;
    let answer = session.execute("query-cpus-fast")?;
    let mut vcpus: Vec<CpuInfo> = serde_json::from_value(answer)
        .map_err(|error| session.malformed("query-cpus-fast", error.to_string()))?;
    vcpus.sort_by_key(|vcpu| vcpu.index);
    Ok(vcpus)
}

/// One connection to a monitor.
struct QmpSession<'a> {
    path: &'a Path,
    timeout: Duration,
    deadline: Instant,
    stream: UnixStream,
    messages: StreamDeserializer<'static, IoRead<BufReader<BoundedReader>>, Value>,
}

impl<'a> QmpSession<'a> {
    fn open(path: &'a Path, timeout: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + timeout;
        let connect = |source| QmpError::Connect {
            path: path.into(),
            source,
        };
        let stream = unix_socket::connect(path).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => QmpError::Busy(path.into()),
            _ => connect(error),
        })?;
        let input = BoundedReader {
            stream: stream.try_clone().map_err(connect)?,
            deadline,
            bytes_left: MAX_BYTES,
        };
        let messages = Deserializer::from_reader(BufReader::new(input)).into_iter();
        Ok(Self {
            path,
            timeout,
            deadline,
            stream,
            messages,
        })
    }

    fn read_greeting(&mut self) -> Result<(), QmpError> {
        let step = "with its greeting";
        let message = self.next(step)?;
        match message.get("QMP") {
            Some(_) => Ok(()),
            None => Err(self.malformed(step, excerpt(&message))),
        }
    }

    /// Runs a command without arguments; its name serves as its id.
    fn execute(&mut self, command: &'static str) -> Result<Value, QmpError> {
        self.execute_with(command, &json!({}))
    }

    fn execute_with(
        &mut self,
        command: &'static str,
        arguments: &Value,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments)
            .map_err(|source| self.failed(command, source))?;
        loop {
            let mut message = self.next(command)?;
            if message.get("event").is_some() {
                continue;
            }
            if message.get("id").and_then(Value::as_str) != Some(command) {
                return Err(self.malformed(command, excerpt(&message)));
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            let what = message
                .pointer("/error/desc")
                .map_or_else(|| excerpt(&message), excerpt);
            return Err(QmpError::Refused {
                path: self.path.into(),
                step: command,
                what,
            });
        }
    }

    fn send(&mut self, command: &str, arguments: &Value) -> io::Result<()> {
        self.stream
            .set_write_timeout(Some(remaining(self.deadline)?))?;
        let mut request = json!({ "execute": command, "id": command });
        if arguments.as_object().is_some_and(|all| !all.is_empty()) {
            request["arguments"] = arguments.clone();
        }
        let line = format!("{request}\n");
        self.stream.write_all(line.as_bytes())
    }

    fn next(&mut self, step: &'static str) -> Result<Value, QmpError> {
        match self.messages.next() {
            Some(Ok(message)) => Ok(message),
            Some(Err(error)) if error.is_io() => Err(self.failed(step, error.into())),
            Some(Err(error)) if !error.is_eof() => Err(self.malformed(step, error.to_string())),
            _ => Err(QmpError::Closed {
                path: self.path.into(),
                step,
            }),
        }
    }

    fn failed(&self, step: &'static str, source: io::Error) -> QmpError {
        let path = self.path.into();
        match source.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => QmpError::Timeout {
                path,
                step,
                timeout: self.timeout,
            },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                QmpError::Closed { path, step }
            }
            _ => QmpError::Broken { path, step, source },
        }
    }

    fn malformed(&self, step: &'static str, what: String) -> QmpError {
        QmpError::Malformed {
            path: self.path.into(),
            step,
            what,
        }
    }
}

/// A reader of a socket that fails after a deadline or after a number of bytes.
struct BoundedReader {
    stream: UnixStream,
    deadline: Instant,
    bytes_left: u64,
}

impl Read for BoundedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream
            .set_read_timeout(Some(remaining(self.deadline)?))?;
        let read = self.stream.read(buffer)?;
        let left = u64::try_from(read)
            .ok()
            .and_then(|read| self.bytes_left.checked_sub(read));
        self.bytes_left =
            left.ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, "too much data"))?;
        Ok(read)
    }
}

/// The time left until the deadline, never zero.
fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// The first 80 characters of a message, for a log line.
fn excerpt(message: &Value) -> String {
    message.to_string().chars().take(80).collect()
}

#[cfg(test)]
mod tests;
