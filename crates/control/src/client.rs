//! A blocking client of the control socket: one request, one connection.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::v1::Report;

/// How long the daemon may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of the longest answer that is read: more than 128 devices of 128 queue pairs need.
const MAX_ANSWER: u64 = 256 << 20;

/// Why the daemon did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket, or it cannot be reached.
    #[error("control socket {} cannot be reached ({source}): start virtionetd with --control, or name its socket", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The connection failed, or the answer took too long.
    #[error("virtionetd did not answer on {} ({source}): see whether it still runs", path.display())]
    Transfer {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The answer is not what this version understands.
    #[error("the answer of {} cannot be read ({reason}): use the virtionetctl of the daemon's version", path.display())]
    Answer {
        /// The socket's path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Asks the daemon at `path` for its devices.
///
/// # Errors
/// When it cannot be reached or its answer cannot be read.
pub fn devices(path: &Path) -> Result<Report, ClientError> {
    let body = get(path, "/v1/devices")?;
    serde_json::from_str(&body).map_err(|error| answer(path, error.to_string()))
}

fn get(path: &Path, target: &str) -> Result<String, ClientError> {
    let mut stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
        path: path.into(),
        source,
    })?;
    let text = exchange(&mut stream, target).map_err(|source| ClientError::Transfer {
        path: path.into(),
        source,
    })?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| answer(path, "it is no HTTP answer".into()))?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.into()),
        status => Err(answer(
            path,
            format!("HTTP status {}", status.unwrap_or("missing")),
        )),
    }
}

/// HTTP/1.0 has neither chunks nor persistent connections: the answer ends with the connection.
fn exchange(stream: &mut UnixStream, target: &str) -> io::Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut text)?;
    Ok(text)
}

fn answer(path: &Path, reason: String) -> ClientError {
    ClientError::Answer {
        path: path.into(),
        reason,
    }
}
