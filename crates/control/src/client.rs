//! A blocking client of the control server, which opens a connection for each request.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::v1::{ErrorReport, Report};

/// The longest time that the daemon may take for each part of its answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The longest time for the answer to a change, which waits for threads to end.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(35);
/// The largest answer that is read, in bytes. 128 devices with 128 queue pairs each need less.
const MAX_ANSWER: u64 = 256 << 20;

/// Why the client has no usable answer of the daemon.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket, or this process may not connect to it.
    #[error(
        "control socket {} cannot be reached ({source}): start virtionetd with --control, or name \
         its socket",
        path.display()
    )]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The connection failed, or the answer took too long.
    #[error(
        "virtionetd did not answer on {} ({source}): check whether it still runs",
        path.display()
    )]
    Transfer {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The daemon refuses the request.
    #[error("{message}")]
    Refused {
        /// The stable name of the cause.
        code: String,
        /// What happened, and what to do.
        message: String,
    },
    /// The answer is not a report in the format of this version.
    #[error(
        "the answer of {} cannot be read ({reason}): use the virtionetctl of the daemon's version",
        path.display()
    )]
    Answer {
        /// The socket's path.
        path: PathBuf,
        /// What is wrong with the answer.
        reason: String,
    },
}

impl ClientError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "control-unreachable",
            Self::Transfer { .. } => "control-transfer-failed",
            Self::Refused { .. } => "control-refused",
            Self::Answer { .. } => "control-answer-unreadable",
        }
    }
}

/// Requests `GET /v1/devices` from the daemon whose socket is at `path`, and returns the JSON as
/// the daemon sends it.
///
/// # Errors
/// When the daemon cannot be reached or its answer cannot be read.
pub fn devices_json(path: &Path) -> Result<String, ClientError> {
    get(path, "/v1/devices")
}

/// Requests the report of the daemon whose socket is at `path`.
///
/// # Errors
/// When the daemon cannot be reached or its answer cannot be read.
pub fn devices(path: &Path) -> Result<Report, ClientError> {
    let body = devices_json(path)?;
    serde_json::from_str(&body).map_err(|error| answer_error(path, error.to_string()))
}

/// Sends a request with this body, which is JSON or empty, to the daemon whose socket is at `path`.
/// Returns the status and the body of the answer, whatever the status is.
///
/// # Errors
/// When the daemon cannot be reached or its answer cannot be read.
pub fn request(
    path: &Path,
    method: &str,
    target: &str,
    body: &str,
) -> Result<(u16, String), ClientError> {
    let request = format!(
        "{method} {target} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (head, body) = answer(path, &request)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    match status {
        Some(status) => Ok((status, body)),
        None => Err(answer_error(path, "its HTTP status is missing".into())),
    }
}

/// The same for a request that must succeed. Returns the body of the answer.
///
/// # Errors
/// The same, and when the daemon refuses the request.
pub fn change(path: &Path, method: &str, target: &str, body: &str) -> Result<String, ClientError> {
    let (status, body) = request(path, method, target, body)?;
    accept(path, status, body)
}

/// The body of an answer of the daemon whose socket is at `path`, if `status` is that of a success.
///
/// # Errors
/// When the daemon refuses the request.
pub fn accept(path: &Path, status: u16, body: String) -> Result<String, ClientError> {
    if matches!(status, 200..=299) {
        return Ok(body);
    }
    match serde_json::from_str::<ErrorReport>(&body) {
        Ok(ErrorReport { error, code }) => Err(ClientError::Refused {
            code,
            message: error,
        }),
        Err(_) => Err(answer_error(path, format!("its HTTP status is {status}"))),
    }
}

fn get(path: &Path, target: &str) -> Result<String, ClientError> {
    let request = format!("GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    let (head, body) = answer(path, &request)?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body),
        status => Err(answer_error(
            path,
            format!("its HTTP status is {}", status.unwrap_or("missing")),
        )),
    }
}

/// The head and the body of the answer to `request`.
fn answer(path: &Path, request: &str) -> Result<(String, String), ClientError> {
    let mut stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
        path: path.into(),
        source,
    })?;
    let text = exchange(&mut stream, request).map_err(|source| ClientError::Transfer {
        path: path.into(),
        source,
    })?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| answer_error(path, "it is not HTTP".into()))?;
    Ok((head.to_owned(), body.to_owned()))
}

/// Sends one request and reads the whole answer. The version is HTTP/1.0, in which the answer ends
/// with the connection.
fn exchange(stream: &mut UnixStream, request: &str) -> io::Result<String> {
    let is_change = !request.starts_with("GET ");
    let timeout = if is_change { CHANGE_TIMEOUT } else { TIMEOUT };
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut text)?;
    Ok(text)
}

fn answer_error(path: &Path, reason: String) -> ClientError {
    ClientError::Answer {
        path: path.into(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::BufRead;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;
    use crate::v1::sample;

    /// The result of a client whose server sends `answer`, and the request that the server
    /// receives.
    fn exchange_with(
        name: &str,
        answer: impl AsRef<[u8]>,
    ) -> (Result<Report, ClientError>, String) {
        let path = std::env::temp_dir().join(format!("vnet-client-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let answer = answer.as_ref().to_owned();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            let mut reader = io::BufReader::new(stream.try_clone().unwrap());
            while !request.ends_with("\r\n\r\n") {
                assert_ne!(reader.read_line(&mut request).unwrap(), 0);
            }
            stream.write_all(&answer).unwrap();
            request
        });
        let result = devices(&path);
        let request = server.join().unwrap();
        fs::remove_file(&path).unwrap();
        (result, request)
    }

    #[test]
    fn report_is_read_from_the_answer() {
        let body = serde_json::to_string(&sample()).unwrap();
        let (report, request) =
            exchange_with("ok", format!("HTTP/1.0 200 OK\r\nx: y\r\n\r\n{body}"));
        assert!(
            request.starts_with("GET /v1/devices HTTP/1.0\r\n"),
            "{request}"
        );
        assert_eq!(serde_json::to_string(&report.unwrap()).unwrap(), body);
    }

    #[test]
    fn answer_that_cannot_be_transferred_is_an_error() {
        let error = exchange_with("bytes", b"HTTP/1.0 200 OK\r\n\r\n\xff").0;
        let error = error.unwrap_err();
        assert_eq!(error.code(), "control-transfer-failed");
        assert!(error.to_string().contains("UTF-8"), "{error}");
    }

    /// The sample with a number in place of a worker's counters.
    fn without_counters() -> String {
        let mut report = serde_json::to_value(sample()).unwrap();
        report["devices"][0]["pairs"][0]["worker_counters"] = 7.into();
        report.to_string()
    }

    #[test]
    fn unusable_answer_is_an_error_that_names_the_reason() {
        for (name, answer, reason) in [
            ("empty", "", "it is not HTTP"),
            (
                "status",
                "HTTP/1.0 404 Not Found\r\n\r\n{}",
                "its HTTP status is 404",
            ),
            ("line", "HTTP/1.0\r\n\r\n{}", "its HTTP status is missing"),
            ("json", "HTTP/1.0 200 OK\r\n\r\n{\"version\": ", "EOF"),
            (
                "counters",
                &format!("HTTP/1.0 200 OK\r\n\r\n{}", without_counters()),
                "invalid type: integer `7`, expected a map from names to counts",
            ),
        ] {
            let error = exchange_with(name, answer).0.unwrap_err();
            assert_eq!(error.code(), "control-answer-unreadable");
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn missing_socket_is_an_error_that_names_the_path() {
        let error = devices(Path::new("/nowhere/ctl")).unwrap_err();
        assert_eq!(error.code(), "control-unreachable");
        assert!(
            error
                .to_string()
                .starts_with("control socket /nowhere/ctl cannot be reached")
        );
    }
}
