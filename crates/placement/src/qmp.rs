//! Asking QEMU for its vCPU threads over QMP.
//!
//! One short read-only visit: greeting, `qmp_capabilities`, then `query-cpus-fast`
//! (or, for a guest's cards, what [`net_devices`] asks).
//! Events may come between any two messages and are passed over. A monitor
//! serves one client at a time, so the socket must be one that nobody else
//! (libvirt, for one) holds open. The whole visit has one deadline and a limit
//! on what it reads.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::de::IoRead;
use serde_json::{Deserializer, StreamDeserializer, Value, json};

use crate::sys;

pub(crate) mod net_devices;

/// Bytes read in one visit at most; 4,096 vCPUs take about 1 MiB.
const MAX_BYTES: u64 = 4 << 20;

/// One vCPU as QEMU lists it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct CpuInfo {
    /// The vCPU's index.
    #[serde(rename = "cpu-index")]
    pub(crate) index: u32,
    /// Its thread, numbered in QEMU's PID namespace.
    #[serde(rename = "thread-id")]
    pub(crate) tid: i32,
}

/// Why QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("the QMP socket {} cannot be reached: {source}; start QEMU with -qmp unix:{},server=on,wait=off", .path.display(), .path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the QMP socket {} has other clients waiting: give a monitor that nobody else uses", .0.display())]
    Busy(PathBuf),
    #[error("QEMU did not answer {step} on {} within {timeout:?}: give a monitor that nobody else uses", .path.display())]
    Timeout {
        path: PathBuf,
        step: &'static str,
        timeout: Duration,
    },
    #[error("{} hung up before it answered {step}: check that it is QEMU's QMP socket", .path.display())]
    Closed { path: PathBuf, step: &'static str },
    #[error("{} does not speak QMP ({what} in place of the answer to {step}): check that it is QEMU's QMP socket", .path.display())]
    Malformed {
        path: PathBuf,
        step: &'static str,
        what: String,
    },
    #[error("QEMU at {} refused {step} ({what}): use QEMU 2.12 or later", .path.display())]
    Refused {
        path: PathBuf,
        step: &'static str,
        what: String,
    },
    #[error("the connection to QEMU at {} broke at {step}: {source}; check that QEMU still runs", .path.display())]
    Broken {
        path: PathBuf,
        step: &'static str,
        source: io::Error,
    },
}

/// QEMU's vCPUs and their threads, by rising index, from the monitor at `path`.
/// Takes `timeout` at most.
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
        let stream = sys::connect_unix(path).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => QmpError::Busy(path.into()),
            _ => connect(error),
        })?;
        let input = BoundedReader {
            stream: stream.try_clone().map_err(connect)?,
            deadline,
            left: MAX_BYTES,
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

    /// Runs a command without arguments; its name is its id as well.
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

/// A socket read until a deadline and up to a number of bytes.
struct BoundedReader {
    stream: UnixStream,
    deadline: Instant,
    left: u64,
}

impl Read for BoundedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream
            .set_read_timeout(Some(remaining(self.deadline)?))?;
        let read = self.stream.read(buffer)?;
        let left = u64::try_from(read)
            .ok()
            .and_then(|read| self.left.checked_sub(read));
        self.left =
            left.ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, "too much data"))?;
        Ok(read)
    }
}

/// Time left until the deadline, never zero.
fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// A message short enough for a log line.
fn excerpt(message: &Value) -> String {
    message.to_string().chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeQmp, GREETING, TempDir};
    use std::os::unix::net::UnixListener;

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn query(
        dir: &str,
        script: &'static [&'static str],
    ) -> (Result<Vec<CpuInfo>, QmpError>, Vec<Value>) {
        let dir = TempDir::new(dir);
        let server = FakeQmp::start(&dir, script.iter().map(|text| (*text).to_owned()).collect());
        let answer = query_vcpus(&server.path, TIMEOUT);
        (answer, server.requests())
    }

    #[test]
    fn asks_as_qemu_wants_to_be_asked() {
        let (vcpus, requests) = query(
            "qmp-good",
            &[
                GREETING,
                "{\"return\": {}, \"id\": \"qmp_capabilities\"}\r\n{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"RESUME\"}\r\n",
                "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 3}, \"event\": \"STOP\"}\r\n{\"return\": [\
             {\"thread-id\": 4002, \"props\": {\"core-id\": 1}, \"qom-path\": \"/machine/unattached/device[3]\", \"cpu-index\": 1, \"target\": \"x86_64\"}, \
             {\"thread-id\": 4001, \"props\": {\"core-id\": 0}, \"qom-path\": \"/machine/unattached/device[0]\", \"cpu-index\": 0, \"target\": \"x86_64\"}\
             ], \"id\": \"query-cpus-fast\"}\r\n",
            ],
        );
        assert_eq!(
            vcpus.unwrap(),
            [
                CpuInfo {
                    index: 0,
                    tid: 4001
                },
                CpuInfo {
                    index: 1,
                    tid: 4002
                }
            ]
        );
        let commands: Vec<_> = requests
            .iter()
            .map(|request| request["execute"].as_str().unwrap())
            .collect();
        assert_eq!(commands, ["qmp_capabilities", "query-cpus-fast"]);
    }

    #[test]
    fn reads_pretty_printed_messages() {
        let (vcpus, _) = query(
            "qmp-pretty",
            &[
                "{\n    \"QMP\": {\n        \"version\": {}\n    }\n}\r\n",
                "{\n    \"return\": {\n    },\n    \"id\": \"qmp_capabilities\"\n}\r\n",
                "{\n    \"return\": [\n    ],\n    \"id\": \"query-cpus-fast\"\n}\r\n",
            ],
        );
        assert_eq!(vcpus.unwrap(), []);
    }

    #[test]
    fn says_what_went_wrong() {
        const CAPABLE: &str = "{\"return\": {}, \"id\": \"qmp_capabilities\"}\r\n";
        let table: [(&str, &'static [&'static str], &str); 6] = [
            (
                "qmp-hangup",
                &[GREETING],
                "hung up before it answered qmp_capabilities",
            ),
            (
                "qmp-http",
                &["HTTP/1.0 400 Bad Request\r\n"],
                "does not speak QMP (expected value at line 1",
            ),
            (
                "qmp-json",
                &["{\"hello\": 1}"],
                "does not speak QMP ({\"hello\":1} in place of",
            ),
            (
                "qmp-old",
                &[
                    GREETING,
                    CAPABLE,
                    "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no such command\"}, \"id\": \"query-cpus-fast\"}",
                ],
                "refused query-cpus-fast (\"no such command\"): use QEMU 2.12 or later",
            ),
            (
                "qmp-id",
                &[GREETING, "{\"return\": {}, \"id\": \"other\"}"],
                "in place of the answer to qmp_capabilities",
            ),
            (
                "qmp-field",
                &[
                    GREETING,
                    CAPABLE,
                    "{\"return\": [{\"cpu-index\": 0, \"thread-id\": 99999999999}], \"id\": \"query-cpus-fast\"}",
                ],
                "does not speak QMP (invalid value: integer `99999999999`",
            ),
        ];
        for (dir, script, words) in table {
            let error = query(dir, script).0.unwrap_err().to_string();
            assert!(error.contains(words), "{dir}: {error}");
        }
    }

    #[test]
    fn a_flood_ends_at_the_byte_limit() {
        let event = "{\"event\": \"RESUME\", \"data\": {\"x\": \"0123456789012345678901234567890123456789\"}}\r\n";
        let flood = event.repeat(usize::try_from(MAX_BYTES).unwrap() / event.len() + 1);
        let dir = TempDir::new("qmp-flood");
        let server = FakeQmp::start(&dir, vec![GREETING.into(), flood]);
        let error = query_vcpus(&server.path, TIMEOUT).unwrap_err();
        assert!(matches!(error, QmpError::Broken { .. }), "{error}");
        assert!(error.to_string().contains("too much data"), "{error}");
    }

    #[test]
    fn a_silent_or_crowded_monitor_costs_the_timeout_at_most() {
        let dir = TempDir::new("qmp-silent");
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let timeout = Duration::from_millis(50);
        let started = Instant::now();
        let error = query_vcpus(&path, timeout).unwrap_err();
        assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains("did not answer with its greeting on"),
            "{error}"
        );
        assert!(error.to_string().contains("within 50ms"), "{error}");
        assert!(started.elapsed() >= timeout);

        let mut waiting = Vec::new();
        let crowded = loop {
            match sys::connect_unix(&path) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(crowded.kind(), io::ErrorKind::WouldBlock);
        let error = query_vcpus(&path, timeout).unwrap_err();
        assert!(matches!(error, QmpError::Busy(_)), "{error}");
        drop(listener);
    }

    #[test]
    fn an_absent_socket_names_the_option() {
        let error = query_vcpus(Path::new("/nonexistent/qmp"), TIMEOUT).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the QMP socket /nonexistent/qmp cannot be reached: No such file or directory (os error 2); \
             start QEMU with -qmp unix:/nonexistent/qmp,server=on,wait=off"
        );
    }
}
