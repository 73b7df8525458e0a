//! The log: lines on stderr, with a time stamp unless the journal stamps them itself. No thread
//! waits for stderr (see [`LogWriter`]).

use std::env;
use std::error::Error;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

use crate::log_writer::LogWriter;

/// The writer of this process, once the log is set up.
static WRITER: OnceLock<LogWriter> = OnceLock::new();

/// Why there can be no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `RUST_LOG` cannot be read.
    #[error(
        "RUST_LOG={text:?} is not a log filter ({source}): write one such as info or virtionetd=debug"
    )]
    Filter {
        /// Its text.
        text: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// The thread that writes the log cannot start.
    #[error("the log's thread cannot start ({0}); raise the limits of this process")]
    Thread(#[source] io::Error),
    /// The process has a log already.
    #[error("the log is already set up ({0}): set it up only once in a process")]
    Twice(#[source] Box<dyn Error + Send + Sync>),
}

impl LogError {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Filter { .. } => "log-filter-invalid",
            Self::Thread(_) => "log-thread-not-started",
            Self::Twice(_) => "log-set-up-twice",
        }
    }
}

/// Starts logging on stderr. `verbosity` counts `-v`: 0 is info, 1 debug, more trace; the
/// environment's `RUST_LOG` overrides it. The thread that writes the log calls `on_start` first.
///
/// # Errors
/// A filter in `RUST_LOG` that cannot be read; a thread that cannot start; a second call.
pub fn init(verbosity: u8, on_start: impl FnOnce() + Send + 'static) -> Result<(), LogError> {
    let rust_log = env::var_os("RUST_LOG").map(|text| text.to_string_lossy().into_owned());
    let filter = filter(verbosity, rust_log.as_deref())?;
    let writer = LogWriter::start(io::stderr(), on_start).map_err(LogError::Thread)?;
    let log = tracing_subscriber::fmt()
        .compact()
        .with_env_filter(filter)
        .with_writer(WRITER.get_or_init(|| writer).clone())
        // Its report of a failed write would be another write to stderr.
        .log_internal_errors(false)
        .with_ansi(
            io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        );
    if is_journal(
        &env::var("JOURNAL_STREAM").unwrap_or_default(),
        io::stderr(),
    ) {
        log.without_time().try_init()
    } else {
        log.try_init()
    }
    .map_err(LogError::Twice)
}

/// Prints `virtionetd: MESSAGE` on stderr and waits until it is written, for a fraction of a second
/// at most. For what a person must see although the log's level may hide it: why the program ends.
pub fn print_error(message: &str) {
    let line = format!("virtionetd: {message}\n");
    match WRITER.get() {
        Some(writer) => {
            writer.write_line(line.into_bytes());
            writer.flush();
        }
        // The log is not set up, so nothing is served that could be held up. There is nobody to
        // tell if this fails.
        None => drop(io::stderr().write_all(line.as_bytes())),
    }
}

/// Waits until the lines logged so far are written, for a fraction of a second at most.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        writer.flush();
    }
}

/// Number of log lines that were lost, because stderr did not take them.
#[must_use]
pub fn dropped_lines() -> u64 {
    WRITER.get().map_or(0, LogWriter::dropped)
}

fn filter(verbosity: u8, rust_log: Option<&str>) -> Result<EnvFilter, LogError> {
    let level = match verbosity {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let text = rust_log.filter(|text| !text.is_empty()).unwrap_or(level);
    EnvFilter::builder()
        .parse(text)
        .map_err(|source| LogError::Filter {
            text: text.into(),
            source,
        })
}

/// Whether `stream` is the one that systemd connected to the journal: it names that stream's
/// device and inode in `$JOURNAL_STREAM` (systemd.exec(5)).
fn is_journal(journal_stream: &str, stream: impl AsFd) -> bool {
    let metadata = stream
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| File::from(fd).metadata());
    match (metadata, journal_stream.split_once(':')) {
        (Ok(stream), Some((device, inode))) => {
            device.parse() == Ok(stream.dev()) && inode.parse() == Ok(stream.ino())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_sets_the_level_and_rust_log_overrides_it() {
        for (verbosity, rust_log, expected) in [
            (0, None, "info"),
            (1, None, "debug"),
            (2, None, "trace"),
            (9, Some(""), "trace"),
            (2, Some("warn"), "warn"),
            (0, Some("virtionetd=debug"), "virtionetd=debug"),
        ] {
            assert_eq!(
                filter(verbosity, rust_log).unwrap().to_string(),
                expected,
                "-v x {verbosity}, RUST_LOG={rust_log:?}"
            );
        }
    }

    #[test]
    fn bad_filter_is_one_sentence() {
        let message = filter(0, Some("virtionetd=loud")).unwrap_err().to_string();
        assert!(
            message.starts_with("RUST_LOG=\"virtionetd=loud\" is not a log filter ("),
            "{message}"
        );
        assert!(!message.contains('\n'));
    }

    #[test]
    fn only_the_named_stream_is_the_journal() {
        let file = File::open("/dev/null").unwrap();
        let metadata = file.metadata().unwrap();
        let name = format!("{}:{}", metadata.dev(), metadata.ino());
        assert!(is_journal(&name, &file));
        assert!(!is_journal(&name, io::pipe().unwrap().0));
        assert!(!is_journal("", &file));
        assert!(!is_journal("a:b", &file));
    }
}
