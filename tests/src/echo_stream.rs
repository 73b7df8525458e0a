//! TCP connections from the host to an echo server in a guest, whose every byte is checked on its
//! way back. They show that a migration loses and changes nothing.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

use crate::guest::Guest;
use crate::netns::Netns;

const PORT: u16 = 7000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The time that the guest may be silent. The retransmission timeout of TCP can reach some seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(40);
/// The pause between two writes. It limits a connection to 16 Mbyte/s, so that a guest under
/// software emulation has time for a migration.
const PAUSE: Duration = Duration::from_millis(1);
const CHUNK: usize = 16 * 1024;

/// Connections to the echo server of a guest.
#[derive(Debug)]
pub struct EchoStreams {
    should_stop: Arc<AtomicBool>,
    streams: Vec<EchoStream>,
}

#[derive(Debug)]
struct EchoStream {
    /// The number of bytes that came back as they were sent.
    verified: Arc<AtomicU64>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<u64>>,
}

impl EchoStreams {
    /// Starts the server in `guest`, and `count` connections to it from the namespace.
    ///
    /// # Errors
    /// When the server does not start or a connection fails.
    pub fn start(netns: &Netns, guest: &Guest, address: &str, count: u16) -> Result<Self> {
        guest.ok(&format!(
            "setsid busybox nc -ll -p {PORT} -e cat >/dev/null 2>&1 & sleep 1"
        ))?;
        let address = SocketAddr::new(address.parse()?, PORT);
        let should_stop = Arc::new(AtomicBool::new(false));
        let streams = (0..count).map(|_| {
            let socket = connect(netns, address)?;
            EchoStream::start(socket, &should_stop)
        });
        Ok(Self {
            streams: streams.collect::<Result<_>>()?,
            should_stop,
        })
    }

    /// Waits until each connection has carried another `bytes` bytes both ways.
    ///
    /// # Errors
    /// When one does not within `timeout`.
    pub fn wait_for_progress(&self, bytes: u64, timeout: Duration) -> Result<()> {
        let until = Instant::now() + timeout;
        let verified = |stream: &EchoStream| stream.verified.load(Ordering::Relaxed);
        let wanted: Vec<u64> = self.streams.iter().map(|s| verified(s) + bytes).collect();
        for (n, (stream, wanted)) in self.streams.iter().zip(wanted).enumerate() {
            while verified(stream) < wanted {
                ensure!(
                    !stream.receiver.is_finished(),
                    "connection {n} ended: look at the result of its threads"
                );
                ensure!(
                    Instant::now() < until,
                    "connection {n} carried only {} of {wanted} bytes within {timeout:?}",
                    verified(stream)
                );
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Ends the connections, and returns how many bytes they carried both ways.
    ///
    /// # Errors
    /// When a byte was lost or changed, or a connection broke.
    pub fn finish(self) -> Result<u64> {
        self.should_stop.store(true, Ordering::Relaxed);
        let mut total = 0;
        for (n, stream) in self.streams.into_iter().enumerate() {
            let joined = |thread: JoinHandle<Result<u64>>| match thread.join() {
                Ok(result) => result.with_context(|| format!("connection {n}")),
                Err(_) => bail!("a thread of connection {n} panicked"),
            };
            let (sent, received) = (joined(stream.sender)?, joined(stream.receiver)?);
            ensure!(
                sent == received,
                "connection {n} sent {sent} bytes, and {received} came back"
            );
            total += received;
        }
        Ok(total)
    }
}

impl EchoStream {
    fn start(socket: TcpStream, should_stop: &Arc<AtomicBool>) -> Result<Self> {
        let verified = Arc::new(AtomicU64::new(0));
        let (should_stop, progress) = (Arc::clone(should_stop), Arc::clone(&verified));
        let outgoing = socket.try_clone()?;
        Ok(Self {
            verified,
            sender: thread::Builder::new()
                .name("echo-sender".into())
                .spawn(move || send_until(outgoing, &should_stop))?,
            receiver: thread::Builder::new()
                .name("echo-receiver".into())
                .spawn(move || receive_all(socket, &progress))?,
        })
    }
}

/// Connects from within the namespace. The socket stays there; the thread ends.
pub(crate) fn connect(netns: &Netns, address: SocketAddr) -> Result<TcpStream> {
    let path = format!("/run/netns/{}", netns.name());
    let connecting = thread::spawn(move || -> Result<TcpStream> {
        setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        let socket = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)
            .context("the guest's echo server does not accept connections")?;
        socket.set_read_timeout(Some(SILENCE_LIMIT))?;
        socket.set_write_timeout(Some(SILENCE_LIMIT))?;
        Ok(socket)
    });
    let Ok(connected) = connecting.join() else {
        bail!("the connecting thread panicked");
    };
    connected
}

/// The bytes from offset `at` on. No part of the stream equals another one, so that an old page
/// cannot pass for a new one.
pub(crate) fn fill(at: u64, chunk: &mut [u8]) {
    for (n, byte) in (at..).zip(chunk) {
        let word = (n / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        *byte = word[usize::try_from(n % 8).unwrap_or(0)];
    }
}

fn send_until(mut socket: TcpStream, should_stop: &AtomicBool) -> Result<u64> {
    let mut sent = 0;
    let mut chunk = [0; CHUNK];
    while !should_stop.load(Ordering::Relaxed) {
        fill(sent, &mut chunk);
        socket
            .write_all(&chunk)
            .with_context(|| format!("the guest takes nothing after {sent} bytes"))?;
        sent += u64::try_from(CHUNK)?;
        thread::sleep(PAUSE);
    }
    socket.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn receive_all(mut socket: TcpStream, progress: &AtomicU64) -> Result<u64> {
    let mut received = 0;
    let (mut chunk, mut wanted) = ([0; CHUNK], [0; CHUNK]);
    loop {
        let count = match socket.read(&mut chunk) {
            Ok(0) => return Ok(received),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => bail!("nothing comes back after {received} bytes: {error}"),
        };
        let (chunk, wanted) = (&chunk[..count], &mut wanted[..count]);
        fill(received, wanted);
        if let Some(at) = chunk
            .iter()
            .zip(&*wanted)
            .position(|(got, want)| got != want)
        {
            bail!(
                "byte {} came back as another",
                received + u64::try_from(at)?
            );
        }
        received += u64::try_from(count)?;
        progress.store(received, Ordering::Relaxed);
    }
}
