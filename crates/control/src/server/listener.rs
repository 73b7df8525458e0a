//! The connections of the server: how many there may be, who is at the other end, and for how long
//! they may stay.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::v1::Peer;

/// The most connections of all control sockets together.
pub const MAX_CONNECTIONS: usize = 256;
/// How long a client may send nothing, and take nothing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last.
const LIFETIME: Duration = Duration::from_secs(300);
/// The pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The answer to a client for which there is no connection left.
const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 115\r\n\r\n{\"error\":\"the control server has no connection left: close some of its 256 or try again\",\"code\":\"too-many-clients\"}";

/// A listening socket whose connections are counted.
#[derive(Debug)]
pub(super) struct BoundedListener {
    socket: UnixListener,
    connections: Arc<Semaphore>,
}

impl BoundedListener {
    /// `connections` has a permit for each connection that there may be.
    pub(super) fn new(socket: UnixListener, connections: Arc<Semaphore>) -> Self {
        Self {
            socket,
            connections,
        }
    }
}

impl Listener for BoundedListener {
    type Io = Connection;
    type Addr = Option<Peer>;

    async fn accept(&mut self) -> (Connection, Option<Peer>) {
        loop {
            let stream = match self.socket.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!("a control client cannot be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match Arc::clone(&self.connections).try_acquire_owned() {
                Ok(permit) => {
                    let peer = peer_of(&stream);
                    return (Connection::new(stream, permit), peer);
                }
                // It fits into the socket's buffer, or the client does not read.
                Err(_) => _ = stream.try_write(TOO_MANY),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Option<Peer>> {
        Ok(None)
    }
}

/// The process that has connected.
// syscalls: getsockopt
fn peer_of(stream: &UnixStream) -> Option<Peer> {
    let credentials = stream.peer_cred().ok()?;
    Some(Peer {
        uid: credentials.uid(),
        pid: credentials.pid(),
    })
}

/// The client of a request, if the kernel reports it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client(pub(super) Option<Peer>);

impl Connected<IncomingStream<'_, BoundedListener>> for Client {
    fn connect_info(stream: IncomingStream<'_, BoundedListener>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// A connection, which fails when its time is over.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    end: Instant,
    timer: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    fn new(stream: UnixStream, permit: OwnedSemaphorePermit) -> Self {
        let now = Instant::now();
        Self {
            stream,
            end: now + LIFETIME,
            timer: Box::pin(sleep_until(now + IDLE_TIMEOUT)),
            _permit: permit,
        }
    }

    /// Passes `done` on, and gives the client time again; or fails when the time is over.
    fn bound<T>(
        &mut self,
        done: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if done.is_ready() {
            let next = Instant::now() + IDLE_TIMEOUT;
            self.timer.as_mut().reset(next.min(self.end));
            return done;
        }
        match self.timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.bound(done, context)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.bound(done, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.bound(done, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_has_the_length_that_it_says() {
        let text = std::str::from_utf8(TOO_MANY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{}",
            body.len()
        );
        assert!(body.contains(&MAX_CONNECTIONS.to_string()));
    }
}
