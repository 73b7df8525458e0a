//! What a thread logs during a test.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// The log lines of a thread.
#[derive(Debug, Clone, Default)]
struct LogLines(Arc<Mutex<Vec<u8>>>);

impl LogLines {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl io::Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Calls `work` and returns its result and the log lines of this thread meanwhile.
pub fn with_log<T>(work: impl FnOnce() -> T) -> (T, String) {
    let lines = LogLines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    let result = tracing::subscriber::with_default(subscriber, work);
    (result, lines.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_of_this_thread_and_this_call_are_returned() {
        tracing::warn!("before");
        let (result, log) = with_log(|| {
            std::thread::spawn(|| tracing::warn!("another"))
                .join()
                .unwrap();
            tracing::warn!("meanwhile");
            7
        });
        assert_eq!(result, 7);
        assert!(
            log.contains("WARN") && log.ends_with("meanwhile\n"),
            "{log}"
        );
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}
