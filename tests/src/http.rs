//! A minimal HTTP/1.1 client over a Unix socket, for the control socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const TIMEOUT: Duration = Duration::from_secs(10);

/// An HTTP response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code, such as 200.
    pub status: u16,
    /// The body, without the chunked transfer coding.
    pub body: String,
}

/// Sends the request `METHOD TARGET` with `body` to the server on `socket`.
///
/// # Errors
/// When no server listens on the socket, or when a read or a write takes longer than 10 s.
pub fn request(socket: &Path, method: &str, target: &str, body: &str) -> Result<Response> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("no server listens on {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let length = body.len();
    write!(
        stream,
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut response = Vec::new();
    stream
        .read_to_end(&mut response)
        .with_context(|| format!("the response to {method} {target} is incomplete"))?;
    parse(&String::from_utf8_lossy(&response))
}

fn parse(response: &str) -> Result<Response> {
    let Some((head, body)) = response.split_once("\r\n\r\n") else {
        bail!("the response has no empty line after its headers: {response:?}");
    };
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .with_context(|| format!("the response has no status code: {head:?}"))?;
    let head = head.to_ascii_lowercase();
    let body = if head.contains("transfer-encoding: chunked") {
        unchunk(body)?
    } else {
        body.to_owned()
    };
    Ok(Response { status, body })
}

fn unchunk(mut body: &str) -> Result<String> {
    let mut joined = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("a chunk has no size")?;
        let size = usize::from_str_radix(size.trim(), 16)
            .with_context(|| format!("the size of a chunk is '{size}', not a number"))?;
        if size == 0 {
            return Ok(joined);
        }
        joined.push_str(rest.get(..size).context("a chunk is too short")?);
        body = rest.get(size + 2..).context("a chunk has no end")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_chunked_bodies_give_the_same_response() {
        let plain = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        let chunked =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n";
        let expected = Response {
            status: 200,
            body: "hello".into(),
        };
        assert_eq!(parse(plain).unwrap(), expected);
        assert_eq!(parse(chunked).unwrap(), expected);
    }

    #[test]
    fn invalid_response_is_an_error() {
        for response in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nshort",
        ] {
            assert!(parse(response).is_err(), "{response:?}");
        }
    }
}
