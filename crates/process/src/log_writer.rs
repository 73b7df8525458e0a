//! A writer for log lines that never blocks the thread that logs.
//!
//! ```text
//! any thread ── line ──> bounded queue ──> thread `log` ──> stderr
//!                            │                                │
//!                        full: dropped                 cannot be written: dropped
//! ```
//!
//! Stderr may be a pipe whose reader sleeps, a pipe without a reader, or a file on a full disk. A
//! worker that waited for it would hold its vring meanwhile. Lines that cannot be written are
//! dropped and counted, and the next line that can be written is preceded by their number.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Number of lines that may wait for the output.
const MAX_WAITING_LINES: usize = 1024;
/// How long [`LogWriter::flush`] waits.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(300);
/// Pause between two tries to hand a flush over to a full queue.
const FLUSH_RETRY: Duration = Duration::from_millis(5);

/// Hands lines over to the thread that writes them. Clones write to the same output.
#[derive(Debug, Clone)]
pub struct LogWriter {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Message {
    Line(Vec<u8>),
    /// Everything that was queued before has been written when this is answered.
    Flush(SyncSender<()>),
}

impl LogWriter {
    /// Starts the thread that writes to `output`, once it has called `on_start`. It ends with the last clone of the writer.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(
        output: impl Write + Send + 'static,
        on_start: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let (queue, messages) = sync_channel(MAX_WAITING_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&dropped);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || {
                on_start();
                write_lines(&messages, output, &counter);
            })?;
        Ok(Self { queue, dropped })
    }

    /// Queues a line, which ends with a line feed, or drops it if the queue is full.
    pub fn write_line(&self, line: Vec<u8>) {
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Number of lines that were dropped, because the queue was full or the output failed.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until the lines queued so far are written, for 300 ms at most. Returns whether they
    /// are.
    pub fn flush(&self) -> bool {
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        let (done, wait) = sync_channel(1);
        let mut message = Message::Flush(done);
        loop {
            match self.queue.try_send(message) {
                Ok(()) => break,
                Err(TrySendError::Full(unsent)) if Instant::now() < deadline => message = unsent,
                Err(_) => return false,
            }
            std::thread::sleep(FLUSH_RETRY);
        }
        wait.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .is_ok()
    }
}

/// The thread `log`. It ends when no writer is left.
fn write_lines(messages: &Receiver<Message>, mut output: impl Write, dropped: &AtomicU64) {
    let mut reported = 0;
    for message in messages {
        match message {
            Message::Line(line) => {
                let lost = dropped.load(Ordering::Relaxed);
                if lost > reported && write_loss(&mut output, lost - reported).is_ok() {
                    reported = lost;
                }
                if output.write_all(&line).is_err() {
                    dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            // Nobody waits any longer if this fails.
            Message::Flush(done) => drop(done.try_send(())),
        }
    }
}

fn write_loss(output: &mut impl Write, count: u64) -> io::Result<()> {
    let line = format!(
        "virtionetd: {count} log lines were lost, because standard error did not take them\n"
    );
    output.write_all(line.as_bytes())
}

/// One event of the log: tracing writes each with one call.
impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.write_line(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::{BufRead, BufReader};

    #[test]
    fn lines_arrive_in_their_order() {
        let (reader, output) = io::pipe().unwrap();
        let log = LogWriter::start(output, || ()).unwrap();
        for number in 0..10 {
            log.write_line(format!("{number}\n").into_bytes());
        }
        assert!(log.flush());
        drop(log);
        let lines: Vec<String> = BufReader::new(reader).lines().map(Result::unwrap).collect();
        assert_eq!(lines, (0..10).map(|n| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn lines_to_a_full_disk_are_dropped_and_counted() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let log = LogWriter::start(full, || ()).unwrap();
        (0..3).for_each(|_| log.write_line(b"lost\n".to_vec()));
        assert!(log.flush());
        assert_eq!(log.dropped(), 3);
    }

    #[test]
    fn lines_to_a_pipe_without_reader_are_dropped_and_counted() {
        let (reader, output) = io::pipe().unwrap();
        drop(reader);
        let log = LogWriter::start(output, || ()).unwrap();
        log.write_line(b"lost\n".to_vec());
        assert!(log.flush());
        assert_eq!(log.dropped(), 1);
    }

    #[test]
    fn reader_that_sleeps_blocks_neither_lines_nor_the_flush() {
        let (reader, output) = io::pipe().unwrap();
        let log = LogWriter::start(output, || ()).unwrap();
        let mut line = vec![b'x'; 1000];
        line.push(b'\n');
        let begin = Instant::now();
        (0..3000).for_each(|_| log.write_line(line.clone()));
        assert!(!log.flush());
        assert!(
            begin.elapsed() < 10 * FLUSH_TIMEOUT,
            "{:?}",
            begin.elapsed()
        );
        assert!(log.dropped() > 1000, "{}", log.dropped());
        // Once it reads again, the loss is reported in front of the next line.
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let report = lines.find(|line| line.starts_with("virtionetd"));
        assert!(report.unwrap().contains("log lines were lost"));
    }
}
