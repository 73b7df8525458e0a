//! A file that a guest receives by TCP into its memory, whose contents are compared at the end. They
//! show that a migration loses and changes nothing that was written long before.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::echo_stream::{connect, fill};
use crate::guest::Guest;
use crate::netns::Netns;
use crate::paths::RunDir;
use crate::process::output;

const PORT: u16 = 7001;
/// The file in the guest, in a file system in memory.
const RECEIVED: &str = "/tmp/received";
const CHUNK: usize = 16 * 1024;
/// The pause between two writes. It limits the transfer to 2 Mbyte/s.
const PAUSE: Duration = Duration::from_millis(8);
/// The largest file, in bytes.
const MAX_SIZE: u64 = 64 << 20;

/// A file that is being received.
#[derive(Debug)]
pub struct FileTransfer {
    should_stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<Result<u64>>,
}

impl FileTransfer {
    /// Starts a receiver in `guest`, and sends to it from the namespace.
    ///
    /// # Errors
    /// When the receiver does not start, or does not accept the connection.
    pub fn start(netns: &Netns, guest: &Guest, address: &str) -> Result<Self> {
        guest.ok(&format!(
            "setsid busybox nc -l -p {PORT} </dev/null >{RECEIVED} 2>/dev/null & sleep 1"
        ))?;
        let socket = connect(netns, SocketAddr::new(address.parse()?, PORT))?;
        let should_stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (stop, progress) = (Arc::clone(&should_stop), Arc::clone(&sent));
        let sender = thread::Builder::new()
            .name("file-sender".into())
            .spawn(move || send_until(socket, &stop, &progress))?;
        Ok(Self {
            should_stop,
            sent,
            sender,
        })
    }

    /// Waits until another `bytes` bytes were sent, or the file has its largest size.
    ///
    /// # Errors
    /// When that takes longer than `timeout`.
    pub fn wait_for_progress(&self, bytes: u64, timeout: Duration) -> Result<()> {
        let until = Instant::now() + timeout;
        let sent = || self.sent.load(Ordering::Relaxed);
        let wanted = (sent() + bytes).min(MAX_SIZE);
        while sent() < wanted {
            ensure!(
                Instant::now() < until && !self.sender.is_finished(),
                "only {} of {wanted} bytes were sent within {timeout:?}",
                sent()
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Ends the file, and returns its size.
    ///
    /// # Errors
    /// When `guest` has not received exactly what was sent.
    pub fn finish(self, guest: &Guest, dir: &RunDir) -> Result<u64> {
        self.should_stop.store(true, Ordering::Relaxed);
        let sender = self.sender.join();
        let size = sender.map_err(|_| anyhow!("the sender panicked"))??;
        let mut contents = vec![0; usize::try_from(size)?];
        fill(0, &mut contents);
        let file = dir.join("sent");
        std::fs::write(&file, contents)?;
        let sent = output(
            "busybox",
            [String::from("md5sum"), file.display().to_string()],
        )?;
        let received = guest.ok(&format!(
            "for i in $(seq 300); do [ $(wc -c <{RECEIVED}) = {size} ] && break; sleep 0.1; done; wc -c <{RECEIVED}; busybox md5sum {RECEIVED}"
        ))?;
        let mut words = received.split_whitespace();
        let (received_size, sum) = (words.next(), words.next());
        ensure!(
            received_size == Some(&size.to_string()) && sum == sent.split_whitespace().next(),
            "the guest received another file than the {size} bytes of {sent}: {received}"
        );
        Ok(size)
    }
}

fn send_until(mut socket: TcpStream, should_stop: &AtomicBool, sent: &AtomicU64) -> Result<u64> {
    let mut size = 0;
    let mut chunk = [0; CHUNK];
    while !should_stop.load(Ordering::Relaxed) {
        if size < MAX_SIZE {
            fill(size, &mut chunk);
            socket
                .write_all(&chunk)
                .with_context(|| format!("the guest takes nothing after {size} bytes"))?;
            size += u64::try_from(CHUNK)?;
            sent.store(size, Ordering::Relaxed);
        }
        thread::sleep(PAUSE);
    }
    socket.shutdown(Shutdown::Write)?;
    Ok(size)
}
